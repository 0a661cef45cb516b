"""Several trials of one task in a row: whether later ones are better, and whether that comes from the earlier ones.

A *group* is one task with n trials in one context. That the last trial is better than the first does not say that
experience was used: a policy that only counts its trials does as well. So the last trial is also played by a policy
that remembers the earlier trials of another group; what the own ones are worth beside those is the *context effect*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from gymnasium.wrappers import TimeLimit
from jaxtyping import Float32, Float64, Int64
from numpy.typing import ArrayLike

from offbook.client.protocol import Observation, ObservationSpec, Policy
from offbook.data.chains import Trial
from offbook.errors import ConfigError
from offbook.evaluate.rollout import pictures_for
from offbook.evaluate.stats import Interval, bootstrap_mean, clopper_pearson, paired_bootstrap
from offbook.runs.progress import track
from offbook.runs.seeding import evaluation_seeds
from offbook.sim.adapters import AnyEnv, make
from offbook.sim.play import Played, play
from offbook.sim.spaces import ACTION
from offbook.sim.trials import TRIAL, Trials

_LABELS = {
    "first": "first trial",
    "last": "last trial",
    "mean": "mean of trials",
    "max": "max of {n}",
    "luck_only_max": "max of {n} by luck alone",
    "gain": "gain: last - first",
    "context_effect": "context effect: last - foreign",
    "success": "success in last trial",
}
_LEAF = ObservationSpec(state=((TRIAL, 3),))


@runtime_checkable
class RecallingPolicy(Policy, Protocol):
    """A policy that remembers trials, and can be given some to remember.

    Attributes:
        dropped: whole trials that went out of its view so far, since it had no room for more.
        cut: steps that did so, of trials longer than all its room.
    """

    dropped: int
    cut: int

    def recall(self, session: str, trials: Sequence[Trial]) -> None:
        """Takes earlier trials, the oldest first, as if it had lived them in this session, which was just reset."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """A policy's trials on several tasks.

    Attributes:
        environment: the environment's id.
        settings: what it was made with, beside the number of trials.
        policy: the policy's name.
        seeds: of each group; they decide which task it is.
        returns: sum of the rewards of each trial, in the order in which they were played.
        steps: length of each trial.
        successes: whether the last trial of each group did the task; None where the environment does not say.
        foreign: return of the last trial after the earlier trials of the next group instead of the own; None where it
            was not played.
        fresh: returns of trials of the same tasks, in each of which the policy knew of no other; None where they were
            not played.
        summary: means over groups with bootstrap intervals: `first`, `last`, `mean` and `max` of the n trials of a
            group; `gain`, last - first, paired; where known `context_effect`, last - foreign, paired,
            `luck_only_max`, the maximum of n that the fresh trials let expect, and `success` of the last trial.
    """

    environment: str
    settings: Mapping[str, Any]
    policy: str
    seeds: tuple[int, ...]
    returns: Float64[np.ndarray, "groups trials"]
    steps: Int64[np.ndarray, "groups trials"]
    successes: tuple[bool, ...] | None = None
    foreign: Float64[np.ndarray, " groups"] | None = None
    fresh: Float64[np.ndarray, "groups fresh"] | None = None
    dropped: int = 0
    cut: int = 0
    summary: Mapping[str, Interval] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "summary", _summarise(self))

    @property
    def trials(self) -> int:
        """Number n of trials in a group."""
        return int(self.returns.shape[1])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "environment": self.environment,
            "settings": dict(self.settings),
            "policy": self.policy,
            "groups": len(self.seeds),
            "trials": self.trials,
            "summary": {name: interval.to_json() for name, interval in self.summary.items()},
            "seeds": list(self.seeds),
            "returns": self.returns.tolist(),
            "steps": self.steps.tolist(),
            "successes": None if self.successes is None else list(self.successes),
            "foreign": None if self.foreign is None else self.foreign.tolist(),
            "fresh": None if self.fresh is None else self.fresh.tolist(),
            "dropped": self.dropped,
            "cut": self.cut,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Groups:
        """What `to_json` gave."""

        def array(name: str) -> Float64[np.ndarray, ...] | None:
            return None if record[name] is None else np.asarray(record[name], np.float64)

        return cls(
            environment=record["environment"], settings=record["settings"], policy=record["policy"],
            seeds=tuple(record["seeds"]), returns=np.asarray(record["returns"], np.float64),
            steps=np.asarray(record["steps"], np.int64), foreign=array("foreign"), fresh=array("fresh"),
            successes=None if record["successes"] is None else tuple(record["successes"]), dropped=record["dropped"],
            cut=record["cut"],
        )  # fmt: skip


def _summarise(groups: Groups) -> dict[str, Interval]:
    returns, n = groups.returns, groups.trials
    first, last = returns[:, 0], returns[:, -1]
    summary = {
        "first": bootstrap_mean(first),
        "last": bootstrap_mean(last),
        "mean": bootstrap_mean(returns.mean(axis=1)),
        "max": _of_trials(bootstrap_mean(returns.max(axis=1)), n),
        "gain": paired_bootstrap(last, first),
    }
    if groups.foreign is not None:
        summary["context_effect"] = paired_bootstrap(last, groups.foreign)
    if groups.fresh is not None:
        summary["luck_only_max"] = _of_trials(bootstrap_mean(luck_only_max(groups.fresh, n)), n)
    if groups.successes is not None:
        summary["success"] = clopper_pearson(sum(groups.successes), len(groups.successes))
    return summary


def _of_trials(interval: Interval, n: int) -> Interval:
    """A maximum says nothing without the number of trials that it is of, so that goes with it wherever it goes."""
    return replace(interval, method=f"max of {n}, {interval.method}")


def luck_only_max(fresh: ArrayLike, n: int) -> Float64[np.ndarray, " groups"]:
    """The largest return of n trials that know nothing of one another, as m such trials of the same task let expect.

    With a group's returns x_(1) <= ... <= x_(m) it is sum_i x_(i) [(i/m)^n - ((i-1)/m)^n], the expectation of the
    maximum of n draws with replacement. Each group has its own, since pooling tasks that differ expects too much. Few
    trials expect too little (n = m = 4 uniform ones .72 instead of .8): take m several times n.

    Args:
        fresh: finite returns, shape (groups, m).
        n: trials of which the largest counts, 1 or more.

    Raises:
        ConfigError: there are no returns, they are not finite, or n is less than 1.

    Example:
        >>> luck_only_max([[0.0, 1.0], [3.0, 3.0]], 2).tolist()
        [0.75, 3.0]
    """
    returns = np.asarray(fresh, np.float64)
    _check_counts(n=n)
    if returns.ndim != 2 or returns.size == 0 or not np.isfinite(returns).all():
        got = f"shape {returns.shape}" if np.isfinite(returns).all() else "NaN or infinity"
        fix = "pass one row of returns for each group"
        raise ConfigError("luck_only_max", expected="finite returns, shape (groups, m)", got=got, fix=fix)
    m = returns.shape[1]
    return np.asarray(np.sort(returns, axis=1) @ np.diff((np.arange(m + 1) / m) ** n))


def retry_value(several: Groups, single: Groups) -> Interval:
    """What trying again is worth: the last trial of a policy that remembers, less the mean of one that does not.

    Args:
        several: of the policy that remembers.
        single: of the policy that does not, on the same groups; its number of trials may differ.

    Returns:
        The mean difference over groups, with a paired bootstrap interval.

    Raises:
        ConfigError: the groups are not the same.
    """
    for what in ("environment", "settings", "seeds"):
        a, b = getattr(several, what), getattr(single, what)
        if a != b:
            where = f"retry value of {several.policy!r} over {single.policy!r}"
            got, fix = f"{str(a)[:100]} and {str(b)[:100]}", "evaluate both in the same way"
            raise ConfigError(where, expected=f"the same {what}", got=got, fix=fix)
    return paired_bootstrap(several.returns[:, -1], single.returns.mean(axis=1))


def group_rows(groups: Mapping[str, Groups]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: one column for each policy, one row for each measure that one of them has.

    Args:
        groups: by the name that is shown.

    Example:
        >>> returns = np.array([[0.0, 2.0]] * 8)
        >>> steps = np.ones((8, 2), np.int64)
        >>> some = Groups(
        ...     environment="a:b", settings={}, policy="x", seeds=tuple(range(8)), returns=returns, steps=steps
        ... )
        >>> for row in group_rows({"x": some})[1]:
        ...     print(row)
        ['trials', '2']
        ['first trial', '0 [0, 0] (n=8)']
        ['last trial', '2 [2, 2] (n=8)']
        ['mean of trials', '1 [1, 1] (n=8)']
        ['max of 2', '2 [2, 2] (n=8)']
        ['gain: last - first', '2 [2, 2] (n=8)']
    """
    counts = sorted({some.trials for some in groups.values()})
    rows = [["trials", *(str(some.trials) for some in groups.values())]]
    for measure, label in _LABELS.items():
        # Maxima of different numbers of trials are not one measure.
        for n in counts if "{n}" in label else [None]:
            shown = [some.summary.get(measure) if n in (None, some.trials) else None for some in groups.values()]
            if any(shown):
                rows.append([label.format(n=n), *("-" if interval is None else str(interval) for interval in shown)])
    for what, name in (("trials", "dropped"), ("steps", "cut")):
        lost = [getattr(some, name) for some in groups.values()]
        if any(lost):
            rows.append([f"{what} that went out of view", *map(str, lost)])
    return ["return", *groups], rows


def evaluate_trials(
    env_id: str,
    policy: Policy,
    *,
    trials: int = 4,
    groups: int = 64,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    parallel: int = 16,
    foreign: bool = False,
    fresh: int = 0,
    max_steps: int | None = None,
) -> Groups:
    """Plays n trials in a row on each evaluation seed; these are never training seeds, and the same for every policy.

    Args:
        env_id: what `offbook.sim.adapters.make` takes.
        policy: who acts, one action at a time; what it remembers from trial to trial is its own affair.
        trials: number n of trials in a group, 1 or more.
        groups: how many, 1 or more.
        seed: from which the groups' seeds follow.
        settings: further arguments of `make`.
        parallel: environments that take turns, so that the policy answers several at once.
        foreign: whether the last trial is played again with the earlier trials of the next group in memory instead of
            the own; it begins where the own last trial began.
        fresh: number m of further trials in each group that know nothing of one another; several times n to tell what
            luck alone makes of the maximum.
        max_steps: truncates longer trials.

    Raises:
        ConfigError: the policy does not fit the environment or what is asked, or a setting is wrong.
        PolicyError: the policy gave an action that cannot be executed.

    Example:
        >>> from offbook.client.protocol import ActionSpec
        >>> from offbook.sim.experts import RandomPolicy
        >>> policy = RandomPolicy(ActionSpec(size=2, low=(-1.0,) * 2, high=(1.0,) * 2))
        >>> evaluate_trials("offbook:darkpoint", policy, trials=3, groups=2).returns.shape
        (2, 3)
    """
    _check_counts(trials=trials, groups=groups, parallel=parallel, max_steps=1 if max_steps is None else max_steps)
    _check_asked(policy, trials, groups, foreign, fresh)
    rounds = _Rounds(
        env_id=env_id,
        seeds=evaluation_seeds(seed, groups),
        settings={**(settings or {}), **pictures_for(env_id, policy.meta.observation)},
        parallel=parallel,
        max_steps=max_steps,
        observation=policy.meta.observation,
    )
    before = _out_of_view(policy)
    own, successes = rounds.play(policy, range(trials), f"evaluating {policy.meta.name}")
    dropped, cut = (now - then for now, then in zip(_out_of_view(policy), before, strict=True))
    again = None
    if isinstance(policy, RecallingPolicy) and foreign:
        earlier = {str(seed): own[(i + 1) % groups][:-1] for i, seed in enumerate(rounds.seeds)}
        label = f"{policy.meta.name}, foreign trials"
        again, _ = rounds.play(_Recalling(policy, earlier), range(trials - 1, trials), label)
    apart = None
    if fresh:
        apart, _ = rounds.play(_Forgetting(policy), range(fresh), f"{policy.meta.name}, fresh trials")
    return Groups(
        environment=env_id,
        settings=settings or {},
        policy=policy.meta.name,
        seeds=tuple(rounds.seeds),
        returns=_returns(own),
        steps=np.array([[len(trial.reward) for trial in group] for group in own], np.int64),
        successes=None if None in successes else tuple(map(bool, successes)),
        foreign=None if again is None else _returns(again)[:, 0],
        fresh=None if apart is None else _returns(apart),
        dropped=dropped,
        cut=cut,
    )


def _out_of_view(policy: Policy) -> tuple[int, int]:
    return (policy.dropped, policy.cut) if isinstance(policy, RecallingPolicy) else (0, 0)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(name, expected="1 or more", got=str(value), fix=f"change {name}")


def _check_asked(policy: Policy, trials: int, groups: int, foreign: bool, fresh: int) -> None:
    where = f"trials of policy {policy.meta.name!r}"
    if policy.meta.chunk != 1:
        # The rest of a chunk would be executed in the next trial.
        got, fix = f"chunks of {policy.meta.chunk}", "use a policy with chunks of 1"
        raise ConfigError(where, expected="one action at a time", got=got, fix=fix)
    if fresh < 0:
        raise ConfigError("fresh", expected="0 or more", got=str(fresh), fix="change fresh")
    if foreign and not isinstance(policy, RecallingPolicy):
        expected, fix = "a policy that has recall(), to give it foreign trials", "evaluate it with foreign=False"
        raise ConfigError(where, expected=expected, got=f"a {type(policy).__name__} without", fix=fix)
    if foreign and min(trials, groups) < 2:
        got, fix = f"{groups} of {trials}", "play more of them, or evaluate with foreign=False"
        raise ConfigError(where, expected="2 groups of 2 trials or more, to give foreign trials", got=got, fix=fix)


def _returns(groups: Sequence[Sequence[Trial]]) -> Float64[np.ndarray, "groups trials"]:
    return np.array([[trial.reward.sum() for trial in group] for group in groups], np.float64)


@dataclass(frozen=True, kw_only=True)
class _Rounds:
    """The same groups, to be played more than once."""

    env_id: str
    seeds: list[int]
    settings: Mapping[str, Any]
    parallel: int
    max_steps: int | None
    observation: ObservationSpec

    def play(self, policy: Policy, numbers: range, label: str) -> tuple[list[list[Trial]], list[bool | None]]:
        """Plays the trials of these numbers in each group; also tells whether the last one did the task."""
        envs = [self._make(numbers.stop) for _ in range(min(self.parallel, len(self.seeds)))]
        options = [{"first": numbers.start} for _ in self.seeds] if numbers.start else None
        try:
            episodes = play(envs, policy, self.seeds, options=options)
            played = list(track(((self._split(one, numbers), one.success) for one in episodes), label, len(self.seeds)))
        finally:
            for env in envs:
                env.close()
        return [trials for trials, _ in played], [success for _, success in played]

    def _make(self, trials: int) -> AnyEnv:
        if self.max_steps is None:
            return make(self.env_id, trials=trials, **self.settings)
        return Trials(_Limited(make(self.env_id, **self.settings), self.max_steps), trials)

    def _split(self, played: Played, numbers: range) -> list[Trial]:
        """The trials of a group, with what the policy saw of the state but the leaf that tells of the trial itself."""
        fields, steps = played.fields, played.steps
        names = [name for name, _ in self.observation.state if name != TRIAL]
        state = np.concatenate([np.zeros((steps, 0)), *(fields[name][:steps].reshape(steps, -1) for name in names)], 1)
        number = fields[TRIAL][:steps, 0]
        return [
            Trial(
                state=state[number == n].astype(np.float32),
                action=fields[ACTION][number == n].astype(np.float32),
                reward=played.rewards[number == n],
            )
            for n in numbers
        ]


class _Limited(TimeLimit[Any, Any]):
    """Truncates long trials; keeps the task in words, which Gymnasium's own wrapper hides."""

    @property
    def prompt(self) -> str:
        return str(getattr(self.env, "prompt", ""))


class _Recalling:
    """Begins every session with trials that it did not live.

    Args:
        policy: who acts.
        earlier: the trials to recall, by session.
    """

    def __init__(self, policy: RecallingPolicy, earlier: Mapping[str, Sequence[Trial]]) -> None:
        self.meta, self._policy, self._earlier = policy.meta, policy, earlier
        self._leaf = _columns(policy.meta.observation)

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        self._policy.reset(sessions, prompts)
        for session in sessions:
            self._policy.recall(session, self._earlier[session])

    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch 1 action"]:
        state = observation.state.copy()
        if self._leaf:
            # The reward of the step before is part of what it sees first, and that step was another's as well.
            _, step, reward = self._leaf
            for row in np.flatnonzero(state[:, step] == 0):
                state[row, reward] = self._earlier[observation.sessions[row]][-1].reward[-1]
        return self._policy.infer(replace(observation, state=state))


class _Forgetting:
    """Meets every trial as the first one of a session of its own.

    A mere reset of the same session would have policies that draw their actions draw the same ones in every trial.

    Args:
        policy: who acts.
    """

    def __init__(self, policy: Policy) -> None:
        wanted = policy.meta.observation
        self._size = wanted.state_size
        if TRIAL not in dict(wanted.state):
            wanted = replace(wanted, state=(*wanted.state, *_LEAF.state))
        self.meta, self._policy, self._leaf = replace(policy.meta, observation=wanted), policy, _columns(wanted)
        self._prompts: dict[str, str] = {}
        self._began: dict[str, float] = {}

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        self._prompts.update(zip(sessions, prompts, strict=True))

    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch 1 action"]:
        state = observation.state.copy()
        number, step, reward = self._leaf
        names = [f"{name}.{int(n)}" for name, n in zip(observation.sessions, state[:, number], strict=True)]
        begun = np.flatnonzero(state[:, step] == 0)
        if len(begun):
            self._policy.reset([names[i] for i in begun], [self._prompts[observation.sessions[i]] for i in begun])
            self._began.update((names[i], float(observation.time[i])) for i in begun)
        state[begun, reward] = 0
        state[:, number] = 0
        return self._policy.infer(
            replace(
                observation,
                sessions=tuple(names),
                state=state[:, : self._size],
                time=observation.time - [self._began[name] for name in names],
            )
        )


def _columns(wanted: ObservationSpec) -> list[int]:
    """Where number, step and last reward of the trial stand in the state of a policy; empty if it does not see them."""
    return wanted.columns(_LEAF) if TRIAL in dict(wanted.state) else []
