"""The process beside a robot: it dials out, plays one trial after another, and stops the arm when in doubt.

While it holds a lease a thread sends heartbeats. When none has been answered for most of the watchdog's time, the
control loop stops the robot; when the loop itself hangs, the thread does. The arena waits longer than that before it
gives the trial to another robot, so that at no time two arms play one trial.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offbook.arena.live import LiveCamera
from offbook.arena.recordings import Film, capabilities, recordings_of
from offbook.arena.sandbox import SandboxedPolicy, prove
from offbook.client.protocol import Policy
from offbook.client.remote import RemotePolicy
from offbook.client.submit import ArenaClient, ArenaRefusalError
from offbook.errors import MissingExtraError, OffbookError, PolicyError, RobotError, SubmissionError, needs_extra

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from offbook.robots.base import Robot
    from offbook.robots.trial import TrialRecord

BEAT_SECONDS = 0.5
REPORT_SECONDS = 60.0
HUNG_SECONDS = 1800.0  # longest that one call of a driver may take; people arrange scenes and judge in some
FRAME_EVERY = 2  # control steps from one picture of the film to the next
CACHED = 4  # checkpoints that stay in the cache's folder
NO_STORAGE = (503, 507)  # what an arena answers whose store is away or full
_POLL_FIRST, _POLL_MOST = 0.2, 2.0


class _StaleLeaseError(Exception):
    """The arena has given the trial up or to another: nothing that we know of it counts."""


@dataclass(kw_only=True)
class WorkerReport:
    """What a worker did in its life.

    Attributes:
        trials: reports that the arena took, by outcome.
        dropped: attempts whose lease was lost.
        needs_human: why it ended before its time: what somebody has to do beside the robot.
    """

    trials: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    needs_human: str = ""


class _Heart:
    """Heartbeats for one lease, in a thread of their own.

    Args:
        arena: where they go.
        lease: whose.
        robot: what is stopped when no answer comes and the control loop does not see to it.
    """

    def __init__(self, arena: ArenaClient, lease: Mapping[str, Any], robot: Robot, stopping: threading.Event) -> None:
        self._arena, self._lease, self._robot, self._stopping = arena, lease, robot, stopping
        self.camera = LiveCamera(arena, lease)
        self._watchdog = float(lease["watchdog_seconds"])
        self._answered = self._beaten = time.monotonic()
        self._progress = 0.0
        self._resting = threading.Event()
        self._ended = threading.Event()
        self.stale = self.stopped = False
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._send, self._watch)]
        for thread in self._threads:
            thread.start()

    def beat(self, progress: float) -> None:
        """Called by the control loop at each step; raises when the robot must stop."""
        self._progress, self._beaten = min(1.0, max(0.0, progress)), time.monotonic()
        if self._stopping.is_set():
            raise RobotError("worker", expected="to go on", got="a signal to stop", fix="start it again")
        self.check()

    def check(self) -> None:
        """Raises when the lease is lost, or may be."""
        if self.stopped:
            raise RobotError("robot", expected="to go on", got="a stop by its operator", fix="wait for the operator")
        if self.stale:
            raise RobotError("lease", expected="a live lease", got="another holder", fix="ask for a new one")
        silent = time.monotonic() - self._answered
        if silent > 0.65 * self._watchdog:
            fix = "check the network between the worker and the arena"
            raise RobotError("arena", expected="an answer to heartbeats", got=f"none for {silent:.1f} s", fix=fix)

    def rest(self) -> None:
        """The control loop has ended and the robot stands still; heartbeats go on until `end`."""
        self._resting.set()

    def end(self) -> None:
        """No more heartbeats."""
        self._resting.set()
        self._ended.set()
        self.camera.end()
        for thread in self._threads:
            thread.join(self._watchdog)

    def _send(self) -> None:
        path = f"/v1/trials/{self._lease['trial']}/heartbeat"
        while not self._ended.wait(min(BEAT_SECONDS, self._watchdog / 4)):
            asked = time.monotonic()
            if asked - self._beaten > HUNG_SECONDS and not self._resting.is_set():
                return  # silence stops the robot, here, and ends the lease, there
            try:
                body = {"fence": self._lease["fence"], "progress": self._progress}
                status, answer = self._arena.ask("POST", path, json=body, timeout=self._watchdog / 2)
            except SubmissionError:
                continue
            if status == 200:
                # From when it was asked: the answer may have been on its way while this process slept.
                self._answered = asked
                if answer is not None and answer.get("watched"):
                    self.camera.watched()
            elif answer is not None and answer.get("error") == "robot_stopped":
                self.stopped = True
                self._stop("a stop by its operator")  # the loop may wait for an arm on its way to the start
            elif status in (404, 409):
                self.stale = True

    def _watch(self) -> None:
        """The last resort: the loop that should have stopped the robot hangs in its driver or in a policy."""
        while not self._resting.wait(self._watchdog / 20):
            if time.monotonic() - self._answered > 0.9 * self._watchdog:
                self._stop("no answer from the arena to heartbeats")

    def _stop(self, reason: str) -> None:
        """Stops the robot unless it stands still; said again and again, for a driver may have begun a motion since."""
        if not self._resting.is_set():
            with contextlib.suppress(Exception):  # whatever a driver raises here, nothing more can be done
                self._robot.stop(reason)


def run_worker(
    url: str,
    token: str,
    robot_name: str,
    *,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
    max_trials: int | None = None,
    idle_exit: float | None = None,
    cache: Path | None = None,
    on_event: Callable[[str], None] = lambda line: None,
    stop: threading.Event | None = None,
    robot: Robot | None = None,
    sandbox: bool = False,
) -> WorkerReport:
    """Lends a robot to an arena until it is told to stop. In the main thread SIGTERM and SIGINT stop it cleanly.

    It also ends when the robot needs somebody: the trials that wait would only fail one after another.

    Args:
        url: the arena, such as `http://127.0.0.1:8000`.
        token: bearer token with the scope `worker`.
        robot_name: as `robots.make_robot` takes it; also its class in the arena's benchmarks.
        settings: of the robot, for `robots.make_robot`.
        name: of this worker and its robot on the arena's pages; host and process by default.
        max_trials: return after so many trials.
        idle_exit: return after so many seconds without work.
        cache: folder for downloaded checkpoints; a temporary one by default.
        on_event: called with one line for each thing that happens.
        stop: set it from another thread to stop.
        robot: a driver to use instead of making one.
        sandbox: whether checkpoints are played in a sandbox, which must prove itself first.

    Raises:
        SubmissionError: the arena refuses this worker.
        ConfigError: there is no such robot, or the sandbox does not hold.
    """
    from offbook.robots import make_robot

    if sandbox:
        prove()

    stopping = stop or threading.Event()
    machine = robot or make_robot(robot_name, settings)
    arena = ArenaClient(url, token)
    name = name or f"{socket.gethostname().split('.')[0][:40]}-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="offbook-worker-") as folder, _signals(stopping):
        worker = _Worker(
            arena=arena,
            robot=machine,
            robot_name=robot_name,
            name=name,
            cache=cache or Path(folder),
            scratch=Path(folder),
            say=on_event,
            stopping=stopping,
            sandbox=sandbox,
        )
        worker.cache.mkdir(parents=True, exist_ok=True)
        try:
            return worker.run(max_trials, idle_exit)
        finally:
            machine.stop("the worker ends")
            worker.forget()
            if robot is None:
                machine.close()
            arena.close()


@contextlib.contextmanager
def _signals(stopping: threading.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    former = [signal.signal(number, lambda *_: stopping.set()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, former, strict=True):
            signal.signal(number, handler)


@dataclass(kw_only=True)
class _Worker:
    arena: ArenaClient
    robot: Robot
    robot_name: str
    name: str
    cache: Path
    scratch: Path
    say: Callable[[str], None]
    stopping: threading.Event
    sandbox: bool
    instance: str = field(default_factory=lambda: secrets.token_hex(8))
    report: WorkerReport = field(default_factory=WorkerReport)
    known: dict[str, Policy] = field(default_factory=dict)

    def run(self, max_trials: int | None, idle_exit: float | None) -> WorkerReport:
        """Asks for trials and plays them."""
        self.say(f"{self.name}: robot {self.robot_name} is ready for {self.arena.url}")
        pause, idle_since, played = _POLL_FIRST, time.monotonic(), 0
        while not self._ends() and (max_trials is None or played < max_trials):
            lease = self._ask()
            if lease is not None:
                played += self._play(lease)
                pause, idle_since = _POLL_FIRST, time.monotonic()
                continue
            if idle_exit is not None and time.monotonic() - idle_since > idle_exit:
                break
            self.stopping.wait(pause)
            pause = min(2 * pause, _POLL_MOST)
        done = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.report.trials.items())) or "no trials"
        self.say(f"{self.name}: ends after {done}")
        return self.report

    def _ends(self) -> bool:
        return self.stopping.is_set() or bool(self.report.needs_human)

    def _ask(self) -> dict[str, Any] | None:
        body = {
            "robot": self.robot_name,
            "worker": self.name,
            "instance": self.instance,
            "capabilities": capabilities(self.robot.spec),
        }
        try:
            status, answer = self.arena.ask("POST", "/v1/leases", json=body)
        except SubmissionError as error:
            self.say(f"{self.name}: no answer from {self.arena.url} ({error.got}): trying again")
            return None
        if status == 200:
            return answer
        said = answer or {}
        if status in (401, 403, 404, 422) or said.get("error") in ("robot_class", "robot_taken"):
            raise self.arena.refusal("POST", "/v1/leases", status, answer)
        if status != 204:
            self.say(f"{self.name}: {said.get('detail', f'HTTP status {status}')}")
        return None

    def _play(self, lease: Mapping[str, Any]) -> int:
        """One leased trial from its policy to its report; 1 when it was played, 0 when it was given back."""
        self.say(f"{self.name}: trial {lease['trial']}, attempt {lease['attempt']} ({lease['blind_label']})")
        heart = _Heart(self.arena, lease, self.robot, self.stopping)
        policy: Policy | None = None
        spec = self.robot.spec
        film = Film(self.scratch / "film.mp4", spec.rate_hz / FRAME_EVERY, patient=spec.simulated)
        try:
            try:
                policy = self._policy(lease)
                self._send(lease, "start", {})
            except OffbookError as error:
                # A relay that does not open has shown the policy nothing: no harm in trying another time.
                kind = "released" if isinstance(error, PolicyError | RobotError | MissingExtraError) else "robot_fault"
                if isinstance(error, ArenaRefusalError) and error.status in NO_STORAGE:
                    kind = "needs_storage"
                # The reason is public; with the hash anybody could submit the checkpoint.
                reason = _line(error).replace(lease["policy"].get("sha256") or "\0", "CHECKPOINT")
                self._end(lease, "fault", {"kind": kind, "reason": reason})
                if isinstance(error, MissingExtraError):
                    raise
                self.stopping.wait(1.0)
                return 0
            record = self._trial(lease, policy, heart, film)
            heart.rest()
            if isinstance(policy, RemotePolicy):
                policy.close(record.outcome)
            self._deliver(lease, record, film)
        except MissingExtraError:
            raise  # the next policy of the kind would fare the same
        except (OffbookError, OSError) as error:
            # One trial's trouble is not the worker's end; what concerns every trial, the next lease will say.
            self.say(f"{self.name}: trial {lease['trial']} could not be reported: {_line(error)}")
            with contextlib.suppress(OffbookError, OSError, _StaleLeaseError):
                self._end(lease, "fault", {"kind": "robot_fault", "reason": "its result could not be reported"})
            self.stopping.wait(1.0)
        except _StaleLeaseError:
            self.report.dropped += 1
            self.say(f"{self.name}: the lease of trial {lease['trial']} is gone; what was done is dropped")
        finally:
            heart.end()
            film.close()
            film.path.unlink(missing_ok=True)
            if isinstance(policy, RemotePolicy):
                policy.close()
        return 1

    def _trial(self, lease: Mapping[str, Any], policy: Policy, heart: _Heart, film: Film) -> TrialRecord:
        from offbook.robots.trial import run_trial

        def show(frame: NDArray[np.uint8]) -> None:
            film.add(frame)
            heart.camera.show(frame)

        return run_trial(
            self.robot,
            policy,
            lease["scene"] or None,
            lease["seed"],
            sync=self.robot.spec.simulated,
            # Neither scene nor seed can be read from it, and it is the same when the trial is attempted again. Anchors
            # are our own, and an expert of a hidden task knows it by the seed.
            session=str(lease["seed"]) if lease["policy"]["kind"] == "anchor" else f"trial-{lease['trial']}",
            prompt=lease["prompt"],
            frame_every=FRAME_EVERY,
            heartbeat=heart.beat,
            on_frame=show,
        )

    def _policy(self, lease: Mapping[str, Any]) -> Policy:
        wanted = lease["policy"]
        if wanted["kind"] == "remote":
            # The policy may have dialled in to another of the arena's servers, which relays for it.
            relay = str(wanted.get("relay", self.arena.url))
            return RemotePolicy(relay, self.arena.token, f"{lease['trial']}.{lease['fence']}")
        if wanted["kind"] == "anchor":
            from offbook.robots import environment_of
            from offbook.sim.experts import RandomPolicy, make_expert

            if wanted["anchor"] == "random":
                return RandomPolicy(self.robot.spec.action, lease["seed"])
            return make_expert(environment_of(self.robot.spec.name))
        sha256 = str(wanted["sha256"])
        if any(isinstance(policy, SandboxedPolicy) and not policy.alive for policy in self.known.values()):
            self.forget()
        if sha256 not in self.known:
            with needs_extra("models"):
                from offbook.learning.policies import load_policy
            path = self.cache / f"{sha256}.safetensors"
            if not path.exists() or not _holds(path, sha256):
                self.arena.download(sha256, path)
            path.touch()
            for old in sorted(self.cache.glob("*.safetensors"), key=lambda each: each.stat().st_mtime)[:-CACHED]:
                old.unlink(missing_ok=True)
            self.forget()  # one at a time: a robot's computer need not hold every policy it ever played
            self.known[sha256] = SandboxedPolicy(path) if self.sandbox else load_policy(path)
        return self.known[sha256]

    def forget(self) -> None:
        """Lets go of the checkpoints that were loaded."""
        for policy in self.known.values():
            if isinstance(policy, SandboxedPolicy):
                policy.close()
        self.known.clear()

    def _deliver(self, lease: Mapping[str, Any], record: TrialRecord, film: Film) -> None:
        """Encodes and uploads what was recorded, then reports; a robot's fault is reported without files."""
        if record.outcome in ("robot_fault", "needs_human"):
            self.report.needs_human = record.reason if record.outcome == "needs_human" else ""
            self._end(lease, "fault", {"kind": record.outcome, "reason": record.reason[:2000], "steps": record.steps})
            return
        files = recordings_of(record, self.robot.spec, film)
        for file in files:
            path, kind = f"/v1/blobs/{file.reference['sha256']}", {"Content-Type": file.media_type}
            status, answer = self._insist("PUT", path, content=file.content, headers=kind)
            if status == 507:
                reason = (answer or {}).get("detail", "no room")
                self._end(lease, "fault", {"kind": "needs_storage", "reason": reason})
                return
            if status != 201:
                raise self.arena.refusal("PUT", path, status, answer)
        latencies = sorted(value for value in record.latency_ms.tolist() if value == value)
        body: dict[str, Any] = {
            "steps": record.steps,
            "latency_ms": latencies[len(latencies) // 2] if latencies else None,
            "late_share": record.late_share,
            "files": [file.reference for file in files],
        }
        if record.outcome == "done":
            body |= {"score": record.score.value, "success": record.score.success}
            self._end(lease, "result", body)
        else:
            self._end(lease, "fault", body | {"kind": "policy_fault", "reason": record.reason})

    def _end(self, lease: Mapping[str, Any], what: str, body: Mapping[str, Any]) -> None:
        """Reports the end of an attempt; the arena answers a repetition as it did the first time."""
        answer = self._send(lease, what, body)
        outcome = str(body.get("kind", "done"))
        self.report.trials[outcome] = self.report.trials.get(outcome, 0) + 1
        because = f" ({body['reason']})" if body.get("reason") else ""
        self.say(f"{self.name}: trial {lease['trial']} {outcome.replace('_', ' ')}{because}, now {answer.get('state')}")

    def _send(self, lease: Mapping[str, Any], what: str, body: Mapping[str, Any]) -> dict[str, Any]:
        path, message = f"/v1/trials/{lease['trial']}/{what}", {"fence": lease["fence"], **body}
        status, answer = (self.arena.ask if what == "start" else self._insist)("POST", path, json=message)
        if status in (404, 409):
            raise _StaleLeaseError
        if status != 200 or answer is None:
            raise self.arena.refusal("POST", path, status, answer)
        return answer

    def _insist(self, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any] | None]:
        """Repeats a request that got no answer or a server's error, as long as it can still matter."""
        begin, pause = time.monotonic(), 0.2
        while True:
            try:
                status, answer = self.arena.ask(method, path, **options)
                if status < 500 or status == 507:
                    return status, answer
                got = f"HTTP status {status}"
            except SubmissionError as error:
                got = error.got
            # One that was told to stop does not keep its operator waiting.
            patience = 2.0 if self.stopping.is_set() else REPORT_SECONDS
            if time.monotonic() - begin > patience:
                self.say(f"{self.name}: {got} for {patience:g} s: this attempt is given up")
                raise _StaleLeaseError
            time.sleep(pause)
            pause = min(2 * pause, 2.0)


def _holds(path: Path, sha256: str) -> bool:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:1000] if str(error) else type(error).__name__
