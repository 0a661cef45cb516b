"""The worlds that hide something, and the experts that know it."""

import numpy as np
import pytest

from offbook.errors import ConfigError
from offbook.sim.adapters import make
from offbook.sim.darkpoint import Darkpoint, goal_of
from offbook.sim.experts import make_expert
from offbook.sim.keyed_door import CORNERS, DOORS, KeyedDoor, places_of
from offbook.sim.play import play


def _returns(env_id, grade, **settings):
    """Returns and successes of 40 sessions."""
    env = make(env_id, **settings)
    policy = make_expert(env_id, grade, settings=settings)
    played = list(play([env], policy, range(40), keep=False))
    env.close()
    return np.array([episode.return_ for episode in played]), np.array([episode.success for episode in played])


def _towards(world, goal):
    """The rewards of an episode that goes straight to a place."""
    rewards, place, truncated = [], np.zeros(2), False
    while not truncated:
        observation, reward, _, truncated, _ = world.step((goal - place) / 0.2)
        place = observation["position"].astype(np.float64)
        rewards.append(reward)
    return rewards


def test_the_point_earns_by_nearness_and_its_goal_stays_without_a_seed():
    world = Darkpoint()
    world.reset(seed=5)
    straight = [0.2, 0.4, 0.6, 0.8] + [1.0] * 12
    np.testing.assert_allclose(_towards(world, goal_of(5)), straight, atol=1e-6)
    world.reset()
    np.testing.assert_allclose(_towards(world, goal_of(5)), straight, atol=1e-6)
    world.reset()
    assert sum(_towards(world, goal_of(5, np.pi))) == 0
    world.reset(seed=6)
    assert sum(_towards(world, goal_of(5))) < 13


def test_the_point_moves_no_further_than_its_stride_and_not_through_walls():
    world = Darkpoint()
    world.reset(seed=0)
    observation, *_ = world.step(np.array([1.0, 1.0]))
    np.testing.assert_allclose(observation["position"], [0.2 / 2**0.5] * 2, atol=1e-6)
    for _ in range(15):
        observation, *_ = world.step(np.array([1.0, 0.0]))
    assert world.observation_space.contains(observation)
    assert observation["position"][0] == 1.5
    with pytest.raises(Exception, match="reset"):
        world.step(np.zeros(2))


def test_a_fixed_goal_heeds_no_seed():
    world = Darkpoint(goal="fixed")
    for seed in (1, 2):
        world.reset(seed=seed)
        assert sum(_towards(world, goal_of(0))) > 13.9
    assert _returns("offbook:darkpoint", 1.0, goal="fixed")[0].min() > 13


@pytest.mark.parametrize("action", [np.zeros(3), np.array([0.0, np.nan])])
def test_actions_that_are_no_moves_are_refused(action):
    world = Darkpoint()
    world.reset(seed=0)
    with pytest.raises(ConfigError, match="2 finite numbers"):
        world.step(action)


def test_key_and_door_are_everywhere_once_and_stay_without_a_seed():
    assert {places_of(seed) for seed in range(400)} == {(key, door) for key in CORNERS for door in DOORS}
    seed = next(seed for seed in range(1000) if places_of(seed) == ((6, 6), (6, 3)))
    world = KeyedDoor()
    for given in (seed, None):
        world.reset(seed=given)
        # Over the door without the key, which changes nothing; against the wall; then back with the key.
        steps = [world.step(action) for action in [1, 1, 1, 1, 3, 3, 3, 2, 3, 2, 2, 2]]
        assert [reward for _, reward, *_ in steps] == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
        assert [observation["view"][2] for observation, *_ in steps] == [0] * 6 + [1] * 6
        assert steps[3][0]["view"].tolist() == [1, 0, 0]
        assert [terminated for _, _, terminated, _, _ in steps] == [False] * 11 + [True]
        assert steps[-1][-1]["success"] is True
    world.reset()
    with pytest.raises(ConfigError, match="0, 1, 2 or 3"):
        world.step(4)


def test_the_time_in_the_room_is_limited():
    world = KeyedDoor()
    world.reset(seed=0)
    ends = [world.step(0)[2:4] for _ in range(30)]
    assert ends == [(False, False)] * 29 + [(False, True)]
    with pytest.raises(Exception, match="reset"):
        world.step(0)


@pytest.mark.parametrize("env_id", ["offbook:darkpoint", "offbook:keyed-door"])
def test_a_higher_grade_earns_more(env_id):
    means = []
    for grade in (0.0, 0.4, 0.8, 1.0):
        returns, successes = _returns(env_id, grade)
        means.append(returns.mean())
    assert successes.all()
    assert means == sorted(means)
    assert means[-1] > 1.5 * means[1] > 1.5 * means[0]


def test_an_expert_of_the_hidden_needs_sessions_that_are_seeds():
    for env_id in ("offbook:darkpoint", "offbook:keyed-door"):
        with pytest.raises(ConfigError, match="sessions named by seeds"):
            make_expert(env_id).reset(["trial-7f"], [""])


@pytest.mark.parametrize(("world", "size"), [(Darkpoint(), 240), (KeyedDoor(), 224)])
def test_a_picture_shows_what_happened(world, size):
    world.reset(seed=0)
    before = world.render()
    world.step(np.ones(2) if size == 240 else 1)
    after = world.render()
    assert before.shape == after.shape == (size, size, 3)
    assert before.dtype == np.uint8
    assert (before != after).any()
