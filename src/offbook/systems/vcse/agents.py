"""The agents of the reproduction: A2C in grid worlds and SAC on bodies, which differ in nothing but the bonus.

Those that see pictures are made in `pixels`.

Sizes and rates of A2C are the published ones. The published SAC is 1,024 wide and learns from batches of 1,024; this
one is to finish on a processor. Its temperature is fixed at the published 0.001, so that it explores by a bonus or not.

Source: the code of Kim et al. (2023), as far as it was read.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from torch import Tensor

from offbook.errors import needs_extra
from offbook.runs.seeding import training_seeds
from offbook.sim.adapters import make
from offbook.systems.vcse.bonus import RND, VCSE, Bonus, StateEntropy
from offbook.systems.vcse.encoders import Identity, RandomConv
from offbook.systems.vcse.presets import Task
from offbook.systems.vcse.sb3 import explore

with needs_extra("rl"):
    from stable_baselines3 import A2C, SAC
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

PLAIN, ENTROPY, RANDOM, HIDDEN, OURS = "plain", "state entropy", "RND", "VCSE without values", "VCSE"
ARMS = (PLAIN, ENTROPY, RANDOM, HIDDEN, OURS)
"""What an agent explores by. Published state entropy is positive and scaled; `HIDDEN` is VCSE but for the values."""

_WORLDS = 16  # of an A2C agent; with 8 steps of each, neighbours are searched among 128 states
_FEATURES = 64


class GridFeatures(BaseFeaturesExtractor):
    """The network that `RandomConv` is, with weights that learn.

    Args:
        space: of the codes of a grid world, (7, 7, 3) or (3, 7, 7).
    """

    def __init__(self, space: gym.Space[Any]) -> None:
        super().__init__(space, _FEATURES)
        self.network = RandomConv(space.shape or (), _FEATURES).requires_grad_(True)

    def forward(self, observations: Tensor) -> Tensor:
        """The features."""
        features: Tensor = self.network(observations)
        return features


def world(task: Task) -> gym.Env[Any, Any]:
    """The codes of the cells that an agent sees of a grid world, or the state of a body as one vector."""
    if task.algorithm == "sac":
        return gym.wrappers.FlattenObservation(make(task.name, **task.settings))
    with needs_extra("sim"):
        import minigrid  # noqa: F401 - registers its environments
        from minigrid.wrappers import ImgObsWrapper
    codes: gym.Env[Any, Any] = ImgObsWrapper(gym.make(task.name.partition(":")[2]))  # type: ignore[no-untyped-call]
    return codes


def agent(task: Task, arm: str, seed: int) -> BaseAlgorithm:
    """A newborn agent with worlds of its own.

    Args:
        task: what it is to learn.
        arm: one of `ARMS`.
        seed: agents of one seed begin with the same weights in the same worlds, whatever they explore by.
    """
    # Stable-Baselines3 seeds the first world with the agent's seed and the others with those that follow.
    first = training_seeds(seed, _WORLDS)[0]
    if task.algorithm == "a2c":
        worlds = make_vec_env(lambda: world(task), _WORLDS)
        algorithm = A2C if arm == PLAIN else explore(
            A2C, _bonus(task, arm, _FEATURES, seed), beta=task.beta, propagate="step", seed=seed
        )  # fmt: skip
        return algorithm(
            "CnnPolicy", worlds, seed=first, device="cpu", n_steps=8, learning_rate=1e-3, gae_lambda=0.95, gamma=0.99,
            ent_coef=0.01, vf_coef=0.5, max_grad_norm=0.5, rms_prop_eps=1e-8,
            policy_kwargs={
                "features_extractor_class": GridFeatures, "normalize_images": False, "net_arch": [64],
            },
        )  # fmt: skip
    body = world(task)
    size = gym.spaces.flatdim(body.observation_space)
    learner = SAC if arm == PLAIN else explore(
        SAC, _bonus(task, arm, size, seed), beta=task.beta, encoder=Identity(scale=1 / size), seed=seed
    )  # fmt: skip
    return learner(
        "MlpPolicy", body, seed=first, device="cpu", learning_rate=1e-3, batch_size=128, ent_coef=0.001,
        learning_starts=min(1_000, task.steps // 4), policy_kwargs={"net_arch": [128, 128]},
    )  # fmt: skip


def _bonus(task: Task, arm: str, size: int, seed: int) -> Bonus:
    if arm == ENTROPY:
        # As published: A2C's is divided by its deviation, SAC's by its mean.
        return StateEntropy(task.k, scaling="std" if task.algorithm == "a2c" else "mean")
    return RND(size, seed=seed) if arm == RANDOM else VCSE(task.k, conditional=arm == OURS)
