"""Websocket policy servers of openpi and RoboArena.

On connecting the server sends a map of metadata. Each request is a map, each answer a map whose `actions` are an array
(N, A), or such an array alone. Arrays travel as maps of `__ndarray__`, `data`, `dtype` and `shape`, with bytes as keys.
A frame of text is the server's traceback. RoboArena's requests also name an endpoint, `infer` or `reset`, and its
metadata say what it wants to see.

Of an answer only the actions are looked at, and nothing of it is trusted: frames are bounded, types are those of a
list, and a shape must fill its bytes before an array is made.

Source: openpi, packages/openpi-client (`msgpack_numpy`, `websocket_client_policy`) and
    `src/openpi/serving/websocket_policy_server.py`; RoboArena, `roboarena/policy_server.py`.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NoReturn

import msgpack
import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect

from offbook.client.addresses import split_address
from offbook.errors import ConfigError, PolicyError

LIMIT = 8 * 2**20
PATIENCE_S = 300.0
"""Longest wait for the first answer: models compile themselves then."""
DEADLINE_S = 30.0
_HANDSHAKE_S, _CLOSE_S = 10.0, 2.0
_TYPES = frozenset(("<f2", "<f4", "<f8", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8"))
_MOST_DIMS, _MOST_ENTRIES = 4, 2**16


class OpenPiServer:
    """A connection to such a server; it is dialled again at the next episode when it was lost.

    Args:
        address: such as `ws://localhost:8000`, or `localhost:8000`.
        patience_s: longest wait for the first answer, seconds.
        deadline_s: longest wait for each further one, seconds.

    Attributes:
        metadata: what the server says of itself.

    Raises:
        PolicyError: there is no such server.
        ConfigError: the address cannot be used.
    """

    def __init__(self, address: str, *, patience_s: float = PATIENCE_S, deadline_s: float = DEADLINE_S) -> None:
        self._url = address if "://" in address else f"ws://{address}"
        parts = split_address(self._url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            fix = "write ws://localhost:8000"
            raise ConfigError("--openpi", expected="ws(s)://HOST[:PORT]", got=repr(address), fix=fix)
        self.address = f"policy server at {self._url}"
        self._loopback = parts.hostname in ("localhost", "127.0.0.1", "::1")
        self._patience_s, self._deadline_s = patience_s, deadline_s
        self._socket: ClientConnection | None = None
        self._line = ExitStack()
        self.metadata: Mapping[str, Any] = {}
        self._connect()

    @property
    def arena(self) -> bool:
        """Whether it is one of RoboArena's, by its metadata."""
        return "n_external_cameras" in self.metadata or "needs_wrist_camera" in self.metadata

    @property
    def resolution(self) -> tuple[int, int] | None:
        """Height and width in which a server of RoboArena wants its images; None where it takes any."""
        wanted = self.metadata.get("image_resolution") if self.arena else None
        if wanted is None:
            return None
        sound = isinstance(wanted, list) and len(wanted) == 2 and all(type(n) is int and 1 <= n <= 4096 for n in wanted)
        if not sound:
            self._fail("a height and a width as image_resolution", str(wanted)[:80], "see to the server")
        return wanted[0], wanted[1]

    def check_images(self, keys: Mapping[str, Any]) -> None:
        """Refuses to show a server of RoboArena fewer cameras than it says that it needs.

        Raises:
            ConfigError: a camera is missing.
        """
        if not self.arena:
            return
        number = self.metadata.get("n_external_cameras", 1)
        sides = ("left", "right") if self.metadata.get("needs_stereo_camera") else ("left",)
        wanted = [f"exterior_image_{i + 1}" for i in range(number if type(number) is int and 0 <= number <= 8 else 0)]
        wanted += ["wrist_image"] if self.metadata.get("needs_wrist_camera", True) else []
        missing = [key for name in wanted for side in sides if (key := f"observation/{name}_{side}") not in keys]
        if missing:
            got, fix = f"none for {missing[0]}", f"add --image {missing[0]}=CAMERA"
            raise ConfigError(self.address, expected="a camera for each that it needs", got=got, fix=fix)

    def begin(self, session: str) -> None:
        """Dials again where the line was lost; tells a server of RoboArena that an episode begins."""
        if self._socket is None or self._socket.protocol.state is not State.OPEN:
            self._connect()
        if self.arena:
            self._exchange({"endpoint": "reset", "session_id": session}, self._deadline_s, text=True)

    def ask(self, request: Mapping[str, Any], session: str) -> NDArray[np.float32]:
        """The actions for an observation, (N, A)."""
        extra: dict[str, Any] = {"endpoint": "infer"} if self.arena else {}
        if self.arena and self.metadata.get("needs_session_id"):
            extra["session_id"] = session
        answer = self._exchange({**request, **extra}, self._patience_s)
        self._patience_s = self._deadline_s
        found = answer.get("actions") if isinstance(answer, dict) and b"__ndarray__" not in answer else answer
        if found is None:
            shown = ", ".join(map(str, list(answer)[:8])) or "an empty map"
            self._fail("an answer with 'actions'", shown, "is it a policy server?")
        return self._array(found)

    def close(self) -> None:
        """Hangs up."""
        self._socket = None
        self._line.close()

    def _connect(self) -> None:
        self.close()
        try:
            # Such servers compute where they should answer pings, so that a silent one is not a dead one.
            dialled = connect(
                self._url,
                compression=None,
                max_size=LIMIT,
                open_timeout=_HANDSHAKE_S,
                close_timeout=_CLOSE_S,
                ping_interval=None,
                proxy=None if self._loopback else True,
            )
            self._socket = socket = self._line.enter_context(dialled)
        except (OSError, TimeoutError, InvalidHandshake, InvalidURI) as error:
            got = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
            self._fail("a policy server", got[:200], "start it, or check the address", error)
        try:
            first = socket.recv(_HANDSHAKE_S)
        except (TimeoutError, ConnectionClosed) as error:
            got = f"nothing within {_HANDSHAKE_S:g} s" if isinstance(error, TimeoutError) else str(error)
            self._fail("its metadata on connecting", got, "is it a policy server?", error)
        metadata = self._decoded(first) if isinstance(first, bytes) else None
        if not isinstance(metadata, dict):
            self._fail("a map of metadata on connecting", "something else", "is it a policy server?")
        self.metadata = metadata

    def _exchange(self, message: Mapping[str, Any], seconds: float, *, text: bool = False) -> Any:
        if self._socket is None:
            self._fail("an open connection", "a closed one", "begin another episode")
        try:
            self._socket.send(msgpack.packb(message, default=_packed))
            frame = self._socket.recv(seconds)
        except TimeoutError as error:
            self._fail(f"an answer within {seconds:g} s", "none", "see to the server, or use a faster one", error)
        except ConnectionClosed as error:
            self._fail("an answer", str(error), "see the server's own log", error)
        if isinstance(frame, bytes):
            return self._decoded(frame)
        lines = [line.strip() for line in frame.splitlines() if line.strip()]
        if text and not frame.startswith("Traceback"):
            return frame
        fix = "map what it wants with --image, --state and --prompt-key, or see its log"
        self._fail("actions", f"its error: {lines[-1][:300] if lines else 'an empty text'}", fix)

    def _decoded(self, frame: bytes) -> Any:
        try:
            return msgpack.unpackb(
                frame, strict_map_key=True, max_map_len=_MOST_ENTRIES, max_array_len=_MOST_ENTRIES, max_ext_len=0
            )
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
            self._fail("a msgpack value", f"{type(error).__name__} {error}"[:200], "is it a policy server?", error)

    def _array(self, record: Any) -> NDArray[np.float32]:
        fields = record if isinstance(record, dict) else {}
        data, kind, shape = (fields.get(key) for key in (b"data", b"dtype", b"shape"))
        if not (
            isinstance(data, bytes)
            and kind in _TYPES
            and isinstance(shape, list)
            and len(shape) <= _MOST_DIMS
            and all(type(side) is int and 0 <= side < 2**31 for side in shape)
            # Python's integers do not overflow: 2^40 x 2^40 simply is not the length.
            and math.prod(shape) * np.dtype(kind).itemsize == len(data)
        ):
            expected = f"'actions' to be an array of numbers of at most {_MOST_DIMS} dimensions"
            got = f"{kind} {shape}" if fields else type(record).__name__
            self._fail(expected, got[:80], "see to the server")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which the robot's guard refuses
            array = np.frombuffer(data, np.dtype(kind)).reshape(shape).astype(np.float32)
        return array[None] if array.ndim == 1 else array

    def _fail(self, expected: str, got: str, fix: str, cause: BaseException | None = None) -> NoReturn:
        """Hangs up, for a late answer must not be taken for the next one, and says why."""
        self.close()
        raise PolicyError(self.address, expected=expected, got=got, fix=fix) from cause


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        plain = np.ascontiguousarray(value)
        return {b"__ndarray__": True, b"data": plain.tobytes(), b"dtype": plain.dtype.str, b"shape": plain.shape}
    raise TypeError(f"{type(value).__name__} does not travel")
