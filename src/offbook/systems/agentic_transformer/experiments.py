"""What the reproduction tries: each piece alone, kept in the folder of its policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from offbook.evaluate.groups import Groups, evaluate_trials
from offbook.learning.arms import Arm
from offbook.learning.trying import HindsightPolicy
from offbook.runs.directory import kept
from offbook.runs.parallel import run_all


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
        path = self.arm.folder / f"groups-{self.groups}-{self.trials}-{self.fresh}.json"
        return Groups.from_json(kept(path, self._play))

    def _play(self) -> dict[str, Any]:
        policy = self.arm.fit()
        return evaluate_trials(
            self.task, policy, trials=self.trials, groups=self.groups, settings=json.loads(self.settings),
            parallel=self.groups, foreign=self.foreign and isinstance(policy, HindsightPolicy), fresh=self.fresh,
        ).to_json()  # fmt: skip


def _played(one: Try) -> Groups:
    return one.played()


def try_all(tries: Sequence[Try], jobs: int) -> dict[Try, Groups]:
    """The groups of all of them, several policies at a time."""
    return run_all(_played, tries, jobs=jobs, label="trying")
