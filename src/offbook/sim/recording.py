"""Recording episodes of a scripted or random policy into a store: in parallel, and resumable after a crash."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from offbook.data.store import EpisodeStore, Schema, Writer
from offbook.errors import ConfigError
from offbook.runs.parallel import run_parallel
from offbook.runs.progress import track
from offbook.runs.seeding import generator, training_seeds
from offbook.sim.adapters import AnyEnv, make
from offbook.sim.experts import make_expert, random_policy
from offbook.sim.play import Played, play
from offbook.sim.spaces import REWARD, schema_for

_SOURCES = {"expert": "scripted expert", "random": "random", "drift": "drifting random actions"}
Behaviour = Literal["expert", "random", "drift"]
_BLOCK = 4  # episodes between two appends: little is lost by a crash, and little time with making environments


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What makes a recording the same recording: everything that the episodes depend on, except how many there are."""

    env_id: str
    policy: str
    grades: tuple[float, ...]
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    rewards: bool = True
    trials: int = 1

    def to_json(self) -> dict[str, Any]:
        said = {"policy": self.policy, "grades": [*self.grades], "seed": self.seed, "settings": dict(self.settings)}
        # What is as usual is not said, so that recordings of before these were settings can be continued.
        unusual = ({} if self.rewards else {"rewards": False}) | ({} if self.trials == 1 else {"trials": self.trials})
        return said | unusual

    def grade(self, number: int) -> float:
        return self.grades[number % len(self.grades)]

    def world_seed(self, number: int) -> int:
        return training_seeds(self.seed, 1, start=number // self.trials)[0]

    def policy_seed(self, number: int) -> int:
        # Trials of one instance have one session name, and shall differ nevertheless.
        return self.seed if self.trials == 1 else int(generator(self.seed, "trial", number).integers(2**31))


def record(
    env_id: str,
    episodes: int,
    out: str | Path,
    *,
    policy: Behaviour = "expert",
    grades: Sequence[float] = (1.0,),
    seed: int = 0,
    jobs: int = 1,
    rewards: bool = True,
    trials: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> EpisodeStore:
    """Records episodes of an environment until the store holds as many as are wanted.

    Episode i has the i-th of the training seeds and is appended as the i-th, so the store's digest depends neither on
    `jobs` nor on interruptions. Killed at any moment, it goes on where it stopped when called again; what is lost of
    several trials is at most those of one instance.

    Args:
        env_id: see `offbook.sim.adapters.make`.
        episodes: how many the store shall hold at the end.
        out: folder of the store.
        policy: the environment's scripted expert, random actions, or ones that change slowly and so lead further away.
        grades: of the expert, see `make_expert`; episode i has the grade `grades[i % len(grades)]`, so that
            `(1.0, 1.0, 1.0, 0.5)` makes every fourth episode an imperfect one.
        seed: seed of the recording.
        jobs: worker processes.
        rewards: False leaves them out, as in recordings that no task was in view for.
        trials: how many episodes in a row are of one instance of the task: they have the same seed, the i // trials-th,
            and differ by their grades and by what the policy draws.
        settings: further arguments of `make`.

    Raises:
        ConfigError: a setting is wrong, or the existing store is of another recording.
        DataError: the folder is no store, or in use by another process.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     store = record("gym:Pendulum-v1", 1, Path(folder) / "swings", policy="random")
        ...     len(store), store.steps
        (1, 200)
    """
    if episodes < 1:
        raise ConfigError("--episodes", expected="1 or more", got=str(episodes), fix="ask for an episode")
    if policy not in _SOURCES:
        raise ConfigError("--policy", expected=", ".join(_SOURCES), got=repr(policy), fix="choose one of them")
    if not grades:
        raise ConfigError("--grades", expected="one or more", got="none", fix="give a grade such as 1.0")
    if trials < 1:
        raise ConfigError("trials", expected="1 or more of each instance", got=str(trials), fix="ask for a trial")
    turns = tuple(float(grade) for grade in grades) if policy == "expert" else (1.0,)
    plan = _Plan(
        env_id=env_id,
        policy=policy,
        grades=turns,
        seed=seed,
        settings=dict(settings or {}),
        rewards=rewards,
        trials=trials,
    )
    with open_recording(Path(out), env_id, plan.to_json(), functools.partial(_schema, plan)) as writer:
        numbers = range(len(writer), episodes)
        size = max(_BLOCK, trials)
        blocks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        played = itertools.chain.from_iterable(run_parallel(functools.partial(_play_block, plan), blocks, jobs=jobs))
        for number, episode in zip(track(numbers, f"recording {env_id}"), played, strict=True):
            _append(writer, plan, number, episode)
    return EpisodeStore.open(out)


def open_recording(out: Path, env_id: str, plan: Mapping[str, Any], schema: Callable[[], Schema]) -> Writer:
    """The store of a recording, opened for appending; made if it is not there.

    Args:
        out: folder of the store.
        env_id: environment of the recording.
        plan: JSON-able; all that the episodes depend on, except how many there are.
        schema: called for a new store; the plan is put into its `extra["recording"]`.

    Raises:
        ConfigError: the folder holds another recording.
    """
    if not (out / "store.json").exists():
        fresh = schema()
        return EpisodeStore.create(out, replace(fresh, extra={**fresh.extra, "recording": dict(plan)}))
    found = EpisodeStore.open(out).schema
    before = {"environment": found.environment, **dict(found.extra.get("recording", {}))}
    now = {"environment": env_id, **plan}
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            expected = f"{now.get(key)!r}, as this recording has it"
            fix = "record into another folder, or repeat the settings of the first time"
            raise ConfigError(f"{out}, {key}", expected=expected, got=f"a store with {before.get(key)!r}", fix=fix)
    return EpisodeStore.append_to(out)


def _schema(plan: _Plan) -> Schema:
    with closing(make(plan.env_id, **plan.settings)) as env:
        # What has no expert, or cannot be drawn here, is refused before a store is made.
        _policy(plan, env, 0)
        env.reset(seed=plan.world_seed(0))
        return schema_for(env, plan.env_id, source=_SOURCES[plan.policy])


def _policy(plan: _Plan, env: AnyEnv, number: int) -> Any:
    if plan.policy == "expert":
        return make_expert(plan.env_id, plan.grade(number), plan.policy_seed(number), plan.settings)
    return random_policy(env, plan.policy_seed(number), memory=0.96 if plan.policy == "drift" else 0.0)


def _play_block(plan: _Plan, block: range) -> list[Played]:
    """Plays the episodes with the numbers in the block."""
    with closing(make(plan.env_id, **plan.settings)) as env:
        return [
            episode
            for number in block
            for episode in play([env], _policy(plan, env, number), [plan.world_seed(number)])
        ]


def _append(writer: Writer, plan: _Plan, number: int, episode: Played) -> None:
    writer.append(
        episode.fields if plan.rewards else {**episode.fields, REWARD: None},
        terminated=episode.terminated,
        truncated=episode.truncated,
        task=plan.env_id,
        source=f"expert:{plan.grade(number):g}" if plan.policy == "expert" else plan.policy,
        seed=episode.seed,
        success=episode.success,
        score=episode.score,
        # To wait for the disk at each tiny episode would take longer than to play it.
        sync=(number + 1) % plan.trials == 0,
    )
