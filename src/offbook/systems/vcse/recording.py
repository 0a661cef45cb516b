"""What an exploring agent lives through, as recordings: without a task in view, they serve every task later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from offbook.data.returns import PHYSICS
from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, needs_extra
from offbook.runs.progress import track
from offbook.runs.seeding import training_seeds
from offbook.sim.adapters import AnyEnv, make
from offbook.sim.play import Played
from offbook.sim.recording import open_recording
from offbook.sim.spaces import ACTION, REWARD, flatten, from_env_action, observation_leaves, schema_for
from offbook.systems.vcse.bonus import RND, VCSE, Bonus, StateEntropy
from offbook.systems.vcse.encoders import Identity
from offbook.systems.vcse.sb3 import explore

with needs_extra("rl"):
    from stable_baselines3 import SAC

Kind = Literal["state-entropy", "rnd", "vcse"]

_NEIGHBOUR = 12
_STEPS = 1_000  # between two signs of life


class Recorder(gym.Wrapper[Any, Any, Any, Any]):
    """Hands each whole episode on, for any agent of any library; the n-th begins with the n-th seed of training.

    Args:
        env: an environment from `make`.
        seed: of the worlds.
        keep: gets the episodes, in order; one that is not over when the agent stops is not among them.

    Attributes:
        episodes: handed on so far.
        steps: of these.
    """

    def __init__(self, env: AnyEnv, seed: int, keep: Callable[[Played], None]) -> None:
        super().__init__(env)
        self._seed, self._keep = seed, keep
        self.episodes = self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins the next episode; another seed than its own is not listened to."""
        del seed
        self._own = training_seeds(self._seed, 1, start=self.episodes)[0]
        observation, info = self.env.reset(seed=self._own, options=options)
        self._seen = [flatten(self.env.observation_space, observation)]
        self._actions: list[np.ndarray] = []
        self._rewards: list[float] = []
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One control step; after an episode's last one it is handed on."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._seen.append(flatten(self.env.observation_space, observation))
        self._actions.append(from_env_action(self.env.action_space, action))
        self._rewards.append(float(reward))
        if terminated or truncated:
            rewards = np.array(self._rewards)
            fields = {name: np.stack([one[name] for one in self._seen]) for name in self._seen[0]}
            played = Played(
                seed=self._own, fields={**fields, ACTION: np.stack(self._actions), REWARD: rewards}, rewards=rewards,
                terminated=terminated, truncated=truncated and not terminated, success=info.get("success"),
                score=info.get("score"),
            )  # fmt: skip
            self.episodes, self.steps = self.episodes + 1, self.steps + len(rewards)
            self._keep(played)
        return observation, reward, terminated, truncated, info


def record_exploration(
    env_id: str,
    steps: int,
    out: str | Path,
    *,
    bonus: Kind = "state-entropy",
    with_reward: bool = False,
    beta: float = 1.0,
    seed: int = 0,
) -> EpisodeStore:
    """Lets a soft actor-critic explore and records its episodes, from the first random ones on.

    Without the task's reward it learns from the bonus alone, and the recordings have no rewards: those of any task of
    the same body can be added by `offbook.sim.rewards.add_rewards`, for which the state of the physics of the DeepMind
    control suite is kept (the agent does not see it). Called again after an interruption, the agent lives its life from
    the beginning, and ends with the store that it would have had.

    Args:
        env_id: a task with numbers as observations and continuous actions, such as `"dmc:walker-walk"`.
        steps: of the environment, at least; the last episode is finished.
        out: folder of the store.
        bonus: what it explores by; "vcse" looks at what the task is worth, and so needs the reward.
        with_reward: whether it learns from the task's reward too; then rewards are kept.
        beta: weight of the bonus.
        seed: of weights, exploration and worlds.

    Raises:
        ConfigError: a setting or the task does not fit, or the folder holds another recording.
        MissingExtraError: Stable-Baselines3 is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     store = record_exploration("gym:Pendulum-v1", 200, f"{folder}/swings")
        ...     len(store), store.steps, "reward" in store.episode(0).fields
        (1, 200, False)
    """
    _check(steps, bonus, with_reward, beta, seed)
    settings = {"physics": True} if env_id.startswith("dmc:") else {}
    plan = {"policy": f"sac, {bonus}", "beta": beta, "with_reward": with_reward, "seed": seed, "settings": settings}
    with closing(make(env_id, **settings)) as env:
        _check_world(env, env_id)
        schema = partial(schema_for, env, env_id, source=f"soft actor-critic that explores by {bonus}")
        with open_recording(Path(out), env_id, plan, schema) as writer:
            known = EpisodeStore.open(out)
            if known.steps >= steps:
                return known

            def keep(played: Played) -> None:
                if recorder.episodes > len(known):  # of what an interrupted life left, no episode twice
                    writer.append(
                        played.fields if with_reward else {**played.fields, REWARD: None},
                        terminated=played.terminated, truncated=played.truncated, task=env_id, source=bonus,
                        seed=played.seed, success=played.success, score=played.score,
                    )  # fmt: skip

            recorder = Recorder(env, seed, keep)
            agent = _agent(recorder, bonus, with_reward, beta, seed)
            for _ in track(_live(agent, recorder, steps), f"exploring {env_id}", total=-(-steps // _STEPS)):
                pass
    return EpisodeStore.open(out)


def _live(agent: Any, recorder: Recorder, steps: int) -> Iterator[None]:
    """Until so many steps are recorded; gives a sign now and then."""
    while recorder.steps < steps:
        agent.learn(min(_STEPS, steps - recorder.steps), reset_num_timesteps=False)
        yield


def _check(steps: int, bonus: str, with_reward: bool, beta: float, seed: int) -> None:
    if steps < 1:
        raise ConfigError("--steps", expected="1 or more", got=str(steps), fix="ask for more steps")
    if bonus not in ("state-entropy", "rnd", "vcse"):
        fix = "choose one of them"
        raise ConfigError("--bonus", expected="state-entropy, rnd or vcse", got=repr(bonus), fix=fix)
    if bonus == "vcse" and not with_reward:
        fix = "add --with-reward, or explore by state-entropy"
        raise ConfigError("--bonus vcse", expected="the task's reward, which values are of", got="none", fix=fix)
    if not 0 <= beta < float("inf"):
        raise ConfigError("--beta", expected="a number, 0 or more", got=str(beta), fix="choose another weight")
    training_seeds(seed, 1)  # which refuses what is no seed


def _check_world(env: AnyEnv, env_id: str) -> None:
    cameras = [leaf.name for leaf in observation_leaves(env.observation_space) if leaf.camera]
    if cameras or not isinstance(env.action_space, spaces.Box):
        got = f"a camera {cameras[0]!r}" if cameras else f"actions {env.action_space}"
        expected, fix = "numbers as observations and continuous actions", "choose another task"
        raise ConfigError(env_id, expected=expected, got=got, fix=fix)


def _agent(recorder: Recorder, kind: Kind, with_reward: bool, beta: float, seed: int) -> Any:
    """Half as wide as usual, to finish on a processor."""
    world: AnyEnv = recorder
    if isinstance(recorder.observation_space, spaces.Dict):
        shown = [name for name in recorder.observation_space.spaces if name != PHYSICS]
        world = gym.wrappers.FilterObservation(recorder, shown)
    world = gym.wrappers.FlattenObservation(world)
    if not with_reward:
        world = gym.wrappers.TransformReward(world, lambda _: 0.0)
    size = spaces.flatdim(world.observation_space)
    bonus: Bonus = RND(size, seed=seed) if kind == "rnd" else StateEntropy(_NEIGHBOUR)
    if kind == "vcse":
        bonus = VCSE(_NEIGHBOUR)
    algorithm = explore(SAC, bonus, beta=beta, encoder=Identity(scale=1 / size), seed=seed)
    first = training_seeds(seed, 1)[0]
    return algorithm("MlpPolicy", world, seed=first, device="cpu", policy_kwargs={"net_arch": [128, 128]})
