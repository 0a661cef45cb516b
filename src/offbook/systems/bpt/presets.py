"""What the reproduction measures, at three sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from offbook.learning.fit import FitConfig
from offbook.models.blockwise import BackboneConfig
from offbook.systems.bpt.measure import Step


@dataclass(frozen=True, kw_only=True)
class BptConfig:
    """What is measured.

    Attributes:
        step: the transformer, the vocabulary and where it runs; its tokens and arm say nothing.
        budget: bytes by which a training step may let the process grow.
        starts: two lengths between which growth is measured; half of them for vanilla attention.
        computed: tokens beyond which flash attention is allocated and not computed where memory is measured.
        depths: layers of the deeper transformers.
        large_vocabulary: of the large head.
        timed: lengths and layers whose time is taken.
        repeats: rounds of it, each arm once in each.
        grid: tokens and layers at which the planner is held against measurements, for each way to spend memory.
        shapes: random backbones that the audit compares, for each seed.
        fit: the short training whose loss must not depend on the arm.
        fit_tokens: of its sequences.
        seeds: of the audit and of the short training.
        jobs: measurements of memory at a time.
        tries: measurements of an arm after the first two.
        judged: whether the limits, which are meant for the preset `tiny`, decide the verdicts.
    """

    step: Step = field(default_factory=Step)
    budget: int = 2 << 30
    starts: tuple[int, int] = (8_192, 16_384)
    computed: int = 8_192
    depths: tuple[int, ...] = (12, 24)
    large_vocabulary: int = 32_768
    timed: tuple[tuple[int, int], ...] = ((8_192, 4), (32_768, 1))
    repeats: int = 5
    grid: tuple[tuple[int, int], ...] = ((2_048, 2), (2_048, 12), (6_144, 6), (16_384, 2), (16_384, 12))
    shapes: int = 200
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=20, warmup=5, log_every=1, device="cpu", threads=1))
    fit_tokens: int = 1_280
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 2
    tries: int = 8
    judged: bool = True


def smoke() -> BptConfig:
    """Under a minute on two cores: everything once, at lengths where the limits mean nothing."""
    return BptConfig(
        step=Step(backbone=BackboneConfig(dim=64, layers=2, heads=2, block_q=128, block_k=256, block_ffn=128)),
        budget=24 << 20,
        starts=(1_024, 2_048),
        computed=2_048,
        depths=(3,),
        large_vocabulary=4_096,
        timed=((512, 2),),
        repeats=1,
        grid=((2_048, 2),),
        shapes=3,
        fit=FitConfig(steps=3, warmup=1, log_every=1, device="cpu", threads=1),
        fit_tokens=128,
        seeds=(0,),
        tries=0,
        judged=False,
    )


def tiny() -> BptConfig:
    """About an hour on two cores: the table that is claimed, for a budget of 2 GiB and a width of 256."""
    return BptConfig()


def paper() -> BptConfig:
    """On a GPU: the authors' 1b model in bfloat16 (`bpt/model.py`: d 2048, 24 layers, 16 heads, V 50432).

    The budget is small, because attention beyond some 300,000 tokens takes minutes a step; the planner and the audit
    are those of `tiny`, on the processor.
    """
    backbone = BackboneConfig(dim=2_048, layers=24, heads=16)
    return BptConfig(
        step=Step(backbone=backbone, vocabulary=50_432, device="cuda", dtype="bfloat16"),
        budget=8 << 30,
        starts=(8_192, 16_384),
        computed=1 << 30,
        depths=(32,),
        large_vocabulary=131_072,
        jobs=1,
        judged=False,
    )


PRESETS: dict[str, Callable[[], BptConfig]] = {"smoke": smoke, "tiny": tiny, "paper": paper}
