"""Workers and policies meet in a real arena on loopback: trials, films, faults, lost leases, lost networks."""

from __future__ import annotations

import errno
import io
import json
import math
import threading
import time

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from arena_server import META, Walker, dialled_in, network, running, until
from fsspec.implementations.local import LocalFileSystem
from sqlalchemy import select
from websockets.sync.client import connect

from offbook.arena import recordings, trials, worker
from offbook.arena.recordings import Film
from offbook.arena.tables import Attempt, Result, Trial
from offbook.arena.worker import run_worker
from offbook.client import wire
from offbook.client.protocol import ActionSpec, ObservationSpec, PolicyMeta
from offbook.client.submit import ArenaClient
from offbook.data.clips import read_clip
from offbook.errors import NeedsHumanError, RobotError, SubmissionError
from offbook.service.database import now

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    # The machine that tests run on may be busy: its watchdog is patient, unless a test is about it.
    with running(tmp_path_factory.mktemp("arena"), watchdog_seconds=10.0) as arena:
        yield arena


def work(arena, robot: Walker, **options):
    options = {"name": f"arm-{id(robot)}", "idle_exit": 1.0} | options
    return run_worker(arena.url, arena.tokens["lab"], "arm", robot=robot, **options)


def anchored(arena) -> str:
    """A submission of one trial that any worker can play."""
    return arena.submit("root", kind="anchor", anchor="random", name="random", trials=1)


def checkpointed(arena, folder) -> str:
    """The same with a checkpoint, which a worker fetches first."""
    network(folder / "net.safetensors")
    with arena.client("ada") as client:
        return client.submit("reach", "net", checkpoint=folder / "net.safetensors", trials=1)["id"]


def attempts(arena, entry: str) -> list[Attempt]:
    with arena.database.read() as session:
        query = select(Attempt).join(Trial, Trial.id == Attempt.trial_id).where(Trial.submission_id == int(entry))
        return list(session.scalars(query.order_by(Attempt.id)))


def test_a_remote_policy_is_tried_and_everything_of_it_is_kept(arena) -> None:
    entry = arena.submit(trials=3)
    assert "connect" in arena.status(entry)["state_words"]
    robot = Walker()
    with dialled_in(arena, entry) as lines:
        report = work(arena, robot, max_trials=3)
        until(lambda: any("no trial of this submission is left" in line for line in lines))
    assert report.trials == {"done": 3}
    view = arena.status(entry)
    assert (view["state"], view["n"], view["score"]["value"], view["success"]["value"]) == ("done", 3, 1.0, 1.0)
    order = [trial["scene"] for trial in sorted(view["trials"], key=lambda t: view["opened"]["order"].index(t["slot"]))]
    assert [scene for scene, _ in robot.resets] == order
    with arena.database.read() as session:
        result = session.scalars(select(Result).where(Result.submission_id == int(entry)).limit(1)).one()
    files = {file["name"]: file for file in result.files}
    assert set(files) == {"video-scene.mp4", "poster-scene.jpg", "episode.parquet", "manifest.json"}

    def fetch(name: str) -> bytes:
        return httpx.get(f"{arena.url}/v1/blobs/{files[name]['sha256']}", trust_env=False).content

    table = pq.read_table(io.BytesIO(fetch("episode.parquet")))
    assert table.column_names == ["time", "state", "action", "reward", "late", "latency_ms"]
    assert table["action"].to_pylist() == [[1.0]] * 5
    assert table["state"].to_pylist() == [[float(i), float(i)] for i in range(5)]
    manifest = json.loads(fetch("manifest.json"))
    assert manifest["files"] == [files[name] for name in ("video-scene.mp4", "poster-scene.jpg", "episode.parquet")]
    assert (manifest["steps"], len(manifest["traces"]["time"])) == (5, 5)
    assert all(latency > 0 for latency in manifest["traces"]["latency_ms"])
    film = arena.server.config.app.state.arena.settings.folder / "film.mp4"
    film.write_bytes(fetch("video-scene.mp4"))
    assert read_clip(film).shape == (4, 32, 48, 3)
    page = httpx.get(f"{arena.url}/runs/{result.trial_id}", headers={"Accept": "text/html"}, trust_env=False).text
    assert files["video-scene.mp4"]["sha256"] in page


def test_a_policy_that_hangs_up_has_lost_the_trial_and_is_not_tried_again(arena) -> None:
    entry = arena.submit()
    robot = Walker(steps=2000, seconds=0.005)
    with dialled_in(arena, entry):
        thread = threading.Thread(target=lambda: work(arena, robot, max_trials=1))
        thread.start()
        until(lambda: robot.steps > 3)
    thread.join(20)
    view = arena.status(entry)
    (trial,) = view["trials"]
    assert (trial["state"], trial["outcome"], trial["score"], trial["attempts"]) == (
        "policy_fault", "policy_fault", 0.0, 1,
    )  # fmt: skip
    assert "policy_gone" in trial["fault"]
    assert robot.stops
    assert (view["state"], view["score"]["value"], view["success"]["value"]) == ("done", 0.0, 0.0)


def test_a_policy_that_ends_with_the_word_of_a_stopping_server_has_lost_too(arena) -> None:
    entry = arena.submit()
    robot = Walker(steps=2000, seconds=0.005)
    headers = {"Authorization": f"Bearer {arena.tokens['ada']}"}
    address = f"{arena.url.replace('http', 'ws')}/v1/play"
    with connect(address, additional_headers=headers, proxy=None, compression=None) as policy:
        policy.send(wire.encode(wire.hello(META, entry, "raw")))
        thread = threading.Thread(target=lambda: work(arena, robot, max_trials=1))
        thread.start()
        while robot.steps < 4:
            message = wire.decode(policy.recv(timeout=15))
            if message["type"] == "obs":
                policy.send(wire.encode(wire.act(message["session"], message["seq"], np.ones((1, 1), np.float32))))
        policy.close(1012)
    thread.join(30)
    (trial,) = arena.status(entry)["trials"]
    assert (trial["state"], trial["score"], trial["attempts"]) == ("policy_fault", 0.0, 1)
    assert robot.stops


def test_only_the_time_of_the_database_matters(arena, monkeypatch) -> None:
    entry = arena.submit()
    told, real = [], time.time

    def jumping() -> float:
        """A clock that goes back by an hour each time that somebody looks at it."""
        told.append(real() - 3600 * len(told))
        return told[-1]

    robot = Walker(20, seconds=0.01)
    with dialled_in(arena, entry):
        robot.on_step = lambda step: monkeypatch.setattr(time, "time", jumping) if step == 2 else None
        assert work(arena, robot, max_trials=1).trials == {"done": 1}
    assert time.time() < real() - 3600
    (attempt,) = attempts(arena, entry)
    assert 0 <= attempt.ended - attempt.started < 60
    assert arena.status(entry)["state"] == "done"


def test_a_policy_that_answers_nan_is_named_with_its_step(arena) -> None:
    entry = arena.submit()

    def broken(state, images):
        return np.array([np.nan if state[1] >= 2 else 1.0], np.float32)

    with dialled_in(arena, entry, broken):
        assert work(arena, Walker(20), max_trials=1).trials == {"policy_fault": 1}
    (trial,) = arena.status(entry)["trials"]
    assert "nan" in trial["fault"]
    assert "step 4" in trial["fault"]


def test_a_policy_that_raises_or_sends_the_wrong_shape_loses_too(arena) -> None:
    for function, named in (
        (lambda state, images: 1 / 0, "ZeroDivisionError"),
        (lambda state, images: np.ones(3, np.float32), "shape"),
    ):
        entry = arena.submit()
        with dialled_in(arena, entry, function):
            assert work(arena, Walker(), max_trials=1).trials == {"policy_fault": 1}
        assert named in arena.status(entry)["trials"][0]["fault"]


def test_a_policy_for_another_robot_is_told_so_when_it_dials_in(arena) -> None:
    work(arena, Walker(), idle_exit=0.0)
    entry = arena.submit()
    other = PolicyMeta(
        name="boat",
        observation=ObservationSpec(state=(("sail", 3),)),
        action=ActionSpec(size=1, low=(0.0,), high=(1.0,)),
    )
    with dialled_in(arena, entry, meta=other) as lines:
        until(lambda: any("does_not_fit" in line and "'sail'" in line for line in lines))
    assert arena.status(entry)["trials"][0]["state"] == "queued"


def test_a_robot_that_fails_is_not_the_policys_loss(arena) -> None:
    entry = arena.submit()
    robot = Walker()

    def unplugged(step: int) -> None:
        if step == 2 and len(robot.resets) == 1:
            raise OSError("the cable")

    robot.on_step = unplugged
    with dialled_in(arena, entry):
        assert work(arena, robot, max_trials=2).trials == {"robot_fault": 1, "done": 1}
    (trial,) = arena.status(entry)["trials"]
    assert (trial["state"], trial["attempts"], trial["score"]) == ("done", 2, 1.0)
    assert robot.resets[0] == robot.resets[1]
    assert [(a.outcome, "cable" in a.reason) for a in attempts(arena, entry)] == [
        ("robot_fault", True),
        ("done", False),
    ]


def test_a_robot_that_needs_somebody_ends_its_worker_and_keeps_the_other_trials(arena) -> None:
    entry = arena.submit("root", kind="anchor", anchor="random", name="random", trials=2)
    robot, reset = Walker(), Walker.reset

    def nobody(scene, seed):
        raise NeedsHumanError("attendant", expected="a person", got="nobody", fix="see to the robot")

    robot.reset = nobody
    report = work(arena, robot)
    assert report.trials == {"needs_human": 1}
    assert report.needs_human == "attendant: expected a person, got nobody; see to the robot."
    states = {trial["state"]: trial["id"] for trial in arena.status(entry)["trials"]}
    assert set(states) == {"needs_human", "queued"}
    with arena.client("root") as client:
        client.request("POST", f"/v1/trials/{states['needs_human']}/requeue")
    robot.reset = lambda scene, seed: reset(robot, scene, seed)
    assert work(arena, robot, max_trials=2).trials == {"done": 2}


def test_the_anchor_random_is_made_by_the_worker(arena) -> None:
    entry = arena.submit("root", kind="anchor", anchor="random", name="random", trials=2)
    assert work(arena, Walker(), max_trials=2).trials == {"done": 2}
    assert arena.status(entry)["anchor"] == "random"
    assert arena.status(entry)["n"] == 2


def test_an_uploaded_checkpoint_is_played_by_the_worker(arena, tmp_path) -> None:
    network(tmp_path / "net.safetensors")
    with arena.client("ada") as client:
        entry = client.submit("reach", "net", checkpoint=tmp_path / "net.safetensors")["id"]
    assert work(arena, Walker(), max_trials=4).trials == {"done": 4}
    view = arena.status(entry)
    assert (view["state"], view["n"], view["kind"]) == ("done", 4, "checkpoint")
    assert math.isfinite(view["score"]["value"])


def test_cached_checkpoints_are_few_and_are_what_their_names_say(arena, tmp_path) -> None:
    cache = tmp_path / "cache"
    network(tmp_path / "net.safetensors")
    with arena.client("ada") as client:
        blob = client.upload(tmp_path / "net.safetensors")
        cache.mkdir()
        for name in (blob, *(str(i) * 64 for i in range(6))):
            (cache / f"{name}.safetensors").write_bytes(b"something else")
        body = {"benchmark": "reach", "name": "net", "kind": "checkpoint", "blob": blob, "trials": 1}
        client.request("POST", "/v1/submissions", json=body)
    assert work(arena, Walker(), max_trials=1, cache=cache).trials == {"done": 1}
    assert (cache / f"{blob}.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()
    assert len(list(cache.iterdir())) == worker.CACHED


def test_a_film_that_cannot_be_written_holds_nobody_up_and_is_said(tmp_path) -> None:
    (tmp_path / "none").write_text("a file, where a folder should be")
    film = Film(tmp_path / "none" / "film.mp4", 25.0, patient=True)
    for _ in range(500):
        film.add(np.zeros((32, 48, 3), np.uint8))
    with pytest.raises(OSError, match="film could not be written"):
        film.files()


def test_a_real_robot_does_not_wait_for_its_film(tmp_path, monkeypatch) -> None:
    go, taken = threading.Event(), []

    def slow(path, frames, rate) -> None:
        taken.append(next(frames))
        go.wait(30)
        taken.extend(frames)
        path.write_bytes(b"film")

    monkeypatch.setattr(recordings, "write_clip", slow)
    film = Film(tmp_path / "film.mp4", 25.0, patient=False)
    for _ in range(recordings.WAITING_FRAMES + 50):
        film.add(np.zeros((4, 4, 3), np.uint8))
    assert 0 < film.left_out <= 50
    go.set()
    assert [file.name for file in film.files()] == ["video-scene.mp4", "poster-scene.jpg"]
    assert len(taken) == recordings.WAITING_FRAMES + 50 - film.left_out


def test_a_stop_ends_the_trial_and_gives_it_back(arena) -> None:
    entry = arena.submit("root", kind="anchor", anchor="random")
    robot, stop = Walker(steps=5000, seconds=0.01), threading.Event()
    thread = threading.Thread(target=lambda: work(arena, robot, stop=stop))
    thread.start()
    until(lambda: robot.steps > 2)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert robot.stops
    (trial,) = arena.status(entry)["trials"]
    assert (trial["state"], trial["outcome"]) == ("queued", "robot_fault")
    assert "signal to stop" in trial["fault"]
    with arena.client("root") as client:
        client.cancel(entry)


@pytest.mark.faults
def test_an_operators_stop_reaches_a_robot_on_its_way_to_the_start(arena) -> None:
    entry = arena.submit("root", kind="anchor", anchor="random")
    moving, halted, seconds = threading.Event(), threading.Event(), []

    class Slow(Walker):
        def reset(self, scene, seed):
            moving.set()
            assert halted.wait(20), "nobody has stopped the robot"
            raise RobotError("arm", expected="an episode that runs", got=self.stops[0][1], fix="reset the robot")

        def stop(self, reason: str) -> None:
            super().stop(reason)
            halted.set()

    robot, stop = Slow(), threading.Event()
    thread = threading.Thread(target=lambda: work(arena, robot, name="slow-arm", stop=stop))
    thread.start()
    assert moving.wait(15)
    began = time.monotonic()
    with arena.client("root") as client:
        client.request("POST", "/v1/robots/slow-arm/stop")
        assert halted.wait(15)
        seconds.append(time.monotonic() - began)
        stop.set()
        thread.join(15)
        client.cancel(entry)
    assert robot.stops[0][1] == "a stop by its operator"
    assert seconds[0] < 4, "with the next heartbeat, and not when the watchdog's 10 s are over"


def test_a_lease_that_was_lost_stops_the_robot_and_drops_what_was_done(arena) -> None:
    entry = arena.submit("root", kind="anchor", anchor="random")
    robot, done = Walker(steps=5000, seconds=0.01), []
    thread = threading.Thread(target=lambda: done.append(work(arena, robot, max_trials=1)))
    thread.start()
    until(lambda: robot.steps > 2)
    with arena.database.write() as session:
        trial = session.scalars(select(Trial).where(Trial.submission_id == int(entry))).one()
        trials.end(session, trial.id, trial.fence, trials.Report(outcome="needs_human", reason="the operator looked"))
    thread.join(10)
    assert (done[0].trials, done[0].dropped) == ({}, 1)
    assert robot.stops
    assert arena.status(entry)["trials"][0]["state"] == "needs_human"


@pytest.mark.faults
@pytest.mark.parametrize("hangs", [False, True])
def test_without_answers_to_heartbeats_the_robot_stands_still_in_time(
    arena, tmp_path, monkeypatch, hangs: bool
) -> None:
    with running(tmp_path, watchdog_seconds=2.0) as own:
        own.submit("root", kind="anchor", anchor="random")
        silent, release, leased_when_stopped = threading.Event(), threading.Event(), []

        class Watched(Walker):
            def stop(self, reason: str) -> None:
                with own.database.read() as session:
                    live = select(Trial.id).where(Trial.state == "running", Trial.lease_until > now(session))
                    leased_when_stopped.append((session.scalar(live) is not None, self.steps))
                super().stop(reason)

        robot = Watched(steps=5000, seconds=0.01)
        ask = ArenaClient.ask

        def partitioned(self, method, path, **options):
            if silent.is_set():
                raise SubmissionError("arena", expected="an answer", got="a partition", fix="wait")
            return ask(self, method, path, **options)

        def step(number: int) -> None:
            if number == 5:
                silent.set()
                if hangs:
                    release.wait(10)

        robot.on_step = step
        monkeypatch.setattr(ArenaClient, "ask", partitioned)
        monkeypatch.setattr(worker, "REPORT_SECONDS", 0.5)
        thread = threading.Thread(target=lambda: work(own, robot, max_trials=1))
        thread.start()
        until(lambda: robot.stops)
        release.set()
        thread.join(20)
        # What matters: nobody else could have been given the trial yet, and the arm did not go on.
        leased, steps = leased_when_stopped[0]
        assert leased
        assert "heartbeat" in robot.stops[0][1]
        assert robot.steps <= steps + 1


def test_a_worker_without_the_right_token_is_told_so(arena) -> None:
    with pytest.raises(SubmissionError, match="scope 'worker'"):
        run_worker(arena.url, arena.tokens["ada"], "arm", robot=Walker(), idle_exit=5)
    with pytest.raises(SubmissionError, match="valid token"):
        run_worker(arena.url, "ob_x", "arm", robot=Walker(), idle_exit=5)


def test_a_worker_waits_for_an_arena_that_is_not_there() -> None:
    lines: list[str] = []
    report = run_worker("http://127.0.0.1:9", "t", "arm", robot=Walker(), idle_exit=0.3, on_event=lines.append)
    assert report.trials == {}
    assert any("no answer from http://127.0.0.1:9" in line for line in lines)


@pytest.mark.faults
@pytest.mark.parametrize("when", ["upload", "download"])
def test_a_store_that_is_full_or_away_pauses_the_trial_and_it_goes_on_by_itself(
    arena, tmp_path, monkeypatch, when: str
) -> None:
    watch = arena.app.state.arena.storage
    watch._looked, watch._trouble = math.inf, None
    entry = checkpointed(arena, tmp_path) if when == "download" else anchored(arena)
    opened, modes = LocalFileSystem.open, ("wb",) if when == "upload" else ("wb", "rb")

    def away(self, name, mode="rb", **options):
        if mode in modes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, name, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "open", away)
        robot, stop = Walker(), threading.Event()

        def listen(line: str) -> None:
            if "needs storage" in line:
                stop.set()

        assert work(arena, robot, stop=stop, on_event=listen, idle_exit=20.0).trials == {"needs_storage": 1}
        assert "full or away" in arena.status(entry)["state_words"]
        assert robot.stops
        # While there is no room no other trial is given to a robot.
        watch._looked = -math.inf
        said: list[str] = []
        assert work(arena, robot, max_trials=1, on_event=said.append).trials == {}
        assert any("storage" in line or "room" in line for line in said)
    watch._looked = -math.inf
    assert work(arena, Walker(), max_trials=1, idle_exit=20.0).trials == {"done": 1}
    log = " ".join(line["text"] for line in arena.status(entry)["log"])
    assert "goes on: there is room for recordings" in log


def test_a_store_that_takes_nothing_three_times_over_is_left_to_the_operator(arena, monkeypatch) -> None:
    watch = arena.app.state.arena.storage
    watch._looked, watch._trouble = math.inf, None
    entry = anchored(arena)
    ask, full = ArenaClient.ask, (507, {"detail": "No space left on device"})
    monkeypatch.setattr(
        ArenaClient, "ask", lambda self, how, *a, **o: full if how == "PUT" else ask(self, how, *a, **o)
    )
    assert work(arena, Walker(), max_trials=3, idle_exit=20.0).trials == {"needs_storage": 3}
    monkeypatch.setattr(ArenaClient, "ask", ask)
    assert work(arena, Walker(), idle_exit=1.0).trials == {}
    trial = arena.status(entry)["trials"][0]["id"]
    with arena.client("root") as client:
        client.request("POST", f"/v1/trials/{trial}/requeue")
    assert work(arena, Walker(), max_trials=1).trials == {"done": 1}


def test_a_result_that_cannot_be_made_is_one_trials_trouble_and_not_the_workers_end(arena, monkeypatch) -> None:
    entry = arena.submit("root", kind="anchor", anchor="random", name="random", trials=2)
    made = worker.recordings_of
    broken = iter([True])

    def once_full(*args, **options):
        if next(broken, False):
            raise OSError("no film today")
        return made(*args, **options)

    monkeypatch.setattr(worker, "recordings_of", once_full)
    said: list[str] = []
    work(arena, Walker(), max_trials=3, on_event=said.append)
    view = arena.status(entry)
    assert (view["state"], view["n"]) == ("done", 2)
    assert sorted(attempt.outcome for attempt in attempts(arena, entry)) == ["done", "done", "robot_fault"]
    assert any("could not be reported: no film today" in line for line in said)
