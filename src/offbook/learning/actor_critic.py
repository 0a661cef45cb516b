"""Offline actor-critics: IQL, TD3+BC and CQL as losses of one module, on plain tensors, for the one training loop.

A batch holds `state` and `next_state` (B, S), `action` (B, A) with entries in [-1, 1], `reward` and `terminated` (B,).
Each network takes its gradient from its own term of the summed loss alone. As Adam treats every weight by itself, one
optimiser on the sum makes the very steps that one optimiser for each network would make with the same learning rate;
so leave the norm of the whole gradient unclipped.

Where the authors' programs step the networks one after the other, here all gradients are taken at the same weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from offbook.learning.networks import INPUT_LIMIT, mlp, standard

Algorithm = Literal["iql", "td3bc", "cql"]
Batch = Mapping[str, Tensor]
Metrics = dict[str, Tensor]
Loss = Callable[["ActorCritic", Batch, torch.Generator], tuple[Tensor, Metrics]]

_LOG_STD = {"iql": (-5.0, 2.0), "cql": (-20.0, 2.0)}


class Actor(nn.Module):
    """A state to an action: for TD3+BC one, for IQL a Gaussian around one, for CQL a Gaussian squashed by tanh.

    In its own units states are standardised and actions lie in [-1, 1]; `act` takes and gives those of the recordings.

    Args:
        algorithm: which of them.
        state_size: numbers S of a state.
        action_size: numbers A of an action.
        hidden: width of the layers.
        depth: number of layers.
    """

    state_mean: Tensor
    state_std: Tensor
    action_middle: Tensor
    action_half: Tensor

    def __init__(self, algorithm: Algorithm, state_size: int, action_size: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.algorithm, self.action_size = algorithm, action_size
        self.sizes: dict[str, Any] = {"algorithm": algorithm, "hidden": hidden, "depth": depth}
        self.mlp = mlp(state_size, hidden, depth, 0.0, action_size * (1 + (algorithm == "cql")))
        if algorithm == "iql":
            self.log_std = nn.Parameter(torch.zeros(action_size))
        # In the module, so that a checkpoint is whole and a robot needs to know nothing of the recordings.
        self.register_buffer("state_mean", torch.zeros(state_size))
        self.register_buffer("state_std", torch.ones(state_size))
        self.register_buffer("action_middle", torch.zeros(action_size))
        self.register_buffer("action_half", torch.ones(action_size))

    def scale(
        self,
        state: tuple[Float32[np.ndarray, " state"], Float32[np.ndarray, " state"]],
        action: tuple[Float32[np.ndarray, " action"], Float32[np.ndarray, " action"]],
    ) -> None:
        """Takes over mean and deviation of the states, and the smallest and the largest value of actions."""
        low, high = (torch.from_numpy(bound.astype(np.float64)) for bound in action)
        self.state_mean.copy_(torch.from_numpy(state[0]))
        self.state_std.copy_(torch.from_numpy(state[1]))
        self.action_middle.copy_((high + low) / 2)
        self.action_half.copy_((high - low) / 2)

    def see(self, state: Float[Tensor, "batch state"]) -> Float[Tensor, "batch state"]:
        """A state of the recordings, standardised."""
        return standard(state, self.state_mean, self.state_std).clamp(-INPUT_LIMIT, INPUT_LIMIT)

    def units(self, action: Float[Tensor, "batch action"]) -> Float[Tensor, "batch action"]:
        """An action of the recordings in [-1, 1]; what lies beyond the bounds is taken for the bound."""
        return standard(action, self.action_middle, self.action_half).clamp(-1, 1)

    def act(self, state: Float[Tensor, "batch state"]) -> Float[Tensor, "batch action"]:
        """The action for a state of the recordings, in the robot's units, without noise."""
        out: Tensor = self(self.see(state))
        return out.float() * self.action_half + self.action_middle

    def forward(self, state: Float[Tensor, "batch state"]) -> Float[Tensor, "batch action"]:
        """The action without noise."""
        out: Tensor = self.mlp(state)
        return out[:, : self.action_size].tanh()

    def log_prob(
        self, state: Float[Tensor, "batch state"], action: Float[Tensor, "batch action"]
    ) -> Float[Tensor, " batch"]:
        """IQL's density of an action: a Gaussian around `forward`, of a deviation that no state changes."""
        log_std = self.log_std.clamp(*_LOG_STD["iql"])
        return _log_normal((action - self(state)) / log_std.exp(), log_std)

    def sample(
        self, state: Float[Tensor, "batch state"], noise: Float[Tensor, "batch action"]
    ) -> tuple[Float[Tensor, "batch action"], Float[Tensor, " batch"]]:
        """CQL's random action tanh(u), u = mean + deviation noise, and its log-density.

        With the Gaussian density of u it is log N(u) - sum log(1 - tanh(u)^2).

        Args:
            state: standardised.
            noise: standard normal.
        """
        mean, log_std = self.mlp(state).float().chunk(2, 1)
        log_std = log_std.clamp(*_LOG_STD["cql"])
        raw = mean + log_std.exp() * noise
        # 1 - tanh^2 = 4 / (e^u + e^-u)^2, so that its logarithm stays finite where tanh rounds to 1.
        squeezed = 2 * (math.log(2) - raw - functional.softplus(-2 * raw))
        return raw.tanh(), _log_normal(noise, log_std) - squeezed.sum(1)


def _log_normal(deviation: Tensor, log_std: Tensor) -> Tensor:
    return (-0.5 * deviation.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(1)


class Critics(nn.Module):
    """Two networks that value a state and an action, of which the lower answer is believed.

    Source: Fujimoto et al., "Addressing Function Approximation Error in Actor-Critic Methods" (2018), section 4.2.
    """

    def __init__(self, state_size: int, action_size: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(mlp(state_size + action_size, hidden, depth, 0.0, 1) for _ in range(2))

    def forward(
        self, state: Float[Tensor, "batch state"], action: Float[Tensor, "batch action"]
    ) -> Float[Tensor, "2 batch"]:
        """Both values."""
        seen = torch.cat([state, action], 1)
        return torch.cat([critic(seen) for critic in self.each], 1).T


class ActorCritic(nn.Module):
    """An actor, its critics, and copies of them that follow slowly; called on a batch, it gives the loss.

    The copies move at the beginning of a call towards the weights that the optimiser left, not at the end.

    Args:
        actor: to be trained.
        loss: `iql_loss`, `td3bc_loss` or `cql_loss`, its settings bound.
        target_rate: share of the way that a copy goes in one move.
        move_every: steps between two moves.
    """

    steps: Tensor

    def __init__(self, actor: Actor, loss: Loss, *, target_rate: float, move_every: int = 1) -> None:
        super().__init__()
        self.actor, self.loss, self.target_rate, self.move_every = actor, loss, target_rate, move_every
        hidden, depth = actor.sizes["hidden"], actor.sizes["depth"]
        state_size, action_size = len(actor.state_mean), actor.action_size
        self.critics = Critics(state_size, action_size, hidden, depth)
        if actor.algorithm == "iql":
            self.value = mlp(state_size, hidden, depth, 0.0, 1)
        if actor.algorithm == "cql":
            self.log_temperature = nn.Parameter(torch.zeros(()))
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        if actor.algorithm == "td3bc":
            self.target_actor = copy.deepcopy(actor).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        """The loss of one step, and its parts, of a batch in the units of the recordings.

        Args:
            batch: see the module.
            generator: on the CPU; all that is random comes from it.
        """
        if (done := int(self.steps)) and done % self.move_every == 0:
            self._move()
        self.steps += 1
        seen = {name: self.actor.see(batch[name]) for name in ("state", "next_state")}
        return self.loss(self, {**batch, **seen, "action": self.actor.units(batch["action"])}, generator)

    @torch.no_grad()
    def _move(self) -> None:
        pairs: list[tuple[nn.Module, nn.Module]] = [(self.target_critics, self.critics)]
        if self.actor.algorithm == "td3bc":
            pairs.append((self.target_actor, self.actor))
        for target, online in pairs:
            kept: list[Tensor] = list(target.parameters())
            new: list[Tensor] = list(online.parameters())
            torch._foreach_lerp_(kept, new, self.target_rate)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)


def _backup(batch: Batch, gamma: float, following: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """R + gamma V(s'), where nothing follows the end of a task; being cut short is no end."""
    return batch["reward"] + gamma * (1 - batch["terminated"]) * following


def _frozen(module: nn.Module, *inputs: Tensor) -> Tensor:
    """A module's answer, through which gradients reach what goes in, but not its weights."""
    answer: Tensor = functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, inputs)
    return answer


def iql_loss(
    model: ActorCritic, batch: Batch, generator: torch.Generator, *, gamma: float, expectile: float, beta: float,
    max_weight: float,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """Implicit Q-learning: no action is valued but recorded ones.

    With Q the lower target critic, u = Q(s, a) - V(s), and a sum over both critics Q_i it is
    `E[abs(tau - 1(u < 0)) u^2] + sum_i E[(r + gamma V(s') - Q_i(s, a))^2] - E[min(exp(beta u), w) log pi(a | s)]`.

    Args:
        model: with a network `value`.
        batch: standardised.
        generator: not used.
        gamma: discount.
        expectile: tau, above 1/2 for values of better than average actions.
        beta: inverse temperature.
        max_weight: largest weight w of a recorded action.

    Source: Kostrikov et al., "Offline Reinforcement Learning with Implicit Q-Learning" (2021), equations 5 to 7.
    """
    state, action = batch["state"], batch["action"]
    with torch.no_grad():
        best: Tensor = model.target_critics(state, action).amin(0)
        backup = _backup(batch, gamma, model.value(batch["next_state"])[:, 0])
    value: Tensor = model.value(state)[:, 0]
    gap = best - value
    value_loss = (torch.where(gap > 0, expectile, 1 - expectile) * gap.square()).mean()
    values = model.critics(state, action)
    critic_loss = (values - backup).square().mean(1).sum()
    weight = (beta * gap.detach()).exp().clamp(max=max_weight)
    actor_loss = -(weight * model.actor.log_prob(state, action)).mean()
    parts = {"value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}
    return value_loss + critic_loss + actor_loss, {**parts, "q": values.mean(), "advantage_weight": weight.mean()}


def td3bc_loss(
    model: ActorCritic, batch: Batch, generator: torch.Generator, *, gamma: float, alpha: float, policy_delay: int,
    policy_noise: float, noise_clip: float,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """TD3 with behaviour cloning.

    With a' = clip(pi'(s') + clip(noise)) and Q' the lower target critic the critics' loss is
    `sum_i E[(r + gamma Q'(s', a') - Q_i(s, a))^2]`; every `policy_delay`-th step adds the actor's,
    `E[(pi(s) - a)^2] - alpha E[Q_1(s, pi(s))] / E[abs(Q_1(s, pi(s)))]`, where no gradient goes through the divisor. In
    the other steps the actor has no gradient at all, so that no momentum moves it.

    Args:
        model: with a copy `target_actor`.
        batch: standardised.
        generator: of the noise.
        gamma: discount.
        alpha: weight of the critic beside cloning.
        policy_delay: steps of the critics for one of the actor.
        policy_noise: deviation of the noise.
        noise_clip: largest noise.

    Source: Fujimoto and Gu, "A Minimalist Approach to Offline Reinforcement Learning" (2021), equations 3 and 5.
    """
    state, action = batch["state"], batch["action"]
    with torch.no_grad():
        noise = (policy_noise * _noise(action, generator)).clamp(-noise_clip, noise_clip)
        following = (model.target_actor(batch["next_state"]) + noise).clamp(-1, 1)
        backup = _backup(batch, gamma, model.target_critics(batch["next_state"], following).amin(0))
    values = model.critics(state, action)
    critic_loss = (values - backup).square().mean(1).sum()
    metrics = {"critic_loss": critic_loss, "q": values.mean()}
    if int(model.steps) % policy_delay:
        return critic_loss, metrics
    chosen = model.actor(state)
    value = _frozen(model.critics.each[0], torch.cat([state, chosen], 1))
    cloning = (chosen - action).square().mean()
    actor_loss = cloning - alpha * value.mean() / value.abs().mean().detach()
    return critic_loss + actor_loss, {**metrics, "actor_loss": actor_loss, "cloning_loss": cloning}


def cql_loss(
    model: ActorCritic, batch: Batch, generator: torch.Generator, *, gamma: float, alpha: float, samples: int
) -> tuple[Tensor, Metrics]:
    """Conservative Q-learning, CQL(H), on soft actor-critic.

    The critics' loss is
    `sum_i E[(r + gamma Q'(s', a') - Q_i(s, a))^2] + alpha E[log(integral of exp Q_i(s, .)) - Q_i(s, a)]` with a' from
    the policy and Q' the lower target critic, without the entropy of a'. The integral over all actions is estimated
    from 3 N of them, N drawn evenly, N from pi in s and N from pi in s', each divided by its density. The actor's loss
    is `E[temperature log pi(b | s) - min_i Q_i(s, b)]`; the temperature holds the entropy at -A.

    Args:
        model: with a parameter `log_temperature`.
        batch: standardised.
        generator: of the actions.
        gamma: discount.
        alpha: weight of the conservative term.
        samples: N.

    Source: Kumar et al., "Conservative Q-Learning for Offline Reinforcement Learning" (2020), equation 4 and appendix
        F. As in the authors' program, for which alpha is given, the squared error has no factor 1/2, the backup no
        entropy, and a third of the actions is drawn at s'.
    """
    state, following, action = batch["state"], batch["next_state"], batch["action"]
    temperature = model.log_temperature.exp().detach()
    with torch.no_grad():
        after, _ = model.actor.sample(following, _noise(action, generator))
        backup = _backup(batch, gamma, model.target_critics(following, after).amin(0))
    values = model.critics(state, action)
    error = (values - backup).square().mean(1).sum()
    penalty = (_log_sum_exp(model, state, following, samples, action.shape[1], generator) - values).mean(1).sum()
    chosen, log_prob = model.actor.sample(state, _noise(action, generator))
    actor_loss = (temperature * log_prob - _frozen(model.critics, state, chosen).amin(0)).mean()
    temperature_loss = -(model.log_temperature * (log_prob.detach() - action.shape[1])).mean()
    critic_loss = error + alpha * penalty
    metrics = {"critic_loss": critic_loss, "actor_loss": actor_loss, "q": values.mean(), "conservative_gap": penalty}
    return critic_loss + actor_loss + temperature_loss, {**metrics, "temperature": temperature}


def _log_sum_exp(
    model: ActorCritic, state: Tensor, following: Tensor, samples: int, size: int, generator: torch.Generator
) -> Float[Tensor, "2 batch"]:
    """Log of the integral of exp Q(s, a) over all actions, estimated by importance sampling."""
    batch = len(state)
    with torch.no_grad():
        even = 2 * torch.rand((batch * samples, size), generator=generator).to(state.device) - 1
        here, following = (each.repeat_interleave(samples, 0) for each in (state, following))
        drawn = [model.actor.sample(each, _noise(even, generator)) for each in (here, following)]
        actions = torch.cat([even, *(action for action, _ in drawn)])
        densities = torch.cat([torch.full_like(even[:, 0], -size * math.log(2)), *(density for _, density in drawn)])
    weighted: Tensor = model.critics(here.repeat(3, 1), actions) - densities
    return weighted.reshape(2, 3, batch, samples).logsumexp((1, 3)) - math.log(3 * samples)
