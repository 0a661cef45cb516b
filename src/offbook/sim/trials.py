"""Several trials of one task in a row, as one episode: for policies that remember what earlier trials revealed."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from offbook.data.formats.spaces import leaves
from offbook.errors import ConfigError
from offbook.sim.spaces import flatten, observation_leaves

TRIAL = "trial"
"""Name of the leaf that tells the trials apart."""


class Trials(gym.Wrapper[Any, Any, Any, Any]):
    """An environment whose one episode is a number of trials of another environment.

    The first trial has the seed, the later ones none: a world that hides something keeps it, other worlds draw a new
    start. When a trial ends the next begins at once, and its first observation is shown. The episode ends with the last
    trial, as that one did. Observations are those of the other environment as named leaves, and the leaf "trial", (3,)
    float32: the number of the trial from 0, the step in it from 0, and the reward of the step before, 0 at the start.
    `info["returns"]` at the end is the list of the returns of the trials that were played; success and score are those
    of the last.

    Args:
        env: an environment from `offbook.sim.adapters.make`.
        trials: how many, 1 or more.

    Raises:
        ConfigError: the number is none, or the environment has a leaf of that name itself.

    Example:
        >>> from offbook.sim.adapters import make
        >>> env = make("offbook:darkpoint", trials=2)
        >>> for step in range(17):
        ...     observation, _ = env.reset(seed=3) if step == 0 else env.step(np.zeros(2))[:2]
        >>> observation["trial"].tolist()  # the second trial begins
        [1.0, 0.0, 0.0]
        >>> env.close()
    """

    def __init__(self, env: gym.Env[Any, Any], trials: int) -> None:
        if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
            raise ConfigError("trials", expected="an integer of 1 or more", got=repr(trials), fix="ask for a trial")
        inner = env.observation_space
        names = [leaf.name for leaf in observation_leaves(inner)]
        if TRIAL in names:
            fix = "rename that one, or make the environment without trials"
            raise ConfigError("trials", expected=f"no leaf {TRIAL!r} yet", got=f"one of {env}", fix=fix)
        super().__init__(env)
        self._trials = trials
        said = spaces.Box(np.array([0, 0, -np.inf], np.float32), np.array([trials - 1, np.inf, np.inf], np.float32))
        parts = [(name, part) for name, _, part in leaves(inner, "observation") if name in names]
        self.observation_space = spaces.Dict([*parts, (TRIAL, said)])

    @property
    def prompt(self) -> str:
        """The task in words."""
        return str(getattr(self.env, "prompt", ""))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begins an episode.

        Args:
            seed: of the first trial.
            options: `{"first": k}` begins with trial number k, as if those before it had been played; `{"stop": k}`
                ends with the trial before number k; the others are for the environment itself, at each of its resets.

        Raises:
            ConfigError: there is no such trial.
        """
        options = dict(options or {})
        first, stop = options.pop("first", 0), options.pop("stop", self._trials)
        if not isinstance(first, int) or not 0 <= first < self._trials:
            expected, fix = f"a number from 0 to {self._trials - 1}", "begin with another trial"
            raise ConfigError("reset option 'first'", expected=expected, got=repr(first), fix=fix)
        if isinstance(stop, bool) or not isinstance(stop, int) or not first < stop <= self._trials:
            expected, fix = f"a number from {first + 1} to {self._trials}", "stop after another trial"
            raise ConfigError("reset option 'stop'", expected=expected, got=repr(stop), fix=fix)
        self._options = options or None
        observation, info = self.env.reset(seed=seed, options=self._options)
        for _ in range(first):
            observation, info = self.env.reset(options=self._options)
        self._trial, self._step, self._stop, self._returns = first, 0, stop, [0.0]
        return self._seen(observation, 0.0), info

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], Any, bool, bool, dict[str, Any]]:
        """One control step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._step += 1
        self._returns[-1] += float(reward)
        if (terminated or truncated) and self._trial == self._stop - 1:
            info = {**info, "returns": [*self._returns]}
        elif terminated or truncated:
            observation, _ = self.env.reset(options=self._options)
            self._trial, self._step, terminated, truncated = self._trial + 1, 0, False, False
            self._returns.append(0.0)
        return self._seen(observation, float(reward)), reward, terminated, truncated, info

    def _seen(self, observation: Any, reward: float) -> dict[str, np.ndarray]:
        said = np.array([self._trial, self._step, reward], np.float32)
        return {**flatten(self.env.observation_space, observation), TRIAL: said}
