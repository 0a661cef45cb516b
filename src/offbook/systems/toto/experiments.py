"""What the reproduction trains and plays: each piece alone, in a folder from which it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offbook.data.store import EpisodeStore
from offbook.evaluate.rollout import Evaluation, evaluate_policy
from offbook.learning.arms import Arm
from offbook.learning.encoding import encoded_store
from offbook.learning.self_supervised import EncoderConfig, train_encoder
from offbook.models.encoders import load_encoder
from offbook.runs.directory import RunDirectory, kept
from offbook.runs.parallel import run_all
from offbook.sim.adapters import make
from offbook.sim.experts import make_expert, random_policy

# Worlds that take turns, each with a canvas of its own.
_AT_ONCE = 12


@dataclass(frozen=True, kw_only=True)
class Eyes:
    """The training of an encoder, and its features of all recordings.

    Attributes:
        store: folder of the recordings.
        config: how it learns.
        folder: of the run.
    """

    store: Path
    config: EncoderConfig
    folder: Path

    def fit(self) -> None:
        """Trains it, or goes on with that; makes the features that are not there yet."""
        store, run = EpisodeStore.open(self.store), RunDirectory.create(self.folder, self.config, resume=True)
        train_encoder(store, self.config, run, resume=True)
        # As policies will read it: a file gives the digest by which features are found again.
        encoded_store(store, load_encoder(self.folder), self.config.cameras)


@dataclass(frozen=True, kw_only=True)
class Play:
    """Episodes of a policy on one split.

    Attributes:
        policy: whose policy; or `expert`, or another word for random actions.
        folder: where the result is kept.
        task: the environment.
        split: of the task.
        episodes: how many.
    """

    policy: Arm | str
    folder: Path
    task: str
    split: str
    episodes: int

    def played(self) -> Evaluation:
        """The episodes, on seeds that are the same for all policies and for no training."""
        return Evaluation.from_json(kept(self.folder / f"{self.split}-{self.episodes}.json", self._play))

    def _play(self) -> dict[str, object]:
        settings = {"split": self.split}
        if isinstance(self.policy, Arm):
            policy = self.policy.fit()
        elif self.policy == "expert":
            policy = make_expert(self.task)
        else:
            env = make(self.task, image_size=0)
            policy = random_policy(env)
            env.close()
        return evaluate_policy(
            self.task, policy, episodes=self.episodes, settings=settings, parallel=_AT_ONCE
        ).to_json()  # fmt: skip


def _played(play: Play) -> Evaluation:
    return play.played()


def play_all(plays: Sequence[Play], jobs: int) -> dict[Play, Evaluation]:
    """The episodes of all of them, several policies at a time."""
    return run_all(_played, plays, jobs=jobs, label="playing")
