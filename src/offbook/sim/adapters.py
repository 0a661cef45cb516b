"""One door to every simulator: `make("gym:Hopper-v5")`, `make("dmc:walker-walk")`, ... gives a gymnasium environment.

Whatever the library, `info["success"]` is a bool where the task has a notion of it, `metadata["control_hz"]` the number
of control steps in a second, `env.prompt` the task in words, and equal seeds give bit-equal episodes.
"""

import contextlib
import io
import os
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from offbook.errors import ConfigError, MissingExtraError, nearest, needs_extra
from offbook.sim.darkpoint import Darkpoint
from offbook.sim.keyed_door import KeyedDoor
from offbook.sim.tabletop.pour import Pour
from offbook.sim.tabletop.render import Renderer, close_at_exit, prepare_mujoco
from offbook.sim.tabletop.scoop import Scoop
from offbook.sim.trials import Trials

AnyEnv = gym.Env[Any, Any]


def make(env_id: str, *, image_size: int | None = None, trials: int | None = None, **settings: Any) -> AnyEnv:
    """Makes an environment by its library and name.

    Args:
        env_id: `gym:` (Gymnasium and whatever is registered with it), `dmc:domain-task` (the DeepMind control suite),
            `metaworld:` (with the goal visible), `minigrid:` (MiniGrid and BabyAI, as numbers), `robotics:`
            (Gymnasium-Robotics), `ale:` (Atari), `offbook:pour`, `offbook:scoop`, `offbook:darkpoint`,
            `offbook:keyed-door`.
        image_size: for worlds of MuJoCo, adds a square camera picture of so many pixels as the leaf "image"; for
            `offbook:pour` and `offbook:scoop` it is the size of their picture "front" (64 by default). 0 draws none,
            which is quicker.
        trials: makes one episode of so many trials in a row, see `offbook.sim.trials.Trials`; 1 or more.
        settings: further arguments of the environment's own constructor.

    Raises:
        ConfigError: the library, the environment or a setting is unknown, or cannot be used here.
        MissingExtraError: a package that the environment needs is not installed.

    Example:
        >>> env = make("gym:Pendulum-v1")
        >>> env.metadata["control_hz"]
        20.0
        >>> env.close()
    """
    library, _, name = env_id.partition(":")
    if library not in LIBRARIES or not name:
        where = f"environment {env_id!r}"
        fix = nearest(library, LIBRARIES) if library not in LIBRARIES else f"write {library}:NAME"
        raise ConfigError(where, expected="LIBRARY:NAME", got=f"library {library!r}" if name else "no name", fix=fix)
    with _explained(env_id):
        env = LIBRARIES[library](name, image_size, settings)
    return env if trials is None else Trials(env, trials)


class Adapter(gym.Wrapper[Any, Any, Any, Any]):
    """What all environments have in common; the outermost layer of one trial.

    Args:
        env: the library's environment.
        prompt: the task in words; empty to ask the environment for its `mission`.
        control_hz: control steps in a second; None to ask the environment.
        image_size: adds the leaf "image", see `make`.
        camera: which of the model's cameras draws; -1 for the free one.
        upside_down: whether that camera hangs upside down, so that its picture must be turned.
        success: False keeps what the library says about success away.
    """

    def __init__(
        self,
        env: AnyEnv,
        *,
        prompt: str = "",
        control_hz: float | None = None,
        image_size: int | None = None,
        camera: str | int = -1,
        upside_down: bool = False,
        success: bool = True,
    ) -> None:
        super().__init__(env)
        # Left open, an environment that draws prints tracebacks when the interpreter exits.
        self._close = weakref.finalize(self, env.close)
        close_at_exit()
        rate = control_hz or _control_hz(env)
        self.metadata = {**env.metadata, **({} if rate is None else {"control_hz": rate})}
        self._prompt, self._camera, self._upside_down, self._success = prompt, camera, upside_down, success
        self._renderers: dict[tuple[int, int], Renderer] = {}
        self._image_size = image_size
        if image_size:
            if not hasattr(env.unwrapped, "model"):
                raise ConfigError("image_size", expected="a world of MuJoCo", got=str(env.unwrapped), fix="drop it")
            inner = env.observation_space
            parts = inner.spaces if isinstance(inner, spaces.Dict) else {"observation": inner}
            picture = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
            self.observation_space = spaces.Dict([*parts.items(), ("image", picture)])

    @property
    def prompt(self) -> str:
        """The task in words."""
        return self._prompt or str(getattr(self.env.unwrapped, "mission", ""))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._seen(observation), self._told(info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One control step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._seen(observation), float(reward), bool(terminated), bool(truncated), self._told(info)

    def render(self) -> Any:
        """A picture for people: 240x320 for worlds of MuJoCo, the library's own for others."""
        if hasattr(self.env.unwrapped, "model"):
            return self._picture(240, 320)
        return self.env.render()

    def close(self) -> None:
        """Closes the environment and frees the renderers; may be called twice."""
        while self._renderers:
            self._renderers.popitem()[1].close()
        self._close()

    def _picture(self, height: int, width: int) -> np.ndarray:
        world: Any = self.env.unwrapped
        if (height, width) not in self._renderers:
            self._renderers[height, width] = Renderer(world.model, height, width)
        frame = self._renderers[height, width].frame(world.data, self._camera)
        return np.ascontiguousarray(frame[::-1, ::-1]) if self._upside_down else frame

    def _seen(self, observation: Any) -> Any:
        if not self._image_size:
            return observation
        parts = observation if isinstance(observation, dict) else {"observation": observation}
        return {**parts, "image": self._picture(self._image_size, self._image_size)}

    def _told(self, info: dict[str, Any]) -> dict[str, Any]:
        if not self._success:
            return {key: value for key, value in info.items() if key not in ("success", "is_success")}
        for key in ("success", "is_success"):
            if key in info:
                return {**info, "success": bool(info[key])}
        if "tasks_to_complete" in info:  # Franka Kitchen
            return {**info, "success": not info["tasks_to_complete"]}
        return info


def hold(env: AnyEnv, action: Any, steps: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
    """Several control steps with one action, fewer where the episode ends; rewards add up, the last moment is drawn.

    Args:
        env: an environment from `make`.
        action: as `step` takes it.
        steps: 1 or more.

    Example:
        >>> env = make("gym:Pendulum-v1")
        >>> _ = env.reset(seed=0)
        >>> hold(env, np.zeros(1, np.float32), 300)[2:4]  # it is over after 200
        (False, True)
        >>> env.close()
    """
    if isinstance(env, Adapter):
        observation, total, terminated, truncated, info = hold(env.env, action, steps)
        return env._seen(observation), total, terminated, truncated, env._told(info)
    total = 0.0
    for _ in range(steps):
        observation, reward, terminated, truncated, info = env.step(action)
        total += float(reward)
        if terminated or truncated:
            break
    return observation, total, bool(terminated), bool(truncated), info


def _control_hz(env: AnyEnv) -> float | None:
    # The time between two control steps where the world knows it, else the rate at which its videos are to be shown.
    step = getattr(env.unwrapped, "dt", None)
    rate = 1.0 / float(step) if step else env.metadata.get("render_fps")
    return None if rate is None else float(rate)


@contextlib.contextmanager
def _explained(env_id: str) -> Iterator[None]:
    """Turns what a library raises while an environment is made into one sentence."""
    where = f"environment {env_id!r}"
    try:
        yield
    except gym.error.DependencyNotInstalled as error:
        raise MissingExtraError(
            where, expected="a package that it needs", got=_line(error), fix="install it, or choose another environment"
        ) from error
    except gym.error.Error as error:
        raise ConfigError(
            where, expected="an environment that can be made", got=_line(error), fix="correct the name or the settings"
        ) from error
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ConfigError(
            where, expected="settings that it knows", got=_line(error), fix="correct or drop the setting"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _check_name(library: str, name: str, known: Collection[str]) -> None:
    if name in known:
        return
    close = get_close_matches(name, known, n=1)
    where = f"environment '{library}:{name}'"
    fix = nearest(name, known) if close or len(known) <= 12 else f"choose one such as {library}:{min(known)}"
    raise ConfigError(where, expected=f"a name of the library {library!r}", got="an unknown one", fix=fix)


def _registered(modules: tuple[str, ...]) -> list[str]:
    """Names in Gymnasium's registry whose environments come from one of the modules."""
    return [name for name, spec in gym.registry.items() if str(spec.entry_point).startswith(modules)]


def _make_registered(name: str, **settings: Any) -> AnyEnv:
    with warnings.catch_warnings():
        # Older versions of an environment stay in use for comparisons; the user chose this one by name.
        warnings.filterwarnings("ignore", message=".*is out of date", category=DeprecationWarning)
        return gym.make(name, disable_env_checker=True, **settings)


def _quiet_pygame() -> None:
    """No greeting, and no complaint that there is no screen."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def _gym(name: str, image_size: int | None, settings: dict[str, Any]) -> AnyEnv:
    _check_name("gym", name, gym.registry)
    spec = gym.registry[name]
    camera: str | int = -1
    if "mujoco" in str(spec.entry_point):
        prepare_mujoco()
    else:
        _quiet_pygame()
        settings = {"render_mode": "rgb_array", **settings}
    env = _make_registered(name, **settings)
    if getattr(getattr(env.unwrapped, "model", None), "ncam", 0):
        camera = 0  # the camera that follows the body
    return Adapter(env, image_size=image_size, camera=camera)


def _robotics(name: str, image_size: int | None, settings: dict[str, Any]) -> AnyEnv:
    prepare_mujoco()
    # On import the package announces a newer release of itself on stderr.
    with needs_extra("sim"), contextlib.redirect_stderr(io.StringIO()):
        import gymnasium_robotics
    gym.register_envs(gymnasium_robotics)
    _check_name("robotics", name, _registered(("gymnasium_robotics",)))
    # Where each goal that is reached is followed by another, no step is the one that succeeds.
    env = _make_registered(name, **settings)
    return Adapter(env, image_size=image_size, success=not settings.get("reset_target", False))


def _ale(name: str, image_size: int | None, settings: dict[str, Any]) -> AnyEnv:
    with needs_extra("sim"):
        import ale_py
    gym.register_envs(ale_py)
    names = [full.removeprefix("ALE/") for full in _registered(("ale_py",)) if full.startswith("ALE/")]
    _check_name("ale", name, names)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    env = _make_registered(f"ALE/{name}", **{"render_mode": "rgb_array", **settings})
    skip = getattr(env.unwrapped, "_frameskip", 4)
    rate = 60.0 / (skip if isinstance(skip, int) else sum(skip) / len(skip))
    return Adapter(env, image_size=image_size, control_hz=rate)


def _minigrid(name: str, image_size: int | None, settings: dict[str, Any]) -> AnyEnv:
    _quiet_pygame()
    with needs_extra("sim"):
        import minigrid  # noqa: F401 (registers its environments)
    _check_name("minigrid", name, _registered(("minigrid",)))
    env = SymbolicView(_make_registered(name, **{"render_mode": "rgb_array", **settings}))
    return Adapter(env, image_size=image_size)


def _dmc(name: str, image_size: int | None, settings: dict[str, Any]) -> AnyEnv:
    prepare_mujoco()
    with needs_extra("sim"):
        from dm_control import suite
    tasks = {f"{domain}-{task}": (domain, task) for domain, task in suite.ALL_TASKS}
    _check_name("dmc", name, tasks)
    env = ControlSuite(*tasks[name], **settings)
    return Adapter(env, prompt=name.replace("-", ": ").replace("_", " "), image_size=image_size, camera=env.camera)


def _metaworld(name: str, image_size: int | None, settings: dict[str, Any]) -> AnyEnv:
    prepare_mujoco()
    with needs_extra("sim"):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as TASKS
    names = {full.removesuffix("-goal-observable"): full for full in TASKS}
    _check_name("metaworld", name, names)
    task: Any = TASKS[names[name]]
    env = SeededMetaWorld(task(seed=0), **settings)
    words = " ".join(word for word in name.split("-") if word != "v3")
    return Adapter(env, prompt=words, image_size=image_size, camera="corner2", upside_down=True)


def _offbook(name: str, image_size: int | None, settings: dict[str, Any]) -> AnyEnv:
    small = {"darkpoint": Darkpoint, "keyed-door": KeyedDoor}
    _check_name("offbook", name, ["pour", "scoop", *small])
    if name in ("pour", "scoop"):
        task = Pour if name == "pour" else Scoop
        return task(image_size=64 if image_size is None else image_size, **settings)
    world = small[name](**settings)
    return Adapter(world, prompt=world.prompt, image_size=image_size)


LIBRARIES: dict[str, Callable[[str, int | None, dict[str, Any]], AnyEnv]] = {
    "gym": _gym,
    "dmc": _dmc,
    "metaworld": _metaworld,
    "minigrid": _minigrid,
    "robotics": _robotics,
    "ale": _ale,
    "offbook": _offbook,
}
"""The libraries that `make` knows."""


class ControlSuite(gym.Env[Any, np.ndarray]):
    """A task of the DeepMind control suite as a gymnasium environment.

    Args:
        domain: such as `"walker"`.
        task: such as `"walk"`.
        physics: adds the leaf "physics", the whole state of the simulation, from which any reward can be worked out.
        settings: passed on to the task, such as `time_limit`.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (gymnasium's)

    def __init__(self, domain: str, task: str, *, physics: bool = False, **settings: Any) -> None:
        from dm_control import suite

        self._physics = physics
        self._env = suite.load(domain, task, task_kwargs={"random": 0, **settings})
        shown = {key: (spec.shape, spec.dtype) for key, spec in self._env.observation_spec().items()}
        if physics:
            shown["physics"] = self._env.physics.state().shape, np.dtype(np.float64)
        self.observation_space = spaces.Dict(
            [(key, spaces.Box(-np.inf, np.inf, shape, dtype)) for key, (shape, dtype) in shown.items()]
        )
        action = self._env.action_spec()
        self.action_space = spaces.Box(
            np.broadcast_to(action.minimum, action.shape).astype(np.float32),
            np.broadcast_to(action.maximum, action.shape).astype(np.float32),
        )
        self.dt = float(self._env.control_timestep())
        self.camera = 0 if self.model.ncam else -1

    @property
    def model(self) -> Any:
        """The `mujoco.MjModel`."""
        return self._env.physics.model.ptr

    @property
    def data(self) -> Any:
        """The `mujoco.MjData`."""
        return self._env.physics.data.ptr

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begins an episode; there are no options."""
        super().reset(seed=seed)
        if seed is not None:
            # The suite takes a seed only when a task is loaded, which is slow; its tasks draw from this attribute.
            self._env.task._random = np.random.RandomState(seed)
        return self._seen(self._env.reset()), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One control step; a discount of 1 at the last step means that only the time was up."""
        now = self._env.step(np.asarray(action, np.float64))
        terminated = bool(now.last() and now.discount == 0)
        return self._seen(now), float(now.reward), terminated, bool(now.last()) and not terminated, {}

    def reward_of(self, state: np.ndarray, action: np.ndarray) -> float:
        """The task's reward where an action has led to a state, as far as it depends on these two.

        Args:
            state: of the physics, as the leaf "physics" shows it; the simulation is in it afterwards.
            action: what the actuators were told.
        """
        physics = self._env.physics
        physics.set_state(state)
        physics.set_control(action)
        physics.forward()  # positions of bodies and readings of sensors
        return float(self._env.task.get_reward(physics))

    def _seen(self, now: Any) -> dict[str, np.ndarray]:
        return {**now.observation, "physics": self._env.physics.state()} if self._physics else dict(now.observation)

    def close(self) -> None:
        """Frees the simulation."""
        self._env.close()


class SeededMetaWorld(gym.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """A Meta-World task whose arrangement follows the seed of `reset`, and whose success stays once it was reached.

    Args:
        env: the task with the goal in its observation.
        stop_on_success: whether an episode terminates at the first success; it is truncated after 500 steps anyway.
        sparse: whether a step in which the task is done pays 1 and all others nothing, instead of the shaped reward.
    """

    def __init__(self, env: Any, *, stop_on_success: bool = False, sparse: bool = False) -> None:
        super().__init__(env)
        # By default every reset repeats one arrangement; these two make it draw from the environment's own generator.
        env._freeze_rand_vec, env.seeded_rand_vec = False, True
        self._stop, self._sparse = stop_on_success, sparse
        self._success = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode; there are no options."""
        world: Any = self.env
        if seed is not None:
            world.seed(seed)
        self._success = False
        observation, info = world.reset()
        return observation, {**info, "success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """One control step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._success = self._success or bool(info["success"])
        reward = float(info["success"]) if self._sparse else reward
        terminated = bool(terminated) or (self._stop and self._success)
        return observation, reward, terminated, truncated and not terminated, {**info, "success": self._success}


class SymbolicView(gym.Wrapper[Any, Any, Any, Any]):
    """MiniGrid's view as numbers: one-hot object, colour and state of each visible cell, and the agent's direction.

    The mission in words is the environment's `prompt`. Success is the end of an episode with a reward.

    Args:
        env: a MiniGrid or BabyAI environment.
    """

    KINDS = (11, 6, 3)
    """Number of objects, colours and states in MiniGrid's encoding."""

    def __init__(self, env: AnyEnv) -> None:
        super().__init__(env)
        if not isinstance(env.observation_space, spaces.Dict):
            raise ConfigError("MiniGrid", expected="its usual view", got=str(env.observation_space), fix="report this")
        height, width, _ = env.observation_space["image"].shape or (0, 0, 0)
        self.observation_space = spaces.Dict(
            [
                ("view", spaces.Box(0.0, 1.0, (height * width * sum(self.KINDS),), np.float32)),
                ("direction", spaces.Box(0.0, 1.0, (4,), np.float32)),
            ]
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._numbers(observation), {**info, "success": False}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One control step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        success = bool(terminated) and float(reward) > 0
        return self._numbers(observation), reward, terminated, truncated, {**info, "success": success}

    def _numbers(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        cells = observation["image"]
        view = [np.eye(kinds, dtype=np.float32)[cells[..., i]] for i, kinds in enumerate(self.KINDS)]
        return {
            "view": np.concatenate(view, axis=-1).ravel(),
            "direction": np.eye(4, dtype=np.float32)[int(observation["direction"])],
        }
