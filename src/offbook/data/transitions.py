"""Single steps of recorded episodes, for off-policy learning: what was seen, done and earned, and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64

from offbook.data.normalise import refuse_number
from offbook.data.store import EpisodeStore
from offbook.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """N steps of E episodes in memory, the episodes one behind the other.

    Attributes:
        observations: joined state parts, an episode's last observation behind that of its last step.
        rows: row of `observations` at each step; the next observation is in the row after it.
        action: as recorded, each flattened.
        reward: as recorded.
        terminated: whether the task ended with this step, so that nothing can be earned after it. A step after which an
            episode was merely cut (truncated) is not: the value of its next observation counts.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from offbook.data.store import FieldSpec, Schema
        >>> place, action = (FieldSpec(role, "float32", (1,), role) for role in ("observation", "action"))
        >>> reward = FieldSpec("reward", "float32", (), "reward")
        >>> with TemporaryDirectory() as folder:
        ...     with EpisodeStore.create(f"{folder}/walks", Schema((place, action, reward))) as writer:
        ...         values = {"observation": np.c_[1:4], "action": np.zeros((2, 1)), "reward": np.ones(2)}
        ...         values = {name: value.astype(np.float32) for name, value in values.items()}
        ...         number = writer.append(values, terminated=True, truncated=False)
        ...     store = EpisodeStore.open(f"{folder}/walks")
        ...     steps = Transitions.read(store, ["observation"], "action", "reward", np.array([0]))
        >>> steps.observations[steps.rows + 1].tolist(), steps.terminated.tolist()
        ([[2.0], [3.0]], [False, True])
    """

    observations: Float32[np.ndarray, "rows state"]
    rows: Int64[np.ndarray, " steps"]
    action: Float32[np.ndarray, "steps action"]
    reward: Float32[np.ndarray, " steps"]
    terminated: Bool[np.ndarray, " steps"]

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def read(
        store: EpisodeStore, parts: Sequence[str], action: str, reward: str, episodes: Int64[np.ndarray, " episodes"]
    ) -> "Transitions":
        """Reads them from a store.

        Args:
            store: the recordings.
            parts: which state parts are joined, in this order.
            action: the field that holds what was done.
            reward: the field that holds what it earned.
            episodes: numbers of the episodes, which hold all of these fields.

        Raises:
            DataError: there is no episode, or a number is NaN or infinite.
        """
        if not len(episodes):
            raise DataError(str(store.path), expected="an episode to learn from", got="none", fix="choose others")
        starts, lengths = (store.episodes[column][episodes] for column in ("start", "length"))
        ends, order = np.cumsum(lengths), np.arange(len(episodes))
        here = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)

        def steps(name: str) -> Float32[np.ndarray, "steps size"]:
            values = _flat(store.field(name)[here])
            if len(bad := np.flatnonzero(~np.isfinite(values).all(1))):
                number = int(np.searchsorted(ends, bad[0], "right"))
                refuse_number(store, name, int(episodes[number]), int(bad[0] - (ends - lengths)[number]))
            return values

        def finals(name: str) -> Float32[np.ndarray, "episodes size"]:
            values = _flat(store.final(name)[episodes])
            if len(bad := np.flatnonzero(~np.isfinite(values).all(1))):
                refuse_number(store, name, int(episodes[bad[0]]), int(lengths[bad[0]]))
            return values

        rows = np.arange(ends[-1]) + np.repeat(order, lengths)
        size = sum(store.schema[name].size for name in parts)
        observations = np.empty((len(rows) + len(episodes), size), np.float32)
        observations[rows] = np.concatenate([steps(name) for name in parts], 1)
        observations[ends + order] = np.concatenate([finals(name) for name in parts], 1)
        terminated = np.zeros(len(rows), bool)
        terminated[ends - 1] = store.episodes["terminated"][episodes]
        return Transitions(
            observations=observations,
            rows=rows,
            action=steps(action),
            reward=steps(reward)[:, 0],
            terminated=terminated,
        )


def _flat(values: np.ndarray) -> Float32[np.ndarray, "rows size"]:
    # What is too large for float32 becomes infinite and is refused as such.
    with np.errstate(over="ignore"):
        return values.reshape(len(values), -1).astype(np.float32)
