"""The project's own simulated robot cells: what `offbook arena worker` runs where there is no arm."""

from offbook.robots.base import SafetyLimits
from offbook.robots.gym import GymRobot
from offbook.sim.tabletop import arm
from offbook.sim.tabletop.pour import CONTROL_HZ, MAX_STEPS


def pour(image_size: int = 64) -> GymRobot:
    """The pouring cell: a seven-joint arm with a cup of grains and a bowl, absolute joint angles at 30 Hz.

    Args:
        image_size: height and width of the camera `front`, pixels.

    Example:
        >>> robot = pour()
        >>> robot.spec.observation.state, robot.spec.rate_hz
        ((('joints', 7), ('objects', 7)), 30.0)
        >>> robot.close()
    """
    # The simulated servos keep to the joints' speed limits by themselves; the guard clips and records jumps beyond
    # twice that, so that a trial here and a local evaluation of the same policy give the same numbers.
    jump = tuple(2 * arm.MAX_VELOCITY / CONTROL_HZ)
    limits = SafetyLimits(posture="joints", velocity=jump)
    return GymRobot("offbook:pour", limits=limits, max_steps=MAX_STEPS, image_size=image_size)
