"""An agent that learns to act from pictures, of DrQ-v2's form: what it consists of, and one step of its learning.

A convolutional network makes maps of the last few pictures; actor and critics each have a trunk of their own on them.
The critics' error trains the convolutions, the actor's does not. Pictures are shifted at random before they are looked
at, which is what makes so few of them enough.

Source: Yarats et al., "Mastering Visual Continuous Control: Improved Data-Augmented Reinforcement Learning" (2021),
arXiv:2107.09645.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from offbook.errors import check_settings
from offbook.learning.networks import mlp, shift_images
from offbook.learning.pixel_replay import Transitions


@dataclass(frozen=True, kw_only=True)
class PixelSizes:
    """Of the networks.

    Attributes:
        stack: pictures that are seen at a time.
        channels: maps of each of the four convolutions.
        features: numbers that a trunk makes of the maps.
        hidden: width of the two layers behind a trunk.
    """

    stack: int = 3
    channels: int = 32
    features: int = 50
    hidden: int = 1_024

    def __post_init__(self) -> None:
        checks = {
            "stack": (1 <= self.stack <= 16, "1 to 16"),
            "channels": (1 <= self.channels <= 1_024, "1 to 1024"),
            "features": (1 <= self.features <= 4_096, "1 to 4096"),
            "hidden": (1 <= self.hidden <= 65_536, "1 to 65536"),
        }
        check_settings(self, checks, "--sizes.")


class PixelNetwork(nn.Module):
    """Convolutions and actor: what is left of an agent when it has learnt.

    Args:
        side: height and width of a picture, 16 or more each.
        actions: numbers of an action.
        sizes: see `PixelSizes`.

    Attributes:
        maps: numbers that the convolutions give.
    """

    def __init__(self, side: tuple[int, int], actions: int, sizes: PixelSizes) -> None:
        super().__init__()
        self.sizes, width = sizes, sizes.channels
        layers: list[nn.Module] = []
        for number in range(4):
            layers += [nn.Conv2d(width if number else 3 * sizes.stack, width, 3, 1 if number else 2), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        left = [(pixels - 3) // 2 - 5 for pixels in side]
        self.maps = width * left[0] * left[1]
        self.trunk = trunk(self.maps, sizes.features)
        self.actor = mlp(sizes.features, sizes.hidden, 2, 0.0, actions)

    def look(
        self,
        films: UInt8[Tensor, "batch time height width 3"],
        shift: int = 0,
        rng: torch.Generator | None = None,
    ) -> Float[Tensor, "batch maps"]:
        """The maps of some pictures.

        Args:
            films: the latest last.
            shift: so many pixels, at most, each film is shifted up or down and sideways, as a whole.
            rng: of the shifts.
        """
        pictures = films.permute(0, 2, 3, 1, 4).flatten(3)
        if rng is not None:
            pictures = shift_images(pictures, shift, rng)
        maps: Tensor = self.convolutions(pictures.permute(0, 3, 1, 2).float() / 255 - 0.5)
        return maps

    def act(self, maps: Float[Tensor, "batch maps"]) -> Float[Tensor, "batch action"]:
        """Actions between -1 and 1."""
        told: Tensor = self.actor(self.trunk(maps))
        return told.tanh()

    def forward(self, films: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch action"]:
        """Actions between -1 and 1 for what is seen."""
        action: Tensor = self.act(self.look(films))
        return action


class TwinCritic(nn.Module):
    """Two values of an action, on one trunk.

    Args:
        maps: numbers that the convolutions give.
        actions: numbers of an action.
        sizes: see `PixelSizes`.
    """

    def __init__(self, maps: int, actions: int, sizes: PixelSizes) -> None:
        super().__init__()
        self.trunk = trunk(maps, sizes.features)
        self.values = nn.ModuleList(mlp(sizes.features + actions, sizes.hidden, 2, 0.0, 1) for _ in range(2))

    def forward(
        self, maps: Float[Tensor, "batch maps"], action: Float[Tensor, "batch action"]
    ) -> Float[Tensor, "2 batch"]:
        """Both values."""
        seen = torch.cat([self.trunk(maps), action], 1)
        return torch.stack([value(seen)[:, 0] for value in self.values])

    def loss(
        self,
        maps: Float[Tensor, "batch maps"],
        action: Float[Tensor, "batch action"],
        target: Float[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """Squared errors of both, added up."""
        values: Tensor = self(maps, action)
        return (values - target).square().mean(1).sum()


def trunk(maps: int, features: int) -> nn.Module:
    """From maps to a few numbers between -1 and 1."""
    return nn.Sequential(nn.Linear(maps, features), nn.LayerNorm(features), nn.Tanh())


def draw_weights(module: nn.Module) -> None:
    """Orthogonal matrices, those of convolutions larger by the root of 2 for the ReLU behind them; biases of 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.orthogonal_(layer.weight, 2**0.5 if isinstance(layer, nn.Conv2d) else 1.0)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A batch as an agent sees it while it learns; no gradient leads out of it.

    Attributes:
        here: maps at the moment of acting.
        action: what was done, from -1 to 1.
        intended: what the actor would do there now, without noise.
        reward: of the steps until `there`, discounted and added up.
        discount: of what follows.
        there: maps at that moment.
        following: what the actor would do there, with the noise that the agent's own target has.
    """

    here: Float[Tensor, "batch maps"]
    action: Float[Tensor, "batch action"]
    intended: Float[Tensor, "batch action"]
    reward: Float[Tensor, " batch"]
    discount: Float[Tensor, " batch"]
    there: Float[Tensor, "batch maps"]
    following: Float[Tensor, "batch action"]


@runtime_checkable
class Exploration(Protocol):
    """What pays an agent beside its reward. It must draw nothing from PyTorch's default generator.

    Attributes:
        step: steps of the environment so far.
        report: of the last batch, by name; logged.
    """

    step: int
    report: dict[str, float]

    def pay(self, batch: Encoded) -> Float[Tensor, " batch"]:
        """What is added to the rewards of a batch; it may learn from it."""

    def state_dict(self) -> Mapping[str, Any]:
        """All that a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """See `state_dict`."""


class PixelAgent:
    """Networks, their targets and their optimisers.

    Args:
        network: convolutions and actor, with weights as they shall begin, on the device that learns.
        critic: likewise.
        learning_rate: of Adam, for all.
        tau: share of the critics that their target takes over in an update.
        shift: see `PixelNetwork.look`.
        clip: largest size of the noise in what the networks learn from.
    """

    def __init__(
        self, network: PixelNetwork, critic: TwinCritic, *, learning_rate: float, tau: float, shift: int, clip: float
    ) -> None:
        self.network, self.critic, self.target = network, critic, deepcopy(critic).requires_grad_(False)
        self.tau, self.shift, self.clip = tau, shift, clip
        self._seeing = [*chain(network.convolutions.parameters(), critic.parameters())]
        self._acting = [*chain(network.trunk.parameters(), network.actor.parameters())]
        self._optimisers = [torch.optim.Adam(of, learning_rate) for of in (self._seeing, self._acting)]

    def update(
        self,
        batch: Transitions,
        noise: float,
        rng: torch.Generator,
        exploration: Exploration | None = None,
    ) -> dict[str, Tensor]:
        """One step of critics, convolutions and actor; gives metrics.

        Args:
            batch: on the device of the networks, its actions from -1 to 1.
            noise: deviation of what is added to actions.
            rng: on the CPU, of shifts and noise.
            exploration: adds to the rewards.
        """
        here = self.network.look(batch.here, self.shift, rng)
        seen = here.detach()
        with torch.no_grad():
            there = self.network.look(batch.there, self.shift, rng)
            following = self._noisy(self.network.act(there), noise, rng)
            reward = batch.reward
            if exploration is not None:
                encoded = Encoded(
                    here=seen, action=batch.action, intended=self.network.act(seen), reward=reward,
                    discount=batch.discount, there=there, following=following,
                )  # fmt: skip
                reward = reward + exploration.pay(encoded)
            target = reward + batch.discount * self.target(there, following).amin(0)
        loss = self.critic.loss(here, batch.action, target)
        self._step(0, self._seeing, loss)
        actor_loss = -self.critic(seen, self._noisy(self.network.act(seen), noise, rng)).amin(0).mean()
        self._step(1, self._acting, actor_loss)
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                slow.lerp_(fast, self.tau)
        return {"critic_loss": loss.detach(), "actor_loss": actor_loss.detach(), "q": target.mean()}

    def _noisy(self, action: Tensor, noise: float, rng: torch.Generator) -> Tensor:
        """Actions with truncated noise; the gradient is theirs where the bounds cut them, too."""
        drawn = noise * torch.randn(action.shape, generator=rng)
        noisy = action + drawn.clamp(-self.clip, self.clip).to(action.device)
        return noisy + (noisy.clamp(-1, 1) - noisy).detach()

    def _step(self, number: int, of: list[nn.Parameter], loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, of)
        for weight, gradient in zip(of, gradients, strict=True):
            weight.grad = gradient
        self._optimisers[number].step()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        modules = {"network": self.network, "critic": self.critic, "target": self.target}
        states = {name: module.state_dict() for name, module in modules.items()}
        return {**states, "optimisers": [one.state_dict() for one in self._optimisers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        for name, module in (("network", self.network), ("critic", self.critic), ("target", self.target)):
            module.load_state_dict(state[name])
        for mine, one in zip(self._optimisers, state["optimisers"], strict=True):
            mine.load_state_dict(one)
