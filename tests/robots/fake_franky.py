"""Stands in for the library franky 2.0: the names and shapes that the driver uses, answering as a recorded arm did.

The postures were recorded with the real library on its makers' simulated Research 3: an episode's start and the places
after 10, 20, 30 and 44 commands of a slow wave.
"""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np

RECORDED = np.array(
    [
        [0.0, -0.7727, 0.0, -2.3385, 0.0, 1.5709, 0.7850],
        [0.0001, -0.7711, 0.0, -2.3363, 0.0001, 1.5708, 0.7851],
        [0.0005, -0.7658, 0.0, -2.3288, 0.0005, 1.5708, 0.7858],
        [0.0023, -0.7550, 0.0, -2.3136, 0.0022, 1.5707, 0.7879],
    ]
)


def _named(name, base):
    return type(name, (base,), {})


CommandException = _named("CommandException", Exception)
ControlException = _named("ControlException", Exception)
NetworkException = _named("NetworkException", Exception)

REFLEX = 'libfranka: Move command aborted: motion aborted by reflex! ["cartesian_reflex"]'
SILENCE = "libfranka: UDP receive: Timeout"


class RealtimeConfig:
    Enforce, Ignore = "enforce", "ignore"


class Frame:
    EndEffector = "end effector"


class JointMotion:
    def __init__(self, target, return_when_finished=True):
        assert isinstance(target, list)
        assert len(target) == 7
        self.target, self.return_when_finished, self.used = target, return_when_finished, False


class JointStopMotion:
    used = False


class Robot:
    """The newest one stands in `made`; `fail` holds what the next call of a name raises."""

    made: ClassVar[list] = []
    refuses_to_connect = None

    def __init__(self, fci_hostname, relative_dynamics_factor=1.0, realtime_config=RealtimeConfig.Enforce):
        if Robot.refuses_to_connect:
            raise Robot.refuses_to_connect
        self.host, self.factor, self.realtime = fci_hostname, relative_dynamics_factor, realtime_config
        self.moves, self.stops, self.recoveries, self.reads = [], 0, 0, 0
        self.is_in_control, self.has_errors, self.recovers = False, False, True
        self.fail, self.stored = {}, None
        self.model = SimpleNamespace(pose=self._pose)
        Robot.made.append(self)

    def _may_fail(self, name):
        if name in self.fail:
            raise self.fail.pop(name)

    @staticmethod
    def _pose(frame, angles, flange_to_tool, tool_to_stiffness):
        assert (frame, flange_to_tool, tool_to_stiffness) == (Frame.EndEffector, "F_T_EE", "EE_T_K")
        return SimpleNamespace(translation=np.array([0.3 + angles[0], 0.0, 0.5]))

    @property
    def state(self):
        return SimpleNamespace(F_T_EE="F_T_EE", EE_T_K="EE_T_K", current_errors='["cartesian_reflex"]')

    @property
    def current_joint_state(self):
        self._may_fail("read")
        self.reads += 1
        return SimpleNamespace(position=RECORDED[min(self.reads - 1, len(RECORDED) - 1)])

    def move(self, motion, asynchronous=False):
        # As the real one: an asynchronous motion's error is kept and raised by the next call.
        if self.stored:
            stored, self.stored = self.stored, None
            self.is_in_control = False
            raise stored
        assert not motion.used, "a motion object is for one use"
        motion.used = True
        self._may_fail("move")
        self.moves.append((motion, asynchronous))
        self.is_in_control = asynchronous and isinstance(motion, JointMotion)

    def join_motion(self, timeout=None):
        if self.stored:
            stored, self.stored = self.stored, None
            raise stored
        return True

    def stop(self):
        self._may_fail("stop")
        self.stops += 1
        self.is_in_control = False

    def recover_from_errors(self):
        self.recoveries += 1
        self.has_errors = not self.recovers
        return self.recovers
