"""What the reproduction does, from seconds to the size of the published study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task, and what its agents are like.

    Attributes:
        name: as `offbook.sim.adapters.make` knows it.
        algorithm: "a2c" on what an agent sees of a grid world, or "sac" on the state of a body.
        steps: of an agent's life, in environment steps.
        episodes: that it plays at each look.
        beta: weight of every bonus.
        k: which neighbour, the state itself not counted.
    """

    name: str
    algorithm: Literal["a2c", "sac"]
    steps: int
    episodes: int
    beta: float
    k: int

    @property
    def short(self) -> str:
        """Its name without the library's, such as `DoorKey-6x6` or `pendulum-swingup`."""
        return self.name.partition(":")[2].removeprefix("MiniGrid-").removesuffix("-v0")


def grid(name: str, steps: int, episodes: int = 16) -> Task:
    """A task of MiniGrid with the published weight and neighbour of A2C (the authors' code, `run_vcse.sh`)."""
    return Task(name=f"minigrid:MiniGrid-{name}-v0", algorithm="a2c", steps=steps, episodes=episodes, beta=0.005, k=3)


def control(name: str, steps: int, episodes: int = 5) -> Task:
    """A task of the DeepMind control suite with the published weight and neighbour of SAC (the authors' code)."""
    return Task(name=f"dmc:{name}", algorithm="sac", steps=steps, episodes=episodes, beta=0.1, k=12)


@dataclass(frozen=True, kw_only=True)
class VcseStudy:
    """What the reproduction does.

    Attributes:
        tasks: of all agents.
        looks: at each agent while it learns, after equal shares of its steps.
        seeds: of agents and their worlds, the same for every bonus.
        jobs: agents at a time.
        judged: whether verdicts are given.
    """

    tasks: tuple[Task, ...] = (
        # Whole rollouts of 128 states between looks.
        grid("Empty-8x8", steps=51_200),
        grid("SimpleCrossingS9N1", steps=307_200),
        grid("DoorKey-6x6", steps=512_000),
        control("pendulum-swingup", steps=20_000),
    )
    looks: int = 10
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    jobs: int = 2
    judged: bool = True


def smoke() -> VcseStudy:
    """Under a minute on two cores: everything once, where nobody learns."""
    tasks = grid("Empty-5x5", steps=256, episodes=2), control("pendulum-swingup", steps=120, episodes=1)
    return VcseStudy(tasks=tasks, looks=2, seeds=(0,), judged=False)


def tiny() -> VcseStudy:
    """More than an hour on two cores: what is claimed."""
    return VcseStudy()


def paper() -> VcseStudy:
    """For many cores: a million steps in grid worlds, three in the hardest, half a million on bodies; ten seeds."""
    longer = [replace(task, steps=1_024_000 if task.algorithm == "a2c" else 500_000) for task in VcseStudy().tasks]
    tasks = (*longer, grid("DoorKey-8x8", steps=3_072_000), control("cheetah-run", steps=500_000))
    return VcseStudy(tasks=tasks, looks=50, seeds=tuple(range(10)), jobs=16)


PRESETS: dict[str, Callable[[], VcseStudy]] = {"smoke": smoke, "tiny": tiny, "paper": paper}
"""Presets of `offbook reproduce vcse`."""
