"""The one `Policy` protocol, and the plain records that a robot and a policy agree on before they meet.

Everything that decides on actions (scripted experts, trained networks, a policy on another machine) is a `Policy`;
everything that asks for actions (local evaluation, a robot worker) calls one. NumPy only, and only when used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from offbook.errors import ConfigError, PolicyError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class ObservationSpec:
    """What a robot shows at each control step, or what part of it a policy wants.

    Attributes:
        state: named parts of the low-dimensional state and their sizes, in the order in which they are joined,
            such as `(("joints", 7), ("objects", 4))`.
        cameras: image height and width per camera, such as `{"front": (64, 64)}`.
    """

    state: tuple[tuple[str, int], ...] = ()
    cameras: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def state_size(self) -> int:
        """Length S of the joined state vector."""
        return sum(size for _, size in self.state)

    def columns(self, wanted: ObservationSpec) -> list[int]:
        """Where the parts that a policy wants stand in this state vector; `check_fit` has made sure that they do.

        Example:
            >>> robot = ObservationSpec(state=(("joints", 2), ("objects", 1)))
            >>> robot.columns(ObservationSpec(state=(("objects", 1), ("joints", 2))))
            [2, 0, 1]
        """
        start, first = 0, {}
        for name, size in self.state:
            first[name] = start
            start += size
        return [first[name] + i for name, size in wanted.state for i in range(size)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionSpec:
    """What a robot accepts at each control step.

    Attributes:
        size: number of entries A of an action; 1 for a discrete action, which carries its index.
        low: smallest accepted value of each entry, length A, in the robot's own units (radians, metres, ...).
        high: largest accepted value of each entry.
        choices: number of discrete actions, or None for continuous control.
    """

    size: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    choices: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyMeta:
    """What a policy says of itself before its first step.

    Attributes:
        name: label shown on the leaderboard.
        observation: the state parts and cameras that it wants; a robot must offer at least these.
        action: the actions that it gives.
        chunk: number N of consecutive actions in one answer; the robot executes them in order and asks again.
    """

    name: str
    observation: ObservationSpec
    action: ActionSpec
    chunk: int = 1

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return asdict(self)

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> PolicyMeta:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: a key is missing, unknown or of the wrong type.
        """
        try:
            observation, action = record["observation"], record["action"]
            return PolicyMeta(
                name=str(record["name"]),
                observation=ObservationSpec(
                    state=tuple((str(name), int(size)) for name, size in observation["state"]),
                    cameras={str(k): (int(h), int(w)) for k, (h, w) in observation["cameras"].items()},
                ),
                action=ActionSpec(
                    size=int(action["size"]),
                    low=tuple(float(x) for x in action["low"]),
                    high=tuple(float(x) for x in action["high"]),
                    choices=None if action.get("choices") is None else int(action["choices"]),
                ),
                chunk=int(record["chunk"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            expected = "the keys name, observation, action and chunk as PolicyMeta.to_json writes them"
            got, fix = f"{type(error).__name__} {error}", "send PolicyMeta.to_json()"
            raise ConfigError("policy description", expected=expected, got=got, fix=fix) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """B simultaneous observations, one for each running session (an episode on one robot or simulator).

    Attributes:
        sessions: who is asking, length B; the same string from reset to the end of an episode.
        state: joined state vectors, shape (B, S), float32: the parts that the policy wants, in its order.
        images: frames by camera, shape (B, H, W, 3), uint8 RGB: the cameras that the policy wants.
        time: seconds since each session's reset, shape (B,), float64.
    """

    sessions: tuple[str, ...]
    state: NDArray[np.float32]
    images: Mapping[str, NDArray[np.uint8]]
    time: NDArray[np.float64]


@runtime_checkable
class Policy(Protocol):
    """Decides on actions for any number of sessions at once. Two methods; keep per-session memory by session name."""

    @property
    def meta(self) -> PolicyMeta:
        """What this policy wants and gives."""

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Begins an episode for each named session, forgetting what was known of it; one prompt for each."""

    def infer(self, observation: Observation) -> NDArray[np.float32]:
        """Answers B observations with action chunks, shape (B, N, A)."""


class FunctionPolicy:
    """A policy made of one function from a single observation to an action or a chunk: the shortest way to submit.

    Args:
        meta: what the policy wants and gives.
        function: `function(state, images) -> action` with state (S,) float32, images of (H, W, 3) uint8 by camera,
            and an action of shape (A,) or a chunk of shape (N, A).

    Example:
        >>> import numpy as np
        >>> action = ActionSpec(size=2, low=(-1.0, -1.0), high=(1.0, 1.0))
        >>> meta = PolicyMeta(name="rest", observation=ObservationSpec(), action=action)
        >>> policy = FunctionPolicy(meta, lambda state, images: np.zeros(2, np.float32))
    """

    def __init__(
        self,
        meta: PolicyMeta,
        function: Callable[[NDArray[np.float32], Mapping[str, NDArray[np.uint8]]], NDArray[np.float32]],
    ) -> None:
        self.meta = meta
        self._function = function

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Nothing to forget: the function has no memory."""

    def infer(self, observation: Observation) -> NDArray[np.float32]:
        """Calls the function once for each session."""
        import numpy as np

        answers = [
            self._function(observation.state[i], {camera: frames[i] for camera, frames in observation.images.items()})
            for i in range(len(observation.sessions))
        ]
        return np.stack([np.asarray(answer, np.float32).reshape(-1, self.meta.action.size) for answer in answers])


def check_chunk(
    chunk: NDArray[np.float32], sessions: int, meta: PolicyMeta, *, finite: bool = True
) -> NDArray[np.float32]:
    """The answer of a policy as float32, after its shape and values were checked.

    Args:
        chunk: what `Policy.infer` returned.
        sessions: number B of observations it answered.
        meta: the policy's description; N may be smaller than `meta.chunk`, never zero.
        finite: refuse NaN and infinity; off where a robot's own guard counts them step by step.

    Raises:
        PolicyError: the shape is not (B, N, A), or an entry is NaN or infinite.
    """
    import numpy as np

    size = meta.action.size
    array = np.asarray(chunk)
    wanted = f"shape ({sessions}, 1..{meta.chunk}, {size})"
    fix = "return one finite chunk of actions for each session from infer()"
    if array.ndim != 3 or array.shape[0] != sessions or array.shape[2] != size or not 1 <= array.shape[1] <= meta.chunk:
        raise PolicyError(f"policy {meta.name!r}", expected=wanted, got=f"shape {array.shape}", fix=fix)
    if array.dtype.kind not in "fiu":
        raise PolicyError(f"policy {meta.name!r}", expected="numbers", got=f"dtype {array.dtype}", fix=fix)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused as such
        array = array.astype(np.float32, copy=False)
    bad = np.argwhere(~np.isfinite(array))
    if finite and len(bad):
        row, step, entry = bad[0]
        where = f"policy {meta.name!r}, chunk step {step}, entry {entry}"
        raise PolicyError(where, expected="a finite action", got=str(array[row, step, entry]), fix=fix)
    return array


def check_fit(policy: PolicyMeta, observation: ObservationSpec, action: ActionSpec, robot: str) -> None:
    """Refuses a policy that cannot drive a robot, naming the first disagreement and both sides.

    Args:
        policy: the policy's description.
        observation: what the robot shows; it may show more than the policy wants.
        action: what the robot accepts.
        robot: the robot's name, for the message.

    Raises:
        ConfigError: a wanted state part or camera is missing or differs in size, or the actions differ.
    """

    def refuse(expected: str, got: str) -> None:
        where = f"policy {policy.name!r} on {robot}"
        fix = "use a policy trained on recordings of this robot, or a robot that has it"
        raise ConfigError(where, expected=expected, got=got, fix=fix)

    offered_parts = dict(observation.state)
    for part, length in policy.observation.state:
        if offered_parts.get(part) != length:
            refuse(f"a state part {part!r} of size {length}", f"{offered_parts or 'no state'}")
    for camera, size in policy.observation.cameras.items():
        offered = observation.cameras.get(camera)
        if offered is None:
            refuse(f"a camera {camera!r}", f"cameras {sorted(observation.cameras) or 'none'}")
        elif tuple(offered) != tuple(size):
            refuse(f"camera {camera!r} with {size[0]}x{size[1]} pixels", f"{offered[0]}x{offered[1]}")
    if (policy.action.size, policy.action.choices) != (action.size, action.choices):
        refuse(
            f"actions of size {policy.action.size}, choices {policy.action.choices}",
            f"size {action.size}, choices {action.choices}",
        )
