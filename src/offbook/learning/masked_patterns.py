"""Which tokens of a window a model sees: random patterns to learn from, and the roles, which are patterns too.

A pattern draws, for each sample by itself, booleans of shape (batch, time, tokens) for each modality: true is visible.
At each step a window has a state, a return to go and an action, in this order; a modality may take several tokens.

Source: Wu et al., "Masked Trajectory Models for Prediction, Representation, and Control" (2023), figure 3,
and the authors' code, whose `mask_ratios` are shares of *visible* tokens, as `fractions` here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from offbook.errors import ConfigError, nearest
from offbook.learning.trajectories import ACTION, RETURN, STATE

Visible = dict[str, Bool[Tensor, "batch time tokens"]]

FRACTIONS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Shares of visible tokens, as the authors draw them for D4RL."""
WEIGHTS: Mapping[str, float] = {STATE: 0.2, RETURN: 0.1, ACTION: 0.7}
"""How often the first hidden token is of each modality; the order is that of a step."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What windows look like.

    Attributes:
        tokens: of a step, by modality.
        length: steps T.
        batch: samples.
    """

    tokens: Mapping[str, int]
    length: int
    batch: int

    def empty(self, modality: str) -> Bool[Tensor, "batch time tokens"]:
        """Nothing visible."""
        return torch.zeros(self.batch, self.length, self.tokens[modality], dtype=torch.bool)

    def where(self, **seen: Tensor) -> Visible:
        """Visible as told for each modality by booleans that broadcast to (batch, time); nothing of the others."""
        return {
            name: self.empty(name) | (seen[name][..., None] if name in seen else torch.zeros((), dtype=torch.bool))
            for name in self.tokens
        }

    def steps(self, rng: torch.Generator, low: int, stop: int) -> Int64[Tensor, "batch 1"]:
        """A step of each sample, from low to below stop."""
        return torch.randint(low, stop, (self.batch, 1), generator=rng)


def draw(
    name: str,
    shape: Shape,
    rng: torch.Generator,
    *,
    fractions: Sequence[float] = FRACTIONS,
    weights: Mapping[str, float] = WEIGHTS,
    scope: str = "sample",
) -> Visible:
    """Draws what is visible.

    Args:
        name: one of `PATTERNS`.
        shape: of the windows.
        rng: on the CPU.
        fractions: shares of visible tokens, of which each modality draws one.
        weights: see `WEIGHTS`.
        scope: `"sample"` draws for each sample; `"batch"` once for all, as the authors do.

    Returns:
        By modality, shape (batch, time, tokens).

    Raises:
        ConfigError: there is no such pattern, or windows are too short for it.

    Example:
        >>> shape = Shape(tokens={"state": 1, "action": 1}, length=3, batch=1)
        >>> seen = draw("bc", shape, torch.Generator().manual_seed(2))
        >>> {name: of[0, :, 0].int().tolist() for name, of in seen.items()}
        {'state': [1, 0, 0], 'action': [0, 0, 0]}
    """
    if name not in PATTERNS:
        raise ConfigError("pattern", expected="the name of a pattern", got=repr(name), fix=nearest(name, PATTERNS))
    if shape.length < 2:
        fix = "take longer windows"
        raise ConfigError("length", expected="2 steps or more for masks", got=str(shape.length), fix=fix)
    if scope == "batch":
        one = draw(name, Shape(tokens=shape.tokens, length=shape.length, batch=1), rng, fractions=fractions,
                   weights=weights)  # fmt: skip
        return {modality: seen.expand(shape.batch, -1, -1) for modality, seen in one.items()}
    if name in ("auto", "random", "full_random"):
        return _RANDOM[name](shape, rng, fractions, weights)
    return _ROLES[name](shape, rng)


def _full_random(shape: Shape, rng: torch.Generator, fractions: Sequence[float], _: Mapping[str, float]) -> Visible:
    """Of each modality a share of the tokens, whichever they are."""
    return {name: _some(shape.batch, shape.length, tokens, fractions, rng) for name, tokens in shape.tokens.items()}


def _random(shape: Shape, rng: torch.Generator, fractions: Sequence[float], _: Mapping[str, float]) -> Visible:
    """Of each modality a share of the steps, with all their tokens."""
    return {
        name: _some(shape.batch, shape.length, 1, fractions, rng).expand(-1, -1, tokens)
        for name, tokens in shape.tokens.items()
    }


def _auto(shape: Shape, rng: torch.Generator, fractions: Sequence[float], weights: Mapping[str, float]) -> Visible:
    """Random tokens, and nothing behind a random token: what a policy sees is then among what is learnt from."""
    seen = _full_random(shape, rng, fractions, weights)
    order = [name for name in WEIGHTS if name in shape.tokens]
    chances = torch.tensor([float(weights[name]) for name in order])
    mode = torch.multinomial(chances, shape.batch, replacement=True, generator=rng)[:, None]
    cut = shape.steps(rng, 0, shape.length)
    steps = torch.arange(shape.length)
    for place, name in enumerate(order):
        # Of the step in which the first token is hidden, what comes before that token stays.
        seen[name] = seen[name] & (steps < cut + (mode > place).long())[..., None]
    return seen


def _some(batch: int, length: int, tokens: int, fractions: Sequence[float], rng: torch.Generator) -> Tensor:
    """In each sample exactly floor(length tokens f) of them, for a random f."""
    total = length * tokens
    # Rounding must not turn 0.6 of 10 into 5.
    counts = torch.tensor([int(total * fraction + 1e-9) for fraction in fractions])
    count = counts[torch.randint(len(counts), (batch, 1), generator=rng)]
    ranks = torch.rand(batch, total, generator=rng).argsort(1).argsort(1)
    return (ranks < count).reshape(batch, length, tokens)


def at_step(name: str, shape: Shape, step: Int64[Tensor, "batch 1"]) -> Visible:
    """What a role sees at a step t of each sample: `"bc"`, `"rcbc"`, `"fd"`, or `"plan"`.

    | role | visible | to tell |
    |---|---|---|
    | bc | states up to t, actions before t | the action at t |
    | rcbc | likewise, and all returns | the action at t |
    | fd | states up to t, the action at t | the state at t + 1 |
    | plan | states and actions up to t | the return at t |
    """
    steps = torch.arange(shape.length)
    past, until = steps < step, steps <= step
    if name == "fd":
        return shape.where(state=until, action=steps == step)
    if name == "rcbc":
        return shape.where(state=until, action=past, **{RETURN: torch.ones_like(until)})
    return shape.where(state=until, action=until if name == "plan" else past)


def _bc(shape: Shape, rng: torch.Generator) -> Visible:
    return at_step("bc", shape, shape.steps(rng, 0, shape.length))


def _rcbc(shape: Shape, rng: torch.Generator) -> Visible:
    return at_step("rcbc", shape, shape.steps(rng, 0, shape.length))


def _fd(shape: Shape, rng: torch.Generator) -> Visible:
    return at_step("fd", shape, shape.steps(rng, 0, shape.length - 1))


def _plan(shape: Shape, rng: torch.Generator) -> Visible:
    return at_step("plan", shape, shape.steps(rng, 0, shape.length))


def _bc_random(shape: Shape, rng: torch.Generator) -> Visible:
    """As for cloning, with half of the past dropped."""
    step = shape.steps(rng, 0, shape.length)
    seen = at_step("bc", shape, step)
    now = (torch.arange(shape.length) == step)[..., None]
    return {name: of & (now | (torch.rand(of.shape, generator=rng) < 0.5)) for name, of in seen.items()}


def _inverse(shape: Shape, rng: torch.Generator) -> Visible:
    return shape.where(state=torch.ones(1, shape.length, dtype=torch.bool))


def _goal(shape: Shape, rng: torch.Generator) -> Visible:
    """The first state, the last, and one in between."""
    steps, last = torch.arange(shape.length), shape.length - 1
    return shape.where(state=(steps == 0) | (steps == last) | (steps == shape.steps(rng, 0, shape.length)))


def _goal_n(shape: Shape, rng: torch.Generator) -> Visible:
    """States and actions up to a step, and the last state."""
    steps, step = torch.arange(shape.length), shape.steps(rng, 0, shape.length)
    return shape.where(state=(steps <= step) | (steps == shape.length - 1), action=steps < step)


def _waypoints(shape: Shape, rng: torch.Generator) -> Visible:
    """Some states, the first and the last among them, and nothing else."""
    steps = torch.arange(shape.length)
    some = torch.rand(shape.batch, shape.length, generator=rng) < torch.rand(shape.batch, 1, generator=rng)
    return shape.where(state=some | (steps == 0) | (steps == shape.length - 1))


_RANDOM: dict[str, Callable[[Shape, torch.Generator, Sequence[float], Mapping[str, float]], Visible]] = {
    "auto": _auto,
    "random": _random,
    "full_random": _full_random,
}
_ROLES: dict[str, Callable[[Shape, torch.Generator], Visible]] = {
    "bc": _bc,
    "rcbc": _rcbc,
    "bc_random": _bc_random,
    "id": _inverse,
    "fd": _fd,
    "goal": _goal,
    "goal_n": _goal_n,
    "waypoints": _waypoints,
    "plan": _plan,
}
PATTERNS = (*_RANDOM, *_ROLES)
"""Names of the patterns."""
