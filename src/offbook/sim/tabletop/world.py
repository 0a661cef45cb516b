"""What the tasks on the table share: the room, the arm, the camera, round vessels, grains, the way of an episode."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from jaxtyping import Float, UInt8

from offbook.errors import ConfigError, RobotError
from offbook.sim.tabletop import arm
from offbook.sim.tabletop.render import Quality, Renderer, prepare_mujoco
from offbook.sim.tabletop.scene import Arrangement, scenes

CONTROL_HZ = 30.0
SUBSTEPS = 8
REST_STEPS = 15  # half a second in which nothing has changed any more
WALL = 0.005

GRIP = 0.12
"""Metres from the flange to where the fingers hold something."""

S = TypeVar("S", bound=Arrangement)


class Tabletop(gym.Env[Any, np.ndarray], ABC, Generic[S]):
    """A task on the table as a gymnasium environment; each task is a subclass.

    Observations: `joints` (7,) radians; `objects`, which a real robot does not know; `front` (H, W, 3) uint8, the
    camera. Actions: (7,) joint angles in radians that the servos go for until the next step, no faster than the joints'
    speed limits. The reward is 0 except at the last step, where it is the score; `info["score"]` is the score at each
    step, `info["success"]` whether it is above 0.

    Args:
        image_size: height and width of the camera's picture in pixels, 16 or more; 0 for no camera.
        split: from which `scenes` an episode without the option `scene` draws its arrangement.
        max_steps: longest episode in control steps; None for the task's own.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30, "control_hz": CONTROL_HZ}  # noqa: RUF012 (gymnasium's)
    render_mode = "rgb_array"

    task: ClassVar[str]
    """Its name among the tasks that `scenes` knows."""
    prompt: ClassVar[str]
    """The task in words."""
    longest: ClassVar[int]
    """Control steps after which an episode is truncated, unless it is told otherwise."""
    objects: ClassVar[tuple[str, ...]]
    """The entries of the observation `objects`."""
    start: ClassVar[Float[np.ndarray, "7"]]
    """Joint angles at which an episode begins, up to 0.02 rad in each joint."""
    settling: ClassVar[int]
    """Substeps in which the grains come to rest before an episode begins."""
    arrangement: type[S]
    """What `options["scene"]` describes."""

    def __init__(self, *, image_size: int = 64, split: str = "seen", max_steps: int | None = None) -> None:
        if image_size and not 16 <= image_size <= 1024:
            raise ConfigError(
                "image_size", expected="16 to 1024 pixels, or 0", got=str(image_size), fix="choose another size"
            )
        if max_steps is not None and max_steps < 1:
            raise ConfigError("max_steps", expected="1 or more", got=str(max_steps), fix="allow longer episodes")
        scenes(split, 0, 0, self.task)  # refuses an unknown split
        self._mujoco = prepare_mujoco()
        self._split, self._max_steps, self._image_size = split, max_steps or self.longest, image_size
        parts: list[tuple[str, spaces.Space[Any]]] = [
            ("joints", spaces.Box(arm.LOW.astype(np.float32), arm.HIGH.astype(np.float32))),
            ("objects", spaces.Box(-2.0, 2.0, (len(self.objects),), np.float32)),
        ]
        if image_size:
            parts.append(("front", spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)))
        self.observation_space = spaces.Dict(parts)
        self.action_space = spaces.Box(arm.LOW.astype(np.float32), arm.HIGH.astype(np.float32))
        self.scene: S | None = None
        self._renderers: dict[tuple[int, int, Quality], Renderer] = {}
        self._running = False

    @abstractmethod
    def _world(self, scene: S) -> str:
        """The whole world of one scene as MJCF."""

    @abstractmethod
    def _filling(self, scene: S) -> Float[np.ndarray, "grains 3"]:
        """Where the grains are let go before an episode, in the base frame; the arm has its start posture."""

    @abstractmethod
    def _measured(self, scene: S) -> tuple[tuple[float, ...], dict[str, float]]:
        """The observation `objects` without the bowl's place, and the info with `score`."""

    @abstractmethod
    def _at_rest(self, scene: S) -> bool:
        """Whether the score would stay what it is if nothing moved; called once after each step."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begins an episode.

        Args:
            seed: fixes the start posture, the grains and, without a scene, the arrangement.
            options: `{"scene": record}` with a record for the arrangement's `from_json`.

        Raises:
            ConfigError: an option or the scene is not valid.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        drawn = int(self.np_random.integers(2**31))
        record = options.pop("scene", None)
        if options:
            raise ConfigError(
                "reset options", expected="only 'scene'", got=", ".join(map(repr, options)), fix="drop the others"
            )
        record = scenes(self._split, 1, drawn, self.task)[0] if record is None else record
        self._arrange(self.arrangement.from_json(record))
        mujoco, model, data = self._mujoco, self._model, self._data
        mujoco.mj_resetData(model, data)
        self._target = self.start + self.np_random.uniform(-0.02, 0.02, 7)
        data.qpos[:7] = data.ctrl[:] = self._target
        mujoco.mj_kinematics(model, data)
        data.qpos[7:] = self._filling(self._present).ravel()
        mujoco.mj_step(model, data, nstep=self.settling)
        data.time = 0.0
        mujoco.mj_forward(model, data)
        self._steps = self._resting = 0
        self._running = True
        return self._observe(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Lets the servos follow the action for 1/30 s.

        Raises:
            ConfigError: the action is not 7 finite angles.
            RobotError: the simulation became unstable.
        """
        if not self._running:
            raise gym.error.ResetNeeded("the episode is over or not begun: call reset()")
        wanted = np.clip(arm.check_joints(action, f"action at step {self._steps}"), arm.LOW, arm.HIGH)
        reach = arm.MAX_VELOCITY / CONTROL_HZ
        self._target = np.clip(wanted, self._target - reach, self._target + reach)
        self._data.ctrl[:] = self._target
        self._mujoco.mj_step(self._model, self._data, nstep=SUBSTEPS)
        if not np.isfinite(self._data.qpos).all():
            where = f"simulated arm, step {self._steps}"
            raise RobotError(where, expected="a stable simulation", got="NaN", fix="attempt the trial again")
        # Positions derived from the joints lag one substep behind after mj_step.
        self._mujoco.mj_forward(self._model, self._data)
        self._steps += 1
        observation, info = self._observe(), self._info()
        self._resting = self._resting + 1 if self._at_rest(self._present) else 0
        terminated = self._resting >= REST_STEPS
        truncated = not terminated and self._steps >= self._max_steps
        self._running = not (terminated or truncated)
        return observation, 0.0 if self._running else info["score"], terminated, truncated, info

    def render(self) -> UInt8[np.ndarray, "240 320 3"]:
        """A larger and finer picture for people, from the side; policies never see it."""
        return self._picture(240, 320, "fine", "side")

    def close(self) -> None:
        """Frees the renderers; may be called twice."""
        while self._renderers:
            self._renderers.popitem()[1].close()
        self._running = False

    @property
    def _present(self) -> S:
        if self.scene is None:
            raise gym.error.ResetNeeded("the episode is not begun: call reset()")
        return self.scene

    def _arrange(self, scene: S) -> None:
        # A new model for a new scene: nothing of the last episode can stay behind in it.
        if scene == self.scene:
            return
        self.close()
        self._model = self._mujoco.MjModel.from_xml_string(self._world(scene))
        self._data = self._mujoco.MjData(self._model)
        self.scene = scene

    def _picture(self, height: int, width: int, quality: Quality, camera: str) -> np.ndarray:
        key = (height, width, quality)
        if key not in self._renderers:
            self._renderers[key] = Renderer(self._model, height, width, quality)
        return self._renderers[key].frame(self._data, camera)

    def _grains(self) -> Float[np.ndarray, "grains 3"]:
        grains: np.ndarray = self._data.qpos[7:].reshape(-1, 3)
        return grains

    def _observe(self) -> dict[str, np.ndarray]:
        scene = self._present
        joints = np.clip(self._data.qpos[:7], arm.LOW, arm.HIGH).astype(np.float32)
        objects = np.array((*scene.bowl, *self._measured(scene)[0]), np.float32)
        observation = {"joints": joints, "objects": objects}
        if self._image_size:
            observation["front"] = self._picture(self._image_size, self._image_size, "fast", "front")
        return observation

    def _info(self) -> dict[str, Any]:
        info = self._measured(self._present)[1]
        return {"score": info["score"], "success": info["score"] > 0, **info}


def numbers(values: Any) -> str:
    """Numbers as an attribute of MJCF."""
    return " ".join(f"{float(value):.6g}" for value in values)


def vessel(
    radius: float, height: float, colour: str, kind: str, sides: int = 10, *, foot: float = 0.0, wall: float = WALL
) -> str:
    """A round vessel standing at the origin of its body, made of a disc and box walls, as MJCF.

    Args:
        radius: inner radius at the rim, metres.
        height: of the rim, metres.
        colour: red, green, blue and opacity.
        kind: the class of its geoms.
        sides: number of walls.
        foot: inner radius at the bottom, metres; 0 for that of the rim.
        wall: thickness, metres.
    """
    foot = foot or radius
    lean = math.atan2(radius - foot, height)
    disc = f'size="{foot + wall} {wall / 2}" pos="0 0 {wall / 2}" rgba="{colour}"'
    geoms = [f'<geom class="{kind}" type="cylinder" {disc}/>']
    half_width = (radius + wall) * math.tan(math.pi / sides)
    middle = (radius + foot) / 2 + wall / 2 * math.cos(lean)
    for i in range(sides):
        angle = 2 * math.pi * i / sides
        place = (middle * math.cos(angle), middle * math.sin(angle), (height - wall * math.sin(lean)) / 2)
        size = numbers((wall / 2, half_width, height / (2 * math.cos(lean))))
        turn = f'pos="{numbers(place)}" euler="{angle:.6g} {lean:.6g} 0"'
        geoms.append(f'<geom class="{kind}" type="box" size="{size}" {turn} rgba="{colour}"/>')
    return "".join(geoms)


def upright(pitch: float) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """The horizontal away from the arm and the vertical, in the flange frame, where the hand points downwards.

    Args:
        pitch: how far it points below the horizontal, radians.
    """
    return np.array([math.sin(pitch), 0.0, math.cos(pitch)]), np.array([math.cos(pitch), 0.0, -math.sin(pitch)])


def hand(
    fingers: str,
    name: str,
    place: tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]],
    mass: float,
    inertia: float,
    geoms: str,
) -> str:
    """The gripper and what it holds, in the flange frame, as MJCF.

    Args:
        fingers: elements of the gripper.
        name: of the body that is held.
        place: where that body's origin is, and its x axis; its y axis is that of the flange turned round.
        mass: of it, kg; its weight is cancelled.
        inertia: about each of its axes, kg m^2.
        geoms: its geoms.
    """
    foot, ahead = place
    return (
        '<inertial mass="0.7" pos="0 0 0.05" diaginertia="0.003 0.003 0.003"/>'
        '<geom class="arm" type="capsule" fromto="0 -0.06 0.03 0 0.06 0.03" size="0.03" rgba="0.93 0.93 0.92 1"/>'
        f"{fingers}"
        f'<body name="{name}" pos="{numbers(foot)}" xyaxes="{numbers((*ahead, 0, -1, 0))}" gravcomp="1">'
        f'<inertial mass="{mass}" pos="0 0 0.04" diaginertia="{inertia} {inertia} {inertia}"/>{geoms}</body>'
    )


def _camera(name: str, place: np.ndarray, towards: tuple[float, float, float], fovy: float) -> str:
    ahead = np.asarray(towards) - place
    right = np.cross(ahead, (0.0, 0.0, 1.0))
    axes = numbers((*right, *np.cross(right, ahead)))
    return f'<camera name="{name}" pos="{numbers(place)}" xyaxes="{axes}" fovy="{fovy}"/>'


def world(
    scene: Arrangement,
    *,
    held: str,
    bowl: str,
    grains: int,
    grain_radius: float,
    friction: float = 0.0,
    sleep: float = 0.0,
) -> str:
    """The whole world as MJCF; nothing is read from files.

    Args:
        scene: what varies.
        held: what `hand` gives; geoms of the class `held` touch grains, table and bowl.
        bowl: geoms of the class `fixed`.
        grains: how many there are.
        grain_radius: metres.
        friction: Coulomb's coefficient of grains, bowl and what is held; 0 for none at all.
        sleep: metres a second below which grains that nothing moving touches are not simulated; 0 to simulate all.
    """
    # A sphere's spin is not simulated, so three degrees of freedom describe a grain: exactly without friction, and
    # with it grains slide but never roll, as grains with edges do.
    joints = "".join(f'<joint type="slide" axis="{axis}" damping="0.002"/>' for axis in ("1 0 0", "0 1 0", "0 0 1"))
    grain = f'<body>{joints}<geom class="grain" rgba="{numbers((*scene.grain_colour, 1))}"/></body>'
    contact = f'condim="3" friction="{friction} 0.005 0.0001"' if friction else 'condim="1"'
    planks = "".join(
        f'<geom class="seen" type="box" size="0.6 0.08 0.003" pos="0.4 {-0.64 + 0.16 * i:.3g} -0.003" '
        f'rgba="{0.76 + shade} {0.63 + shade} {0.47 + shade} 1"/>'
        for i, shade in enumerate((0.0, 0.025, -0.02, 0.015, -0.01, 0.03, -0.015, 0.01, 0.0))
    )
    lamp = np.asarray(scene.light_from) / max(float(np.linalg.norm(scene.light_from)), 1e-6)
    return f"""<mujoco model="tabletop">
<compiler angle="radian" eulerseq="zyx"/>
<option timestep="{1 / (CONTROL_HZ * SUBSTEPS)}" integrator="implicitfast" tolerance="1e-6" sleep_tolerance="{sleep}">
  <flag autoreset="disable" sleep="{"enable" if sleep else "disable"}"/>
</option>
<visual>
  <headlight ambient="0.42 0.42 0.44" diffuse="0.22 0.22 0.22" specular="0 0 0"/>
  <map znear="0.05" zfar="12" shadowclip="0.9"/>
</visual>
<statistic extent="1" center="0.45 0 0.1"/>
<default>
  <geom solref="0.01 1" condim="3"/>
  <default class="seen"><geom contype="0" conaffinity="0" group="2"/></default>
  <default class="finger">
    <geom type="capsule" size="0.008" rgba="0.3 0.32 0.35 1" contype="0" conaffinity="0" group="2"/>
  </default>
  <default class="arm"><geom contype="0" conaffinity="2" mass="0"/></default>
  <default class="held"><geom contype="0" conaffinity="3" {contact} mass="0"/></default>
  <default class="fixed"><geom contype="3" conaffinity="0" {contact}/></default>
  <default class="grain">
    <geom type="sphere" size="{grain_radius}" contype="1" conaffinity="1" {contact} mass="0.002"/>
  </default>
</default>
<worldbody>
  <light name="lamp" directional="true" pos="{numbers(1.5 * lamp + (0.45, 0, 0.1))}" dir="{numbers(-lamp)}"
    diffuse="{numbers(scene.light_colour)}" specular="0.1 0.1 0.1"/>
  <geom class="seen" type="plane" size="6 6 1" pos="0 0 -0.75" rgba="0.72 0.74 0.76 1"/>
  <geom class="seen" type="box" size="0.05 5 2.5" pos="-1.6 0 1.5" rgba="0.80 0.84 0.87 1"/>
  <geom class="seen" type="box" size="0.57 0.68 0.36" pos="0.4 0 -0.372" rgba="0.45 0.40 0.36 1"/>
  <geom class="fixed" type="box" size="0.6 0.72 0.05" pos="0.4 0 -0.05" rgba="0.66 0.54 0.40 1" group="3"/>
  {planks}
  {arm.arm_xml(held)}
  <body name="bowl" pos="{numbers((*scene.bowl, 0))}">{bowl}</body>
  {grain * grains}
  {_camera("front", np.array([1.25, -0.04, 0.74]) + scene.camera_shift, (0.50, -0.04, 0.12), 44.0)}
  {_camera("side", np.array([1.50, -0.85, 0.85]), (0.36, 0.0, 0.22), 35.0)}
</worldbody>
<actuator>{arm.actuator_xml()}</actuator>
</mujoco>"""
