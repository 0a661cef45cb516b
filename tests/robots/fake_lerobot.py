"""Stands in for LeRobot 0.4 (and draccus): its class of robots with recorded answers of a small arm with a camera."""

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import ClassVar

import numpy as np

MOTORS = ["shoulder_pan.pos", "elbow_flex.pos", "gripper.pos"]
RECORDED = [[1.2, -40.5, 20.1], [1.4, -40.1, 20.0], [1.9, -39.6, 20.0]]


class DeviceNotConnectedError(ConnectionError): ...


@dataclass
class SmallArmConfig:
    port: str
    id: str = ""
    speeds: bool = False
    calibrated: bool = True
    cameras: dict = field(default_factory=dict)


class SmallArm:
    """As LeRobot's followers: positions in, positions out; `most` lessens what is asked, as `max_relative_target`."""

    name = "small_arm"

    def __init__(self, config):
        self.config, self.is_connected, self.is_calibrated = config, False, config.calibrated
        self.place, self.sent, self.reads, self.fail, self.most = None, [], 0, {}, None

    @property
    def observation_features(self):
        speeds = {key.replace(".pos", ".vel"): float for key in MOTORS} if self.config.speeds else {}
        return {**dict.fromkeys(MOTORS, float), **speeds, "front": (48, 64, 3), "front_depth": (48, 64, 1)}

    @property
    def action_features(self):
        return dict.fromkeys(MOTORS, float)

    def connect(self, calibrate=True):
        assert not calibrate, "calibrating asks questions"
        self._may_fail("connect")
        self.is_connected = True

    def _may_fail(self, name):
        if name in self.fail:
            raise self.fail.pop(name)

    def get_observation(self):
        if not self.is_connected:
            raise DeviceNotConnectedError("small_arm is not connected.")
        self._may_fail("get_observation")
        place = self.place or RECORDED[min(self.reads, len(RECORDED) - 1)]
        self.reads += 1
        speeds = {key.replace(".pos", ".vel"): 0.5 for key in MOTORS} if self.config.speeds else {}
        picture = np.full((48, 64, 3), self.reads, np.uint8)
        return {**dict(zip(MOTORS, place, strict=True)), **speeds, "front": picture, "front_depth": picture[..., :1]}

    def send_action(self, action):
        self._may_fail("send_action")
        assert list(action) == MOTORS
        assert all(isinstance(value, float) for value in action.values())
        self.place = [action[key] if self.most is None else min(action[key], self.most) for key in MOTORS]
        self.sent.append(self.place)
        return dict(zip(MOTORS, self.place, strict=True))

    def disconnect(self):
        self.is_connected = False


def install(monkeypatch):
    """Makes the names importable as LeRobot lays them out: types are known once their modules were imported."""

    class RobotConfig:
        choices: ClassVar[dict] = {"small_arm": SmallArmConfig}

        @classmethod
        def get_known_choices(cls):
            return cls.choices

    def decode(kind, settings):
        settings = dict(settings)
        return kind.choices[settings.pop("type")](**settings)

    def module(name, **content):
        made = ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    module("draccus", decode=decode)
    robots = module("lerobot.robots", RobotConfig=RobotConfig, make_robot_from_config=SmallArm, __path__=[])
    cameras = module("lerobot.cameras", __path__=[])
    module("lerobot", robots=robots, cameras=cameras, __path__=[])
