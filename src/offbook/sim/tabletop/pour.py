"""Pouring: the arm holds a cup of grains and shall empty it into a bowl on the table.

Source: the task follows the pouring task of "Train Offline, Test Online: A Real Robot Learning Benchmark" (2023):
seven absolute joint angles in and out, 30 Hz, a reward that is 0 until the last step and then the amount poured, and
success when that is above 0. The world, the bodies and the figures are our own.
"""

import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from jaxtyping import Float, UInt8

from offbook.errors import ConfigError, RobotError
from offbook.sim.tabletop import arm
from offbook.sim.tabletop.render import Quality, Renderer, prepare_mujoco
from offbook.sim.tabletop.scene import SPLITS, Scene, scenes

__all__ = ["CUP_HEIGHT", "SPLITS", "START", "Pour", "Scene", "cup_frame", "scenes"]

CONTROL_HZ = 30.0
MAX_STEPS = 160
SUBSTEPS = 8
REST_STEPS = 15  # half a second in which nothing has moved any more
GRAINS = 20
GRAIN_RADIUS = 0.0085
WALL = 0.005
CUP_HEIGHT = 0.10
OBJECTS = ("bowl_x", "bowl_y", "rim_z", "bowl_radius", "cup_radius", "in_bowl", "in_cup")
"""The entries of the observation `objects`: metres, and fractions of the grains."""

_PITCH = math.radians(60)  # how far the hand points below the horizontal while the cup is upright
_GRIP = 0.12  # metres from the flange to where the fingers hold the cup
_UP = np.array([math.cos(_PITCH), 0.0, -math.sin(_PITCH)])
_AHEAD = np.array([math.sin(_PITCH), 0.0, math.cos(_PITCH)])

START = np.array([0.0, -0.5121, 0.0, -2.8475, 0.0, 2.8590, 0.0])
"""Joint angles at which an episode begins, up to 0.02 rad in each joint: the cup upright, above the table's middle."""


def cup_frame(cup_radius: float) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Where the cup is in the hand: the centre of its mouth and its axis (towards the mouth), in the flange frame.

    Args:
        cup_radius: inner radius of the cup, metres.
    """
    axis_foot = np.array([0.0, 0.0, _GRIP]) + _AHEAD * (cup_radius + WALL)
    return axis_foot + _UP * (CUP_HEIGHT / 2), _UP.copy()


class Pour(gym.Env[Any, np.ndarray]):
    """The pouring task as a gymnasium environment.

    Observations: `joints` (7,) radians; `objects` (7,), see `OBJECTS`, which a real robot does not know; `front`
    (H, W, 3) uint8, the camera. Actions: (7,) joint angles in radians that the servos go for until the next step,
    no faster than the joints' speed limits. An episode is truncated after `max_steps`, and terminated before that once
    all grains have come to rest outside the cup. The reward is 0 except at the last step, where it is the fraction of
    the grains in the bowl; `info["score"]` is that fraction at each step, `info["success"]` whether it is above 0.

    Args:
        image_size: height and width of the camera's picture in pixels, 16 or more; 0 for no camera.
        split: from which `scenes` an episode without the option `scene` draws its arrangement.
        max_steps: longest episode in control steps.

    Example:
        >>> env = Pour(image_size=0)
        >>> observation, info = env.reset(seed=1, options={"scene": {"bowl": [0.5, 0.1]}})
        >>> observation["joints"].shape, info["score"]
        ((7,), 0.0)
        >>> env.close()
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30, "control_hz": CONTROL_HZ}  # noqa: RUF012 (gymnasium's)
    render_mode = "rgb_array"
    prompt = "pour the grains from the cup into the bowl"

    def __init__(self, *, image_size: int = 64, split: str = "seen", max_steps: int = MAX_STEPS) -> None:
        if image_size and not 16 <= image_size <= 1024:
            raise ConfigError(
                "image_size", expected="16 to 1024 pixels, or 0", got=str(image_size), fix="choose another size"
            )
        if max_steps < 1:
            raise ConfigError("max_steps", expected="1 or more", got=str(max_steps), fix="allow longer episodes")
        scenes(split, 0, 0)  # refuses an unknown split
        self._mujoco = prepare_mujoco()
        self._split, self._max_steps, self._image_size = split, max_steps, image_size
        parts: list[tuple[str, spaces.Space[Any]]] = [
            ("joints", spaces.Box(arm.LOW.astype(np.float32), arm.HIGH.astype(np.float32))),
            ("objects", spaces.Box(-2.0, 2.0, (len(OBJECTS),), np.float32)),
        ]
        if image_size:
            parts.append(("front", spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)))
        self.observation_space = spaces.Dict(parts)
        self.action_space = spaces.Box(arm.LOW.astype(np.float32), arm.HIGH.astype(np.float32))
        self.scene: Scene | None = None
        self._renderers: dict[tuple[int, int, Quality], Renderer] = {}
        self._running = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begins an episode.

        Args:
            seed: fixes the start posture, the grains and, without a scene, the arrangement.
            options: `{"scene": record}` with a record for `Scene.from_json`.

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
        self._arrange(Scene.from_json(scenes(self._split, 1, drawn)[0] if record is None else record))
        mujoco, model, data = self._mujoco, self._model, self._data
        mujoco.mj_resetData(model, data)
        self._target = START + self.np_random.uniform(-0.02, 0.02, 7)
        data.qpos[:7] = data.ctrl[:] = self._target
        mujoco.mj_kinematics(model, data)
        cup = data.body("cup")
        data.qpos[7:] = (cup.xpos + self._filling() @ cup.xmat.reshape(3, 3).T).ravel()
        mujoco.mj_step(model, data, nstep=60)  # the grains settle in the cup
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
        self._resting = self._resting + 1 if self._at_rest() else 0
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

    def _arrange(self, scene: Scene) -> None:
        # A new model for a new scene: nothing of the last episode can stay behind in it.
        if scene == self.scene:
            return
        self.close()
        self._model = self._mujoco.MjModel.from_xml_string(world_xml(scene))
        self._data = self._mujoco.MjData(self._model)
        self.scene = scene

    def _picture(self, height: int, width: int, quality: Quality, camera: str) -> np.ndarray:
        key = (height, width, quality)
        if key not in self._renderers:
            self._renderers[key] = Renderer(self._model, height, width, quality)
        return self._renderers[key].frame(self._data, camera)

    def _filling(self) -> Float[np.ndarray, "grains 3"]:
        """Places of the grains in the cup's frame: layers of one in the middle and seven around it."""
        assert self.scene is not None
        ring = self.scene.cup_radius - GRAIN_RADIUS - 0.001
        layer, place = np.divmod(np.arange(GRAINS), 8)
        angle = place * (2 * np.pi / 7) + layer * 0.4
        distance = np.where(place == 7, 0.0, ring)
        height = WALL + GRAIN_RADIUS + 0.001 + layer * (2 * GRAIN_RADIUS + 0.001)
        jitter = self.np_random.uniform(-0.0002, 0.0002, (GRAINS, 3))
        return np.stack([distance * np.cos(angle), distance * np.sin(angle), height], 1) + jitter

    def _fractions(self) -> tuple[float, float]:
        """Fractions of the grains in the bowl and in the cup."""
        scene, grains, cup = self.scene, self._grains(), self._data.body("cup")
        assert scene is not None
        from_bowl = np.hypot(*(grains[:, :2] - scene.bowl).T)
        in_bowl = (from_bowl < scene.bowl_radius) & (grains[:, 2] < scene.bowl_height) & (grains[:, 2] > 0)
        local = (grains - cup.xpos) @ cup.xmat.reshape(3, 3)
        in_cup = (np.hypot(local[:, 0], local[:, 1]) < scene.cup_radius) & (np.abs(local[:, 2] - 0.05) < 0.05)
        return float(in_bowl.mean()), float((in_cup & ~in_bowl).mean())

    def _grains(self) -> Float[np.ndarray, "grains 3"]:
        grains: np.ndarray = self._data.qpos[7:].reshape(GRAINS, 3)
        return grains

    def _at_rest(self) -> bool:
        """Whether no grain is in the cup or in the air any more."""
        scene, grains = self.scene, self._grains()
        assert scene is not None
        low = grains[:, 2] < np.where(
            np.hypot(*(grains[:, :2] - scene.bowl).T) < scene.bowl_radius, scene.bowl_height, 2 * GRAIN_RADIUS
        )
        return bool(low.all()) and self._fractions()[1] == 0.0

    def _observe(self) -> dict[str, np.ndarray]:
        scene = self.scene
        assert scene is not None
        in_bowl, in_cup = self._fractions()
        objects = (*scene.bowl, scene.bowl_height, scene.bowl_radius, scene.cup_radius, in_bowl, in_cup)
        joints = np.clip(self._data.qpos[:7], arm.LOW, arm.HIGH).astype(np.float32)
        observation = {"joints": joints, "objects": np.array(objects, np.float32)}
        if self._image_size:
            observation["front"] = self._picture(self._image_size, self._image_size, "fast", "front")
        return observation

    def _info(self) -> dict[str, Any]:
        in_bowl, in_cup = self._fractions()
        return {"score": in_bowl, "success": in_bowl > 0, "in_cup": in_cup}


def _numbers(values: Any) -> str:
    return " ".join(f"{float(value):.6g}" for value in values)


def _vessel(radius: float, height: float, colour: str, kind: str, sides: int = 10) -> str:
    """A round vessel standing at the origin of its body, made of a disc and box walls, as MJCF."""
    disc = f'size="{radius + WALL} {WALL / 2}" pos="0 0 {WALL / 2}" rgba="{colour}"'
    geoms = [f'<geom class="{kind}" type="cylinder" {disc}/>']
    half_width = (radius + WALL) * math.tan(math.pi / sides)
    for i in range(sides):
        angle = 2 * math.pi * i / sides
        place = _numbers(((radius + WALL / 2) * math.cos(angle), (radius + WALL / 2) * math.sin(angle), height / 2))
        size = _numbers((WALL / 2, half_width, height / 2))
        geoms.append(
            f'<geom class="{kind}" type="box" size="{size}" pos="{place}" euler="0 0 {angle:.6g}" rgba="{colour}"/>'
        )
    return "".join(geoms)


def _hand_xml(scene: Scene) -> str:
    """The gripper and the cup in the flange frame."""
    mouth, up = cup_frame(scene.cup_radius)
    reach = scene.cup_radius + WALL + 0.006
    fingers = ""
    for side in (-1, 1):
        knuckle = (0.0, side * 0.03, 0.055)
        bend = np.array([0.0, side * reach, _GRIP]) + _AHEAD * 0.004
        tip = bend + _AHEAD * (scene.cup_radius + 0.012)
        fingers += (
            f'<geom class="finger" fromto="{_numbers((*knuckle, *bend))}"/>'
            f'<geom class="finger" fromto="{_numbers((*bend, *tip))}"/>'
        )
    foot = mouth - up * CUP_HEIGHT
    axes = _numbers((*_AHEAD, 0, -1, 0))
    return (
        '<inertial mass="0.7" pos="0 0 0.05" diaginertia="0.003 0.003 0.003"/>'
        '<geom class="arm" type="capsule" fromto="0 -0.06 0.03 0 0.06 0.03" size="0.03" rgba="0.93 0.93 0.92 1"/>'
        f"{fingers}"
        f'<body name="cup" pos="{_numbers(foot)}" xyaxes="{axes}" gravcomp="1">'
        '<inertial mass="0.15" pos="0 0 0.04" diaginertia="0.0002 0.0002 0.0002"/>'
        f"{_vessel(scene.cup_radius, CUP_HEIGHT, _numbers((*scene.cup_colour, 1)), 'cup')}</body>"
    )


def _camera_xml(name: str, place: np.ndarray, towards: tuple[float, float, float], fovy: float) -> str:
    ahead = np.asarray(towards) - place
    right = np.cross(ahead, (0.0, 0.0, 1.0))
    axes = _numbers((*right, *np.cross(right, ahead)))
    return f'<camera name="{name}" pos="{_numbers(place)}" xyaxes="{axes}" fovy="{fovy}"/>'


def world_xml(scene: Scene) -> str:
    """The whole world of one scene as MJCF; nothing is read from files."""
    grain = "".join(f'<joint type="slide" axis="{axis}" damping="0.002"/>' for axis in ("1 0 0", "0 1 0", "0 0 1"))
    # Without friction a sphere's spin has no effect, so three degrees of freedom describe a grain exactly.
    grains = f'<body>{grain}<geom class="grain" rgba="{_numbers((*scene.grain_colour, 1))}"/></body>' * GRAINS
    planks = "".join(
        f'<geom class="seen" type="box" size="0.6 0.08 0.003" pos="0.4 {-0.64 + 0.16 * i:.3g} -0.003" '
        f'rgba="{0.76 + shade} {0.63 + shade} {0.47 + shade} 1"/>'
        for i, shade in enumerate((0.0, 0.025, -0.02, 0.015, -0.01, 0.03, -0.015, 0.01, 0.0))
    )
    lamp = np.asarray(scene.light_from) / max(float(np.linalg.norm(scene.light_from)), 1e-6)
    shift = np.asarray(scene.camera_shift)
    return f"""<mujoco model="pour">
<compiler angle="radian"/>
<option timestep="{1 / (CONTROL_HZ * SUBSTEPS)}" integrator="implicitfast" tolerance="1e-6">
  <flag autoreset="disable"/>
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
  <default class="cup"><geom contype="0" conaffinity="3" condim="1" mass="0"/></default>
  <default class="fixed"><geom contype="3" conaffinity="0" condim="1"/></default>
  <default class="grain">
    <geom type="sphere" size="{GRAIN_RADIUS}" contype="1" conaffinity="1" condim="1" mass="0.002"/>
  </default>
</default>
<worldbody>
  <light name="lamp" directional="true" pos="{_numbers(1.5 * lamp + (0.45, 0, 0.1))}" dir="{_numbers(-lamp)}"
    diffuse="{_numbers(scene.light_colour)}" specular="0.1 0.1 0.1"/>
  <geom class="seen" type="plane" size="6 6 1" pos="0 0 -0.75" rgba="0.72 0.74 0.76 1"/>
  <geom class="seen" type="box" size="0.05 5 2.5" pos="-1.6 0 1.5" rgba="0.80 0.84 0.87 1"/>
  <geom class="seen" type="box" size="0.57 0.68 0.36" pos="0.4 0 -0.372" rgba="0.45 0.40 0.36 1"/>
  <geom class="fixed" type="box" size="0.6 0.72 0.05" pos="0.4 0 -0.05" rgba="0.66 0.54 0.40 1" group="3"/>
  {planks}
  {arm.arm_xml(_hand_xml(scene))}
  <body name="bowl" pos="{_numbers((*scene.bowl, 0))}">
    {_vessel(scene.bowl_radius, scene.bowl_height, _numbers((*scene.bowl_colour, 1)), "fixed", 16)}
  </body>
  {grains}
  {_camera_xml("front", np.array([1.25, -0.04, 0.74]) + shift, (0.50, -0.04, 0.12), 44.0)}
  {_camera_xml("side", np.array([1.50, -0.85, 0.85]), (0.36, 0.0, 0.22), 35.0)}
</worldbody>
<actuator>{arm.actuator_xml()}</actuator>
</mujoco>"""
