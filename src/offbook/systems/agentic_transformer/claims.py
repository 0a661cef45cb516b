"""What was measured, as claims beside their limits, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from offbook.errors import needs_extra
from offbook.evaluate.claims import as_metric, over_seeds, separation
from offbook.evaluate.figures import COLOURS, save_figure, tidy
from offbook.evaluate.groups import Groups, retry_value
from offbook.evaluate.stats import paired_bootstrap
from offbook.runs.config import to_json
from offbook.runs.ledger import Claim, Dataset, Metric, Paper, Verdict
from offbook.systems.agentic_transformer.lengths import Taken
from offbook.systems.agentic_transformer.presets import AtStudy

HIDDEN, FIXED, HOPPER = "darkpoint", "darkpoint-fixed", "hopper-replay"
AT, DT, LAST = "AT", "DT", "AT, last trial counts"

Played = Mapping[tuple[str, str, int], Groups]

_BETTER = Paper(
    value="AT 85.21 (the best of its trials), DT 77.49 (its best checkpoint) on average over nine D4RL sets",
    table="the table of D4RL results",
)
_IMPROVES = Paper(value="returns rise from trial to trial", table="abstract")
_NEAR = 1e-4


def _shown(name: str, every: Sequence[Groups]) -> list[Metric]:
    """Of each seed's groups the mean return of the first trial, the last, all, and the best."""
    measures = {"first": "first", "last": "last", "mean": "mean", "max": f"max of {every[0].trials}"}
    return [
        over_seeds(f"{name}, {shown}", [groups.summary[key].value for groups in every])
        for key, shown in measures.items()
    ]


def audit(
    study: AtStudy, name: str, played: Played, data: Dataset, others: Mapping[tuple[str, int], Groups] | None = None
) -> Claim:
    """Whether retries help where nothing is hidden, and how much of a best of n is luck."""
    single = [played[name, DT, seed] for seed in study.seeds]
    values = {
        kind: [retry_value(played[name, kind, seed], played[name, DT, seed]).value for seed in study.seeds]
        for kind in (AT, LAST)
    }
    retry = over_seeds("retry value: last trial of AT less mean of DT", values[AT])
    lucky = [_within(groups) for groups in single]
    metrics = [
        retry,
        over_seeds("retry value where the last trial counts", values[LAST]),
        *(metric for kind in (AT, LAST) for metric in _shown(kind, [played[name, kind, seed] for seed in study.seeds])),
        over_seeds("context effect of AT", [played[name, AT, seed].summary["context_effect"].value
                                            for seed in study.seeds]),
    ]  # fmt: skip
    baseline = [
        *_shown(DT, single),
        over_seeds(f"DT, max of {study.trials} by luck alone", [one.summary["luck_only_max"].value for one in single]),
    ]
    for other in dict.fromkeys(other for other, _ in others or {}):
        baseline += _shown(other, [(others or {})[other, seed] for seed in study.seeds])
    said = f"the maximum of {study.trials} trials of DT is what luck alone gives for {sum(lucky)} of {len(lucky)} seeds"
    return _claim(
        study, f"on {name}, where nothing is hidden, the last of {study.trials} trials of AT gets more return than DT "
        "does on average", metrics, baseline, separation(retry), (data,), _BETTER,
        f"At the last checkpoints, judged by the interval over seeds; {said}.",
    )  # fmt: skip


def _within(groups: Groups) -> bool:
    """Whether the mean of the maxima is that which fresh trials let expect, within the intervals of both."""
    best, lucky = groups.summary["max"], groups.summary["luck_only_max"]
    return best.low <= lucky.high and lucky.low <= best.high


def context(study: AtStudy, played: Played, data: Dataset) -> Claim:
    """Whether earlier trials help where they reveal something."""
    several, single = ([played[HIDDEN, kind, seed] for seed in study.seeds] for kind in (AT, DT))
    effects = [groups.summary["context_effect"] for groups in several]
    retries = [retry_value(a, b) for a, b in zip(several, single, strict=True)]
    gains = [groups.summary["gain"] for groups in single]
    claimed = (*effects, *retries)
    held = all(found.low > 0 for found in claimed) and all(g.low <= 0 <= g.high for g in gains)
    metrics = [
        *(as_metric(f"context effect, seed {seed}", found) for seed, found in zip(study.seeds, effects, strict=True)),
        *(as_metric(f"retry value, seed {seed}", found) for seed, found in zip(study.seeds, retries, strict=True)),
        *_shown(AT, several),
    ]
    baseline = [
        *(as_metric(f"gain of DT, seed {seed}", found) for seed, found in zip(study.seeds, gains, strict=True)),
        *_shown(DT, single),
    ]
    note = (
        "At the last checkpoints. Held where both intervals are above 0 for every seed, and those of DT's gain contain "
        "it; contradicted where one of either is below 0."
    )
    return _claim(
        study, "on darkpoint, where the goal is hidden, AT's last trial profits from its own earlier ones: more than "
        "from another goal's, and it gets more than DT", metrics, baseline,
        _verdict(held, any(found.high < 0 for found in claimed)), (data,), _IMPROVES, note,
    )  # fmt: skip


def ablation(study: AtStudy, played: Played, data: Dataset) -> Claim:
    """The last trial's return with parts of the recipe taken away."""
    kinds = dict.fromkeys(kind for name, kind, _ in played if name == HIDDEN and not kind.startswith("AT, width"))
    last = {kind: [played[HIDDEN, kind, seed].returns[:, -1] for seed in study.seeds] for kind in kinds if kind != DT}
    losses = {
        kind: paired_bootstrap(np.concatenate(last[AT]), np.concatenate(last[kind])) for kind in last if kind != AT
    }
    better = any(found.high < 0 for found in losses.values())
    metrics = [
        *(as_metric(f"last trial, AT less {kind}", found) for kind, found in losses.items()),
        *(metric for kind in last for metric in _shown(kind, [played[HIDDEN, kind, seed] for seed in study.seeds])[:2]),
        *(
            over_seeds(f"{kind}, context effect",
                       [played[HIDDEN, kind, seed].summary["context_effect"].value for seed in study.seeds])
            for kind in last
        ),
    ]  # fmt: skip
    return _claim(
        study, "on darkpoint no part of the recipe can be left out with a gain of the last trial", metrics, [],
        _verdict(not better, better), (data,), None,
        "At the last checkpoints; intervals over the groups of all seeds together, paired.",
    )  # fmt: skip


def sizes(study: AtStudy, played: Played, data: Dataset) -> Claim:
    """The last trial's return by the network's width."""
    names = {width: AT if width == study.point.model.width else f"AT, width {width}" for width in study.widths}
    last = {
        width: np.array([played[HIDDEN, name, seed].returns[:, -1].mean() for seed in study.seeds])
        for width, name in names.items()
    }
    found = {width: over_seeds(f"last trial, width {width}", values) for width, values in last.items()}
    means = [metric.value for metric in found.values()]
    rise = over_seeds("widest less narrowest", last[study.widths[-1]] - last[study.widths[0]])
    return _claim(
        study, "on darkpoint the last trial's return rises with the width of the network", [*found.values()], [],
        _verdict(means == sorted(means), separation(rise) == "contradicted"), (data,),
        Paper(value="larger models do better", table="scaling figure"),
        "At the last checkpoints. Held where the means over seeds rise with each width; contradicted where the "
        "interval over seeds of the widest less the narrowest is below 0.",
    )  # fmt: skip


def lengths(study: AtStudy, long: Mapping[bool, Taken], short: Mapping[bool, Taken]) -> Claim:
    """A chain too long for plain attention, and agreement on one that is not."""
    trials, steps = study.long
    off = abs(short[True].loss - short[False].loss)
    grade = abs(short[True].gradient / short[False].gradient - 1)
    held = long[False].bytes <= study.budget < long[True].bytes and max(off, grade) <= _NEAR

    def memory(name: str, size: int) -> Metric:
        return Metric(name=name, value=size / 2**20, unit="MiB", higher_is_better=False)

    metrics = [
        memory(f"step on {trials} trials of {steps} steps, by blocks", long[False].bytes),
        Metric(name="difference of the losses, 2048 steps", value=off, higher_is_better=False),
        Metric(name="share by which gradients differ, 2048 steps", value=grade, higher_is_better=False),
        memory("2048 steps, by blocks", short[False].bytes),
    ]
    baseline = [memory("the same, plain attention", long[True].bytes), memory("2048 steps, plain", short[True].bytes)]
    verdict: Verdict = ("met" if held else "missed") if study.judged else "recorded"
    return _claim(
        study, f"in {study.budget / 2**30:g} GiB a step trains on a chain of {trials} trials of {steps} steps, which "
        "plain attention cannot, with the same loss and gradients", metrics, baseline, verdict, (), None,
    )  # fmt: skip


def _verdict(held: bool, contradicted: bool) -> Verdict:
    """What does not hold is contradicted only where an interval leaves no room for it."""
    return "reproduced" if held else "contradicted" if contradicted else "not separated"


def _claim(
    study: AtStudy, text: str, metrics: Sequence[Metric], baseline: Sequence[Metric], verdict: Verdict,
    data: tuple[Dataset, ...], paper: Paper | None, note: str = "",
) -> Claim:  # fmt: skip
    return Claim(
        system="agentic_transformer", claim=text, metrics=tuple(metrics), baseline_metrics=tuple(baseline),
        seeds=study.seeds, verdict=verdict if study.judged else "recorded", config=to_json(study), paper=paper,
        data=data, note=note,
    )  # fmt: skip


def draw(study: AtStudy, path: Path, played: Played) -> None:
    """Draws the mean return of each trial for the three tasks, and the last one after foreign trials."""
    with needs_extra("models"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), (HIDDEN, FIXED, HOPPER), strict=True):
        for number, kind in enumerate((AT, LAST, DT)):
            every = [played[name, kind, seed] for seed in study.seeds]
            trials, means = np.arange(1, study.trials + 1), np.array([groups.returns.mean(0) for groups in every])
            for line in means:
                axes.plot(trials, line, color=COLOURS[number], alpha=0.3, linewidth=1)
            axes.plot(trials, means.mean(0), "o-", color=COLOURS[number], label=kind)
            foreign = [groups.foreign.mean() for groups in every if groups.foreign is not None]
            if foreign:
                axes.plot([study.trials], [np.mean(foreign)], "o", color=COLOURS[number], markerfacecolor="white",
                          label="after another group's trials" if number == 0 else None)  # fmt: skip
        axes.set(title=name, xlabel="trial", ylabel="return")
        axes.set_xticks(range(1, study.trials + 1))
        tidy(axes)
    figure.axes[0].legend(frameon=False)
    save_figure(path, figure)
