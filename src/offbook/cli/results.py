"""`offbook bench` and `offbook ledger ...`."""

from __future__ import annotations

import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import tyro

from offbook.cli.report import Report, table
from offbook.errors import ConfigError, DataError, nearest
from offbook.runs.benchmark import Options
from offbook.runs.config import to_json
from offbook.runs.ledger import Claim, Ledger, append, entry, read
from offbook.runs.ledger import verify as verify_entry
from offbook.runs.provenance import changed_files, checkout_root, commit
from offbook.runs.render import metric_text
from offbook.runs.render import render as render_ledger
from offbook.systems import SYSTEMS

_LEDGER = Path("results/ledger.jsonl")


def bench(
    name: tyro.conf.Positional[str],
    *,
    seed: int = 0,
    repeats: int = 11,
    record: bool = False,
    folder: Path = Path("benchmarks"),
    ledger: Path = _LEDGER,
) -> Report:
    """Runs a benchmark and prints its figures; exit code 1 when a limit is missed.

    Args:
        name: a file of the folder without its ending, or `all`.
        seed: seed of everything random in it.
        repeats: how often each side is timed.
        record: append the result to the ledger; only from a clean commit.
        folder: where the benchmarks are.
        ledger: the file to append to.

    Examples:
        offbook bench import_time
        offbook bench all --record
    """
    known = {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}
    if not known:
        fix = "run this in a checkout of offbook, or name the folder"
        raise ConfigError("--folder", expected="a folder of benchmarks", got=str(folder), fix=fix)
    if name != "all" and name not in known:
        raise ConfigError("benchmark", expected="its name", got=repr(name), fix=nearest(name, [*known, "all"]))
    if repeats < 1:
        raise ConfigError("--repeats", expected="1 or more", got=str(repeats), fix="measure at least once")
    claims: list[Claim] = []
    for chosen in known if name == "all" else [name]:
        print(f"offbook: benchmark {chosen}", file=sys.stderr)
        run = functools.partial(_run, known[chosen], Options(seed=seed, repeats=repeats))
        command = f"offbook bench {chosen} --seed {seed} --repeats {repeats}"
        claims += measured(run, command, ledger if record else None)
    return claims_report(claims)


def measured(run: Callable[[], Sequence[Claim]], command: str, ledger: Path | None) -> Sequence[Claim]:
    """Runs what measures; its claims go to the ledger, if that is given."""
    if ledger is not None:
        _require_clean(ledger)
    started, clock = datetime.now(UTC), time.monotonic()
    found = run()
    if ledger is not None:
        seconds = time.monotonic() - clock
        for claim in found:
            append(ledger, entry(claim, command=command, started=started, seconds=seconds, ledger=_beside(ledger)))
    return found


def claims_report(claims: Sequence[Claim]) -> Report:
    """Claims with their figures; exit code 1 when a limit was missed, or a paper's claim contradicted."""
    failed = any(claim.verdict in ("missed", "contradicted") for claim in claims)
    data = {"claims": [to_json(claim) for claim in claims]}
    return Report(text=_claims_text(claims), data=data, exit_code=int(failed))


def _run(path: Path, options: Options) -> Sequence[Claim]:
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(str(path), expected="a Python file", got="something else", fix="check --folder")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "run"):
        fix = "define run(options) -> list of claims"
        raise ConfigError(str(path), expected="a function run", got="a file without one", fix=fix)
    found: Sequence[Claim] = module.run(options)
    return found


def _require_clean(ledger: Path) -> None:
    """Tells before the minutes of measuring, rather than after, that the result could not be recorded."""
    changed = changed_files(Path(), _beside(ledger))
    if not commit(Path()):
        raise DataError("--record", expected="a git commit", got="no repository", fix="run this in a checkout")
    if changed:
        got = f"{len(changed)} changed files, first {changed[0]}"
        raise DataError("--record", expected="a clean working tree", got=got, fix="commit the changes first")


def _beside(ledger: Path) -> str:
    """The ledger's folder relative to the checkout: recording several results must not make the tree dirty."""
    root = checkout_root(Path())
    place = ledger.resolve().parent
    return str(place.relative_to(root)) if root and place.is_relative_to(root) and place != root else ""


def _claims_text(claims: Sequence[Claim]) -> str:
    lines = []
    for claim in claims:
        lines.append(f"{claim.system}: {claim.claim}: {claim.verdict}")
        lines += [f"  {metric_text(metric)}" for metric in (*claim.metrics, *claim.baseline_metrics)]
    return "\n".join(lines)


def _read(ledger: Path) -> Ledger:
    found = read(ledger)
    if found.torn_line is not None:
        print(f"offbook: {ledger}, line {found.torn_line}: cut short by a crash and left out", file=sys.stderr)
    return found


def ledger_list(*, ledger: Path = _LEDGER) -> Report:
    """Shows all entries of the ledger, oldest first.

    Args:
        ledger: the file.

    Examples:
        offbook ledger list
    """
    found = _read(ledger)
    rows = [[e.id, e.started[:10], e.commit[:8], e.verdict, e.claim] for e in found.entries]
    text = table(["entry", "date", "commit", "verdict", "claim"], rows) if rows else f"No result in {ledger} yet."
    data = {"entries": [to_json(e) for e in found.entries], "torn_line": found.torn_line}
    return Report(text=text, data=data)


def ledger_render(*, ledger: Path = _LEDGER, docs: Path = Path("docs"), check: bool = False) -> Report:
    """Writes README.md beside the ledger, and the tables inside the pages of the documentation.

    Args:
        ledger: the file.
        docs: folder of Markdown pages with `<!-- ledger:NAME -->` blocks.
        check: write nothing; exit code 1 when a page is stale.

    Examples:
        offbook ledger render
        offbook ledger render --check
    """
    pages = [page for page in sorted(docs.rglob("*.md")) if "_build" not in page.parts]
    titles = {name: system.title for name, system in SYSTEMS.items()}
    changed = render_ledger(_read(ledger), ledger.parent / "README.md", pages, titles, check=check)
    verb = "stale" if check else "written"
    text = "\n".join(f"{verb}: {path}" for path in changed) or "All pages are up to date."
    return Report(text=text, data={verb: changed}, exit_code=int(check and bool(changed)))


def ledger_verify(id: tyro.conf.Positional[str], *, ledger: Path = _LEDGER, tolerance: float = 0.05) -> Report:
    """Runs the command of an entry again and compares; exit code 1 when the verdict or a figure is worse or another.

    Args:
        id: the entry, as `offbook ledger list` shows it.
        ledger: the file.
        tolerance: allowed relative difference of figures without an interval.

    Examples:
        offbook ledger verify import_time-1a2b3c4d
    """
    recorded = _read(ledger).find(id)
    print(f"offbook: running {recorded.command}; it took {recorded.seconds:.0f} s when recorded", file=sys.stderr)
    found = verify_entry(recorded, tolerance=tolerance)
    words = {"agrees": "yes", "better": "yes, better", "disagrees": "NO", "not compared": "not compared"}
    rows = [["verdict " + recorded.verdict, found.verdict or "missing", "yes" if found.holds else "NO"]]
    rows += [
        [metric_text(c.metric), metric_text(c.again) if c.again else "missing", words[c.outcome]]
        for c in found.comparisons
    ]
    return Report(
        text=table(["recorded", "again", "agrees"], rows),
        data={"id": id, "agrees": found.agrees, **to_json(found)},
        exit_code=int(not found.agrees),
    )
