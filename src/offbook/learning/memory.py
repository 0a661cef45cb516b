"""What a policy remembers of each session: its latest states and actions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32


class Memory:
    """The latest states of each session, and the actions between them.

    Args:
        steps: states that are kept, 1 or more.

    Example:
        >>> memory = Memory(2)
        >>> for number in range(3):
        ...     states, actions = memory.see("a", np.full(1, number, np.float32))
        ...     memory.did(["a"], np.full((1, 1), 10 * number, np.float32))
        >>> [float(x[0]) for x in states], [float(x[0]) for x in actions]
        ([1.0, 2.0], [10.0])
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._sessions: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}

    def reset(self, sessions: Sequence[str]) -> None:
        """Forgets what was seen and done in these sessions."""
        for session in sessions:
            self._sessions[session] = [], []

    def see(self, session: str, state: Float32[np.ndarray, " state"]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Adds a state; gives the latest n states, this one at the end, and the n - 1 actions between them."""
        states, actions = self._sessions.setdefault(session, ([], []))
        states.append(np.array(state, np.float32))
        del states[: -self._steps], actions[: max(0, len(actions) - self._steps + 1)]
        return states, actions[len(actions) - len(states) + 1 :]

    def did(self, sessions: Sequence[str], actions: Float32[np.ndarray, "batch action"]) -> None:
        """Adds the action that answered the last state of each session."""
        for session, action in zip(sessions, actions, strict=True):
            self._sessions[session][1].append(action)
