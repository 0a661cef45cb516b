"""Scripted experts of the tasks on the table, graded from flawless to hopeless.

Their laws have no memory and no clock: each step's answer follows from the joints, the place of the bowl and how full
the spoon is. A policy that imitates them therefore finds every action explained by what it sees. (A graded expert's
faults are drawn once for each session.)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import numpy as np
from jaxtyping import Float, Float32

from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, PolicyMeta
from offbook.runs.seeding import generator
from offbook.sim.tabletop import arm, pour, scoop
from offbook.sim.tabletop.world import WALL

_NEVER = 10**9


@dataclass(kw_only=True)
class _Faults:
    """What goes wrong in one session."""

    rng: np.random.Generator
    aim: Float[np.ndarray, "2"]  # metres beside the bowl's centre
    noise: float  # radians
    give_up: int = _NEVER  # step at which the arm stops for good
    step: int = 0


F = TypeVar("F", bound=_Faults)


class ArmExpert(ABC, Generic[F]):
    """What the experts of all tasks have in common.

    Args:
        grade: 1 without faults, down to 0.
        seed: for the faults.
    """

    objects: ClassVar[tuple[str, ...]]
    """The entries of the observation `objects`."""
    faults: ClassVar[str]
    """Names the stream of random numbers that the faults are drawn from."""

    def __init__(self, grade: float = 1.0, seed: int = 0) -> None:
        self.meta = PolicyMeta(
            name="scripted-expert" if grade == 1 else f"scripted-grade-{grade:g}",
            observation=ObservationSpec(state=(("joints", 7), ("objects", len(self.objects)))),
            action=ActionSpec(size=7, low=tuple(arm.LOW.tolist()), high=tuple(arm.HIGH.tolist())),
        )
        self._badness, self._seed = 1.0 - grade, seed
        self._faults: dict[str, F] = {}

    @abstractmethod
    def _draw(self, rng: np.random.Generator) -> F:
        """Draws what will go wrong."""

    @abstractmethod
    def _answer(self, joints: Float[np.ndarray, "7"], objects: Float[np.ndarray, "k"], faults: F) -> np.ndarray:
        """The next joint angles before noise."""

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Draws what will go wrong in each session."""
        for session in sessions:
            self._faults[session] = self._draw(generator(self._seed, self.faults, session))

    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch 1 7"]:
        """The next joint angles for each session."""
        answers = np.empty((len(observation.sessions), 1, 7), np.float32)
        for i, session in enumerate(observation.sessions):
            state, faults = observation.state[i].astype(np.float64), self._faults[session]
            faults.step += 1
            answers[i, 0] = state[:7]
            if faults.step <= faults.give_up:
                noise = faults.noise * faults.rng.standard_normal(7)
                answers[i, 0] = self._answer(state[:7], state[7:], faults) + noise
        return answers


@dataclass(kw_only=True)
class _PouringFaults(_Faults):
    full_tilt: float = 2.2  # radians
    start_distance: float = 0.04  # metres from the goal at which the pouring begins


class PouringExpert(ArmExpert[_PouringFaults]):
    """Carries the cup over the bowl and tips it.

    The cup's mouth is drawn towards its place beside the bowl, the more the cup is there, the more it is tipped, and
    inverse kinematics gives the joint angles. See `ArmExpert` for the arguments.
    """

    objects, faults = pour.OBJECTS, "pouring faults"

    def _draw(self, rng: np.random.Generator) -> _PouringFaults:
        badness = self._badness
        aim, kind, how_much = rng.standard_normal(2), rng.random(), rng.random()
        faults = _PouringFaults(rng=rng, aim=aim * 0.10 * badness, noise=0.05 * badness)
        if kind < badness * 0.3:
            faults.full_tilt = 0.5 + 0.7 * how_much
        elif kind < badness * 0.5:
            faults.start_distance = 0.08 + 0.2 * how_much
        elif kind < badness * 0.7:
            faults.give_up = 10 + int(50 * how_much)
        return faults

    def _answer(
        self, joints: Float[np.ndarray, "7"], objects: Float[np.ndarray, "k"], faults: _PouringFaults
    ) -> Float[np.ndarray, "7"]:
        bowl, rim, cup_radius = objects[:2] + faults.aim, float(objects[2]), float(objects[4])
        point, axis = pour.cup_frame(cup_radius)
        flange = arm.forward(joints)[7]
        mouth, now = flange[:3, 3] + flange[:3, :3] @ point, flange[:3, :3] @ axis
        # The cup is tipped sideways, seen from the arm, to its left.
        side = np.array([-bowl[1], bowl[0], 0.0]) / max(float(np.hypot(*bowl)), 1e-6)
        tilt = float(np.arctan2(now @ side, now[2]))
        here = float(np.hypot(*(mouth - _mouth_goal(bowl, rim, cup_radius, side, tilt))[:2]))
        # Tipping starts within `start_distance` of the goal, and backs off should the cup be pushed away from it.
        eagerness = np.clip(1.5 - here / faults.start_distance, -1.0, 1.0)
        next_tilt = float(np.clip(tilt + 0.09 * eagerness, 0.0, faults.full_tilt))
        goal = _mouth_goal(bowl, rim, cup_radius, side, next_tilt)
        way = goal - mouth
        stride = min(1.0, 0.035 / max(float(np.linalg.norm(way)), 1e-9))
        return arm.reach(
            joints,
            point=point,
            axis=axis,
            target_point=mouth + stride * way,
            target_axis=np.array([0.0, 0.0, np.cos(next_tilt)]) + np.sin(next_tilt) * side,
            rest=pour.START,
            iterations=2,
        )


def _mouth_goal(
    bowl: Float[np.ndarray, "2"], rim: float, cup_radius: float, side: Float[np.ndarray, "3"], tilt: float
) -> Float[np.ndarray, "3"]:
    """Where the centre of the cup's mouth belongs at a tilt, so that its lip stays above the bowl.

    Upright, the whole cup hangs higher than the rim, to pass over it; tipped, the lip comes down to 5 cm above the rim.
    """
    clearance = 0.05 + (pour.CUP_HEIGHT - 0.02) * float(np.clip(1.0 - tilt / 1.2, 0.0, 1.0))
    lip = np.array([*(bowl - 0.025 * side[:2]), rim + clearance])
    from_lip = np.cos(tilt) * side - np.sin(tilt) * np.array([0.0, 0.0, 1.0])
    return np.asarray(lip - cup_radius * from_lip)


@dataclass(kw_only=True)
class _ScoopingFaults(_Faults):
    shallow: float = 0.0  # metres by which the spoon stays too high
    spill: float = 0.0  # radians by which the spoon's tip hangs too low on the way out


class ScoopingExpert(ArmExpert[_ScoopingFaults]):
    """Dips the spoon into the bowl tip down, draws it through the grains while levelling it, and lifts it out.

    The spoon follows a route of places and tilts, in the vertical plane through the arm's base and the bowl: at each
    step it is drawn to the place a little further on the route than the nearest one, and straight to the nearest one
    from further away. See `ArmExpert` for the arguments.
    """

    objects, faults = scoop.OBJECTS, "scooping faults"

    def _draw(self, rng: np.random.Generator) -> _ScoopingFaults:
        badness = self._badness
        aim, kind, how_much = rng.standard_normal(2), rng.random(), rng.random()
        faults = _ScoopingFaults(rng=rng, aim=aim * 0.04 * badness, noise=0.03 * badness)
        if kind < badness * 0.3:
            faults.shallow = 0.015 + 0.03 * how_much
        elif kind < badness * 0.5:
            faults.spill = 0.3 + 0.8 * how_much
        elif kind < badness * 0.7:
            faults.give_up = 20 + int(50 * how_much)
        return faults

    def _answer(
        self, joints: Float[np.ndarray, "7"], objects: Float[np.ndarray, "k"], faults: _ScoopingFaults
    ) -> Float[np.ndarray, "7"]:
        bowl = np.array([*(objects[:2] + faults.aim), 0.0])
        ahead = bowl / max(float(np.hypot(*bowl[:2])), 1e-6)
        up = np.array([0.0, 0.0, 1.0])
        point, axis = scoop.spoon_frame(float(objects[4]))
        flange = arm.forward(joints)[7]
        here, now = flange[:3, 3] + flange[:3, :3] @ point, flange[:3, :3] @ axis
        offset = here - bowl
        place = np.array([offset @ ahead, offset[2], _LEVER * float(np.arctan2(now @ ahead, now[2]))])
        aside = float(np.linalg.norm(offset - (offset @ ahead) * ahead - offset[2] * up))
        route, full = _route(objects, faults), float(objects[6])
        # A full spoon goes straight out from where it is. Further ahead and higher up, less will do: grains wedged
        # before the spoon shall not stop it, nor one that falls off call it back.
        if full >= max(0.5, 1.0 - 5.0 * max(0.0, place[0] + 0.005) - 10.0 * max(0.0, place[1] - 0.02)):
            route = np.stack([place, route[-1]])
        elif full < 0.4 and place[1] > objects[2]:  # above the rim with little or nothing: to the way in, or down it
            beside = np.linalg.norm([place[0] - route[0, 0], place[2] - route[0, 2], aside])
            route = np.stack([place, route[0]]) if beside > 0.02 else route[:2]
        goal = _further(route, place, aside)
        tilt = goal[2] / _LEVER
        return arm.reach(
            joints,
            point=point,
            axis=axis,
            target_point=bowl + goal[0] * ahead + goal[1] * up,
            target_axis=np.cos(tilt) * up + np.sin(tilt) * ahead,
            rest=scoop.START,
            iterations=2,
        )


_LEVER = 0.08  # metres for each radian, so that a turn of the spoon is a part of its way
_STRIDE = 0.03  # metres of the route in one step


def _route(objects: Float[np.ndarray, "k"], faults: _ScoopingFaults) -> Float[np.ndarray, "places 3"]:
    """Places of the spoon's bottom: metres ahead of the bowl's centre, height, and tilt (tip down) times `_LEVER`."""
    rim, bowl_radius, spoon_radius = (float(value) for value in objects[2:5])
    room = scoop.BOWL_FOOT * bowl_radius / 0.047
    out = faults.spill - 0.25

    def low(tilt: float) -> float:
        # The spoon's lowest edge just above the bottom of the bowl.
        drop, depth = spoon_radius * math.sin(tilt), scoop.SPOON_DEPTH * math.cos(tilt)
        return WALL + 0.001 + faults.shallow + max(scoop.SPOON_FOOT * drop, drop - depth)

    places = (
        (-0.045 * room, rim + 0.08, 0.6),
        (-0.045 * room, low(0.6), 0.6),
        (-0.01 * room, low(0.4), 0.4),
        (0.025 * room, low(0.1), 0.1),
        (0.035 * room, 0.035 + faults.shallow, out),
        (0.02 * room, rim + 0.12, out),
    )
    return np.array(places) * (1.0, 1.0, _LEVER)


def _further(
    route: Float[np.ndarray, "places 3"], place: Float[np.ndarray, "3"], aside: float
) -> Float[np.ndarray, "3"]:
    """The place one stride further on the route than the one nearest to `place`, less what `place` is away from it."""
    ways = np.diff(route, axis=0)
    lengths = np.maximum(np.linalg.norm(ways, axis=1), 1e-9)
    shares = np.clip(np.sum((place - route[:-1]) * ways, axis=1) / lengths**2, 0.0, 1.0)
    away = np.linalg.norm(route[:-1] + shares[:, None] * ways - place, axis=1)
    nearest = int(np.argmin(away))
    marks = np.concatenate([[0.0], np.cumsum(lengths)])
    stride = max(0.0, _STRIDE - float(np.hypot(away[nearest], aside)))
    mark = marks[nearest] + shares[nearest] * lengths[nearest] + stride
    return np.array([np.interp(mark, marks, route[:, i]) for i in range(3)])
