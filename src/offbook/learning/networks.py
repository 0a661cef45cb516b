"""The networks that behaviour cloning fits: standardised state and encoded images to a chunk of actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from offbook.client.protocol import ActionSpec, ObservationSpec
from offbook.data.normalise import Normalizer
from offbook.models.blockwise import Backbone, BackboneConfig, Full

Body = Literal["mlp", "transformer"]

HEADS = 4  # of the transformer
_KEYPOINTS = 32
# An input this many deviations from its mean tells no more than that.
INPUT_LIMIT = 10.0


class CloningNetwork(nn.Module):
    """Standardised state and encoded images through a body to H standardised actions (or logits of discrete ones).

    Args:
        observation: what it sees.
        action: what it gives.
        chunk: number H of actions.
        hidden: width of the layers.
        depth: number of layers.
        dropout: share of units dropped while training.
        body: an MLP, or a transformer in which a query for each action attends to the state and to each camera.
    """

    state_mean: Tensor
    state_std: Tensor
    action_mean: Tensor
    action_std: Tensor

    def __init__(
        self,
        observation: ObservationSpec,
        action: ActionSpec,
        *,
        chunk: int,
        hidden: int,
        depth: int,
        dropout: float,
        body: Body = "mlp",
    ) -> None:
        super().__init__()
        self.observation, self.action = observation, action
        self.sizes: dict[str, Any] = {"chunk": chunk, "hidden": hidden, "depth": depth, "body": body}
        size = observation.state_size
        self.encoders = nn.ModuleList(_encoder() for _ in observation.cameras)
        widths = [size, *(_KEYPOINTS * 2 for _ in observation.cameras)]
        self.outputs = action.choices or action.size
        module: nn.Module
        if body == "mlp":
            module = mlp(sum(widths), hidden, depth, dropout, chunk * self.outputs)
        else:
            module = _ActionQueries(widths, chunk, hidden, depth, dropout, self.outputs)
        # Files say by the names of weights which body it is.
        self.add_module(body, module)
        # In the module, so that a checkpoint is whole and a robot needs to know nothing of the recordings.
        self.register_buffer("state_mean", torch.zeros(size))
        self.register_buffer("state_std", torch.ones(size))
        self.register_buffer("action_mean", torch.zeros(action.size))
        self.register_buffer("action_std", torch.ones(action.size))

    def standardise(self, normalizer: Normalizer, parts: Sequence[str], action: str | None) -> None:
        """Takes over the statistics of the recordings; `action` is None where actions are discrete."""

        def joined(statistic: Mapping[str, np.ndarray], names: Sequence[str]) -> Tensor:
            return torch.from_numpy(np.concatenate([statistic[n].reshape(-1) for n in names]).astype(np.float32))

        for target, names in (("state", list(parts)), ("action", [action] if action else [])):
            if names:
                getattr(self, f"{target}_mean").copy_(joined(normalizer.mean, names))
                getattr(self, f"{target}_std").copy_(joined(normalizer.std, names))

    def forward(
        self, state: Float[Tensor, "batch state"], images: Mapping[str, UInt8[Tensor, "batch height width 3"]]
    ) -> Float[Tensor, "batch time outputs"]:
        """Standardised actions, or logits.

        Args:
            state: as recorded, in its own units.
            images: frames by camera.
        """
        seen = [standard(state, self.state_mean, self.state_std).clamp(-INPUT_LIMIT, INPUT_LIMIT)]
        for encoder, camera in zip(self.encoders, self.observation.cameras, strict=True):
            # A permuted NHWC tensor is what PyTorch calls channels_last: no copy, and convolutions like it.
            seen.append(_keypoints(encoder(images[camera].permute(0, 3, 1, 2).float() / 127.5 - 1)))
        out: Tensor = self.get_submodule(self.sizes["body"])(torch.cat(seen, 1))
        return out.reshape(len(state), self.sizes["chunk"], self.outputs)

    def act(
        self, state: Float[Tensor, "batch state"], images: Mapping[str, UInt8[Tensor, "batch height width 3"]]
    ) -> Float[Tensor, "batch time action"]:
        """Actions in the robot's units: the mean of continuous ones, the index of the likeliest discrete one."""
        out: Tensor = self(state, images).float()
        if self.action.choices is not None:
            return out.argmax(2, keepdim=True).float()
        return out * self.action_std + self.action_mean

    def targets(self, action: Float[Tensor, "batch time action"]) -> Float[Tensor, "batch time action"]:
        """Continuous actions in the units of the network's output."""
        return standard(action, self.action_mean, self.action_std)


class _ActionQueries(nn.Module):
    """A token for the state and one for each camera, and a learnt query for each action, through a transformer.

    All tokens see one another; what stands at the queries in the end becomes the actions, as in Zhao et al., "Learning
    Fine-Grained Bimanual Manipulation with Low-Cost Hardware" (2023), section IV, without its latent style.

    Args:
        widths: numbers of the state, which may be 0, and of each camera.
        chunk: number of actions.
        hidden: size of a token.
        depth: number of layers.
        dropout: share of the numbers dropped while training.
        outputs: numbers of an action.
    """

    def __init__(
        self, widths: Sequence[int], chunk: int, hidden: int, depth: int, dropout: float, outputs: int
    ) -> None:
        super().__init__()
        self.widths = [width for width in widths if width]
        positions = len(self.widths) + chunk
        config = BackboneConfig(
            dim=hidden, layers=depth, heads=HEADS, positions="learned", max_positions=positions, dropout=dropout,
            remat="none",
        )  # fmt: skip
        self.inputs = nn.ModuleList(nn.Linear(width, hidden) for width in self.widths)
        self.queries = nn.Parameter(torch.zeros(chunk, hidden))
        self.backbone, self.output = Backbone(config), nn.Linear(hidden, outputs)

    def forward(self, seen: Float[Tensor, "batch numbers"]) -> Float[Tensor, "batch outputs"]:
        """The actions, one behind the other."""
        parts = torch.split(seen, self.widths, 1)
        tokens = [embed(part)[:, None] for embed, part in zip(self.inputs, parts, strict=True)]
        hidden = self.backbone(torch.cat([*tokens, self.queries.expand(len(seen), -1, -1)], 1), mask=Full())
        out: Tensor = self.output(hidden[:, len(tokens) :])
        return out.flatten(1)


def mlp(width: int, hidden: int, depth: int, dropout: float, outputs: int) -> nn.Module:
    """Fully connected layers with ReLU between them, none after the last."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout)]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def standard(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Standardised values; zero where the deviation is 0, which is how `Normalizer` marks a constant."""
    return (values - mean) / torch.where(std > 0, std, torch.inf)


def _encoder() -> nn.Module:
    """Feature maps at a quarter of the resolution, one for each keypoint."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 6, stride=4, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, _KEYPOINTS, 1),
    )


def _keypoints(maps: Float[Tensor, "batch keypoint height width"]) -> Float[Tensor, "batch coordinates"]:
    """Where each feature is seen: the mean of a softmax over the map, both coordinates in [-1, 1].

    Source: Levine et al., "End-to-End Training of Deep Visuomotor Policies" (2016), section 6.1.
    """
    height, width = maps.shape[2:]
    weight = maps.float().flatten(2).softmax(2).reshape(maps.shape)
    x = weight.sum(2) @ torch.linspace(-1, 1, width, device=maps.device)
    y = weight.sum(3) @ torch.linspace(-1, 1, height, device=maps.device)
    return torch.cat([x, y], 1)


def shift_images(
    images: UInt8[Tensor, "batch height width channels"], largest: int, rng: torch.Generator
) -> UInt8[Tensor, "batch height width channels"]:
    """Shifts each image by whole pixels at random and repeats its border, so that a policy does not rely on one pixel.

    Source: Kostrikov et al., "Image Augmentation Is All You Need" (2021), section 3.1.
    """
    if largest == 0:
        return images
    batch, height, width = images.shape[:3]
    moves = torch.randint(-largest, largest + 1, (2, batch, 1), generator=rng).to(images.device)
    rows = (torch.arange(height, device=images.device) + moves[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + moves[1]).clamp(0, width - 1)
    return images[torch.arange(batch, device=images.device)[:, None, None], rows[:, :, None], columns[:, None]]
