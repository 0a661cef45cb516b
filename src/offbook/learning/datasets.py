"""Datasets that the project makes itself, so that nothing needs a download: by name, seeded, cached and resumable."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, nearest
from offbook.learning.agents import record_replay
from offbook.sim.recording import record


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """How one dataset is made.

    Attributes:
        about: what is in it.
        env_id: see `offbook.sim.adapters.make`.
        size: of the whole dataset: episodes, or steps where an agent learns.
        policy: who acts; "sac" for a soft actor-critic that learns meanwhile.
        grades: of the expert, by turns.
        rewards: whether they are kept.
        trials: how many episodes in a row are of one instance of the task.
        settings: further arguments of `make`.
        digest: of the whole dataset with seed 0, where it was made for this table.
    """

    about: str
    env_id: str
    size: int
    policy: Literal["expert", "random", "drift", "sac"] = "expert"
    grades: tuple[float, ...] = (1.0,)
    rewards: bool = True
    trials: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

    @property
    def unit(self) -> str:
        """What `size` counts."""
        return "steps" if self.policy == "sac" else "episodes"


# Of 16 trials each has two. They do not rise or fall, so that trials in order of time show no learning by accident.
_ALL_GRADES = (0.6, 0.0, 1.0, 0.3, 0.85, 0.15, 0.7, 0.45)
# Mild and grave faults by turns.
_A_QUARTER_IMPERFECT = (1.0, 1.0, 1.0, 0.6, 1.0, 1.0, 1.0, 0.3)

DATASETS: dict[str, Dataset] = {
    "pointmaze-mixed": Dataset(
        about="a point mass drives from goal to goal in a U-shaped maze: four mixtures of a planner and a random drift",
        env_id="robotics:PointMaze_UMaze-v3",
        size=667,
        grades=(1.0, 0.7, 0.4, 0.1),
        settings={"reset_target": True},
        digest="532eda006cd298f56f2bff923a5e3d2b1027bd9285b1290398181e78b23ee0f0",
    ),
    "hopper-replay": Dataset(
        about="all that a soft actor-critic lives through while it learns to hop",
        env_id="gym:Hopper-v5",
        size=150_000,
        policy="sac",
        digest="20e2261255204e98bd20a1011cc041a9b5fe8c602b99bacb0d18b07a8f2598e4",
    ),
    "walker-replay": Dataset(
        about="all that a soft actor-critic lives through while it learns to walk",
        env_id="gym:Walker2d-v5",
        size=150_000,
        policy="sac",
        digest="845eb13c0662183c711e22d4d2f6f07be8bc5b4f6f6b248ae8efa3f3ccbd8648",
    ),
    "metaworld-door": Dataset(
        about="a robot opens a door: the scripted expert at four grades of noise and of giving up",
        env_id="metaworld:door-open-v3",
        size=100,
        grades=(1.0, 0.75, 0.5, 0.25),
        digest="8c65367bc94412f5bec3513b6f83f5ff798b8055a1aeede44f7ea2ca7cb9c8c0",
    ),
    "minigrid-bot": Dataset(
        about="find the key, open the door, reach the goal: a planner with a narrow view, at four rates of mistakes",
        env_id="minigrid:MiniGrid-DoorKey-8x8-v0",
        size=1000,
        grades=(1.0, 0.9, 0.7, 0.5),
        digest="539d2571adfa105e15e2b395119066100b6881f5bc2f3db351e8fc28b463fc3d",
    ),
    "pour-mixed": Dataset(
        about="an arm pours grains into a bowl: the scripted expert, every second episode with faults",
        env_id="offbook:pour",
        size=200,
        grades=(1.0, 0.6, 1.0, 0.3),
        digest="72757792ea045a2325c846e1839661886fc52c038a23abe88ba1409d118ed28e",
    ),
    "toto-pour": Dataset(
        about="TOTO's pouring task: the scripted expert, every fourth episode with faults",
        env_id="offbook:pour",
        size=300,
        grades=_A_QUARTER_IMPERFECT,
        digest="b65182246896e0174b51b4ecf14abb2857c38337a42f32bd92977cc964c5ac6e",
    ),
    "toto-scoop": Dataset(
        about="TOTO's scooping task, likewise",
        env_id="offbook:scoop",
        size=300,
        grades=_A_QUARTER_IMPERFECT,
        digest="0d76324af01d3f8ad2abd9be216b470a0bbf4702367d0034bc08506b1f34e8c3",
    ),
    "walker-explore": Dataset(
        about="a planar walker under slowly drifting random actions, without rewards; keeps the state of the physics",
        env_id="dmc:walker-walk",
        size=100,
        policy="drift",
        rewards=False,
        settings={"physics": True},
        digest="caa4a32a2d6a4c6ad2e9750af3dee792f5dee4344b70ba2d492f179779d60c73",
    ),
    "darkpoint": Dataset(
        about="a point heads for a goal that it cannot see: 2,000 goals, 16 trials of each by guides of eight grades",
        env_id="offbook:darkpoint",
        size=32_000,
        grades=_ALL_GRADES,
        trials=16,
        digest="08627a5088114b5927ac6e3916efb723f08926f917182cd46c5f1a9948cf9466",
    ),
    "darkpoint-fixed": Dataset(
        about="the same with one goal for all, so that no trial reveals anything",
        env_id="offbook:darkpoint",
        size=32_000,
        grades=_ALL_GRADES,
        trials=16,
        settings={"goal": "fixed"},
        digest="2d8a0ac4ddaa315724e3b9b3b63bad8840eba7aa927fee9c82bd7fbd2d3995ff",
    ),
    "keyed-door": Dataset(
        about="a search for a key and a door: 1,000 rooms, 16 trials of each by guides of eight grades",
        env_id="offbook:keyed-door",
        size=16_000,
        grades=_ALL_GRADES,
        trials=16,
        digest="8afee73f7e48917fd9f8cc43ccf380775308d152df6bbaa78fe8a0c0e9b90938",
    ),
}
"""The datasets by name."""


def cache_folder() -> Path:
    """Where datasets are kept: `$OFFBOOK_CACHE`, else `offbook` in the user's cache folder (`$XDG_CACHE_HOME`)."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("OFFBOOK_CACHE") or Path(home) / "offbook")


def generate(
    name: str, out: str | Path | None = None, *, seed: int = 0, size: int | None = None, jobs: int = 1
) -> EpisodeStore:
    """Makes a dataset, or goes on with one, or gives the one that is there.

    Args:
        name: one of `DATASETS`.
        out: folder of the store; by default in `cache_folder()`, by name, seed and size.
        seed: of everything random; 0 is the dataset that results are stated for.
        size: episodes or steps, instead of the whole dataset's.
        jobs: worker processes, where episodes do not depend on one another.

    Raises:
        ConfigError: there is no such dataset, or the folder holds another recording.
        DataError: the one that is there is damaged.
        MissingExtraError: a package that it needs is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     store = generate("minigrid-bot", f"{folder}/bot", size=4)
        ...     len(store), store.episodes["source"].tolist()
        (4, ['expert:1', 'expert:0.9', 'expert:0.7', 'expert:0.5'])
    """
    if name not in DATASETS:
        where, fix = f"dataset {name!r}", nearest(name, DATASETS)
        raise ConfigError(where, expected="one that offbook makes", got="an unknown name", fix=fix)
    made = DATASETS[name]
    if size is not None and size < 1:
        raise ConfigError("--size", expected=f"1 or more {made.unit}", got=str(size), fix="ask for more, or for all")
    size = made.size if size is None else size
    out = Path(out) if out else cache_folder() / "datasets" / f"{name}-{size}-seed{seed}"
    out.parent.mkdir(parents=True, exist_ok=True)
    if made.policy == "sac":
        store = record_replay(made.env_id, size, out, seed=seed, settings=made.settings)
    else:
        store = record(
            made.env_id,
            size,
            out,
            policy=made.policy,
            grades=made.grades,
            seed=seed,
            jobs=jobs,
            rewards=made.rewards,
            trials=made.trials,
            settings=made.settings,
        )
    store.verify()
    return store
