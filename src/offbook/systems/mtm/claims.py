"""What was measured, as claims beside their limits, and as pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offbook.errors import needs_extra
from offbook.evaluate.claims import as_metric, over_seeds, separation
from offbook.evaluate.figures import COLOURS, save_figure, tidy
from offbook.evaluate.stats import bootstrap_mean
from offbook.runs.config import to_json
from offbook.runs.ledger import Claim, Dataset, Metric, Paper, Verdict
from offbook.systems.mtm.agents import KINDS, PLAIN, Curve
from offbook.systems.mtm.card import MODEL
from offbook.systems.mtm.experiments import Play
from offbook.systems.mtm.presets import MtmStudy

Card = Mapping[str, Mapping[str, float]]
Returns = Mapping[Play, Sequence[float]]

_SPECIALISTS = {"bc": "MLP bc", "rcbc": "MLP rcbc", "id": "MLP id", "fd": "MLP fd"}
_ONE_MODEL = Paper(value="one model matches or beats specialised networks in each role", table="abstract")
_SCRIPTS = "the authors' table scripts, unchecked against the paper"
_FEW = Paper(value="Hopper 73.7 with 1 % of the actions, 87.7 with states of 95 % beside them", table=_SCRIPTS)
_OFFLINE = Paper(value="78.8 on average over nine D4RL sets, 71.7 for conditioned MLPs (RvS)", table=_SCRIPTS)
_MASKS = Paper(value="random autoregressive masks are the ones that it chooses", table="figure 3")
_FEATURES = Paper(value="TD3 learns faster on the model's features than on raw states", table="abstract")


@dataclass(frozen=True, kw_only=True)
class Plays:
    """Who plays what.

    Attributes:
        few: by recordings, which, and seed: models that saw all episodes without most actions, or few episodes.
        hopper: by name and seed.
        targets: the model's, by target and seed.
    """

    few: Mapping[tuple[str, str, int], Play]
    hopper: Mapping[tuple[str, int], Play]
    targets: Mapping[tuple[float, int], Play]

    @property
    def every(self) -> list[Play]:
        """All of them, each once."""
        return list(dict.fromkeys([*self.few.values(), *self.hopper.values(), *self.targets.values()]))


def roles(study: MtmStudy, name: str, cards: Mapping[int, Card], data: Dataset, seeing: int = 1) -> Claim:
    """The model's error in each role as a share of its specialist's, who clones from so many states."""
    experts = _SPECIALISTS if seeing == 1 else _SPECIALISTS | {
        role: f"{_SPECIALISTS[role]}, {seeing} states" for role in ("bc", "rcbc")
    }  # fmt: skip
    shares = {
        role: over_seeds(f"{role}, model to {other}", _shares(cards, role, other), higher=False)
        for role, other in experts.items()
    }
    stays = over_seeds("fd, model to state stays", _shares(cards, "fd", "state stays"), higher=False)

    def within(values: Sequence[float], staying: float) -> bool:
        return sum(value <= 1.15 for value in values) >= 3 and min(values) < 1 and staying <= 1.1

    held = within([metric.value for metric in shares.values()], stays.value)
    possible = within([_ends(metric)[0] for metric in shares.values()], _ends(stays)[0])
    sight = "" if seeing == 1 else f", where who clones sees {seeing} states as the model does"
    others = [
        over_seeds(f"{role}, {who}", [card[role][who] for card in cards.values()], higher=False)
        for role in next(iter(cards.values())) for who in next(iter(cards.values()))[role]
    ]  # fmt: skip
    return _claim(
        study, f"on {name} one model is within 1.15 times its specialist's error in 3 of 4 roles, better in one, and "
        "its forward dynamics within 1.1 times of the rule that the state stays" + sight,
        [*shares.values(), stays], others if seeing == 1 else [], _verdict(held, possible), data, _ONE_MODEL,
    )  # fmt: skip


def _shares(cards: Mapping[Any, Card], role: str, other: str) -> list[float]:
    return [card[role][MODEL] / card[role][other] for card in cards.values()]


def few_actions(
    study: MtmStudy, name: str, cards: Mapping[tuple[str, str, int], Card], plays: Mapping[tuple[str, str, int], Play],
    returns: Returns, data: Dataset,
) -> Claim:  # fmt: skip
    """States without actions beside few episodes with them, against those few alone.

    What plays is the role that needs the states most: it fills in those to come, and then the action between two.
    """
    kinds, seeds = ("all", "few"), study.seeds
    error = {which: [cards[name, which, seed]["bc"][MODEL] for seed in seeds] for which in kinds}
    score = {which: [float(np.mean(returns[plays[name, which, seed]])) for seed in seeds] for which in kinds}
    ratios = [a / b for a, b in zip(error["all"], error["few"], strict=True)]
    ratio = float(np.mean(score["all"]) / max(1e-9, float(np.mean(score["few"]))))
    more = over_seeds(
        "return, with states less 1.2 times without",
        [a - 1.2 * b for a, b in zip(score["all"], score["few"], strict=True)],
    )
    metrics = [
        over_seeds("action error, with states to without", ratios, higher=False),
        Metric(
            name="action error, with states to without, highest of the seeds", value=max(ratios), higher_is_better=False
        ),
        Metric(name="return, with states to without", value=ratio, higher_is_better=True),
        more,
        over_seeds("action error, with states", error["all"], higher=False),
        over_seeds("return, with states", score["all"]),
    ]
    baseline = [
        over_seeds("action error, without", error["few"], higher=False),
        over_seeds("return, without", score["few"]),
    ]
    verdict = _verdict(max(ratios) < 1 and ratio >= 1.2, _ends(metrics[0])[0] < 1 and _ends(more)[1] >= 0)
    return _claim(
        study, f"with actions in {study.keep_actions:.0%} of the episodes of {name}, the states of the others lower "
        "the error of cloned actions for every seed and raise the return of the two-stage role 1.2 times",
        metrics, baseline, verdict, data, _FEW,
    )  # fmt: skip


def offline(study: MtmStudy, plays: Plays, returns: Returns, data: Dataset) -> Claim:
    """Return-conditioned policies on the hopper, at the fixed target and at the best of several."""
    names = list(dict.fromkeys(name for name, _ in plays.hopper))
    means = {name: [float(np.mean(returns[plays.hopper[name, seed]])) for seed in study.seeds] for name in names}
    best = [
        max(float(np.mean(returns[plays.targets[target, seed]])) for target in study.targets) for seed in study.seeds
    ]
    ratio = float(np.mean(means["MTM"]) / max(1e-9, float(np.mean(means["MLP rcbc"]))))
    margin = over_seeds(
        "MTM less 0.95 times MLP rcbc", [a - 0.95 * b for a, b in zip(means["MTM"], means["MLP rcbc"], strict=True)]
    )
    metrics = [
        Metric(name="MTM to MLP rcbc", value=ratio, higher_is_better=True),
        margin,
        as_metric(
            "MTM, final, target 1",
            bootstrap_mean([x for seed in study.seeds for x in returns[plays.hopper["MTM", seed]]]),
        ),
        over_seeds("MTM, final, target 1, over seeds", means["MTM"]),
        over_seeds(f"MTM, best of {len(study.targets)} targets", best),
    ]
    baseline = [over_seeds(name, means[name]) for name in names if name != "MTM"]
    return _claim(
        study, "on hopper-replay the return-conditioned model, at its last step and a target fixed beforehand, gets "
        "0.95 times the return of the return-conditioned MLP", metrics, baseline,
        _verdict(ratio >= 0.95, _ends(margin)[1] >= 0), data, _OFFLINE,
    )  # fmt: skip


def masks(study: MtmStudy, cards: Mapping[tuple[str, int], Card], data: Dataset) -> Claim:
    """Errors of cloning after training under different masks."""
    errors = {
        (pattern, role): np.asarray([cards[pattern, seed][role][MODEL] for seed in study.seeds])
        for pattern in study.patterns for role in ("bc", "rcbc", "id", "fd")
    }  # fmt: skip
    found = {
        (pattern, role): over_seeds(f"{role}, {pattern}", of, higher=False) for (pattern, role), of in errors.items()
    }
    margins = [
        over_seeds(f"{role}, 1.05 times {pattern} less auto", 1.05 * errors[pattern, role] - errors["auto", role])
        for pattern in study.patterns for role in ("bc", "rcbc") if pattern != "auto"
    ]  # fmt: skip
    verdict = _verdict(min(m.value for m in margins) >= 0, min(_ends(m)[1] for m in margins) >= 0)
    mine = [metric for (pattern, _), metric in found.items() if pattern == "auto"]
    return _claim(
        study, "with random autoregressive masks the errors of both kinds of cloning are within 5 % of the least",
        [*margins, *mine], [metric for metric in found.values() if metric not in mine], verdict, data, _MASKS,
    )  # fmt: skip


def features(study: MtmStudy, curves: Sequence[Curve]) -> Claim:
    """The mean return over an agent's life, with features and without."""
    area = {kind: [float(np.mean(c.returns)) for c in curves if c.kind == kind] for kind in KINDS}
    alone = area[PLAIN]
    gains = {kind: [a - b for a, b in zip(of, alone, strict=True)] for kind, of in area.items() if kind != PLAIN}
    metrics = [over_seeds(f"{kind} less {PLAIN}", of) for kind, of in gains.items()]
    found = next(metric for metric in metrics if metric.name.startswith("frozen"))
    areas = [over_seeds(f"mean return, {kind}", of) for kind, of in area.items()]
    return Claim(
        system="mtm", claim="TD3 on cartpole-swingup gets more return over its life on a model's frozen features",
        metrics=(*metrics, *areas[1:]), baseline_metrics=(areas[0],), seeds=study.seeds,
        verdict=separation(found) if study.judged else "recorded", config=to_json(study), paper=_FEATURES,
        note="All see the standardised state, and features stand beside it. Judged by the interval over seeds.",
    )  # fmt: skip


def _ends(metric: Metric) -> tuple[float, float]:
    """The ends of its interval; without one it may be anything."""
    return metric.interval or (-math.inf, math.inf)


def _verdict(held: bool, possible: bool) -> Verdict:
    """What the means say of a limit that they keep; one that they miss is contradicted if the intervals miss it too."""
    return "reproduced" if held else "not separated" if possible else "contradicted"


def _claim(
    study: MtmStudy, text: str, metrics: Sequence[Metric], baseline: Sequence[Metric], verdict: Verdict, data: Dataset,
    paper: Paper,
) -> Claim:  # fmt: skip
    return Claim(
        system="mtm", claim=text, metrics=tuple(metrics), baseline_metrics=tuple(baseline), seeds=study.seeds,
        verdict=verdict if study.judged else "recorded", config=to_json(study), paper=paper, data=(data,),
        note="Judged by the means, and where they miss the limit by the intervals over seeds.",
    )  # fmt: skip


def draw(
    study: MtmStudy, out: Path, cards: Mapping[tuple[str, int], Card], returns: Returns, plays: Plays,
    curves: Sequence[Curve],
) -> None:  # fmt: skip
    """Draws errors by role, returns of the hopper's policies, and learning curves: `mtm.png`."""
    with needs_extra("models"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.3, 1, 1])
    names = list(dict.fromkeys(name for name, _ in cards))
    for number, name in enumerate(names):
        for place, (role, other) in enumerate(_SPECIALISTS.items()):
            shares = [cards[name, seed][role][MODEL] / cards[name, seed][role][other] for seed in study.seeds]
            x = place + 0.25 * (number - (len(names) - 1) / 2)
            left.plot([x] * len(shares), shares, "o", color=COLOURS[number], label=name if place == 0 else None)
    left.axhline(1, color="#888888", linewidth=1, linestyle="--")
    left.set(yscale="log", ylabel="model's error to its specialist's", title="one model in each role")
    left.set_xticks(range(len(_SPECIALISTS)), list(_SPECIALISTS))
    left.legend(frameon=False)
    players = list(dict.fromkeys(name for name, _ in plays.hopper))
    for row, name in enumerate(players):
        means = [float(np.mean(returns[plays.hopper[name, seed]])) for seed in study.seeds]
        middle.plot(means, [row] * len(means), "o", color=COLOURS[0 if name == "MTM" else 6])
        middle.plot([float(np.mean(means))], [row], "|", color="black", markersize=14)
    middle.set_yticks(range(len(players)), players)
    middle.invert_yaxis()
    middle.set(xlabel="return", title=f"hopper-replay, {study.episodes} episodes for each seed")
    for number, kind in enumerate(KINDS):
        mine = [curve for curve in curves if curve.kind == kind]
        for curve in mine:
            right.plot(curve.steps, curve.returns, color=COLOURS[number], alpha=0.3, linewidth=1)
        right.plot(mine[0].steps, np.mean([c.returns for c in mine], 0), color=COLOURS[number], label=kind)
    right.set(xlabel="steps", ylabel="return", title="TD3 on cartpole-swingup")
    right.legend(frameon=False)
    for axes in (left, middle, right):
        tidy(axes)
    save_figure(out / "mtm.png", figure)
