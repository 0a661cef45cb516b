"""Fitting a masked trajectory model to the recordings of a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from offbook.client.protocol import ActionSpec, PolicyMeta
from offbook.data.returns import ReturnSpec
from offbook.data.store import EpisodeStore
from offbook.data.windows import WindowSampler
from offbook.errors import DataError, check_settings
from offbook.learning.fit import FitConfig, fit
from offbook.learning.masked_model import MaskedTrajectoryModel, Modality, Residual, Sizes, masked_loss
from offbook.learning.masked_patterns import FRACTIONS, PATTERNS, WEIGHTS, Shape, draw
from offbook.learning.masked_roles import FARTHEST, TARGET, RolePolicy, chosen_role
from offbook.learning.trajectories import ACTION, STATE, Statistics, Trajectories
from offbook.runs.config import to_json
from offbook.runs.directory import RunDirectory
from offbook.runs.seeding import generator, torch_generator

# Held-out windows that a validation looks at.
_VALIDATION = 1024
# Neighbouring steps that tell how much values change, and the least such change, in deviations.
_PAIRS, _LEAST_CHANGE = 8192, 1e-3
# Of the authors' statistics: steps to which episodes are padded with zeros, and the least deviation that is used.
_PADDED, _LEAST_DEVIATION = 1000, 0.1


@dataclass(frozen=True, kw_only=True)
class MtmConfig:
    """How to fit a masked trajectory model.

    Attributes:
        parts: state parts that are joined to the state, such as joints; None takes all that the recordings have.
        model: the network.
        tokens: one token for the numbers of a step, or bins: one for each number, told as one of `bins` classes.
        bins: classes of a number, where it is told so.
        returns: which return to go a step has; None for none.
        patterns: what is hidden in training; each batch draws one of them. See `offbook.learning.masked_patterns`.
        fractions: shares of visible tokens, of which random patterns draw one for each modality.
        with_actions: share of each batch that comes from episodes with actions, where some episodes have none; the
            authors alternate between batches of either kind, which is a half.
        mask_scope: draw a mask for each sample, or one for the whole batch as the authors do.
        loss_on: tokens that count: all of them, as the authors have it, or those that are hidden.
        residual: show states and returns with their changes between visible steps and tell the change from the last
            one, or all as they are (the authors' way).
        statistics: of the steps that are there; or the authors': over episodes padded with zeros to 1000 steps, and
            numbers that deviate by less than 0.1 not rescaled.
        role: what the saved policy does: bc, rcbc, id, plan, or auto: rcbc where there are returns.
        target: return that rcbc, id and plan aim at: 0 for the least of the recordings, 1 for the best.
        success_only: learn from successful episodes only, where the recordings know of success.
        held_out: share of the episodes kept for validation, where the store does not say which; 0 for none.
        validate_every: steps between two validations; each also saves the policy.
        on_nan: refuse recordings with NaN or infinity, or drop the windows that hold such a step, and say how many.
        fit: the training loop.

    Source: Wu et al. (2023) and the authors' code. `official` gives their choices where ours are others.
    """

    parts: tuple[str, ...] | None = None
    model: Sizes = field(default_factory=Sizes)
    tokens: Literal["continuous", "bins"] = "continuous"
    bins: int = 128
    returns: ReturnSpec | None = field(default_factory=lambda: ReturnSpec(kind="mean"))
    patterns: tuple[str, ...] = ("auto", "id", "fd")
    fractions: tuple[float, ...] = FRACTIONS
    with_actions: float = 0.5
    mask_scope: Literal["sample", "batch"] = "sample"
    loss_on: Literal["all", "hidden"] = "all"
    residual: Residual = "forward_fill"
    statistics: Literal["real", "official"] = "real"
    role: Literal["auto", "bc", "rcbc", "id", "plan"] = "auto"
    target: float = 1.0
    success_only: bool = False
    held_out: float = 0.1
    validate_every: int = 500
    on_nan: Literal["refuse", "drop"] = "refuse"
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=3_000, batch_size=256, weight_decay=5e-3, warmup=300, ema=0.99)
    )

    def __post_init__(self) -> None:
        known = bool(self.patterns) and set(self.patterns) <= set(PATTERNS)
        checks = {
            "bins": (2 <= self.bins <= 65_536, "2 to 65536"),
            "patterns": (known, f"one or more of {', '.join(PATTERNS)}"),
            "fractions": (
                bool(self.fractions) and all(0 <= share <= 1 for share in self.fractions),
                "one or more shares from 0 to 1",
            ),
            "with_actions": (0 < self.with_actions < 1, "a share between 0 and 1"),
            "target": (abs(self.target) <= FARTHEST, TARGET),
            "held_out": (0 <= self.held_out < 1, "a share in [0, 1)"),
            "validate_every": (self.validate_every >= 1, "1 or more"),
        }
        check_settings(self, checks)


def trajectories(store: EpisodeStore, config: MtmConfig) -> Trajectories:
    """What of a store is learnt from.

    Raises:
        ConfigError: the recordings have no such part, or a role that they cannot teach is asked for.
        DataError: no usable episode.
    """
    found = Trajectories(
        store,
        parts=config.parts,
        returns=config.returns,
        success_only=config.success_only,
        held_out=config.held_out,
        on_nan=config.on_nan,
        seed=config.fit.seed,
    )
    chosen_role(config.role, found.sizes, str(store.path))
    return found


def build(data: Trajectories, config: MtmConfig) -> MaskedTrajectoryModel:
    """A model for these recordings with its initial weights, which are a function of the seed alone."""
    forward_fill = config.residual == "forward_fill" and config.tokens == "continuous"
    modalities = []
    for name, size in data.sizes.items():
        if name == ACTION and data.action is not None and data.action.choices is not None:
            modalities.append(Modality(name=name, size=1, kind="index", classes=max(2, data.action.choices)))
        elif config.tokens == "bins":
            modalities.append(Modality(name=name, size=size, kind="bins", classes=config.bins))
        else:
            modalities.append(Modality(name=name, size=size, residual=forward_fill and name != ACTION))
    with torch.random.fork_rng():
        torch.manual_seed(int(generator(config.fit.seed, "weights").integers(2**62)))
        model = MaskedTrajectoryModel(modalities, config.model)
    for name, statistics in data.statistics.items():
        if config.statistics == "official":
            statistics = _official(statistics, data)
        mean, std = (torch.from_numpy(of.astype(np.float32)) for of in statistics)
        model.standardise(name, mean, std)
        if model.modalities[name].residual:
            model.scale_changes(name, _changes(model, data, name))
    return model


def _changes(model: MaskedTrajectoryModel, data: Trajectories, name: str) -> Tensor:
    """By how much standardised values change in a step, as a deviation over many; 1 where they never do."""
    pairs = data.tensors(data.sampler(2).sample(_PAIRS, 0))
    there = pairs[f"{name} present"].all(1)
    found = model.targets(pairs)[name][there, :, 0].diff(dim=1).flatten(0, 1).std(0)
    return torch.where(found > 0, found.clamp(min=_LEAST_CHANGE), 1.0)


def _official(statistics: Statistics, data: Trajectories) -> Statistics:
    """Statistics of the same steps among zeros."""
    lengths = data.store.episodes["length"][data.train]
    share = float(lengths.sum()) / (len(lengths) * max(_PADDED, int(lengths.max())))
    mean, std = statistics
    padded = np.sqrt(np.maximum(share * (std**2 + mean**2) - (share * mean) ** 2, 0.0))
    return share * mean, np.where(padded < _LEAST_DEVIATION, 1.0, padded)


class _Batches:
    """Batches with their masks, all a function of the seed and the index."""

    def __init__(self, data: Trajectories, model: MaskedTrajectoryModel, config: MtmConfig) -> None:
        self.data, self.tokens, self.config = data, model.tokens, config
        whole = data.sampler(config.model.length)
        data.tell(whole)
        self.samplers = self._by_actions() or [(config.fit.batch_size, whole)]

    def _by_actions(self) -> list[tuple[int, WindowSampler]]:
        """How many windows to draw of episodes with actions and of those without; nothing where one kind has none.

        Drawn as they are, a few episodes with actions would be in few batches, and actions learnt from next to nothing.
        """
        data, config = self.data, self.config
        if data.action_field is None or config.fit.batch_size < 2:
            return []
        there = data.store.present(data.action_field)[data.train]
        count = min(max(1, round(config.with_actions * config.fit.batch_size)), config.fit.batch_size - 1)
        try:
            return [
                (count, data.sampler(config.model.length, data.train[there])),
                (config.fit.batch_size - count, data.sampler(config.model.length, data.train[~there])),
            ]
        except DataError:
            return []

    def __call__(self, index: int) -> Mapping[str, Tensor]:
        parts = [self.data.tensors(sampler.sample(count, index)) for count, sampler in self.samplers]
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {**batch, **self.masks(batch, torch_generator(self.config.fit.seed, "masks", index))}

    def masks(self, batch: Mapping[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
        """What of a batch is visible and there."""
        config = self.config
        samples, length = batch[f"{STATE} present"].shape
        shape = Shape(tokens=self.tokens, length=length, batch=samples)
        pattern = config.patterns[int(torch.randint(len(config.patterns), (), generator=rng))]
        seen = draw(pattern, shape, rng, fractions=config.fractions, weights=WEIGHTS, scope=config.mask_scope)
        return {f"{name} visible": of & batch[f"{name} present"][..., None] for name, of in seen.items()}

    def held_out(self) -> Mapping[str, Tensor] | None:
        """Windows spread evenly over the steps held out, always the same ones under the same masks."""
        sampler = self.data.held_out_sampler(self.config.model.length)
        if sampler is None:
            return None
        numbers = np.unique(np.linspace(0, len(sampler) - 1, _VALIDATION).astype(np.int64))
        batch = self.data.tensors(sampler.at(numbers))
        return {**batch, **self.masks(batch, torch_generator(self.config.fit.seed, "validation"))}


def _loss(
    model: MaskedTrajectoryModel, config: MtmConfig
) -> Callable[[nn.Module, Mapping[str, Tensor], torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]:
    def loss(module: nn.Module, batch: Mapping[str, Tensor], _: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        visible = {name: batch[f"{name} visible"] for name in model.modalities}
        present = {name: batch[f"{name} present"][..., None].expand_as(visible[name]) for name in visible}
        counted = present if config.loss_on == "all" else {k: present[k] & ~visible[k] for k in present}
        total, parts = masked_loss(model, module(batch, visible), model.targets(batch), counted)
        return total, {f"{name} loss": part for name, part in parts.items()}

    return loss


def train_mtm(store: EpisodeStore, config: MtmConfig, run: RunDirectory, *, resume: bool = False) -> RolePolicy:
    """Fits a masked trajectory model and saves it as the run's checkpoint `last`, as a policy in its role.

    The validation loss is taken on windows of episodes held out whole, always under the same masks. Episodes may lack
    actions or rewards: what is missing is hidden, and does not count.

    Args:
        store: the recordings.
        config: see `MtmConfig`.
        run: where metrics and checkpoints go.
        resume: continue an interrupted training; on the CPU the result is equal to the last bit.

    Raises:
        ConfigError: the recordings have no such part, or a role that they cannot teach is asked for.
        DataError: no usable episode, or a value is NaN or infinite.

    Source: Wu et al., "Masked Trajectory Models for Prediction, Representation, and Control" (2023).
    """
    data = trajectories(store, config)
    model = build(data, config)
    meta, provenance = describe(data, config, run.path.name)
    batches, loss = _Batches(data, model, config), _loss(model, config)
    validation = batches.held_out()

    def keep(step: int, trained: nn.Module) -> Mapping[str, float]:
        if not isinstance(trained, MaskedTrajectoryModel):
            raise TypeError("fit hands on the module that it was given")
        RolePolicy(trained, meta, provenance).save(run.checkpoint())
        if validation is None:
            return {}
        device = next(trained.parameters()).device
        there = {name: value.to(device) for name, value in validation.items()}
        total, parts = loss(trained, there, torch.Generator())
        return {"held_out_loss": float(total), **{f"held_out {name}": float(part) for name, part in parts.items()}}

    result = fit(model, batches, loss, config.fit, run, resume=resume, hooks=[(config.validate_every, keep)])
    if not isinstance(result.module, MaskedTrajectoryModel):
        raise TypeError("fit hands back the module that it was given")
    return RolePolicy(result.module.cpu(), meta, provenance)


def describe(data: Trajectories, config: MtmConfig, name: str) -> tuple[PolicyMeta, dict[str, object]]:
    """What a policy of the model says of itself, and what its file tells of where it is from."""
    schema, role = data.store.schema, chosen_role(config.role, data.sizes, str(data.store.path))
    action = data.action or ActionSpec(size=0, low=(), high=())
    meta = PolicyMeta(name=f"mtm-{name}", observation=data.observation, action=action)
    provenance = {
        "role": role,
        "target": config.target,
        "returns": None if data.returns is None else to_json(data.returns),
        "return_range": data.return_range,
        "environment": schema.environment,
        "rate_hz": schema.rate_hz,
        "recordings": {"sha256": data.store.digest, "episodes": len(data.train)},
    }
    return meta, provenance
