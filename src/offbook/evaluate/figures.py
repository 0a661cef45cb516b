"""Pictures of results: what each policy did in each episode or trial, and its mean with the interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from offbook.errors import needs_extra
from offbook.evaluate.groups import Groups
from offbook.evaluate.rollout import Evaluation
from offbook.evaluate.stats import bootstrap_mean
from offbook.runs.directory import atomic_path

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
"""Those of Okabe and Ito, told apart by all."""

_SHOWN = ("score", "return", "success")


def tidy(axes: Any, grid: Literal["both", "x", "y"] = "both") -> None:
    """Takes away what a diagram does not need, and puts a light grid behind the rest."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def save_figure(path: Path, figure: Any) -> None:
    """Writes a figure of matplotlib as PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_evaluations(path: Path, evaluations: Sequence[Evaluation]) -> None:
    """Draws one panel for each known measure: a dot for each episode, beside it the mean with its 95% interval.

    Args:
        path: a PNG file, replaced atomically.
        evaluations: one or more, of the same task.
    """
    with needs_extra("models"):
        from matplotlib.figure import Figure
    shown = [name for name in _SHOWN if all(name in evaluation.summary for evaluation in evaluations)]
    # A score and a return that always agree are one thing to look at.
    if "score" in shown and all(np.array_equal(e.values("score"), e.values("return")) for e in evaluations):
        shown.remove("return")
    figure = Figure(figsize=(1.5 + 3.2 * len(shown), 1.6 + 0.7 * len(evaluations)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    spread = np.random.default_rng(0)
    for axes, name in zip(panels, shown, strict=True):
        for row, evaluation in enumerate(evaluations):
            colour, interval = COLOURS[row % len(COLOURS)], evaluation.summary[name]
            values = evaluation.values(name)
            heights = row + spread.uniform(0.12, 0.38, len(values))
            axes.scatter(values, heights, s=9, color=colour, alpha=0.35, linewidths=0)
            ends = [interval.low, interval.high] if np.isfinite(interval.low) else [interval.value] * 2
            axes.plot(ends, [row, row], color=colour, linewidth=3, solid_capstyle="round")
            axes.plot([interval.value], [row], "o", color=colour, markeredgecolor="white", markersize=8)
        axes.set(xlabel=name, ylim=(len(evaluations) - 0.4, -0.4))
        axes.set_yticks(range(len(evaluations)), [evaluation.policy for evaluation in evaluations])
        tidy(axes, "x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    count = len(evaluations[0].results)
    figure.suptitle(f"{evaluations[0].environment}, {count} episodes each, mean with 95% interval", fontsize=10)
    save_figure(path, figure)


def draw_groups(path: Path, groups: Mapping[str, Groups]) -> None:
    """Draws the mean return by the number of the trial, with a 95% band; hollow is the last one after foreign trials.

    Args:
        path: a PNG file, replaced atomically.
        groups: of one task, by the name that is shown.
    """
    with needs_extra("models"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(6.5, 4.4), layout="constrained")
    axes = figure.subplots()
    most, beside = max(some.trials for some in groups.values()), 0.0
    for place, (name, some) in enumerate(groups.items()):
        colour, numbers = COLOURS[place % len(COLOURS)], np.arange(1, some.trials + 1)
        means = [bootstrap_mean(column) for column in some.returns.T]
        axes.plot(numbers, [mean.value for mean in means], "o-", color=colour, markersize=7, label=name)
        if np.isfinite(means[0].low):
            low, high = [mean.low for mean in means], [mean.high for mean in means]
            axes.fill_between(numbers, low, high, color=colour, alpha=0.16, linewidth=0)
        if some.foreign is not None:
            # Side by side at the right of the last trials, so that none hides another.
            beside += 0.03 * most
            at, foreign = some.trials + beside, bootstrap_mean(some.foreign)
            axes.plot([some.trials, at], [means[-1].value, foreign.value], ":", color=colour, linewidth=1.2)
            if np.isfinite(foreign.low):
                axes.plot([at, at], [foreign.low, foreign.high], color=colour, linewidth=1.8)
            axes.plot([at], [foreign.value], "o", color=colour, markerfacecolor="white", markersize=7)
    if beside:
        label = "last trial after another group's trials"
        axes.plot([], [], "o", color="#555555", markerfacecolor="white", markersize=7, label=label)
    axes.set(xlabel="trial", ylabel="return", xticks=range(1, most + 1))
    tidy(axes, "y")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    some = next(iter(groups.values()))
    figure.suptitle(f"{some.environment}, mean over groups (n={len(some.seeds)}) with 95% band", fontsize=10)
    save_figure(path, figure)
