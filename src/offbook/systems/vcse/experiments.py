"""What the reproduction measures: the lives of agents, with episodes in between that they never train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from offbook.runs.directory import kept
from offbook.runs.parallel import run_all
from offbook.runs.seeding import evaluation_seeds
from offbook.systems.vcse.agents import ARMS, agent, world
from offbook.systems.vcse.presets import Task, VcseStudy


@dataclass(frozen=True, kw_only=True)
class Life:
    """One agent's.

    Attributes:
        task: what it learns.
        arm: what it explores by, one of `ARMS`.
        seed: of it and its worlds.
        looks: at it, after equal shares of its steps.
        out: folder in which its curve is kept.
    """

    task: Task
    arm: str
    seed: int
    looks: int
    out: Path

    @property
    def steps(self) -> list[int]:
        """At which it is looked at."""
        return [round(self.task.steps * look / self.looks) for look in range(1, self.looks + 1)]

    def curve(self) -> Curve:
        """From its file, or lived."""
        name = f"{self.arm.replace(' ', '-')}-{self.seed}.json"
        found = kept(self.out / self.task.short / name, self._live)
        return Curve(**{measure: tuple(values) for measure, values in found.items()})

    def _live(self) -> dict[str, list[float]]:
        mine = agent(self.task, self.arm, self.seed)
        tests = [world(self.task) for _ in range(self.task.episodes)]
        found: dict[str, list[float]] = {"returns": [], "successes": []}
        try:
            for step in self.steps:
                mine.learn(step - mine.num_timesteps, reset_num_timesteps=False)
                returns, successes = play(mine, tests, sampled=self.task.algorithm == "a2c")
                found["returns"].append(float(np.mean(returns)))
                if self.task.algorithm == "a2c":
                    found["successes"].append(float(np.mean(successes)))
            return found
        finally:
            for each in (mine.get_env(), *tests):
                if each is not None:
                    each.close()


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What the looks at one agent showed.

    Attributes:
        returns: the episodes' mean, at each.
        successes: share of the episodes that ended with a reward; empty where a task knows no success.
    """

    returns: tuple[float, ...]
    successes: tuple[float, ...]

    @property
    def area(self) -> float:
        """Mean return over the life: the area under the curve, per step."""
        return float(np.mean(self.returns))


def lives(study: VcseStudy, out: Path) -> dict[Life, Curve]:
    """All of them, several at a time."""
    every = [
        Life(task=task, arm=arm, seed=seed, looks=study.looks, out=out)
        for task in study.tasks for seed in study.seeds for arm in ARMS
    ]  # fmt: skip
    return run_all(_curve, every, jobs=study.jobs, label="agents")


def _curve(life: Life) -> Curve:
    return life.curve()


def play(mine: Any, worlds: Sequence[gym.Env[Any, Any]], *, sampled: bool) -> tuple[list[float], list[bool]]:
    """One episode in each world, on seeds that are the same at every look at any agent and reset no training.

    Args:
        mine: an agent of Stable-Baselines3; its random numbers are where they were afterwards.
        worlds: of its task.
        sampled: whether actions are drawn from its policy, as in training, or are the most likely ones.

    Returns:
        The returns, and whether the last reward of an episode that ended itself was positive.
    """
    seeds = evaluation_seeds(0, len(worlds))
    seen = [one.reset(seed=seed)[0] for one, seed in zip(worlds, seeds, strict=True)]
    returns, successes, running = [0.0] * len(worlds), [False] * len(worlds), list(range(len(worlds)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds[0])
        while running:
            actions, _ = mine.predict(np.stack([seen[number] for number in running]), deterministic=not sampled)
            left = []
            for number, action in zip(running, actions, strict=True):
                seen[number], reward, terminated, truncated, _ = worlds[number].step(action)
                returns[number] += float(reward)
                if terminated:
                    successes[number] = float(reward) > 0
                elif not truncated:
                    left.append(number)
            running = left
    return returns, successes
