"""`offbook train`: learning from recordings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from offbook.cli.report import Report
from offbook.data.splits import left_out
from offbook.data.store import EpisodeStore
from offbook.errors import needs_extra
from offbook.runs.config import with_presets
from offbook.runs.directory import RunDirectory
from offbook.runs.progress import note

with needs_extra("models"):
    from offbook.learning.cloning import CloningConfig, check_cloning, train_cloning
    from offbook.learning.fit import FitConfig, main_process_first


def smoke() -> CloningConfig:
    """Seconds: shows that everything is wired, learns little."""
    fit = FitConfig(steps=60, batch_size=64, warmup=10, ema=0.9, log_every=10, checkpoint_every=30, threads=1)
    return CloningConfig(hidden=64, validate_every=30, fit=fit)


def tiny() -> CloningConfig:
    """A minute or so on two cores: tens of episodes, state or small images."""
    return CloningConfig()


PRESETS: dict[str, Callable[[], CloningConfig]] = {"smoke": smoke, "tiny": tiny}


@with_presets(PRESETS)
def bc(
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    config: Annotated[CloningConfig, tyro.conf.arg(name="")] = tiny(),  # noqa: B008 (frozen)
) -> Report:
    """Clones the recorded behaviour: a policy that answers observations as the recordings do.

    Args:
        data: the recordings, a store that `offbook data` made.
        out: a new folder for the run.
        resume: continue the run in that folder after an interruption.
        config: the network and its training.

    Examples:
        offbook train bc --data recordings/pour --out runs/bc
        offbook train bc --data recordings/pour --out runs/bc-images --parts joints --cameras front
        offbook train bc --data recordings/pour --out runs/queries --parts joints --cameras front --body transformer
        offbook train bc --data recordings/pour --out runs/quick --preset smoke --fit.steps 100
        offbook train bc --data recordings/pour --out runs/bc --resume
    """
    store = EpisodeStore.open(data)
    # Resolved and written down, so that the run's folder says what the policy looks at.
    parts = tuple(name for name, _ in check_cloning(store, config).state)
    config = replace(config, parts=parts)
    with main_process_first(config.fit.device) as first:
        run = RunDirectory.create(out, config, resume=resume) if first else RunDirectory.open(out)
    if first and (count := left_out(store)):
        said = f"{count} of {len(store)} episodes are in no group and not learnt from"
        note(f"{said}: run offbook data split {data}")
    began = time.monotonic()
    policy = train_cloning(store, config, run, resume=resume)
    seconds = time.monotonic() - began
    last = run.metrics()[-1]
    held_out = last.get("held_out_loss")
    eyes = ", ".join(
        [*(name for name, _ in policy.meta.observation.state), *(f"camera {name}" for name in config.cameras)]
    )
    task = store.schema.environment
    lines = [
        f"learnt from {eyes}: {policy.provenance['recordings']['episodes']} episodes, {last['step']:.0f} steps "
        f"in {seconds:.0f} s",
        f"loss {last['loss']:.4g}" + ("" if held_out is None else f", on episodes held out {held_out:.4g}"),
        f"policy in {run.checkpoint()}",
        f"test it: offbook evaluate {out}" + ("" if task else " --task TASK") + " --episodes 50",
    ]
    return Report(
        text="\n".join(lines),
        data={
            "run": str(out),
            "policy": str(run.checkpoint()),
            "environment": task,
            "seconds": seconds,
            "metrics": last,
        },
    )
