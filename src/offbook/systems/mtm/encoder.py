"""A trained model as the eyes of an agent of Stable-Baselines3: states in, features out."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from offbook.errors import ConfigError, needs_extra
from offbook.learning.masked_model import MaskedTrajectoryModel
from offbook.learning.networks import INPUT_LIMIT, standard
from offbook.learning.trajectories import STATE

with needs_extra("rl"):
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

if TYPE_CHECKING:
    import gymnasium as gym


class StandardState(BaseFeaturesExtractor):
    """The state as a model's recordings standardise it, without what the model makes of it: what to compare with.

    Args:
        observation_space: of the task: one vector, as the model's recordings have it.
        model: a trained one.
        features: how many more numbers there will be.

    Raises:
        ConfigError: the observation is not what the model knows as a state.
    """

    def __init__(self, observation_space: gym.Space[Any], model: MaskedTrajectoryModel, features: int = 0) -> None:
        size, shape = model.modalities[STATE].size, observation_space.shape
        if shape != (size,):
            fix = "use a model of this task's recordings"
            where = type(self).__name__
            raise ConfigError(where, expected=f"an observation of shape ({size},)", got=f"{shape}", fix=fix)
        super().__init__(observation_space, features + size)
        for of in ("mean", "std"):
            self.register_buffer(of, model.get_buffer(f"{STATE}_{of}").clone())

    def forward(self, observations: Float[Tensor, "batch size"]) -> Float[Tensor, "batch features"]:
        """The state, in standard deviations from its mean."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return standard(observations, mean, std).clamp(-INPUT_LIMIT, INPUT_LIMIT)


class StateFeatures(StandardState):
    """What the encoder makes of the present state alone; beside it the state itself, standardised.

    Args:
        observation_space: of the task: one vector, as the model's recordings have it.
        model: a trained one; each extractor works on a copy.
        freeze: keep the encoder as it is; else the agent's losses train it further.

    Raises:
        ConfigError: the observation is not what the model knows as a state.

    Example:
        >>> from stable_baselines3 import TD3
        >>> from offbook.learning.masked_model import Modality, Sizes
        >>> model = MaskedTrajectoryModel([Modality(name="state", size=3)], Sizes(length=2, dim=16, heads=2))
        >>> policy = {"features_extractor_class": StateFeatures, "features_extractor_kwargs": {"model": model}}
        >>> TD3("MlpPolicy", "Pendulum-v1", policy_kwargs=policy).actor.features_dim
        19

    Source: Wu et al., "Masked Trajectory Models for Prediction, Representation, and Control" (2023), where the
        agent gets the encoder's output alone.
    """

    def __init__(self, observation_space: gym.Space[Any], model: MaskedTrajectoryModel, freeze: bool = True) -> None:
        super().__init__(observation_space, model, features=model.tokens[STATE] * model.sizes.dim)
        self.model = copy.deepcopy(model).eval()
        if freeze:
            self.model.requires_grad_(False)

    def train(self, mode: bool = True) -> StateFeatures:
        """Never drops anything: an agent's critic and its target must see the same."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, observations: Float[Tensor, "batch size"]) -> Float[Tensor, "batch features"]:
        """The features."""
        return torch.cat([self.model.encode_state(observations), super().forward(observations)], 1)
