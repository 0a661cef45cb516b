"""Exploration for Stable-Baselines3: `explore(PPO, VCSE(k=5), beta=0.005)("MlpPolicy", env)`.

The obvious place for a bonus is the wrong one. A callback's `on_rollout_end` runs after the returns and advantages have
been computed, so rewards that it changes train nobody. Here the bonus enters where returns are computed on-policy, and
where a batch is sampled off-policy; stored rewards of a replay buffer stay those of the task.

The values that VCSE looks at come from a critic of the task's reward alone, which no gradient of the agent reaches: the
agent's own critic has learnt the bonus as well. It stands on the same fixed features that neighbours are searched in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from offbook.errors import ConfigError, needs_extra
from offbook.systems.vcse.bonus import Bonus
from offbook.systems.vcse.encoders import SIDE, Identity, Joined, RandomConv
from offbook.systems.vcse.explorer import CriticSettings, Explorer
from offbook.systems.vcse.scaling import Beta

with needs_extra("rl"):
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
    from stable_baselines3.common.preprocessing import get_obs_shape, preprocess_obs
    from stable_baselines3.common.vec_env import VecEnv

A = TypeVar("A", bound=BaseAlgorithm)

Propagate = Literal["gae", "step"]

_DEFAULT = CriticSettings()

# Of a rollout, so many are encoded at a time: pictures are small as bytes, and not as features.
_STATES = 1_024


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """What `explore` was asked for."""

    bonus: Bonus
    beta: Beta
    encoder: nn.Module | None
    propagate: Propagate
    critic: CriticSettings
    seed: int


def explore(
    algorithm: type[A],
    bonus: Bonus,
    *,
    beta: Beta,
    encoder: nn.Module | None = None,
    propagate: Propagate = "gae",
    critic: CriticSettings = _DEFAULT,
    seed: int = 0,
) -> type[A]:
    """An algorithm of Stable-Baselines3 that trains on the task's reward plus beta times a bonus.

    Everything else of the algorithm stays: arguments, callbacks, saving, loading. A model is loaded by the class that
    the same call gives, with the bonus, the encoder and the critic as they were saved. The agent draws no random number
    more or less, so that with beta = 0 it learns exactly what it learns without.

    Args:
        algorithm: PPO, A2C, SAC, TD3, DQN or another one that is on-policy or off-policy as these are.
        bonus: is copied for each model.
        beta: weight of the bonus, or a function from environment steps to it, such as `scaling.Linear`.
        encoder: from observations to features, one row each; a mapping of them where observations are one. By default
            `RandomConv` for pictures, with colours as numbers from 0 to 1 where a side is longer than 24 (smaller ones
            are the codes of a grid world, and stay as they are), and the numbers themselves for all else, categories as
            one-hot.
        propagate: on-policy, whether the bonus is part of the reward ("gae": later bonuses count for earlier steps, and
            the agent's critic foresees them), or is added to the advantage and the return of its own step ("step", as
            the published A2C does). Off-policy it always is part of the reward.
        critic: of the task's reward alone.
        seed: of the default encoder and the critic.

    Raises:
        ConfigError: the algorithm is of neither kind, a setting does not exist, or beta is no finite number. The class
            raises it too, for observations of a kind that Stable-Baselines3 does not know.

    Example:
        >>> from stable_baselines3 import PPO
        >>> from offbook.systems.vcse import VCSE
        >>> model = explore(PPO, VCSE(k=5), beta=0.005)("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu")
        >>> model.learn(128).num_timesteps
        128
    """
    if propagate not in ("gae", "step"):
        raise ConfigError("propagate", expected="gae or step", got=repr(propagate), fix="choose one of them")
    try:
        usable = callable(beta) or math.isfinite(beta)
    except TypeError:
        usable = False
    if not usable:
        expected, fix = "a finite number or a function of environment steps", "choose another weight"
        raise ConfigError("beta", expected=expected, got=repr(beta), fix=fix)
    kinds: dict[type, type] = {OnPolicyAlgorithm: _OnPolicy, OffPolicyAlgorithm: _OffPolicy}
    kind = next((mine for theirs, mine in kinds.items() if issubclass(algorithm, theirs)), None)
    if kind is None:
        fix = "choose PPO, A2C, SAC, TD3 or DQN"
        got = algorithm.__name__
        raise ConfigError("algorithm", expected="an on-policy or off-policy one", got=got, fix=fix)
    setting = _Setting(bonus=bonus, beta=beta, encoder=encoder, propagate=propagate, critic=critic, seed=seed)
    made = type(algorithm.__name__, (kind, algorithm), {"setting": setting, "__module__": algorithm.__module__})
    return cast("type[A]", made)


def encoder_for(space: spaces.Space[Any], seed: int = 0) -> nn.Module:
    """The default encoder of observations of a space, as Stable-Baselines3 preprocesses them; see `explore`."""
    if isinstance(space, spaces.Dict):
        return Joined({name: encoder_for(of, seed) for name, of in space.spaces.items()})
    if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3:
        return RandomConv(space.shape, scale=1 / 255 if max(space.shape) > SIDE else 1.0, seed=seed)
    return Identity()


def _tensors(observations: Any, space: spaces.Space[Any], device: torch.device) -> Any:
    """Any number of leading axes flattened to one, categories as one-hot, pictures in their own numbers."""
    shape: Any = get_obs_shape(space)
    found: Any
    if isinstance(shape, dict):
        found = {name: torch.as_tensor(observations[name]).reshape(-1, *of) for name, of in shape.items()}
        found = {name: tensor.to(device) for name, tensor in found.items()}
    else:
        found = torch.as_tensor(observations).reshape(-1, *shape).to(device)
    return preprocess_obs(found, space, normalize_images=False)


def _check_space(space: spaces.Space[Any], name: str = "observations") -> None:
    """Refuses what Stable-Baselines3 takes no observations of."""
    if isinstance(space, spaces.Dict) and name == "observations":
        for key, one in space.spaces.items():
            _check_space(one, f"observation {key!r}")
    elif not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        expected = "Box, Discrete, MultiDiscrete, MultiBinary, or one Dict of these"
        raise ConfigError(name, expected=expected, got=str(space), fix="wrap the environment, as by FlattenObservation")


def _of(observations: Any, steps: slice) -> Any:
    if isinstance(observations, dict):
        return {name: one[steps] for name, one in observations.items()}
    return observations[steps]


class _Exploring(BaseAlgorithm):
    """What both kinds of algorithm share; its methods call those of the algorithm that it is mixed into."""

    setting: _Setting
    explorer: Explorer

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        # Before Stable-Baselines3 looks at it, whose errors do not name what is wrong.
        if isinstance(env.observation_space, spaces.Space):  # those of the old Gym are translated first
            _check_space(env.observation_space)
        return BaseAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def _setup_model(self) -> None:
        cast("Any", super())._setup_model()
        setting, space = self.setting, self.observation_space
        encoder = encoder_for(space, setting.seed) if setting.encoder is None else deepcopy(setting.encoder)
        shape: Any = get_obs_shape(space)
        one = (
            {name: np.zeros((1, *of)) for name, of in shape.items()}
            if isinstance(shape, dict)
            else np.zeros((1, *shape))
        )
        self.explorer = Explorer(
            deepcopy(setting.bonus),
            encoder,
            size=encoder(_tensors(one, space, torch.device("cpu"))).shape[1],
            beta=setting.beta,
            gamma=cast("Any", self).gamma,
            settings=setting.critic,
            seed=setting.seed,
        ).to(self.device)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, variables = super()._get_torch_save_params()
        return [*modules, "explorer"], variables

    def _log(self) -> None:
        for name, value in self.explorer.report.items():
            self.logger.record(f"explore/{name}", value)


class _OnPolicy(_Exploring):
    def _setup_model(self) -> None:
        super()._setup_model()
        me: Any = self
        me.rollout_buffer = _paying(me.rollout_buffer, _Rollout, self)
        me.rollout_buffer.reset()

    def _init_callback(self, callback: Any, progress_bar: bool = False) -> BaseCallback:
        given = callback if isinstance(callback, list) else [callback]
        others = [one if isinstance(one, BaseCallback) else ConvertCallback(one) for one in given]
        return super()._init_callback([_Follow(), *others], progress_bar)

    def train(self) -> None:
        """Logs what the explorer did with the rollout, and updates the agent."""
        self._log()
        cast("Any", super()).train()


class _OffPolicy(_Exploring):
    def _setup_model(self) -> None:
        super()._setup_model()
        me: Any = self
        me.replay_buffer = _paying(me.replay_buffer, _Replay, self)

    def load_replay_buffer(self, *args: Any, **kwargs: Any) -> None:
        """Loads one as Stable-Baselines3 does."""
        cast("Any", super()).load_replay_buffer(*args, **kwargs)
        me: Any = self
        me.replay_buffer = _paying(me.replay_buffer, _Replay, self)

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Updates the agent, and logs what the explorer did with the batches."""
        self.explorer.step = self.num_timesteps
        cast("Any", super()).train(gradient_steps=gradient_steps, batch_size=batch_size)
        self._log()


def _paying(buffer: Any, kind: type, agent: _Exploring) -> Any:
    """The algorithm's own buffer, of whatever class it made it, with the methods of `kind` before its own."""
    base: Any = type(buffer)
    mixed: Any = type(base.__name__, (kind, base), {"base": base, "__module__": base.__module__})
    made = object.__new__(mixed)
    made.__dict__.update(buffer.__dict__)
    made.explorer, made.propagate = agent.explorer, agent.setting.propagate
    return made


class _Follow(BaseCallback):
    """Hands each step to the rollout buffer before the agent's own value of a cut episode is added to its reward."""

    def _on_step(self) -> bool:
        now = self.locals
        buffer: Any = now["rollout_buffer"]
        cut = {
            number: info["terminal_observation"]
            for number, info in enumerate(now["infos"])
            if now["dones"][number] and info.get("TimeLimit.truncated") and "terminal_observation" in info
        }
        buffer.explorer.step = self.num_timesteps
        buffer.follow(np.array(now["rewards"]), now["new_obs"], cut)
        return True


class _Rollout:
    """Mixed into a rollout buffer: the bonus enters where returns are computed."""

    explorer: Explorer
    propagate: Propagate
    rewards_of_task: list[np.ndarray]
    cut: list[tuple[int, int, Any]]
    latest: Any

    def reset(self) -> None:
        """Forgets the rollout."""
        cast("Any", super()).reset()
        self.rewards_of_task, self.cut, self.latest = [], [], None

    def follow(self, rewards: np.ndarray, latest: Any, cut: Mapping[int, Any]) -> None:
        """Takes the task's reward of a step, the observations after it, and those at which episodes were cut."""
        self.cut += [(len(self.rewards_of_task), number, seen) for number, seen in cut.items()]
        self.rewards_of_task.append(rewards)
        self.latest = latest

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Adds the bonus to the rewards, or to what has been made of them."""
        me: Any = self
        device, space = next(self.explorer.critic.parameters()).device, me.observation_space
        steps, agents = me.rewards.shape
        rewards = torch.as_tensor(np.stack(self.rewards_of_task), dtype=torch.float32, device=device)
        ended = np.concatenate([me.episode_starts[1:], np.asarray(dones, np.float32)[None]])
        some = max(1, _STATES // agents)
        parts = [
            self.explorer.features(_tensors(_of(me.observations, slice(start, start + some)), space, device))
            for start in range(0, steps, some)
        ]
        features = torch.cat(parts).view(steps, agents, -1)
        after = self.explorer.features(_tensors(self.latest, space, device))
        for step, number, seen in self.cut:
            value = self.explorer.value(self.explorer.features(_tensors(seen, space, device)))
            rewards[step, number] += me.gamma * value[0]
        bonus = self.explorer.rollout(features, after, rewards, torch.as_tensor(ended, device=device))
        weighted = (self.explorer.weight() * bonus).cpu().numpy()
        if self.propagate == "gae":
            me.rewards += weighted
        cast("Any", super()).compute_returns_and_advantage(last_values, dones)
        if self.propagate == "step":
            me.advantages += weighted
            me.returns = me.advantages + me.values


class _Replay:
    """Mixed into a replay buffer: sampled rewards have the bonus of their batch, stored ones stay as they are."""

    explorer: Explorer
    base: type

    def sample(self, batch_size: int, env: Any = None) -> Any:
        """A batch, as the buffer gives it, with other rewards."""
        me: Any = self
        batch = cast("Any", super()).sample(batch_size, env=env)
        here, there = (
            self.explorer.features(_tensors(seen, me.observation_space, batch.rewards.device))
            for seen in (batch.observations, batch.next_observations)
        )
        discounts = getattr(batch, "discounts", None)
        goes_on = (1 - batch.dones[:, 0]) * (self.explorer.gamma if discounts is None else discounts[:, 0])
        bonus = self.explorer.transitions(here, there, batch.rewards[:, 0], goes_on)
        return batch._replace(rewards=batch.rewards + self.explorer.weight() * bonus[:, None])

    def __reduce__(self) -> tuple[Any, ...]:
        # On disk it is the buffer of Stable-Baselines3 that it was, with what that keeps of itself.
        state = cast("dict[str, Any]", self.__getstate__())
        kept = {name: value for name, value in state.items() if name not in ("explorer", "propagate")}
        return object.__new__, (self.base,), kept
