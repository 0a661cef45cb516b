"""What sequence models learn from: windows of states, actions and returns to go, with what of them is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from offbook.client.protocol import ActionSpec
from offbook.data.normalise import Normalizer
from offbook.data.pack import RETURN_TO_GO
from offbook.data.returns import ReturnSpec, returns_to_go
from offbook.data.store import EpisodeStore
from offbook.data.windows import Pad, Weight, Windows, WindowSampler
from offbook.errors import DataError
from offbook.learning.recordings import choose_episodes, choose_observation
from offbook.runs.progress import note

STATE, ACTION, RETURN = "state", "action", "return"
"""The modalities, in the order in which a step brings its observation, the return to expect, and what is done."""

_DROP = "leave such steps out: --on-nan drop"

Statistics = tuple[Float64[np.ndarray, " size"], Float64[np.ndarray, " size"]]


class Trajectories:
    """The chosen parts and episodes of a store.

    Episodes may lack actions or rewards: what is missing is marked as such in each window. A modality that no training
    episode has is none.

    Args:
        store: the recordings.
        parts: state parts to join to a state; None for all.
        returns: which return to go; None, or recordings without rewards, for none.
        success_only: leave out episodes without success, where the recordings know of success.
        held_out: share of the episodes that is held out, where the store does not say which.
        on_nan: refuse recordings with NaN or infinity, or drop the windows that hold such a step.
        seed: of the draws.

    Attributes:
        sizes: numbers in a step's value, by modality; 1 for a discrete action, which is an index.
        statistics: mean and standard deviation of each number by modality, over the real steps of the training
            episodes, without discrete actions; a deviation of 0 marks a constant.
        return_range: least and largest return to go of a training step; None without returns.
        train: numbers of the episodes to learn from.
        held_out: numbers of those that are not learnt from.

    Raises:
        ConfigError: the recordings have no such part, or no state at all.
        DataError: no usable episode, several action fields, or a value that is NaN or infinite.
    """

    def __init__(
        self,
        store: EpisodeStore,
        *,
        parts: Sequence[str] | None = None,
        returns: ReturnSpec | None = None,
        success_only: bool = False,
        held_out: float = 0.1,
        on_nan: Literal["refuse", "drop"] = "refuse",
        seed: int = 0,
    ) -> None:
        self.store, self.seed, self._on_nan = store, seed, on_nan
        self.observation = choose_observation(store, parts)
        self.parts = tuple(name for name, _ in self.observation.state)
        self.train, self.held_out = choose_episodes(
            store, self.parts, success_only=success_only, held_out=held_out, seed=seed
        )
        self.action_field = self._action_field()
        self.action: ActionSpec | None = store.schema.action_spec() if self.action_field else None
        self.returns = returns if store.schema.reward and self._has(store.schema.reward) else None
        self.sizes = {STATE: self.observation.state_size}
        if self.returns is not None:
            self.sizes[RETURN] = 1
        if self.action is not None:
            self.sizes[ACTION] = self.action.size
        self._measure()

    @property
    def discrete(self) -> bool:
        """Whether actions are indices."""
        return self.action is not None and self.action.choices is not None

    def _has(self, field: str) -> bool:
        return bool(self.store.present(field)[self.train].any())

    def _action_field(self) -> str | None:
        fields = [name for name in self.store.schema.actions if self._has(name)]
        if len(fields) > 1:
            fix = "record with one Box or Discrete action space"
            raise DataError(str(self.store.path), expected="one action field", got=f"{len(fields)}", fix=fix)
        return fields[0] if fields else None

    def _measure(self) -> None:
        skip = self._on_nan == "drop"
        names = [*self.parts, *([self.action_field] if self.action_field and not self.discrete else [])]
        self.normalizer = Normalizer.fit(self.store, names, self.train, skip_nan=skip, fix=_DROP)
        self.statistics: dict[str, Statistics] = {STATE: self._joined(self.parts)}
        self.return_range: tuple[float, float] | None = None
        if self.returns is not None:
            values = self._returns()
            self.return_range = float(values.min()), float(values.max())
            self.statistics[RETURN] = np.array([values.mean()]), np.array([values.std()])
        if self.action_field and not self.discrete:
            self.statistics[ACTION] = self._joined([self.action_field])

    def _joined(self, names: Sequence[str]) -> Statistics:
        of = self.normalizer
        mean = np.concatenate([of.mean[name].reshape(-1) for name in names])
        return mean, np.concatenate([of.std[name].reshape(-1) for name in names])

    def _returns(self) -> Float64[np.ndarray, " steps"]:
        """The returns to go of all training steps that have one."""
        store, reward = self.store, self.store.schema.reward or ""
        episodes = self.train[store.present(reward)[self.train]]
        starts, lengths = store.episodes["start"][episodes], store.episodes["length"][episodes]
        values = returns_to_go(np.asarray(store.field(reward)), starts, lengths, self.returns or ReturnSpec())
        chosen = np.concatenate([values[a : a + n] for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)])
        finite, where = np.isfinite(chosen), f"{store.path}, field {reward!r}"
        if not finite.all() and self._on_nan == "refuse":
            got = f"{int((~finite).sum())} steps without"
            raise DataError(where, expected="finite rewards", got=got, fix=_DROP)
        if not finite.any():
            fix = "learn without returns: add returns:none"
            raise DataError(where, expected="a finite return to go", got="none", fix=fix)
        return np.asarray(chosen[finite])

    def sampler(
        self,
        length: int,
        episodes: Int64[np.ndarray, " episodes"] | None = None,
        *,
        pad: Pad = "drop",
        weight: Weight = "window",
    ) -> WindowSampler:
        """Draws windows of so many steps; of the training episodes, or of others."""
        fields = [*self.parts, *([self.action_field] if self.action_field else [])]
        return WindowSampler(
            self.store,
            fields,
            length=length,
            pad=pad,
            weight=weight,
            episodes=self.train if episodes is None else episodes,
            returns=self.returns,
            on_nan="drop" if self._on_nan == "drop" else "keep",
            seed=self.seed,
        )

    def held_out_sampler(self, length: int) -> WindowSampler | None:
        """Windows of the held-out episodes; None where none has a window so long."""
        lengths = self.store.episodes["length"][self.held_out]
        if max(lengths, default=0) < length:
            return None
        try:
            return self.sampler(length, self.held_out)
        except DataError:
            if self._on_nan == "refuse":
                raise
            return None  # NaN is in all of them

    def tell(self, sampler: WindowSampler) -> None:
        """Says what of the recordings is not learnt from."""
        if lost := sampler.dropped_windows:
            note(f"{lost} of {lost + len(sampler)} windows are left out for NaN or infinity")
        if sampler.dropped:
            note(f"{sampler.dropped} of {len(self.train)} episodes have no window of {sampler.length} steps")
        for name, (_, std) in self.statistics.items():
            if count := int((std == 0).sum()):
                note(f"{count} of {std.size} entries of the {name} never vary and tell nothing")
        if self.action_field is not None:
            without = int((~self.store.present(self.action_field)[self.train]).sum())
            if without:
                note(f"{without} of {len(self.train)} training episodes have no actions")

    def tensors(self, windows: Windows) -> dict[str, Tensor]:
        """Windows as a batch.

        Returns:
            By modality the values in the recordings' own units, shape (B, T, size), float32, or int64 for discrete
            actions; and under `"MODALITY present"` where there is one, shape (B, T), booleans.
        """
        batch = len(windows.episode)
        shape = (*windows.valid.shape, -1)
        data = {STATE: np.concatenate([windows.data[name].reshape(shape) for name in self.parts], 2)}
        present = {STATE: np.logical_and.reduce([windows.present[name] for name in self.parts])}
        if self.returns is not None:
            data[RETURN] = windows.data[RETURN_TO_GO].reshape(shape)
            present[RETURN] = windows.present[RETURN_TO_GO]
        if self.action_field is not None:
            data[ACTION] = windows.data[self.action_field].reshape(shape)
            present[ACTION] = windows.present[self.action_field]
        kinds: Mapping[str, type] = {ACTION: np.int64} if self.discrete else {}
        return {
            **{name: torch.from_numpy(np.asarray(data[name], kinds.get(name, np.float32))) for name in self.sizes},
            **{
                f"{name} present": torch.from_numpy(windows.valid & present[name].reshape(batch, 1))
                for name in self.sizes
            },
        }
