"""A scripted arena on a free loopback port: each connection runs one plain function in its own thread."""

import contextlib
import http
import threading
from collections.abc import Callable, Iterator

import numpy as np
from websockets.sync.server import ServerConnection, serve

from offbook.client import wire
from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, PolicyMeta

META = PolicyMeta(
    name="pourer",
    observation=ObservationSpec(state=(("joints", 3),), cameras={"front": (16, 16)}),
    action=ActionSpec(size=2, low=(-1.0, -1.0), high=(1.0, 1.0)),
    chunk=4,
)
TOKEN = "ob_test_secret"


@contextlib.contextmanager
def arena(script: Callable[[ServerConnection], None], **options: object) -> Iterator[str]:
    """Serves `script(connection)`; its first exception fails the test; yields the address."""
    failures: list[BaseException] = []

    def admit(connection, request):
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "who are you?\n")
        return None

    def handle(connection: ServerConnection) -> None:
        try:
            script(connection)
        except BaseException as error:
            failures.append(error)

    options = {"process_request": admit, "compression": None, "max_size": 2**24, **options}
    with serve(handle, "127.0.0.1", 0, **options) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join(5)
    if failures:
        raise failures[0]


def observation(session: str, value: float = 0.0) -> Observation:
    return Observation(
        sessions=(session,),
        state=np.full((1, 3), value, np.float32),
        images={"front": np.full((1, 16, 16, 3), 7, np.uint8)},
        time=np.zeros(1),
    )


def receive(connection: ServerConnection, timeout: float = 5.0) -> dict:
    return wire.decode(connection.recv(timeout))


def send(connection: ServerConnection, message: dict) -> None:
    connection.send(wire.encode(message, wire.RAW_FRAME_LIMIT))


def greet(connection: ServerConnection) -> dict:
    hello = receive(connection)
    assert hello["type"] == "hello"
    send(connection, wire.ready(hello["images"]))
    return hello


def ask(connection: ServerConnection, session: str, seq: int, value: float = 0.0, images: str = "raw") -> None:
    send(connection, wire.obs(session, seq, observation(session, value), deadline_ms=100, images=images))


class EchoPolicy:
    """Answers with the mean of the state; remembers what it was asked; `before` runs inside every inference."""

    meta = META

    def __init__(self, before: Callable[[Observation], None] = lambda observation: None) -> None:
        self.before = before
        self.resets: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        self.batches: list[tuple[str, ...]] = []

    def reset(self, sessions, prompts):
        self.resets.append((tuple(sessions), tuple(prompts)))

    def infer(self, observation):
        self.before(observation)
        self.batches.append(observation.sessions)
        mean = observation.state.mean(axis=1)
        return np.broadcast_to(mean[:, None, None], (len(mean), 2, 2)).astype(np.float32)
