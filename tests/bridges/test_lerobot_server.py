"""LeRobot's policy server as a policy: what it unpickles is what it expects, and what it pickles is never unpickled."""

import contextlib
import importlib
import io
import json
import os
import pickle
import sys

import numpy as np
import pytest
import torch

from foreign_servers import LeRobotService, grpc_server, lerobot_classes
from offbook.bridges.lerobot import LeRobotServer, read_actions
from offbook.bridges.names import make_names
from offbook.bridges.policy import BridgedPolicy
from offbook.client.protocol import ActionSpec, Observation, ObservationSpec
from offbook.data.formats.pickles import BROKEN
from offbook.errors import ConfigError, MissingExtraError, PolicyError

ROBOT = ObservationSpec(state=(("joints", 3),), cameras={"front": (48, 64)})
ACTION = ActionSpec(size=2, low=(-1.0, -1.0), high=(1.0, 1.0))


@pytest.fixture
def classes(monkeypatch):
    return lerobot_classes(monkeypatch)


def timed(classes, tensor, step=0):
    """As its server makes them: views of one tensor."""
    return [classes.TimedAction(0.1 * i, step + i, action) for i, action in enumerate(list(tensor))]


def seen(value, size=(48, 64)):
    return Observation(
        sessions=("a",),
        state=np.full((1, 3), value, np.float32),
        images={"front": np.full((1, *size, 3), 9, np.uint8)},
        time=np.zeros(1),
    )


def test_a_lerobot_server_is_a_policy(classes):
    def actions(timed_observation):
        state = [timed_observation.observation[f"state.{i}"] for i in range(3)]
        return timed(classes, torch.tensor([[state[0], 1.0], [state[1], 2.0]]), timed_observation.timestep)

    service = LeRobotService(actions)
    with grpc_server(service) as address:
        names = make_names(ROBOT, like="lerobot")
        server = LeRobotServer(address, "act:runs/act", names.observation, chunk=2, device="cuda")
        policy = BridgedPolicy(server, names, action=ACTION)
        assert policy.meta.chunk == 2
        policy.reset(["a"], ["fold the towel"])
        chunks = [policy.infer(seen(value)) for value in (0.5, 0.25)]
        policy.close()
    np.testing.assert_array_equal(chunks, [[[[0.5, 1], [0.5, 2]]], [[[0.25, 1], [0.25, 2]]]])
    (setup,) = service.setups
    assert (setup.policy_type, setup.pretrained_name_or_path, setup.actions_per_chunk) == ("act", "runs/act", 2)
    assert setup.device == "cuda"
    assert setup.lerobot_features == {
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["state.0", "state.1", "state.2"]},
        "observation.images.front": {
            "dtype": "image",
            "shape": (48, 64, 3),
            "names": ["height", "width", "channels"],
        },
    }
    # One call of its own, one at the bridge's first question, one for the episode.
    assert service.readies == 3
    first, *asked = service.observations
    assert [one.timestep for one in asked] == [0, 1]
    assert all(one.must_go for one in service.observations)
    assert asked[0].observation["task"] == "fold the towel"
    assert asked[0].observation["front"].shape == (48, 64, 3)
    assert first.timestamp > 1e9


def test_a_large_observation_goes_in_parts(classes):
    service = LeRobotService(lambda one: timed(classes, torch.zeros(1, 2)))
    large = ObservationSpec(state=(("joints", 3),), cameras={"front": (1024, 1024)})
    with grpc_server(service) as address:
        names = make_names(large, like="lerobot")
        policy = BridgedPolicy(LeRobotServer(address, "act:x", large), names, action=ACTION)
        policy.close()
    assert service.parts == 2
    assert service.observations[0].observation["front"].shape == (1024, 1024, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
def test_the_tensors_that_servers_send_are_read(classes, dtype):
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    for tensor in (whole, whole[1:, ::2], whole.t()[:, :2], whole[:1]):
        read = read_actions(pickle.dumps(timed(classes, tensor)))
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, tensor.float().numpy())


class Exploit:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def storage_bytes(**changes):
    """A storage as PyTorch writes it, with one of its parts changed."""
    parts = {"magic": 0x1950A86A20F9469CFC6C, "protocol": 1001, "info": {"little_endian": True}}
    parts |= {"length": 2, "raw": np.arange(2, dtype="<f4").tobytes()} | changes
    stream = io.BytesIO()
    for name in ("magic", "protocol", "info"):
        stream.write(pickle.dumps(parts[name], 2))
    described = pickle.dumps(("storage", "KIND", "0", "cpu", parts["length"], None), 2)[2:-1]
    kind = pickle.dumps("KIND", 2)[2:-1].partition(b"q")[0]
    stream.write(b"\x80\x02" + described.replace(kind, b"ctorch\nFloatStorage\n", 1) + b"Q.")
    stream.write(pickle.dumps(["0"], 2))
    stream.write((2).to_bytes(8, "little") + parts["raw"])
    return stream.getvalue()


class Tensor:
    """What the pickle of a tensor says, to be said wrongly."""

    def __init__(self, storage, offset=0, shape=(2,), stride=(1,)):
        self.call = torch._utils._rebuild_tensor_v2, (Storage(storage), offset, shape, stride, False, {})

    def __reduce__(self):
        return self.call


class Storage:
    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


def test_the_hand_made_storage_is_sound(classes):
    made = pickle.dumps([classes.TimedAction(0.0, 0, Tensor(storage_bytes()))])
    np.testing.assert_array_equal(read_actions(made), [[0, 1]])


@pytest.mark.faults
@pytest.mark.parametrize(
    "make",
    [
        lambda c, canary: Exploit(os.system, f"touch {canary}"),
        lambda c, canary: [c.TimedAction(0.0, 0, Exploit(eval, f"open({str(canary)!r}, 'w')"))],
        lambda c, canary: [c.TimedAction(0.0, 0, Exploit(importlib.import_module, "antigravity"))],
        lambda c, canary: [c.TimedObservation(0.0, 0, {})],
        lambda c, canary: [c.TimedAction(0.0, 0, torch.zeros(2, dtype=torch.bfloat16))],
        lambda c, canary: [c.TimedAction(0.0, 0, torch.zeros(2, 2, 2))],
        lambda c, canary: [c.TimedAction(0.0, 0, [1.0])],
        lambda c, canary: timed(c, torch.zeros(1025, 1)),
        lambda c, canary: [c.TimedAction(0.0, 0, torch.zeros(2)), c.TimedAction(0.0, 0, torch.zeros(3))],
        lambda c, canary: [],
        lambda c, canary: {"actions": 1},
        lambda c, canary: [c.TimedAction(0.0, 0, Tensor(storage_bytes(), offset=1))],
        lambda c, canary: [c.TimedAction(0.0, 0, Tensor(storage_bytes(), offset=-1))],
        lambda c, canary: [c.TimedAction(0.0, 0, Tensor(storage_bytes(), shape=(2**30,), stride=(0,)))],
        lambda c, canary: [c.TimedAction(0.0, 0, Tensor(storage_bytes(), stride=(-1,)))],
        lambda c, canary: [c.TimedAction(0.0, 0, Tensor(storage_bytes(magic=1)))],
        lambda c, canary: [c.TimedAction(0.0, 0, Tensor(storage_bytes(info={"little_endian": False})))],
        lambda c, canary: [c.TimedAction(0.0, 0, Tensor(storage_bytes(info=7)))],
        lambda c, canary: [c.TimedAction(0.0, 0, Tensor(storage_bytes(length=2**40)))],
        lambda c, canary: [c.TimedAction(0.0, 0, Tensor(storage_bytes(length="x")))],
        lambda c, canary: [c.TimedAction(0.0, 0, Tensor(storage_bytes(raw=b"")))],
        lambda c, canary: [c.TimedAction(0.0, 0, Tensor(b"\x80\x04."))],
    ],
)
def test_what_is_no_list_of_actions_is_refused_and_nothing_is_run(classes, tmp_path, make):
    canary = tmp_path / "canary"
    content = pickle.dumps(make(classes, canary))
    with pytest.raises(BROKEN):
        read_actions(content)
    assert not canary.exists()
    assert "antigravity" not in sys.modules


@pytest.mark.faults
def test_bytes_that_were_changed_on_the_way_raise_nothing_else(classes):
    sound = pickle.dumps(timed(classes, torch.rand(2, 3)))
    rng = np.random.default_rng(0)
    for _ in range(400):
        changed = bytearray(sound)
        for place in rng.integers(0, len(sound), rng.integers(1, 6)):
            changed[place] = rng.integers(0, 256)
        with contextlib.suppress(*BROKEN):
            read_actions(bytes(changed[: rng.integers(1, len(sound) + 1)]))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (lambda one: b"", "got an empty answer; see its own log"),
        (lambda one: pickle.dumps(Exploit(print, "hello")), "one that names builtins.print"),
        (lambda one: b"\x80", "a list of actions, got"),
        (lambda one: b"0" * (5 * 2**20), "RESOURCE_EXHAUSTED"),
        (lambda one: 1 / 0, "UNKNOWN: Exception calling application: division by zero"),
    ],
)
def test_a_server_that_fails_is_one_sentence(classes, actions, words):
    with grpc_server(LeRobotService(actions)) as address:
        server = LeRobotServer(address, "act:x", ROBOT)
        with pytest.raises(PolicyError) as caught:
            BridgedPolicy(server, make_names(ROBOT, like="lerobot"), action=ACTION)
        server.close()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_or_cannot_load_the_policy(classes):
    with pytest.raises(PolicyError, match=r"localhost:1: expected an answer to Ready, got UNAVAILABLE"):
        LeRobotServer("localhost:1", "act:x", ROBOT)
    with grpc_server(LeRobotService(None)) as address:
        with pytest.raises(PolicyError, match=r"nowhere is not a local folder; .*does it know the policy"):
            LeRobotServer(address, "act:nowhere", ROBOT)
        for policy, chunk, words in (("act", 1, "TYPE:PATH"), ("act:x", 0, "--chunk")):
            with pytest.raises(ConfigError, match=words):
                LeRobotServer(address, policy, ROBOT, chunk=chunk)


def test_the_command_tries_it_on_a_simulated_robot(classes, cli):
    service = LeRobotService(lambda one: timed(classes, torch.full((20, 1), 0.5)))
    with grpc_server(service) as address:
        bridge = ["policy", "bridge", "--lerobot", address, "--policy", "act:runs/act", "--chunk", "20"]
        code, stdout, stderr = cli([*bridge, "--robot", "gym:Pendulum-v1", "--dry-run", "--json"])
    assert code == 0, stderr
    data = json.loads(stdout)
    assert (data["policy"], data["fit"], data["answers"]) == ("lerobot act:runs/act", True, 10)


def test_without_grpc_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'offbook\[bridge\]'"):
        LeRobotServer("localhost:1", "act:x", ROBOT)
