"""`offbook train encoder`: learning to see from recordings, without labels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from offbook.cli.report import Report
from offbook.data.store import EpisodeStore
from offbook.errors import needs_extra
from offbook.runs.config import with_presets
from offbook.runs.directory import RunDirectory

with needs_extra("models"):
    from offbook.learning.fit import FitConfig
    from offbook.learning.self_supervised import EncoderConfig, chosen_cameras, train_encoder


def smoke() -> EncoderConfig:
    """Seconds: shows that everything is wired, learns little."""
    fit = FitConfig(steps=20, batch_size=16, warmup=5, log_every=10, checkpoint_every=10, threads=1)
    return EncoderConfig(side=32, width=8, size=32, hidden=32, queue=64, save_every=10, fit=fit)


def tiny() -> EncoderConfig:
    """Minutes on two cores: 1,000 batches of 96 frames of 64x64 pixels, 128 features."""
    return EncoderConfig()


PRESETS: dict[str, Callable[[], EncoderConfig]] = {"smoke": smoke, "tiny": tiny}


@with_presets(PRESETS)
def train(
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    config: Annotated[EncoderConfig, tyro.conf.arg(name="")] = tiny(),  # noqa: B008 (frozen)
) -> Report:
    """Makes an encoder of pictures from recordings, for policies to stand on.

    BYOL and MoCo learn from two views of each frame; principal components, and a network that nobody has trained, are
    what to compare with. Give the run to other trainings as --encoder.

    Args:
        data: the recordings, a store that `offbook data` made.
        out: a new folder for the run.
        resume: continue the run in that folder after an interruption.
        config: the method, the network and its training.

    Examples:
        offbook train encoder --data recordings/pour --method byol --out runs/byol
        offbook train encoder --data recordings/pour --method pca --out runs/pca
        offbook train bc --data recordings/pour --parts joints --encoder runs/byol --out runs/bc-byol
    """
    store = EpisodeStore.open(data)
    config = replace(config, cameras=chosen_cameras(store, config.cameras))
    run = RunDirectory.create(out, config, resume=resume)
    began = time.monotonic()
    encoder = train_encoder(store, config, run, resume=resume)
    seconds, last = time.monotonic() - began, run.metrics()[-1]
    facts = {"loss": "loss", "spread": "spread of the features", "explained": "share of the variance"}
    lines = [
        f"{config.method}: {encoder.size} features of {', '.join(config.cameras or ())}, {seconds:.0f} s",
        ", ".join(f"{words} {last[name]:.4g}" for name, words in facts.items() if name in last),
        f"encoder in {run.checkpoint()}",
        f"stand a policy on it: offbook train bc --data {data} --encoder {out} --out RUN",
    ]
    return Report(
        text="\n".join(filter(None, lines)),
        data={"run": str(out), "encoder": str(run.checkpoint()), "size": encoder.size, "seconds": seconds,
              "metrics": last},
    )  # fmt: skip
