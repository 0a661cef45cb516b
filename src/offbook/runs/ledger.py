"""The results ledger: every claim is a command, seeds, a commit and values with intervals, one JSON line each.

`results/ledger.jsonl` is only ever appended to; failures are recorded too. A recipe or benchmark returns `Claim`s;
`entry` adds where they came from, `append` refuses what a sceptic could not check, `verify` runs the command again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from offbook.errors import ConfigError, DataError, OffbookError, nearest
from offbook.runs import provenance
from offbook.runs.config import from_json, to_json
from offbook.runs.provenance import Machine

SCHEMA = 1

Verdict = Literal["reproduced", "not separated", "contradicted", "met", "missed", "recorded"]
_RANKS = {"contradicted": 0, "missed": 0, "not separated": 1, "recorded": 1, "reproduced": 2, "met": 2}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a claim.

    Attributes:
        name: what was measured, with the arm where there are several: `"success, behaviour cloning"`.
        value: the estimate.
        n: how many independent observations it rests on.
        interval: its 95 % interval (low, high); needed as soon as n > 1.
        method: how the interval was computed, such as `"Wilson"`.
        unit: `"s"`, `"MiB"`, `"windows/s"`, ...; empty for ratios and shares.
        higher_is_better: None where it is neither.
    """

    name: str
    value: float
    n: int = 1
    interval: tuple[float, float] | None = None
    method: str = ""
    unit: str = ""
    higher_is_better: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Recordings that a claim rests on: a name, the store's digest, the number of episodes."""

    name: str
    sha256: str
    episodes: int


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What the paper reports: the value in its own words, and the table, figure or section."""

    value: str
    table: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a recipe or benchmark found out.

    Attributes:
        system: one of the ten systems, or the name of the benchmark.
        claim: one sentence that the metrics support or contradict.
        metrics: our figures.
        seeds: all seeds that went in.
        verdict: of a paper's claim `reproduced`, `not separated` or `contradicted`; of a limit of ours `met` or
            `missed`; else `recorded`.
        baseline_metrics: the figures to compare with, from the same run.
        preset: the preset's name; empty where there is none.
        config: the resolved configuration as JSON types.
        data: the recordings.
        paper: what the paper reports.
        note: what a reader must know to judge the figures.
    """

    system: str
    claim: str
    metrics: tuple[Metric, ...]
    seeds: tuple[int, ...]
    verdict: Verdict = "recorded"
    baseline_metrics: tuple[Metric, ...] = ()
    preset: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[Dataset, ...] = ()
    paper: Paper | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry(Claim):
    """A claim and where it came from: one line of the ledger. Make it with `entry`."""

    schema: int
    id: str
    command: str
    config_sha: str
    commit: str
    dirty: bool
    versions: Mapping[str, str]
    machine: Machine
    started: str
    seconds: float
    peak_rss_mb: float


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The entries, oldest first, and the number of a last line that a crash cut short, if any."""

    entries: tuple[Entry, ...]
    torn_line: int | None = None

    def find(self, id: str) -> Entry:
        """The entry with this id.

        Raises:
            ConfigError: there is none; the nearest is suggested.
        """
        known = {entry.id: entry for entry in self.entries}
        if id not in known:
            fix = nearest(id, known) if known else "record a result first"
            raise ConfigError("ledger", expected="the id of an entry", got=repr(id), fix=fix)
        return known[id]


def entry(
    claim: Claim, *, command: str, started: datetime, seconds: float, folder: Path = Path(), ledger: str = "results"
) -> Entry:
    """A claim together with commit, versions and machine.

    Args:
        claim: what was found.
        command: the `offbook ...` line that finds it again; with `--json` it must print its claims.
        started: when the command began.
        seconds: how long it ran.
        folder: the checkout.
        ledger: the folder of the ledger relative to the checkout, whose own changes do not make the tree dirty.
    """
    config = json.dumps(dict(claim.config), sort_keys=True)
    values = {name: getattr(claim, name) for name in Claim.__dataclass_fields__}
    unnamed = Entry(
        **values,
        schema=SCHEMA,
        id="",
        command=command,
        config_sha=hashlib.sha256(config.encode()).hexdigest(),
        commit=provenance.commit(folder),
        dirty=bool(provenance.changed_files(folder, ledger)),
        versions=provenance.versions(),
        machine=provenance.this_machine(),
        started=started.astimezone(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        peak_rss_mb=round(provenance.peak_rss_mb(), 1),
    )
    digest = hashlib.sha256(json.dumps(to_json(unnamed), sort_keys=True).encode()).hexdigest()
    return replace(unnamed, id=f"{claim.system}-{digest[:8]}")


def append(path: Path, new: Entry) -> None:
    """Adds one line, durably; what a crash left of an unfinished line is cut off first.

    Raises:
        DataError: the working tree was dirty or there is no commit, a seed is missing, or a metric is not finite,
            has more than one observation and no interval, or lies outside its interval.
        ConfigError: the command is not one of offbook's.
    """
    _check(new)
    line = json.dumps(to_json(new), ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        if content and not content.endswith(b"\n"):
            if read(path).torn_line:
                file.truncate(content.rfind(b"\n") + 1)
            else:
                file.write(b"\n")
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _check(new: Entry) -> None:
    where = f"ledger entry {new.id}"
    if not new.commit:
        raise DataError(where, expected="a git commit", got="no repository", fix="run the command in a checkout")
    if new.dirty:
        fix = "commit the changes and run the command again"
        raise DataError(where, expected="a clean working tree", got="changes beside the commit", fix=fix)
    if not new.seeds:
        raise DataError(where, expected="the seeds", got="none", fix="name every seed in the claim")
    if not new.metrics:
        raise DataError(where, expected="a metric", got="none", fix="give the claim its figures")
    if _arguments(new.command)[:1] == ["ledger"]:
        raise ConfigError(where, expected="a measuring command", got=new.command, fix="record what measured it")
    for metric in (*new.metrics, *new.baseline_metrics):
        at = f"{where}, metric {metric.name!r}"
        if not math.isfinite(metric.value):
            raise DataError(at, expected="a finite value", got=str(metric.value), fix="find out why it is not")
        if metric.interval is None:
            if metric.n > 1:
                fix = "compute one with offbook.evaluate.stats or offbook.runs.benchmark"
                raise DataError(at, expected="an interval", got=f"n = {metric.n} without one", fix=fix)
        elif not metric.interval[0] <= metric.value <= metric.interval[1]:
            fix = "check how it was computed"
            raise DataError(at, expected=f"a value inside {metric.interval}", got=str(metric.value), fix=fix)


def read(path: Path) -> Ledger:
    """Reads all entries. A last line that was cut short is left out and named in `Ledger.torn_line`.

    Raises:
        DataError: another line is damaged, or of a newer schema.
    """
    if not path.exists():
        return Ledger(entries=())
    lines = path.read_bytes().split(b"\n")
    entries: list[Entry] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return Ledger(entries=tuple(entries), torn_line=number)
            fix = "restore the line from git"
            raise DataError(where, expected="one JSON object", got=repr(line[:60]), fix=fix) from error
        schema = record.get("schema") if isinstance(record, dict) else None
        if schema != SCHEMA:
            fix = "read it with the offbook that wrote it, or a newer one"
            raise DataError(where, expected=f"schema {SCHEMA}", got=f"schema {schema!r}", fix=fix)
        entries.append(from_json(Entry, record, where))
    return Ledger(entries=tuple(entries))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of an entry beside the same metric of the run that verifies it.

    Attributes:
        metric: as recorded.
        again: as measured now; None when the run did not print it.
        outcome: what `verify` says of it.
    """

    metric: Metric
    again: Metric | None
    outcome: Literal["agrees", "better", "disagrees", "not compared"]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found.

    Attributes:
        verdict: the new one; None when the run did not print the claim.
        holds: whether it is the recorded one or a better one.
        comparisons: the metrics, then those of the baseline.
    """

    verdict: Verdict | None
    holds: bool
    comparisons: tuple[Comparison, ...]

    @property
    def agrees(self) -> bool:
        """Whether the verdict holds and no metric disagrees."""
        return self.holds and all(comparison.outcome != "disagrees" for comparison in self.comparisons)


def verify(recorded: Entry, *, folder: Path = Path(), tolerance: float = 0.05) -> Verification:
    """Runs an entry's command again, in a process of its own, and compares the verdict and each metric.

    What agrees is told by `verdict_holds` and `compare`.

    Args:
        recorded: the entry.
        folder: the checkout in which the command runs.
        tolerance: allowed relative difference of metrics that have no interval.

    Raises:
        OffbookError: the command fails, or prints no claims.
    """
    arguments = [sys.executable, "-m", "offbook.cli.main", *_arguments(recorded.command), "--json"]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    try:
        printed = json.loads(done.stdout)["claims"]
        claims = [from_json(Claim, claim, "claim") for claim in printed]
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        where, got = recorded.command, f"exit code {done.returncode}: {last}"
        raise OffbookError(where, expected="claims as JSON", got=got, fix="run the command by hand") from error
    same = [claim for claim in claims if (claim.system, claim.claim) == (recorded.system, recorded.claim)]
    again = {metric.name: metric for claim in same for metric in (*claim.metrics, *claim.baseline_metrics)}
    verdict = same[0].verdict if same else None
    return Verification(
        verdict=verdict,
        holds=verdict_holds(recorded.verdict, verdict),
        comparisons=(
            *(compare(metric, again.get(metric.name), tolerance) for metric in recorded.metrics),
            *(compare(m, again.get(m.name), tolerance, baseline=True) for m in recorded.baseline_metrics),
        ),
    )


def verdict_holds(recorded: Verdict, again: Verdict | None) -> bool:
    """Whether a verdict came again, or a better one, such as `met` for `missed`; None is none at all."""
    return again is not None and _RANKS[again] >= _RANKS[recorded]


def compare(metric: Metric, again: Metric | None, tolerance: float = 0.05, *, baseline: bool = False) -> Comparison:
    """Holds a new measurement against the recorded one.

    They agree when the new value or its interval meets the recorded interval; without a recorded interval, when the
    values differ by no more than the tolerance. Beyond that, in the direction of `higher_is_better`, the new one is
    better, which agrees too, except for a baseline: what a claim is held against must come again as it was. Seconds,
    and rates by the second, are the machine's and not compared: whether a limit in seconds holds, the verdict says.

    Args:
        metric: as recorded.
        again: as measured now; None when it was not.
        tolerance: allowed relative difference where no interval is recorded.
        baseline: whether it is one of the baseline.

    Example:
        >>> old = Metric(name="ratio", value=5.0, n=9, interval=(4.0, 6.0), higher_is_better=True)
        >>> compare(old, Metric(name="ratio", value=8.0)).outcome
        'better'
    """
    if again is None or again.unit != metric.unit:
        return Comparison(metric=metric, again=again, outcome="disagrees")
    if metric.unit == "s" or metric.unit.endswith("/s"):
        return Comparison(metric=metric, again=again, outcome="not compared")
    if metric.interval is None:
        margin = max(tolerance * max(abs(metric.value), abs(again.value)), 1e-9)
        least, most = metric.value - margin, metric.value + margin
    else:
        least, most = metric.interval
    low, high = again.interval or (again.value, again.value)
    if low <= most and high >= least:
        return Comparison(metric=metric, again=again, outcome="agrees")
    # NaN is on no side.
    better = not baseline and {True: low > most, False: high < least, None: False}[metric.higher_is_better]
    return Comparison(metric=metric, again=again, outcome="better" if better else "disagrees")


def _arguments(command: str) -> list[str]:
    # A ledger line may come from a stranger: it can name a verb of ours, never another program.
    words = shlex.split(command)
    if words[:1] != ["offbook"]:
        fix = "record the offbook command that measured it"
        raise ConfigError("ledger command", expected="offbook ...", got=repr(command), fix=fix)
    return words[1:]


def latest(entries: Sequence[Entry]) -> list[Entry]:
    """The newest entry of each system, preset and claim, in the order in which these first appeared."""
    newest = {(entry.system, entry.preset, entry.claim): entry for entry in entries}
    return list(newest.values())
