"""How masked trajectory models are fitted, from seconds to a GPU."""

from __future__ import annotations

from collections.abc import Callable

from offbook.data.returns import ReturnSpec
from offbook.learning.fit import FitConfig
from offbook.systems.mtm.model import Sizes
from offbook.systems.mtm.train import MtmConfig


def smoke_model() -> MtmConfig:
    """Seconds: shows that everything is wired, learns little."""
    fit = FitConfig(steps=60, batch_size=64, warmup=10, ema=0.9, log_every=10, checkpoint_every=30, threads=1)
    return MtmConfig(model=Sizes(dim=32, heads=2, encoder=1), validate_every=30, fit=fit)


def tiny_model() -> MtmConfig:
    """Minutes on two cores: 128 wide, 2 + 1 layers, windows of 4 steps, 3,000 steps of 256 windows."""
    return MtmConfig()


def paper_model() -> MtmConfig:
    """On a GPU: the authors' size and schedule for D4RL (`config.yaml` and `exp_mtm/d4rl_cont.yaml` of their code)."""
    fit = FitConfig(
        steps=140_010, batch_size=2_048, learning_rate=1e-4, weight_decay=5e-3, warmup=40_000, clip_norm=0.0,
        checkpoint_every=5_000, log_every=100,
    )  # fmt: skip
    return MtmConfig(model=Sizes(dim=512), validate_every=20_000, fit=fit)


def official_model() -> MtmConfig:
    """The same with the authors' choices where ours are others: masks, statistics, returns, no change to tell."""
    paper = paper_model()
    return MtmConfig(
        model=paper.model, fit=paper.fit, validate_every=paper.validate_every, mask_scope="batch", residual="none",
        statistics="official", returns=ReturnSpec(kind="mean", include_current=False, horizon=1_000),
    )  # fmt: skip


TRAINING: dict[str, Callable[[], MtmConfig]] = {
    "smoke": smoke_model,
    "tiny": tiny_model,
    "paper": paper_model,
    "official": official_model,
}
"""Presets of `offbook train mtm`."""
