"""How what a robot shows is called on a foreign server's side, and how its pictures are made to fit."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from offbook.client.protocol import Observation, ObservationSpec
from offbook.errors import ConfigError

LIKE = ("libero", "droid", "aloha", "lerobot")
"""The layouts of requests that are known by name; the first three are openpi's examples."""

_IMAGES = {
    "libero": ("observation/image", "observation/wrist_image"),
    "droid": ("observation/exterior_image_1_left", "observation/wrist_image_left"),
}
_WHOLE = {"libero": "observation/state", "aloha": "state", "lerobot": "state"}
# Of the droid layout: each key with the word that a part's name carries.
_DROID = {
    "observation/joint_position": "joint",
    "observation/gripper_position": "gripper",
    "observation/cartesian_position": "cartesian",
}


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a request holds.

    Attributes:
        observation: what is wanted of the robot.
        images: the camera behind each key.
        state: the parts of the state, joined in this order, behind each key.
        prompt: the key of the task in words; none is sent when empty.
        group: the key of an inner map that holds the images, where they have one.
        channels_first: whether images travel as (3, H, W).
        resize: height and width that images are brought to, keeping their proportions between black bars.
    """

    observation: ObservationSpec
    images: Mapping[str, str]
    state: Mapping[str, tuple[str, ...]]
    prompt: str = "prompt"
    group: str = ""
    channels_first: bool = False
    resize: tuple[int, int] | None = None

    def request(self, observation: Observation, row: int, prompt: str) -> dict[str, Any]:
        """One observation of a batch, as the server wants it."""
        parts = {
            key: observation.state[row, self.observation.columns(ObservationSpec(state=self._sized(wanted)))]
            for key, wanted in self.state.items()
        }
        pictures = {key: self._picture(observation.images[camera][row]) for key, camera in self.images.items()}
        images: dict[str, Any] = {self.group: pictures} if self.group else pictures
        return {**images, **parts, **({self.prompt: prompt} if self.prompt else {})}

    def blank(self) -> Observation:
        """An observation of nothing: zeros and grey pictures."""
        wanted = self.observation
        return Observation(
            sessions=("",),
            state=np.zeros((1, wanted.state_size), np.float32),
            images={camera: np.full((1, *size, 3), 127, np.uint8) for camera, size in wanted.cameras.items()},
            time=np.zeros(1),
        )

    def _sized(self, parts: Iterable[str]) -> tuple[tuple[str, int], ...]:
        sizes = dict(self.observation.state)
        return tuple((part, sizes[part]) for part in parts)

    def _picture(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        fitted = frame if self.resize is None else fit(frame, self.resize)
        return np.ascontiguousarray(fitted.transpose(2, 0, 1)) if self.channels_first else fitted


def fit(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) at another size: scaled as a whole, bilinear, in the middle of black bars.

    Example:
        >>> fit(np.full((10, 20, 3), 9, np.uint8), (8, 8))[:, 0, 0].tolist()
        [0, 0, 9, 9, 9, 9, 0, 0]
    """
    height, width = size
    scale = min(height / frame.shape[0], width / frame.shape[1])
    inner = max(1, int(frame.shape[0] * scale)), max(1, int(frame.shape[1] * scale))
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    canvas = np.zeros((height, width, 3), np.uint8)
    scaled = Image.fromarray(frame).resize((inner[1], inner[0]), Image.Resampling.BILINEAR)
    canvas[top : top + inner[0], left : left + inner[1]] = np.asarray(scaled)
    return canvas


def make_names(
    offered: ObservationSpec | None,
    *,
    like: str = "libero",
    images: Sequence[str] = (),
    state: Sequence[str] = (),
    prompt: str | None = None,
    resize: tuple[int, int] | None = None,
) -> Names:
    """Names from words of the command line.

    Args:
        offered: what the robot shows; None where that is not known: then every word tells a size.
        like: layout that fills in what the words leave out, one of `LIKE`.
        images: words `KEY=CAMERA`, or `KEY=CAMERA:HEIGHTxWIDTH`; those of the layout when empty.
        state: words `KEY=PART`, `KEY=PART+PART`, each part perhaps with its size as `PART:7`; those of the layout when
            empty.
        prompt: key of the task in words; that of the layout when None.
        resize: height and width that images are brought to.

    Raises:
        ConfigError: a word has another form, or names what the robot does not show.

    Example:
        >>> robot = ObservationSpec(state=(("joints", 7),), cameras={"front": (64, 64)})
        >>> make_names(robot).images, make_names(robot).state
        ({'observation/image': 'front'}, {'observation/state': ('joints',)})
    """
    sizes: dict[str, int] = {}
    shapes: dict[str, tuple[int, int]] = {}
    chosen = {key: _camera(word, offered, shapes) for key, word in map(_split, images)}
    parts = {key: tuple(_part(one, offered, sizes) for one in word.split("+")) for key, word in map(_split, state)}
    usual = None if offered is None else _layout(offered, like)
    if usual is None and not (chosen or parts):
        fix = "add --robot NAME, or tell sizes: --image KEY=CAMERA:224x224 --state KEY=PART:7"
        raise ConfigError("names", expected="a robot, or every name with its size", got="neither", fix=fix)
    if usual is not None and not chosen:
        chosen, shapes = dict(usual.images), {camera: usual.observation.cameras[camera] for camera in
                                              usual.images.values()}  # fmt: skip
    if usual is not None and not parts:
        parts, known = dict(usual.state), dict(usual.observation.state)
        sizes = {part: known[part] for joined in parts.values() for part in joined}
    spec = ObservationSpec(state=tuple(sizes.items()), cameras=shapes)
    key = {"lerobot": "task"}.get(like, "prompt") if prompt is None else prompt
    aloha = like == "aloha"
    return Names(
        observation=spec,
        images=chosen,
        state=parts,
        prompt=key,
        group="images" if aloha else "",
        channels_first=aloha,
        resize=resize,
    )


def _layout(offered: ObservationSpec, like: str) -> Names:
    """The names of a known layout, as far as the robot shows what they stand for."""
    cameras, parts = list(offered.cameras), [part for part, _ in offered.state]
    keys = _IMAGES.get(like, tuple(cameras))
    images = dict(zip(keys, cameras, strict=False))
    if like == "droid":
        found = {key: next((part for part in parts if word in part), "") for key, word in _DROID.items()}
        state: dict[str, tuple[str, ...]] = {key: (part,) for key, part in found.items() if part}
    else:
        state = {_WHOLE[like]: tuple(parts)} if parts else {}
    return Names(observation=offered, images=images, state=state)


def _split(word: str) -> tuple[str, str]:
    key, equals, rest = word.partition("=")
    if not (key and equals and rest):
        raise ConfigError("name", expected="KEY=NAME", got=repr(word), fix="write observation/image=front")
    return key, rest


def _camera(word: str, offered: ObservationSpec | None, shapes: dict[str, tuple[int, int]]) -> str:
    found = re.fullmatch(r"([^:]+)(?::(\d{1,4})x(\d{1,4}))?", word)
    if not found:
        raise ConfigError("--image", expected="CAMERA or CAMERA:224x224 behind the =", got=word, fix="correct it")
    camera = found[1]
    if found[2]:
        shapes[camera] = (int(found[2]), int(found[3]))
    elif offered is None or camera not in offered.cameras:
        _unknown("--image", "camera", camera, offered.cameras if offered else None)
    else:
        shapes[camera] = offered.cameras[camera]
    return camera


def _part(word: str, offered: ObservationSpec | None, sizes: dict[str, int]) -> str:
    found = re.fullmatch(r"([^:]+)(?::(\d{1,5}))?", word)
    if not found:
        raise ConfigError("--state", expected="PART or PART:7 behind the =", got=word, fix="correct it")
    part = found[1]
    known = dict(offered.state) if offered else {}
    if found[2]:
        sizes[part] = int(found[2])
    elif part not in known:
        _unknown("--state", "part of the state", part, known if offered else None)
    else:
        sizes[part] = known[part]
    return part


def _unknown(flag: str, what: str, name: str, known: Mapping[str, Any] | None) -> None:
    if known is None:
        size = "224x224" if flag == "--image" else "7"
        fix = f"write {name}:{size}, or add --robot NAME"
        raise ConfigError(flag, expected=f"a {what} with its size", got=repr(name), fix=fix)
    shown = ", ".join(known) or "none"
    raise ConfigError(flag, expected=f"a {what} that the robot shows", got=repr(name), fix=f"choose one of: {shown}")
