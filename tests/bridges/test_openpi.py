"""A policy behind a websocket server of openpi's or RoboArena's kind."""

import json
import threading
from dataclasses import replace

import msgpack
import numpy as np
import pytest

from foreign_servers import Foreign, array_header, packed, websocket
from offbook.bridges.names import fit, make_names
from offbook.bridges.openpi import OpenPiServer
from offbook.bridges.policy import BridgedPolicy
from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, Policy
from offbook.errors import ConfigError, PolicyError

ROBOT = ObservationSpec(state=(("joints", 7), ("gripper", 1)), cameras={"front": (48, 64), "wrist": (32, 32)})
ACTION = ActionSpec(size=8, low=(-3.0,) * 8, high=(3.0,) * 8)


def seen(value=0.5, session="a"):
    return Observation(
        sessions=(session,),
        state=np.full((1, 8), value, np.float32),
        images={camera: np.full((1, *size, 3), 9, np.uint8) for camera, size in ROBOT.cameras.items()},
        time=np.zeros(1),
    )


def follow(request):
    """Ten actions that end at twice the state."""
    state = request["observation/state"]
    return {
        "actions": np.linspace(state, 2 * state, 10).astype(np.float64),
        "state": state,
        "server_timing": {"infer_ms": np.float32(1.5)},
    }


def test_an_openpi_server_is_a_policy():
    foreign = Foreign(follow, {"reset_pose": np.zeros(3)})
    with websocket(foreign) as address:
        policy = BridgedPolicy(OpenPiServer(address), make_names(ROBOT), action=ACTION, horizon=4, name="pi0")
        assert isinstance(policy, Policy)
        assert (policy.meta.name, policy.meta.chunk, policy.meta.action) == ("pi0", 4, ACTION)
        assert policy.meta.observation == ROBOT
        policy.reset(["a", "b"], ["pour the cup", ""])
        chunk = policy.infer(seen())
        both = Observation(
            sessions=("a", "b"),
            state=np.stack([np.zeros(8), np.ones(8)]).astype(np.float32),
            images={camera: np.zeros((2, *size, 3), np.uint8) for camera, size in ROBOT.cameras.items()},
            time=np.zeros(2),
        )
        pair = policy.infer(both)
        policy.close()
        policy.close()
    first, asked, *_ = foreign.requests
    assert set(asked) == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
    assert asked["prompt"] == "pour the cup"
    assert (asked["observation/image"].shape, asked["observation/image"].dtype) == ((48, 64, 3), np.uint8)
    assert (asked["observation/state"].dtype, asked["observation/state"].shape) == (np.float32, (8,))
    assert not first["observation/state"].any()
    np.testing.assert_allclose(chunk[0], np.linspace(0.5, 1.0, 10)[:4, None] * np.ones(8), rtol=1e-6)
    assert pair.shape == (2, 4, 8)
    assert not pair[0].any()
    assert len(foreign.connections) == 1


def test_a_roboarena_server_gets_what_its_metadata_ask_for():
    wanted = {"image_resolution": [24, 24], "n_external_cameras": 1, "needs_wrist_camera": True,
              "needs_stereo_camera": False, "needs_session_id": True, "action_space": "joint_position"}  # fmt: skip

    def answer(request):
        if request["endpoint"] == "reset":
            return "reset successful"
        return np.tile(request["observation/joint_position"][0], (3, 8)).astype(np.float32)

    foreign = Foreign(answer, wanted)
    with websocket(foreign) as address:
        server = OpenPiServer(address)
        assert server.arena
        names = make_names(ROBOT, like="droid")
        server.check_images(names.images)
        policy = BridgedPolicy(server, replace(names, resize=server.resolution), action=ACTION)
        policy.reset(["trial-7"], ["stack the cups"])
        chunk = policy.infer(seen(0.25, "trial-7"))
        with pytest.raises(ConfigError, match="add --image observation/wrist_image_left=CAMERA"):
            server.check_images({"observation/exterior_image_1_left": "front"})
        policy.close()
    assert np.all(chunk == 0.25)
    resets = [r for r in foreign.requests if r["endpoint"] == "reset"]
    assert [r["session_id"] for r in resets] == ["first", "trial-7"]
    last = foreign.requests[-1]
    assert last["session_id"] == "trial-7"
    assert last["observation/wrist_image_left"].shape == (24, 24, 3)
    assert last["observation/gripper_position"].shape == (1,)
    assert {key for key in last if key.startswith("observation/exterior")} == {"observation/exterior_image_1_left"}


def test_a_lost_line_costs_one_trial_and_is_dialled_again_for_the_next():
    foreign = Foreign(follow)
    with websocket(foreign) as address:
        policy = BridgedPolicy(OpenPiServer(address), make_names(ROBOT), action=ACTION)
        policy.reset(["a"], [""])
        foreign.connections[-1].close(1012, "restarting")
        with pytest.raises(PolicyError, match=r"expected an answer, got .*restarting"):
            policy.infer(seen())
        with pytest.raises(PolicyError, match="got a closed one; begin another episode"):
            policy.infer(seen())
        policy.reset(["b"], [""])
        assert policy.infer(seen(session="b")).shape == (1, 10, 8)
        policy.close()
    assert len(foreign.connections) == 2


@pytest.mark.faults
def test_silence_ends_at_the_deadline_and_a_late_answer_is_not_the_next_ones():
    release = threading.Event()

    def slow(request):
        if request["observation/state"][0] == 7:
            release.wait(20)
        return follow(request)

    with websocket(Foreign(slow)) as address:
        policy = BridgedPolicy(OpenPiServer(address, deadline_s=0.3), make_names(ROBOT), action=ACTION)
        policy.reset(["a"], [""])
        with pytest.raises(PolicyError, match=r"an answer within 0\.3 s, got none"):
            policy.infer(seen(7))
        release.set()
        policy.reset(["a"], [""])
        assert policy.infer(seen(1))[0, 0, 0] == 1
        policy.close()


def bad(answer):
    """What the first question to such a server raises."""
    with websocket(Foreign(lambda request: answer)) as address, pytest.raises((PolicyError, ConfigError)) as caught:
        BridgedPolicy(OpenPiServer(address), make_names(ROBOT), action=ACTION)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nested(depth):
    frame = packed(1)
    for _ in range(depth):
        frame = b"\x91" + frame
    return frame


@pytest.mark.faults
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"actions": np.zeros((4, 7))}, "expected actions of size 8, got size 7"),
        ({"actions": np.zeros((0, 8))}, r"got shape (0, 8)"),
        ({"actions": np.zeros((2, 4, 8))}, "got shape (2, 4, 8)"),
        ({"action": np.zeros((4, 8))}, "an answer with 'actions', got action"),
        ({"actions": [[0.0] * 8]}, "'actions' to be an array"),
        ({"actions": np.zeros((4, 8), "<U3")}, "got <U3"),
        ({"actions": np.zeros((4, 8), ">f4")}, "got >f4"),
        (array_header("|O", [1]), "got |O [1]"),
        (array_header("<f4", [2**40, 2**40]), "to be an array of numbers"),
        (array_header("<f4", [-1, -2]), "to be an array of numbers"),
        (array_header("<f8", [2]), "got <f8 [2]"),
        (b"\xc1", "a msgpack value"),
        (b"\xdd\xff\xff\xff\xff", "a msgpack value"),
        (nested(3000), "a msgpack value"),
        (msgpack.packb({"actions": msgpack.ExtType(4, b"x")}), "a msgpack value"),
        (b"\xc6" + (2**31).to_bytes(4, "big"), "a msgpack value"),
        (b"\0" * (9 * 2**20), "1009"),
        ("Traceback (most recent call last):\n  ...\nKeyError: 'observation/state'\n", "KeyError: 'observation/state'"),
        ("", "an empty text"),
    ],
)
def test_what_is_no_answer_is_one_sentence(answer, words):
    assert words in bad(answer)


@pytest.mark.faults
def test_a_changed_size_in_the_middle_is_the_servers_fault():
    sizes = iter([8, 3])
    with websocket(Foreign(lambda request: {"actions": np.zeros((1, next(sizes)))})) as address:
        policy = BridgedPolicy(OpenPiServer(address), make_names(ROBOT), action=ACTION)
        policy.reset(["a"], [""])
        with pytest.raises(PolicyError, match="actions of size 8, got size 3"):
            policy.infer(seen())
        policy.close()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("first", "words"),
    [("hello", "a map of metadata"), (packed([1]), "a map of metadata"), (b"\xc1", "a msgpack value")],
)
def test_a_server_without_metadata_is_no_policy_server(first, words):
    with websocket(Foreign(follow, first=first)) as address, pytest.raises(PolicyError, match=words):
        OpenPiServer(address)


@pytest.mark.parametrize(
    ("address", "words"),
    [("localhost:1", "Connection refused; start it"), ("http://x:1", "ws.s.://HOST"), ("ws://", "ws.s.://HOST")],
)
def test_a_server_that_is_not_there_is_one_sentence(address, words):
    with pytest.raises((PolicyError, ConfigError), match=words):
        OpenPiServer(address)


# --- names ----------------------------------------------------------------------------------------------------------


def test_layouts_fill_in_what_flags_leave_out():
    droid = make_names(ROBOT, like="droid")
    assert droid.images == {
        "observation/exterior_image_1_left": "front",
        "observation/wrist_image_left": "wrist",
    }
    assert droid.state == {"observation/joint_position": ("joints",), "observation/gripper_position": ("gripper",)}
    aloha = make_names(ROBOT, like="aloha").request(seen(), 0, "fold")
    assert aloha["images"]["wrist"].shape == (3, 32, 32)
    assert aloha["state"].shape == (8,)
    own = make_names(ROBOT, images=["cam=wrist"], state=["s=gripper+joints"], prompt="", resize=(16, 24))
    assert own.observation == ObservationSpec(state=(("gripper", 1), ("joints", 7)), cameras={"wrist": (32, 32)})
    request = own.request(
        replace(seen(), state=np.arange(8, dtype=np.float32)[None], images={"wrist": np.full((1, 32, 32, 3), 9, "u1")}),
        0,
        "unsent",
    )
    assert set(request) == {"cam", "s"}
    assert request["s"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert request["cam"].shape == (16, 24, 3)
    assert request["cam"][:, :4].max() == 0
    assert request["cam"][:, 4:20].min() == 9


def test_without_a_robot_flags_tell_the_sizes():
    names = make_names(None, images=["cam=front:48x64"], state=["s=joints:7+gripper:1"])
    assert names.observation == ObservationSpec(state=(("joints", 7), ("gripper", 1)), cameras={"front": (48, 64)})


@pytest.mark.parametrize(
    ("offered", "flags", "words"),
    [
        (None, {}, "add --robot NAME"),
        (None, {"images": ["cam=front"]}, "write front:224x224"),
        (None, {"state": ["s=joints"]}, "write joints:7"),
        (ROBOT, {"images": ["cam=back"]}, "choose one of: front, wrist"),
        (ROBOT, {"state": ["s=elbows"]}, "choose one of: joints, gripper"),
        (ROBOT, {"images": ["front"]}, "write observation/image=front"),
        (ROBOT, {"images": ["cam=front:big"]}, "CAMERA:224x224"),
        (ROBOT, {"state": ["s=joints:x"]}, "PART:7"),
    ],
)
def test_names_that_mean_nothing_are_explained(offered, flags, words):
    with pytest.raises(ConfigError, match=words):
        make_names(offered, **flags)


def test_pictures_keep_their_proportions():
    tall = fit(np.full((40, 10, 3), 5, np.uint8), (20, 20))
    assert tall[:, 7:12].min() == 5
    assert tall[:, :7].max() == tall[:, 12:].max() == 0


# --- the command ----------------------------------------------------------------------------------------------------


def pendulum(request):
    return {"actions": np.zeros((2, 1), np.float32) + 0.1 * request["observation/state"][0]}


def test_a_dry_run_on_a_simulated_robot(cli):
    with websocket(Foreign(pendulum)) as address:
        command = ["policy", "bridge", "--openpi", address, "--robot", "gym:Pendulum-v1", "--dry-run", "--json"]
        code, stdout, stderr = cli(command)
    assert code == 0, stderr
    data = json.loads(stdout)
    assert (data["fit"], data["policy"], data["answers"]) == (True, f"openpi at {address}", 100)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "add --openpi ws://localhost:8000 or --lerobot"),
        (["--openpi", "localhost:1", "--lerobot", "localhost:2"], "got both"),
        (["--openpi", "localhost:1"], "--submission"),
        (["--openpi", "localhost:1", "--dry-run"], "add --robot pour"),
        (["--lerobot", "localhost:1", "--dry-run", "--robot", "gym:Pendulum-v1"], "expected TYPE:PATH"),
    ],
)
def test_wrong_use_is_explained(cli, flags, words):
    code, _, stderr = cli(["policy", "bridge", *flags])
    assert code == 2
    assert words in stderr
