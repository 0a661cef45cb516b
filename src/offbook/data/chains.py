"""Chains of trials out of a store: tries at one task behind one another, each of which is told to aim at the best.

What a policy that may try several times learns from: the chain of hindsight of the Agentic Transformer (Liu and Abbeel,
2023). A single trial that aims at its own return is what a Decision Transformer learns from: `n_trials=(1, 1)` and
`relabel="own"`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, Num, Shaped
from numpy.random import Generator, Philox

from offbook.data.pack import Pack
from offbook.data.returns import without_rewards
from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, DataError
from offbook.runs.progress import note
from offbook.runs.seeding import generator

REWARD, TARGET, DONE = "reward", "target", "done"
"""Names under which chains carry the reward, the target before each step, and whether the target was reached."""

Relabel = Literal["max", "own"]
Group = Literal["task", "seed", "source"]
Order = Literal["ascending", "random", "time"]
# Fields with more numbers a step than this, and pictures, are read from the store's files.
_PACKED = 512
_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One try at a task, from a reset to its end, as policies that remember earlier trials take it.

    Attributes:
        state: what was seen before each of the T steps.
        action: what was done at each.
        reward: what each earned.

    Raises:
        DataError: they have different numbers of steps.
    """

    state: Float32[np.ndarray, "steps state"]
    action: Float32[np.ndarray, "steps action"]
    reward: Float64[np.ndarray, " steps"]

    def __post_init__(self) -> None:
        steps = [len(self.state), len(self.action), len(self.reward)]
        if len(set(steps)) > 1:
            got = f"{steps[0]} states, {steps[1]} actions and {steps[2]} rewards"
            raise DataError("trial", expected="as many of each", got=got, fix="give those of the same steps")


@dataclass(frozen=True, kw_only=True)
class Chains:
    """B chains, each of whole trials without holes between them; padding is at the right alone, and zero.

    N is the number of steps of the longest.

    Attributes:
        data: values by field, shape (B, N, ...); floats are float32, other types are as recorded. With them `"reward"`
            (float32); `"target"`, the return that is still to come before each step if the trial does as it is told
            (float32); and `"done"`, whether a trial ends with this step and reached its target (bool).
        valid: which steps are real, shape (B, N).
        trial: number of the trial in its chain, from 0, shape (B, N).
        step: number of the step in its trial, from 0, shape (B, N).
        episode: numbers of the chains' episodes in the store, in their order; -1 behind the last, shape (B, most
            trials).
        cut: how many of the chains lost their first trials because they were too long.
    """

    data: Mapping[str, Shaped[np.ndarray, "batch time ..."]]
    valid: Bool[np.ndarray, "batch time"]
    trial: Int64[np.ndarray, "batch time"]
    step: Int64[np.ndarray, "batch time"]
    episode: Int64[np.ndarray, "batch trials"]
    cut: int


def relabel(
    rewards: Num[np.ndarray, " steps"], lengths: Int64[np.ndarray, " trials"], kind: Relabel = "max"
) -> tuple[Float64[np.ndarray, " steps"], Bool[np.ndarray, " steps"]]:
    r"""The target before each step of a chain, and the steps with which a trial has reached its target.

    Trial i with rewards r_(i,0), r_(i,1), ... and return R_i is told to aim at R\* = max_i R_i, or at its own R_i. The
    target falls by what is earned: G_(i,0) = R\*, G_(i,t+1) = G_(i,t) - r_(i,t); it rises with a negative reward.

    Args:
        rewards: rewards of the trials, end to end and in their order; finite.
        lengths: each trial's number of steps, 1 or more.
        kind: aim at the best return of the chain (`"max"`) or each trial at its own (`"own"`).

    Returns:
        Targets in the rewards' unit, computed in float64; and true at the last step of each trial whose return is its
        target: of the best and those that tie with it, or of all where each aims at its own. Returns are sums that are
        rounded once, so that the same rewards in another order tie.

    Raises:
        ConfigError: there is no such kind.
        DataError: a trial has no steps, there are more or fewer rewards than steps, or a reward is NaN or infinite.

    Example:
        >>> targets, done = relabel(np.array([1.0, 0.0, 1.0, 2.0]), np.array([2, 2]))
        >>> targets.tolist(), done.tolist()
        ([3.0, 2.0, 3.0, 2.0], [False, False, False, True])
        >>> relabel(np.array([1.0, 0.0, 1.0, 2.0]), np.array([2, 2]), "own")[0].tolist()
        [1.0, 0.0, 3.0, 2.0]
    """
    _refuse_choice("relabel", kind, Relabel)
    if not len(lengths) or lengths.min() < 1 or lengths.sum() != len(rewards):
        expected = "trials of one step or more, with a reward for each"
        got = f"{len(rewards)} rewards for trials of {lengths.tolist()} steps"
        raise DataError("chain", expected=expected, got=got, fix="give each trial's rewards and its length")
    values = np.asarray(rewards, np.float64)
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        trial = int(np.searchsorted(np.cumsum(lengths), bad[0], "right"))
        where = f"chain, trial {trial}, step {int(bad[0] - lengths[:trial].sum())}"
        raise DataError(where, expected="a finite reward", got=str(values[bad[0]]), fix="leave that trial out")
    before, returns = _earned(values, lengths)
    aims = np.full_like(returns, returns.max()) if kind == "max" else returns
    done = np.zeros(len(values), bool)
    done[np.cumsum(lengths) - 1] = returns >= aims
    return np.repeat(aims, lengths) - before, done


def _earned(
    rewards: Float64[np.ndarray, " steps"], lengths: Int64[np.ndarray, " trials"]
) -> tuple[Float64[np.ndarray, " steps"], Float64[np.ndarray, " trials"]]:
    """What each trial has earned before each of its steps, and in the end."""
    before, returns, stop = np.zeros(len(rewards)), np.empty(len(lengths)), 0
    # Trial by trial, so that a trial's sums are the same wherever in a chain or store it stands.
    for i, length in enumerate(lengths.tolist()):
        start, stop = stop, stop + length
        np.cumsum(rewards[start : stop - 1], out=before[start + 1 : stop])
        returns[i] = fsum(rewards[start:stop].tolist())
    return before, returns


class ChainSampler:
    """Draws chains from a store; each batch is a function of the seed and the step alone, so resuming needs no state.

    A chain's group is drawn with a chance in proportion to the number of its episodes; then the number of trials, all
    of the range with equal chances; then so many different episodes of the group, all with equal chances. Groups with
    fewer give all that they have. Small float fields are packed side by side once (`Pack`).

    Args:
        store: the recordings, with rewards; each episode is a trial.
        fields: which fields; an observation's value after the last step is in no chain.
        n_trials: fewest and most trials of a chain, both possible; trials that `max_steps` drops count here.
        group: which column of the store's index the episodes of a chain share. Chains never mix tasks, whatever it is;
            where there are several, a group is named `"TASK/SEED"` or `"TASK/SOURCE"`.
        order: of the trials: by return, and by number where returns are equal (`"ascending"`), as drawn (`"random"`),
            or as recorded (`"time"`).
        relabel: what a trial is told to aim at: the best return of its chain, or its own; see the function `relabel`.
        within: draws only from this share of each group's episodes, those of the largest returns; above 0, at most 1,
            rounded up to whole episodes.
        max_steps: drops as many first trials of a chain as must be for it to have no more steps than this; targets are
            those of what is left. None for no limit.
        episodes: numbers of the episodes to draw from; None for all.
        seed: of the random draws.

    Attributes:
        episodes: numbers of the episodes that are drawn from, ascending.
        returns: their returns, sums of the stored rewards in float64.
        groups: number of episodes drawn from by the group's name.
        best: largest return by the group's name.
        short_groups: how many groups have fewer episodes than the most trials of a chain.

    Raises:
        ConfigError: a setting is out of its range.
        DataError: there is no episode, a group has too few of them, an episode lacks a field or is longer than
            `max_steps`, there are no rewards, or a reward is NaN or infinite.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from offbook.data.store import FieldSpec, Schema
        >>> action = FieldSpec("action", "float32", (1,), "action")
        >>> reward = FieldSpec("reward", "float32", (), "reward")
        >>> with TemporaryDirectory() as folder:
        ...     with EpisodeStore.create(f"{folder}/tries", Schema((action, reward))) as writer:
        ...         for earned in ([1, 2], [1, 0]):
        ...             values = {"action": np.c_[earned].astype(np.float32), "reward": np.array(earned, np.float32)}
        ...             number = writer.append(values, terminated=True, truncated=False)
        ...     chains = ChainSampler(EpisodeStore.open(f"{folder}/tries"), ["action"], n_trials=(2, 2)).sample(1, 0)
        >>> chains.episode.tolist(), chains.data["target"].tolist(), chains.data["done"].tolist()
        ([[1, 0]], [[3.0, 2.0, 3.0, 2.0]], [[False, False, False, True]])
    """

    def __init__(
        self,
        store: EpisodeStore,
        fields: Sequence[str],
        *,
        n_trials: tuple[int, int] = (1, 4),
        group: Group = "task",
        order: Order = "ascending",
        relabel: Relabel = "max",
        within: float = 1.0,
        max_steps: int | None = None,
        episodes: Int64[np.ndarray, " chosen"] | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, allowed in (("group", group, Group), ("order", order, Order), ("relabel", relabel, Relabel)):
            _refuse_choice(name, value, allowed)
        if not 1 <= n_trials[0] <= n_trials[1]:
            expected = "a number from 1 on, and one that is not smaller"
            raise ConfigError("n_trials", expected=expected, got=str(n_trials), fix="choose others, such as (1, 4)")
        if not 0 < within <= 1:
            raise ConfigError("within", expected="above 0, at most 1", got=str(within), fix="choose 1 to use all")
        self.store, self.fields, self.n_trials, self.max_steps = store, tuple(fields), n_trials, max_steps
        self.order, self.relabel = order, relabel
        self._key = generator(seed, "chains").integers(2**63, size=2).astype(np.uint64)
        chosen = self._choose(episodes)
        names, of = np.unique(_group_names(store, chosen, group), return_inverse=True)
        rewards = self._rewards_of(chosen)
        lengths = store.episodes["length"][chosen]
        before, returns = _earned(rewards, lengths)
        keep = _best(returns, of, within)
        self.episodes, self.returns, self._group = chosen[keep], returns[keep], of[keep]
        self._lengths, steps = lengths[keep], np.repeat(keep, lengths)
        self._before, self._rewards = before[steps], rewards[steps].astype(np.float32)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._shifts = store.episodes["start"][self.episodes] - self._starts
        self._rank(names)
        packed = [name for name in self.fields if _small(store, name)]
        self._pack = Pack(store, packed, self.episodes)
        self._direct = {name: store.field(name) for name in self.fields if name not in packed}

    def _choose(self, episodes: Int64[np.ndarray, " given"] | None) -> Int64[np.ndarray, " chosen"]:
        """The episodes that may be drawn from, which hold all that a chain has."""
        store, where = self.store, str(self.store.path)
        chosen = np.arange(len(store)) if episodes is None else np.unique(episodes)
        if not len(chosen) or not 0 <= chosen[0] <= chosen[-1] < len(store):
            expected, got = "an episode to draw from", "none"
            if len(chosen):
                expected, got = f"episodes 0 to {len(store) - 1}", f"{chosen[0]} to {chosen[-1]}"
            raise DataError(where, expected=expected, got=got, fix="choose others")
        reward = store.schema.reward
        if reward is None or not store.present(reward)[chosen].any():
            expected = "rewards, to tell good trials from bad ones"
            fix = without_rewards(store, "give the recordings rewards first")
            raise DataError(where, expected=expected, got="none", fix=fix)
        for name in sorted({TARGET, DONE, *({REWARD} - {reward})} & set(self.fields)):
            expected = "fields of other names than those that chains add"
            raise ConfigError("fields", expected=expected, got=repr(name), fix="leave it out, or rename it")
        for name in (*self.fields, reward):
            lacking = chosen[~store.present(name)[chosen]]
            if len(lacking):
                expected = "values in all episodes, as chains have the same fields"
                got, fix = f"none in {len(lacking)} of {len(chosen)}: {named(lacking)}", "choose episodes that hold it"
                raise DataError(f"{where}, field {name!r}", expected=expected, got=got, fix=fix)
        self._refuse_long(chosen)
        return chosen

    def _refuse_long(self, chosen: Int64[np.ndarray, " chosen"]) -> None:
        """Refuses episodes that could be in a chain only in part."""
        if self.max_steps is None:
            return
        lengths = self.store.episodes["length"][chosen]
        longest = int(lengths.argmax())
        if lengths[longest] > self.max_steps:
            expected, got = f"at most {self.max_steps} steps, the most of a chain", f"{lengths[longest]}"
            where, fix = f"{self.store.path}, episode {chosen[longest]}", "raise max_steps, or leave the episode out"
            raise DataError(where, expected=expected, got=got, fix=fix)

    def _rewards_of(self, chosen: Int64[np.ndarray, " chosen"]) -> Float64[np.ndarray, " steps"]:
        """The rewards of the episodes, end to end."""
        starts, lengths = (self.store.episodes[column][chosen] for column in ("start", "length"))
        ends = np.cumsum(lengths)
        rows = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
        name = self.store.schema.reward or ""
        rewards = np.asarray(self.store.field(name)[rows], np.float64)
        # Chains carry float32, where a larger reward would be infinite.
        if len(bad := np.flatnonzero(~(np.abs(rewards) <= np.finfo(np.float32).max))):
            which = int(np.searchsorted(ends, bad[0], "right"))
            step = int(bad[0] - (ends - lengths)[which])
            where = f"{self.store.path}, field {name!r}, episode {chosen[which]}, step {step}"
            fix = "leave the episode out, or give it its rewards anew"
            raise DataError(where, expected="a finite reward", got=str(rewards[bad[0]]), fix=fix)
        return rewards

    def _rank(self, names: Shaped[np.ndarray, " groups"]) -> None:
        """Sorts the episodes by group, return and number, and says what is known of each group."""
        sizes = np.bincount(self._group)
        few, most = self.n_trials
        if sizes.min() < few:
            where = f"{self.store.path}, group {str(names[sizes.argmin()])!r}"
            expected, fix = f"{few} episodes or more, the fewest of n_trials", "lower n_trials, or group otherwise"
            raise DataError(where, expected=expected, got=str(sizes.min()), fix=fix)
        self._sizes, self._firsts = sizes, np.cumsum(sizes) - sizes
        self._ranked = np.lexsort((self.returns, self._group))
        best = self.returns[self._ranked[self._firsts + sizes - 1]]
        self.groups = dict(zip(names.tolist(), sizes.tolist(), strict=True))
        self.best = dict(zip(names.tolist(), best.tolist(), strict=True))
        self.short_groups = int((sizes < most).sum())
        if most > 1 and (self.returns[self._ranked[self._firsts]] == best).all():
            note(f"{self.store.path}: the returns are equal in every group, there is no improvement to learn from")

    def sample(self, batch: int, step: int) -> Chains:
        """Draws a batch.

        Args:
            batch: number B of chains, 1 or more.
            step: number of the batch; the same seed, batch and step give the same chains, in any process.

        Returns:
            The chains; the arrays are the caller's own.
        """
        drawn = self._drawn(batch, Generator(Philox(key=self._key, counter=step << 64)))
        cut = 0
        if self.max_steps is not None:
            lengths = np.where(drawn >= 0, self._lengths[drawn], 0)
            over = np.cumsum(lengths[:, ::-1], 1)[:, ::-1] > self.max_steps
            cut, drawn = int(over.any(1).sum()), np.where(over, -1, drawn)
            drawn = np.take_along_axis(drawn, np.argsort(drawn < 0, 1, kind="stable"), 1)
        return self._gather(drawn, cut)

    def _drawn(self, batch: int, random: Generator) -> Int64[np.ndarray, "batch trials"]:
        """Places in `episodes` of each chain's trials, in their order; -1 behind the last."""
        few, most = self.n_trials
        uniform = random.random((most + 2, batch))
        group = self._group[(uniform[0] * len(self._group)).astype(np.int64)]
        size = self._sizes[group]
        n = np.minimum(few + (uniform[1] * (most - few + 1)).astype(np.int64), size)
        ranks = np.empty((batch, most), np.int64)
        # Floyd's way to draw different numbers: where one is there already, take the last that became possible.
        for k in range(most):
            last = size - n + k
            rank = (uniform[2 + k] * (last + 1)).astype(np.int64)
            ranks[:, k] = np.where((ranks[:, :k] == rank[:, None]).any(1), last, rank)
        there = np.arange(most) < n[:, None]
        places = self._ranked[np.where(there, self._firsts[group][:, None] + ranks, 0)]
        keys = {"ascending": ranks, "time": places}
        key = random.random(ranks.shape) if self.order == "random" else keys[self.order]
        order = np.argsort(np.where(there, key, len(self.episodes)), 1)
        return np.take_along_axis(np.where(there, places, -1), order, 1)

    def _gather(self, drawn: Int64[np.ndarray, "batch trials"], cut: int) -> Chains:
        batch, most = drawn.shape
        # With padding as a last piece of each chain the pieces fill all rows, and what is known of one is repeated.
        pieces = np.pad(drawn, ((0, 0), (0, 1)), constant_values=-1)
        real = pieces >= 0
        lengths = np.where(real, self._lengths[pieces], 0)
        steps = lengths.sum(1)
        time = int(steps.max())
        lengths[:, -1] = time - steps
        counts = lengths.reshape(-1)
        begins = (np.cumsum(counts) - counts).reshape(lengths.shape)

        def spread(of_pieces: Shaped[np.ndarray, "batch pieces"]) -> Shaped[np.ndarray, "batch time"]:
            return np.repeat(of_pieces.reshape(-1), counts).reshape(batch, time)

        returns = np.where(real, self.returns[pieces], -np.inf)
        aims = np.broadcast_to(returns.max(1, keepdims=True), returns.shape) if self.relabel == "max" else returns
        done = np.zeros(batch * time, bool)
        done[(begins + lengths - 1)[real & (returns >= aims)]] = True
        step = np.arange(batch * time).reshape(batch, time) - spread(begins)
        rows = spread(np.where(real, self._starts[pieces], 0)) + step
        trial = spread(np.broadcast_to(np.arange(most + 1), pieces.shape))
        valid = spread(real)
        data = self._packed(rows)
        if self._direct:
            data |= self._read(rows + spread(np.where(real, self._shifts[pieces], 0)))
        data = {name: data[name] for name in self.fields}
        data[REWARD] = self._rewards[rows]
        data[TARGET] = (spread(np.where(real, aims, 0)) - self._before[rows]).astype(np.float32)
        data[DONE] = done.reshape(batch, time)
        if lengths[:, -1].any():
            padding = ~valid
            for values in (*data.values(), trial, step):
                values[padding] = 0
        episode = np.where(drawn >= 0, self.episodes[drawn], -1)
        return Chains(data=data, valid=valid, trial=trial, step=step, episode=episode, cut=cut)

    def _packed(self, rows: Int64[np.ndarray, "batch time"]) -> dict[str, np.ndarray]:
        """The packed fields at rows of the pack."""
        values = np.empty((*rows.shape, self._pack.rows.shape[1]), np.float32)
        # All rows are in range; "clip" spares the copy that np.take makes to be able to raise half-way.
        np.take(self._pack.rows, rows, axis=0, out=values, mode="clip")
        return {
            name: values[..., columns].reshape(*rows.shape, *self.store.schema[name].shape)
            for name, columns in self._pack.columns.items()
        }

    def _read(self, rows: Int64[np.ndarray, "batch time"]) -> dict[str, np.ndarray]:
        """The other fields at rows of the store."""
        read = {name: source[rows] for name, source in self._direct.items()}
        return {
            name: values.astype(np.float32, copy=False) if values.dtype.kind == "f" else values
            for name, values in read.items()
        }


def named(episodes: Int64[np.ndarray, " episodes"]) -> str:
    """The numbers of some episodes, the first few where there are many."""
    return ", ".join(map(str, episodes[:_NAMED].tolist())) + (", ..." if len(episodes) > _NAMED else "")


def _refuse_choice(name: str, value: str, allowed: object) -> None:
    if value not in (choices := get_args(allowed)):
        raise ConfigError(name, expected=" or ".join(choices), got=repr(value), fix="choose one of them")


def _small(store: EpisodeStore, name: str) -> bool:
    spec = store.schema[name]
    return np.dtype(spec.dtype).kind == "f" and spec.size <= _PACKED


def _group_names(store: EpisodeStore, episodes: Int64[np.ndarray, " chosen"], group: Group) -> list[str]:
    """The name of each episode's group."""
    tasks, values = (store.episodes[column][episodes].tolist() for column in ("task", group))
    if None in values:
        where, fix = f"{store.path}, episode {episodes[values.index(None)]}", "group by task or source"
        raise DataError(where, expected="a seed to group by", got="none", fix=fix)
    if group == "task" or len(set(tasks)) == 1:
        return [str(value) for value in values]
    return [f"{task}/{value}" for task, value in zip(tasks, values, strict=True)]


def _best(
    returns: Float64[np.ndarray, " episodes"], group: Int64[np.ndarray, " episodes"], within: float
) -> Bool[np.ndarray, " episodes"]:
    """Which episodes are in the best share of their group; of equal ones the later."""
    sizes = np.bincount(group)
    # Less a little, so that the rounding of a share of whole episodes does not count as a further one.
    kept = np.maximum(np.ceil(within * sizes - 1e-9), 1)
    ranked = np.lexsort((returns, group))
    keep = np.zeros(len(group), bool)
    keep[ranked] = np.arange(len(group)) >= (np.cumsum(sizes) - kept)[group[ranked]]
    return keep
