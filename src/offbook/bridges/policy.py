"""A foreign server behind the `Policy` protocol."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from offbook.bridges.names import Names
from offbook.client.protocol import ActionSpec, Observation, PolicyMeta
from offbook.errors import ConfigError, PolicyError

_MOST_SESSIONS = 1024
_ANY = float(np.finfo(np.float32).max)


class Server(Protocol):
    """One connection to a foreign server; a fault of its raises PolicyError, and `begin` mends what can be mended."""

    @property
    def address(self) -> str:
        """For messages."""

    def begin(self, session: str) -> None:
        """An episode begins; connects again where the line was lost."""

    def ask(self, request: Mapping[str, Any], session: str) -> NDArray[np.float32]:
        """The actions (N, A) for an observation."""

    def close(self) -> None:
        """Hangs up; may be called twice."""


class BridgedPolicy:
    """An ordinary policy that asks a foreign server.

    The server is asked once at the beginning, with an observation of nothing: how many actions of which size it
    answers with is nowhere else to be learnt, and models that compile themselves at the first question do so now.

    Args:
        server: who is asked.
        names: what things are called there.
        action: what the robot takes; anything of the answer's size when None.
        horizon: only the first so many actions of an answer are given on.
        name: shown on the leaderboard.

    Raises:
        PolicyError: the server fails.
        ConfigError: its actions have another size than the robot's, or are fewer than `horizon`.
    """

    def __init__(
        self,
        server: Server,
        names: Names,
        *,
        action: ActionSpec | None = None,
        horizon: int | None = None,
        name: str = "bridged",
    ) -> None:
        self._server, self._names = server, names
        self._prompts: dict[str, str] = {}
        server.begin("first")
        length, size = self._answer(names.request(names.blank(), 0, ""), "first").shape
        if action is not None and action.size != size:
            fix = "serve a policy for this robot, or name another robot"
            raise ConfigError(server.address, expected=f"actions of size {action.size}", got=f"size {size}", fix=fix)
        if horizon is not None and not 1 <= horizon <= length:
            expected, fix = f"1 to {length}, as many as an answer holds", "choose fewer"
            raise ConfigError("--horizon", expected=expected, got=str(horizon), fix=fix)
        self._size, self._horizon = size, horizon or length
        self.meta = PolicyMeta(
            name=name,
            observation=names.observation,
            action=action or ActionSpec(size=size, low=(-_ANY,) * size, high=(_ANY,) * size),
            chunk=self._horizon,
        )

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Tells the server that episodes begin, and keeps their prompts."""
        for session, prompt in zip(sessions, prompts, strict=True):
            self._prompts.pop(session, None)
            self._prompts[session] = prompt
            self._server.begin(session)
        while len(self._prompts) > _MOST_SESSIONS:
            self._prompts.pop(next(iter(self._prompts)))

    def infer(self, observation: Observation) -> NDArray[np.float32]:
        """Asks the server for each session by itself; NaN is left to the robot's guard."""
        answers = []
        for row, session in enumerate(observation.sessions):
            request = self._names.request(observation, row, self._prompts.get(session, ""))
            answer = self._answer(request, session)
            if answer.shape[1] != self._size:
                got, fix = f"size {answer.shape[1]}", "see to the server"
                raise PolicyError(self._server.address, expected=f"actions of size {self._size}", got=got, fix=fix)
            answers.append(answer[: self._horizon])
        shortest = min(map(len, answers))
        return np.stack([answer[:shortest] for answer in answers])

    def close(self) -> None:
        """Hangs up."""
        self._server.close()

    def _answer(self, request: Mapping[str, Any], session: str) -> NDArray[np.float32]:
        answer = self._server.ask(request, session)
        if answer.ndim != 2 or 0 in answer.shape:
            expected, got = "actions of shape (N, A)", f"shape {answer.shape}"
            raise PolicyError(self._server.address, expected=expected, got=got, fix="see to the server")
        return answer
