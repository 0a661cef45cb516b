"""LeRobot's policy server (its asynchronous inference), which speaks gRPC with pickles inside.

The server loads the policy that it is told to load; then each observation goes in parts of at most 2 MB, and the
actions for it are asked for. What is sent are pickles that name LeRobot's own classes, written here instruction by
instruction. What comes back is never unpickled: `offbook.data.formats.pickles` reads it with stand-ins for the one
class and the two functions of PyTorch that a list of actions names, calls nothing that a pickle names, and refuses
whatever else one names.

Source: LeRobot 0.4, `transport/services.proto`, `async_inference/helpers.py` and `policy_server.py`; PyTorch,
    `torch.serialization` (the layout of a storage in bytes).
"""

import io
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbook.client.protocol import ObservationSpec
from offbook.data.formats.pickles import BROKEN, Record, read
from offbook.errors import ConfigError, PolicyError, needs_extra

LIMIT = 4 * 2**20
LOAD_S = 600.0
"""Longest wait until the server has loaded its policy."""
DEADLINE_S = 30.0
_PART = 2 * 2**20
_BEGIN, _MIDDLE, _END = 1, 2, 3
_SERVICE, _HELPERS = "/transport.AsyncInference/", "lerobot.async_inference.helpers"
_MOST_ACTIONS, _MOST_STORAGES = 1024, 4096
_STORAGES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8"}
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class LeRobotServer:
    """A connection to LeRobot's policy server.

    Args:
        address: such as `localhost:8080`.
        policy: what it is told to load, as `TYPE:PATH`: `act:outputs/train/checkpoints/last/pretrained_model`; the path
            is one on the server's side, or a name on its hub.
        observation: what it will be shown.
        chunk: actions asked for at a time.
        device: where the policy runs there, such as `cpu` or `cuda`.
        load_s: longest wait until the policy is loaded, seconds.
        deadline_s: longest wait for an answer, seconds.

    Raises:
        MissingExtraError: gRPC is not installed.
        PolicyError: there is no such server, or it does not load the policy.
        ConfigError: the policy is not told as above.
    """

    def __init__(
        self,
        address: str,
        policy: str,
        observation: ObservationSpec,
        *,
        chunk: int = 50,
        device: str = "cpu",
        load_s: float = LOAD_S,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        with needs_extra("bridge"):
            import grpc
        kind, colon, path = policy.partition(":")
        if not (kind and colon and path):
            fix = "write act:outputs/train/checkpoints/last/pretrained_model"
            raise ConfigError("--policy", expected="TYPE:PATH", got=repr(policy), fix=fix)
        if not 1 <= chunk <= _MOST_ACTIONS:
            raise ConfigError("--chunk", expected=f"1 to {_MOST_ACTIONS}", got=str(chunk), fix="choose another number")
        self.address, self._deadline_s = f"LeRobot's policy server at {address}", deadline_s
        self._grpc, self._step = grpc, 0
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", LIMIT),
                ("grpc.max_send_message_length", LIMIT),
                ("grpc.enable_http_proxy", 0),
            ],
        )
        self._call("Ready", b"", 10.0)
        setup = {
            "policy_type": kind,
            "pretrained_name_or_path": path,
            "lerobot_features": _features(observation),
            "actions_per_chunk": chunk,
            "device": device,
            "rename_map": {},
        }
        self._call("SendPolicyInstructions", _field(1, _pickled("RemotePolicyConfig", setup)), load_s)

    def begin(self, session: str) -> None:
        """Lets the server forget the steps of the episode before."""
        self._call("Ready", b"", self._deadline_s)
        self._step = 0

    def ask(self, request: Mapping[str, Any], session: str) -> NDArray[np.float32]:
        """The actions for an observation, (N, A)."""
        state = request.get("state", np.zeros(0, np.float32))
        raw = {key: value for key, value in request.items() if key != "state"}
        raw |= {f"state.{i}": float(value) for i, value in enumerate(state)}
        timed = {"timestamp": time.time(), "timestep": self._step, "observation": raw, "must_go": True}
        self._step += 1
        self._call("SendObservations", _parts(_pickled("TimedObservation", timed)), self._deadline_s)
        answer = self._call("GetActions", b"", self._deadline_s)
        content = _content(answer)
        if not content:
            fix = "see its own log: it does not say why"
            raise PolicyError(self.address, expected="actions", got="an empty answer", fix=fix)
        try:
            return read_actions(content)
        except BROKEN as error:
            got, fix = str(error).splitlines()[0][:200] or type(error).__name__, "use LeRobot 0.4 or newer there"
            raise PolicyError(self.address, expected="a list of actions", got=got, fix=fix) from None

    def close(self) -> None:
        """Hangs up."""
        self._channel.close()

    def _call(self, name: str, message: bytes | Iterator[bytes], seconds: float) -> bytes:
        single = isinstance(message, bytes)
        make = self._channel.unary_unary if single else self._channel.stream_unary
        try:
            answer: bytes = make(f"{_SERVICE}{name}")(message, timeout=seconds)
        except self._grpc.RpcError as error:
            status, words = error.code().name, " ".join(str(error.details()).split())[:200]
            fixes = {
                "UNAVAILABLE": "start it, or check the address",
                "UNKNOWN": "see its own log; does it know the policy, its path and the device?",
                "DEADLINE_EXCEEDED": "see its own log, or use a faster one",
            }
            fix = fixes.get(status, "see its own log")
            raise PolicyError(
                self.address, expected=f"an answer to {name}", got=f"{status}: {words}", fix=fix
            ) from None
        return answer


def _features(observation: ObservationSpec) -> dict[str, Any]:
    """What LeRobot calls features: the state as one vector of named numbers, and the cameras."""
    names = [f"state.{i}" for i in range(observation.state_size)]
    features: dict[str, Any] = {}
    if names:
        features["observation.state"] = {"dtype": "float32", "shape": (len(names),), "names": names}
    for camera, (height, width) in observation.cameras.items():
        axes = ["height", "width", "channels"]
        features[f"observation.images.{camera}"] = {"dtype": "image", "shape": (height, width, 3), "names": axes}
    return features


# --- what is sent ---------------------------------------------------------------------------------------------------


def _pickled(name: str, fields: Mapping[str, Any]) -> bytes:
    """A pickle of an object of LeRobot's with these attributes, of plain values and arrays."""
    # Protocol 3 has no frames: the inner pickle without its first two bytes and its stop is a part of the outer one.
    inner = pickle.dumps(dict(fields), protocol=3)[2:-1]
    return b"\x80\x03c" + f"{_HELPERS}\n{name}\n".encode() + b")\x81" + inner + b"b."


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes in a protocol buffer."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _parts(content: bytes) -> Iterator[bytes]:
    """The messages of a stream: each a state of the transfer, and a part."""
    starts = range(0, len(content), _PART)
    for start in starts:
        state = _END if start + _PART >= len(content) else _BEGIN if start == 0 else _MIDDLE
        yield bytes([1 << 3, state]) + _field(2, content[start : start + _PART])


# --- what is received -----------------------------------------------------------------------------------------------


def _content(message: bytes) -> bytes:
    """The one field of bytes of an answer; empty where there is none, or where it is something else."""
    if not message or message[0] != (1 << 3 | 2):
        return b""
    length, place = 0, 1
    while place < min(len(message), 6):
        length |= (message[place] & 0x7F) << 7 * (place - 1)
        place += 1
        if not message[place - 1] & 0x80:
            break
    return message[place:] if len(message) - place == length else b""


def read_actions(content: bytes) -> NDArray[np.float32]:
    """The actions (N, A) of a pickled list of LeRobot's timed actions, of which nothing is run.

    Raises:
        ValueError: it names anything else; any of `pickles.BROKEN` where it is no such list.
    """
    reader = _Reader(len(content))
    names: dict[tuple[str, str], Callable[..., Any]] = {
        (_HELPERS, "TimedAction"): Record,
        ("torch._utils", "_rebuild_tensor_v2"): reader.tensor,
        ("torch.storage", "_load_from_bytes"): reader.storage,
    }
    timed = read(io.BytesIO(content), len(content), names)
    if not isinstance(timed, list) or not 1 <= len(timed) <= _MOST_ACTIONS:
        raise ValueError(f"no list of 1 to {_MOST_ACTIONS} actions")
    actions = [one.fields["action"] for one in timed if isinstance(one, Record)]
    if len(actions) != len(timed) or not all(isinstance(one, np.ndarray) and one.ndim == 1 for one in actions):
        raise ValueError("something else than actions")
    return np.stack(actions).astype(np.float32)


class _Reader:
    """Stand-ins for what builds a tensor; `size` is that of all bytes."""

    def __init__(self, size: int) -> None:
        self._size, self._storages = size, 0

    def storage(self, content: bytes) -> NDArray[Any]:
        """The numbers of a storage as PyTorch writes it: five pickles, the fourth describes them; then they."""
        self._storages += 1
        if not isinstance(content, bytes) or self._storages > _MOST_STORAGES:
            raise ValueError("too many tensors")
        stream, size = io.BytesIO(content), len(content)
        if (read(stream, size, {}), read(stream, size, {})) != (_MAGIC, _PROTOCOL):
            raise ValueError("a tensor in another layout")
        if read(stream, size, {})["little_endian"] is not True:
            raise ValueError("a tensor of another byte order")
        kinds = {("torch", name): (lambda kind=kind: kind) for name, kind in _STORAGES.items()}
        described = read(stream, size, kinds, lambda words: words)
        keys = read(stream, size, {})
        word, kind, key, _, length = described[:5]
        if word != "storage" or keys != [key] or type(length) is not int or not hasattr(kind, "call"):
            raise ValueError("a tensor in another layout")
        dtype = np.dtype(kind.call())
        raw = stream.read()
        if len(raw) != 8 + length * dtype.itemsize or int.from_bytes(raw[:8], "little") != length:
            raise ValueError("a tensor that does not fill its bytes")
        return np.frombuffer(raw, dtype, offset=8)

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> NDArray[Any]:
        """A view of a storage, copied."""
        whole = [offset, *shape, *stride]
        sound = isinstance(storage, np.ndarray) and len(shape) == len(stride) <= 2
        if not sound or not all(type(n) is int and 0 <= n < 2**31 for n in whole) or 0 in shape:
            raise ValueError("a tensor of another form")
        last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
        if last >= len(storage) or math.prod(shape) > len(storage):
            raise ValueError("a tensor beyond its storage")
        steps = tuple(step * storage.itemsize for step in stride)
        view = np.lib.stride_tricks.as_strided(storage[offset:], tuple(shape), steps, writeable=False)
        return np.array(view)
