"""The one loop in which policies meet environments: recording, evaluation and demonstrations all run it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from jaxtyping import Float64

from offbook.client.protocol import Observation, Policy, check_chunk, check_fit
from offbook.errors import ConfigError
from offbook.sim.spaces import (
    ACTION,
    REWARD,
    action_spec,
    flatten,
    from_env_action,
    observation_spec,
    state_vector,
    to_env_action,
)

Frames = Callable[[int, int, gym.Env[Any, Any]], None]
"""Called after each reset and step with the seed, the number of steps done and the environment: to draw videos."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """One episode.

    Attributes:
        seed: with which the environment was reset.
        fields: what an episode store holds: observation leaves with T + 1 rows, `action` and `reward` with T; empty
            when the loop was told not to keep them.
        rewards: shape (T,).
        terminated: the task ended itself.
        truncated: the time was up.
        success: whether the task was done, as the last step said; None where the environment does not say.
        score: how well, as the last step said; None where the environment does not say.
    """

    seed: int
    fields: Mapping[str, np.ndarray]
    rewards: Float64[np.ndarray, " steps"]
    terminated: bool
    truncated: bool
    success: bool | None
    score: float | None

    @property
    def steps(self) -> int:
        """Number T of steps."""
        return len(self.rewards)

    @property
    def return_(self) -> float:
        """Sum of the rewards."""
        return float(self.rewards.sum())


@dataclass
class _Session:
    """An episode in the making."""

    env: gym.Env[Any, Any]
    number: int
    seed: int
    leaves: dict[str, np.ndarray]
    observations: list[dict[str, np.ndarray]] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    chunk: list[np.ndarray] = field(default_factory=list)

    @property
    def name(self) -> str:
        # The seed alone: what a policy draws per session then does not depend on who else is playing.
        return str(self.seed)


def play(
    envs: Sequence[gym.Env[Any, Any]],
    policy: Policy,
    seeds: Sequence[int],
    *,
    max_steps: int | None = None,
    keep: bool = True,
    options: Sequence[dict[str, Any] | None] | None = None,
    frames: Frames | None = None,
) -> Iterator[Played]:
    """Plays one episode for each seed, several at a time, and yields them in the order of the seeds.

    The environments take turns; observations of all those whose chunk of actions is used up are answered by one call
    of the policy. Every action of a chunk is executed. The result does not depend on the number of environments,
    except for a policy whose answers depend on the size of its batch.

    Args:
        envs: equal environments from `make`; they stay open.
        policy: who acts.
        seeds: different seeds, one for each episode.
        max_steps: truncates longer episodes.
        keep: whether to keep observations and actions.
        options: for each seed what `env.reset` gets as options.
        frames: watches, see `Frames`.

    Raises:
        ConfigError: the policy does not fit the environments, or the arguments do not agree.
        PolicyError: the policy gave something that cannot be executed.

    Example:
        >>> from offbook.sim.adapters import make
        >>> from offbook.sim.experts import make_expert
        >>> env = make("offbook:pour", image_size=0)
        >>> [played] = play([env], make_expert("offbook:pour"), seeds=[3])
        >>> played.score, played.fields["joints"].shape[0] - played.steps
        (1.0, 1)
        >>> env.close()
    """
    _check(envs, policy, seeds, options, max_steps)
    waiting = iter(enumerate(seeds))
    running: list[_Session] = []
    free = list(reversed(envs))
    done: dict[int, Played] = {}
    following = 0
    while following < len(seeds):
        begun = []
        while free and (item := next(waiting, None)) is not None:
            begun.append(_begin(free.pop(), *item, None if options is None else options[item[0]], frames))
        if begun:
            policy.reset([s.name for s in begun], [str(getattr(s.env, "prompt", "")) for s in begun])
            running += begun
        _ask(policy, [session for session in running if not session.chunk])
        for session in list(running):
            played = _step(session, max_steps, keep, frames)
            if played is not None:
                running.remove(session)
                free.append(session.env)
                done[session.number] = played
        while following in done:
            yield done.pop(following)
            following += 1


def _check(
    envs: Sequence[gym.Env[Any, Any]],
    policy: Policy,
    seeds: Sequence[int],
    options: Sequence[dict[str, Any] | None] | None,
    max_steps: int | None,
) -> None:
    if not envs:
        raise ConfigError("play", expected="one environment or more", got="none", fix="make one")
    if len(set(seeds)) < len(seeds):
        raise ConfigError("seeds", expected="different ones", got="a repeated seed", fix="give each episode its own")
    if options is not None and len(options) != len(seeds):
        raise ConfigError(
            "options", expected=f"{len(seeds)}, one for each seed", got=str(len(options)), fix="give as many"
        )
    if max_steps is not None and max_steps < 1:
        raise ConfigError("max_steps", expected="1 or more", got=str(max_steps), fix="allow longer episodes")
    env = envs[0]
    spec = env.spec
    name = type(env.unwrapped).__name__ if spec is None else spec.id
    check_fit(policy.meta, observation_spec(env.observation_space), action_spec(env.action_space), name)


def _begin(
    env: gym.Env[Any, Any], number: int, seed: int, options: dict[str, Any] | None, frames: Frames | None
) -> _Session:
    observation, _ = env.reset(seed=seed, options=options)
    leaves = flatten(env.observation_space, observation)
    if frames is not None:
        frames(seed, 0, env)
    return _Session(env=env, number=number, seed=seed, leaves=leaves)


def _ask(policy: Policy, sessions: list[_Session]) -> None:
    """Gives each of the sessions a new chunk of actions."""
    if not sessions:
        return
    wanted = policy.meta.observation
    observation = Observation(
        sessions=tuple(session.name for session in sessions),
        state=np.stack([state_vector(session.leaves, wanted) for session in sessions]),
        images={camera: np.stack([session.leaves[camera] for session in sessions]) for camera in wanted.cameras},
        time=np.array([len(s.rewards) / float(s.env.metadata.get("control_hz") or 1.0) for s in sessions]),
    )
    chunks = check_chunk(policy.infer(observation), len(sessions), policy.meta)
    for session, chunk in zip(sessions, chunks, strict=True):
        session.chunk = list(chunk)


def _step(session: _Session, max_steps: int | None, keep: bool, frames: Frames | None) -> Played | None:
    """One control step; the episode if this was its last."""
    env = session.env
    action = to_env_action(env.action_space, session.chunk.pop(0))
    if keep:
        session.observations.append(session.leaves)
        session.actions.append(from_env_action(env.action_space, action))
    observation, reward, terminated, truncated, info = env.step(action)
    session.leaves = flatten(env.observation_space, observation)
    session.rewards.append(float(reward))
    if frames is not None:
        frames(session.seed, len(session.rewards), env)
    truncated = bool(truncated) or (not terminated and len(session.rewards) == max_steps)
    if not (terminated or truncated):
        return None
    rewards = np.array(session.rewards, np.float64)
    fields: dict[str, np.ndarray] = {}
    if keep:
        rows = [*session.observations, session.leaves]
        fields = {name: np.stack([row[name] for row in rows]) for name in session.leaves}
        fields |= {ACTION: np.stack(session.actions), REWARD: rewards}
    success, score = info.get("success"), info.get("score")
    return Played(
        seed=session.seed,
        fields=fields,
        rewards=rewards,
        terminated=bool(terminated),
        truncated=truncated,
        success=None if success is None else bool(success),
        score=None if score is None else float(score),
    )
