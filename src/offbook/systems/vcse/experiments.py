"""What the reproduction measures: the lives of agents, with episodes in between that they never train on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from offbook.errors import ConfigError
from offbook.learning.pixel_training import train_pixels
from offbook.runs.directory import RunDirectory, kept
from offbook.runs.parallel import run_all
from offbook.runs.seeding import evaluation_seeds
from offbook.systems.vcse.agents import ARMS, ENTROPY, HIDDEN, OURS, PLAIN, RANDOM, agent, world
from offbook.systems.vcse.pixels import Kind
from offbook.systems.vcse.presets import Task, VcseStudy

_KINDS: dict[str, Kind] = {
    PLAIN: "none", ENTROPY: "state-entropy", RANDOM: "rnd", HIDDEN: "vcse-without-values", OURS: "vcse",
}  # fmt: skip


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
        folder = self.out / self.task.short / f"{self.arm.replace(' ', '-')}-{self.seed}"
        found = kept(folder.with_suffix(".json"), lambda: self._look(folder) if self.task.pixels else self._live())
        shutil.rmtree(folder / "replay", ignore_errors=True)  # pictures of a whole life, gigabytes at full size
        return Curve(**{measure: tuple(values) for measure, values in found.items()})

    def _look(self, folder: Path) -> dict[str, list[float]]:
        """The life of an agent that sees pictures; interrupted, it goes on where it was."""
        if self.task.pixels is None:
            raise ConfigError(self.task.name, expected="an agent for pictures", got="none", fix="correct the study")
        config = replace(
            self.task.pixels, steps=self.task.steps, evaluate_every=self.task.steps // self.looks, seed=self.seed,
            evaluate_episodes=self.task.episodes, beta=self.task.beta, k=self.task.k, bonus=_KINDS[self.arm],
        )  # fmt: skip
        run = RunDirectory.create(folder, config, resume=True)
        train_pixels(self.task.name, config, run, resume=True, settings=self.task.settings, explores=config.explores())
        rows = [row for row in run.metrics() if "eval_return" in row]
        # A test is made after whole episodes: the first one at each look or behind it.
        at = [next(row for row in rows if row["step"] >= step) for step in self.steps]
        succeeded = [row["eval_success"] for row in at] if self.task.succeeds else []
        return {"returns": [row["eval_return"] for row in at], "successes": succeeded}

    def _live(self) -> dict[str, list[float]]:
        mine = agent(self.task, self.arm, self.seed)
        tests = [world(self.task) for _ in range(self.task.episodes)]
        found: dict[str, list[float]] = {"returns": [], "successes": []}
        try:
            for step in self.steps:
                mine.learn(step - mine.num_timesteps, reset_num_timesteps=False)
                returns, successes = play(mine, tests, sampled=self.task.algorithm == "a2c")
                found["returns"].append(float(np.mean(returns)))
                if self.task.succeeds:
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
        successes: share of the episodes in which the task was done; empty where a task knows no success.
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
        The returns, and whether the task was done: as it says, or else by a positive reward where it ended itself.
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
                seen[number], reward, terminated, truncated, info = worlds[number].step(action)
                returns[number] += float(reward)
                successes[number] = bool(info.get("success", terminated and float(reward) > 0))
                if not (terminated or truncated):
                    left.append(number)
            running = left
    return returns, successes
