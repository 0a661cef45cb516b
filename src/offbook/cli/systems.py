"""`offbook systems` and `offbook info`."""

from __future__ import annotations

from pathlib import Path

import tyro

from offbook.cli.report import Report, table
from offbook.errors import ConfigError, nearest
from offbook.runs.config import to_json
from offbook.runs.ledger import read
from offbook.runs.render import metric_text
from offbook.systems import SYSTEMS


def list_systems() -> Report:
    """Shows the ten systems and how far each one is.

    Examples:
        offbook systems
        offbook systems --json
    """
    rows = [[name, system.title, system.status] for name, system in SYSTEMS.items()]
    data = {"systems": [{"name": name, **to_json(system)} for name, system in SYSTEMS.items()]}
    return Report(text=table(["name", "system", "status"], rows), data=data)


def info(name: tyro.conf.Positional[str], *, ledger: Path = Path("results/ledger.jsonl")) -> Report:
    """Shows one system: the paper, how far it is, its commands and its newest result.

    Args:
        name: the system, as `offbook systems` lists it.
        ledger: where results are looked up.

    Examples:
        offbook info toto
    """
    if name not in SYSTEMS:
        raise ConfigError("system", expected="the name of a system", got=repr(name), fix=nearest(name, SYSTEMS))
    system = SYSTEMS[name]
    results = [entry for entry in read(ledger).entries if entry.system == name]
    last = results[-1] if results else None
    lines = [
        f"{system.title}: {system.summary}",
        "",
        f"paper     {system.authors}: {system.paper}. {system.venue}, arXiv:{system.arxiv}",
        f"status    {system.status}",
        f"commands  {'; '.join(system.commands) or 'none yet'}",
    ]
    if last is None:
        lines.append(f"result    none in {ledger}")
    else:
        metrics = ", ".join(metric_text(metric) for metric in last.metrics)
        lines.append(f"result    {last.claim}: {last.verdict}; {metrics} ({last.started[:10]}, {last.id})")
    data = {"name": name, **to_json(system), "result": None if last is None else to_json(last)}
    return Report(text="\n".join(lines), data=data)
