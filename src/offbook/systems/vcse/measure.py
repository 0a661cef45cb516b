"""The bonus on this machine: estimates beside closed forms, and its cost beside other ways to compute it."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from offbook.errors import OffbookError
from offbook.models.entropy import conditional_entropy
from offbook.models.knn import count_values_within, joint_nearest
from offbook.runs.benchmark import timed
from offbook.runs.config import from_json, to_json
from offbook.runs.memory import peak, run_alone
from offbook.runs.seeding import torch_generator
from offbook.systems.vcse.bonus import value_conditional_state_entropy

TOLERANCE = 0.06
"""In nats: by how much an estimate may be off a closed form."""

# The formula holds all differences at once; beyond this many bytes nobody would compute it so.
_TOO_MUCH = 2**31

# By how much two ways to compute a bonus may differ, and in which share of the states by one count.
_EQUAL, _SELDOM = 1e-4, 1e-3


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A conditional entropy in nats, beside what it is.

    Attributes:
        size: numbers of a state.
        rho: correlation of each with the value.
        true: in closed form.
        found: from samples.
    """

    size: int
    rho: float
    true: float
    found: float

    @property
    def off(self) -> float:
        """How far the estimate is from the truth."""
        return abs(self.found - self.true)


def gaussians(count: int, size: int, rho: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """States whose numbers correlate with a standard normal value, and the values; see `estimates`."""
    values, noise = torch.randn(count, generator=rng), torch.randn(count, size, generator=rng)
    return rho * values[:, None] + math.sqrt(1 - rho**2) * noise, values


def estimates(sizes: Sequence[int], rhos: Sequence[float], count: int, k: int, seed: int) -> list[Estimate]:
    r"""H(S given V) of Gaussians, for which it is $\tfrac d2 \log(2 \pi e (1 - \rho^2))$.

    Args:
        sizes: numbers d of a state.
        rhos: correlations, above -1 and below 1.
        count: samples.
        k: which neighbour is measured.
        seed: of the samples.
    """
    found = []
    for size in sizes:
        for rho in rhos:
            states, values = gaussians(count, size, rho, torch_generator(seed, "closed form", size, str(rho)))
            true = size / 2 * math.log(2 * math.pi * math.e * (1 - rho**2))
            found.append(Estimate(size=size, rho=rho, true=true, found=conditional_entropy(states, values, k)))
    return found


def published(states: Float[Tensor, "batch size"], values: Float[Tensor, " batch"], k: int) -> Float[Tensor, " batch"]:
    """The bonus as the published code computes it: all differences at once, and three searches where one would do.

    Source: what the code of Kim et al. (2023) does, written anew.
    """
    apart = (states[:, None] - states[None]).norm(dim=-1)
    apart_v = (values[:, None] - values[None]).abs()
    for matrix in (apart, apart_v):
        matrix.topk(k, dim=1, largest=False)
    reach = torch.maximum(apart, apart_v).topk(k, dim=1, largest=False).values[:, -1]
    within = (apart_v < reach[:, None]).sum(1)
    return torch.digamma(within.float() + 1) / states.shape[1] + torch.log(2 * reach + 1e-5)


def all_pairs(states: Float[Tensor, "batch size"], values: Float[Tensor, " batch"], k: int) -> Float[Tensor, " batch"]:
    """The same by PyTorch's exact distances of all pairs, which needs the square of the batch alone."""
    apart = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist")
    apart_v = (values[:, None] - values[None]).abs()
    reach = torch.maximum(apart, apart_v).topk(k, dim=1, largest=False).values[:, -1]
    within = (apart_v < reach[:, None]).sum(1)
    return torch.digamma(within.float() + 1) / states.shape[1] + torch.log(2 * reach + 1e-5)


def seconds(count: int, size: int, k: int, repeats: int, seed: int) -> dict[str, list[float]]:
    """Processor time of a bonus for each of so many states, by turns: ours, "cdist", and "published" where it fits.

    Raises:
        OffbookError: they do not agree.
    """
    states, values = gaussians(count, size, 0.0, torch_generator(seed, "cost", count))
    sides: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: value_conditional_state_entropy(states, values, k, compat="official"),
        "cdist": lambda: all_pairs(states, values, k),
    }
    if 4 * count**2 * size <= _TOO_MUCH:
        sides["published"] = lambda: published(states, values, k)
    results = {name: side() for name, side in sides.items()}
    for name, other in results.items():
        _check_agreement(name, other - results["ours"], states, values, k)
    return timed(sides, repeats, clock=time.process_time)


def _check_agreement(name: str, apart: Tensor, states: Tensor, values: Tensor, k: int) -> None:
    """Bonuses are equal but where rounding decides whether one more value lies within the radius, as it seldom does."""
    radius = joint_nearest(states, values, k - 1).distance[:, -1]
    counted = count_values_within(values, radius).to(apart) + 1  # the state itself is one of the values
    more = (torch.digamma(counted + 2) - torch.digamma(counted + 1)) / states.shape[1]
    wrong = ~(apart.abs() <= _EQUAL)
    one_more = (apart - more).abs() <= _EQUAL
    if (wrong & ~one_more).any() or wrong.sum() > max(1, _SELDOM * len(states)):
        got = f"{int(wrong.sum())} of {len(states)} that differ, by up to {float(apart.abs().max()):.2g}"
        fix = "report it with your versions of Python and PyTorch"
        raise OffbookError(f"bonuses by {name!r} and by ours", expected="the same numbers", got=got, fix=fix)


def ratios(spent: dict[str, list[float]]) -> dict[str, float]:
    """How many times as long as ours the others take, by the medians."""
    ours = median(spent["ours"])
    return {name: median(of) / ours for name, of in spent.items() if name != "ours"}


@dataclass(frozen=True, kw_only=True)
class Large:
    """One bonus in a process of its own.

    Attributes:
        count: states.
        size: numbers of a state.
        k: which neighbour.
        seed: of the states.
    """

    count: int = 65_536
    size: int = 64
    k: int = 12
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What it took.

    Attributes:
        bytes: resident in the process at its peak, all libraries included.
        seconds: processor time of the bonus.
    """

    bytes: int
    seconds: float


def measure(large: Large) -> Taken:
    """Computes one bonus of many states in a process of its own.

    Raises:
        OffbookError: it did not come to its end.
    """
    threads = {"OMP_NUM_THREADS": "1"}
    return run_alone(__name__, large, Taken, threads, where=f"a bonus of {large.count} states")


def _alone(large: Large) -> Taken:
    states, values = gaussians(large.count, large.size, 0.0, torch_generator(large.seed, "cost", large.count))
    began = time.process_time()
    value_conditional_state_entropy(states, values, large.k)
    spent = time.process_time() - began
    return Taken(bytes=peak(), seconds=spent)


if __name__ == "__main__":
    print(json.dumps(to_json(_alone(from_json(Large, json.loads(sys.argv[1]))))))
