"""What the reproduction does, from seconds to a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from offbook.learning.fit import FitConfig
from offbook.learning.hindsight import HindsightSizes
from offbook.learning.hindsight_presets import paper as paper_policy
from offbook.learning.hindsight_training import HindsightConfig


def _policy(steps: int, batch: int) -> HindsightConfig:
    fit = FitConfig(
        steps=steps, batch_size=batch, learning_rate=3e-3, weight_decay=1e-4, warmup=steps // 10, clip_norm=0.25,
        device="cpu", threads=1,
    )  # fmt: skip
    return HindsightConfig(n_trials=(4, 4), validate_every=steps, fit=fit)


@dataclass(frozen=True, kw_only=True)
class AtStudy:
    """What the reproduction does.

    Attributes:
        point: a network for the point in the dark, with chains of `trials`; single trials are drawn `trials` times as
            often, so that all learn from equally many steps.
        hopper: likewise for the hopper.
        goals: instances of `darkpoint` and of `darkpoint-fixed`, each with 16 trials.
        hopper_steps: of `hopper-replay`.
        trials: in a group, in chains and in the test.
        groups: in the test.
        hidden_groups: in the test where the goal is hidden, where single trials tell little.
        fresh: further trials of each group that know nothing of one another, to tell what luck makes of the maximum.
        widths: of the networks in the size trend.
        offline_steps: of the other offline learners on the hopper.
        long: trials of the long chain, and the steps of each.
        budget: bytes in which that chain is to be trained.
        seeds: of everything that is trained.
        jobs: trainings at a time.
        judged: whether the limits, which are meant for the preset `tiny`, decide the verdicts.
    """

    point: HindsightConfig = field(default_factory=lambda: replace(_policy(500, 48), group="seed"))
    hopper: HindsightConfig = field(default_factory=lambda: _policy(400, 16))
    goals: int = 2_000
    hopper_steps: int = 150_000
    trials: int = 4
    groups: int = 64
    hidden_groups: int = 256
    fresh: int = 16
    widths: tuple[int, ...] = (32, 64, 128)
    offline_steps: int = 20_000
    long: tuple[int, int] = (128, 64)
    budget: int = 1 << 30
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 2
    judged: bool = True


def smoke() -> AtStudy:
    """A minute or two on two cores: everything once, at sizes where the limits mean nothing."""
    model = HindsightSizes(width=16, layers=1, heads=2)
    point, hopper = (replace(_policy(10, 4), model=model) for _ in range(2))
    return AtStudy(
        point=replace(point, group="seed"), hopper=hopper, goals=20, hopper_steps=1_200, groups=4, hidden_groups=4,
        fresh=4, widths=(8, 16), offline_steps=20, long=(8, 16), seeds=(0,), judged=False,
    )  # fmt: skip


def tiny() -> AtStudy:
    """About 50 minutes on two cores: the table that is claimed."""
    return AtStudy()


def paper() -> AtStudy:
    """On a GPU: the same questions with the paper's network."""
    policy = replace(paper_policy(), fit=replace(paper_policy().fit, device="auto"))
    return AtStudy(point=replace(policy, group="seed"), hopper=policy, groups=256, offline_steps=1_000_000, jobs=1)


PRESETS: dict[str, Callable[[], AtStudy]] = {"smoke": smoke, "tiny": tiny, "paper": paper}
"""Presets of `offbook reproduce agentic_transformer`."""
