"""Ratings of blind judgements: how fast whole raters are resampled, and whether estimates and intervals are right.

Speed: 20,000 votes of 15 raters on 200 systems. A refit is a fit to the votes of raters that were drawn with
replacement, from the parameters of all votes on. By turns in a process:

- ours: equal votes as one, many refits at once;
- one at a time: SciPy's L-BFGS-B, to its own tolerance, on the votes as they are, with the exact slope in NumPy.

Processor time of all threads counts, with one thread for linear algebra.

Estimates: five tournaments, beside the same optimiser run to the end on a likelihood of its own. Intervals: 500
tournaments of 40 raters, each with a taste of its own, on 60 items, each of which suits some systems; the truth is what
votes have that share neither rater nor item.
"""

import time
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

from offbook.evaluate.stats import bootstrap_mean
from offbook.rating.bradley_terry import Comparisons, Tournament
from offbook.rating.intervals import uncertainty
from offbook.runs.benchmark import Options, median_metric, timed
from offbook.runs.ledger import Claim, Metric
from offbook.runs.progress import track
from offbook.runs.seeding import generator

SYSTEMS, VOTES, RATERS = 200, 20_000, 15
REFITS = {"ours": 200, "one at a time": 8}
RATIO, SECONDS = 10, 10.0  # times; for 1,000 refits
AGREE = 1e-4
TOURNAMENTS, LOW, HIGH = 500, 0.90, 0.98
STUDY = {"n": 1200, "raters": 40, "items": 60}
THETA = np.array([0.8, 0.3, 0.0, -0.3, -0.8])
TASTE, FIT, LEFT_SIDE, NU, POOL = 0.4, 0.4, 0.2, 0.4, 400_000


def judged(rng: np.random.Generator, strength: np.ndarray, left: np.ndarray, right: np.ndarray) -> Comparisons:
    """Answers to pairs of which systems differ in strength from vote to vote, shape (n, systems)."""
    at, count = np.arange(len(left)), strength.shape[1]
    d = strength[at, left] - strength[at, right] + LEFT_SIDE
    weight = np.stack([np.exp(d / 2), np.exp(-d / 2), np.full(len(d), 2 * NU)], axis=1)
    ends = (weight / weight.sum(axis=1, keepdims=True)).cumsum(axis=1)
    outcome = (rng.random((len(d), 1)) > ends[:, :2]).sum(axis=1)
    names = tuple(f"s{i:03}" for i in range(count))
    return Comparisons(systems=names, left=left, right=right, outcome=outcome, style=np.zeros((len(d), 0)))


def random_pairs(rng: np.random.Generator, systems: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    left = rng.integers(systems, size=n)
    return left, (left + rng.integers(1, systems, size=n)) % systems


def tournament(rng: np.random.Generator, systems: int, n: int) -> Comparisons:
    theta = rng.normal(0, 1, systems)
    return judged(rng, np.broadcast_to(theta, (n, systems)), *random_pairs(rng, systems, n))


def study(rng: np.random.Generator, n: int, raters: int, items: int) -> tuple[Comparisons, np.ndarray, np.ndarray]:
    """Votes of raters with tastes on items that suit some systems, with the rater and the item of each."""
    rater, item = rng.permutation(np.arange(n) % raters), rng.permutation(np.arange(n) % items)
    tastes, fits = (rng.normal(0, spread, (count, len(THETA))) for spread, count in ((TASTE, raters), (FIT, items)))
    data = judged(rng, THETA + tastes[rater] + fits[item], *random_pairs(rng, len(THETA), n))
    return data, rater, item


def plain_fit(data: Comparisons, weights: np.ndarray, start: np.ndarray, **options: float) -> np.ndarray:
    """Theta, gamma and log nu, by a general optimiser on single votes."""
    systems = len(data.systems)

    def loss(params: np.ndarray) -> tuple[float, np.ndarray]:
        theta, (gamma, log_nu) = params[:systems], params[systems:]
        half = (theta[data.left] - theta[data.right] + gamma) / 2
        logs = np.stack([half, -half, np.full(len(half), np.log(2) + log_nu)])
        total = np.logaddexp.reduce(logs, axis=0)
        chance = np.exp(logs - total)
        value = weights @ (total - logs[data.outcome, np.arange(len(half))]) + theta @ theta / 8
        won = np.array([0.5, -0.5, 0.0])[data.outcome]
        pull = weights * ((chance[0] - chance[1]) / 2 - won)
        slope = np.bincount(data.left, pull, systems) - np.bincount(data.right, pull, systems) + theta / 4
        return value, np.concatenate([slope, [pull.sum(), weights @ (chance[2] - (data.outcome == 2))]])

    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x)


def refits(data: Comparisons, seed: int) -> dict[str, Callable[[], np.ndarray]]:
    rng, field = generator(seed, "refits"), Tournament(data)
    raters = rng.integers(RATERS, size=len(data.left))
    drawn = rng.multinomial(RATERS, np.full(RATERS, 1 / RATERS), size=max(REFITS.values())).astype(float)
    counts, start = field.counts(raters).T.tocsr(), field.fit.params

    def ours() -> np.ndarray:
        return field.refit(lambda rows: np.asarray(counts @ drawn[rows].T), REFITS["ours"])

    def plain() -> np.ndarray:
        return np.stack([plain_fit(data, row[raters], start) for row in drawn[: REFITS["one at a time"]]], axis=1)

    return {"ours": ours, "one at a time": plain}


def difference(seed: int) -> float:
    """The largest difference between our parameters and those of the general optimiser in one tournament."""
    rng = generator(seed, "estimates")
    data = tournament(rng, int(rng.integers(3, 12)), 2000)
    ours = Tournament(data).fit.params
    plain = plain_fit(data, np.ones(2000), np.zeros_like(ours), ftol=1e-15, gtol=1e-7, maxiter=5000, maxfun=10_000)
    return float(np.abs(ours - plain).max())


def coverage(seed: int) -> Metric:
    """The share of intervals that hold the truth."""
    pool, *_ = study(generator(seed, "truth"), POOL, POOL, POOL)
    fit = Tournament(pool).fit
    truth = fit.contrasts() @ fit.params
    held = []
    for number in track(range(TOURNAMENTS), "tournaments"):
        data, rater, item = study(generator(seed, f"tournament {number}"), **STUDY)
        fit = Tournament(data).fit
        contrasts = fit.contrasts()
        half = uncertainty(fit, rater, item, seed=number).half_widths(contrasts)
        held.append(float(np.mean(np.abs(contrasts @ fit.params - truth) <= half)))
    found = bootstrap_mean(held, seed=seed)
    ends = (found.low, found.high)
    return Metric(name="coverage", value=found.value, n=found.n, interval=ends, method=found.method)


def run(options: Options) -> list[Claim]:
    """Measures speed by turns, then estimates and intervals."""
    data = tournament(generator(options.seed, "speed"), SYSTEMS, VOTES)
    seconds = timed(refits(data, options.seed), options.repeats, clock=time.process_time)
    each = {name: [1000 * spent / REFITS[name] for spent in of] for name, of in seconds.items()}
    pairs = [a / b for a, b in zip(each["one at a time"], each["ours"], strict=True)]
    ratio = median_metric("ratio", pairs, higher_is_better=True)
    thousand = median_metric("1,000 refits", each["ours"], unit="s")
    apart = [difference(options.seed + i) for i in range(5)]
    held = coverage(options.seed)
    about = f"{SYSTEMS} systems, {VOTES} votes, {RATERS} raters"
    return [
        Claim(
            system="rating",
            claim=f"refits of resampled raters are at least {RATIO} times as fast as one at a time ({about})",
            metrics=(ratio,),
            baseline_metrics=(median_metric("1,000 refits, one at a time", each["one at a time"], unit="s"),),
            seeds=(options.seed,),
            verdict="met" if ratio.value >= RATIO else "missed",
        ),
        Claim(
            system="rating",
            claim=f"1,000 refits take at most {SECONDS:g} s of processor time ({about})",
            metrics=(thousand,),
            seeds=(options.seed,),
            verdict="met" if thousand.value <= SECONDS else "missed",
        ),
        Claim(
            system="rating",
            claim=f"estimates agree with a general optimiser within {AGREE:g} in five tournaments",
            metrics=(Metric(name="largest difference", value=max(apart), higher_is_better=False),),
            seeds=tuple(options.seed + i for i in range(5)),
            verdict="met" if max(apart) <= AGREE else "missed",
        ),
        Claim(
            system="rating",
            claim=f"95 % intervals hold the truth in {LOW:.0%} to {HIGH:.0%} of {TOURNAMENTS} tournaments with tastes",
            metrics=(held,),
            seeds=(options.seed,),
            verdict="met" if LOW <= held.value <= HIGH else "missed",
        ),
    ]
