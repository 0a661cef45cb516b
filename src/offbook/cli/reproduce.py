"""`offbook reproduce`: is the paper's claim true, here and now?"""

from __future__ import annotations

import functools
import importlib
import itertools
from dataclasses import replace
from pathlib import Path

import tyro

from offbook.cli.report import Report
from offbook.cli.results import claims_report, measured
from offbook.errors import ConfigError, nearest, needs_extra
from offbook.runs.config import choose_preset
from offbook.runs.directory import RunDirectory
from offbook.runs.progress import note
from offbook.runs.provenance import changed_files, commit
from offbook.systems import SYSTEMS


def reproduce(
    system: tyro.conf.Positional[str],
    *,
    preset: str = "smoke",
    seeds: str = "",
    out: Path | None = None,
    resume: bool = False,
    record: bool = False,
    ledger: Path = Path("results/ledger.jsonl"),
) -> Report:
    """Reproduces a system's claim beside its baselines and prints the verdicts; exit code 1 when one is not held.

    A study of many arms prints its table too. Figures, pictures and all that an interrupted run goes on from lie in a
    folder.

    Args:
        system: the system, as `offbook systems` lists it.
        preset: `smoke` shows in a minute or two that everything is wired; `tiny` is the honest small study, an hour or
            two on two cores; `paper` wants a GPU. A system may have more, such as `drqv2-dmc` and `metaworld` of vcse.
        seeds: numbers with commas between them, instead of the preset's.
        out: the folder; by default a new one, out/SYSTEM-PRESET.
        resume: go on with what is in the folder `--out`.
        record: append the claims to the ledger; only from a clean commit.
        ledger: the file to append to.

    Examples:
        offbook reproduce bpt --preset smoke
        offbook reproduce bpt --preset tiny --out runs/bpt --resume
        offbook reproduce bpt --preset tiny --seeds 3,4,5 --record
        offbook reproduce vcse --preset drqv2-dmc --seeds 0
    """
    known = {name: about.recipe for name, about in SYSTEMS.items() if about.recipe}
    recipe = known.get(system)
    if recipe is None:
        got = "one without a reproduction so far" if system in SYSTEMS else repr(system)
        expected = "a system that has a reproduction"
        raise ConfigError("system", expected=expected, got=got, fix=nearest(system, known))
    module, _, name = recipe.partition(":")
    with needs_extra("models"):
        run = getattr(importlib.import_module(module), name)
        presets = importlib.import_module(f"{module.rpartition('.')[0]}.presets").PRESETS
    if resume and out is None:
        raise ConfigError("--resume", expected="--out with it", got="none", fix="name the folder to go on with")
    config, chosen = choose_preset(presets, preset), ""
    if seeds:
        config, chosen = replace(config, seeds=_numbers(seeds)), f" --seeds {seeds}"
    folder = RunDirectory.create(out or _free(Path(f"out/{system}-{preset}")), config, resume=resume)
    _check_commit(folder.path / "commit", ledger if record else None)
    command = f"offbook reproduce {system} --preset {preset}{chosen}"
    claims = measured(functools.partial(run, config, folder), command, ledger if record else None)
    note(f"offbook: everything measured is in {folder.path}")
    report, table = claims_report(claims), folder.path / "table.md"
    return replace(report, text=f"{table.read_text()}\n{report.text}") if table.exists() else report


def _numbers(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        fix = "write them as 0,1,2"
        raise ConfigError("--seeds", expected="different whole numbers", got=repr(text), fix=fix)
    return tuple(map(int, words))


def _free(path: Path) -> Path:
    """The path, or with a number behind it the first one that is not there."""
    names = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())


def _check_commit(path: Path, ledger: Path | None) -> None:
    """Keeps the commit with what is measured: an entry of the ledger must not rest on figures of another one."""
    now = "" if changed_files(Path(), "results") else commit(Path())
    if not path.exists():
        path.write_text(now)
    elif ledger is not None and path.read_text() != now:
        got, fix = "a folder begun at another, or with changes beside it", "start anew in another folder"
        raise ConfigError("--record", expected="all figures from one commit", got=got, fix=fix)
