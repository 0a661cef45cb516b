import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from offbook.errors import ConfigError, PolicyError
from offbook.sim.spaces import (
    action_spec,
    flatten,
    from_env_action,
    observation_leaves,
    observation_spec,
    state_vector,
    to_env_action,
)

NESTED = spaces.Dict(
    [
        ("robot", spaces.Dict([("joints", spaces.Box(-1, 1, (2, 3))), ("mode", spaces.Discrete(4))])),
        ("front", spaces.Box(0, 255, (16, 20, 3), np.uint8)),
        ("tiny", spaces.Box(0, 255, (7, 7, 3), np.uint8)),
        ("none", spaces.Box(-1, 1, (0,))),
    ]
)


def test_leaves_keep_the_order_and_tell_cameras_from_state():
    assert [leaf.name for leaf in observation_leaves(NESTED)] == ["robot.joints", "robot.mode", "front", "tiny"]
    spec = observation_spec(NESTED)
    assert spec.state == (("robot.joints", 6), ("robot.mode", 1), ("tiny", 147))
    assert spec.cameras == {"front": (16, 20)}


def test_flattened_values_are_copies_in_the_original_type():
    observation = NESTED.sample()
    leaves = flatten(NESTED, observation)
    observation["front"][:] = 0
    observation["robot"]["joints"][:] = 7
    assert leaves["front"].any()
    assert not (leaves["robot.joints"] == 7).any()
    assert leaves["front"].dtype == np.uint8
    assert leaves["robot.mode"].dtype == np.int64


def test_state_parts_are_joined_in_the_order_that_the_policy_wants():
    leaves = flatten(NESTED, NESTED.sample())
    spec = observation_spec(NESTED)
    wanted = type(spec)(state=(("robot.mode", 1), ("robot.joints", 6)))
    vector = state_vector(leaves, wanted)
    assert vector.dtype == np.float32
    assert vector[0] == leaves["robot.mode"]
    np.testing.assert_array_equal(vector[1:], leaves["robot.joints"].ravel())


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4))
def test_actions_come_back_clipped_and_nothing_else(values):
    space = spaces.Box(np.float32(-1.5), np.float32(2.0), (2, 2))
    vector = np.array(values, np.float32)
    action = to_env_action(space, vector)
    assert space.contains(action)
    np.testing.assert_array_equal(from_env_action(space, action), np.clip(vector, -1.5, 2.0))


def test_discrete_actions_are_indices_whatever_the_space_starts_with():
    space = spaces.Discrete(3, start=5)
    assert to_env_action(space, np.array([2.0], np.float32)) == 7
    assert from_env_action(space, 7).tolist() == [2]
    assert action_spec(space).choices == 3
    with pytest.raises(PolicyError, match="0 to 2"):
        to_env_action(space, np.array([3.0], np.float32))


def test_spaces_that_cannot_be_used_are_named():
    for space in (spaces.Text(5), spaces.Sequence(spaces.Discrete(2)), spaces.OneOf([spaces.Discrete(2)])):
        with pytest.raises(ConfigError, match=f"'door': expected numbers .*, got {type(space).__name__}"):
            observation_leaves(spaces.Dict(door=space))
    with pytest.raises(ConfigError, match="MultiDiscrete"):
        action_spec(spaces.MultiDiscrete([2, 2]))
    with pytest.raises(ConfigError, match="MultiDiscrete"):
        to_env_action(spaces.MultiDiscrete([2, 2]), np.zeros(2, np.float32))


def test_tuples_and_keys_with_dots_are_followed_as_they_are_written():
    space = spaces.Dict({"a.b": spaces.Discrete(9), "a": spaces.Tuple([spaces.Discrete(9), spaces.Dict(c=NESTED)])})
    assert [leaf.name for leaf in observation_leaves(space)][:2] == ["a.0", "a.1.c.robot.joints"]
    observation = space.sample()
    values = flatten(space, observation)
    assert values["a.b"] == observation["a.b"]
    np.testing.assert_array_equal(values["a.1.c.front"], observation["a"][1]["c"]["front"])


def test_parts_that_would_get_one_name_are_refused():
    space = spaces.Dict({"a.b": spaces.Discrete(2), "a": spaces.Dict(b=spaces.Discrete(2))})
    with pytest.raises(ConfigError, match=r"\('a', 'b'\) and \('a.b',\), both called 'a.b'; rename"):
        observation_leaves(space)


def test_an_environment_that_breaks_its_own_space_is_refused():
    with pytest.raises(ConfigError, match=r"shape \(3,\)"):
        flatten(spaces.Box(-1, 1, (2,)), np.zeros(3))
