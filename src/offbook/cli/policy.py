"""`offbook policy serve`, `bridge` and `check`: a policy that plays for an arena, and its dry run at home."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from offbook.cli.access import URL, read_settings, read_token
from offbook.cli.report import Report, table
from offbook.client.protocol import Policy
from offbook.errors import ConfigError, OffbookError, needs_extra
from offbook.runs.checkpoint import read_header

if TYPE_CHECKING:
    from offbook.robots.base import Robot

_POLICIES = "a run folder or checkpoint, perhaps with :ROLE or ::TARGET, expert, expert:GRADE, random, or MODULE:NAME"


def serve(
    target: tyro.conf.Positional[str],
    *,
    url: str = URL,
    submission: str,
    token_file: Path | None = None,
    task: str | None = None,
    images: Literal["raw", "jpeg", "png"] | None = None,
    seed: int = 0,
    once: bool = False,
) -> Report:
    """Lets a policy dial out to an arena and play the trials of one submission, until that is finished.

    Nothing has to be reachable from outside. A lost connection is dialled again. Ctrl-C stops; trials that are running
    then count as left by the policy. The token (scope submit) comes from OFFBOOK_TOKEN.

    Args:
        target: run folder or checkpoint, with :ROLE or :ROLE:TARGET behind it for a model of many roles, or ::TARGET
            for another return to aim at, see offbook evaluate; expert or expert:GRADE, random, or MODULE:NAME, a policy
            of your own: an object with meta, reset and infer, or a function without arguments that makes one.
        url: address of the arena.
        submission: id that the arena gave to the submission.
        token_file: file that holds the token, instead of OFFBOOK_TOKEN.
        task: robot or environment, for expert and random only.
        images: how pictures travel; by default raw (exact) up to 64 KiB a step, else as JPEG.
        seed: seed of expert and random.
        once: end with the first connection instead of dialling again.

    Examples:
        OFFBOOK_TOKEN=ob_... offbook policy serve runs/bc --submission 3f9c2a
        offbook policy serve my_policies:make_policy --url https://arena.example --submission 3f9c2a
        offbook policy serve expert:0.5 --task offbook:pour --submission 3f9c2a --once
    """
    return play(find_policy(target, task, seed), url, read_token(token_file), submission, images, once)


def play(policy: Policy, url: str, token: str, submission: str, images: str | None, once: bool) -> Report:
    """Plays the trials of a submission, with a line on stderr for each thing that happens."""
    from offbook.client.serve import serve_policy

    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        print(f"offbook: {line}", file=sys.stderr, flush=True)

    serve_policy(policy, url, token, submission, images=images, once=once, on_event=report)
    trials = sum(line.endswith(": trial begins") for line in lines)
    text = f"{policy.meta.name}: {trials} trial{'s' * (trials != 1)} played for submission {submission}."
    return Report(text=text, data={"policy": policy.meta.name, "submission": submission, "trials": trials})


def check(
    target: tyro.conf.Positional[str],
    *,
    robot: str | None = None,
    settings: Path | None = None,
    task: str | None = None,
    seconds: float = 20.0,
    seed: int = 0,
) -> Report:
    """Tries a policy on a simulated robot before an arena does: shapes, numbers, ranges, memory, speed.

    One episode is played, no longer than the time allows; then parts of it are put to the policy again, alone, after a
    reset and beside another episode, and the answers are compared. Exit code 1 when the policy would fail in an arena.

    Args:
        target: as for offbook policy serve.
        robot: robot to try it on, such as pour, or gym:Hopper-v5@4 for four trials in a row; by default the world of
            the policy's recordings, with as many trials as it reads.
        settings: JSON file with that robot's settings.
        task: the same by the name of an environment, such as offbook:pour or gym:Hopper-v5.
        seconds: longest duration.
        seed: of the episode, and of expert and random.

    Examples:
        offbook policy check runs/bc
        offbook policy check my_policies:make_policy --robot pour
        offbook policy check expert --task offbook:pour --json
    """
    if seconds <= 0:
        raise ConfigError("--seconds", expected="a positive number", got=str(seconds), fix="allow some time")
    if robot and task:
        raise ConfigError("--robot and --task", expected="one of them", got="both", fix="drop one")
    name = robot or task or _recorded_on(target)
    if name is None:
        fix = "add --robot pour, or --task ENVIRONMENT"
        raise ConfigError("--robot", expected="a robot to try it on", got="none", fix=fix)
    with needs_extra("sim"):
        from offbook.robots import make_robot
    with closing(make_robot(name, read_settings(settings))) as machine:
        return rehearsed(find_policy(target, name, seed), machine, name, seed, seconds)


def rehearsed(policy: Policy, machine: Robot, name: str, seed: int, seconds: float) -> Report:
    """The report of a dry run."""
    if not machine.spec.simulated:
        fix = "try the policy on a simulated robot, such as pour"
        raise ConfigError("--robot", expected="a robot that waits for the policy", got=f"{name}, a real one", fix=fix)
    with needs_extra("sim"):
        from offbook.robots.rehearsal import rehearse
    rehearsal = rehearse(machine, policy, seed=seed, seconds=seconds)
    rows = [[item.name, item.verdict, item.words] for item in rehearsal.checks]
    verdict = "fine" if rehearsal.ok else "NOT FIT for an arena: " + "; ".join(rehearsal.failures)
    lines = [f"{policy.meta.name} on {name}: {verdict}", "", table(["check", "verdict", ""], rows)]
    if rehearsal.latency_ms:
        lines += ["", rehearsal.histogram()]
    data = {
        "policy": policy.meta.name,
        "robot": name,
        "fit": rehearsal.ok,
        "failures": rehearsal.failures,
        "checks": [{"name": c.name, "verdict": c.verdict, "words": c.words} for c in rehearsal.checks],
        "answers": len(rehearsal.latency_ms),
        "latency_ms": rehearsal.percentiles(),
        "period_ms": rehearsal.period_ms,
    }
    return Report(text="\n".join(lines), data=data, exit_code=0 if rehearsal.ok else 1)


def scripted(target: str) -> bool:
    """Whether a word on the command line means an expert or random actions, whatever files there are."""
    return target == "random" or target.partition(":")[0] == "expert"


def find_policy(target: str, task: str | None, seed: int = 0) -> Policy:
    """The policy that a word on the command line means.

    Args:
        target: run folder or checkpoint, perhaps with `:ROLE`, `:ROLE:TARGET` or `::TARGET`; `expert`, `expert:GRADE`,
            `random`; or `MODULE:NAME` (also of a module in the current folder): a policy, or a function without
            arguments that makes one.
        task: environment or robot, for expert and random.
        seed: for expert and random.

    Raises:
        ConfigError: it means nothing, or something that is no policy.
        CheckpointError: the checkpoint cannot be used.
    """
    if scripted(target):
        return _scripted(target, task, seed)
    if _of_module(target):
        return _of_user(*target.split(":"))
    with needs_extra("models"):
        from offbook.learning.policies import load_policy
    path, role, aim = run_and_role(target)
    policy: Any = load_policy(path)
    found: Policy = policy
    if not role and aim is None:
        return found
    way, expected = ("in_role", "a policy with roles") if role else ("aiming_at", "a policy that aims at a return")
    if not hasattr(policy, way):
        fix = f"leave {target.removeprefix(path)} out"
        if role and hasattr(policy, "aiming_at"):
            fix = f"write {path}::TARGET for another return to aim at"
        raise ConfigError(target, expected=expected, got=f"{policy.meta.name}, without", fix=fix)
    found = policy.in_role(role, aim) if role else policy.aiming_at(aim)
    return found


def run_and_role(target: str) -> tuple[str, str, float | None]:
    """What stands before and behind the colons of `RUN:ROLE:TARGET`: the path, the role, the return to aim at.

    An empty role, as in `RUN::TARGET`, is the policy's own.

    Raises:
        ConfigError: the return is no number.
    """
    path, colon, rest = target.partition(":")
    if not colon or Path(target).exists() or not _is_run(path):
        return target, "", None
    role, colon, aim = rest.partition(":")
    try:
        return path, role, float(aim) if colon else None
    except ValueError:
        got, fix = repr(aim), f"write {path}:{role}:0.9"
        raise ConfigError(target, expected="a number behind the role", got=got, fix=fix) from None


def _is_run(path: str) -> bool:
    """Whether it is a run folder or a checkpoint, and not a package with a policy in it."""
    return Path(path).is_file() or (Path(path) / "config.json").is_file()


def recorded_in(target: str) -> str | None:
    """The environment that a checkpoint's recordings are from, where it says so; None for other policies.

    Raises:
        CheckpointError: the word means a checkpoint, and there is none or it cannot be used.
    """
    environment = _record(target).get("environment")
    return environment if isinstance(environment, str) and environment else None


def aim_of(target: str) -> tuple[float, Mapping[str, float]] | None:
    """The return that a policy aims at, and quantiles of those of its recordings by name, where a checkpoint has both.

    Raises:
        CheckpointError: the word means a checkpoint, and there is none or it cannot be used.
        ConfigError: the return is no number.
    """
    record, aim = _record(target), run_and_role(target)[2]
    aim, returns = record.get("target") if aim is None else aim, record.get("returns")
    if not isinstance(returns, Mapping) or not {"5 %", "100 %"} <= returns.keys():
        return None  # of another kind of policy, which may aim at a share of what was recorded
    if not all(isinstance(value, int | float) for value in (aim, *returns.values())):
        return None
    return float(aim or 0.0), returns


def _recorded_on(target: str) -> str | None:
    """The robot that is like a checkpoint's recordings, with as many trials in a row as it has learnt to read."""
    environment, network = recorded_in(target), _record(target).get("network")
    if environment is None or not isinstance(network, Mapping) or "trials" not in network:
        return environment
    return f"{environment}@{network['trials']}"


def _record(target: str) -> Mapping[str, Any]:
    """What a checkpoint says of itself; empty for other policies."""
    if scripted(target) or _of_module(target):
        return {}
    with needs_extra("models"):
        from offbook.learning.policies import policy_file
    return read_header(policy_file(run_and_role(target)[0])).record


def _of_module(target: str) -> bool:
    if Path(target).exists() or _is_run(target.partition(":")[0]):
        return False
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", target) is not None


def _scripted(target: str, task: str | None, seed: int) -> Policy:
    if task is None:
        raise ConfigError("--task", expected="the world that it plays in", got="none", fix="add --task offbook:pour")
    with needs_extra("sim"):
        from offbook.robots import environment_of
        from offbook.sim.adapters import make
        from offbook.sim.experts import RandomPolicy, make_expert
        from offbook.sim.spaces import action_spec
    env_id = environment_of(task)
    if target == "random":
        with closing(make(env_id)) as env:
            return RandomPolicy(action_spec(env.action_space), seed)
    grade = target.partition(":")[2]
    try:
        return make_expert(env_id, float(grade or 1.0), seed)
    except ValueError:
        raise ConfigError("expert", expected="a grade from 0 to 1", got=repr(grade), fix="write expert:0.5") from None


def _of_user(module: str, name: str) -> Policy:
    where = f"policy {module}:{name}"
    # A console script does not look into the current folder by itself; there is where users keep their modules. It
    # stays on the path, for worker processes that get the policy must find its module too.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
        policy = found() if isinstance(found, type) or not isinstance(found, Policy) else found
    except OffbookError:
        raise
    except Exception as error:  # the module is user code
        got = f"{type(error).__name__}: {error}".splitlines()[0]
        fix = f"mend it, or pass {_POLICIES}"
        raise ConfigError(where, expected="a policy or a function that makes one", got=got, fix=fix) from error
    if not isinstance(policy, Policy):
        got, fix = f"a {type(policy).__name__}", "give it meta, reset(sessions, prompts) and infer(observation)"
        raise ConfigError(where, expected="a policy", got=got, fix=fix)
    return policy
