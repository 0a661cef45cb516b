"""Version 1 of the frames between a policy, the arena and a robot: one msgpack map in each binary websocket message.

| type | from | fields (optional ones in brackets) |
|---|---|---|
| `hello` | policy | version, meta (`PolicyMeta.to_json`), submission, images: the codec in which it wants its images |
| `ready` | arena | version, images, [meta]: to a robot, the description of the policy that will drive it |
| `reset` | robot | session, prompt |
| `obs` | robot | session, seq, t (seconds since reset), state (S,), images by camera, deadline_ms |
| `act` | policy | session, seq of the observation that it answers, chunk (N, A) |
| `end` | robot | session, outcome |
| `error` | anyone | code, message, [session] |

An array is `{"d": bytes, "t": dtype, "s": shape}`, little-endian and row-major; a compressed image is
`{"d": bytes, "c": "jpeg"|"png", "s": [H, W, 3]}`. Nothing in a frame is trusted: sizes, counts, depth, types and
shapes are checked before memory is taken, and every fault is a `WireError` with the websocket code to close with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from offbook.client.protocol import Observation, PolicyMeta
from offbook.errors import ConfigError, OffbookError

VERSION = 1
FRAME_LIMIT = 2 * 2**20
RAW_FRAME_LIMIT = 8 * 2**20
CODECS = ("raw", "jpeg", "png")
BAD_DATA, REFUSED, TOO_BIG = 1007, 1008, 1009

FROM_POLICY = frozenset({"hello", "act", "error"})
FROM_ROBOT = frozenset({"reset", "obs", "end", "error"})
FROM_ARENA = FROM_ROBOT | {"ready"}
FROM_RELAY = frozenset({"ready", "act", "error"})

_DTYPES = {"u1": 1, "i4": 4, "i8": 8, "f4": 4, "f8": 8, "b1": 1}
_MAX_DIMS, _MAX_DEPTH, _MAX_KEYS, _MAX_ITEMS, _MAX_CONTAINERS = 4, 6, 64, 256, 512
_MAX_SIDE = 4096
_JPEG_QUALITY = 95


class WireError(OffbookError):
    """A frame that breaks the rules; `code` and `reason` are what to close the websocket with.

    Example:
        >>> error = WireError(REFUSED, "field 'seq'", expected="a number above 4", got="4")
        >>> error.code, error.reason
        (1008, "field 'seq': expected a number above 4, got 4")
    """

    def __init__(self, code: int, where: str, *, expected: str, got: str) -> None:
        super().__init__(where, expected=expected, got=got, fix="close the connection")
        self.code = code
        # A close frame carries at most 123 bytes of reason.
        self.reason = f"{where}: expected {expected}, got {got}".encode("ascii", "replace")[:120].decode("ascii")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_error, (self.code, self.where, self.expected, self.got)


def _rebuild_error(code: int, where: str, expected: str, got: str) -> WireError:
    return WireError(code, where, expected=expected, got=got)


@dataclass(frozen=True, slots=True)
class CompressedImage:
    """An image as it travels; a relay hands it on without unpacking it.

    Attributes:
        data: the JPEG or PNG file.
        codec: `"jpeg"` or `"png"`.
        shape: (H, W, 3) as announced; `pixels` refuses a file of another size.
    """

    data: bytes
    codec: str
    shape: tuple[int, int, int]

    def pixels(self) -> NDArray[np.uint8]:
        """The image, shape (H, W, 3), uint8 RGB.

        Raises:
            WireError: the data are not such a file, or of another size than announced.
        """
        from PIL import Image

        wanted = f"a {self.codec} file of {self.shape[0]}x{self.shape[1]} pixels"
        try:
            with Image.open(BytesIO(self.data), formats=[self.codec.upper()]) as file:
                # The header is compared before the pixels take memory.
                if (file.height, file.width, 3) != self.shape:
                    raise WireError(BAD_DATA, "image", expected=wanted, got=f"{file.height}x{file.width}")
                return np.asarray(file.convert("RGB"))
        except WireError:
            raise
        except Exception as error:  # image decoders fail on hostile bytes in ways of their own
            raise WireError(BAD_DATA, "image", expected=wanted, got=type(error).__name__) from error


def compress(frame: NDArray[np.uint8], codec: str) -> NDArray[np.uint8] | CompressedImage:
    """An RGB frame (H, W, 3) as `codec` wants it: itself for `"raw"`, else a JPEG (quality 95) or PNG file."""
    if codec == "raw":
        return frame
    from PIL import Image

    buffer, image = BytesIO(), Image.fromarray(frame)
    if codec == "jpeg":
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, "PNG", compress_level=1)
    return CompressedImage(buffer.getvalue(), codec, (frame.shape[0], frame.shape[1], 3))


def frame_limit(codec: str) -> int:
    """Largest frame in bytes for an image codec: 8 MiB with raw images, else 2 MiB."""
    return RAW_FRAME_LIMIT if codec == "raw" else FRAME_LIMIT


def choose_codec(meta: PolicyMeta) -> str:
    """The codec that a policy asks for unless told: raw (exact) up to 64 KiB of pixels a step, JPEG beyond."""
    pixels = sum(3 * height * width for height, width in meta.observation.cameras.values())
    return "raw" if pixels <= 64 * 2**10 else "jpeg"


# --- messages -------------------------------------------------------------------------------------------------------


def hello(meta: PolicyMeta, submission: str, images: str) -> dict[str, Any]:
    """A policy introduces itself to the arena."""
    return {
        "type": "hello",
        "version": VERSION,
        "meta": meta.to_json(),
        "submission": submission,
        "images": images,
    }


def ready(images: str, meta: PolicyMeta | None = None) -> dict[str, Any]:
    """The arena accepts a policy; to a robot it also describes the policy."""
    message: dict[str, Any] = {"type": "ready", "version": VERSION, "images": images}
    return message if meta is None else message | {"meta": meta.to_json()}


def reset(session: str, prompt: str) -> dict[str, Any]:
    """An episode begins."""
    return {"type": "reset", "session": session, "prompt": _plain(prompt)[:2000]}


def obs(session: str, seq: int, observation: Observation, *, deadline_ms: float, images: str) -> dict[str, Any]:
    """One session's observation (B = 1), its images in the codec of the handshake."""
    return {
        "type": "obs",
        "session": session,
        "seq": seq,
        "t": float(observation.time[0]),
        "state": observation.state[0],
        "images": {camera: compress(frames[0], images) for camera, frames in observation.images.items()},
        "deadline_ms": float(deadline_ms),
    }


def act(session: str, seq: int, chunk: NDArray[np.float32]) -> dict[str, Any]:
    """The answer to observation `seq`: a chunk of actions (N, A)."""
    return {"type": "act", "session": session, "seq": seq, "chunk": chunk}


def end(session: str, outcome: str) -> dict[str, Any]:
    """An episode is over."""
    return {"type": "end", "session": session, "outcome": outcome}


def error(code: str, message: str, session: str = "") -> dict[str, Any]:
    """A refusal or failure, in one line; of one session only where it is named. Never a traceback."""
    record = {"type": "error", "code": code, "message": _plain(message)[:400]}
    return record | {"session": session} if session else record


def _plain(text: str) -> str:
    """One line without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def read_observation(message: Mapping[str, Any], meta: PolicyMeta) -> Observation:
    """An `obs` message as the observation (B = 1) that `Policy.infer` takes.

    Raises:
        WireError: the state or a camera is missing or not of the size that the policy asked for in its `hello`.
    """
    state, size = message["state"], meta.observation.state_size
    if state.shape != (size,):
        raise WireError(REFUSED, "field 'state'", expected=f"shape ({size},)", got=f"shape {state.shape}")
    images: dict[str, NDArray[np.uint8]] = {}
    for camera, (height, width) in meta.observation.cameras.items():
        image = message["images"].get(camera)
        if image is None or tuple(image.shape) != (height, width, 3):
            got = "none" if image is None else f"shape {tuple(image.shape)}"
            raise WireError(REFUSED, f"camera {camera!r}", expected=f"shape {(height, width, 3)}", got=got)
        # Copied: what came off the wire is read-only, which torch.from_numpy warns about.
        images[camera] = np.array(image.pixels() if isinstance(image, CompressedImage) else image)[None]
    time = np.array([message["t"]], np.float64)
    return Observation(sessions=(message["session"],), state=np.array(state)[None], images=images, time=time)


# --- validation: one table, used for what is sent and what is received -----------------------------------------------

Check = Callable[[str, Any], None]


def _fail(where: str, expected: str, value: Any) -> None:
    got = f"shape {value.shape}" if isinstance(value, np.ndarray) else f"{type(value).__name__} {str(value)[:40]!r}"
    raise WireError(REFUSED, where, expected=expected, got=got)


def _text(longest: int, *, empty: bool = True) -> Check:
    def check(where: str, value: Any) -> None:
        if not isinstance(value, str) or len(value) > longest or not (value or empty) or not value.isprintable():
            _fail(where, f"{'0' if empty else '1'} to {longest} printable characters", value)

    return check


def _codec(where: str, value: Any) -> None:
    if value not in CODECS:
        _fail(where, "raw, jpeg or png", value)


def _version(where: str, value: Any) -> None:
    if type(value) is not int or value != VERSION:
        _fail(where, f"version {VERSION} of the protocol", value)


def _count(where: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < 2**53:
        _fail(where, "a whole number from 0 on", value)


def _seconds(where: str, value: Any) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        _fail(where, "a finite number from 0 on", value)


def _floats(dims: int) -> Check:
    def check(where: str, value: Any) -> None:
        if not isinstance(value, np.ndarray) or value.ndim != dims or value.dtype != np.float32:
            _fail(where, f"a float32 array of {dims} dimension{'s' * (dims > 1)}", value)

    return check


def _images(where: str, value: Any) -> None:
    if not isinstance(value, dict):
        _fail(where, "images by camera", value)
    for camera, image in value.items():
        _text(64, empty=False)(where, camera)
        if isinstance(image, CompressedImage):
            continue
        pixels = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        if not pixels:
            _fail(f"camera {camera!r}", "a uint8 image (H, W, 3) or a JPEG or PNG file", image)


def _meta(where: str, value: Any) -> None:
    if not isinstance(value, dict):
        _fail(where, "a policy description", value)
    try:
        meta = PolicyMeta.from_json(value)
    except (ConfigError, ArithmeticError):
        _fail(where, "a policy description as PolicyMeta.to_json writes it", "another record")
        return
    sizes = [size for _, size in meta.observation.state]
    sides = [side for shape in meta.observation.cameras.values() for side in shape]
    action = meta.action
    sane = (
        1 <= len(meta.name) <= 100
        and all(1 <= size <= 2**16 for size in sizes)
        and sum(sizes) <= 2**16
        and all(1 <= side <= _MAX_SIDE for side in sides)
        and 1 <= action.size <= _MAX_ITEMS
        and len(action.low) == len(action.high) == action.size
        and (action.choices is None or 1 <= action.choices <= 2**16)
        and 1 <= meta.chunk <= 1024
    )
    if not sane:
        _fail(where, "sizes of a policy description within bounds", meta.name[:40])


_SESSION = _text(128, empty=False)
_FIELDS: dict[str, dict[str, Check]] = {
    "hello": {"version": _version, "meta": _meta, "submission": _text(128), "images": _codec},
    "ready": {"version": _version, "images": _codec},
    "reset": {"session": _SESSION, "prompt": _text(2000)},
    "obs": {
        "session": _SESSION,
        "seq": _count,
        "t": _seconds,
        "state": _floats(1),
        "images": _images,
        "deadline_ms": _seconds,
    },
    "act": {"session": _SESSION, "seq": _count, "chunk": _floats(2)},
    "end": {"session": _SESSION, "outcome": _text(64)},
    "error": {"code": _text(64, empty=False), "message": _text(400)},
}
_OPTIONAL: dict[str, dict[str, Check]] = {"ready": {"meta": _meta}, "error": {"session": _SESSION}}


def validate(message: Any, allowed: Collection[str] | None = None) -> None:
    """Checks a message's type, its fields and their shapes; `allowed` names the types that this sender may send.

    Raises:
        WireError: with the first field at fault.
    """
    kind = message.get("type") if isinstance(message, dict) else None
    if not isinstance(kind, str) or kind not in _FIELDS or (allowed is not None and kind not in allowed):
        _fail("message", f"one of {', '.join(sorted(allowed or _FIELDS))}", kind)
    required, optional = _FIELDS[str(kind)], _OPTIONAL.get(str(kind), {})
    for name, check in required.items():
        if name not in message:
            _fail(f"message {kind!r}", f"a field {name!r}", sorted(map(str, message))[:8])
        check(f"field {name!r}", message[name])
    for name, value in message.items():
        if name in optional:
            optional[name](f"field {name!r}", value)
        elif name != "type" and name not in required:
            _fail(f"message {kind!r}", "no unknown field", name)


# --- bytes ----------------------------------------------------------------------------------------------------------


def encode(message: Mapping[str, Any], limit: int = FRAME_LIMIT) -> bytes:
    """A message as a frame of at most `limit` bytes.

    Raises:
        WireError: a field is wrong, or the frame is larger.

    Example:
        >>> decode(encode(reset("trial-7", "pour the cup")))
        {'type': 'reset', 'session': 'trial-7', 'prompt': 'pour the cup'}
    """
    validate(message)
    frame = msgpack.packb(message, default=_pack)
    if len(frame) > limit:
        raise WireError(TOO_BIG, "frame", expected=f"at most {limit} bytes", got=str(len(frame)))
    return bytes(frame)


def _pack(value: Any) -> Any:
    if isinstance(value, CompressedImage):
        return {"d": value.data, "c": value.codec, "s": list(value.shape)}
    if isinstance(value, np.ndarray) and value.dtype.str[1:] in _DTYPES and value.ndim <= _MAX_DIMS:
        plain = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
        return {"d": plain.tobytes() if plain.ndim == 0 or plain.size == 0 else plain.data.cast("B"),
                "t": value.dtype.str[1:], "s": list(value.shape)}  # fmt: skip
    raise WireError(BAD_DATA, "message", expected="plain values and arrays", got=f"{type(value).__name__}")


def decode(frame: bytes, limit: int = FRAME_LIMIT, *, allowed: Collection[str] | None = None) -> dict[str, Any]:
    """A frame as a checked message; arrays are read-only views into it, compressed images stay `CompressedImage`.

    Args:
        frame: the bytes of one binary websocket message.
        limit: most bytes accepted.
        allowed: the message types that this sender may send, such as `FROM_POLICY`.

    Raises:
        WireError: whatever is wrong with the bytes; no other exception leaves this function.
    """
    if not isinstance(frame, bytes):
        raise WireError(REFUSED, "frame", expected="a binary message", got=type(frame).__name__)
    if len(frame) > limit:
        raise WireError(TOO_BIG, "frame", expected=f"at most {limit} bytes", got=str(len(frame)))
    containers = 0

    def count(value: Any) -> Any:
        # The parser calls this for every finished list and map: a frame of a million empty lists ends here.
        nonlocal containers
        containers += 1
        if containers > _MAX_CONTAINERS:
            raise WireError(REFUSED, "frame", expected=f"at most {_MAX_CONTAINERS} lists and maps", got="more")
        return _unpack(value) if isinstance(value, dict) and "d" in value and "s" in value else value

    try:
        message = msgpack.unpackb(
            frame,
            object_hook=count,
            list_hook=count,
            max_array_len=_MAX_ITEMS,
            max_map_len=_MAX_KEYS,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as fault:
        got = f"{type(fault).__name__} {fault}"
        raise WireError(BAD_DATA, "frame", expected="one msgpack map within the limits", got=got) from fault
    if containers > _MAX_DEPTH:  # fewer cannot lie deeper
        _check_depth(message, 1)
    validate(message, allowed)
    return dict(message)


def _check_depth(value: Any, depth: int) -> None:
    if isinstance(value, dict | list):
        if depth > _MAX_DEPTH:
            raise WireError(REFUSED, "frame", expected=f"at most {_MAX_DEPTH} levels", got="more")
        for child in value.values() if isinstance(value, dict) else value:
            _check_depth(child, depth + 1)


def _unpack(record: dict[str, Any]) -> NDArray[Any] | CompressedImage:
    """An array or compressed image from its map, after its shape was compared with its length."""
    data, shape = record["d"], record["s"]
    kind = record.get("t", record.get("c"))
    sound = (
        len(record) == 3
        and isinstance(data, bytes)
        and isinstance(kind, str)
        and isinstance(shape, list)
        and len(shape) <= _MAX_DIMS
        and all(type(side) is int and 0 <= side < 2**31 for side in shape)
    )
    if not sound:
        expected = f"bytes d, dtype t and at most {_MAX_DIMS} dimensions s"
        raise WireError(BAD_DATA, "array", expected=expected, got=str(sorted(record)))
    if "c" in record:
        if kind not in CODECS[1:] or len(shape) != 3 or shape[2] != 3 or not 1 <= min(shape) <= max(shape) <= _MAX_SIDE:
            expected = f"jpeg or png of at most {_MAX_SIDE} pixels a side"
            raise WireError(BAD_DATA, "image", expected=expected, got=f"{kind} {shape}")
        return CompressedImage(data, str(kind), (shape[0], shape[1], shape[2]))
    if kind not in _DTYPES:
        raise WireError(BAD_DATA, "array", expected=f"dtype {', '.join(_DTYPES)}", got=repr(str(kind)[:16]))
    # Python integers do not overflow: 2^40 x 2^40 simply is not the length.
    if math.prod(shape) * _DTYPES[str(kind)] != len(data):
        raise WireError(BAD_DATA, "array", expected=f"{shape} of {kind} to fill its bytes", got=f"{len(data)} bytes")
    flat: NDArray[Any] = np.frombuffer(data, np.dtype(f"<{kind}" if kind != "b1" else "u1"))
    return (flat if kind != "b1" else flat != 0).reshape(shape)


class SequenceCheck:
    """Sees to it that `seq` strictly increases within each session of one connection.

    Args:
        most: sessions remembered; more at once are refused. An `end` message frees its place.

    Example:
        >>> check = SequenceCheck()
        >>> check({"type": "act", "session": "a", "seq": 1})
        >>> check({"type": "act", "session": "a", "seq": 1})
        Traceback (most recent call last):
        offbook.client.wire.WireError: field 'seq': expected a number above 1, got 1; close the connection.
    """

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._last: dict[str, int] = {}

    def __call__(self, message: Mapping[str, Any]) -> None:
        """Raises WireError (1008) for a number that does not increase; forgets a session at its `end`."""
        session = message.get("session", "")
        if message["type"] == "end":
            self._last.pop(session, None)
        elif "seq" in message:
            last = self._last.get(session, -1)
            if message["seq"] <= last:
                raise WireError(REFUSED, "field 'seq'", expected=f"a number above {last}", got=str(message["seq"]))
            if session not in self._last and len(self._last) >= self._most:
                raise WireError(REFUSED, "sessions", expected=f"at most {self._most} at once", got="one more")
            self._last[session] = message["seq"]
