"""Kills workers (and, if asked, the server) while trials run, and checks what the arena promised.

The promise: no accepted trial is lost, each has exactly one result, it is attempted again only after an attempt
recorded as a robot's fault, no robot ever holds two live trials, and no arm moves without an attempt in the log. The
robots keep a journal of their own of every reset and every step, which is compared with the arena's log at the end. A
worker that was killed is replaced by one beside the same robot, which must wait until the lease of the former ran out.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offbook.runs.benchmark import Options
from offbook.runs.ledger import Claim, Metric

ROBOT = "gym:Pendulum-v1"
STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What happens to an arena.

    Attributes:
        trials: how many in all, ten to a submission.
        workers: worker processes at any time.
        kill_every: seconds between two kills of a worker.
        kills: most kills of workers.
        pause: seconds for which one worker is stopped and woken again; 0 for none.
        server_kills: how often the server is killed and started again.
        lease_seconds: the arena's lease.
        watchdog_seconds: the workers' watchdog.
        fault_cap: robot faults of one trial after which it would wait for a person, of whom there is none here: about
            one run in ten kills the same trial three times, which is an arena's usual cap.
        step_seconds: time that the robot takes for each of its 20 steps.
        deadline: seconds after which the run is given up.
        seed: of who is killed when.
    """

    trials: int = 200
    workers: int = 4
    kill_every: float = 3.0
    kills: int = 1000
    pause: float = 30.0
    server_kills: int = 1
    lease_seconds: float = 15.0
    watchdog_seconds: float = 2.0
    fault_cap: int = 8
    step_seconds: float = 0.02
    deadline: float = 600.0
    seed: int = 0


@dataclass(kw_only=True)
class History:
    """What was done and what came of it."""

    seconds: float = 0.0
    killed_workers: int = 0
    killed_servers: int = 0
    states: Counter[str] = field(default_factory=Counter)
    results: int = 0
    attempts: int = 0
    faults: int = 0
    violations: list[str] = field(default_factory=list)


def run(options: Options) -> list[Claim]:
    """The acceptance run: 200 trials, four workers, one killed every three seconds, one asleep for half a minute."""
    plan = Plan(seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="offbook-soak-") as folder:
        history = soak(Path(folder), plan)
    met = not history.violations and history.results == plan.trials
    # What happened on the way is no figure to come again: chance decides which workers are killed.
    way = (
        f"{history.attempts} attempts, {history.faults} robot faults, {history.killed_workers} workers and "
        f"{history.killed_servers} servers killed"
    )
    return [
        Claim(
            system="arena",
            claim="200 trials on 4 workers, one killed every 3 s, one asleep for 30 s, the server killed once: each "
            "trial has one result and each further attempt follows a recorded robot fault",
            metrics=(
                Metric(name="results", value=history.results, higher_is_better=True),
                Metric(name="broken promises", value=len(history.violations), higher_is_better=False),
                Metric(name="duration", value=history.seconds, unit="s", higher_is_better=False),
            ),
            seeds=(options.seed,),
            verdict="met" if met else "missed",
            config=asdict(plan),
            note="; ".join([way, f"with a cap of {plan.fault_cap} faults of a trial", *history.violations[:5]]),
        )
    ]


def soak(folder: Path, plan: Plan) -> History:
    """Carries out a plan in an empty folder."""
    url, token = _found(folder / "arena", plan)
    journal = folder / "journal"
    journal.mkdir()
    history, began = History(), time.monotonic()
    server = _serve(folder / "arena", url)
    nursery = _Nursery(url, token, journal, plan.step_seconds)
    accidents = random.Random(plan.seed)
    try:
        for arm in range(plan.workers):
            nursery.start(arm)
        done_before: dict[int, Any] = {}
        next_kill, paused = time.monotonic() + plan.kill_every, plan.pause <= 0
        while time.monotonic() - began < plan.deadline:
            time.sleep(0.2)
            done = _results(folder / "arena")
            for trial, result in done_before.items():
                if done.get(trial) != result:
                    history.violations.append(f"the committed result of trial {trial} changed")
            done_before = done
            if len(done) == plan.trials:
                break
            if time.monotonic() > next_kill and history.killed_workers < plan.kills:
                next_kill = time.monotonic() + plan.kill_every
                arm = accidents.choice(nursery.awake())
                nursery.kill(arm)
                history.killed_workers += 1
                nursery.start(arm)
            if not paused and history.killed_workers >= 2:
                paused = True
                nursery.pause(accidents.choice(nursery.awake()), plan.pause)
            if history.killed_servers < plan.server_kills and len(done) > plan.trials / 3:
                server.kill()
                server.wait()
                history.killed_servers += 1
                server = _serve(folder / "arena", url)
        history.seconds = time.monotonic() - began
    finally:
        nursery.close()
        server.terminate()
        server.wait(30)
    _judge(folder / "arena", journal, plan, history)
    _judge_motions(journal, nursery.woken, history)
    return history


def _found(folder: Path, plan: Plan) -> tuple[str, str]:
    """An arena with all its submissions in place; returns its address-to-be and a worker's token."""
    import socket

    from offbook.arena import accounts, submissions
    from offbook.arena.accounts import Principal
    from offbook.arena.database import Database
    from offbook.arena.service import Settings

    settings = Settings(
        folder=folder,
        lease_seconds=plan.lease_seconds,
        watchdog_seconds=plan.watchdog_seconds,
        fault_cap=plan.fault_cap,
    )
    settings.save()
    database = Database(settings.database_url)
    database.migrate()
    sizes = [min(10, plan.trials - first) for first in range(0, plan.trials, 10)]
    with database.write() as session:
        submissions.define_benchmark(
            session,
            submissions.BenchmarkSpec(
                name="swing",
                title="Swing",
                task="swing",
                metric="return",
                robot_class=ROBOT,
                splits={"all": [{"scene": {}, "seed": seed} for seed in range(10)]},
                daily_trials=10**6,
                trial_seconds=1.0,
            ),
        )
        for i, size in enumerate(sizes):
            user = accounts.find_user(session, f"user-{i % 3}", create=True)
            user.daily_trials = 10**6
            who = Principal(user_id=user.id, user=user.name, token_id=0, prefix="", scopes=frozenset({"admin"}))
            request = submissions.Request(
                benchmark="swing", name=f"entry-{i}", kind="anchor", anchor="random", trials=size
            )
            submissions.accept(session, who, request)
        lab = accounts.find_user(session, "lab", create=True)
        token = accounts.issue_token(session, lab, ["worker"], days=1)
    database.close()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}", token


def _serve(folder: Path, url: str) -> subprocess.Popen[bytes]:
    program = "from offbook.cli.main import main; raise SystemExit(main())"
    port = url.rsplit(":", 1)[1]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, "arena", "serve", str(folder), "--port", port], stdout=log, stderr=log
        )
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=1):
                return process
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
        if process.poll() is not None:
            break
    process.kill()
    raise RuntimeError(f"the arena did not start; see {folder / 'server.log'}")


class _Nursery:
    """A process that has imported everything and forks a worker when told: a killed one is replaced within moments."""

    def __init__(self, url: str, token: str, journal: Path, step_seconds: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, url, str(journal), str(step_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OFFBOOK_TOKEN": token, "OMP_NUM_THREADS": "1"},
        )
        self._handles: dict[int, int] = {}
        self._pids: dict[int, int] = {}
        self._waking: list[threading.Timer] = []
        self.woken: list[tuple[int, float]] = []

    def start(self, arm: int) -> None:
        """Adds a worker beside an arm."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the nursery has no pipes")
        stdin.write(f"arm-{arm}\n".encode())
        stdin.flush()
        self._pids[arm] = int(stdout.readline())
        # A handle, not a number: numbers of the dead are given to others.
        self._handles[arm] = os.pidfd_open(self._pids[arm])

    def awake(self) -> list[int]:
        """The arms whose workers run."""
        return sorted(self._handles)

    def kill(self, arm: int) -> None:
        """Ends a worker without a word."""
        handle = self._handles.pop(arm)
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)

    def pause(self, arm: int, seconds: float) -> None:
        """Stops a worker for a while; it stays out of reach of `kill`."""
        handle = self._handles.pop(arm)
        signal.pidfd_send_signal(handle, signal.SIGSTOP)

        def wake() -> None:
            self.woken.append((self._pids[arm], time.time()))
            signal.pidfd_send_signal(handle, signal.SIGCONT)
            self._handles[arm] = handle

        timer = threading.Timer(seconds, wake)
        timer.daemon = True
        timer.start()
        self._waking.append(timer)

    def close(self) -> None:
        """Ends all."""
        for timer in self._waking:
            timer.join()
        for arm in self.awake():
            self.kill(arm)
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process.wait(30)


def _database(folder: Path) -> Any:
    from offbook.arena.database import Database
    from offbook.arena.service import Settings

    return Database(Settings.load(folder).database_url)


def _results(folder: Path) -> dict[int, tuple[float, int]]:
    from sqlalchemy import select

    from offbook.arena.tables import Result

    database = _database(folder)
    with database.read() as session:
        found = {row.trial_id: (row.score, row.attempt) for row in session.scalars(select(Result))}
    database.close()
    return found


def _judge(folder: Path, journal: Path, plan: Plan, history: History) -> None:
    """Compares the arena's tables with one another and with the robots' own journals."""
    from sqlalchemy import select

    from offbook.arena.service import Settings
    from offbook.arena.tables import Attempt, Event, Result, Trial, Worker
    from offbook.arena.verify import verify_store
    from offbook.service.storage import BlobStore

    database = _database(folder)
    stored = verify_store(database, BlobStore(Settings.load(folder).blobs_url))
    with database.read() as session:
        told = session.execute(select(Event.kind, Event.trial_id, Event.robot_id).order_by(Event.id)).all()
        trials = {trial.id: trial for trial in session.scalars(select(Trial))}
        results = session.scalars(select(Result)).all()
        attempts = session.execute(
            select(Attempt, Worker.name)
            .join(Worker, Worker.id == Attempt.worker_id)
            .order_by(Attempt.trial_id, Attempt.n)
        ).all()
    database.close()
    history.states = Counter(trial.state for trial in trials.values())
    history.results, history.attempts = len(results), len(attempts)
    history.faults = sum(attempt.outcome == "robot_fault" for attempt, _ in attempts)
    say = history.violations.append
    if len(trials) != plan.trials:
        say(f"{plan.trials} trials were accepted, {len(trials)} are known")
    if len({result.trial_id for result in results}) != len(results):
        say("a trial has two results")
    by_trial: dict[int, list[Any]] = {}
    for attempt, _ in attempts:
        by_trial.setdefault(attempt.trial_id, []).append(attempt)
    for entry, log in by_trial.items():
        if [attempt.n for attempt in log] != list(range(1, trials[entry].attempt + 1)):
            say(f"an attempt at trial {entry} is not in the log")
        if not {attempt.outcome for attempt in log[:-1]} <= {"robot_fault", "released"}:
            say(f"trial {entry} was attempted again after {[attempt.outcome for attempt in log[:-1]]}")
        for former, latter in itertools.pairwise(log):
            if former.ended is None or latter.leased < former.ended:
                say(f"two attempts at trial {entry} overlap")
    if not stored.sound:
        say(f"the store lacks {stored.missing + stored.dangling}, and of what it has {stored.damaged} are damaged")
    live: dict[int, int] = {}
    for kind, entry, robot in told:
        if kind == "leased" and live.setdefault(robot, entry) != entry:
            say(f"robot {robot} was given trial {entry} while trial {live[robot]} was live on it")
        elif kind in ("done", "policy_fault", "robot_fault", "released") and live.pop(robot, entry) != entry:
            say(f"trial {entry} ended on robot {robot}, where another one was live")
    logged = Counter((name, trials[attempt.trial_id].seed) for attempt, name in attempts)
    moved: Counter[tuple[str, int]] = Counter()
    for path in journal.iterdir():
        for motion in _motions(path):
            moved[path.name, motion["seed"]] += motion["step"] == 0
    for (name, seed), count in (moved - logged).items():
        say(f"{name} moved {count} times more for seed {seed} than its log says")


def _motions(path: Path) -> list[dict[str, Any]]:
    """A journal's lines; the last one may be cut short by a kill."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def _judge_motions(journal: Path, woken: Sequence[tuple[int, float]], history: History) -> None:
    """Of an arm one process after the other moves, and one that was woken makes no more than the step it was in."""
    for path in journal.iterdir():
        motions = _motions(path)
        runs = [process for process, _ in itertools.groupby(motions, key=lambda motion: motion["process"])]
        if len(set(runs)) != len(runs):
            history.violations.append(f"two processes moved {path.name} by turns")
        for process, awake in woken:
            own = [motion for motion in motions if motion["process"] == process]
            before = [motion for motion in own if motion["time"] < awake]
            after = list(itertools.takewhile(lambda m: m["step"] > 0, (m for m in own if m["time"] >= awake)))
            if before and len(after) > 1:
                history.violations.append(f"{path.name} made {len(after)} steps for a lease that it had slept through")


def _work(name: str, url: str, journal: Path, step_seconds: float) -> None:
    """One worker with a light robot that writes down each reset and step before it moves."""
    from offbook.arena.worker import run_worker
    from offbook.robots.gym import GymRobot

    class Journalled(GymRobot):
        def reset(self, scene: Any, seed: int) -> Any:
            self._seed, self._count = seed, 0
            self._write()
            return super().reset(scene, seed)

        def _write(self) -> None:
            line = {"seed": self._seed, "step": self._count, "time": time.time(), "process": os.getpid()}
            with (journal / name).open("a") as file:
                file.write(json.dumps(line) + "\n")

        def act(self, action: Any) -> Any:
            time.sleep(step_seconds)
            self._count += 1
            self._write()
            result = super().act(action)
            self._over = self._over or self._steps >= STEPS
            return result if not self._over else type(result)(applied=result.applied, reward=result.reward, done=True)

        def frame(self) -> None:
            return None

    robot = Journalled(ROBOT, max_steps=STEPS)
    run_worker(url, os.environ["OFFBOOK_TOKEN"], ROBOT, name=name, robot=robot)


def _nurse(words: Sequence[str]) -> None:
    """Forks a worker for each name on stdin; the forks share the imports."""
    import offbook.arena.worker
    import offbook.robots.gym
    import offbook.robots.trial
    import offbook.sim.experts  # noqa: F401

    url, journal, step_seconds = words[0], Path(words[1]), float(words[2])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                # Its own streams: the nurse answers on stdout.
                os.dup2(os.open(os.devnull, os.O_RDWR), 0)
                os.dup2(2, 1)
                _work(line.strip(), url, journal, step_seconds)
                status = 0
            finally:
                os._exit(status)
        print(child, flush=True)


if __name__ == "__main__":
    _nurse(sys.argv[1:])
