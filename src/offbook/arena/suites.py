"""The benchmarks with which an arena begins, and those that an operator describes in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from offbook.arena.submissions import NAME, BenchmarkSpec
from offbook.errors import ConfigError, nearest, needs_extra
from offbook.runs.seeding import evaluation_seeds, generator
from offbook.service.fields import SmallRecord, Text

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


_MOST = 10_000
_Name = Annotated[Text, Field(pattern=f"^{NAME}$")]
_Line = Annotated[Text, Field(min_length=1, max_length=200)]


def _empty_scenes(given: object) -> object:
    return [{}] * min(given, _MOST + 1) if isinstance(given, int) else given


_Scenes = Annotated[list[SmallRecord], Field(min_length=1, max_length=_MOST), BeforeValidator(_empty_scenes)]


class Description(BaseModel):
    """A benchmark as an operator writes it down, in JSON; see `BenchmarkSpec`.

    Attributes:
        name: short, for addresses and commands.
        title: one line for people.
        task: what the robot is told to do.
        metric: what the score means, in words.
        robot: the kind of robot; workers are started with it as `--robot`.
        splits: by name, the scene of each trial as the robot's driver takes it; or how many trials there are, where
            scenes follow from seeds alone. The first is the default.
        daily_trials: trials that one user may ask of it in a day.
        trial_seconds: about how long one trial takes.
        fault_score: what a trial lost by the policy counts: the worst possible score.
        score_range: least and largest score that are possible, where there are such: intervals rest on it.
        prestage: name of a benchmark of this arena that a policy must have passed before.
        prestage_score: mean score on the whole of its split from which on it is passed.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    name: _Name
    title: _Line
    task: Annotated[Text, Field(min_length=1, max_length=2000)]
    metric: _Line
    robot: _Line
    splits: Annotated[dict[_Name, _Scenes], Field(min_length=1)]
    daily_trials: int = Field(default=400, ge=1)
    trial_seconds: float = Field(default=10.0, gt=0)
    fault_score: float = 0.0
    score_range: tuple[float, float] | None = None
    prestage: Text = ""
    prestage_score: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        least, most = self.score_range or (-math.inf, math.inf)
        if not least <= self.fault_score <= most or least == most:
            raise ValueError("score_range from the least to the largest score, with fault_score in it")
        if bool(self.prestage) != (self.prestage_score is not None):
            raise ValueError("prestage and prestage_score, both or neither")
        return self


def read_suite(path: Path, seed: int) -> BenchmarkSpec:
    """A benchmark from the file in which an operator describes it; its seeds are drawn.

    Args:
        path: JSON, an object with the attributes of `Description`.
        seed: from which the seeds of the trials follow.

    Raises:
        ConfigError: the file cannot be read, or the description cannot be used.
    """
    try:
        record = Description.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            str(path), expected="a readable file", got=str(error.strerror), fix="correct the path"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "description"
        got = "another value" if first["type"] == "value_error" else repr(first["input"])[:80]
        raise ConfigError(f"{path}: {where}", expected=first["msg"].removeprefix("Value error, "), got=got,
                          fix="correct the file") from error  # fmt: skip
    seeds = _trial_seeds(seed, max(map(len, record.splits.values())))
    splits = {
        name: [{"scene": scene, "seed": s} for scene, s in zip(scenes, seeds, strict=False)]
        for name, scenes in record.splits.items()
    }
    kept = record.model_dump(exclude={"robot", "splits"})
    return BenchmarkSpec(robot_class=record.robot, splits=splits, **kept)


def on_real_robots(spec: BenchmarkSpec, robot_class: str, pass_score: float) -> BenchmarkSpec:
    """The same task on real robots: named `NAME-real`, for policies that have passed the simulated one.

    Args:
        spec: the simulated benchmark, with scenes of its own.
        robot_class: what the workers beside the real robots are started with as `--robot`.
        pass_score: mean score on the whole of a split of the simulated benchmark from which on it is passed.

    Raises:
        ConfigError: the score lies outside the benchmark's range.
    """
    least, most = spec.score_range or (-math.inf, math.inf)
    if not least <= pass_score <= most:
        raise ConfigError("--pass-score", expected=f"{least:g} to {most:g}, the range of {spec.name}",
                          got=f"{pass_score:g}", fix="choose a score within it")  # fmt: skip
    return replace(
        spec,
        name=f"{spec.name}-real",
        title=f"{spec.title}, on a real robot",
        robot_class=robot_class,
        prestage=spec.name,
        prestage_score=pass_score,
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
    """A benchmark by its name in `SUITES`, or from the file that describes it.

    Args:
        name: one of `SUITES`, or a path that ends in `.json`.
        trials: in each split, 1 to 10,000; a description has its own.
        seed: from which scenes and seeds follow.

    Raises:
        ConfigError: there is none, the description cannot be used, or the number of trials is out of range.

    Example:
        >>> make_suite("pendulum", 2, seed=0).robot_class
        'gym:Pendulum-v1'
    """
    if name.endswith(".json"):
        return read_suite(Path(name), seed)
    if name not in SUITES:
        raise ConfigError("benchmark", expected="a known benchmark, or a .json file that describes one", got=repr(name),
                          fix=nearest(name, SUITES))  # fmt: skip
    if not 1 <= trials <= _MOST:
        raise ConfigError("trials", expected=f"1 to {_MOST} a split", got=str(trials), fix="choose another number")
    return SUITES[name](trials, seed)
