"""A policy that dials out, against a scripted arena on loopback."""

import asyncio
import http
import queue
import socket
import threading

import numpy as np
import pytest
from loopback import META, TOKEN, EchoPolicy, arena, ask, greet, observation, receive, send
from websockets.asyncio import server as asyncio_server

from offbook.client import serve, wire
from offbook.client.channel import InferenceThread, socket_url
from offbook.client.protocol import PolicyMeta
from offbook.client.serve import serve_policy
from offbook.client.submit import ArenaClient
from offbook.errors import ConfigError, SubmissionError


def run(policy, url, *, token=TOKEN, **options) -> list[str]:
    """Serves until the scripted arena closes; returns the event lines."""
    lines: list[str] = []
    serve_policy(policy, url, token, "sub-1", on_event=lines.append, **options)
    return lines


def test_a_policy_introduces_itself_and_answers():
    policy, answers = EchoPolicy(), []

    def script(connection):
        hello = greet(connection)
        assert (hello["submission"], hello["images"], hello["meta"]["name"]) == ("sub-1", "raw", "pourer")
        send(connection, wire.reset("t1", "pour the cup"))
        for seq in (1, 2):
            ask(connection, "t1", seq, value=seq / 4)
            answers.append(receive(connection))
        send(connection, wire.end("t1", "done"))

    with arena(script) as url:
        lines = run(policy, url)
    assert [answer["seq"] for answer in answers] == [1, 2]
    np.testing.assert_allclose(answers[1]["chunk"], np.full((2, 2), 0.5))
    assert policy.resets == [(("t1",), ("pour the cup",))]
    assert "t1: trial ended, done" in lines


@pytest.mark.parametrize("images", ["jpeg", "png"])
def test_images_come_in_the_codec_that_the_policy_asked_for(images):
    seen = []

    def script(connection):
        assert greet(connection)["images"] == images
        send(connection, wire.reset("t1", ""))
        ask(connection, "t1", 1, images=images)
        assert receive(connection)["type"] == "act"

    policy = EchoPolicy(before=lambda observation: seen.append(observation.images["front"]))
    with arena(script) as url:
        run(policy, url, images=images)
    assert np.abs(seen[0].astype(int) - 7).max() <= 2


def test_pings_live_during_slow_inference_and_the_newest_observation_wins():
    release, started = threading.Event(), threading.Event()

    def slow(observation):
        started.set()
        assert release.wait(5)

    policy, answers = EchoPolicy(before=slow), []

    def script(connection):
        greet(connection)
        send(connection, wire.reset("t1", ""))
        ask(connection, "t1", 1)
        assert started.wait(5)
        assert connection.ping().wait(2)  # answered although the policy still thinks
        for seq in range(2, 40):
            ask(connection, "t1", seq, value=seq)
        assert connection.ping().wait(2)
        release.set()
        answers.extend(receive(connection) for _ in range(2))

    with arena(script) as url:
        run(policy, url)
    assert [answer["seq"] for answer in answers] == [1, 39]
    assert answers[1]["chunk"][0, 0] == 39


def test_one_trial_follows_another_and_the_newest_reset_counts():
    policy, answers = EchoPolicy(), []

    def script(connection):
        greet(connection)
        for session in "ab":
            send(connection, wire.reset(session, ""))
            ask(connection, session, 1)
            answers.append(receive(connection))
        ask(connection, "a", 2)
        answers.append(receive(connection))
        for end in "ab":
            send(connection, wire.end(end, "done"))
        send(connection, wire.reset("a", "again"))
        ask(connection, "a", 1)
        answers.append(receive(connection))

    with arena(script) as url:
        lines = run(policy, url)
    kinds = [(answer["type"], answer["session"]) for answer in answers]
    assert kinds == [("act", "a"), ("act", "b"), ("error", "a"), ("act", "a")]
    assert policy.batches == [("a",), ("b",), ("a",)]
    assert "a: the connection ended during the trial" in lines


def test_an_answer_to_an_episode_that_is_over_is_not_sent():
    release, started = threading.Event(), threading.Event()

    def slow(observation):
        started.set()
        release.wait(5)

    def script(connection):
        greet(connection)
        send(connection, wire.reset("t1", "first"))
        ask(connection, "t1", 1)
        assert started.wait(5)
        send(connection, wire.reset("t1", "second"))
        assert connection.ping().wait(2)
        release.set()
        ask(connection, "t1", 2, value=5)
        assert receive(connection)["seq"] == 2

    policy = EchoPolicy(before=slow)
    with arena(script) as url:
        run(policy, url)
    assert [prompts for _, prompts in policy.resets] == [("first",), ("second",)]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda n: np.zeros((n, 2, 3)), "expected shape (1, 1..4, 2), got shape (1, 2, 3)"),
        (lambda n: np.zeros((n, 9, 2)), "got shape (1, 9, 2)"),
        (lambda n: [["a", "b"]] * n, "policy 'pourer'"),
        (lambda n: {}["missing"], "the policy raised KeyError"),
    ],
)
def test_a_failing_policy_ends_its_trial_with_one_line_and_the_service_goes_on(answer, words, caplog):
    errors = []

    class Broken(EchoPolicy):
        def infer(self, observation):
            return answer(1) if observation.state[0, 0] == 1 else super().infer(observation)

    def script(connection):
        greet(connection)
        for session, value in (("bad", 1.0), ("good", 0.0)):
            send(connection, wire.reset(session, ""))
            ask(connection, session, 1, value=value)
            errors.append(receive(connection))

    with arena(script) as url:
        run(Broken(), url)
    assert errors[0]["type"] == "error"
    assert errors[0]["session"] == "bad"
    assert words in errors[0]["message"]
    assert "Traceback" not in errors[0]["message"]
    assert errors[1]["type"] == "act"


def test_nan_travels_to_the_robots_own_guard():
    class Dizzy(EchoPolicy):
        def infer(self, observation):
            return np.full((1, 1, 2), np.nan, np.float32)

    answers = []

    def script(connection):
        greet(connection)
        send(connection, wire.reset("t1", ""))
        ask(connection, "t1", 1)
        answers.append(receive(connection))

    with arena(script) as url:
        run(Dizzy(), url)
    assert np.isnan(answers[0]["chunk"]).all()


@pytest.mark.faults
def test_a_wrong_observation_is_an_error_of_that_session_alone():
    answers = []

    def script(connection):
        greet(connection)
        send(connection, wire.reset("t1", ""))
        bad = wire.obs("t1", 1, _other_robot(), deadline_ms=9, images="raw")
        send(connection, bad)
        answers.append(receive(connection))
        ask(connection, "t2", 1)
        answers.append(receive(connection))

    with arena(script) as url:
        run(EchoPolicy(), url)
    assert "'state'" in answers[0]["message"]
    assert (answers[1]["code"], answers[1]["session"]) == ("no_reset", "t2")


def _other_robot():
    other = observation("t1")
    return type(other)(
        sessions=other.sessions, state=np.zeros((1, 9), np.float32), images=other.images, time=other.time
    )


@pytest.mark.faults
def test_a_bad_token_is_refused_at_once_and_never_shown():
    with (
        arena(lambda connection: None) as url,
        pytest.raises(SubmissionError, match=r"HTTP status 401.*check the token") as caught,
    ):
        run(EchoPolicy(), url, token="ob_wrong_verysecret")
    assert "verysecret" not in str(caught.value)


def test_an_arena_that_refuses_the_submission_says_why():
    def script(connection):
        receive(connection)
        send(connection, wire.error("unknown_submission", "there is no submission sub-1"))

    with arena(script) as url, pytest.raises(SubmissionError, match="there is no submission sub-1"):
        run(EchoPolicy(), url)


@pytest.mark.faults
def test_a_refusal_that_passes_is_waited_out(monkeypatch):
    monkeypatch.setattr(serve, "_BACKOFF_FIRST_S", 0.02)
    visits = []

    def admit(connection, request):
        visits.append("dialled")
        return connection.respond(http.HTTPStatus.TOO_MANY_REQUESTS, "wait\n") if len(visits) == 1 else None

    def script(connection):
        visits.append(receive(connection)["type"])
        busy = wire.error("too_many_policies", "at most 32 connected at once")
        send(connection, busy if len(visits) == 3 else wire.ready("raw"))

    with arena(script, process_request=admit) as url:
        lines = run(EchoPolicy(), url)
    assert visits == ["dialled", "dialled", "hello", "dialled", "hello"]
    assert ["HTTP 429" in lines[0], "at most 32" in lines[1]] == [True, True]
    assert lines[-1].startswith("the arena is done")
    with arena(script, process_request=admit) as url:
        visits.clear()
        with pytest.raises(SubmissionError, match="HTTP 429"):
            run(EchoPolicy(), url, once=True)


@pytest.mark.faults
def test_an_arena_of_another_version_is_named():
    def script(connection):
        import msgpack

        receive(connection)
        connection.send(msgpack.packb({"type": "ready", "version": 2, "images": "raw"}))

    with arena(script) as url, pytest.raises(SubmissionError, match="version 1 of the protocol"):
        run(EchoPolicy(), url)


@pytest.mark.faults
def test_a_lost_connection_is_dialled_again(monkeypatch):
    monkeypatch.setattr(serve, "_BACKOFF_FIRST_S", 0.05)
    visits = []

    def script(connection):
        visits.append(1)
        if len(visits) == 1:
            connection.socket.shutdown(socket.SHUT_RDWR)  # the line breaks before a word is said
        else:
            greet(connection)
            if len(visits) == 2:
                connection.close(1012, "restarting")

    with arena(script) as url:
        lines = run(EchoPolicy(), url)
    assert len(visits) == 3
    assert sum("trying again in" in line for line in lines) == 2
    assert any("restarting" in line for line in lines)


def test_once_reports_an_arena_that_is_not_there():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(SubmissionError, match="start the arena"):
        run(EchoPolicy(), f"http://127.0.0.1:{port}", once=True)


@pytest.mark.faults
def test_a_repeated_sequence_number_or_an_oversized_frame_closes_the_connection():
    def repeat(connection):
        greet(connection)
        send(connection, wire.reset("t1", ""))
        ask(connection, "t1", 4)
        ask(connection, "t1", 4)
        for _ in range(2):
            try:
                receive(connection)
            except Exception:
                break
        closes.append(connection.protocol.close_code)

    def flood(connection):
        greet(connection)
        connection.send(bytes(9 * 2**20))
        with pytest.raises(Exception, match="1009"):
            connection.recv(5)
        closes.append(connection.protocol.close_code)

    closes = []
    for script in (repeat, flood):
        with arena(script) as url, pytest.raises(SubmissionError, match="an open connection"):
            run(EchoPolicy(), url, once=True)
    assert closes == [1008, 1009]


@pytest.mark.faults
def test_an_arena_that_stops_reading_is_left(monkeypatch):
    monkeypatch.setattr(serve, "_SEND_S", 0.3)
    ports: queue.Queue[int] = queue.Queue()
    over = threading.Event()

    class Talkative(EchoPolicy):
        meta = PolicyMeta(name="talkative", observation=META.observation, action=META.action, chunk=1024)

        def infer(self, observation):
            return np.zeros((len(observation.sessions), 1024, 2), np.float32)

    async def flood(connection):
        hello = wire.decode(await connection.recv())
        await connection.send(wire.encode(wire.ready(hello["images"])))
        connection.transport.pause_reading()
        await connection.send(wire.encode(wire.reset("t1", "")))
        for seq in range(1, 100_000):
            message = wire.obs("t1", seq, observation("t1"), deadline_ms=9, images="raw")
            await connection.send(wire.encode(message))
            await asyncio.sleep(0.001)  # so that each is answered, not only the newest

    async def deaf_arena():
        async with asyncio_server.serve(flood, "127.0.0.1", 0, compression=None, close_timeout=0.1) as server:
            ports.put(next(iter(server.sockets)).getsockname()[1])
            while not over.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=asyncio.run, args=(deaf_arena(),))
    thread.start()
    try:
        with pytest.raises(SubmissionError, match=r"has not read for 0\.3 s"):
            run(Talkative(), f"http://127.0.0.1:{ports.get(timeout=5)}", once=True)
    finally:
        over.set()
        thread.join(10)


def test_stop_ends_the_service_even_while_the_policy_thinks():
    stop, thinking, never, waited_for = threading.Event(), threading.Event(), threading.Event(), []

    def stuck(observation):
        thinking.set()
        waited_for.append(never.wait(60))

    def script(connection):
        greet(connection)
        send(connection, wire.reset("t1", ""))
        ask(connection, "t1", 1)
        assert thinking.wait(5)
        stop.set()
        with pytest.raises(Exception, match=r"1001.*the policy stops"):
            connection.recv(5)

    with arena(script) as url:
        lines = run(EchoPolicy(before=stuck), url, stop=stop)
    assert waited_for == []
    never.set()
    assert lines[-1] == "stopped"


def test_stop_ends_the_pause_between_attempts():
    stop = threading.Event()
    lines = []

    def report(line):
        lines.append(line)
        stop.set()

    serve_policy(EchoPolicy(), "http://127.0.0.1:9", TOKEN, "sub-1", on_event=report, stop=stop)
    assert "trying again" in lines[0]
    assert lines[-1] == "stopped"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", "ws://127.0.0.1:8000/v1/play"),
        ("https://arena.example/", "wss://arena.example/v1/play"),
        ("wss://arena.example/lab/v1/play", "wss://arena.example/lab/v1/play"),
    ],
)
def test_addresses(url, expected):
    assert socket_url(url, "/v1/play") == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "ftp://x",
        "http://user:pass@host",
        "http://host/?token=secret",
        "http://[::",
        "ws://host:x",
    ],
)
def test_addresses_that_cannot_be_meant_or_carry_secrets_are_refused(url):
    with pytest.raises(ConfigError, match="arena address") as caught:
        socket_url(url, "/v1/play")
    assert "pass@" not in str(caught.value)
    assert "secret" not in str(caught.value)
    if "token" not in url and not url.startswith("ws"):
        with pytest.raises(ConfigError, match="arena address"):
            ArenaClient(url)


def test_an_inference_thread_hands_exceptions_back_and_can_be_awaited():
    thread = InferenceThread()
    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: 1 / 0).result(5)

    async def wait():
        return await asyncio.wrap_future(thread.submit(int, "7"))

    assert asyncio.run(wait()) == 7
    thread.close()
