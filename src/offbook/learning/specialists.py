"""Specialised networks, one for each thing to tell: the baselines of models that tell everything.

An MLP reads some values of a window and tells one: the action of a step for cloning, with or without the return to go
and with any history; the action between two states; the state after an action. Offsets are steps from the present one:

| role | reads | tells |
|---|---|---|
| bc | states up to 0, actions before | the action at 0 |
| rcbc | likewise, and the return at 0 | the action at 0 |
| id | the states at 0 and 1 | the action at 0 |
| fd | the state and the action at 0 | the state at 1, as a change |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional

from offbook.client.protocol import ActionSpec, Observation, PolicyMeta
from offbook.data.windows import Pad
from offbook.errors import ConfigError, DataError, check_settings
from offbook.learning.fit import FitConfig, fit
from offbook.learning.memory import Memory
from offbook.learning.networks import INPUT_LIMIT, standard
from offbook.learning.recordings import best_episodes
from offbook.learning.trajectories import ACTION, RETURN, STATE, Trajectories
from offbook.runs.directory import RunDirectory
from offbook.runs.seeding import generator

Role = Literal["bc", "rcbc", "id", "fd"]
Place = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class SpecialistConfig:
    """How to fit a specialist.

    Attributes:
        role: what it tells.
        history: states that cloning reads, 1 or more.
        top: share of the training episodes that it learns from, those with the highest returns.
        hidden: width of its layers.
        depth: number of its layers.
        fit: the training loop.
    """

    role: Role = "bc"
    history: int = 1
    top: float = 1.0
    hidden: int = 256
    depth: int = 2
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=3_000, batch_size=256, weight_decay=5e-3, ema=0.99))

    def __post_init__(self) -> None:
        checks = {
            "history": (
                self.history >= 1 and (self.history == 1 or self.role in ("bc", "rcbc")),
                "1, more for cloning",
            ),
            "top": (0 < self.top <= 1, "a share above 0, at most 1"),
            "hidden": (1 <= self.hidden <= 65_536, "1 to 65536"),
            "depth": (1 <= self.depth <= 64, "1 to 64"),
        }
        check_settings(self, checks, "")

    @property
    def reads(self) -> tuple[Place, ...]:
        """What goes in: modality and offset."""
        if self.role == "id":
            return (STATE, 0), (STATE, 1)
        if self.role == "fd":
            return (STATE, 0), (ACTION, 0)
        past = range(1 - self.history, 0)
        own: tuple[Place, ...] = ((RETURN, 0),) if self.role == "rcbc" else ()
        return (*((STATE, t) for t in past), *((ACTION, t) for t in past), (STATE, 0), *own)

    @property
    def tells(self) -> Place:
        """What comes out."""
        return (STATE, 1) if self.role == "fd" else (ACTION, 0)


class Specialist(nn.Module):
    """An MLP from some values of a window to one.

    Args:
        config: what it reads and tells.
        sizes: numbers of a step's value, by modality.
        choices: number of discrete actions; None for continuous ones.
    """

    def __init__(self, config: SpecialistConfig, sizes: Mapping[str, int], choices: int | None) -> None:
        super().__init__()
        missing = [name for name, _ in (*config.reads, config.tells) if name not in sizes]
        if missing:
            expected, fix = f"{missing[0]}s in the recordings", "choose another role, or other recordings"
            raise ConfigError(f"specialist {config.role!r}", expected=expected, got="none", fix=fix)
        self.config, self.choices = config, choices
        widths = [choices if name == ACTION and choices else sizes[name] for name, _ in config.reads]
        name, _ = config.tells
        self.outputs = choices if name == ACTION and choices else sizes[name]
        layers: list[nn.Module] = []
        width = sum(widths)
        for _ in range(config.depth):
            layers += [nn.Linear(width, config.hidden), nn.GELU()]
            width = config.hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, self.outputs))
        for modality, size in sizes.items():
            self.register_buffer(f"{modality}_mean", torch.zeros(size))
            self.register_buffer(f"{modality}_std", torch.ones(size))

    def standard(self, name: str, values: Tensor) -> Tensor:
        """Standardised values, or indices as they are one-hot."""
        if name == ACTION and self.choices:
            return functional.one_hot(values[..., 0].long(), self.choices).float()
        mean, std = self.get_buffer(f"{name}_mean"), self.get_buffer(f"{name}_std")
        return standard(values, mean, std)

    def forward(self, data: Mapping[str, Tensor], now: int) -> Float[Tensor, "batch outputs"]:
        """What it tells, standardised or as logits.

        Args:
            data: by modality the values in their own units, shape (batch, time, size), and under `"MODALITY present"`
                which are there, shape (batch, time); others are read as their mean.
            now: the present step of the windows.
        """
        seen = []
        for name, offset in self.config.reads:
            there = data[f"{name} present"][:, now + offset, None]
            x = self.standard(name, data[name][:, now + offset])
            seen.append(torch.where(there, x, 0.0).clamp(-INPUT_LIMIT, INPUT_LIMIT))
        out: Tensor = self.layers(torch.cat(seen, 1))
        return out + self.standard(STATE, data[STATE][:, now]) if self.config.role == "fd" else out

    def errors(
        self, told: Float[Tensor, "batch outputs"], data: Mapping[str, Tensor], now: int
    ) -> Float[Tensor, " batch"]:
        """Of each window, the mean squared error in standard deviations, or the cross-entropy."""
        name, offset = self.config.tells
        wanted = data[name][:, now + offset]
        if name == ACTION and self.choices:
            return functional.cross_entropy(told, wanted[:, 0].long(), reduction="none")
        return (told - self.standard(name, wanted)).square().mean(1)


def train_specialist(
    data: Trajectories, config: SpecialistConfig, run: RunDirectory, *, resume: bool = False
) -> Specialist:
    """Fits a specialist.

    Args:
        data: what of the recordings is learnt from.
        config: see `SpecialistConfig`.
        run: where metrics and the state of the training go.
        resume: continue an interrupted training.

    Raises:
        ConfigError: the recordings lack what it reads or tells.
        DataError: no episode has all of it.

    Source: the baselines of Wu et al., "Masked Trajectory Models for Prediction, Representation, and Control" (2023),
        with the action of the very transition for the forward model, where the authors' code feeds the one after it.
    """
    choices = None if data.action is None else data.action.choices
    with torch.random.fork_rng():
        torch.manual_seed(int(generator(config.fit.seed, "weights").integers(2**62)))
        module = Specialist(config, data.sizes, choices)
    for name, statistics in data.statistics.items():
        for of, values in zip(("mean", "std"), statistics, strict=True):
            module.get_buffer(f"{name}_{of}").copy_(torch.from_numpy(values.astype(np.float32)))
    before, after = config.history - 1, int(any(offset > 0 for _, offset in (*config.reads, config.tells)))
    # Cloning answers from an episode's first step on, where there is no history yet.
    pad: Pad = "left" if before else "drop"
    sampler = data.sampler(before + after + 1, _episodes(data, config), pad=pad)

    def batch_at(index: int) -> Mapping[str, Tensor]:
        return data.tensors(sampler.sample(config.fit.batch_size, index))

    result = fit(module, batch_at, _loss(module, before), config.fit, run, resume=resume)
    if not isinstance(result.module, Specialist):
        raise TypeError("fit hands back the module that it was given")
    return result.module.cpu()


def _loss(
    specialist: Specialist, now: int
) -> Callable[[nn.Module, Mapping[str, Tensor], torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]:
    def loss(module: nn.Module, batch: Mapping[str, Tensor], _: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        return specialist.errors(module(batch, now), batch, now).mean(), {}

    return loss


def _episodes(data: Trajectories, config: SpecialistConfig) -> np.ndarray:
    """Training episodes that have all that is read and told, the best of them where only these are wanted."""
    store, kept = data.store, data.train
    named = {name for name, _ in (*config.reads, config.tells)}
    for name, source in ((ACTION, data.action_field), (RETURN, store.schema.reward)):
        if name in named and source is not None:
            kept = kept[store.present(source)[kept]]
    if not len(kept):
        fix = "choose other recordings"
        expected = f"a training episode with {' and '.join(sorted(named))}"
        raise DataError(str(store.path), expected=expected, got="none", fix=fix)
    return best_episodes(store, kept, config.top)


class SpecialistPolicy:
    """A specialist for cloning as a `Policy`.

    Args:
        module: in role `bc` or `rcbc`.
        meta: what it wants and gives.
        target: return to go that it aims at, in the recordings' unit; None in role `bc`.
    """

    def __init__(self, module: Specialist, meta: PolicyMeta, target: float | None = None) -> None:
        if (module.config.role == "rcbc") != (target is not None) or module.config.role not in ("bc", "rcbc"):
            got = f"{module.config.role} and {target}"
            raise ConfigError("policy", expected="bc, or rcbc and a target", got=got, fix="choose one of them")
        self.module, self.meta, self._target = module.eval(), meta, target
        self._memory = Memory(module.config.history)

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Forgets what was seen and done in each session."""
        self._memory.reset(sessions)

    @torch.inference_mode()
    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch 1 action"]:
        """The next action for each session, within the bounds of the actions."""
        spec, batch, time = self.meta.action, len(observation.sessions), self.module.config.history
        state = np.zeros((batch, time, self.meta.observation.state_size), np.float32)
        action = np.zeros((batch, time, spec.size), np.float32)
        there = np.zeros((batch, time), bool)
        for i, session in enumerate(observation.sessions):
            states, actions = self._memory.see(session, observation.state[i])
            first = time - len(states)
            state[i, first:], there[i, first:] = states, True
            if actions:
                action[i, first:-1] = actions
        data = {STATE: state, ACTION: action, f"{STATE} present": there, f"{ACTION} present": there}
        if self._target is not None:
            data |= {RETURN: np.full((batch, time, 1), self._target, np.float32), f"{RETURN} present": there}
        told = self.module({name: torch.from_numpy(values) for name, values in data.items()}, time - 1)
        done = self._units(told, spec)
        self._memory.did(observation.sessions, done)
        return np.asarray(done[:, None], np.float32)

    def _units(self, told: Tensor, spec: ActionSpec) -> np.ndarray:
        if spec.choices is not None:
            return told.argmax(1, keepdim=True).float().numpy()
        of = self.module
        values = told * of.get_buffer(f"{ACTION}_std") + of.get_buffer(f"{ACTION}_mean")
        return values.numpy().clip(np.asarray(spec.low, np.float32), np.asarray(spec.high, np.float32))
