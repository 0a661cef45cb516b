"""The pouring task: its anchors, and what behaviour cloning makes of 40 recordings of the expert.

Limits: over 40 evaluation seeds the expert pours at least 0.9 of the grains into the bowl on average, the random policy
at most 0.05, on scenes like those of the recordings; there both clones stand clearly above the random policy and the
clone of the pictures clearly below the expert (no intervals meet). Where everything varies at once, which no recording
shows, both clones shall still be above the random policy. All four meet the same scenes. Nothing was tuned on the
default seed of these episodes.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from offbook.client.protocol import Policy
from offbook.evaluate.rollout import evaluate_policy
from offbook.evaluate.stats import Interval, bounded_mean
from offbook.learning.cloning import CloningConfig, train_cloning
from offbook.runs.benchmark import Options
from offbook.runs.directory import RunDirectory
from offbook.runs.ledger import Claim, Metric
from offbook.runs.seeding import evaluation_seeds
from offbook.sim.adapters import make
from offbook.sim.experts import make_expert, random_policy
from offbook.sim.recording import record

WORLD, EPISODES, RECORDINGS, JOBS = "offbook:pour", 40, 40, 2
# The clone's settings were chosen while looking at episodes of evaluation seed 0; these are others.
FRESH = 2026
CLONES = {
    "clone of the state": CloningConfig(parts=("joints", "objects")),
    "clone of the pictures": CloningConfig(parts=("joints",), cameras=("front",)),
}


def policies(folder: Path, seed: int) -> dict[str, Policy]:
    """Both anchors and both clones, by name."""
    env = make(WORLD)
    made: dict[str, Policy] = {"expert": make_expert(WORLD), "random": random_policy(env)}
    env.close()
    store = record(WORLD, RECORDINGS, folder / "recordings", seed=seed, jobs=JOBS)
    for name, config in CLONES.items():
        made[name] = train_cloning(store, config, RunDirectory.create(folder / name, config))
    return made


def fraction(policy: Policy, split: str, seed: int) -> Interval:
    results = evaluate_policy(
        WORLD, policy, episodes=EPISODES, seed=seed, settings={"split": split}, parallel=4, jobs=JOBS
    ).results
    return bounded_mean([float(result.score or 0.0) for result in results], 0.0, 1.0, seed=seed)


def claim(text: str, fractions: dict[str, Interval], baseline: Sequence[str], seeds: list[int], met: bool) -> Claim:
    metrics = {
        name: Metric(
            name=f"fraction poured, {name}",
            value=interval.value,
            n=interval.n,
            interval=(interval.low, interval.high),
            method=interval.method,
            higher_is_better=None if name == "random" else True,
        )
        for name, interval in fractions.items()
    }
    return Claim(
        system="pouring",
        claim=text,
        metrics=tuple(metric for name, metric in metrics.items() if name not in baseline),
        baseline_metrics=tuple(metrics[name] for name in baseline),
        seeds=tuple(seeds),
        verdict="met" if met else "missed",
    )


def run(options: Options) -> list[Claim]:
    seed = options.seed or FRESH
    seeds = evaluation_seeds(seed, EPISODES)
    with TemporaryDirectory() as folder:
        made = policies(Path(folder), options.seed)
        seen, varied = (
            {name: fraction(policy, split, seed) for name, policy in made.items()} for split in ("seen", "all")
        )
    anchors = {name: seen[name] for name in ("expert", "random")}
    apart = seen["expert"].value >= 0.9 and seen["random"].value <= 0.05
    above, still = ([on["random"].high < on[name].low for name in CLONES] for on in (seen, varied))
    below = seen["clone of the pictures"].high < seen["expert"].low
    return [
        claim(
            "the scripted expert pours at least 0.9 of the grains, the random policy at most 0.05",
            anchors, (), seeds, apart,
        ),
        claim(
            "on scenes like those of 40 recordings, clones are above random, that of the pictures below the expert",
            seen, ("expert", "random"), seeds, all(above) and below,
        ),
        claim(
            "where everything varies, which no recording shows, both clones are still above the random policy",
            varied, ("expert", "random"), seeds, all(still),
        ),
    ]  # fmt: skip
