"""What the measurements say: claims beside their limits, and a picture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from offbook.errors import needs_extra
from offbook.models.blockwise.audit import LIMITS, Result
from offbook.runs.benchmark import median_metric
from offbook.runs.config import to_json
from offbook.runs.directory import atomic_path
from offbook.runs.ledger import Claim, Dataset, Metric, Paper, Verdict
from offbook.systems.bpt.measure import Longest
from offbook.systems.bpt.presets import BptConfig

_COLOURS = ("#000000", "#d55e00", "#56b4e9", "#0072b2", "#009e73", "#cc79a7")  # Okabe and Ito's, told apart by all
_MARKS = "sov^DX"
_SAME_MODEL = Paper(value="the same model", table="section 3")
_LONGER = Paper(value="up to 32 times vanilla, 2 to 4 times memory-efficient attention", table="abstract")


@dataclass(frozen=True)
class _Figure:
    """A number, and the least or most that it should be; none where it is only told."""

    metric: Metric
    limit: float | None = None

    @property
    def holds(self) -> bool:
        if self.limit is None:
            return True
        return self.metric.value >= self.limit if self.metric.higher_is_better else self.metric.value <= self.limit


def contexts(config: BptConfig, found: Mapping[str, Longest]) -> Claim:
    """How long a context fits the budget, against the ordinary ways."""
    limits = {("layer", "vanilla"): 25, ("layer", "SDPA"): 2.3, ("offload", "vanilla"): 32, ("offload", "SDPA"): 3.1}
    others = dict.fromkeys((("attn", "SDPA"), ("segments", "SDPA")))
    figures = [_times(found, name, base, limit) for (name, base), limit in {**limits, **others}.items()]
    text = "a layer that computes again takes 25 times the context of vanilla attention and 2.3 times that of SDPA"
    return _claim(config, f"{_where(config)}, {text}, with offload 32 and 3.1 times",
                  [*figures, *_growth(config, found)], _tokens(found), _LONGER)  # fmt: skip


def depth(config: BptConfig, found: Mapping[str, Longest], layers: int) -> Claim:
    """The same for a deeper transformer, where what layers keep is most of it."""
    base, *ours = found
    figures = [_times(found, name, base, 4 if name.startswith("offload") else None) for name in ours]
    text = "with offload a step takes 4 times the context of SDPA"
    return _claim(config, f"{_where(config, layers)}, {text}", [*figures, *_growth(config, found)], _tokens(found))


def vocabulary(config: BptConfig, found: Mapping[str, Longest]) -> Claim:
    """The same with a vocabulary whose logits are most of it."""
    full, chunked, ours = found
    figures = [_times(found, ours, full, 8), _times(found, ours, chunked)]
    text = f"with a vocabulary of {config.large_vocabulary}, a step takes 8 times the context of SDPA with all logits"
    return _claim(config, f"{_where(config)}, {text}", figures, _tokens(found))


def time(config: BptConfig, seconds: Mapping[tuple[str, int], Sequence[float]]) -> Claim:
    """What a step's time is, as a share of that of checkpointed SDPA, pair by pair."""
    limits = {("attn", 8_192): 0.90, ("layer", 8_192): 1.10, ("attn", 32_768): 0.82}
    figures = []
    for (name, tokens), mine in seconds.items():
        if name != "SDPA":
            shares = [one / other for one, other in zip(mine, seconds["SDPA", tokens], strict=True)]
            metric = median_metric(f"{name} to SDPA, {tokens} tokens", shares)
            figures.append(_Figure(metric, limits.get((name, tokens))))
    baseline = [median_metric(f"SDPA, {tokens} tokens, {layers} layers", seconds["SDPA", tokens], unit="s")
                for tokens, layers in config.timed]  # fmt: skip
    text = "a step takes at most 0.9 (attn), 1.1 (layer) of SDPA's time at 8192 tokens, 0.82 (attn, 1 layer) at 32768"
    return _claim(config, text, figures, baseline)


def planner(config: BptConfig, worst: Mapping[str, float]) -> Claim:
    """How far the planner is off measured memory."""
    figures = [_Figure(Metric(name=f"worst, {way}", value=off, higher_is_better=False), 0.1)
               for way, off in worst.items()]  # fmt: skip
    points = len(config.grid) * len(worst)
    return _claim(config, f"the planner is within a tenth of the measured memory at each of {points} points", figures)


def gradients(config: BptConfig, audited: Mapping[int, Sequence[Result]]) -> Claim:
    """How far outputs and gradients are off a transformer written from the equations."""
    figures = []
    for dtype, limit in LIMITS.items():
        for seed, results in audited.items():
            # NumPy's largest of numbers and of no number is no number, which no limit holds.
            worst = float(np.max([result.error for result in results if result.dtype == dtype]))
            name = f"largest error, {str(dtype).removeprefix('torch.')}, seed {seed}"
            figures.append(_Figure(Metric(name=name, value=worst, higher_is_better=False), limit))
    text = f"outputs and gradients of {config.shapes} random transformers a seed are within 2e-6 in float32"
    return _claim(config, f"{text}, 1e-11 in float64", figures, paper=_SAME_MODEL)


def losses(config: BptConfig, curves: Mapping[str, Sequence[Sequence[float]]], text: bytes) -> Claim:
    """How far the losses of a short training are off those of vanilla attention, by arm, seed and step."""
    true = np.array(curves["vanilla"])
    figures = []
    for name, mine in curves.items():
        if name != "vanilla":
            off = float((np.abs(np.array(mine) - true) / true).max())
            metric = Metric(name=f"largest difference, {name}", value=off, higher_is_better=False)
            figures.append(_Figure(metric, 1e-5))
    ends = [Metric(name=f"loss, {which} step, seed {seed}", value=float(curve[place]))
            for seed, curve in zip(config.seeds, true, strict=True)
            for which, place in (("first", 0), ("last", -1))]  # fmt: skip
    data = Dataset(name="source of Python's argparse", sha256=hashlib.sha256(text).hexdigest(), episodes=1)
    claim = f"the losses of {config.fit.steps} steps of training are those of vanilla attention to 1e-5"
    return replace(_claim(config, claim, figures, ends, _SAME_MODEL), data=(data,))


def _where(config: BptConfig, layers: int = 0) -> str:
    backbone = config.step.backbone
    return f"in {config.budget / 2**30:.3g} GiB, {layers or backbone.layers} layers of width {backbone.dim}"


def _times(found: Mapping[str, Longest], name: str, base: str, limit: float | None = None) -> _Figure:
    value = found[name].tokens / max(1, found[base].tokens)
    return _Figure(Metric(name=f"{name} to {base}", value=value, higher_is_better=True), limit)


def _growth(config: BptConfig, found: Mapping[str, Longest]) -> list[_Figure]:
    vector = config.step.backbone.dim * (2 if config.step.dtype == "bfloat16" else 4)
    unit = "d-vectors/token"
    return [_Figure(Metric(name=f"growth, {name}", value=one.growth / vector, unit=unit, higher_is_better=False))
            for name, one in found.items()]  # fmt: skip


def _tokens(found: Mapping[str, Longest]) -> list[Metric]:
    return [Metric(name=name, value=one.tokens, unit="tokens", higher_is_better=True) for name, one in found.items()]


def _claim(
    config: BptConfig,
    text: str,
    figures: Sequence[_Figure],
    baseline: Sequence[Metric] = (),
    paper: Paper | None = None,
) -> Claim:
    verdict: Verdict = "recorded"
    if config.judged:
        held = all(figure.holds for figure in figures)
        verdict = ("met" if held else "missed") if paper is None else ("reproduced" if held else "contradicted")
    return Claim(
        system="bpt",
        claim=text,
        metrics=tuple(figure.metric for figure in figures),
        baseline_metrics=tuple(baseline),
        seeds=config.seeds,
        verdict=verdict,
        config=to_json(config),
        paper=paper,
    )


def draw_contexts(path: Path, found: Mapping[str, Longest], budget: int) -> None:
    """Draws what steps took over their tokens, a line for each arm, and the budget.

    Args:
        path: a PNG file, replaced atomically.
        found: by the names of the arms.
        budget: in bytes.
    """
    with needs_extra("models"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import StrMethodFormatter
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(budget / 2**20, color="#888888", linewidth=1, linestyle="--")
    for number, (name, one) in enumerate(found.items()):
        tokens, sizes = zip(*one.points, strict=True)
        colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
        label = f"{name}: {one.tokens:,}"
        axes.plot(tokens, [size / 2**20 for size in sizes], color=colour, marker=mark, markersize=5, label=label)
    axes.set(xlabel="tokens", ylabel="memory of a training step, MiB")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(title=f"longest context in {budget / 2**20:,.0f} MiB", frameon=False, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
