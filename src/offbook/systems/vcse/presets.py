"""What the reproduction does, from seconds to the size of the published study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from offbook.learning.pixel_agent import PixelSizes
from offbook.systems.vcse.pixels import ExploringConfig


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task, and what its agents are like.

    Attributes:
        name: as `offbook.sim.adapters.make` knows it.
        algorithm: "a2c" on what an agent sees of a grid world, "sac" on the state of a body, or "drqv2" on pictures.
        steps: of an agent's life, in environment steps.
        episodes: that it plays at each look.
        beta: weight of every bonus.
        k: which neighbour, the state itself not counted.
        pixels: of agents that see pictures; what the task says itself is put into it.
    """

    name: str
    algorithm: Literal["a2c", "sac", "drqv2"]
    steps: int
    episodes: int
    beta: float
    k: int
    pixels: ExploringConfig | None = None

    @property
    def sparse(self) -> bool:
        """Whether it is of Meta-World, which here pays for success alone."""
        return self.name.startswith("metaworld:")

    @property
    def settings(self) -> dict[str, Any]:
        """Of `offbook.sim.adapters.make`."""
        return {"sparse": True} if self.sparse else {}

    @property
    def succeeds(self) -> bool:
        """Whether it has a notion of success."""
        return self.sparse or self.algorithm == "a2c"

    @property
    def agent(self) -> str:
        """What its agents are called."""
        return "DrQ-v2" if self.algorithm == "drqv2" else self.algorithm.upper()

    @property
    def short(self) -> str:
        """Its name without the library's, such as `DoorKey-6x6` or `pendulum-swingup`."""
        return self.name.partition(":")[2].removeprefix("MiniGrid-").removesuffix("-v0").removesuffix("-v3")


def grid(name: str, steps: int, episodes: int = 16) -> Task:
    """A task of MiniGrid with the published weight and neighbour of A2C (the authors' code, `run_vcse.sh`)."""
    return Task(name=f"minigrid:MiniGrid-{name}-v0", algorithm="a2c", steps=steps, episodes=episodes, beta=0.005, k=3)


def control(name: str, steps: int, episodes: int = 5) -> Task:
    """A task of the DeepMind control suite with the published weight and neighbour of SAC (the authors' code)."""
    return Task(name=f"dmc:{name}", algorithm="sac", steps=steps, episodes=episodes, beta=0.1, k=12)


def sparse(name: str, steps: int, episodes: int = 10) -> Task:
    """A task of Meta-World that pays for success alone, with the agent of `control` on its state."""
    return Task(name=f"metaworld:{name}-v3", algorithm="sac", steps=steps, episodes=episodes, beta=0.1, k=12)


def seen(name: str, steps: int, episodes: int, pixels: ExploringConfig) -> Task:
    """A task of the DeepMind control suite through a camera, with the published weight and neighbour of DrQ-v2."""
    return Task(name=f"dmc:{name}", algorithm="drqv2", steps=steps, episodes=episodes, beta=0.1, k=12, pixels=pixels)


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


def small_pixels() -> ExploringConfig:
    """Pictures and networks so small that a processor is soon through with them; they learn little."""
    return ExploringConfig(
        steps=4_000, image_size=24, repeat=10, sizes=PixelSizes(channels=4, features=8, hidden=32), batch_size=32,
        shift=1, noise_start=0.2, noise_end=0.2, update_every=4, random_steps=200, evaluate_every=2_000,
        evaluate_episodes=1, checkpoint_every=2_000,
    )  # fmt: skip


def published_pixels() -> ExploringConfig:
    """The agent of the authors' code, for a GPU; it is given 510,000 steps and a noise that does not fall."""
    return ExploringConfig(steps=510_000, noise_start=0.2, noise_end=0.2)


PIXELS: dict[str, Callable[[], ExploringConfig]] = {"smoke": small_pixels, "drqv2-dmc": published_pixels}
"""Presets of `offbook train drqv2`."""


def smoke() -> VcseStudy:
    """About a minute on two cores: everything once, where nobody learns; two seeds, so that there are intervals."""
    tasks = (
        grid("Empty-5x5", steps=256, episodes=2),
        control("pendulum-swingup", steps=120, episodes=1),
        sparse("reach", steps=120, episodes=1),
        seen("cartpole-balance", steps=2_000, episodes=1, pixels=small_pixels()),
    )
    return VcseStudy(tasks=tasks, looks=2, seeds=(0, 1), judged=False)


def tiny() -> VcseStudy:
    """More than an hour on two cores: what is claimed."""
    return VcseStudy()


def paper() -> VcseStudy:
    """For many cores: a million steps in grid worlds, three in the hardest, half a million on bodies; ten seeds."""
    longer = [replace(task, steps=1_024_000 if task.algorithm == "a2c" else 500_000) for task in VcseStudy().tasks]
    tasks = (*longer, grid("DoorKey-8x8", steps=3_072_000), control("cheetah-run", steps=500_000))
    return VcseStudy(tasks=tasks, looks=50, seeds=tuple(range(10)), jobs=16)


def drqv2_dmc() -> VcseStudy:
    """For a GPU: 510,000 steps of bodies through a camera, tested as often as published; ten seeds."""
    names = "hopper-stand", "cheetah-run", "quadruped-walk", "pendulum-swingup", "cartpole-balance", "cartpole-swingup"
    tasks = tuple(seen(name, steps=510_000, episodes=10, pixels=published_pixels()) for name in names)
    return VcseStudy(tasks=tasks, looks=51, seeds=tuple(range(10)), jobs=1)


def metaworld() -> VcseStudy:
    """Hours on two cores: an arm that is paid for success alone, on its state."""
    tasks = tuple(sparse(name, steps=100_000) for name in ("reach", "button-press", "drawer-close"))
    return VcseStudy(tasks=tasks)


PRESETS: dict[str, Callable[[], VcseStudy]] = {
    "smoke": smoke, "tiny": tiny, "paper": paper, "drqv2-dmc": drqv2_dmc, "metaworld": metaworld,
}  # fmt: skip
"""Presets of `offbook reproduce vcse`."""
