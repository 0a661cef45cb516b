"""Exploration bonuses: features of states, and what a critic says of them, to a number for each state.

| bonus | pays for |
|---|---|
| `StateEntropy` | states far from all others of the batch |
| `VCSE` | states far from the others of about the same value |
| `RND` | states whose random features a network has not learnt to predict |
| `Sum` | what several of them pay for, each with its weight |

All take a batch at once and know nothing of agents or environments.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from offbook.errors import ConfigError, DataError
from offbook.models.knn import count_values_within, joint_nearest
from offbook.systems.vcse.scaling import Normaliser, Scaling

Compat = Literal["exact", "official"]
ValueScale = Literal["zscore", "rank", "none"]

_FLOOR = 1e-5


def value_conditional_state_entropy(
    states: Float[Tensor, "batch size"],
    values: Float[Tensor, " batch"],
    k: int = 12,
    *,
    compat: Compat = "exact",
    floor: float = _FLOOR,
) -> Float[Tensor, " batch"]:
    r"""What each state adds to the entropy of states given their value, but for constants.

    $$b_i = \psi(n_v(i) + 1) / d + \log(2 r_i + \text{floor})$$

    with r_i the distance of the k-th neighbour in `models.knn.joint_nearest`, and n_v(i) the number of other values
    strictly within r_i. States and values are taken as they are; `VCSE` scales the values.

    Args:
        states: features, shape (N, d).
        values: a critic's, of the task's reward alone.
        k: which neighbour, 1 to N - 1.
        compat: "exact" counts neighbours without the state itself. "official" is what the published code computes: the
            state is its own first neighbour and counts among the values.
        floor: keeps the logarithm finite where k others have the same state and value.

    Raises:
        ConfigError: k or a shape does not fit.
        DataError: a number is not finite.

    Example:
        >>> states, values = torch.tensor([[0.0], [1.0], [5.0], [9.0]]), torch.tensor([0.0, 0.0, 9.0, 9.0])
        >>> value_conditional_state_entropy(states, values, k=1).argsort().tolist()[-2:]
        [2, 3]

    Source: Kim et al. (2023), arXiv:2305.19476, and its published code; the estimator, Kraskov et al. (2004),
    equation 8.
    """
    bonus, _ = _conditional(states, values, k, compat, floor)
    return bonus


def _conditional(states: Tensor, values: Tensor, k: int, compat: Compat, floor: float) -> tuple[Tensor, Tensor]:
    """The bonus and the distances that it is made of."""
    own = int(compat == "official")
    if k - own < 1:
        fix = "choose a larger k, or compat='exact'"
        raise ConfigError("k", expected="2 or more, for the state itself counts as the first", got=str(k), fix=fix)
    radius = joint_nearest(states, values, k - own).distance[:, -1]
    within = count_values_within(values.reshape(-1).to(radius), radius)
    # The state itself lies within any radius but 0.
    within = within + own * (radius > 0).long()
    psi = torch.digamma(within.to(radius.dtype) + 1)
    return psi / states.shape[1] + (2 * radius + floor).log(), radius


class Bonus(nn.Module, ABC):
    """What every bonus has.

    Args:
        scaling: see `Normaliser`.
        on_nan: what happens to a batch with features or values that are not finite, or so large that their bonuses are
            not: "raise" an error, or "zero", no bonus for the whole batch, counted in `skipped`.

    Attributes:
        needs_values: whether it looks at values.
        skipped: batches without a bonus so far.
        zero_share: share of the states of the last batch that lay at no distance from their k-th neighbour.
    """

    needs_values = False
    skipped: Tensor

    def __init__(self, scaling: Scaling, on_nan: Literal["raise", "zero"]) -> None:
        super().__init__()
        if on_nan not in ("raise", "zero"):
            raise ConfigError("on_nan", expected="raise or zero", got=repr(on_nan), fix="choose one of them")
        self.normalise, self.on_nan, self.zero_share = Normaliser(scaling), on_nan, 0.0
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    @abstractmethod
    def novelty(
        self, features: Float[Tensor, "batch size"], values: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """The bonuses before they are normalised, of finite numbers."""

    def forward(
        self, features: Float[Tensor, "batch size"], values: Float[Tensor, " batch"] | None = None
    ) -> Float[Tensor, " batch"]:
        """One bonus for each state, without a gradient.

        Args:
            features: one row for each state.
            values: one number for each, shape (batch,) or (batch, 1); left out where the bonus does not need them.

        Raises:
            ConfigError: shapes do not fit, or values are missing.
            DataError: a number is not finite.
        """
        features = features.detach().float()
        if values is None:
            if self.needs_values:
                fix = "give a critic's values, or take StateEntropy"
                raise ConfigError(type(self).__name__, expected="a value for each state", got="none", fix=fix)
            values = features.new_zeros(len(features))
        if features.ndim != 2 or values.shape not in ((len(features),), (len(features), 1)):
            got, fix = f"{tuple(features.shape)} and {tuple(values.shape)}", "give a row and a value for each state"
            raise ConfigError("bonus", expected="features (batch, size) and values (batch,)", got=got, fix=fix)
        if not len(features):
            raise ConfigError("bonus", expected="a state or more", got="an empty batch", fix="give some states")
        values = values.detach().reshape(-1).float()
        if not values.isfinite().all():
            return self._unpaid(values, "values that are not")
        if not features.isfinite().all():
            return self._unpaid(values, "features that are not")
        novelty = self.novelty(features, values)
        if not novelty.isfinite().all():
            return self._unpaid(values, "features or values that are too large")
        scaled: Tensor = self.normalise(novelty)
        return scaled.detach()

    def _unpaid(self, values: Tensor, got: str) -> Tensor:
        """What becomes of a batch that nothing can be said of."""
        if self.on_nan == "raise":
            fix = "look for what diverged, or set on_nan='zero'"
            raise DataError(f"bonus {type(self).__name__}", expected="finite numbers", got=got, fix=fix)
        self.skipped += 1
        return torch.zeros_like(values)


class StateEntropy(Bonus):
    """log(1 + distance of the k-th neighbour), whatever the values: the bonus that VCSE is compared with.

    Args:
        k: which neighbour, the state itself not counted.
        average: take the mean distance of the first k instead.
        scaling: see `Normaliser`.
        on_nan: see `Bonus`.

    Source: Liu and Abbeel, "Behavior from the void" (2021); Seo et al., "State entropy maximization with random
    encoders" (2021).
    """

    def __init__(
        self,
        k: int = 12,
        *,
        average: bool = False,
        scaling: Scaling = "std",
        on_nan: Literal["raise", "zero"] = "raise",
    ) -> None:
        super().__init__(scaling, on_nan)
        self.k, self.average = _at_least_one(k), average

    def novelty(
        self, features: Float[Tensor, "batch size"], values: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """The bonuses before they are normalised."""
        distance = joint_nearest(features, None, self.k).distance
        self.zero_share = float((distance[:, -1] == 0).float().mean())
        return (distance.mean(1) if self.average else distance[:, -1]).log1p()


class VCSE(Bonus):
    """`value_conditional_state_entropy` of features and values that are scaled within the batch.

    How far features are spread beside values, whose spread is 1, decides which of the two makes a neighbour; features
    are not scaled. While all values are alike the bonus is that of the states alone.

    Args:
        k: which neighbour, the state itself not counted.
        value_scale: "zscore" gives the values of a batch a mean of 0 and a variance of 1, "rank" does that to their
            ranks, and "none" leaves them.
        conditional: False takes all values for equal: what is left shows how much of a gain is the form of the bonus.
        scaling: see `Normaliser`.
        compat: see `value_conditional_state_entropy`.
        on_nan: see `Bonus`.
    """

    needs_values = True

    def __init__(
        self,
        k: int = 12,
        *,
        value_scale: ValueScale = "zscore",
        conditional: bool = True,
        scaling: Scaling = "none",
        compat: Compat = "exact",
        on_nan: Literal["raise", "zero"] = "raise",
    ) -> None:
        super().__init__(scaling, on_nan)
        if value_scale not in ("zscore", "rank", "none"):
            fix = "choose one of them"
            raise ConfigError("value_scale", expected="zscore, rank or none", got=repr(value_scale), fix=fix)
        if compat not in ("exact", "official"):
            raise ConfigError("compat", expected="exact or official", got=repr(compat), fix="choose one of them")
        self.k, self.value_scale, self.compat = _at_least_one(k), value_scale, compat
        self.conditional, self._warned = conditional, not conditional

    def novelty(
        self, features: Float[Tensor, "batch size"], values: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """The bonuses before they are normalised."""
        scaled = scale_values(values, self.value_scale) if self.conditional else torch.zeros_like(values)
        bonus, radius = _conditional(features, scaled, self.k, self.compat, _FLOOR)
        if not self._warned and values.min() == values.max():
            said = "all values of a batch are equal: the value is not informative yet, and the bonus is of states alone"
            warnings.warn(said, RuntimeWarning, stacklevel=4)
            self._warned = True
        self.zero_share = float((radius == 0).float().mean())
        return bonus


def scale_values(values: Float[Tensor, " batch"], kind: ValueScale) -> Float[Tensor, " batch"]:
    """Values, or their ranks, with a mean of 0 and a variance of 1 in the batch; see `VCSE`.

    Example:
        >>> [round(x, 2) for x in scale_values(torch.tensor([1.0, 100.0, 1.0]), "rank").tolist()]
        [-0.71, 1.41, -0.71]
    """
    if kind == "none":
        return values
    if kind == "rank":
        _, place, count = values.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
        # The mean rank of those that are equal.
        values = (count.cumsum(0) - (count + 1) / 2)[place].to(values)
    return (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()


class RND(Bonus):
    """The error of a network that learns to predict what a fixed random one says of a state; it falls with visits.

    Each call learns one step from its batch, after its bonuses are taken.

    Args:
        size: numbers of a state's features.
        width: of both networks' hidden layers and outputs.
        learning_rate: of the predictor.
        seed: of both networks.
        scaling: see `Normaliser`.
        on_nan: see `Bonus`.

    Source: Burda et al., "Exploration by random network distillation" (2018), section 2.2.
    """

    def __init__(
        self,
        size: int,
        *,
        width: int = 128,
        learning_rate: float = 1e-3,
        seed: int = 0,
        scaling: Scaling = "std",
        on_nan: Literal["raise", "zero"] = "raise",
    ) -> None:
        super().__init__(scaling, on_nan)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.target = _mlp(size, width, hidden=1).requires_grad_(False)
            self.predictor = _mlp(size, width, hidden=2)
        self.size, self._optimiser = size, torch.optim.Adam(self.predictor.parameters(), learning_rate)

    def novelty(
        self, features: Float[Tensor, "batch size"], values: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """The bonuses before they are normalised."""
        if features.shape[1] != self.size:
            got, fix = f"{features.shape[1]}", "build RND with the size of the encoder's features"
            raise ConfigError("RND", expected=f"{self.size} features", got=got, fix=fix)
        with torch.enable_grad():
            error: Tensor = (self.predictor(features) - self.target(features)).square().mean(1)
            if not error.isfinite().all():
                return error.detach()  # from which nothing can be learnt
            self._optimiser.zero_grad()
            error.mean().backward()  # type: ignore[no-untyped-call]
            self._optimiser.step()
        return error.detach()

    def get_extra_state(self) -> Any:
        """Of the optimiser, which belongs to what a resumed run needs."""
        return self._optimiser.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """See `get_extra_state`."""
        self._optimiser.load_state_dict(state)


class Sum(Bonus):
    """Several bonuses at once.

    Args:
        parts: a weight and a bonus each, which keeps its own scaling.
        scaling: of the sum, see `Normaliser`.
        on_nan: see `Bonus`; parts have their own.

    Example:
        >>> both = Sum([(1.0, StateEntropy(k=1)), (0.5, VCSE(k=1))])
        >>> both.needs_values, both(torch.eye(3), torch.arange(3.0)).shape
        (True, torch.Size([3]))
    """

    def __init__(
        self,
        parts: Sequence[tuple[float, Bonus]],
        *,
        scaling: Scaling = "none",
        on_nan: Literal["raise", "zero"] = "raise",
    ) -> None:
        super().__init__(scaling, on_nan)
        if not parts or not all(math.isfinite(weight) for weight, _ in parts):
            got = str([weight for weight, _ in parts])
            raise ConfigError("Sum", expected="bonuses with finite weights", got=got, fix="give (weight, bonus) pairs")
        self.weighted = tuple(parts)
        self.parts = nn.ModuleList([bonus for _, bonus in parts])  # so that their state is saved
        self.needs_values = any(bonus.needs_values for _, bonus in parts)

    def novelty(
        self, features: Float[Tensor, "batch size"], values: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """The bonuses before they are normalised."""
        total, self.zero_share = torch.zeros_like(values), 0.0
        for weight, bonus in self.weighted:
            total += weight * bonus(features, values)
            self.zero_share = max(self.zero_share, bonus.zero_share)
        return total


def _mlp(size: int, width: int, hidden: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number in range(hidden):
        layers[f"linear{number}"] = nn.Linear(width if number else size, width)
        layers[f"relu{number}"] = nn.ReLU()
    layers["output"] = nn.Linear(width, width)
    return nn.Sequential(layers)


def _at_least_one(k: int) -> int:
    if k < 1:
        raise ConfigError("k", expected="1 or more neighbours", got=str(k), fix="choose a larger k")
    return k
