"""Returns to go: what is still to come of an episode's reward, at each of its steps."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, DataError

PHYSICS = "physics"
"""Name of the field that holds the whole state of a simulation, where it is kept."""


def without_rewards(store: EpisodeStore, fix: str) -> str:
    """What a user can do about recordings without rewards: work them out where the state of the physics was kept.

    Args:
        store: the recordings.
        fix: what else can be done, where it was not.
    """
    if PHYSICS not in store.schema.observations or not store.schema.environment.startswith("dmc:"):
        return fix
    return f"work them out: offbook data reward {store.path} --task {store.schema.environment} --out STORE"


@dataclass(frozen=True, kw_only=True)
class ReturnSpec:
    r"""How a return to go is computed.

    With rewards r_0 .. r_(L-1), the sum at step t is G_t = r_t + gamma r_(t+1) + gamma^2 r_(t+2) + ...; without the
    current reward it begins at r_(t+1). The mean divides that by H - t, the steps that are left, where H is the length
    L of the episode or a declared horizon.

    Attributes:
        kind: the sum, or the mean over the steps that are left.
        gamma: discount, above 0 and at most 1; a mean is not discounted.
        include_current: whether r_t counts at step t.
        horizon: the number H of steps that a mean assumes for every episode; None for each episode's own length.

    Source: the sum is that of Chen et al., Decision Transformer, 2021, section 3. The mean is that of Wu et al., Masked
        Trajectory Models, 2023: their code leaves r_t out and assumes 1000 steps on one set of recordings
        (`ReturnSpec(kind="mean", include_current=False, horizon=1000)`) and includes r_t on another.
    """

    kind: Literal["sum", "mean"] = "sum"
    gamma: float = 1.0
    include_current: bool = True
    horizon: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("sum", "mean"):
            raise ConfigError("returns kind", expected="sum or mean", got=repr(self.kind), fix="choose one of them")
        if not 0 < self.gamma <= 1:
            raise ConfigError("returns gamma", expected="above 0, at most 1", got=str(self.gamma), fix="choose another")
        if self.kind == "mean" and self.gamma != 1:
            raise ConfigError(
                "returns gamma", expected="1 for a mean", got=str(self.gamma), fix="leave gamma out or take the sum"
            )
        if self.horizon is not None and (self.kind == "sum" or self.horizon < 1):
            fix = "leave the horizon out or take the mean"
            expected = "a positive number of steps for a mean, and none for a sum"
            raise ConfigError("returns horizon", expected=expected, got=f"{self.horizon} for a {self.kind}", fix=fix)


def returns_to_go(
    rewards: Shaped[np.ndarray, " steps"],
    starts: Int64[np.ndarray, " episodes"],
    lengths: Int64[np.ndarray, " episodes"],
    spec: ReturnSpec,
) -> Float64[np.ndarray, " steps"]:
    """The return to go at every step of every episode, in one pass.

    Args:
        rewards: rewards of all episodes, end to end.
        starts: row of each episode's first step.
        lengths: each episode's number of steps.
        spec: which return.

    Returns:
        Returns in the rewards' unit, computed in float64; zero at steps of no episode.

    Raises:
        DataError: an episode is longer than the declared horizon.

    Example:
        >>> rewards = np.array([1.0, 2.0, 3.0, 10.0])
        >>> returns_to_go(rewards, np.array([0, 3]), np.array([3, 1]), ReturnSpec()).tolist()
        [6.0, 5.0, 3.0, 10.0]
    """
    if spec.horizon is not None and len(lengths) and lengths.max() > spec.horizon:
        longest = int(lengths.argmax())
        fix = "declare a longer horizon, or none"
        expected = f"at most {spec.horizon} steps, the declared horizon"
        raise DataError(f"episode {longest}", expected=expected, got=f"{lengths[longest]} steps", fix=fix)
    result = np.zeros(len(rewards), np.float64)
    values = np.asarray(rewards, np.float64)
    gamma = spec.gamma
    # Episode by episode, backwards: one cumulative sum over everything would carry rounding, and any NaN, across.
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        stop = start + length
        backwards = values[start:stop][::-1]
        if gamma == 1:
            total = np.cumsum(backwards)
        else:
            total = np.fromiter(accumulate(backwards.tolist(), lambda later, now: now + gamma * later), np.float64)
        if not spec.include_current:
            total = np.concatenate([[0.0], total[:-1]])
        if spec.kind == "mean":
            left = np.arange(1, length + 1, dtype=np.float64)
            total = total / (left if spec.horizon is None else left + (spec.horizon - length))
        result[start:stop] = total[::-1]
    return result
