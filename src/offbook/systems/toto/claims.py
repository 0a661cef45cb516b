"""What was measured, as claims beside their limits, as a table and as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from offbook.errors import needs_extra
from offbook.evaluate.claims import against_all, as_metric, over_seeds, separation
from offbook.evaluate.figures import COLOURS, save_figure, tidy
from offbook.evaluate.rollout import Evaluation
from offbook.evaluate.stats import Interval, bounded_mean, paired_bootstrap, student_mean, unpaired_bootstrap
from offbook.runs.config import to_json
from offbook.runs.ledger import Claim, Dataset, Metric, Paper, Verdict
from offbook.systems.toto.presets import TotoStudy

Key = tuple[str, str, str, int]
"""Task, representation, policy, seed of the training. Of an anchor: its name twice, and 0."""
Found = Mapping[tuple[Key, str], Evaluation]

ANCHORS = ("expert", "random actions")
OWN = "end to end"
PLAIN = "BC, H=1"

_AXES = Paper(value="generalisation to unseen objects, positions and lighting is tested", table="abstract")
# Fixed beforehand: the four policies of the paper, cloning with chunks as on its robots.
_JUDGED = ("VINN", "IQL", "DT")
# A claim on methods is one on trainings: they are what is drawn independently.
_OVER = (
    "Judged by the intervals over the trainings' seeds, paired. All trainings meet the same episodes: what other ones "
    "might change is told by the intervals over episodes, which decide nothing."
)

Scores = Float64[np.ndarray, "seeds episodes"]


def _scores(study: TotoStudy, found: Found, task: str, representation: str, policy: str, split: str) -> Scores:
    """Fractions of the material in the right place, of each training and each episode."""
    return np.stack([found[(task, representation, policy, seed), split].values("score") for seed in study.seeds])


def _anchor(study: TotoStudy, found: Found, task: str, name: str, split: str) -> Float64[np.ndarray, " episodes"]:
    return found[(task, name, name, 0), split].values("score")


def _seen(study: TotoStudy, found: Found, task: str, representation: str, policy: str) -> Metric:
    means = _scores(study, found, task, representation, policy, study.splits[0]).mean(1)
    return over_seeds(f"{policy}, {representation}", means)


def _less(
    name: str, first: Scores, second: Scores | Float64[np.ndarray, " episodes"], *, higher: bool = True
) -> Metric:
    """Over seeds the difference of means: trainings of one seed share what it draws."""
    return over_seeds(name, first.mean(1) - second.mean(-1), higher=higher)


def _policies(found: Found, task: str, representation: str) -> list[str]:
    return list(dict.fromkeys(key[2] for key, _ in found if key[:2] == (task, representation)))


def anchors(study: TotoStudy, task: str, found: Found, data: Dataset) -> Claim:
    """Whether the task can be done, and not by chance."""
    scores = {name: _anchor(study, found, task, name, study.splits[0]) for name in ANCHORS}
    gap = paired_bootstrap(*scores.values())
    metrics = [as_metric("expert less random actions", gap)]
    metrics += [as_metric(name, bounded_mean(of, 0.0, 1.0)) for name, of in scores.items()]
    verdict: Verdict = "met" if gap.value >= 0.85 else "missed"
    return _claim(
        study, f"on {task} the expert's score is 0.85 or more above that of random actions", metrics, [], verdict, data,
        None, "Judged by the mean difference.",
    )  # fmt: skip


def cloning(study: TotoStudy, task: str, found: Found, data: Dataset) -> Claim:
    """What cloning reaches on arrangements like those that were recorded, on any representation."""
    tried = {
        (representation, policy): _seen(study, found, task, representation, policy)
        for representation in (*study.representations, OWN)
        for policy in _policies(found, task, representation)
    }
    cloned = {key: metric for key, metric in tried.items() if key[1].startswith("BC")}
    best, named = max(cloned, key=lambda key: cloned[key].value), (study.main, _chunked(study))
    chance = _anchor(study, found, task, ANCHORS[1], study.splits[0])
    scores = {key: _scores(study, found, task, *key, study.splits[0]) for key in (best, named)}
    gains = {key: _less(f"{cloned[key].name}, less random actions", of, chance) for key, of in scores.items()}
    above = separation(gains[best])
    missed = cloned[best].value < 0.6 or above == "contradicted"
    verdict: Verdict = "missed" if missed else "met" if above == "reproduced" else "not separated"
    shown = {key: cloned[key] for key in (best, named)} | cloned
    return _claim(
        study, f"on {task}, seen arrangements, the best of {len(cloned)} ways to clone scores 0.6 or more, and above "
        "random actions", [*shown.values(), *gains.values()],
        [metric for key, metric in tried.items() if key not in cloned], verdict, data, None,
        f"The best is {cloned[best].name}: the highest of {len(cloned)} means over seeds, which is biased upwards, for "
        f"the episodes that chose it judge it too. {cloned[named].name} was named beforehand and stands beside it. "
        "Differences are of each seed's mean to that of random actions on the same episodes; intervals over seeds.",
    )  # fmt: skip


def policies(study: TotoStudy, task: str, found: Found, data: Dataset) -> Claim:
    """What each policy is worth beside cloning one action at a time, on the same features and episodes."""
    names = _policies(found, task, study.main)
    scores = {name: _scores(study, found, task, study.main, name, study.splits[0]) for name in names}
    success = [over_seeds(f"success, {name}", (of > 0).mean(1)) for name, of in scores.items()]
    return _claim(
        study, f"on {task}, seen arrangements, {study.main} features: what policies score beside {PLAIN}",
        [_less(f"{name} less {PLAIN}", of, scores[PLAIN]) for name, of in scores.items() if name != PLAIN],
        [_seen(study, found, task, study.main, PLAIN), *success], "recorded", data, None,
        "Differences at each seed, of the same episodes; intervals over seeds. Success is a score above 0. "
        "AT is at its first trial, which in the chains that it learns from is the poorest.",
    )  # fmt: skip


def drops(study: TotoStudy, task: str, found: Found, data: Dataset) -> Claim:
    """What is lost where things are new, on one representation."""
    names, first, last = _policies(found, task, study.main), study.splits[0], study.splits[-1]
    scores = {
        (policy, split): _scores(study, found, task, study.main, policy, split)
        for policy in names for split in study.splits
    }  # fmt: skip
    gaps = {
        (policy, split): _less(f"{policy}, seen less {split}", scores[policy, first], of, higher=False)
        for (policy, split), of in scores.items() if split != first
    }  # fmt: skip
    judged = (_chunked(study), *_JUDGED)
    said = {policy: separation(gaps[policy, last]) for policy in judged}
    lost = [policy for policy in judged if said[policy] == "reproduced"]
    gained = [policy for policy in judged if said[policy] == "contradicted"]
    apart = [
        as_metric(
            f"{policy}, seen less {last}, over episodes",
            unpaired_bootstrap(scores[policy, first].mean(0), scores[policy, last].mean(0)), higher=False,
        )
        for policy in judged
    ]  # fmt: skip
    verdict: Verdict = "reproduced" if len(lost) >= 3 else "contradicted" if len(gained) >= 2 else "not separated"
    return _claim(
        study, f"on {task} policies on {study.main} features lose where all is new: 3 of {', '.join(judged)} or more",
        [*gaps.values(), *apart], [_seen(study, found, task, study.main, policy) for policy in names], verdict, data,
        _AXES, f"It is so for {', '.join(lost) or 'none'}: the interval of seen less {last} is above 0. {_OVER}",
    )  # fmt: skip


def _chunked(study: TotoStudy) -> str:
    """Cloning as on the paper's robots."""
    return f"BC, H={study.cloning.chunk}"


def seeing(study: TotoStudy, task: str, found: Found, data: Dataset) -> Claim:
    """Whether features learnt in the domain are worth more than untrained ones, over all policies on features."""
    policies = _policies(found, task, "random")
    means = {
        name: np.mean([_scores(study, found, task, name, policy, study.splits[0]) for policy in policies], 0)
        for name in study.representations
    }
    learnt = [name for name in means if name != "random"]
    gains = {name: _less(f"{name} less random", means[name], means["random"]) for name in learnt}
    verdict = against_all([separation(gains[name]) for name in ("byol", "moco")])
    episodes = [
        as_metric(f"{name} less random, over episodes", paired_bootstrap(means[name].mean(0), means["random"].mean(0)))
        for name in learnt
    ]
    return _claim(
        study, f"on {task}, seen arrangements, policies score higher on BYOL's and on MoCo's features than on those of "
        "an untrained network", [*gains.values(), *episodes],
        [over_seeds(f"mean of policies, {name}", of.mean(1)) for name, of in means.items()], verdict, data, None,
        f"Mean over {', '.join(policies)}. {_OVER}",
    )  # fmt: skip


def _claim(
    study: TotoStudy, text: str, metrics: Sequence[Metric], baseline: Sequence[Metric], verdict: Verdict, data: Dataset,
    paper: Paper | None, note: str,
) -> Claim:  # fmt: skip
    return Claim(
        system="toto", claim=text, metrics=tuple(metrics), baseline_metrics=tuple(baseline), seeds=study.seeds,
        verdict=verdict if study.judged else "recorded", config=to_json(study), paper=paper, data=(data,), note=note,
    )  # fmt: skip


def table(study: TotoStudy, found: Found) -> str:
    """Mean scores as Markdown: by policy and representation, and by policy and split, with 95% intervals.

    They are over the trainings' seeds, cut to what a score can be; an anchor's are over episodes.
    """
    lines = []
    for task in study.tasks:
        columns = (*study.representations, OWN)
        lines += [
            f"## {task}",
            "",
            f"Seen arrangements, {study.trials} episodes, by representation.",
            "",
            *_head(columns),
        ]
        for policy in _policies(found, task, study.main):
            cells = [_cell(study, found, task, representation, policy, study.splits[0]) for representation in columns]
            lines.append(f"| {policy} | {' | '.join(cells)} |")
        lines += ["", f"On {study.main} features, {study.trials} episodes a split, by what is new.", ""]
        lines += _head(study.splits)
        rows = [(study.main, policy) for policy in _policies(found, task, study.main)]
        for representation, policy in [*rows, *((name, name) for name in ANCHORS)]:
            cells = [_cell(study, found, task, representation, policy, split) for split in study.splits]
            lines.append(f"| {policy} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _head(columns: Sequence[str]) -> list[str]:
    return [f"| policy | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]


def _cell(study: TotoStudy, found: Found, task: str, representation: str, policy: str, split: str) -> str:
    mean = _mean(study, found, task, representation, policy, split)
    if mean is None:
        return ""
    ends = f" [{mean.low:.2f}, {mean.high:.2f}]" if np.isfinite(mean.low) else ""
    return f"{mean.value:.2f}{ends}"


def _mean(study: TotoStudy, found: Found, task: str, representation: str, policy: str, split: str) -> Interval | None:
    """The mean score with its interval, or None where it was not played."""
    if representation in ANCHORS:
        return bounded_mean(_anchor(study, found, task, policy, split), 0.0, 1.0)
    if ((task, representation, policy, study.seeds[0]), split) not in found:
        return None
    mean = student_mean(_scores(study, found, task, representation, policy, split).mean(1))
    # A single training tells of no interval.
    return mean if mean.n == 1 else replace(mean, low=max(mean.low, 0.0), high=min(mean.high, 1.0))


def draw(study: TotoStudy, path: Path, found: Found) -> None:
    """Draws for each task the scores by policy and representation as a field of numbers, and by split as dots."""
    with needs_extra("models"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 1.2 + 4.4 * len(study.tasks)), layout="constrained")
    panels = figure.subplots(len(study.tasks), 2, squeeze=False)
    for (left, right), task in zip(panels, study.tasks, strict=True):
        _draw_field(study, left, found, task)
        _draw_splits(study, right, found, task)
    handles, labels = panels[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), frameon=False, fontsize=9)
    counted = f"{study.trials} episodes, {len(study.seeds)} trainings"
    figure.suptitle(f"mean score, 0 to 1: {counted}, with 95% interval over them", fontsize=11)
    save_figure(path, figure)


def _draw_field(study: TotoStudy, axes: Any, found: Found, task: str) -> None:
    columns, rows = (*study.representations, OWN), _policies(found, task, study.main)
    means = [[_mean(study, found, task, column, row, study.splits[0]) for column in columns] for row in rows]
    values = np.array([[np.nan if mean is None else mean.value for mean in row] for row in means])
    # A little room above 1 keeps the darkest cells light enough to read.
    axes.imshow(values, vmin=0, vmax=1.25, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > 0.75 else "#222222"
        shown = f"{value:.2f}" if np.isfinite(value) else "-"
        axes.text(column, row, shown, ha="center", va="center", color=colour, fontsize=10)
    for edge in range(1, max(values.shape)):
        axes.axhline(edge - 0.5, color="white", linewidth=1.5)
        axes.axvline(edge - 0.5, color="white", linewidth=1.5)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{task}, seen arrangements, by representation", fontsize=10)


def _draw_splits(study: TotoStudy, axes: Any, found: Found, task: str) -> None:
    rows: list[tuple[str, str]] = [(study.main, policy) for policy in _policies(found, task, study.main)]
    rows += [(name, name) for name in ANCHORS]
    for place, (split, mark) in enumerate(zip(study.splits, itertools.cycle("osD^v"))):
        colour, beside = COLOURS[place % len(COLOURS)], 0.7 * ((place + 0.5) / len(study.splits) - 0.5)
        for row, (representation, policy) in enumerate(rows):
            mean = _mean(study, found, task, representation, policy, split)
            if mean is None:
                continue
            label = split if row == 0 else None
            axes.plot([mean.low, mean.high], [row + beside] * 2, color=colour, linewidth=1.2, alpha=0.5)
            axes.plot([mean.value], [row + beside], mark, color=colour, markersize=5, label=label)
    axes.axhline(len(rows) - len(ANCHORS) - 0.5, color="#bbbbbb", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [policy for _, policy in rows])
    axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5))
    tidy(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"{task}, on {study.main} features, by what is new", fontsize=10)
