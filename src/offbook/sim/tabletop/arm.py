"""A 7-joint arm with the Franka Panda's public kinematic offsets and joint limits, drawn from capsules.

The kinematics are plain NumPy, so that a policy can plan with them without simulating anything; `arm_xml` writes
the same arm as MuJoCo's MJCF. Joint angles are radians, positions metres in the frame of the arm's base.
"""

import functools

import numpy as np
from jaxtyping import Float

from offbook.errors import ConfigError

# Denavit-Hartenberg parameters in Craig's convention: a, d (metres), alpha (radians) of each joint; then the flange.
_A = (0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088)
_D = (0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0)
_ALPHA = (0.0, -np.pi / 2, np.pi / 2, np.pi / 2, -np.pi / 2, np.pi / 2, np.pi / 2)
FLANGE = 0.107

LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
MAX_VELOCITY = 0.5 * np.array([2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61])
"""Largest speed of each joint, radians per second: half of what the Panda can do, as a careful laboratory sets it."""

_MAX_TORQUE = (87, 87, 87, 87, 12, 12, 12)
# Masses and the inertia about each link's own axes are round figures of the right size; the arm's weight is cancelled.
_MASS = (3.0, 3.0, 2.5, 2.5, 2.0, 1.5, 0.7)
_STIFFNESS = (1200, 1200, 1200, 1200, 400, 400, 300)
_DAMPING = (110, 110, 100, 100, 34, 30, 22)


def forward(joints: Float[np.ndarray, "7"]) -> Float[np.ndarray, "8 4 4"]:
    """Poses of the seven joint frames and, last, of the flange.

    Args:
        joints: joint angles in radians.

    Returns:
        Homogeneous transforms from each frame to the base; joint i turns about the z axis of frame i.

    Example:
        >>> forward(np.zeros(7))[-1, 2, 3].round(3).item()  # height of the hand, the arm stretched upwards
        0.926
    """
    frames = np.empty((8, 4, 4))
    pose = np.eye(4)
    cosines, sines = np.cos(joints), np.sin(joints)
    for i in range(7):
        c, s = cosines[i], sines[i]
        ca, sa = _COS_ALPHA[i], _SIN_ALPHA[i]
        step = np.array(
            [
                [c, -s, 0.0, _A[i]],
                [s * ca, c * ca, -sa, -_D[i] * sa],
                [s * sa, c * sa, ca, _D[i] * ca],
                [0.0, 0.0, 0.0, 1.0],
            ]
        )
        pose = pose @ step
        frames[i] = pose
    frames[7] = pose
    frames[7, :3, 3] += FLANGE * pose[:3, 2]
    return frames


_COS_ALPHA, _SIN_ALPHA = np.cos(_ALPHA), np.sin(_ALPHA)


def reach(
    joints: Float[np.ndarray, "7"],
    *,
    point: Float[np.ndarray, "3"],
    axis: Float[np.ndarray, "3"],
    target_point: Float[np.ndarray, "3"],
    target_axis: Float[np.ndarray, "3"],
    rest: Float[np.ndarray, "7"],
    iterations: int = 4,
) -> Float[np.ndarray, "7"]:
    """Joint angles that bring a point of the hand to a place and an axis of the hand to a direction.

    Damped least squares on the five constraints; the two joints to spare are drawn towards a rest posture.

    Args:
        joints: where to begin, radians.
        point: a point fixed to the hand, metres in the flange frame.
        axis: a unit vector fixed to the hand, in the flange frame.
        target_point: where the point shall be, metres in the base frame.
        target_axis: where the axis shall point, a unit vector in the base frame.
        rest: posture preferred among those that serve equally well, radians.
        iterations: Newton steps; few are enough when the targets move slowly.

    Returns:
        Joint angles within the limits; the best found when the target is out of reach.

    Example:
        >>> joints = np.array([0.0, -0.3, 0.0, -2.4, 0.0, 2.2, 0.0])
        >>> zero, up = np.zeros(3), np.array([0.0, 0.0, 1.0])
        >>> there = np.array([0.5, 0.1, 0.4])
        >>> down = reach(joints, point=zero, axis=up, target_point=there, target_axis=-up, rest=joints, iterations=30)
        >>> forward(down)[-1, :3, 3].round(3).tolist()
        [0.5, 0.1, 0.4]
    """
    angle_weight = 0.3  # metres for each radian: an error of 1 cm counts like one of 2 degrees
    joints = np.asarray(joints, np.float64).copy()
    jacobian = np.empty((6, 7))
    for _ in range(iterations):
        frames = forward(joints)
        rotation, origin = frames[7, :3, :3], frames[7, :3, 3]
        here, now = origin + rotation @ point, rotation @ axis
        error = np.concatenate([target_point - here, angle_weight * np.cross(now, target_axis)])
        turns = frames[:7, :3, 2]
        jacobian[:3] = np.cross(turns, here - frames[:7, :3, 3]).T
        jacobian[3:] = angle_weight * (turns - np.outer(turns @ now, now)).T
        inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + 1e-4 * np.eye(6))
        spare = (rest - joints) - inverse @ (jacobian @ (rest - joints))
        joints = np.clip(joints + np.clip(inverse @ error + 0.05 * spare, -0.2, 0.2), LOW, HIGH)
    return joints


def check_joints(values: np.ndarray, where: str) -> Float[np.ndarray, "7"]:
    """Seven finite joint angles as float64.

    Raises:
        ConfigError: there are not seven, or one is NaN or infinite.
    """
    array = np.asarray(values, np.float64)
    if array.shape != (7,) or not np.isfinite(array).all():
        got = f"shape {array.shape}" if array.shape != (7,) else str(array.tolist())
        raise ConfigError(where, expected="7 finite joint angles in radians", got=got, fix="check the policy")
    return array


_WHITE, _GREY, _DARK = "0.93 0.93 0.92 1", "0.62 0.64 0.67 1", "0.2 0.22 0.25 1"
# Body frames relative to their parents, as the table above gives them: position and quaternion.
_FRAMES = (
    ("0 0 0.333", "1 0 0 0"),
    ("0 0 0", "1 -1 0 0"),
    ("0 -0.316 0", "1 1 0 0"),
    ("0.0825 0 0", "1 1 0 0"),
    ("-0.0825 0.384 0", "1 -1 0 0"),
    ("0 0 0", "1 1 0 0"),
    ("0.088 0 0", "1 1 0 0"),
)
# Capsules of each link: end points, radius (metres), colour.
_LINKS = (
    (("0 0 -0.2 0 0 -0.05", 0.062, _WHITE), ("0 0 -0.05 0 0 0.05", 0.058, _GREY)),
    (("0 -0.06 0 0 -0.19 0", 0.060, _WHITE), ("0 0 -0.055 0 0 0.055", 0.056, _WHITE)),
    (("0 0 -0.08 0.05 0 -0.03", 0.054, _WHITE), ("0.0825 -0.045 0 0.0825 0.045 0", 0.05, _GREY)),
    (("0 0 -0.04 0 0 0.04", 0.05, _WHITE), ("-0.03 0.05 0 -0.0825 0.12 0", 0.05, _WHITE)),
    (("0 0 -0.24 0 0 -0.12", 0.05, _WHITE), ("0 0.06 -0.1 0 0.07 -0.02", 0.036, _GREY)),
    (("0 0 -0.04 0 0 0.04", 0.048, _WHITE), ("0.02 0 0 0.07 0 0", 0.042, _WHITE)),
    (("0 0 -0.03 0 0 0.07", 0.04, _GREY),),
)


def arm_xml(held: str) -> str:
    """The arm as an MJCF body at the origin, with gravity compensation, holding something.

    Args:
        held: MJCF elements fixed to the flange, in the flange frame.

    Returns:
        A `<body>` for the world body; its joints are named joint1 to joint7. Its capsules touch what has bit 2 set in
        its collision type.
    """
    base = (
        f'<geom class="arm" type="cylinder" fromto="0 0 0 0 0 0.04" size="0.1" rgba="{_DARK}"/>'
        f'<geom class="arm" type="capsule" fromto="0 0 0.05 0 0 0.14" size="0.066" rgba="{_WHITE}"/>'
    )
    bodies = f'<body name="hand" pos="0 0 {FLANGE}" gravcomp="1">{held}</body>'
    for i in reversed(range(7)):
        geoms = "".join(
            f'<geom class="arm" type="capsule" fromto="{ends}" size="{radius}" rgba="{colour}"/>'
            for ends, radius, colour in _LINKS[i]
        )
        bodies = (
            f'<body name="link{i + 1}" pos="{_FRAMES[i][0]}" quat="{_FRAMES[i][1]}" gravcomp="1">'
            f'<inertial mass="{_MASS[i]}" pos="0 0 0" diaginertia="0.03 0.03 0.03"/>'
            f'<joint name="joint{i + 1}" axis="0 0 1" range="{LOW[i]} {HIGH[i]}" armature="0.1" damping="1"/>'
            f"{geoms}{bodies}</body>"
        )
    return f"{base}{bodies}"


@functools.cache
def actuator_xml() -> str:
    """Position servos of the seven joints, with the Panda's torque limits, as MJCF."""
    return "".join(
        f'<position joint="joint{i + 1}" kp="{_STIFFNESS[i]}" kv="{_DAMPING[i]}" ctrlrange="{LOW[i]} {HIGH[i]}" '
        f'forcerange="-{_MAX_TORQUE[i]} {_MAX_TORQUE[i]}"/>'
        for i in range(7)
    )
