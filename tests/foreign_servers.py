"""Servers that speak the bytes of openpi's, RoboArena's and LeRobot's, on free loopback ports."""

import contextlib
import pickle
import sys
import threading
from concurrent import futures
from dataclasses import dataclass
from types import ModuleType

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

# --- openpi and RoboArena -------------------------------------------------------------------------------------------


def packed(value):
    """As their own packer: arrays are maps with bytes as keys, NumPy's numbers too."""

    def plain(one):
        if isinstance(one, np.ndarray):
            return {b"__ndarray__": True, b"data": one.tobytes(), b"dtype": one.dtype.str, b"shape": one.shape}
        return {b"__npgeneric__": True, b"data": one.item(), b"dtype": one.dtype.str}

    return msgpack.packb(value, default=plain)


def unpacked(frame):
    def array(one):
        if b"__ndarray__" not in one:
            return one
        return np.ndarray(buffer=one[b"data"], dtype=np.dtype(one[b"dtype"]), shape=one[b"shape"])

    return msgpack.unpackb(frame, object_hook=array)


class Foreign:
    """What a server does: `answer(request)` gives what is packed, or bytes or text that are sent as they are."""

    def __init__(self, answer, metadata=None, first=None):
        self.answer, self.first = answer, packed(metadata or {}) if first is None else first
        self.requests, self.connections = [], []

    def __call__(self, connection):
        self.connections.append(connection)
        with contextlib.suppress(ConnectionClosed):
            if self.first:
                connection.send(self.first)
            while True:
                request = unpacked(connection.recv())
                self.requests.append(request)
                try:
                    answer = self.answer(request)
                except Exception as error:
                    text = f"Traceback (most recent call last):\n  File ...\n{type(error).__name__}: {error}\n"
                    connection.send(text)
                    connection.close(1011, "Internal server error. Traceback included in previous frame.")
                    return
                connection.send(answer if isinstance(answer, str | bytes) else packed(answer))


@contextlib.contextmanager
def websocket(foreign):
    """The address of a server."""
    with serve(foreign, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join(5)


# --- LeRobot --------------------------------------------------------------------------------------------------------

HELPERS = "lerobot.async_inference.helpers"


def lerobot_classes(monkeypatch):
    """LeRobot's own classes under their own names, with which its server pickles and unpickles."""
    module = ModuleType(HELPERS)

    @dataclass
    class TimedAction:
        timestamp: float
        timestep: int
        action: object

    @dataclass
    class TimedObservation:
        timestamp: float
        timestep: int
        observation: dict
        must_go: bool = False

    @dataclass
    class RemotePolicyConfig:
        policy_type: str
        pretrained_name_or_path: str
        lerobot_features: dict
        actions_per_chunk: int
        device: str = "cpu"
        rename_map: dict | None = None

    for kind in (TimedAction, TimedObservation, RemotePolicyConfig):
        kind.__module__, kind.__qualname__ = HELPERS, kind.__name__
        setattr(module, kind.__name__, kind)
    for name in ("lerobot", "lerobot.async_inference"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, HELPERS, module)
    return module


class LeRobotService:
    """The four calls of its service; `actions(observation)` gives the list that is pickled, or bytes."""

    def __init__(self, actions):
        self.actions, self.setups, self.observations, self.readies, self.parts = actions, [], [], 0, 0

    def ready(self, message, context):
        assert message == b""
        self.readies += 1
        return b""

    def setup(self, message, context):
        self.setups.append(pickle.loads(content(message, 1)))
        if self.setups[-1].pretrained_name_or_path == "nowhere":
            raise FileNotFoundError("nowhere is not a local folder")
        return b""

    def observe(self, messages, context):
        whole = b""
        for message in messages:
            self.parts += 1
            state, whole = message[1], whole + content(message[2:], 2)
            assert message[0] == 8
        assert state == 3
        self.observations.append(pickle.loads(whole))
        return b""

    def act(self, message, context):
        made = self.actions(self.observations[-1])
        data = made if isinstance(made, bytes) else pickle.dumps(made)
        return b"\n" + varint(len(data)) + data if data else b""


def varint(value):
    return bytes([value & 0x7F | (0x80 if value >> 7 else 0)]) + (varint(value >> 7) if value >> 7 else b"")


def content(message, field):
    """The bytes of a field of bytes that is all of a message."""
    assert message[0] == field << 3 | 2
    length, shift, place = 0, 0, 1
    while True:
        length |= (message[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if not message[place - 1] & 0x80:
            break
    assert len(message) == place + length
    return message[place:]


@contextlib.contextmanager
def grpc_server(service):
    """The address of LeRobot's server."""
    import grpc

    handlers = {
        "Ready": grpc.unary_unary_rpc_method_handler(service.ready),
        "SendPolicyInstructions": grpc.unary_unary_rpc_method_handler(service.setup),
        "SendObservations": grpc.stream_unary_rpc_method_handler(service.observe),
        "GetActions": grpc.unary_unary_rpc_method_handler(service.act),
    }
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("transport.AsyncInference", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def array_header(dtype, shape, data=b"\0" * 8):
    """An answer whose actions claim to be something."""
    return {"actions": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}}
