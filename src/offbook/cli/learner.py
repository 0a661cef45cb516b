"""What every command that learns from a store begins with: recordings, seen through an encoder or not, and a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from offbook.data.splits import left_out
from offbook.data.store import EpisodeStore
from offbook.errors import needs_extra
from offbook.runs.directory import RunDirectory
from offbook.runs.progress import note

with needs_extra("models"):
    from offbook.learning.encoding import through
    from offbook.learning.fit import main_process_first

C = TypeVar("C")


def opened(
    data: Path, encoder: Path | None, config: C, train: Callable[..., Any], device: Literal["auto", "cpu"]
) -> tuple[EpisodeStore, C, Callable[..., Any]]:
    """The recordings, settings and learner: those that see through the encoder, where there is one."""
    store = EpisodeStore.open(data)
    if encoder is None:
        return store, config, train
    with main_process_first(device):
        return through(encoder, store, config, train)


def begun(
    store: EpisodeStore, data: Path, out: Path, config: object, resume: bool, device: Literal["auto", "cpu"]
) -> RunDirectory:
    """The folder of the run, made by the main process, which also tells what of the recordings is passed over."""
    with main_process_first(device) as first:
        run = RunDirectory.create(out, config, resume=resume) if first else RunDirectory.open(out)
    if first and (count := left_out(store)):
        note(f"{count} of {len(store)} episodes are in no group and not learnt from: run offbook data split {data}")
    return run
