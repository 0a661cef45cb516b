"""What the reproduction trains and tries: each piece alone, in a folder from which it goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offbook.client.protocol import Policy
from offbook.data.store import EpisodeStore
from offbook.evaluate.groups import Groups, evaluate_trials
from offbook.learning.cloning import CloningConfig, train_cloning
from offbook.learning.hindsight_training import HindsightConfig, train_hindsight
from offbook.learning.offline import OfflineConfig, train_offline
from offbook.learning.trying import HindsightPolicy
from offbook.runs.directory import RunDirectory, write_atomic
from offbook.runs.parallel import run_parallel

Config = HindsightConfig | OfflineConfig | CloningConfig


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training.

    Attributes:
        store: folder of the recordings.
        config: what is trained.
        folder: of the run.
    """

    store: Path
    config: Config
    folder: Path

    def fit(self) -> Policy:
        """Trains it, or goes on with that, or gives what is there."""
        run, store = RunDirectory.create(self.folder, self.config, resume=True), EpisodeStore.open(self.store)
        if isinstance(self.config, OfflineConfig):
            return train_offline(store, self.config, run, resume=True)
        if isinstance(self.config, CloningConfig):
            return train_cloning(store, self.config, run, resume=True)
        return train_hindsight(store, self.config, run, resume=True)


def _fit(arm: Arm) -> None:
    arm.fit()


def fit_all(arms: Sequence[Arm], jobs: int) -> None:
    """Trains all of them, several at a time."""
    for _ in run_parallel(_fit, arms, jobs=jobs, label="training"):
        pass


@dataclass(frozen=True, kw_only=True)
class Try:
    """Groups of trials of a policy.

    Attributes:
        arm: whose policy.
        task: the environment.
        settings: of it, as JSON text, so that equal tries are equal keys.
        trials: in a group.
        groups: how many.
        fresh: further trials that know nothing of one another.
        foreign: whether the last trial is played with another group's earlier ones as well.
    """

    arm: Arm
    task: str
    settings: str = "{}"
    trials: int = 4
    groups: int = 64
    fresh: int = 0
    foreign: bool = True

    def played(self) -> Groups:
        """The groups, on seeds that are the same for all policies and for no training."""
        settings = json.loads(self.settings)
        path = self.arm.folder / f"groups-{self.groups}-{self.trials}-{self.fresh}.json"
        if path.exists():
            return Groups.from_json(json.loads(path.read_bytes()))
        policy = self.arm.fit()
        found = evaluate_trials(
            self.task, policy, trials=self.trials, groups=self.groups, settings=settings, parallel=self.groups,
            foreign=self.foreign and isinstance(policy, HindsightPolicy), fresh=self.fresh,
        )  # fmt: skip
        write_atomic(path, json.dumps(found.to_json()) + "\n")
        return found


def _played(one: Try) -> Groups:
    return one.played()


def try_all(tries: Sequence[Try], jobs: int) -> dict[Try, Groups]:
    """The groups of all of them, several policies at a time."""
    return dict(zip(tries, run_parallel(_played, tries, jobs=jobs, label="trying"), strict=True))
