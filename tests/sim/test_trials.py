"""Several trials as one episode: what is shown, what stays, what ends it."""

import gymnasium as gym
import numpy as np
import pytest

from offbook.errors import ConfigError
from offbook.sim.adapters import make
from offbook.sim.experts import make_expert
from offbook.sim.keyed_door import places_of
from offbook.sim.play import play
from offbook.sim.spaces import observation_spec
from offbook.sim.trials import TRIAL, Trials

# Key in the upper left, door in the middle of the upper wall: up, left, right.
SEED = next(seed for seed in range(1000) if places_of(seed) == ((0, 0), (0, 3)))
STRAIGHT = [0, 0, 0, 2, 2, 2, 3, 3, 3]
IDLE = [1] * 30


@pytest.fixture
def doors():
    env = make("offbook:keyed-door", trials=3)
    yield env
    env.close()


def test_the_leaf_tells_trial_step_and_last_reward_across_trials_of_different_lengths(doors):
    observation, _ = doors.reset(seed=SEED)
    shown, ends = [observation], []
    for action in STRAIGHT + IDLE + STRAIGHT:
        observation, _, terminated, truncated, info = doors.step(action)
        assert doors.observation_space.contains(observation)
        shown.append(observation)
        ends.append((terminated, truncated))
    earned = [0, 0, 0, 0, 0, 0, 1, 0, 0]
    straight = [*enumerate(earned)]
    expected = [(0, *said) for said in straight]
    expected += [(1, 0, 1)] + [(1, step, 0) for step in range(1, 30)]
    expected += [(2, *said) for said in straight] + [(2, 9, 1)]
    assert [tuple(seen[TRIAL].tolist()) for seen in shown] == expected
    assert [seen["view"].tolist() for seen in shown if seen[TRIAL][1] == 0] == [[0, 0, 0]] * 3
    assert ends == [(False, False)] * 47 + [(True, False)]
    assert info["returns"] == [2.0, 0.0, 2.0]
    assert info["success"] is True


def test_an_episode_can_begin_with_a_later_trial_and_ends_as_its_last_did(doors):
    observation, _ = doors.reset(seed=SEED, options={"first": 2})
    assert observation[TRIAL].tolist() == [2, 0, 0]
    for action in IDLE:
        *_, terminated, truncated, info = doors.step(action)
    assert (terminated, truncated, info["returns"], info["success"]) == (False, True, [0.0], False)


def test_an_episode_can_end_before_its_last_trial(doors):
    doors.reset(seed=SEED, options={"first": 1, "stop": 2})
    for action in STRAIGHT:
        *_, terminated, truncated, info = doors.step(action)
    assert (terminated, truncated, info["returns"], info["success"]) == (True, False, [2.0], True)
    doors.reset(seed=SEED)
    assert not any(doors.step(action)[2] for action in STRAIGHT)  # only that one ended early


@pytest.mark.parametrize(
    ("stop", "words"), [(0, "2 to 3"), (1, "2 to 3"), (4, "2 to 3"), (True, "2 to 3"), ("all", "2")]
)
def test_an_end_that_is_not_there_is_refused(doors, stop, words):
    with pytest.raises(ConfigError, match=f"'stop': expected a number from {words}"):
        doors.reset(seed=1, options={"first": 1, "stop": stop})


@pytest.mark.parametrize("first", [3, -1, "last"])
def test_a_trial_that_is_not_there_is_refused(doors, first):
    with pytest.raises(ConfigError, match="0 to 2"):
        doors.reset(seed=1, options={"first": first})


def test_later_trials_are_reset_without_a_seed_also_those_that_are_skipped():
    plain, env = make("gym:CartPole-v1"), make("gym:CartPole-v1", trials=3)
    starts = [plain.reset(seed=4)[0], plain.reset()[0], plain.reset()[0]]
    assert observation_spec(env.observation_space).state == (("observation", 4), (TRIAL, 3))
    for first, start in enumerate(starts):
        observation, _ = env.reset(seed=4, options={"first": first})
        np.testing.assert_array_equal(observation["observation"], start)
    assert env.action_space == plain.action_space
    assert env.metadata["control_hz"] == 50
    assert env.render().ndim == 3
    plain.close()
    env.close()


def test_other_options_reach_the_world_in_every_trial():
    env = make("offbook:pour", image_size=0, max_steps=1, trials=2)
    assert env.prompt == "pour the grains from the cup into the bowl"
    env.reset(seed=1, options={"scene": {"bowl": [0.5, 0.1]}})
    bowls = [env.step(np.zeros(7))[0]["objects"][:2] for _ in range(2)]
    np.testing.assert_allclose(bowls, [[0.5, 0.1]] * 2, atol=1e-6)
    env.close()


def test_the_loop_plays_all_trials_as_one_episode(doors):
    [played] = play([doors], make_expert("offbook:keyed-door"), [SEED])
    assert played.steps == 27
    assert played.return_ == 6
    assert played.terminated
    assert played.fields[TRIAL].shape == (28, 3)


def test_a_leaf_of_that_name_is_not_overwritten():
    class Taken(gym.Env):
        observation_space = gym.spaces.Dict(trial=gym.spaces.Discrete(3))
        action_space = gym.spaces.Discrete(2)

    with pytest.raises(ConfigError, match="no leaf 'trial' yet"):
        Trials(Taken(), 2)
