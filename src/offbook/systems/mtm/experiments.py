"""What the reproduction trains and plays: each piece alone, in a folder from which it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from offbook.client.protocol import Policy, PolicyMeta
from offbook.data.splits import read_splits, write_splits
from offbook.data.store import EpisodeStore
from offbook.evaluate.rollout import evaluate_policy
from offbook.learning import arms
from offbook.learning.hindsight_training import HindsightConfig
from offbook.learning.masked_roles import RolePolicy
from offbook.learning.masked_training import MtmConfig, train_mtm, trajectories
from offbook.learning.offline import OfflineConfig
from offbook.learning.specialists import Specialist, SpecialistConfig, SpecialistPolicy, train_specialist
from offbook.learning.trajectories import Trajectories
from offbook.runs.directory import RunDirectory, kept
from offbook.runs.parallel import run_all
from offbook.systems.mtm.card import role_card

Config = MtmConfig | SpecialistConfig | OfflineConfig | HindsightConfig


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training.

    Attributes:
        store: folder of the recordings.
        model: what of them is looked at, also for specialists.
        config: what is trained.
        folder: of the run.
    """

    store: Path
    model: MtmConfig
    config: Config
    folder: Path

    def data(self) -> Trajectories:
        """What is learnt from."""
        return trajectories(EpisodeStore.open(self.store), self.model)

    def fit(self) -> RolePolicy | Specialist | Policy:
        """Trains it, or goes on with that, or gives what is there."""
        if isinstance(self.config, OfflineConfig | HindsightConfig):
            return arms.Arm(store=self.store, config=self.config, folder=self.folder).fit()
        run = RunDirectory.create(self.folder, self.config, resume=True)
        if isinstance(self.config, SpecialistConfig):
            return train_specialist(self.data(), self.config, run, resume=True)
        return train_mtm(EpisodeStore.open(self.store), self.config, run, resume=True)

    def policy(self, role: str = "", target: float = 1.0) -> Policy:
        """What plays: the model in a role, or the specialist, aiming at a share of the range of returns."""
        found = self.fit()
        if isinstance(found, RolePolicy):
            return found.in_role(role, target)
        if not isinstance(found, Specialist):
            return found
        data = self.data()
        if data.action is None or data.return_range is None:
            raise TypeError("policies need actions, and these returns")
        low, high = data.return_range
        goal = low + target * (high - low) if found.config.role == "rcbc" else None
        meta = PolicyMeta(name=self.folder.name, observation=data.observation, action=data.action)
        return SpecialistPolicy(found, meta, goal)


def errors(arm: Arm, others: Mapping[str, Arm]) -> dict[str, dict[str, float]]:
    """The role card of a model, with specialists beside it: mean errors by role and by who tells."""

    def make() -> dict[str, dict[str, float]]:
        model = arm.fit()
        if not isinstance(model, RolePolicy):
            raise TypeError("a role card is of a masked trajectory model")
        trained = {name: other.fit() for name, other in others.items()}
        experts = {name: expert for name, expert in trained.items() if isinstance(expert, Specialist)}
        rows = role_card(model.module, arm.data(), experts)
        return {row.role: {name: error.value for name, error in row.errors.items()} for row in rows}

    return kept(arm.folder / "card.json", make)


@dataclass(frozen=True, kw_only=True)
class Play:
    """Episodes of a policy.

    Attributes:
        arm: whose policy.
        task: the environment.
        episodes: how many.
        role: that a model plays.
        target: share of the range of returns that it aims at.
    """

    arm: Arm
    task: str
    episodes: int
    role: str = "bc"
    target: float = 1.0

    def returns(self) -> list[float]:
        """The return of each episode, on seeds that are the same for all policies and for no training."""
        name = f"{self.role}-{self.target:g}.json"
        return kept(self.arm.folder / "returns" / name, partial(self._play))

    def _play(self) -> list[float]:
        policy = self.arm.policy(self.role, self.target)
        found = evaluate_policy(self.task, policy, episodes=self.episodes, parallel=self.episodes)
        return [float(value) for value in found.values("return")]


def _returns(play: Play) -> list[float]:
    return play.returns()


def play_all(plays: Sequence[Play], jobs: int) -> dict[Play, list[float]]:
    """The returns of all of them, several policies at a time."""
    return run_all(_returns, plays, jobs=jobs, label="playing")


def without_actions(store: EpisodeStore, share: float, seed: int, out: Path) -> tuple[Path, Path]:
    """Copies of recordings in which only few of the training episodes have actions.

    Args:
        store: the recordings, with groups of episodes.
        share: of the training episodes that keep their actions.
        seed: which ones.
        out: where the copies go.

    Returns:
        A store of all episodes, where the others have no actions, and one of those few; the held-out ones, with their
        actions, are in both.
    """
    groups = read_splits(store)
    train, held = (groups[name] for name in ("train", "held_out"))
    order = np.random.default_rng([seed, 20_230_504]).permutation(train)
    few = np.sort(order[: max(2, round(share * len(train)))])
    paths = out / f"{store.path.name}-without-actions-{seed}", out / f"{store.path.name}-few-{seed}"
    for path, chosen in zip(paths, (np.arange(len(store)), np.union1d(few, held)), strict=True):
        if path.exists() and read_splits(EpisodeStore.open(path)):
            continue
        shutil.rmtree(path, ignore_errors=True)  # what an interruption left
        with EpisodeStore.create(path, replace(store.schema, extra={})) as writer:
            for number in chosen.tolist():
                episode = store.episode(number)
                fields: dict[str, Any] = dict(episode.fields)
                if number in train and number not in few:
                    fields |= dict.fromkeys(store.schema.actions)
                writer.append(fields, terminated=episode.terminated, truncated=episode.truncated, sync=False)
        made = EpisodeStore.open(path)
        write_splits(
            made, {"train": np.flatnonzero(np.isin(chosen, train)), "held_out": np.flatnonzero(np.isin(chosen, held))}
        )
    return paths
