"""How masked trajectory models are fitted, and what the reproduction does, from seconds to a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from offbook.data.returns import ReturnSpec
from offbook.learning.fit import FitConfig
from offbook.learning.hindsight_presets import decision_transformer
from offbook.learning.hindsight_presets import tiny as tiny_transformer
from offbook.learning.hindsight_training import HindsightConfig
from offbook.learning.masked_model import Sizes
from offbook.learning.masked_training import MtmConfig


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
    return MtmConfig(model=Sizes(dim=512, dropout=0.1), validate_every=20_000, fit=fit)


def official_model() -> MtmConfig:
    """The same with the authors' choices where ours are others: masks, statistics, returns, no change to tell."""
    paper = paper_model()
    return MtmConfig(
        model=paper.model, fit=paper.fit, validate_every=paper.validate_every, patterns=("auto",), mask_scope="batch",
        residual="none",
        statistics="official", returns=ReturnSpec(kind="mean", include_current=False, horizon=1_000),
    )  # fmt: skip


TRAINING: dict[str, Callable[[], MtmConfig]] = {
    "smoke": smoke_model,
    "tiny": tiny_model,
    "paper": paper_model,
    "official": official_model,
}
"""Presets of `offbook train mtm`."""


def _study_model() -> MtmConfig:
    fit = FitConfig(
        steps=1_500,
        batch_size=128,
        learning_rate=1e-3,
        weight_decay=5e-3,
        warmup=100,
        ema=0.99,
        device="cpu",
        threads=1,
    )
    return MtmConfig(fit=fit, validate_every=1_500)


def _transformer() -> HindsightConfig:
    """A Decision Transformer that aims at the best return of the recordings."""
    config = decision_transformer(tiny_transformer())
    fit = replace(config.fit, steps=1_000, warmup=100, device="cpu", threads=1)
    return replace(config, target=1.0, validate_every=1_000, fit=fit)


@dataclass(frozen=True, kw_only=True)
class MtmStudy:
    """What the reproduction does.

    Attributes:
        model: every masked trajectory model; specialists are fitted for as many steps on as many windows.
        maze: episodes of `pointmaze-mixed`.
        hopper: steps of `hopper-replay`.
        keep_actions: share of the episodes that keep their actions where the others lose them.
        patterns: what the ablation of masks compares.
        targets: shares of the range of returns that the best score may choose from; 1 is the fixed one.
        episodes: that each policy plays.
        transformer: a Decision Transformer.
        offline_steps: of the offline reinforcement learners.
        cartpole: episodes of slow random actions that the encoder for an agent learns from.
        agent_steps: of each agent that learns with it.
        looks: at each agent while it learns, after equal shares of its steps.
        encoder: its model.
        seeds: of everything that is trained.
        jobs: trainings at a time.
        judged: whether the limits, which are meant for the preset `tiny`, decide the verdicts.
    """

    model: MtmConfig = field(default_factory=_study_model)
    maze: int = 667
    hopper: int = 150_000
    keep_actions: float = 0.02
    patterns: tuple[str, ...] = ("auto", "random", "rcbc")
    targets: tuple[float, ...] = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
    episodes: int = 20
    transformer: HindsightConfig = field(default_factory=_transformer)
    offline_steps: int = 20_000
    cartpole: int = 60
    agent_steps: int = 8_000
    looks: int = 8
    encoder: Sizes = field(default_factory=lambda: Sizes(dim=64, encoder=1))
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 2
    judged: bool = True


def smoke() -> MtmStudy:
    """A minute or two on two cores: everything once, at sizes where the limits mean nothing."""
    fit = FitConfig(steps=20, batch_size=32, warmup=5, ema=0.9, log_every=10, device="cpu", threads=1)
    model = MtmConfig(model=Sizes(dim=32, heads=2, encoder=1), fit=fit, validate_every=20)
    single = _transformer()
    single = replace(single, fit=replace(single.fit, steps=10, batch_size=4, warmup=5))
    return MtmStudy(
        model=model, maze=20, hopper=1_200, keep_actions=0.2, patterns=("auto", "rcbc"), targets=(0.9, 1.0), episodes=2,
        transformer=single, offline_steps=50, cartpole=2, agent_steps=100, looks=1, seeds=(0,),
        encoder=Sizes(dim=16, heads=2, encoder=1),
        judged=False,
    )  # fmt: skip


def tiny() -> MtmStudy:
    """An hour or two on two cores: the table that is claimed."""
    return MtmStudy()


def paper() -> MtmStudy:
    """On a GPU: the same questions with the authors' network and schedule."""
    return MtmStudy(model=paper_model(), offline_steps=1_000_000, agent_steps=100_000, encoder=Sizes(dim=512), jobs=1)


PRESETS: dict[str, Callable[[], MtmStudy]] = {"smoke": smoke, "tiny": tiny, "paper": paper}
"""Presets of `offbook reproduce mtm`."""
