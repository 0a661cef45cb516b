"""Is the estimator right, and what does a bonus cost: beside the published formula, beside all pairs, and in training?

The entropy of Gaussian states given their value is estimated where it is known in closed form, anew at each repetition.

The bonus of N states of 64 numbers with their values, k = 12, one thread, processor time, by turns in a process; all
sides must give the same bonuses. "published" broadcasts all differences and searches three times; "cdist" is PyTorch's
exact distances of all pairs. A last bonus, of 65,536 states, is computed in a process of its own, whose memory is read.
In training, A2C with a bonus and its critic goes by turns with A2C alone on MiniGrid, 16 environments of 8 steps.
"""

import time
from typing import Any

import gymnasium as gym
import minigrid  # noqa: F401 - registers its environments
import torch
from minigrid.wrappers import ImgObsWrapper
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env

from offbook.runs.benchmark import Options, median_metric, timed
from offbook.runs.ledger import Claim, Metric
from offbook.systems.vcse import VCSE
from offbook.systems.vcse.measure import TOLERANCE, Large, estimates, measure, seconds
from offbook.systems.vcse.sb3 import explore

# The side, the number of states, and how many times as long as ours it has to take.
SIDES = (("published", 2_048, 10.0), ("cdist", 8_192, 5.0))
SIZE, K, LARGE, MEMORY = 64, 12, 65_536, 1.5e9
SIZES, RHOS, SAMPLES, NEAR = (1, 2), (0.0, 0.6, 0.9), 4_096, 5
TASK, AGENTS, STEPS, ROLLOUTS, OVERHEAD = "MiniGrid-Empty-8x8-v0", 16, 8, 20, 0.35


def accuracy(options: Options) -> Claim:
    """Of the estimator, as `offbook explore check` has it: the largest error of all cases and seeds."""
    seeds = tuple(range(options.seed, options.seed + options.repeats))
    worst = [max(one.off for one in estimates(SIZES, RHOS, SAMPLES, NEAR, seed)) for seed in seeds]
    most = Metric(name="largest error", value=max(worst), unit="nats", higher_is_better=False)
    return Claim(
        system="exploration",
        claim=f"the entropy of states given their value is within {TOLERANCE:g} nats of the closed form",
        metrics=(most, median_metric("largest error of a seed", worst, unit="nats")),
        seeds=seeds,
        verdict="met" if most.value <= TOLERANCE else "missed",
        note=f"Gaussians of {' and '.join(map(str, SIZES))} numbers, correlations {', '.join(map(str, RHOS))}; "
        f"{SAMPLES:,} samples, k = {NEAR}; the worst case of all seeds.",
    )


def speed(options: Options) -> list[Claim]:
    """One claim for each side."""
    claims = []
    for side, count, least in SIDES:
        spent = seconds(count, SIZE, K, options.repeats, options.seed)
        pairs = [other / ours for other, ours in zip(spent[side], spent["ours"], strict=True)]
        ratio = median_metric(f"ratio to {side}, {count} states", pairs, higher_is_better=True)
        claims.append(
            Claim(
                system="exploration",
                claim=f"the bonus of {count} states is at least {least:g} times as fast as the side named {side!r}",
                metrics=(ratio, median_metric(f"ours, {count} states", spent["ours"], unit="s")),
                baseline_metrics=(median_metric(f"{side}, {count} states", spent[side], unit="s"),),
                seeds=(options.seed,),
                verdict="met" if ratio.value >= least else "missed",
                note=f"{SIZE} numbers each, k = {K}, one thread; judged by the median ratio of processor time.",
            )
        )
    return claims


def memory(options: Options) -> Claim:
    """Of one large bonus."""
    taken = measure(Large(count=LARGE, size=SIZE, k=K, seed=options.seed))
    return Claim(
        system="exploration",
        claim=f"the bonus of {LARGE} states is computed in less than {MEMORY / 1e9:g} GB, libraries included",
        metrics=(
            Metric(name="memory", value=taken.bytes, unit="B", higher_is_better=False),
            Metric(name="time", value=taken.seconds, unit="s", higher_is_better=False),
        ),
        seeds=(options.seed,),
        verdict="met" if taken.bytes < MEMORY else "missed",
        note=f"{SIZE} numbers each, k = {K}; the resident memory of a process of its own at its peak.",
    )


def agent(algorithm: type[A2C], seed: int) -> A2C:
    """On the picture of a grid, flattened."""

    def world() -> gym.Env[Any, Any]:
        return ImgObsWrapper(gym.make(TASK))

    return algorithm("MlpPolicy", make_vec_env(world, AGENTS, seed=seed), n_steps=STEPS, seed=seed, device="cpu")


def training(options: Options) -> Claim:
    """What bonus and critic add to a step of A2C."""
    kinds = {"with": explore(A2C, VCSE(k=3), beta=0.005), "without": A2C}
    agents = {name: agent(kind, options.seed) for name, kind in kinds.items()}
    steps = ROLLOUTS * AGENTS * STEPS
    sides = {name: lambda one=one: one.learn(steps, reset_num_timesteps=False) for name, one in agents.items()}
    spent = timed(sides, options.repeats, clock=time.process_time)
    for one in agents.values():
        one.get_env().close()
    more = median_metric("share added", [a / b - 1 for a, b in zip(spent["with"], spent["without"], strict=True)])
    return Claim(
        system="exploration",
        claim=f"bonus and critic add at most {OVERHEAD:.0%} to the processor time of a step of A2C",
        metrics=(more, median_metric("a step, with", [of / steps for of in spent["with"]], unit="s")),
        baseline_metrics=(median_metric("a step, without", [of / steps for of in spent["without"]], unit="s"),),
        seeds=(options.seed,),
        verdict="met" if more.value <= OVERHEAD else "missed",
        note=f"{TASK}, {AGENTS} environments, {STEPS} steps; judged by the median.",
    )


def run(options: Options) -> list[Claim]:
    """Measures all of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [accuracy(options), *speed(options), memory(options), training(options)]
    finally:
        torch.set_num_threads(threads)
