"""What was measured, as claims beside their limits, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from offbook.errors import needs_extra
from offbook.evaluate.claims import as_metric, over_seeds
from offbook.evaluate.figures import COLOURS, save_figure, tidy
from offbook.evaluate.rollout import Evaluation
from offbook.evaluate.stats import Interval, bootstrap_mean, bounded_mean, paired_bootstrap
from offbook.runs.config import to_json
from offbook.runs.ledger import Claim, Dataset, Metric, Paper, Verdict
from offbook.systems.toto.presets import TotoStudy

Key = tuple[str, str, str, int]
"""Task, representation, policy, seed of the training. Of an anchor: its name twice, and 0."""
Found = Mapping[tuple[Key, str], Evaluation]

ANCHORS = ("expert", "random actions")
OWN = "end to end"

_AXES = Paper(value="generalisation to unseen objects, positions and lighting is tested", table="abstract")
# Fixed beforehand: the four policies of the paper, cloning with chunks as on its robots.
_JUDGED = ("VINN", "IQL", "DT")


def _scores(
    study: TotoStudy, found: Found, task: str, representation: str, policy: str, split: str
) -> Float64[np.ndarray, "seeds episodes"]:
    """Fractions of the material in the right place, of each training and each episode."""
    return np.stack([found[(task, representation, policy, seed), split].values("score") for seed in study.seeds])


def _seen(study: TotoStudy, found: Found, task: str, representation: str, policy: str) -> Metric:
    means = _scores(study, found, task, representation, policy, study.splits[0]).mean(1)
    return over_seeds(f"{policy}, {representation}", means)


def _policies(found: Found, task: str, representation: str) -> list[str]:
    return list(dict.fromkeys(key[2] for key, _ in found if key[:2] == (task, representation)))


def anchors(study: TotoStudy, task: str, found: Found, data: Dataset) -> Claim:
    """Whether the task can be done, and not by chance."""
    scores = {name: found[(task, name, name, 0), study.splits[0]].values("score") for name in ANCHORS}
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
    cloned = [metric for (_, policy), metric in tried.items() if policy.startswith("BC")]
    best = max(cloned, key=lambda metric: metric.value)
    others = [metric for (_, policy), metric in tried.items() if not policy.startswith("BC")]
    verdict: Verdict = "met" if best.value >= 0.6 else "missed"
    return _claim(
        study, f"on {task}, seen arrangements, the best of {len(cloned)} ways to clone scores 0.6 or more", cloned,
        others, verdict, data, None, f"The best is {best.name}: the highest of {len(cloned)} means over seeds.",
    )  # fmt: skip


def drops(study: TotoStudy, task: str, found: Found, data: Dataset) -> Claim:
    """What is lost where things are new, on one representation."""
    judged = (f"BC, H={study.cloning.chunk}", *_JUDGED)
    gaps = {
        (policy, split): _gap(study, found, task, policy, split)
        for policy in _policies(found, task, study.main) for split in study.splits[1:]
        if ((task, study.main, policy, study.seeds[0]), split) in found
    }  # fmt: skip
    last = study.splits[-1]
    lost = [policy for policy in judged if gaps[policy, last].low > 0]
    metrics = [as_metric(f"{policy}, seen less {split}", gap, higher=False) for (policy, split), gap in gaps.items()]
    verdict: Verdict = "reproduced" if len(lost) >= 3 else "contradicted"
    return _claim(
        study, f"on {task} policies on {study.main} features lose where all is new: 3 of {', '.join(judged)} or more",
        metrics, [_seen(study, found, task, study.main, policy) for policy in _policies(found, task, study.main)],
        verdict, data, _AXES,
        f"It is so for {', '.join(lost) or 'none'}: the interval of seen less {last} is above 0. Differences of the "
        "same episode, averaged over the trainings' seeds; intervals over episodes.",
    )  # fmt: skip


def _gap(study: TotoStudy, found: Found, task: str, policy: str, split: str) -> Interval:
    seen, new = (_scores(study, found, task, study.main, policy, each).mean(0) for each in (study.splits[0], split))
    return paired_bootstrap(seen, new)


def seeing(study: TotoStudy, task: str, found: Found, data: Dataset) -> Claim:
    """Whether features learnt in the domain are worth more than untrained ones, over all policies on features."""
    policies = _policies(found, task, "random")

    def mean(representation: str) -> Float64[np.ndarray, " episodes"]:
        split = study.splits[0]
        every = [_scores(study, found, task, representation, policy, split).mean(0) for policy in policies]
        return np.asarray(np.mean(every, 0))

    gains = {name: paired_bootstrap(mean(name), mean("random")) for name in study.representations if name != "random"}
    learnt = [gains[name] for name in ("byol", "moco")]
    verdict: Verdict = "not separated"
    if all(gain.low > 0 for gain in learnt):
        verdict = "reproduced"
    elif any(gain.high < 0 for gain in learnt):
        verdict = "contradicted"
    metrics = [as_metric(f"{name} less random", gain) for name, gain in gains.items()]
    means = [as_metric(f"mean of policies, {name}", bootstrap_mean(mean(name))) for name in study.representations]
    return _claim(
        study, f"on {task}, seen arrangements, policies score higher on BYOL's and on MoCo's features than on those of "
        "an untrained network", metrics, means, verdict, data, None,
        f"Mean over {', '.join(policies)} and the trainings' seeds; intervals over episodes, paired.",
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
    """Mean scores by policy and split as Markdown, with intervals over trainings' seeds, or an anchor's episodes."""
    lines = []
    for task in study.tasks:
        lines += [f"## {task}, {study.trials} episodes a split", ""]
        lines += [f"| policy | representation | {' | '.join(study.splits)} |", "|---|---|" + "---|" * len(study.splits)]
        rows = dict.fromkeys(key[1:3] for key, _ in found if key[0] == task)
        for representation, policy in rows:
            cells = [_cell(study, found, task, representation, policy, split) for split in study.splits]
            shown = "-" if representation in ANCHORS else representation
            lines.append(f"| {policy} | {shown} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(study: TotoStudy, found: Found, task: str, representation: str, policy: str, split: str) -> str:
    if representation in ANCHORS:
        metric = as_metric(policy, bounded_mean(found[(task, policy, policy, 0), split].values("score"), 0.0, 1.0))
    elif ((task, representation, policy, study.seeds[0]), split) not in found:
        return ""
    else:
        metric = over_seeds(policy, _scores(study, found, task, representation, policy, split).mean(1))
    ends = "" if metric.interval is None else f" [{metric.interval[0]:.2f}, {metric.interval[1]:.2f}]"
    return f"{metric.value:.2f}{ends}"


def draw(study: TotoStudy, path: Path, found: Found) -> None:
    """Draws for each task the scores by representation, a dot for each seed, and by split on one representation."""
    with needs_extra("models"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 4.4 * len(study.tasks)), layout="constrained")
    panels = figure.subplots(len(study.tasks), 2, squeeze=False)
    shown = (*study.representations, OWN)
    for (left, right), task in zip(panels, study.tasks, strict=True):
        names = list(dict.fromkeys(policy for name in (study.main, *shown) for policy in _policies(found, task, name)))
        colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
        for place, representation in enumerate(shown):
            mine = _policies(found, task, representation)
            for number, policy in enumerate(mine):
                means = _scores(study, found, task, representation, policy, study.splits[0]).mean(1)
                x = place + 0.7 * ((number + 0.5) / len(mine) - 0.5)
                left.plot([x] * len(means), means, "o", color=colours[policy], alpha=0.4, markersize=5)
                left.plot([x], [means.mean()], "_", color=colours[policy], markersize=13, markeredgewidth=2.5)
        left.set_xticks(range(len(shown)), shown)
        for policy in _policies(found, task, study.main):
            every = {
                place: _scores(study, found, task, study.main, policy, split).mean()
                for place, split in enumerate(study.splits)
                if ((task, study.main, policy, study.seeds[0]), split) in found
            }
            right.plot([*every], [*every.values()], "o-", color=colours[policy], label=policy)
        for name, line in zip(ANCHORS, ("--", ":"), strict=True):
            every = [found[(task, name, name, 0), split].values("score").mean() for split in study.splits]
            right.plot(range(len(every)), every, line, color="#333333", label=name)
        right.set_xticks(range(len(study.splits)), study.splits)
        right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        for axes in (left, right):
            axes.set(ylabel="score", ylim=(-0.03, 1.03))
            tidy(axes, "y")
        left.set_title(f"{task}, seen arrangements: a dot for each training", fontsize=10)
        right.set_title(f"{task}, on {study.main} features, by what is new", fontsize=10)
    save_figure(path, figure)
