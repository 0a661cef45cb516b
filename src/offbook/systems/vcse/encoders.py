"""From observations to the features among which neighbours are searched: fixed maps that learn nothing.

Any module that takes a batch of observations and gives one row for each can stand in their place, such as one of
`offbook.models`; distances between its features should mean something.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from offbook.errors import ConfigError

SIDE = 24
"""In pixels: larger pictures are averaged down to this."""


class Identity(nn.Module):
    """Observations as they are, as one row each.

    Args:
        scale: factor; VCSE compares distances of features with those of values, whose spread is 1.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, observations: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch size"]:
        """The features."""
        return observations.flatten(1).float() * self.scale


class RandomProjection(nn.Module):
    """A fixed Gaussian map to fewer numbers, which keeps distances on average.

    Args:
        inputs: numbers of an observation.
        size: of the features.
        seed: of the map.

    Source: Johnson and Lindenstrauss (1984).
    """

    weight: Tensor

    def __init__(self, inputs: int, size: int = 64, *, seed: int = 0) -> None:
        super().__init__()
        weight = torch.randn(inputs, size, generator=torch.Generator().manual_seed(seed)) / math.sqrt(size)
        self.register_buffer("weight", weight)

    def forward(self, observations: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch size"]:
        """The features."""
        return observations.flatten(1).float() @ self.weight


class RandomConv(nn.Module):
    """A small convolutional network that stays as it was drawn.

    Args:
        shape: of an observation, channels first or last, at least 7 x 7 pixels; larger ones are averaged down.
        size: of the features.
        scale: factor of the observations; 1 for the small codes of grid worlds, 1 / 255 for pictures.
        seed: of the weights.

    Raises:
        ConfigError: the shape is not that of a picture.

    Example:
        >>> RandomConv((7, 7, 3))(torch.zeros(5, 7, 7, 3)).shape
        torch.Size([5, 64])

    Source: three layers of 2 x 2 kernels and a maximum, as in the published code of Kim et al. (2023); fixed encoders,
    Seo et al., "State entropy maximization with random encoders" (2021).
    """

    def __init__(self, shape: tuple[int, ...], size: int = 64, *, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        if len(shape) != 3 or sorted(shape)[1] < 7:
            fix = "use Identity or RandomProjection"
            raise ConfigError("RandomConv", expected="pictures of 7 x 7 or more", got=f"shape {shape}", fix=fix)
        self.first, self.scale = shape[0] < shape[2], scale
        channels, height, width = shape if self.first else (shape[2], *shape[:2])
        self.sides = (min(height, SIDE), min(width, SIDE))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, 16, 2), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 2), nn.ReLU(), nn.Conv2d(32, 64, 2), nn.ReLU(), nn.Flatten(),
            )  # fmt: skip
            left = [side // 2 - 2 - (side % 2 == 0) for side in self.sides]
            numbers = 64 * left[0] * left[1]
        # At 7 x 7 the network ends with 64 numbers, and the published encoder is just that.
        self.output = nn.Identity() if numbers == size else RandomProjection(numbers, size, seed=seed)
        self.requires_grad_(False)

    def forward(self, observations: Float[Tensor, "batch a b c"]) -> Float[Tensor, "batch size"]:
        """The features."""
        x = observations.float() * self.scale
        x = x if self.first else x.permute(0, 3, 1, 2)
        if x.shape[2:] != self.sides:
            x = functional.adaptive_avg_pool2d(x, self.sides)
        features: Tensor = self.output(self.layers(x))
        return features


class Joined(nn.Module):
    """The features of several named observations beside each other.

    Args:
        encoders: one for each name; other observations are not looked at.
    """

    def __init__(self, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        # A module's name may hold no dot; the names of observations may.
        self.names, self.encoders = tuple(encoders), nn.ModuleList(encoders.values())

    def forward(self, observations: Mapping[str, Tensor]) -> Float[Tensor, "batch size"]:
        """The features."""
        return torch.cat([e(observations[n]) for n, e in zip(self.names, self.encoders, strict=True)], 1)
