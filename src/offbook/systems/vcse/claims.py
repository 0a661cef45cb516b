"""What the curves of agents say, as claims, as a table, and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from offbook.errors import needs_extra
from offbook.evaluate.claims import against_all, over_seeds, separation
from offbook.evaluate.figures import COLOURS, save_figure, tidy
from offbook.runs.config import to_json
from offbook.runs.ledger import Claim, Metric, Paper, Verdict
from offbook.systems.vcse.agents import ARMS, ENTROPY, HIDDEN, OURS, PLAIN
from offbook.systems.vcse.experiments import Curve, Life
from offbook.systems.vcse.presets import Task, VcseStudy

Curves = Mapping[Life, Curve]

_BEATEN = (PLAIN, ENTROPY)
_AHEAD = "Ahead or behind where the interval of the difference over seeds, paired, excludes 0."
_OTHERS = tuple(arm for arm in ARMS if arm != OURS)
_FASTER = Paper(value="faster than without a bonus, and than with state entropy", table="abstract; learning curves")
# What can be read of these tasks in figures is of a later paper, which has the method as a baseline; unchecked here.
_LATER = "arXiv:2410.06621, tables 1 and 2, at second hand"
_PAPERS = {
    "DoorKey-6x6": Paper(value="success 92.7 % plain, 93.2 % state entropy, 94.1 % VCSE", table=_LATER),
    "DoorKey-8x8": Paper(value="success 72.6 % state entropy, 94.3 % VCSE", table=_LATER),
    "pendulum-swingup": Paper(value="DrQ-v2: 424 plain, 10.8 state entropy, 824 VCSE", table=_LATER),
    "cheetah-run": Paper(value="DrQ-v2: 229 plain, 229 state entropy, 456 VCSE", table=_LATER),
    "hopper-stand": Paper(value="DrQ-v2: 87.6 plain, 313 state entropy, 711 VCSE", table=_LATER),
    "quadruped-walk": Paper(value="DrQ-v2: 290 plain, 290 state entropy, 244 VCSE", table=_LATER),
    "cartpole-balance": Paper(value="DrQ-v2: 999 plain, 994 state entropy, 999 VCSE", table=_LATER),
    "cartpole-swingup": Paper(value="DrQ-v2: 220 state entropy, 708 VCSE", table=_LATER),
}


def task(study: VcseStudy, of: Task, curves: Curves) -> Claim:
    """The mean return over a life, with VCSE and with each other arm, of one task."""
    gains = {other: _gain(curves, of, other) for other in _OTHERS}
    areas = {arm: over_seeds(f"mean return, {arm}", _values(curves, of, arm, _area)) for arm in ARMS}
    ends = {arm: over_seeds(f"{_last(of)} at the end, {arm}", _values(curves, of, arm, _end)) for arm in ARMS}
    said = [separation(gains[other]) for other in _BEATEN]
    loses = [other for other in _OTHERS if separation(gains[other]) == "contradicted"]
    note = "Judged by the intervals of both differences, over seeds, paired."
    note += f" VCSE loses to: {', '.join(loses)}." if loses else ""
    return Claim(
        system="vcse",
        claim=f"on {of.short} {of.agent} gets more return over its life of {of.steps:,} steps with VCSE "
        "than without a bonus, and than with state entropy",
        metrics=(*gains.values(), areas[OURS], ends[OURS]),
        baseline_metrics=(*(areas[other] for other in _OTHERS), *(ends[other] for other in _OTHERS)),
        seeds=study.seeds, verdict=_judged(study, against_all(said)), config=to_json(study),
        paper=_PAPERS.get(of.short, _FASTER), note=note,
    )  # fmt: skip


def together(study: VcseStudy, curves: Curves) -> Claim:
    """On how many grid worlds VCSE is ahead; the limit is two thirds of them, against both."""
    grids = [of for of in study.tasks if of.algorithm == "a2c"]
    found = [_counted(curves, grids, other, "grid worlds") for other in _BEATEN]
    least = _most(grids)
    return Claim(
        system="vcse",
        claim=f"in {least} of {len(grids)} grid worlds A2C gets more return over its life with VCSE than without a "
        f"bonus, and in {least} than with state entropy",
        metrics=tuple(metric for metrics, _ in found for metric in metrics), seeds=study.seeds,
        verdict=_judged(study, against_all([said for _, said in found])), config=to_json(study), paper=_FASTER,
        note=_AHEAD,
    )  # fmt: skip


def conditioning(study: VcseStudy, curves: Curves) -> Claim:
    """Whether the values are what VCSE is ahead by: on how many tasks it beats itself without them."""
    metrics, said = _counted(curves, study.tasks, HIDDEN, "tasks")
    gains = tuple(replace(_gain(curves, of, HIDDEN), name=f"{of.short}, {OURS} less {HIDDEN}") for of in study.tasks)
    return Claim(
        system="vcse",
        claim=f"on {_most(study.tasks)} of {len(study.tasks)} tasks agents get more return over their lives with VCSE "
        "than with the same bonus for which all values are equal",
        metrics=(*metrics, *gains), seeds=study.seeds, verdict=_judged(study, said), config=to_json(study),
        note=_AHEAD,
    )  # fmt: skip


def _most(tasks: Sequence[Task]) -> int:
    """Two thirds of them."""
    return -(-2 * len(tasks) // 3)


def _counted(curves: Curves, tasks: Sequence[Task], other: str, called: str) -> tuple[tuple[Metric, Metric], Verdict]:
    """On how many tasks VCSE is ahead of another arm and behind it, and whether that is most of them."""
    verdicts = [separation(_gain(curves, of, other)) for of in tasks]
    ahead, behind = verdicts.count("reproduced"), verdicts.count("contradicted")
    metrics = (
        Metric(name=f"{called} ahead of {other}", value=ahead, higher_is_better=True),
        Metric(name=f"{called} behind {other}", value=behind, higher_is_better=False),
    )
    least = _most(tasks)
    return metrics, "reproduced" if ahead >= least else "contradicted" if behind >= least else "not separated"


def table(study: VcseStudy, curves: Curves) -> str:
    """Every arm on every task as Markdown, and what VCSE gains over it; 95% intervals over seeds."""
    words: dict[Verdict, str] = {"reproduced": "wins", "contradicted": "loses", "not separated": "-"}
    lines = [
        "| task | arm | mean return over its life | return at the end | success at the end | VCSE less it | VCSE |",
        "|---|---|---|---|---|---|---|",
    ]
    for of in study.tasks:
        for arm in ARMS:
            measures = [_area, lambda curve: curve.returns[-1]] + ([_end] if _last(of) == "success" else [])
            cells = [_cell(over_seeds("", _values(curves, of, arm, measure))) for measure in measures]
            gain = None if arm == OURS else _gain(curves, of, arm)
            judged = words[separation(gain)] if gain and study.judged else ""
            row = [of.short, arm, *cells, *[""] * (3 - len(cells)), _cell(gain) if gain else "", judged]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def draw(study: VcseStudy, path: Path, curves: Curves) -> None:
    """Draws the returns of each task, below them its successes where it knows any: thin for a seed, thick for all."""
    with needs_extra("models"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(3.9 * len(study.tasks), 6.6), layout="constrained")
    panels = figure.subplots(2, len(study.tasks), squeeze=False)
    for (upper, lower), of in zip(panels.T, study.tasks, strict=True):
        upper.set_title(f"{of.short}, {of.agent}")
        _panel(upper, curves, of, "returns")
        if _last(of) == "success":
            _panel(lower, curves, of, "successes")
        else:
            lower.set_axis_off()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(ARMS), frameon=False)
    save_figure(path, figure)


def _panel(axes: Any, curves: Curves, of: Task, measure: Literal["returns", "successes"]) -> None:
    for colour, arm in zip(COLOURS, ARMS, strict=False):
        found = {life: getattr(curve, measure) for life, curve in curves.items() if (life.task, life.arm) == (of, arm)}
        steps = next(iter(found)).steps
        for each in found.values():
            axes.plot(steps, each, color=colour, alpha=0.25, linewidth=0.8)
        mean = np.mean([*found.values()], axis=0)
        axes.plot(steps, mean, color=colour, linewidth=2, label=arm, zorder=3 if arm == OURS else 2)
    axes.set(xlabel="steps", ylabel="return" if measure == "returns" else "share of successes")
    axes.xaxis.get_major_locator().set_params(nbins=5)
    tidy(axes)


def _values(curves: Curves, of: Task, arm: str, measure: Callable[[Curve], float]) -> list[float]:
    """A measure of the agents of one arm, in the order of their seeds."""
    found = {life.seed: measure(curve) for life, curve in curves.items() if (life.task, life.arm) == (of, arm)}
    return [found[seed] for seed in sorted(found)]


def _gain(curves: Curves, of: Task, other: str) -> Metric:
    ours, theirs = (_values(curves, of, arm, _area) for arm in (OURS, other))
    return over_seeds(f"mean return, {OURS} less {other}", [a - b for a, b in zip(ours, theirs, strict=True)])


def _area(curve: Curve) -> float:
    return curve.area


def _end(curve: Curve) -> float:
    """Success at the last look, or the return where the task knows no success."""
    return (curve.successes or curve.returns)[-1]


def _last(of: Task) -> str:
    return "success" if of.succeeds else "return"


def _judged(study: VcseStudy, verdict: Verdict) -> Verdict:
    """A look that is too short to judge by is recorded alone."""
    return verdict if study.judged else "recorded"


def _cell(metric: Metric) -> str:
    ends = f" [{metric.interval[0]:.3g}, {metric.interval[1]:.3g}]" if metric.interval else ""
    return f"{metric.value:.3g}{ends}"
