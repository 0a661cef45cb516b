"""Simulators as robots: what they say of themselves, and that a trial is the evaluation of the same policy."""

import numpy as np
import pytest

from offbook.client.protocol import FunctionPolicy, ObservationSpec, PolicyMeta
from offbook.errors import ConfigError, RobotError
from offbook.robots import ROBOTS, make_robot
from offbook.robots.base import Robot
from offbook.robots.gym import GymRobot
from offbook.robots.trial import run_trial
from offbook.sim.adapters import make
from offbook.sim.experts import RandomPolicy, make_expert
from offbook.sim.play import play
from offbook.sim.tabletop.pour import scenes


@pytest.mark.parametrize("name", [*ROBOTS, "gym:Pendulum-v1", "minigrid:MiniGrid-Empty-5x5-v0"])
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


def test_a_trial_on_the_pouring_cell_is_the_local_evaluation_bit_for_bit():
    expert, scene = make_expert("offbook:pour"), scenes("all", 1, seed=4)[0]
    robot = make_robot("pour")
    record = run_trial(robot, expert, scene, 11, frame_every=0)
    robot.close()
    env = make("offbook:pour")
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


@pytest.mark.parametrize(
    ("name", "words"), [("pur", "did you mean 'pour'"), ("gmy:Hopper-v5", "gym"), ("gym:Hoper-v5", "Hopper-v5")]
)
def test_unknown_robots_are_refused_with_a_hint(name, words):
    with pytest.raises(ConfigError, match=words):
        make_robot(name)
