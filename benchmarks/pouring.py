"""The anchors of the pouring task: the scripted expert, the random policy, and what an episode costs.

Limits: over 40 evaluation seeds the expert pours at least 0.9 of the grains into the bowl on average, the random policy
at most 0.05; an expert's episode with a 64x64 picture at every step takes at most one second of one core's time.
"""

import time
from functools import partial

from offbook.evaluate.stats import Interval, bootstrap_mean, wilson
from offbook.runs.benchmark import Options, median_metric
from offbook.runs.ledger import Claim, Metric
from offbook.runs.parallel import run_parallel
from offbook.runs.seeding import evaluation_seeds
from offbook.sim.adapters import make
from offbook.sim.experts import make_expert, random_policy
from offbook.sim.play import play

EPISODES, JOBS, BLOCK = 40, 2, 10


def play_block(policy_name: str, seeds: list[int]) -> list[tuple[float, bool, float]]:
    """Score, success and seconds of CPU time of an episode for each seed."""
    env = make("offbook:pour")
    policy = make_expert("offbook:pour") if policy_name == "expert" else random_policy(env)
    results = []
    for seed in seeds:
        start = time.process_time()
        [played] = play([env], policy, [seed], keep=False)
        results.append((float(played.score or 0.0), bool(played.success), time.process_time() - start))
    env.close()
    return results


def measure(policy_name: str, seeds: list[int]) -> list[tuple[float, bool, float]]:
    blocks = [seeds[i : i + BLOCK] for i in range(0, len(seeds), BLOCK)]
    done = run_parallel(partial(play_block, policy_name), blocks, jobs=JOBS, label=f"pouring, {policy_name}")
    return [result for block in done for result in block]


def metric(name: str, interval: Interval, higher_is_better: bool | None = True) -> Metric:
    return Metric(
        name=name,
        value=interval.value,
        n=interval.n,
        interval=(interval.low, interval.high),
        method=interval.method,
        higher_is_better=higher_is_better,
    )


def run(options: Options) -> list[Claim]:
    seeds = evaluation_seeds(options.seed, EPISODES)
    results = {name: measure(name, seeds) for name in ("expert", "random")}
    fractions = {
        name: bootstrap_mean([score for score, _, _ in episodes], seed=options.seed)
        for name, episodes in results.items()
    }
    metrics = [
        metric(f"fraction poured, {name}", interval, None if name == "random" else True)
        for name, interval in fractions.items()
    ]
    metrics += [
        metric(f"success, {name}", wilson(sum(success for _, success, _ in episodes), len(episodes)), None)
        for name, episodes in results.items()
    ]
    apart = fractions["expert"].value >= 0.9 and fractions["random"].value <= 0.05
    cost = median_metric("CPU time of an expert's episode", [spent for _, _, spent in results["expert"]], unit="s")
    return [
        Claim(
            system="pouring",
            claim="the scripted expert pours at least 0.9 of the grains, the random policy at most 0.05",
            metrics=tuple(metrics),
            seeds=tuple(seeds),
            verdict="met" if apart else "missed",
        ),
        Claim(
            system="pouring",
            claim="an expert's episode with a 64x64 picture at every step takes at most 1 s of CPU time",
            metrics=(cost,),
            seeds=tuple(seeds),
            verdict="met" if cost.value <= 1.0 else "missed",
            note="an absolute time of one machine; under load it grows",
        ),
    ]
