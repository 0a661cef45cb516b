"""The trainings of a study: each alone, in a folder from which it goes on, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from offbook.client.protocol import Policy
from offbook.data.store import EpisodeStore
from offbook.learning.cloning import CloningConfig, train_cloning
from offbook.learning.encoding import through
from offbook.learning.hindsight_training import HindsightConfig, train_hindsight
from offbook.learning.masked_training import MtmConfig, train_mtm
from offbook.learning.offline import OfflineConfig, train_offline
from offbook.learning.policies import load_policy
from offbook.learning.vinn import VinnConfig, train_vinn
from offbook.runs.directory import RunDirectory, write_atomic
from offbook.runs.parallel import run_parallel

LEARNERS: dict[type, Callable[..., Policy]] = {
    CloningConfig: train_cloning,
    HindsightConfig: train_hindsight,
    MtmConfig: train_mtm,
    OfflineConfig: train_offline,
    VinnConfig: train_vinn,
}
"""Settings -> what learns a policy by them."""


@runtime_checkable
class Training(Protocol):
    """What `fit_all` trains."""

    def fit(self) -> object:
        """Trains it, or goes on with that, or gives what is there."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The training of a policy.

    Attributes:
        store: folder of the recordings.
        config: how it learns, settings of one of the `LEARNERS`.
        folder: of the run.
        encoder: through which it sees, a run or a file; None to see what was recorded.
    """

    store: Path
    config: Any
    folder: Path
    encoder: Path | None = None

    def fit(self) -> Policy:
        """Trains it, or goes on with that, or reads what is there."""
        done = self.folder / "done"
        run, train = RunDirectory.create(self.folder, self.config, resume=True), LEARNERS[type(self.config)]
        if done.exists():
            return load_policy(self.folder)
        store, config = EpisodeStore.open(self.store), self.config
        if self.encoder is not None:
            store, config, train = through(self.encoder, store, config, train)
        policy = train(store, config, run, resume=True)
        write_atomic(done, "")
        return policy


def _fit(training: Training) -> None:
    training.fit()


def fit_all(trainings: Sequence[Training], jobs: int) -> None:
    """Trains all of them, several at a time."""
    for _ in run_parallel(_fit, trainings, jobs=jobs, label="training"):
        pass
