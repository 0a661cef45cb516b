"""Any simulator of `offbook.sim.adapters` as a robot."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbook.client.protocol import Observation, ObservationSpec
from offbook.errors import RobotError
from offbook.robots.base import Action, ActResult, RobotSpec, SafetyLimits, Score
from offbook.sim import spaces
from offbook.sim.adapters import make

_LONGEST = 1000


class GymRobot:
    """A simulated world behind the robot interface.

    With several trials one episode is so many of them in a row, see `offbook.sim.trials.Trials`: the robot decides how
    many, counts their rewards, and scores the last one.

    Holding still sends the last command again where actions are positions (the limits name a posture), else zero or,
    for discrete actions, choice 0.

    Args:
        env_id: environment as `offbook.sim.adapters.make` takes it; discrete actions too.
        limits: what the guard enforces; the action range alone by default.
        max_steps: longest episode, all trials together; by default the environment's own limit for each trial, or
            1,000 steps where it has none.
        trials: in a row, as one episode; None for the bare environment.
        settings: further arguments of `make`.

    Example:
        >>> robot = GymRobot("gym:Pendulum-v1")
        >>> robot.spec.rate_hz, robot.spec.max_steps, robot.reset(None, seed=3).state.shape
        (20.0, 200, (1, 3))
        >>> robot.close()
    """

    def __init__(
        self,
        env_id: str,
        *,
        limits: SafetyLimits | None = None,
        max_steps: int | None = None,
        trials: int | None = None,
        **settings: Any,
    ) -> None:
        self._env, self._trials = make(env_id, trials=trials, **settings), trials
        env = self._env
        # The wrapper of several trials tells the limit of one.
        own_limit = env.spec.max_episode_steps if env.spec is not None else None
        self.spec = RobotSpec(
            name=env_id if trials is None else f"{env_id}@{trials}",
            observation=spaces.observation_spec(env.observation_space),
            action=spaces.action_spec(env.action_space),
            rate_hz=float(env.metadata.get("control_hz") or 10.0),
            max_steps=max_steps or (own_limit or _LONGEST) * (trials or 1),
            limits=limits or SafetyLimits(),
            simulated=True,
        )
        self._leaves: dict[str, NDArray[Any]] = {}
        self._info: dict[str, Any] = {}
        self._steps, self._return, self._over = 0, 0.0, True
        self._last = self._still()

    @property
    def prompt(self) -> str:
        """The task in words."""
        return str(getattr(self._env, "prompt", ""))

    def reset(self, scene: Mapping[str, Any] | None, seed: int) -> Observation:
        """Begins an episode; a scene goes to the environment as `options={"scene": ...}`.

        Of a robot of several trials the scene may tell under `"trials"` after how many to stop.
        """
        world = dict(scene or {})
        options = {} if self._trials is None else {"stop": world.pop("trials", self._trials)}
        if world:
            options["scene"] = world
        observation, self._info = self._env.reset(seed=seed, options=options or None)
        self._leaves = spaces.flatten(self._env.observation_space, observation)
        self._steps, self._return, self._over = 0, 0.0, False
        self._last = self._still()
        return self.observe()

    def observe(self) -> Observation:
        """What the environment showed after the last step."""
        wanted = self.spec.observation
        return Observation(
            sessions=("",),
            state=spaces.state_vector(self._leaves, wanted)[None],
            images={camera: self._leaves[camera][None] for camera in wanted.cameras},
            time=np.array([self._steps / self.spec.rate_hz]),
        )

    def act(self, action: Action) -> ActResult:
        """One step of the environment."""
        if self._over:
            fix = "reset the robot"
            raise RobotError(self.spec.name, expected="an episode that runs", got="one that is over", fix=fix)
        vector = np.asarray(action, np.float32)
        observation, reward, terminated, truncated, self._info = self._env.step(
            spaces.to_env_action(self._env.action_space, vector)
        )
        self._leaves = spaces.flatten(self._env.observation_space, observation)
        self._last = vector
        self._steps += 1
        self._return += float(reward)
        self._over = bool(terminated or truncated)
        return ActResult(applied=vector, reward=float(reward), done=self._over)

    def hold(self) -> ActResult:
        """One step of the environment in which nothing new is commanded."""
        return self.act(self._last if self.spec.limits.posture else self._still())

    def frame(self) -> NDArray[np.uint8] | None:
        """The environment's own picture, or None where it draws none."""
        picture = self._env.render()
        return picture if isinstance(picture, np.ndarray) and picture.ndim == 3 else None

    def score(self) -> Score:
        """The environment's own score where it has one, else success as 0 or 1, else the sum of rewards.

        Of several trials it is the last one's sum of rewards.

        Raises:
            RobotError: the last of several trials has not ended.
        """
        success = self._info.get("success")
        value = self._info.get("score", self._return if success is None else float(success))
        if self._trials is not None:
            if "returns" not in self._info:
                expected, fix = "an episode up to the end of its last trial", "give the robot a larger max_steps"
                raise RobotError(self.spec.name, expected=expected, got=f"one of {self._steps} steps", fix=fix)
            value = self._info["returns"][-1]
        return Score(value=float(value), success=None if success is None else bool(success))

    def stop(self, reason: str) -> None:
        """Ends the episode: a simulated world does not move unless it is stepped."""
        self._over = True

    def close(self) -> None:
        """Closes the environment."""
        self._over = True
        self._env.close()

    def _still(self) -> Action:
        spec, posture = self.spec.action, self.spec.limits.posture
        if posture and self._leaves:
            return spaces.state_vector(self._leaves, ObservationSpec(state=((posture, spec.size),)))
        return np.clip(np.zeros(spec.size), spec.low, spec.high).astype(np.float32)
