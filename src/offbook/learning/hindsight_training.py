"""Fitting a network that reads its earlier trials to the chains of a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from offbook.client.protocol import ActionSpec, ObservationSpec, PolicyMeta
from offbook.data.chains import DONE, REWARD, TARGET, Chains, ChainSampler, named
from offbook.data.normalise import Normalizer
from offbook.data.splits import HELD_OUT, read_splits
from offbook.data.store import EpisodeStore
from offbook.errors import DataError, check_settings
from offbook.learning.fit import FitConfig, fit
from offbook.learning.hindsight import ACTION, STATE, HindsightNetwork, HindsightSizes
from offbook.learning.hindsight import hindsight_loss as loss_of
from offbook.learning.recordings import choose_episodes, choose_observation
from offbook.learning.trying import HindsightPolicy
from offbook.runs.directory import RunDirectory
from offbook.runs.progress import note
from offbook.runs.seeding import generator
from offbook.sim.trials import TRIAL

# Chains that a validation looks at, and those that tell which returns chains aim at.
_VALIDATION, _LOOKED = 64, 1024


@dataclass(frozen=True, kw_only=True)
class HindsightConfig:
    """How to fit a network that reads its earlier trials.

    Attributes:
        parts: state parts that are joined to the state, such as joints; None takes all that the recordings have.
        n_trials: fewest and most trials of a chain.
        group: what the trials of a chain have in common: the task, the seed that decided the instance, or the source.
        order: of the trials in a chain: ascending returns, random, or as they were recorded.
        relabel: what each trial aims at: the best return of its chain, or its own.
        within: share of a group's episodes, the best ones, that chains are made of.
        max_steps: longer chains lose their first trials; None for none.
        loss_trials: whose actions count: those of all trials, or of each chain's last one.
        target: of the returns that chains aim at, the quantile that the policy aims at.
        model: the network.
        held_out: share of the groups, or of the episodes where there is one group, that is kept for validation.
        validate_every: steps between two validations; each also saves the policy.
        fit: the training loop; its batch size counts chains.

    Source: Liu and Abbeel (2023), algorithm 1. What a chain's trials weigh in the loss is not said there.
    """

    parts: tuple[str, ...] | None = None
    n_trials: tuple[int, int] = (1, 4)
    group: Literal["task", "seed", "source"] = "task"
    order: Literal["ascending", "random", "time"] = "ascending"
    relabel: Literal["max", "own"] = "max"
    within: float = 1.0
    max_steps: int | None = None
    loss_trials: Literal["all", "last"] = "all"
    target: float = 0.9
    model: HindsightSizes = field(default_factory=HindsightSizes)
    held_out: float = 0.1
    validate_every: int = 500
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            steps=3_000, batch_size=64, learning_rate=1e-3, weight_decay=1e-4, warmup=300, clip_norm=0.25
        )
    )

    def __post_init__(self) -> None:
        low, high = self.n_trials
        checks = {
            "n_trials": (1 <= low <= high <= 4_096, "two numbers from 1 to 4096, the smaller first"),
            "within": (0 < self.within <= 1, "a share above 0, at most 1"),
            "target": (0 <= self.target <= 1, "a quantile from 0 to 1"),
            "held_out": (0 <= self.held_out < 1, "a share in [0, 1)"),
            "validate_every": (self.validate_every >= 1, "1 or more"),
        }
        check_settings(self, checks)


class ChainData:
    """What of a store is learnt from.

    Args:
        store: the recordings.
        config: see `HindsightConfig`.

    Attributes:
        observation: state parts that are looked at.
        action: what is told.
        train: numbers of the episodes to learn from.
        held_out: numbers of those that are not learnt from.
        sampler: draws chains of the former.
        steps: of the longest trial.

    Raises:
        ConfigError: the recordings have no such part.
        DataError: no usable episode, none or several action fields, rewards are missing, or a value is NaN or infinite.
    """

    def __init__(self, store: EpisodeStore, config: HindsightConfig) -> None:
        self.store, self.config = store, config
        self.observation = choose_observation(store, config.parts)
        self._parts = [name for name, _ in self.observation.state]
        self._field, self.action = _action(store)
        self._fields = [*self._parts, self._field]
        self.train, self.held_out = _divide(store, config, self._fields)
        self.sampler = self._sampler(self.train, config.n_trials)
        self.steps = int(store.episodes["length"][self.train].max())

    def _sampler(self, episodes: Int64[np.ndarray, " episodes"], n_trials: tuple[int, int]) -> ChainSampler:
        config = self.config
        return ChainSampler(
            self.store, self._fields, n_trials=n_trials, group=config.group, order=config.order,
            relabel=config.relabel, within=config.within, max_steps=config.max_steps, episodes=episodes,
            seed=config.fit.seed,
        )  # fmt: skip

    def tell(self) -> None:
        """Says what of the recordings is not learnt from, or not as was asked for."""
        store, most = self.store, self.config.n_trials[1]
        lacking = ~np.logical_and.reduce([store.present(name) for name in self._fields])
        if count := int(lacking.sum()):
            note(f"{count} of {len(store)} episodes have no actions, or lack a part of the state: not learnt from")
        if short := self.sampler.short_groups:
            note(f"{short} of {len(self.sampler.groups)} groups have fewer than {most} trials: shorter chains")
        if self.config.held_out and not len(self.held_out):
            note(f"no validation: none of {len(self.train)} episodes is held out")

    def batch(self, index: int) -> Mapping[str, Tensor]:
        """A batch of training chains, a function of the seed and the index."""
        return self.tensors(self.sampler.sample(self.config.fit.batch_size, index))

    def validation(self) -> Mapping[str, Tensor] | None:
        """Chains of the episodes held out, always the same ones; None without any."""
        if not len(self.held_out):
            return None
        chains = self._sampler(self.held_out, (1, self.config.n_trials[1])).sample(_VALIDATION, 0)
        return self.tensors(chains)

    def tensors(self, chains: Chains) -> dict[str, Tensor]:
        """Chains as `HindsightNetwork.forward` takes them."""
        shape = (*chains.valid.shape, -1)
        state = np.concatenate([chains.data[name].reshape(shape) for name in self._parts], 2)
        values = {
            TARGET: chains.data[TARGET][..., None],
            STATE: state,
            ACTION: chains.data[self._field].reshape(shape).astype(np.float32),
            REWARD: chains.data[REWARD][..., None],
            DONE: chains.data[DONE][..., None],
            "valid": chains.valid,
            "trial": chains.trial,
            "time": chains.step,
        }
        return {name: torch.from_numpy(np.ascontiguousarray(of)) for name, of in values.items()}

    def targets(self) -> np.ndarray:
        """Returns that chains aim at, of many of them."""
        return np.asarray(self.sampler.sample(_LOOKED, 2**31).data[TARGET][:, 0], np.float64)

    def build(self) -> HindsightNetwork:
        """A network for these recordings with its initial weights, which are a function of the seed alone."""
        config = self.config
        with torch.random.fork_rng():
            torch.manual_seed(int(generator(config.fit.seed, "weights").integers(2**62)))
            size = self.observation.state_size
            network = HindsightNetwork(size, self.action, config.n_trials[1], self.steps, config.model)
        discrete = self.action.choices is not None
        of = Normalizer.fit(self.store, [*self._parts, *([] if discrete else [self._field])], self.train)
        for name, fields in (("state", self._parts), ("action", [] if discrete else [self._field])):
            for what, values in (("mean", of.mean), ("std", of.std)) if fields else ():
                joined = np.concatenate([values[each].reshape(-1) for each in fields]).astype(np.float32)
                network.get_buffer(f"{name}_{what}").copy_(torch.from_numpy(joined))
        if not discrete:
            actions = self._rows(self._field).reshape(-1, self.action.size)
            network.action_low.copy_(torch.from_numpy(actions.min(0)))
            network.action_high.copy_(torch.from_numpy(actions.max(0)))
        returns, rewards = np.abs(self.sampler.returns).max(), np.abs(self._rows(self.store.schema.reward or "")).max()
        network.scale.copy_(torch.tensor([max(returns, 1e-6), max(rewards, 1e-6)]))
        return network

    def _rows(self, name: str) -> np.ndarray:
        """A field's values in the training episodes."""
        starts, lengths = self.store.episodes["start"][self.train], self.store.episodes["length"][self.train]
        rows = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        return np.asarray(self.store.field(name)[rows])


def train_hindsight(
    store: EpisodeStore, config: HindsightConfig, run: RunDirectory, *, resume: bool = False
) -> HindsightPolicy:
    """Fits a network that reads its earlier trials, and saves it as the run's checkpoint `last`.

    Args:
        store: the recordings.
        config: see `HindsightConfig`.
        run: where metrics and checkpoints go.
        resume: continue an interrupted training; on the CPU the result is equal to the last bit.

    Raises:
        ConfigError: the recordings have no such part, or no action.
        DataError: no usable episode, rewards are missing, or a value is NaN or infinite.

    Source: Liu and Abbeel, "Emergent Agentic Transformer from Chain of Hindsight Experience" (2023).
    """
    data = ChainData(store, config)
    network, validation = data.build(), data.validation()
    aims = data.targets()
    returns = {f"{q} %": float(np.quantile(data.sampler.returns, q / 100)) for q in (5, 50, 95, 100)}
    target = float(np.quantile(aims, config.target))
    data.tell()
    note(f"aims at a return of {target:.4g}; those of the recordings are {_listed(returns)}")
    state = ObservationSpec(state=(*data.observation.state, (TRIAL, 3)))
    meta = PolicyMeta(name=f"hindsight-{run.path.name}", observation=state, action=data.action)
    provenance = {
        "target": target,
        "seed": config.fit.seed,
        "returns": returns,
        "environment": store.schema.environment,
        "rate_hz": store.schema.rate_hz,
        "recordings": {"sha256": store.digest, "episodes": len(data.train)},
    }

    def loss(module: nn.Module, batch: Mapping[str, Tensor], _: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        return loss_of(network, module(batch), batch, config.loss_trials), {}

    def keep(step: int, trained: nn.Module) -> Mapping[str, float]:
        if not isinstance(trained, HindsightNetwork):
            raise TypeError("fit hands on the module that it was given")
        HindsightPolicy(trained, meta, provenance).save(run.checkpoint())
        if validation is None:
            return {}
        device = trained.scale.device
        there = {name: value.to(device) for name, value in validation.items()}
        return {"held_out_loss": float(loss_of(trained, trained(there), there, config.loss_trials))}

    result = fit(network, data.batch, loss, config.fit, run, resume=resume, hooks=[(config.validate_every, keep)])
    if not isinstance(result.module, HindsightNetwork):
        raise TypeError("fit hands back the module that it was given")
    return HindsightPolicy(result.module.cpu(), meta, provenance)


def _listed(returns: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.4g} ({name})" for name, value in returns.items())


def _action(store: EpisodeStore) -> tuple[str, ActionSpec]:
    fields = list(store.schema.actions)
    if len(fields) != 1:
        having = {name: np.flatnonzero(store.present(name)) for name in fields}
        each = [
            f"{name!r} of size {store.schema[name].size} in {len(episodes)} (episodes {named(episodes)})"
            for name, episodes in having.items()
        ]
        fix = "keep the episodes with one of them in a store of their own" if each else "record actions"
        expected = "one action field, the same in all episodes"
        raise DataError(str(store.path), expected=expected, got=" and ".join(each) or "none", fix=fix)
    return fields[0], store.schema.action_spec()


def _divide(
    store: EpisodeStore, config: HindsightConfig, fields: list[str]
) -> tuple[Int64[np.ndarray, " a"], Int64[np.ndarray, " b"]]:
    """Episodes to learn from, and those held out: by groups where there are several, so that no instance is in both."""
    every, _ = choose_episodes(store, fields, held_out=0.0, seed=config.fit.seed)
    column = store.episodes[config.group]
    names = sorted(set(column[every].tolist()), key=str)
    if len(names) == 1 or set(read_splits(store)) & {*HELD_OUT, "train"}:
        return choose_episodes(store, fields, held_out=config.held_out, seed=config.fit.seed)
    count = min(max(round(config.held_out * len(names)), config.held_out > 0), len(names) - 1)
    order = generator(config.fit.seed, "held out groups").permutation(len(names))
    held = {names[i] for i in order[:count]}
    out = np.array([of in held for of in column[every].tolist()], bool)
    return every[~out], every[out]
