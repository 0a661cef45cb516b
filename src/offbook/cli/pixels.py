"""`offbook train drqv2`: an agent that learns online from what a camera shows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import tyro

from offbook.cli.report import Report
from offbook.errors import needs_extra
from offbook.runs.config import with_presets
from offbook.runs.directory import RunDirectory

with needs_extra("models"):
    from offbook.learning.pixel_training import check_pixels, train_pixels
    from offbook.systems.vcse.pixels import ExploringConfig
    from offbook.systems.vcse.presets import PIXELS


@with_presets(PIXELS)
def train(
    task: tyro.conf.Positional[str],
    *,
    out: Path,
    resume: bool = False,
    config: Annotated[ExploringConfig, tyro.conf.arg(name="")] = ExploringConfig(),  # noqa: B008 (frozen)
) -> Report:
    """Lets an agent learn a task from the pictures of a camera alone: DrQ-v2, by default without exploration.

    It learns online, in the simulator, and needs no recordings; what it lives through becomes one, in the folder replay
    of the run, with each picture once. At its full size it wants a GPU.

    Args:
        task: with a camera and continuous actions, such as dmc:walker-walk or metaworld:reach-v3.
        out: a new folder for the run.
        resume: go on with the life in that folder after an interruption.
        config: the agent, its life and what it explores by.

    Examples:
        offbook train drqv2 dmc:cartpole-balance --preset smoke --out runs/quick
        offbook train drqv2 dmc:walker-walk --out runs/walk
        offbook train drqv2 dmc:hopper-stand --preset drqv2-dmc --bonus vcse --out runs/hopper
        offbook train drqv2 dmc:hopper-stand --preset drqv2-dmc --bonus vcse --out runs/hopper --resume
        offbook evaluate runs/walk --episodes 10
    """
    check_pixels(task, config)
    run = RunDirectory.create(out, config, resume=resume)
    began = time.monotonic()
    policy = train_pixels(task, config, run, resume=resume, explores=config.explores())
    seconds = time.monotonic() - began
    rows = run.metrics()
    tested = [row for row in rows if "eval_return" in row]
    lines = [f"{rows[-1]['step']:.0f} steps of {task} in {len(rows)} episodes, {seconds:.0f} s"]
    lines += [f"return {tested[-1]['eval_return']:.4g} over {config.evaluate_episodes} test episodes"] if tested else []
    lines += [
        f"policy in {run.checkpoint()}, recordings in {run.path / 'replay'}",
        f"test it: offbook evaluate {out} --episodes 10",
    ]
    return Report(
        text="\n".join(lines),
        data={
            "run": str(out),
            "policy": str(run.checkpoint()),
            "environment": policy.provenance["environment"],
            "seconds": seconds,
            "metrics": rows[-1],
        },
    )
