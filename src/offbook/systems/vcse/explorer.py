"""Encoder, bonus and a critic of the task's reward alone, as one thing that an agent explores with; plain tensors."""

from __future__ import annotations

import time
import warnings
from collections import deque
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from offbook.errors import DataError, check_settings
from offbook.systems.vcse.bonus import Bonus
from offbook.systems.vcse.scaling import Beta, weight_at

# A bonus that makes up more than this share of what the agent is paid is remarked upon, after so many updates on end in
# which the task paid.
_SHARE, _UPDATES = 0.9, 10


@dataclass(frozen=True, kw_only=True)
class CriticSettings:
    """Of the critic of the task's reward.

    Attributes:
        hidden: width of its layer.
        learning_rate: of Adam.
        batch: states of an update; a rollout is gone through once.
        gae_lambda: on-policy, how far returns look ahead.
        tau: off-policy, share of the critic that its target takes over in an update.
    """

    hidden: int = 64
    learning_rate: float = 1e-3
    batch: int = 128
    gae_lambda: float = 0.95
    tau: float = 0.01

    def __post_init__(self) -> None:
        checks = {
            "hidden": (self.hidden >= 1, "1 or more"),
            "learning_rate": (self.learning_rate > 0, "a positive number"),
            "batch": (self.batch >= 2, "2 or more"),
            "gae_lambda": (0 <= self.gae_lambda <= 1, "0 to 1"),
            "tau": (0 < self.tau <= 1, "above 0, up to 1"),
        }
        check_settings(self, checks, prefix="critic ")


class Payer(nn.Module):
    """A bonus with its weight: what all that pays agents has in common, whatever their states look like.

    Args:
        bonus: what pays.
        beta: weight, or a function from environment steps to it.

    Attributes:
        step: environment steps so far, by which beta goes.
        report: of the last batch, by name: see the page of the system.
    """

    def __init__(self, bonus: Bonus, beta: Beta) -> None:
        super().__init__()
        self.bonus, self.beta, self.step = bonus, beta, 0
        self._paid: deque[tuple[float, float]] = deque(maxlen=_UPDATES)
        self._warned = False
        self.report: dict[str, float] = {}

    def weight(self) -> float:
        """Beta at this step."""
        return weight_at(self.beta, self.step)

    def _bonus(self, features: Tensor, values: Tensor, rewards: Tensor) -> Tensor:
        began = time.perf_counter()
        try:
            bonus: Tensor = self.bonus(features, values)
        except DataError as error:
            where = f"{error.where}, environment step {self.step}"
            raise DataError(where, expected=error.expected, got=error.got, fix=error.fix) from None
        spent = time.perf_counter() - began
        paid, of_task = self.weight() * float(bonus.abs().mean()), float(rewards.abs().mean())
        self.report = {
            "beta": self.weight(),
            "bonus_mean": float(bonus.mean()),
            "bonus_std": float(bonus.std(correction=0)),
            "reward_mean": float(rewards.mean()),
            "bonus_share": paid / (paid + of_task) if paid + of_task > 0 else 0.0,
            "zero_share": self.bonus.zero_share,
            "skipped": float(self.bonus.skipped),
            "milliseconds": 1e3 * spent,
        }
        self._remark(paid, of_task)
        return bonus

    def _remark(self, paid: float, of_task: float) -> None:
        """Where the task pays, a bonus beside which that hardly counts is too heavy."""
        if of_task > 0:
            self._paid.append((paid, of_task))
        if self._warned or len(self._paid) < _UPDATES or min(p / (p + r) for p, r in self._paid) <= _SHARE:
            return
        even = self.weight() * sum(r for _, r in self._paid) / sum(p for p, _ in self._paid)
        said = f"the bonus is over {_SHARE:.0%} of what the agent is paid, even where the task pays; there, "
        said += f"with beta = {even:.2g} it would be a half"
        warnings.warn(said, RuntimeWarning, stacklevel=2)
        self._warned = True


class Explorer(Payer):
    """Bonuses for the states that an agent meets, with a critic that learns beside it.

    Args:
        bonus: what pays.
        encoder: from observations to features; it is not trained.
        size: numbers of the features.
        beta: weight, or a function from environment steps to it.
        gamma: discount of the task.
        settings: of the critic.
        seed: of the critic.
    """

    updates: Tensor

    def __init__(
        self,
        bonus: Bonus,
        encoder: nn.Module,
        *,
        size: int,
        beta: Beta,
        gamma: float,
        settings: CriticSettings,
        seed: int,
    ) -> None:
        super().__init__(bonus, beta)
        self.encoder, self.gamma = encoder.requires_grad_(False).eval(), gamma
        self.settings, self.seed = settings, seed
        # No random number is taken from the agent's stream.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.critic = nn.Sequential(nn.Linear(size, settings.hidden), nn.Tanh(), nn.Linear(settings.hidden, 1))
        self.target = deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._optimiser = torch.optim.Adam(self.critic.parameters(), settings.learning_rate)

    @torch.no_grad()
    def features(self, observations: Any) -> Float[Tensor, "batch size"]:
        """What the encoder makes of observations."""
        found: Tensor = self.encoder(observations)
        return found

    @torch.no_grad()
    def value(self, features: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch"]:
        """What the critic expects of the task's reward from here on."""
        return self._of(self.critic, features)

    def rollout(
        self,
        features: Float[Tensor, "steps agents size"],
        after: Float[Tensor, "agents size"],
        rewards: Float[Tensor, "steps agents"],
        ended: Float[Tensor, "steps agents"],
    ) -> Float[Tensor, "steps agents"]:
        """Bonuses of a rollout, with the whole of it as one batch; then the critic learns from it.

        Args:
            features: of the states in which agents acted.
            after: of those that they are in now.
            rewards: the task's, to which the value of where an episode was cut has been added.
            ended: 1 where the episode ended with that step, cut or not.
        """
        values = self.value(features)
        bonus = self._bonus(features.flatten(0, 1), values.flatten(), rewards).view_as(values)
        ahead, advantage = self.value(after), torch.zeros_like(values[0])
        targets = torch.empty_like(values)
        for t in reversed(range(len(values))):
            goes_on = self.gamma * (1 - ended[t])
            advantage = rewards[t] + goes_on * (ahead + self.settings.gae_lambda * advantage) - values[t]
            targets[t], ahead = advantage + values[t], values[t]
        order = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(self.seed + int(self.updates)))
        for rows in torch.split(order.to(values.device), self.settings.batch):
            self._learn(features.flatten(0, 1)[rows], targets.flatten()[rows])
        return bonus

    def transitions(
        self,
        here: Float[Tensor, "batch size"],
        there: Float[Tensor, "batch size"],
        rewards: Float[Tensor, " batch"],
        goes_on: Float[Tensor, " batch"],
    ) -> Float[Tensor, " batch"]:
        """Bonuses of a batch of transitions; then the critic learns from it.

        Args:
            here: features of the states acted in.
            there: of those that followed.
            rewards: the task's.
            goes_on: the discount of what follows, 0 where the task ended.
        """
        bonus = self._bonus(here, self.value(here), rewards)
        with torch.no_grad():
            targets = rewards + goes_on * self._of(self.target, there)
        self._learn(here, targets)
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                slow.lerp_(fast, self.settings.tau)
        return bonus

    def _of(self, critic: nn.Module, features: Tensor) -> Tensor:
        value: Tensor = critic(features)
        return value.squeeze(-1)

    def _learn(self, features: Tensor, targets: Tensor) -> None:
        with torch.enable_grad():
            loss = functional.mse_loss(self._of(self.critic, features), targets)
            if self.bonus.on_nan == "zero" and not loss.isfinite():
                return  # one such step, and its weights are never finite again
            self._optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimiser.step()
        self.updates += 1
        self.report["critic_loss"] = float(loss.detach())

    def get_extra_state(self) -> Any:
        """Of the optimiser, which belongs to what a resumed run needs."""
        return self._optimiser.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """See `get_extra_state`."""
        self._optimiser.load_state_dict(state)
