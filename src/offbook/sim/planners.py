"""Experts that plan a way: through the point mazes of Gymnasium-Robotics, and through MiniGrid's rooms with a door."""

import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, PolicyMeta
from offbook.runs.seeding import generator
from offbook.sim.adapters import SymbolicView, make

Cell = tuple[int, int]
_SIDES: tuple[Cell, ...] = ((1, 0), (0, 1), (-1, 0), (0, -1))  # MiniGrid's directions: right, down, left, up


class Drift:
    """Random actions that hang together: a stationary first-order process, clipped to [-1, 1].

    Args:
        size: of an action.
        rng: source of the numbers.
        memory: what is kept of the last value at each step; 0.96 makes about 25 steps of one direction.
    """

    def __init__(self, size: int, rng: np.random.Generator, memory: float = 0.96) -> None:
        self._rng, self._memory = rng, memory
        self._value = rng.standard_normal(size)

    def next(self) -> Float[np.ndarray, " size"]:
        """The next action."""
        fresh = np.sqrt(1.0 - self._memory**2) * self._rng.standard_normal(len(self._value))
        self._value = self._memory * self._value + fresh
        return np.clip(self._value, -1.0, 1.0)


class MazeExpert:
    """Drives a point mass through the free cells of a maze to the goal, by the shortest way.

    At each step the target is the centre of the next cell of the way, or the goal when that is in the same cell; the
    force is proportional to the way left, less a damping by the velocity.

    Args:
        env_id: such as `"robotics:PointMaze_UMaze-v3"`; its map is read once.
        grade: the weight of that force; the rest, 1 - grade, is a random one that drifts over half a second.
        seed: for the drift.
    """

    def __init__(self, env_id: str, grade: float = 1.0, seed: int = 0) -> None:
        self._maze, self._next = _ways_through(env_id)
        self.meta = PolicyMeta(
            name="scripted-expert" if grade == 1 else f"scripted-grade-{grade:g}",
            observation=ObservationSpec(state=(("desired_goal", 2), ("observation", 4))),
            action=ActionSpec(size=2, low=(-1.0,) * 2, high=(1.0,) * 2),
        )
        self._grade, self._seed = grade, seed
        self._drifts: dict[str, Drift] = {}

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Begins each session's own drift anew."""
        for session in sessions:
            self._drifts[session] = Drift(2, generator(self._seed, "maze drift", session))

    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch 1 2"]:
        """The next force for each session."""
        answers = np.empty((len(observation.sessions), 1, 2), np.float32)
        for i, session in enumerate(observation.sessions):
            push = np.clip(self._push(observation.state[i].astype(np.float64)), -1.0, 1.0)
            answers[i, 0] = self._grade * push + (1.0 - self._grade) * self._drifts[session].next()
        return answers

    def _push(self, state: Float[np.ndarray, "6"]) -> Float[np.ndarray, "2"]:
        goal, place, velocity = state[:2], state[2:4], state[4:]
        here, there = self._cell(place), self._cell(goal)
        step = self._next.get(there, {}).get(here, there)
        target = goal if step == there == here else self._maze.cell_rowcol_to_xy(np.array(step))
        return np.asarray(10.0 * (target - place) - velocity)

    def _cell(self, place: Float[np.ndarray, "2"]) -> Cell:
        row, col = self._maze.cell_xy_to_rowcol(place)
        return int(row), int(col)


@functools.cache
def _ways_through(env_id: str) -> tuple[Any, dict[Cell, dict[Cell, Cell]]]:
    """The maze, and for each goal and each free cell the next cell on a shortest way."""
    env: Any = make(env_id)
    env.close()
    maze = env.unwrapped.maze
    free = {(row, col) for row, line in enumerate(maze.maze_map) for col, cell in enumerate(line) if cell != 1}
    return maze, {goal: _towards(goal, free) for goal in free}


def _towards(goal: Cell, free: set[Cell]) -> dict[Cell, Cell]:
    """From each free cell the next one on a shortest way to the goal."""
    following, queue = {goal: goal}, deque([goal])
    while queue:
        cell = queue.popleft()
        for side in _SIDES:
            beside = cell[0] + side[0], cell[1] + side[1]
            if beside in free and beside not in following:
                following[beside] = cell
                queue.append(beside)
    return following


_UNSEEN, _WALL, _DOOR, _KEY, _GOAL = 0, 2, 4, 5, 8
_LEFT, _RIGHT, _FORWARD, _PICK_UP, _TOGGLE = 0, 1, 2, 3, 5
_OPEN = 0
_PASSABLE = (1, 3, _GOAL)  # empty, floor, goal


@dataclass
class _Walk:
    """What one session remembers: the cells that it has seen, in coordinates that begin where it began."""

    rng: np.random.Generator
    seen: dict[Cell, tuple[int, int]] = field(default_factory=dict)  # kind and state
    place: Cell = (0, 0)
    carries_key: bool = False

    def passable(self, cell: Cell) -> bool:
        kind, state = self.seen.get(cell, (_UNSEEN, 0))
        return kind in _PASSABLE or (kind == _DOOR and state == _OPEN)


class DoorKeyExpert:
    """Explores MiniGrid's rooms by what its narrow view has shown, fetches the key, opens the door, walks to the goal.

    It sees what any policy sees, a view of 7 x 7 cells, and keeps a map of what it saw; each action is the first of a
    shortest plan (breadth first over places and directions).

    Args:
        grade: 1 as written; below that each action is a random one with probability 1 - grade.
        seed: for the mistakes.
    """

    def __init__(self, grade: float = 1.0, seed: int = 0) -> None:
        kinds, cells = sum(SymbolicView.KINDS), 49
        self.meta = PolicyMeta(
            name="scripted-expert" if grade == 1 else f"scripted-grade-{grade:g}",
            observation=ObservationSpec(state=(("view", kinds * cells), ("direction", 4))),
            action=ActionSpec(size=1, low=(0.0,), high=(6.0,), choices=7),
        )
        self._mistakes, self._seed = 1.0 - grade, seed
        self._walks: dict[str, _Walk] = {}

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Forgets each session's map."""
        for session in sessions:
            self._walks[session] = _Walk(rng=generator(self._seed, "door and key mistakes", session))

    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch 1 1"]:
        """The next action for each session."""
        actions = [
            self._act(state, self._walks[session])
            for state, session in zip(observation.state, observation.sessions, strict=True)
        ]
        return np.array(actions, np.float32).reshape(-1, 1, 1)

    def _act(self, state: Float32[np.ndarray, "984"], walk: _Walk) -> int:
        direction = int(state[-4:].argmax())
        _look(state[:-4].reshape(7, 7, -1), direction, walk)
        action = _plan(walk, direction)
        if walk.rng.random() < self._mistakes:
            action = int(walk.rng.integers(7))
        if action == _FORWARD and walk.passable(_ahead(walk.place, direction)):
            walk.place = _ahead(walk.place, direction)
        return action


def _ahead(cell: Cell, direction: int, steps: int = 1) -> Cell:
    return cell[0] + steps * _SIDES[direction][0], cell[1] + steps * _SIDES[direction][1]


def _look(view: Float32[np.ndarray, "across along 20"], direction: int, walk: _Walk) -> None:
    """Writes what is in view into the map. The agent stands at [3, 6] of the view and looks along falling indices."""
    kinds = view[:, :, : SymbolicView.KINDS[0]].argmax(2)
    states = view[:, :, -SymbolicView.KINDS[2] :].argmax(2)
    walk.carries_key = kinds[3, 6] == _KEY
    for across, along in np.argwhere(kinds != _UNSEEN).tolist():
        cell = _ahead(_ahead(walk.place, direction, 6 - along), (direction + 1) % 4, across - 3)
        walk.seen[cell] = int(kinds[across, along]), int(states[across, along])
    walk.seen[walk.place] = 1, 0  # the view shows here what is carried


def _plan(walk: _Walk, direction: int) -> int:
    """The first action of the way to the goal; else to the door, with the key; else to the key; else to see more."""
    ways = _ways(walk, direction)
    for wanted, last in _aims(walk):
        for cell, facing, first in ways:
            if last == _FORWARD and cell in wanted:
                return _LEFT if first < 0 else first
            if last != _FORWARD and _ahead(cell, facing) in wanted:
                return last if first < 0 else first
    return _LEFT


def _aims(walk: _Walk) -> Iterator[tuple[set[Cell], int]]:
    """Cells to reach, by rank, and the action that is due in front of them; `_FORWARD` for cells to stand on."""

    def cells(kind: int) -> set[Cell]:
        return {cell for cell, (what, _) in walk.seen.items() if what == kind}

    yield cells(_GOAL), _FORWARD
    closed = {cell for cell in cells(_DOOR) if not walk.passable(cell)}
    unlocked = {cell for cell in closed if walk.seen[cell][1] == 1}
    yield closed if walk.carries_key else unlocked, _TOGGLE
    if not walk.carries_key:
        yield cells(_KEY), _PICK_UP
    yield {cell for cell in walk.seen if walk.passable(cell) and _has_unseen(cell, walk.seen)}, _FORWARD


def _has_unseen(cell: Cell, seen: Mapping[Cell, tuple[int, int]]) -> bool:
    return any(_ahead(cell, side) not in seen for side in range(4))


def _ways(walk: _Walk, direction: int) -> list[tuple[Cell, int, int]]:
    """Every place and direction within reach, nearest first, with the first action on the way there (-1: none)."""
    start = walk.place, direction
    first, queue = {start: -1}, deque([start])
    while queue:
        cell, facing = queue.popleft()
        turns = ((cell, (facing - 1) % 4), _LEFT), ((cell, (facing + 1) % 4), _RIGHT)
        ahead = _ahead(cell, facing)
        steps = (*turns, ((ahead, facing), _FORWARD)) if walk.passable(ahead) else turns
        for there, action in steps:
            if there not in first:
                first[there] = action if first[cell, facing] < 0 else first[cell, facing]
                queue.append(there)
    return [(cell, facing, action) for (cell, facing), action in first.items()]
