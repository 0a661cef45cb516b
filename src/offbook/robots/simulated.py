"""The project's own simulated robot cells: what `offbook arena worker` runs where there is no arm."""

from offbook.robots.base import SafetyLimits
from offbook.robots.gym import GymRobot
from offbook.sim.tabletop import arm, pour, scoop
from offbook.sim.tabletop.world import CONTROL_HZ


def pouring(image_size: int = 64) -> GymRobot:
    """The pouring cell: a seven-joint arm with a cup of grains and a bowl, absolute joint angles at 30 Hz.

    Args:
        image_size: height and width of the camera `front`, pixels.

    Example:
        >>> robot = pouring()
        >>> robot.spec.observation.state, robot.spec.rate_hz
        ((('joints', 7), ('objects', 7)), 30.0)
        >>> robot.close()
    """
    return _cell("offbook:pour", pour.MAX_STEPS, image_size)


def scooping(image_size: int = 64) -> GymRobot:
    """The scooping cell: the same arm with a spoon, and a bowl of grains.

    Args:
        image_size: height and width of the camera `front`, pixels.
    """
    return _cell("offbook:scoop", scoop.MAX_STEPS, image_size)


def _cell(environment: str, max_steps: int, image_size: int) -> GymRobot:
    # The simulated servos keep to the joints' speed limits by themselves; the guard clips and records jumps beyond
    # twice that, so that a trial here and a local evaluation of the same policy give the same numbers.
    jump = tuple(2 * arm.MAX_VELOCITY / CONTROL_HZ)
    limits = SafetyLimits(posture="joints", velocity=jump)
    return GymRobot(environment, limits=limits, max_steps=max_steps, image_size=image_size)
