"""Exploration for an agent that sees pictures: neighbours among what a trunk has learnt to see of its actions.

The agent is `offbook.learning.pixel_agent`. On the maps of its convolutions stands a trunk that learns which action
lies between two moments, and what follows from one; in its numbers neighbours are searched. The value is that of a twin
critic of the task's reward alone, at the action that the agent intends. No gradient of either reaches the convolutions,
and no random number is taken from the agent.

Source: the published code of Kim et al. (2023) for DrQ-v2, as far as it was read; curiosity, Pathak et al.,
"Curiosity-driven exploration by self-supervised prediction" (2017).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from offbook.errors import check_settings
from offbook.learning.networks import mlp
from offbook.learning.pixel_agent import Encoded, PixelSizes, TwinCritic, draw_weights, trunk
from offbook.learning.pixel_training import Explores, PixelConfig
from offbook.runs.seeding import generator
from offbook.systems.vcse.bonus import RND, VCSE, Bonus, StateEntropy
from offbook.systems.vcse.explorer import Payer
from offbook.systems.vcse.scaling import Beta

Kind = Literal["none", "state-entropy", "rnd", "vcse-without-values", "vcse"]


@dataclass(frozen=True, kw_only=True)
class ExploringConfig(PixelConfig):
    """An agent that sees pictures and what it explores by.

    Attributes:
        bonus: what the agent is paid beside the task's reward.
        beta: weight of the bonus.
        k: of state entropy and VCSE, which neighbour counts, the state itself not counted.
    """

    bonus: Kind = "none"
    beta: float = 0.1
    k: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = {
            "beta": (0 <= self.beta < float("inf"), "a number, 0 or more"),
            "k": (1 <= self.k < self.batch_size, f"1 or more, below the batch of {self.batch_size}"),
        }
        check_settings(self, checks)

    def explores(self) -> Explores | None:
        """What `train_pixels` takes; None without a bonus."""
        return None if self.bonus == "none" else partial(_explorer, self)


def _explorer(config: ExploringConfig, maps: int, actions: int, device: torch.device) -> PixelExplorer:
    seed = int(generator(config.seed, "exploration").integers(2**31))
    bonus: Bonus = VCSE(config.k, conditional=config.bonus == "vcse")
    if config.bonus == "rnd":
        bonus = RND(config.sizes.features, seed=seed)
    elif config.bonus == "state-entropy":
        bonus = StateEntropy(config.k, scaling="mean")  # as published with this agent
    return PixelExplorer(
        bonus, maps, actions, config.sizes, beta=config.beta, learning_rate=config.learning_rate, tau=config.tau,
        seed=seed,
    ).to(device)  # fmt: skip


class PixelExplorer(Payer):
    """A bonus on the maps of an agent's convolutions; an `Exploration` of `offbook.learning.pixel_agent`.

    Args:
        bonus: what pays.
        maps: numbers of the maps.
        actions: numbers of an action.
        sizes: of the agent's networks, after which its own are made.
        beta: weight, or a function from environment steps to it.
        learning_rate: of Adam.
        tau: share of the critic that its target takes over in an update.
        seed: of all weights.
    """

    def __init__(
        self,
        bonus: Bonus,
        maps: int,
        actions: int,
        sizes: PixelSizes,
        *,
        beta: Beta,
        learning_rate: float,
        tau: float,
        seed: int,
    ) -> None:
        super().__init__(bonus, beta)
        self.tau, features, hidden = tau, sizes.features, sizes.hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk = trunk(maps, features)
            self.forwards = mlp(features + actions, hidden, 1, 0.0, features)
            self.inverse = nn.Sequential(mlp(2 * features, hidden, 1, 0.0, actions), nn.Tanh())
            self.critic = TwinCritic(maps, actions, sizes) if bonus.needs_values else None
            for module in (self.trunk, self.forwards, self.inverse, self.critic):
                if module is not None:
                    draw_weights(module)
        self.target = deepcopy(self.critic)
        curious = [*self.trunk.parameters(), *self.forwards.parameters(), *self.inverse.parameters()]
        self._curious = torch.optim.Adam(curious, learning_rate)
        self._valuing = None if self.critic is None else torch.optim.Adam(self.critic.parameters(), learning_rate)

    def pay(self, batch: Encoded) -> Float[Tensor, " batch"]:
        """Beta times the bonus of each moment; then the critic learns from the batch."""
        self._predict(batch)
        with torch.no_grad():
            values = batch.reward if self.critic is None else self.critic(batch.here, batch.intended).amin(0)
            bonus = self._bonus(self.trunk(batch.here), values, batch.reward)
        self._value(batch)
        return self.weight() * bonus

    def _predict(self, batch: Encoded) -> None:
        """One step of trunk and predictors: lengths of what both get wrong."""
        with torch.enable_grad():
            here, there = self.trunk(batch.here), self.trunk(batch.there)
            ahead = self.forwards(torch.cat([here, batch.action], 1)) - there
            between = self.inverse(torch.cat([here, there], 1)) - batch.action
            loss = ahead.norm(dim=1).mean() + between.norm(dim=1).mean()
            self._curious.zero_grad()
            loss.backward()
            self._curious.step()

    def _value(self, batch: Encoded) -> None:
        if self.critic is None or self.target is None or self._valuing is None:
            return
        with torch.no_grad():
            target = batch.reward + batch.discount * self.target(batch.there, batch.following).amin(0)
        with torch.enable_grad():
            loss = self.critic.loss(batch.here, batch.action, target)
            self._valuing.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._valuing.step()
        self.report["critic_loss"] = float(loss.detach())
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                slow.lerp_(fast, self.tau)

    def get_extra_state(self) -> Any:
        """Of the optimisers, which belong to what a resumed run needs."""
        return [one.state_dict() for one in (self._curious, self._valuing) if one is not None]

    def set_extra_state(self, state: Any) -> None:
        """See `get_extra_state`."""
        for mine, one in zip((self._curious, self._valuing), state, strict=False):
            if mine is not None:
                mine.load_state_dict(one)
