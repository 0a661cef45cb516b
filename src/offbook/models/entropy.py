"""Differential entropies from samples, in nats, by distances to nearest neighbours.

For a state S of d numbers and a value V of one, with r_i the distance of sample i to its k-th neighbour, psi the
digamma function and c the volume of the unit ball in d dimensions:

| what | estimate |
|---|---|
| H(S) | psi(N) - psi(k) + log c + d mean log r, r among states |
| H(S, V) | psi(N) - psi(k) + log 2c + (d + 1) mean log r, r in `joint_nearest` |
| H(S given V) | -psi(k) + mean psi(n_v + 1) + log c + d mean log r, r as above, n_v the values strictly within r |
| I(S; V) | psi(N) + psi(k) - mean (psi(n_s + 1) + psi(n_v + 1)), n_s the states strictly within r |

Where values follow from states closely in many dimensions, neighbours are farther than the density's detail and the
estimates are too high, the less so the more samples there are. Samples with k duplicates have no density: their
entropy is minus infinity.

Source: H(S), Kozachenko and Leonenko (1987); the others, Kraskov et al., "Estimating mutual information" (2004),
equations 8 and 20-24.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from offbook.models.knn import count_states_within, count_values_within, joint_nearest

States = Float[Tensor, "samples size"]
Values = Float[Tensor, " samples"]


def log_ball(size: int) -> float:
    """The logarithm of the volume of the unit ball.

    Example:
        >>> round(log_ball(2) - math.log(math.pi), 12)
        0.0
    """
    return size / 2 * math.log(math.pi) - math.lgamma(1 + size / 2)


def state_entropy(states: States, k: int = 5) -> float:
    """H(S) in nats.

    Args:
        states: independent samples.
        k: which neighbour is measured; more give less noise and more bias.

    Raises:
        ConfigError: k does not fit the samples.
        DataError: a number is not finite.

    Example:
        >>> normal = torch.randn(2_000, 1, generator=torch.Generator().manual_seed(0))
        >>> abs(state_entropy(normal) - 0.5 * math.log(2 * math.pi * math.e)) < 0.1
        True
    """
    radius = joint_nearest(states, None, k).distance[:, -1]
    count, size = states.shape
    return _psi(count) - _psi(k) + log_ball(size) + size * _mean_log(radius)


def joint_entropy(states: States, values: Values, k: int = 5) -> float:
    """H(S, V) in nats; arguments and errors as for `conditional_entropy`."""
    radius = joint_nearest(states, values, k).distance[:, -1]
    count, size = states.shape
    return _psi(count) - _psi(k) + log_ball(size) + math.log(2) + (size + 1) * _mean_log(radius)


def conditional_entropy(states: States, values: Values, k: int = 5) -> float:
    """H(S given V) in nats: how much states of the same value differ.

    Args:
        states: independent samples.
        values: a number for each.
        k: which neighbour is measured.

    Raises:
        ConfigError: k does not fit the samples, or shapes do not.
        DataError: a number is not finite.
    """
    radius = joint_nearest(states, values, k).distance[:, -1]
    within = count_values_within(values.reshape(-1), radius)
    size = states.shape[1]
    return -_psi(k) + _mean_psi(within) + log_ball(size) + size * _mean_log(radius)


def mutual_information(states: States, values: Values, k: int = 5) -> float:
    """I(S; V) in nats; arguments and errors as for `conditional_entropy`."""
    radius = joint_nearest(states, values, k).distance[:, -1]
    near_states = count_states_within(states.to(radius), radius)
    near_values = count_values_within(values.reshape(-1), radius)
    return _psi(len(states)) + _psi(k) - _mean_psi(near_states) - _mean_psi(near_values)


def _psi(n: int) -> float:
    return float(torch.digamma(torch.tensor(float(n), dtype=torch.float64)))


def _mean_psi(counts: Tensor) -> float:
    return float(torch.digamma(counts.double() + 1).mean())


def _mean_log(radius: Tensor) -> float:
    return float(radius.double().log().mean())
