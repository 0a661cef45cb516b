"""Simulators as robots: what they say of themselves, and that a trial is the evaluation of the same policy."""

import numpy as np
import pytest

from offbook.client.protocol import FunctionPolicy, ObservationSpec, PolicyMeta
from offbook.errors import ConfigError, RobotError
from offbook.robots import ENVIRONMENTS, make_robot
from offbook.robots.base import Robot
from offbook.robots.gym import GymRobot
from offbook.robots.trial import run_trial
from offbook.sim.adapters import make
from offbook.sim.darkpoint import goal_of
from offbook.sim.experts import RandomPolicy, make_expert
from offbook.sim.play import play
from offbook.sim.tabletop.pour import scenes


@pytest.mark.parametrize("name", [*ENVIRONMENTS, "gym:Pendulum-v1", "minigrid:MiniGrid-Empty-5x5-v0"])
def test_every_robot_keeps_its_own_description(name):
    robot = make_robot(name)
    assert isinstance(robot, Robot)
    spec = robot.spec
    record = run_trial(robot, RandomPolicy(spec.action), None, 3, session="x", frame_every=40)
    observation = robot.reset(None, 3)
    robot.close()
    assert record.outcome == "done", record.reason
    assert 0 < record.steps <= spec.max_steps
    assert observation.state.shape == (1, spec.observation.state_size)
    assert {camera: frames.shape[1:3] for camera, frames in observation.images.items()} == spec.observation.cameras
    np.testing.assert_array_equal(observation.state[0], record.state[0])
    assert record.frames[0].dtype == np.uint8


@pytest.mark.parametrize("task", ["pour", "scoop"])
def test_a_trial_on_a_simulated_cell_is_the_local_evaluation_bit_for_bit(task):
    expert, scene = make_expert(f"offbook:{task}"), scenes("all", 1, 4, task)[0]
    robot = make_robot(task)
    record = run_trial(robot, expert, scene, 11, frame_every=0)
    robot.close()
    env = make(f"offbook:{task}")
    [played] = play([env], expert, [11], options=[{"scene": scene}])
    env.close()
    # The guard may clip a jump that the simulated servos would not have followed either: same motion.
    np.testing.assert_array_equal(record.state[:, :7], played.fields["joints"][:-1])
    np.testing.assert_array_equal(record.state[:, 7:], played.fields["objects"][:-1])
    assert record.score.value == played.score
    assert record.score.success == played.success


def test_the_first_observation_shows_the_new_scene():
    robot = make_robot("pour")
    for bowl in ([0.45, 0.1], [0.55, -0.1]):
        observation = robot.reset({"bowl": bowl}, 0)
        np.testing.assert_allclose(observation.state[0, 7:9], bowl, atol=1e-6)
    robot.close()


def test_a_scene_that_makes_no_sense_is_a_robot_fault_with_its_reason():
    robot = make_robot("pour")
    record = run_trial(robot, make_expert("offbook:pour"), {"bowl": "left"}, 0)
    robot.close()
    assert record.outcome == "robot_fault"
    assert record.steps == 0
    assert "bowl" in record.reason


def test_discrete_actions_travel_as_their_index():
    robot = make_robot("gym:CartPole-v1")
    meta = PolicyMeta(
        name="lean", observation=ObservationSpec(state=(("observation", 4),)), action=robot.spec.action, chunk=1
    )
    record = run_trial(robot, FunctionPolicy(meta, lambda state, images: np.array([float(state[2] > 0)])), None, 1)
    robot.close()
    assert record.outcome == "done"
    assert set(np.unique(record.action)) == {0.0, 1.0}
    assert record.score.value == record.steps > 20


def test_holding_repeats_the_command_of_an_arm_and_rests_a_motor():
    arm = make_robot("pour")
    start = arm.reset(None, 0).state[0, :7]
    np.testing.assert_array_equal(arm.hold().applied, start)
    arm.close()
    pendulum = make_robot("gym:Pendulum-v1")
    pendulum.reset(None, 0)
    pendulum.act(np.array([2.0], np.float32))
    assert pendulum.hold().applied == [0.0]
    pendulum.close()


def test_a_robot_at_rest_does_not_move():
    robot = GymRobot("gym:Pendulum-v1", max_steps=5)
    robot.reset(None, 0)
    robot.stop("enough")
    robot.stop("enough")
    with pytest.raises(RobotError, match="one that is over"):
        robot.act(np.zeros(1, np.float32))
    robot.close()
    robot.close()


def test_a_robot_of_several_trials_scores_the_last_that_it_played():
    robot, goal = make_robot("offbook:darkpoint@3"), goal_of(7).astype(np.float32)
    assert (robot.spec.name, robot.spec.max_steps) == ("offbook:darkpoint@3", 3 * 16)
    assert robot.spec.observation.state == (("position", 2), ("trial", 3))
    meta = PolicyMeta(name="third", observation=robot.spec.observation, action=robot.spec.action, chunk=1)
    seen = []

    def towards_in_the_second(state, images):
        seen.append(state[2:4].tolist())
        return np.clip((goal if state[2] == 1 else -goal) - state[:2], -1, 1)

    policy = FunctionPolicy(meta, towards_in_the_second)
    scores = {}
    for scene in (None, {"trials": 1}, {"trials": 2}):
        record = run_trial(robot, policy, scene, 7, frame_every=0)
        assert record.outcome == "done", record.reason
        scores[record.steps] = record.score
        assert record.score.value == pytest.approx(record.reward[-16:].sum())
    assert seen[:48] == [[trial, step] for trial in range(3) for step in range(16)]
    assert scores.keys() == {16, 32, 48}
    assert (scores[16].value, scores[16].success) == (scores[48].value, scores[48].success) == (0, False)
    assert scores[32].value > 5
    assert scores[32].success
    for scene in ({"trials": 4}, {"trials": 0}, {"trials": "all"}):
        refused = run_trial(robot, policy, scene, 7, frame_every=0)
        assert (refused.outcome, refused.steps) == ("robot_fault", 0)
        assert "a number from 1 to 3" in refused.reason
    robot.close()


def test_the_limit_of_steps_is_that_of_all_trials_and_a_score_needs_the_last_one():
    hopper = make_robot("gym:Hopper-v5@4")
    assert (hopper.spec.name, hopper.spec.max_steps) == ("gym:Hopper-v5@4", 4000)
    hopper.close()
    short = GymRobot("offbook:darkpoint", trials=2, max_steps=20)
    record = run_trial(short, RandomPolicy(short.spec.action), None, 0, frame_every=0)
    assert record.outcome == "robot_fault"
    assert "up to the end of its last trial, got one of 20 steps" in record.reason
    short.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pur", "did you mean 'pour'"),
        ("gmy:Hopper-v5", "gym"),
        ("gym:Hoper-v5", "Hopper-v5"),
        ("gym:Hopper-v5@0", "from 1 to 9999 behind the @, got '0'; write gym:Hopper-v5@4"),
        ("gym:Hopper-v5@04", "got '04'"),
        ("gym:Hopper-v5@-1", "got '-1'"),
        ("gym:Hopper-v5@", "got ''"),
        ("gym:Hopper-v5@4@4", "got '4@4'"),
        ("gym:Hoper-v5@4", "did you mean 'Hopper-v5'"),
        ("pour@4", "write offbook:pour@4, or drop @4"),
    ],
)
def test_unknown_robots_are_refused_with_a_hint(name, words):
    with pytest.raises(ConfigError, match=words):
        make_robot(name)
