"""What an agent that sees pictures has lived through: an episode store of single pictures, sampled as short films.

Each picture is on disk once; the few of them that an agent sees at a time are put together when a batch is drawn, and
never reach back into another episode. What the agent is paid for a step is kept apart from what the task paid, so that
another reward can stand in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from offbook.data.store import Episode, EpisodeStore
from offbook.data.writer import Writer
from offbook.errors import DataError
from offbook.sim.spaces import ACTION, REWARD

PaidFor = Callable[[Episode], Float32[np.ndarray, " steps"]]
"""What an agent is paid for each step of an episode: called once, when the episode is over, with all its pictures."""


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """A batch of what followed what, n steps later.

    Attributes:
        here: the pictures up to the moment of acting, the latest last.
        action: what was done, from -1 to 1.
        reward: of the n steps, discounted and added up.
        discount: of what follows the last of them; 0 where the task ended.
        there: the pictures up to that moment.
    """

    here: UInt8[Tensor, "batch time height width 3"]
    action: Float32[Tensor, "batch action"]
    reward: Float32[Tensor, " batch"]
    discount: Float32[Tensor, " batch"]
    there: UInt8[Tensor, "batch time height width 3"]


class PixelReplay:
    """Whole episodes, of which batches are drawn; a context that closes the store.

    Args:
        writer: of the store, which may hold episodes already; they count once they are taken in.
        camera: name of the pictures.
        unit: from actions in the units of the environment to ones from -1 to 1.
        stack: pictures that are seen at a time; before the first of an episode stands that one again.
        n_steps: how far a transition reaches at most; it ends with its episode.
        gamma: discount of a step.
        capacity: of the latest steps, so many are drawn from.

    Attributes:
        rewards: what the agent is paid for each step that was taken in.
        episodes: taken in so far.
    """

    def __init__(
        self,
        writer: Writer,
        camera: str,
        unit: Callable[[np.ndarray], np.ndarray],
        *,
        stack: int,
        n_steps: int,
        gamma: float,
        capacity: int,
    ) -> None:
        self._writer, self._camera, self._unit, self._stack = writer, camera, unit, stack
        self._n, self._gamma, self._capacity = n_steps, gamma, capacity
        self.store = EpisodeStore.open(writer.path)
        self.rewards, self.episodes = np.zeros(0, np.float32), 0

    def __enter__(self) -> PixelReplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def waiting(self) -> Episode | None:
        """The next episode that is on disk and not taken in, as an interruption leaves it."""
        return self.store.episode(self.episodes) if self.episodes < len(self.store) else None

    def append(self, fields: Mapping[str, np.ndarray], **outcome: Any) -> None:
        """Puts an episode on disk, where it waits; the arguments are those of `Writer.append`."""
        self._writer.append(fields, **outcome)
        self.store = EpisodeStore.open(self._writer.path)

    def take(self, paid_for: PaidFor | None = None) -> None:
        """Takes the waiting episode in.

        Args:
            paid_for: what its steps are paid, instead of what the task paid.

        Raises:
            DataError: rewards are not finite, or not one for each step.
        """
        episode = self.store.episode(self.episodes)
        paid = np.asarray(episode.fields[REWARD] if paid_for is None else paid_for(episode), np.float32)
        if paid.shape != (episode.length,) or not np.isfinite(paid).all():
            got = f"{int((~np.isfinite(paid)).sum())} that are not" if paid.shape == (episode.length,) else paid.shape
            where, fix = f"rewards of episode {self.episodes}", "mend the task, or what is paid in its place"
            raise DataError(where, expected=f"{episode.length} finite numbers", got=str(got), fix=fix)
        self.rewards, self.episodes = np.concatenate([self.rewards, paid]), self.episodes + 1

    def restore(self, rewards: Float32[np.ndarray, " steps"], episodes: int) -> None:
        """Takes in what an earlier process had taken in.

        Raises:
            DataError: the store holds less, or other episodes.
        """
        known = self.store.episodes["length"][:episodes]
        if len(known) < episodes or int(known.sum()) != len(rewards):
            got, fix = f"{len(known)} with {int(known.sum())}", "begin another run: these recordings were changed"
            expected = f"{episodes} episodes with {len(rewards)} steps"
            raise DataError(str(self.store.path), expected=expected, got=got, fix=fix)
        self.rewards, self.episodes = rewards, episodes

    def sample(self, batch: int, rng: np.random.Generator) -> Transitions:
        """A batch, each of the latest steps as likely as any other.

        Args:
            batch: how many.
            rng: the batch is a function of it and of what was taken in.
        """
        steps, columns = len(self), self.store.episodes
        at = rng.integers(max(0, steps - self._capacity), steps, batch)
        start, length = columns["start"], columns["length"]
        episode = np.searchsorted(start[: self.episodes], at, "right") - 1
        first, end = start[episode], start[episode] + length[episode]
        reach = np.minimum(self._n, end - at)
        reward, discount = np.zeros(batch, np.float32), np.ones(batch, np.float32)
        for k in range(self._n):
            inside = k < reach
            reward += np.where(inside, discount * self.rewards[np.minimum(at + k, steps - 1)], 0)
            discount = np.where(inside, discount * np.float32(self._gamma), discount)
        discount[columns["terminated"][episode] & (at + reach == end)] = 0
        here, there = (self._films(moment, first, end, episode) for moment in (at, at + reach))
        action = self._unit(np.asarray(self.store.field(ACTION)[at], np.float32))
        made = (torch.from_numpy(each) for each in (here, action, reward, discount, there))
        return Transitions(**dict(zip(("here", "action", "reward", "discount", "there"), made, strict=True)))

    def _films(
        self,
        at: Int64[np.ndarray, " batch"],
        first: Int64[np.ndarray, " batch"],
        end: Int64[np.ndarray, " batch"],
        episode: Int64[np.ndarray, " batch"],
    ) -> UInt8[np.ndarray, "batch time height width 3"]:
        """The pictures up to some steps; the one after an episode's last step stands in a file of its own."""
        inside, after = self.store.field(self._camera), self.store.final(self._camera)
        films = np.empty((len(at), self._stack, *self.store.schema[self._camera].shape), np.uint8)
        for back in range(self._stack):
            rows = np.maximum(at - back, first)
            over = rows == end
            films[:, -1 - back] = inside[np.where(over, first, rows)]
            films[over, -1 - back] = after[episode[over]]
        return films
