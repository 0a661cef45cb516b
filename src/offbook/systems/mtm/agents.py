"""Does TD3 learn a cart-pole faster on the state and a model's features, frozen or tuned, than on the state alone?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from offbook.errors import needs_extra
from offbook.learning.arms import fit_all
from offbook.learning.masked_roles import RolePolicy
from offbook.runs.directory import kept
from offbook.runs.parallel import run_parallel
from offbook.runs.seeding import evaluation_seeds, generator
from offbook.sim.adapters import make
from offbook.sim.recording import record
from offbook.systems.mtm.experiments import Arm
from offbook.systems.mtm.presets import MtmStudy

TASK = "dmc:cartpole-swingup"
PLAIN = "state alone"
KINDS = (PLAIN, "frozen features", "tuned features")
# Episodes at each look at an agent.
EPISODES = 2


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One agent's life.

    Attributes:
        kind: what it sees, one of `KINDS`.
        seed: of it.
        steps: lived at each look.
        returns: mean return of the evaluation episodes at each look.
    """

    kind: str
    seed: int
    steps: tuple[int, ...]
    returns: tuple[float, ...]


def learning_curves(study: MtmStudy, out: Path) -> list[Curve]:
    """Records slow random actions, fits a model to them for each seed, and lets agents learn with and without it."""
    store = record(TASK, study.cartpole, out / "cartpole", policy="drift", jobs=study.jobs)
    config = replace(study.model, model=study.encoder)
    encoders = [
        Arm(store=store.path, model=config, config=replace(config, fit=replace(config.fit, seed=seed)),
            folder=out / f"encoder-{seed}")
        for seed in study.seeds
    ]  # fmt: skip
    fit_all(encoders, study.jobs)
    lives = [(kind, seed, encoder) for seed, encoder in zip(study.seeds, encoders, strict=True) for kind in KINDS]
    looks = [round(study.agent_steps * look / study.looks) for look in range(1, study.looks + 1)]
    live = partial(_remembered, looks=looks, out=out)
    return list(run_parallel(live, lives, jobs=study.jobs, label="agents"))


def _remembered(life: tuple[str, int, Arm], looks: Sequence[int], out: Path) -> Curve:
    kind, seed, encoder = life
    found = kept(out / f"{kind.replace(' ', '-')}-{seed}.json", partial(_live, kind, seed, encoder, looks))
    return Curve(kind=kind, seed=seed, steps=tuple(looks), returns=tuple(found))


def _live(kind: str, seed: int, encoder: Arm, looks: Sequence[int]) -> list[float]:
    with needs_extra("rl"):
        from stable_baselines3 import TD3
        from stable_baselines3.common.noise import NormalActionNoise

        from offbook.systems.mtm.encoder import StandardState, StateFeatures
    trained = encoder.fit()
    if not isinstance(trained, RolePolicy):
        raise TypeError("an encoder is a masked trajectory model")
    settings: dict[str, Any] = {"net_arch": [256, 256], "features_extractor_kwargs": {"model": trained.module}}
    # What the state is scaled by is the same for all: only features may make a difference.
    settings["features_extractor_class"] = StandardState if kind == PLAIN else StateFeatures
    if kind != PLAIN:
        settings["features_extractor_kwargs"]["freeze"] = kind == "frozen features"
    world, test = (gym.wrappers.FlattenObservation(make(TASK)) for _ in range(2))
    try:
        first = int(generator(seed, "agent").integers(2**31))
        noise = NormalActionNoise(np.zeros(1), np.full(1, 0.2))
        agent = TD3(
            "MlpPolicy", world, seed=first, device="cpu", policy_kwargs=settings, action_noise=noise,
            learning_rate=1e-3, learning_starts=min(1_000, looks[0] // 2), batch_size=128,
        )  # fmt: skip
        returns, lived = [], 0
        for look in looks:
            agent.learn(look - lived, reset_num_timesteps=False)
            lived = look
            returns.append(float(np.mean([_episode(agent, test, each) for each in evaluation_seeds(0, EPISODES)])))
        return returns
    finally:
        world.close()
        test.close()


def _episode(agent: Any, env: gym.Env[Any, Any], seed: int) -> float:
    observation, _ = env.reset(seed=seed)
    total, ended = 0.0, False
    while not ended:
        action, _ = agent.predict(observation, deterministic=True)
        observation, reward, terminated, truncated, _ = env.step(action)
        total, ended = total + float(reward), terminated or truncated
    return total
