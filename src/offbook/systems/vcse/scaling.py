"""The size of a bonus: running and batch normalisers, and how its weight changes over time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from offbook.errors import ConfigError, check_settings

Scaling = Literal["none", "batch", "std", "mean"]
Beta = float | Callable[[int], float]
"""The weight of a bonus, or a function from environment steps to it."""


def weight_at(beta: Beta, step: int) -> float:
    """The weight after so many steps.

    Raises:
        ConfigError: it is not finite, and would make rewards so.
    """
    weight = float(beta(step) if callable(beta) else beta)
    if not math.isfinite(weight):
        where = f"beta at environment step {step}"
        raise ConfigError(where, expected="a finite weight", got=str(weight), fix="give another weight or schedule")
    return weight


class Moments(nn.Module):
    """Mean and variance of all numbers seen so far, in float64, without keeping them.

    Example:
        >>> seen = Moments()
        >>> for batch in (torch.tensor([1.0, 2.0]), torch.tensor([6.0])):
        ...     seen.update(batch)
        >>> seen.mean.item(), round(seen.std().item() ** 2, 6)
        (3.0, 4.666667)

    Source: Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "mean", "squares"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:
        """Takes more numbers in."""
        x = batch.double()
        total, off = self.count + x.numel(), x.mean() - self.mean
        self.squares += (x - x.mean()).square().sum() + off.square() * self.count * x.numel() / total
        self.mean += off * x.numel() / total
        self.count.copy_(total)

    def std(self) -> Tensor:
        """Of the population."""
        return (self.squares / self.count.clamp(min=1)).sqrt()


class Normaliser(nn.Module):
    """Brings a batch of bonuses to a usual size.

    Args:
        kind: "none" leaves them; "batch" gives each batch a mean of 0 and a deviation of 1; "std" and "mean" divide by
            the deviation or the mean magnitude of all bonuses so far, this batch's among them.

    Raises:
        ConfigError: there is no such kind.
    """

    def __init__(self, kind: Scaling = "none") -> None:
        super().__init__()
        if kind not in get_args(Scaling):
            expected = ", ".join(get_args(Scaling))
            raise ConfigError("scaling of a bonus", expected=expected, got=repr(kind), fix="choose one of them")
        self.kind, self.seen = kind, Moments()

    def forward(self, bonus: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The same bonuses in another size; a size of 0 is left as it is."""
        if self.kind == "none":
            return bonus
        if self.kind == "batch":
            return (bonus - bonus.mean()) / (bonus.std(correction=0) + 1e-8)
        self.seen.update(bonus.abs() if self.kind == "mean" else bonus)
        size = self.seen.mean if self.kind == "mean" else self.seen.std()
        return bonus / (size.to(bonus) if size > 0 else 1)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A weight that goes from one number to another over so many environment steps, and stays there.

    Example:
        >>> beta = Linear(start=1.0, end=0.0, steps=100)
        >>> beta(0), beta(25), beta(1_000)
        (1.0, 0.75, 0.0)
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        check_settings(self, {"steps": (self.steps >= 1, "1 or more")}, prefix="")

    def __call__(self, step: int) -> float:
        """The weight after so many steps."""
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """A weight that halves every so many environment steps.

    Example:
        >>> Exponential(start=1.0, half_life=100)(200)
        0.25
    """

    start: float
    half_life: int

    def __post_init__(self) -> None:
        check_settings(self, {"half_life": (self.half_life >= 1, "1 or more")}, prefix="")

    def __call__(self, step: int) -> float:
        """The weight after so many steps."""
        return float(self.start * 0.5 ** (step / self.half_life))
