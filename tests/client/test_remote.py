"""A policy behind the relay, as a robot's worker sees it."""

import socket
import threading

import numpy as np
import pytest
from loopback import META, TOKEN, arena, observation, receive, send

from offbook.client import wire
from offbook.client.remote import RemotePolicy
from offbook.errors import PolicyError, RobotError


def answer(connection, message, value=0.5, **changes):
    chunk = np.full((2, 2), value, np.float32)
    send(connection, wire.act(message["session"], message["seq"], chunk) | changes)


def test_a_remote_policy_is_a_policy():
    frames = []

    def script(connection):
        assert connection.request.path == "/v1/relay/trial-9"
        send(connection, wire.ready("png", META))
        while not frames or frames[-1]["type"] != "end":
            frames.append(receive(connection))
            if frames[-1]["type"] == "obs":
                answer(connection, frames[-1])

    with arena(script) as url:
        policy = RemotePolicy(url, TOKEN, "trial-9", deadline_s=5)
        assert policy.meta == META
        policy.reset(["A"], ["pour the cup"])
        for _ in range(2):
            chunk = policy.infer(observation("A"))
        policy.close("done")
        policy.close("done")
    assert chunk.shape == (1, 2, 2)
    assert [frame["type"] for frame in frames] == ["reset", "obs", "obs", "end"]
    assert [frame["seq"] for frame in frames[1:3]] == [1, 2]
    assert frames[1]["deadline_ms"] == 5000
    np.testing.assert_array_equal(frames[1]["images"]["front"].pixels(), observation("A").images["front"][0])


def leave(connection):
    """What an arena says of a policy that has left."""
    send(connection, wire.error("policy_gone", "it left"))
    connection.close(1000, "the policy left")


def scripted(script, *, deadline_s=5.0):
    """What one inference raises when the arena, after the reset, runs `script(connection, obs)`."""

    def play(connection):
        send(connection, wire.ready("raw", META))
        receive(connection)
        script(connection, receive(connection))

    with arena(play) as url:
        policy = RemotePolicy(url, TOKEN, "t", deadline_s=deadline_s)
        policy.reset(["A"], [""])
        try:
            with pytest.raises((PolicyError, RobotError)) as caught:
                policy.infer(observation("A"))
        finally:
            policy.close("policy_fault")
    return caught.value


@pytest.mark.faults
@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        (lambda c, m: send(c, wire.error("policy_left", "it hung up")), PolicyError, "it hung up"),
        (lambda c, m: c.close(1000, "policy left"), PolicyError, "1000"),
        (lambda c, m: c.close(1008, "policy broke the rules"), PolicyError, "broke the rules"),
        (lambda c, m: c.close(1012, "restarting"), RobotError, "restarting"),
        (lambda c, m: c.socket.shutdown(socket.SHUT_RDWR), RobotError, "open connection"),
        (lambda c, m: answer(c, m, seq=m["seq"] + 1), PolicyError, "observation 2"),
        (lambda c, m: answer(c, m, session="B"), PolicyError, "of 'B'"),
        (lambda c, m: answer(c, m, chunk=np.zeros((9, 2), np.float32)), PolicyError, "got shape (1, 9, 2)"),
        (lambda c, m: c.send(b"\xc1"), RobotError, "msgpack"),
    ],
)
def test_faults_are_blamed_on_the_side_they_come_from(script, kind, words):
    error = scripted(script)
    assert type(error) is kind
    assert words in str(error)


@pytest.mark.faults
def test_of_a_line_that_was_closed_between_two_questions_the_last_words_are_told():
    def play(connection):
        send(connection, wire.ready("raw", META))
        receive(connection)
        answer(connection, receive(connection))
        leave(connection)
        ended.set()

    ended = threading.Event()
    with arena(play) as url:
        policy = RemotePolicy(url, TOKEN, "t", deadline_s=5.0)
        policy.reset(["A"], [""])
        policy.infer(observation("A"))
        assert ended.wait(10)  # the closing handshake is over: nothing can be sent any more
        with pytest.raises(PolicyError, match="policy_gone: it left"):
            policy.infer(observation("A"))
        policy.close("policy_fault")


@pytest.mark.faults
def test_silence_is_a_policy_fault_after_the_deadline():
    over = threading.Event()
    error = scripted(lambda connection, message: over.wait(0.5), deadline_s=0.2)
    assert type(error) is PolicyError
    assert "within 0.2 s" in str(error)


def test_a_late_answer_to_an_earlier_question_is_passed_over():
    def script(connection):
        send(connection, wire.ready("raw", META))
        receive(connection)
        first = receive(connection)
        second = receive(connection)
        answer(connection, first, value=1)
        answer(connection, second, value=2)

    with arena(script) as url:
        policy = RemotePolicy(url, TOKEN, "t", deadline_s=0.2)
        policy.reset(["A"], [""])
        with pytest.raises(PolicyError):
            policy.infer(observation("A"))
        assert policy.infer(observation("A"))[0, 0, 0] == 2
        policy.close()


def test_nan_is_left_to_the_robots_guard():
    def script(connection):
        send(connection, wire.ready("raw", META))
        receive(connection)
        answer(connection, receive(connection), value=np.nan)

    with arena(script) as url:
        policy = RemotePolicy(url, TOKEN, "t")
        policy.reset(["A"], [""])
        assert np.isnan(policy.infer(observation("A"))).all()
        policy.close()


@pytest.mark.faults
def test_closing_wakes_an_inference_that_waits_in_another_thread():
    asked, caught = threading.Event(), []

    def script(connection):
        send(connection, wire.ready("raw", META))
        receive(connection)
        receive(connection)
        asked.set()
        try:
            receive(connection)
        except Exception:
            return

    def think(policy):
        try:
            policy.infer(observation("A"))
        except (PolicyError, RobotError) as error:
            caught.append(error)

    with arena(script) as url:
        policy = RemotePolicy(url, TOKEN, "t", deadline_s=30)
        policy.reset(["A"], [""])
        thread = threading.Thread(target=think, args=(policy,))
        thread.start()
        assert asked.wait(5)
        policy.close("robot_fault")
        thread.join(5)
    assert len(caught) == 1
    with pytest.raises(RobotError, match="a closed one"):
        policy.infer(observation("A"))


def test_a_relay_that_is_not_there_or_refuses_is_a_robot_error():
    with pytest.raises(RobotError):
        RemotePolicy("http://127.0.0.1:9", TOKEN, "t")
    with arena(lambda connection: None) as url, pytest.raises(RobotError, match="401"):
        RemotePolicy(url, "ob_wrong_secret", "t")


def test_a_policy_that_is_not_there_is_a_policy_fault():
    def script(connection):
        send(connection, wire.error("policy_absent", "nobody plays for this submission"))

    with arena(script) as url, pytest.raises(PolicyError, match="nobody plays"):
        RemotePolicy(url, TOKEN, "t")


@pytest.mark.faults
def test_a_policy_that_left_before_the_episode_began_is_known_by_its_last_words():
    def play(connection):
        send(connection, wire.ready("raw", META))
        leave(connection)
        ended.set()

    ended = threading.Event()
    with arena(play) as url:
        policy = RemotePolicy(url, TOKEN, "t", deadline_s=5.0)
        assert ended.wait(10)
        policy.reset(["A"], [""])
        with pytest.raises(PolicyError, match="policy_gone: it left"):
            policy.infer(observation("A"))
        policy.close("policy_fault")


def test_nobody_else_is_dialled_because_the_arena_says_so():
    with socket.create_server(("127.0.0.1", 0)) as there, socket.create_server(("127.0.0.1", 0)) as here:
        there.settimeout(0.5)

        def redirect():
            with here.accept()[0] as connection:
                connection.recv(65536)
                head = f"HTTP/1.1 302 Found\r\nLocation: ws://127.0.0.1:{there.getsockname()[1]}/\r\n"
                connection.sendall(f"{head}Content-Length: 0\r\n\r\n".encode())

        thread = threading.Thread(target=redirect)
        thread.start()
        with pytest.raises(RobotError, match="302"):
            RemotePolicy(f"ws://127.0.0.1:{here.getsockname()[1]}", TOKEN, "t", deadline_s=1.0)
        thread.join(5)
        with pytest.raises(TimeoutError):
            there.accept()
