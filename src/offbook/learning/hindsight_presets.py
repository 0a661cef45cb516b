"""How networks that read their earlier trials are fitted, from seconds to a GPU; with one trial a chain as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from offbook.data.chains import TARGET
from offbook.learning.fit import FitConfig
from offbook.learning.hindsight import ACTION, STATE, HindsightSizes
from offbook.learning.hindsight_training import HindsightConfig


def smoke() -> HindsightConfig:
    """Seconds: shows that everything is wired, learns little."""
    fit = FitConfig(steps=60, batch_size=16, warmup=10, log_every=10, checkpoint_every=30, threads=1)
    return HindsightConfig(model=HindsightSizes(width=32, layers=1, heads=2), validate_every=30, fit=fit)


def tiny() -> HindsightConfig:
    """Minutes on two cores: 64 wide, 2 layers, one token a step, actions drawn from bins."""
    return HindsightConfig()


def paper() -> HindsightConfig:
    """On a GPU: 128 wide, 3 layers, 1 head, five tokens a step, 4 trials, batches of 64; the rest of table 5 is unread.

    The schedule is that of a replication, see `replication`.
    """
    sizes = HindsightSizes(width=128, layers=3, heads=1, dropout=0.1, tokens="split", head="mse")
    return HindsightConfig(n_trials=(4, 4), model=sizes, validate_every=5_000, fit=_replicated())


def replication() -> HindsightConfig:
    """On a GPU: what an independent replication found to work: 256 wide, 4 layers, 8 heads, the last trial's loss."""
    sizes = HindsightSizes(width=256, layers=4, heads=8, dropout=0.1, tokens="split", head="mse")
    return HindsightConfig(loss_trials="last", model=sizes, validate_every=5_000, fit=_replicated())


def _replicated() -> FitConfig:
    return FitConfig(
        steps=100_000, batch_size=64, learning_rate=1e-4, weight_decay=1e-4, warmup=10_000, clip_norm=0.25,
        schedule="constant", checkpoint_every=5_000, log_every=100,
    )  # fmt: skip


def decision_transformer(config: HindsightConfig) -> HindsightConfig:
    """The same with one trial a chain, its own return as the aim, and no rewards or marks of success to read."""
    sizes = replace(config.model, values=(TARGET, STATE, ACTION))
    return replace(config, n_trials=(1, 1), relabel="own", loss_trials="all", model=sizes)


TRAINING: dict[str, Callable[[], HindsightConfig]] = {
    "smoke": smoke,
    "tiny": tiny,
    "paper": paper,
    "replication": replication,
}
"""Presets of `offbook train agentic_transformer`."""

SINGLE: dict[str, Callable[[], HindsightConfig]] = {
    "smoke": lambda: decision_transformer(smoke()),
    "tiny": lambda: decision_transformer(tiny()),
    "paper": lambda: decision_transformer(paper()),
}
"""Presets of `offbook train dt`."""
