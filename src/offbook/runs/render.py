"""Draws the ledger: the table in `results/README.md`, and marked blocks inside pages of the documentation.

A block in a page begins with `<!-- ledger:NAME -->` and ends with `<!-- /ledger -->`, each on a line of its own; NAME
is a system, a benchmark, the id of an entry, or `all`. What stands between is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from offbook.errors import DataError
from offbook.runs.directory import write_atomic
from offbook.runs.ledger import Entry, Ledger, Metric, latest

# Only on a line of its own is a marker one: text may speak of it.
_BLOCK = re.compile(r"^(<!-- ledger:([\w./-]+) -->\n).*?^(<!-- /ledger -->)$", re.DOTALL | re.MULTILINE)
_OPENING = re.compile(r"^<!-- ledger:", re.MULTILINE)
_HEAD = "| claim | ours | baseline | paper | verdict | command | minutes | entry |\n|---|---|---|---|---|---|---|---|"

_README = """\
# Results

Every figure of the project is a line of [ledger.jsonl](ledger.jsonl): a command, its seeds, the commit, the machine and
values with 95 % intervals. This page is written by `offbook ledger render`; the newest line of each claim is shown,
failures included. `offbook ledger verify ID` runs a line's command again and compares; `offbook ledger list` shows all
lines.

Verdicts: of a paper's claim *reproduced*, *not separated* (the intervals overlap) or *contradicted*; of a limit of ours
*met* or *missed*; *recorded* where there is nothing to hold it against.

## The ten systems

{systems}

## Benchmarks

{benchmarks}
"""


def render(
    ledger: Ledger, readme: Path, pages: Sequence[Path], systems: Mapping[str, str], *, check: bool = False
) -> list[Path]:
    """Writes the table and refreshes the blocks.

    Args:
        ledger: what to draw.
        readme: the table's file, `results/README.md`.
        pages: Markdown files in which to look for blocks.
        systems: title by name of the ten systems, which appear with or without results.
        check: write nothing.

    Returns:
        The files that were (or, with `check`, would be) changed.

    Raises:
        DataError: a block is not closed.
    """
    wanted = {readme: _readme(ledger, systems)}
    wanted |= {page: _refresh(page, ledger) for page in pages if page != readme}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if not check:
        for path in stale:
            write_atomic(path, wanted[path])
    return stale


def _readme(ledger: Ledger, systems: Mapping[str, str]) -> str:
    sections = []
    for name, title in systems.items():
        entries = [entry for entry in ledger.entries if entry.system == name]
        sections.append(f"### {title}\n\n{table(entries)}")
    others = [entry for entry in ledger.entries if entry.system not in systems]
    return _README.format(systems="\n\n".join(sections), benchmarks=table(others))


def table(entries: Sequence[Entry]) -> str:
    """The newest entry of each claim as a Markdown table; a sentence where there is none."""
    if not entries:
        return "No result is recorded yet."
    return "\n".join([_HEAD, *map(_row, latest(entries))])


def _row(entry: Entry) -> str:
    cells = (
        entry.claim + (f" ({entry.note})" if entry.note else ""),
        "<br>".join(map(metric_text, entry.metrics)),
        "<br>".join(map(metric_text, entry.baseline_metrics)) or "-",
        f"{entry.paper.value} ({entry.paper.table})" if entry.paper else "-",
        entry.verdict,
        f"`{entry.command}`",
        f"{entry.seconds / 60:.1f}",
        f"`{entry.id}`, commit `{entry.commit[:8]}`, {entry.started[:10]}, {entry.machine.cpu}, {entry.machine.device}",
    )
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def metric_text(metric: Metric) -> str:
    """A metric as people read it.

    Example:
        >>> metric_text(Metric(name="success", value=0.81234, n=50, interval=(0.68, 0.9), method="Wilson"))
        'success 0.812 [0.68, 0.9], n = 50'
    """
    unit = f" {metric.unit}" if metric.unit else ""
    if metric.interval is None:
        return f"{metric.name} {metric.value:.3g}{unit}"
    low, high = metric.interval
    return f"{metric.name} {metric.value:.3g}{unit} [{low:.3g}, {high:.3g}], n = {metric.n}"


def _refresh(page: Path, ledger: Ledger) -> str:
    text = page.read_text()
    if len(_OPENING.findall(text)) != len(_BLOCK.findall(text)):
        fix = "end each block with <!-- /ledger --> on a line of its own"
        raise DataError(str(page), expected="closed ledger blocks", got="one that is not", fix=fix)

    def block(match: re.Match[str]) -> str:
        name = match[2]
        entries = [entry for entry in ledger.entries if name in ("all", entry.system, entry.id)]
        return f"{match[1]}{table(entries)}\n{match[3]}"

    return _BLOCK.sub(block, text)
