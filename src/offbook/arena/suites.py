"""The benchmarks with which an arena begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from offbook.arena.submissions import BenchmarkSpec
from offbook.errors import ConfigError, nearest, needs_extra
from offbook.runs.seeding import evaluation_seeds, generator

TRIES = 4
"""Trials in a row where a policy may learn from its earlier ones; on the pages tries, for a trial is there all four."""


def pour(trials: int, seed: int) -> BenchmarkSpec:
    """Pouring grains into a bowl, on scenes like those of the recordings and on four kinds of new ones."""
    return _on_the_table(
        "pour",
        trials,
        seed,
        title="Pouring",
        task="Pour the grains from the cup into the bowl, wherever the bowl stands.",
        metric="share of the grains in the bowl",
    )


def scoop(trials: int, seed: int) -> BenchmarkSpec:
    """Scooping grains out of a bowl, likewise."""
    return _on_the_table(
        "scoop",
        trials,
        seed,
        title="Scooping",
        task="Scoop grains out of the bowl with the spoon and hold them up, wherever the bowl stands.",
        metric="share of a level spoonful that is lifted",
    )


def _on_the_table(name: str, trials: int, seed: int, **words: Any) -> BenchmarkSpec:
    with needs_extra("sim"):
        from offbook.sim.tabletop.scene import SPLITS, scenes
    seeds = _trial_seeds(seed, trials)
    return BenchmarkSpec(
        name=name,
        robot_class=name,
        splits={
            split: [
                {"scene": scene, "seed": s} for scene, s in zip(scenes(split, trials, seed, name), seeds, strict=True)
            ]
            for split in SPLITS
        },
        trial_seconds=6.0,
        score_range=(0.0, 1.0),
        **words,
    )


def pendulum(trials: int, seed: int) -> BenchmarkSpec:
    """Swinging a pendulum up: a light world to try an arena with."""
    # Per step at worst pi^2 of angle, 0.1 * 8^2 of speed and 0.001 * 2^2 of torque, over 200 steps.
    worst = -200 * (3.141592653589793**2 + 0.1 * 8**2 + 0.001 * 2**2)
    return BenchmarkSpec(
        name="pendulum",
        title="Pendulum",
        task="Swing the pendulum up and keep it there.",
        metric="return, 0 at best",
        robot_class="gym:Pendulum-v1",
        splits={"all": [{"scene": {}, "seed": s} for s in _trial_seeds(seed, trials)]},
        trial_seconds=1.0,
        fault_score=worst,
        score_range=(worst, 0.0),
    )


def hopper_tries(trials: int, seed: int) -> BenchmarkSpec:
    """Hopping, four times in a row: whether a policy does better for having tried before."""
    return _tries(
        "hopper-tries",
        title="Hopper, four tries",
        task="Hop forward without falling, in four tries in a row.",
        environment="gym:Hopper-v5",
        seeds=_trial_seeds(seed, trials),
        trial_seconds=60.0,
    )


def darkpoint(trials: int, seed: int) -> BenchmarkSpec:
    """Finding a goal that cannot be seen, four times in a row at the same place."""
    return _tries(
        "darkpoint",
        title="Hidden goal, four tries",
        task="Find the goal by what it earns to come near it; it stays where it is for four tries in a row.",
        environment="offbook:darkpoint",
        seeds=_trial_seeds(seed, trials),
        trial_seconds=1.0,
        # Each of 16 steps earns 1 at the goal, and nothing at a distance of 1 or more.
        score_range=(0.0, 16.0),
    )


def _tries(name: str, *, environment: str, seeds: list[int], **words: Any) -> BenchmarkSpec:
    """A benchmark of four trials in a row on a simulator.

    The last trial, with the earlier ones in memory, and the first, without any, on the same seeds: never the best of
    them, which luck alone raises. What the policy loses counts 0: the least of darkpoint's range, and about what a
    hopper gets that falls at once, for its returns have no least.
    """
    return BenchmarkSpec(
        name=name,
        metric=f"return of one try, the last of {TRIES} or the first",
        robot_class=f"{environment}@{TRIES}",
        splits={
            f"last-of-{TRIES}": [{"scene": {}, "seed": s} for s in seeds],
            f"first-of-{TRIES}": [{"scene": {"trials": 1}, "seed": s} for s in seeds],
        },
        **words,
    )


def _trial_seeds(seed: int, trials: int) -> list[int]:
    """Evaluation seeds, each drawn by itself: who has seen some of them cannot tell the next."""
    roots = generator(seed, "trials").integers(2**62, size=trials)
    return [evaluation_seeds(int(root), 1)[0] for root in roots]


SUITES: Mapping[str, Callable[[int, int], BenchmarkSpec]] = {
    "pour": pour,
    "scoop": scoop,
    "pendulum": pendulum,
    "darkpoint": darkpoint,
    "hopper-tries": hopper_tries,
}
"""By name, the function of the number of trials per split and a seed that describes the benchmark."""


def make_suite(name: str, trials: int, seed: int) -> BenchmarkSpec:
    """A benchmark by its name in `SUITES`.

    Raises:
        ConfigError: there is none, or the number of trials is not 1 to 10,000.

    Example:
        >>> make_suite("pendulum", 2, seed=0).robot_class
        'gym:Pendulum-v1'
    """
    if name not in SUITES:
        raise ConfigError("benchmark", expected="a known benchmark", got=repr(name), fix=nearest(name, SUITES))
    if not 1 <= trials <= 10_000:
        raise ConfigError("trials", expected="1 to 10000 a split", got=str(trials), fix="choose another number")
    return SUITES[name](trials, seed)
