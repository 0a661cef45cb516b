"""Plays a policy on a simulator's evaluation seeds and says how well it did, with intervals and videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from offbook.client.protocol import ObservationSpec, Policy
from offbook.data.clips import write_clip
from offbook.errors import ConfigError
from offbook.evaluate.stats import Interval, bootstrap_mean, bounded_mean, clopper_pearson
from offbook.runs.parallel import run_parallel
from offbook.runs.progress import track
from offbook.runs.seeding import evaluation_seeds
from offbook.sim.adapters import make
from offbook.sim.play import Played, play
from offbook.sim.trials import TRIAL


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """One evaluated episode.

    Attributes:
        seed: with which the environment was reset.
        return_: sum of the rewards.
        steps: its length.
        success: whether the task was done; None where the environment does not say.
        score: how well, in the environment's own measure; None where it has none.
        terminated: the task ended it, not the time.
        video: its clip, for the first few episodes.
    """

    seed: int
    return_: float
    steps: int
    success: bool | None
    score: float | None
    terminated: bool
    video: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "seed": self.seed,
            "return": self.return_,
            "steps": self.steps,
            "success": self.success,
            "score": self.score,
            "terminated": self.terminated,
            "video": None if self.video is None else str(self.video),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> EpisodeResult:
        """What `to_json` gave."""
        named = {**record, "return_": record["return"], "video": record["video"] and Path(record["video"])}
        return cls(**{name: value for name, value in named.items() if name != "return"})


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A policy's episodes on one task.

    Attributes:
        environment: the environment's id.
        settings: what it was made with.
        policy: the policy's name.
        scenes: the arrangement of each episode, where they were given.
        results: one for each seed, in the order of the seeds.
    """

    environment: str
    settings: Mapping[str, Any]
    policy: str
    scenes: tuple[Mapping[str, Any], ...] | None
    results: tuple[EpisodeResult, ...]

    @cached_property
    def summary(self) -> Mapping[str, Interval]:
        """`return`, `length` and, where known, `success` and `score`, each with its interval."""
        return summarise(self.results)

    @property
    def metric(self) -> str:
        """What the policy is judged by: its score where the task has one, else its return."""
        return "score" if "score" in self.summary else "return"

    def values(self, metric: str) -> np.ndarray:
        """One number for each episode: `score`, `return`, `success` or `length`."""
        name = {"return": "return_", "length": "steps"}.get(metric, metric)
        return np.array([getattr(result, name) for result in self.results], np.float64)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "environment": self.environment,
            "settings": dict(self.settings),
            "policy": self.policy,
            "scenes": None if self.scenes is None else [dict(scene) for scene in self.scenes],
            "summary": {name: interval.to_json() for name, interval in self.summary.items()},
            "episodes": [result.to_json() for result in self.results],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Evaluation:
        """What `to_json` gave."""
        scenes = record["scenes"]
        return cls(
            environment=record["environment"],
            settings=record["settings"],
            policy=record["policy"],
            scenes=None if scenes is None else tuple(scenes),
            results=tuple(EpisodeResult.from_json(episode) for episode in record["episodes"]),
        )


def summarise(results: Sequence[EpisodeResult]) -> dict[str, Interval]:
    """Means with 95% intervals: exact for success, by the range for scores from 0 to 1, bootstrap for the rest.

    Args:
        results: one episode or more.

    Raises:
        ConfigError: there are no episodes.

    Example:
        >>> episode = EpisodeResult(seed=1, return_=2.0, steps=10, success=True, score=None, terminated=True)
        >>> print(summarise([episode, replace(episode, success=False)])["success"])
        0.5 [0.0126, 0.987] (n=2)
    """
    summary = {}
    if all(result.success is not None for result in results):
        summary["success"] = clopper_pearson(sum(bool(result.success) for result in results), len(results))
    scores = [result.score for result in results if result.score is not None]
    if len(scores) == len(results):
        shares = min(scores) >= 0 and max(scores) <= 1
        summary["score"] = bounded_mean(scores, 0.0, 1.0) if shares else bootstrap_mean(scores)
    summary["return"] = bootstrap_mean([result.return_ for result in results])
    summary["length"] = bootstrap_mean([result.steps for result in results])
    return summary


def evaluate_policy(
    env_id: str,
    policy: Policy,
    *,
    episodes: int,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    scenes: Sequence[Mapping[str, Any]] | None = None,
    parallel: int = 8,
    jobs: int = 1,
    video_dir: Path | None = None,
    videos: int = 3,
    max_steps: int | None = None,
) -> Evaluation:
    """Plays one episode on each evaluation seed; these are never training seeds, and the same for every policy.

    Args:
        env_id: what `offbook.sim.adapters.make` takes.
        policy: who acts; its cameras decide what is drawn.
        episodes: how many, 1 or more.
        seed: from which the episodes' seeds follow.
        settings: further arguments of `make`, such as `{"split": "position"}` of `offbook:pour`.
        scenes: for each episode an arrangement, given to the environment as the reset option `scene`.
        parallel: environments that take turns in one process, so that the policy answers several at once.
        jobs: processes.
        video_dir: where clips of the first `videos` episodes go; None draws none.
        videos: how many.
        max_steps: truncates longer episodes.

    Raises:
        ConfigError: the policy does not fit the environment, or a setting is wrong.
        PolicyError: the policy gave an action that cannot be executed.

    Example:
        >>> from offbook.sim.experts import RandomPolicy
        >>> from offbook.client.protocol import ActionSpec
        >>> policy = RandomPolicy(ActionSpec(size=1, low=(-2.0,), high=(2.0,)))
        >>> evaluate_policy("gym:Pendulum-v1", policy, episodes=2, max_steps=5).summary["length"].value
        5.0
    """
    _check_counts(scenes, episodes=episodes, parallel=parallel, jobs=jobs, max_steps=max_steps)
    shards = _shards(evaluation_seeds(seed, episodes), scenes, jobs, videos if video_dir is not None else 0)
    label = f"evaluating {policy.meta.name}"
    work = partial(
        _play_shard,
        env_id=env_id,
        settings={
            **_tried_once(policy.meta.observation),
            **(settings or {}),
            **pictures_for(env_id, policy.meta.observation),
        },
        policy=policy,
        parallel=parallel,
        video_dir=video_dir,
        max_steps=max_steps,
        label="" if jobs > 1 else label,
    )
    return Evaluation(
        environment=env_id,
        settings=settings or {},
        policy=policy.meta.name,
        scenes=None if scenes is None else tuple(scenes),
        results=tuple(chain(*run_parallel(work, shards, jobs=jobs, label=label if jobs > 1 else ""))),
    )


def _check_counts(scenes: Sequence[Mapping[str, Any]] | None, *, episodes: int, **counts: int | None) -> None:
    for name, value in {"episodes": episodes, **counts}.items():
        if value is not None and value < 1:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(flag, expected="1 or more", got=str(value), fix=f"change {flag}")
    if scenes is not None and len(scenes) != episodes:
        expected = f"{episodes}, one for each episode"
        raise ConfigError("scenes", expected=expected, got=str(len(scenes)), fix="give as many")


def pictures_for(env_id: str, wanted: ObservationSpec) -> dict[str, Any]:
    """Settings of `make` under which an environment draws the camera pictures that a policy wants, and no others.

    Example:
        >>> pictures_for("offbook:pour", ObservationSpec(cameras={"front": (32, 32)}))
        {'image_size': 32}
    """
    ours = env_id.startswith("offbook:")
    sizes = [height for name, (height, _) in wanted.cameras.items() if ours or name == "image"]
    return {"image_size": max(sizes, default=0)}


def _tried_once(wanted: ObservationSpec) -> dict[str, Any]:
    """A policy that reads its trials has one in each episode, unless the settings say another number."""
    return {"trials": 1} if TRIAL in dict(wanted.state) else {}


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """The episodes that one process plays at a time.

    Attributes:
        first: number of the first of them.
        seeds: of each.
        options: for the reset of each, where scenes are given.
        videos: how many of them are filmed.
    """

    first: int
    seeds: tuple[int, ...]
    options: tuple[dict[str, Any], ...] | None
    videos: int


def _shards(seeds: Sequence[int], scenes: Sequence[Mapping[str, Any]] | None, jobs: int, videos: int) -> list[_Shard]:
    """Runs of neighbouring episodes; more than processes, for the sake of the progress bar and of uneven episodes."""
    count = 1 if jobs == 1 else min(len(seeds), 4 * jobs)
    edges = np.linspace(0, len(seeds), count + 1).astype(int).tolist()
    return [
        _Shard(
            first=first,
            seeds=tuple(seeds[first:stop]),
            options=None if scenes is None else tuple({"scene": dict(scene)} for scene in scenes[first:stop]),
            videos=max(0, videos - first),
        )
        for first, stop in pairwise(edges)
    ]


class _Filming:
    """Collects the frames of chosen episodes while they run."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._frames: dict[int, list[np.ndarray]] = {seed: [] for seed in seeds}
        self._rate = 30.0

    def __call__(self, seed: int, steps: int, env: gym.Env[Any, Any]) -> None:
        if seed not in self._frames:
            return
        picture = env.render()
        # Some environments cannot draw, and say so by None.
        if isinstance(picture, np.ndarray) and picture.ndim == 3:
            self._frames[seed].append(np.ascontiguousarray(picture[..., :3], np.uint8))
            self._rate = float(env.metadata.get("control_hz") or self._rate)

    def develop(self, seed: int, path: Path) -> Path | None:
        """Writes the clip of a finished episode and forgets its frames."""
        frames = self._frames.pop(seed, [])
        if not frames:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, np.stack(frames), self._rate)
        return path


def _play_shard(
    shard: _Shard,
    *,
    env_id: str,
    settings: Mapping[str, Any],
    policy: Policy,
    parallel: int,
    video_dir: Path | None,
    max_steps: int | None,
    label: str,
) -> list[EpisodeResult]:
    filmed = shard.seeds[: shard.videos]
    filming = _Filming(filmed)
    envs = [make(env_id, **settings) for _ in range(min(parallel, len(shard.seeds)))]
    try:
        episodes = play(
            envs,
            policy,
            shard.seeds,
            max_steps=max_steps,
            keep=False,
            options=shard.options,
            frames=filming if filmed else None,
        )
        results = []
        shown = track(episodes, label, len(shard.seeds)) if label else episodes
        for number, played in enumerate(shown, shard.first):
            video = None
            if video_dir is not None and played.seed in filmed:
                video = filming.develop(played.seed, video_dir / f"episode-{number:03d}.mp4")
            results.append(replace(_result(played), video=video))
        return results
    finally:
        for env in envs:
            env.close()


def _result(played: Played) -> EpisodeResult:
    return EpisodeResult(
        seed=played.seed,
        return_=played.return_,
        steps=played.steps,
        success=played.success,
        score=played.score,
        terminated=played.terminated,
    )
