"""The experts that plan a way: better with a higher grade, and the same whoever else is served."""

import numpy as np
import pytest

from offbook.client.protocol import ActionSpec
from offbook.errors import ConfigError
from offbook.sim.adapters import make
from offbook.sim.experts import RandomPolicy, make_expert
from offbook.sim.planners import Drift
from offbook.sim.play import play

MAZE, DOOR = "robotics:PointMaze_UMaze-v3", "minigrid:MiniGrid-DoorKey-8x8-v0"


def _played(env_id, grade, seeds, **settings):
    env = make(env_id, **settings)
    try:
        return [next(play([env], make_expert(env_id, grade), [seed])) for seed in seeds]
    finally:
        env.close()


def test_the_door_is_opened_by_what_the_narrow_view_shows():
    played = _played(DOOR, 1.0, range(8))
    assert all(episode.success for episode in played)
    # The shortest ways need about this many; a random policy needs hundreds.
    assert np.mean([episode.steps for episode in played]) < 30


def test_a_larger_room_is_explored():
    assert all(episode.success for episode in _played("minigrid:MiniGrid-DoorKey-16x16-v0", 1.0, range(3)))


def test_mistakes_cost_the_planner_time_but_not_its_map():
    flawless, poor = (_played(DOOR, grade, range(8)) for grade in (1.0, 0.5))
    assert all(episode.success for episode in poor)
    assert np.mean([episode.steps for episode in poor]) > 1.3 * np.mean([episode.steps for episode in flawless])


@pytest.mark.parametrize("maze", ["UMaze", "Medium"])
def test_the_maze_is_driven_to_the_goal(maze):
    assert all(episode.success for episode in _played(f"robotics:PointMaze_{maze}-v3", 1.0, range(6)))


def test_a_lower_grade_reaches_fewer_goals():
    reached = [
        np.mean([episode.return_ for episode in _played(MAZE, grade, range(6), reset_target=True)])
        for grade in (1.0, 0.4)
    ]
    assert reached[0] > 1.3 * reached[1] > 0


def test_where_goals_follow_one_another_no_episode_is_called_a_failure():
    assert _played(MAZE, 1.0, [0], reset_target=True)[0].success is None


def test_drifting_actions_stay_in_bounds_and_hang_together():
    drift = Drift(3, np.random.default_rng(0))
    values = np.array([drift.next() for _ in range(4000)])
    assert np.abs(values).max() <= 1
    assert np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1] > 0.9
    assert abs(values.mean()) < 0.15


@pytest.mark.parametrize(
    "action",
    [ActionSpec(size=1, low=(0.0,), high=(3.0,), choices=4), ActionSpec(size=1, low=(-np.inf,), high=(np.inf,))],
)
def test_drifting_needs_bounds(action):
    with pytest.raises(ConfigError, match="bounded continuous"):
        RandomPolicy(action, memory=0.9)


def test_the_state_of_the_physics_is_kept_where_it_is_wanted():
    env = make("dmc:walker-walk", physics=True)
    try:
        observation, _ = env.reset(seed=0)
        before = observation["physics"].copy()
        after, *_ = env.step(env.action_space.sample())
        assert before.shape == env.observation_space["physics"].shape == (18,)
        assert not np.array_equal(before, after["physics"])
    finally:
        env.close()
