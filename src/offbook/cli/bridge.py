"""`offbook policy bridge`: a policy behind somebody else's server plays for an arena."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from offbook.bridges.names import Names, make_names
from offbook.bridges.openpi import OpenPiServer
from offbook.bridges.policy import BridgedPolicy, Server
from offbook.cli.access import URL, read_settings, read_token
from offbook.cli.policy import play, rehearsed
from offbook.cli.report import Report
from offbook.errors import ConfigError, OffbookError


def bridge(
    *,
    openpi: str | None = None,
    lerobot: str | None = None,
    robot: str | None = None,
    settings: Path | None = None,
    like: Literal["libero", "droid", "aloha"] | None = None,
    image: tuple[str, ...] = (),
    state: tuple[str, ...] = (),
    prompt_key: str | None = None,
    resize: tuple[int, int] | None = None,
    horizon: int | None = None,
    policy: str | None = None,
    chunk: int = 50,
    device: str = "cpu",
    name: str | None = None,
    url: str = URL,
    submission: str | None = None,
    token_file: Path | None = None,
    images: Literal["raw", "jpeg", "png"] | None = None,
    once: bool = False,
    dry_run: bool = False,
    seconds: float = 20.0,
) -> Report:
    """Lets a policy on another project's server play the trials of one submission. The server stays as it is.

    Run it where the server can be reached, such as on the same machine: it asks the server, and dials out to the arena
    as offbook policy serve does. An openpi or RoboArena server is asked over its websocket; LeRobot's policy server is
    told to load a policy first. Try it with --dry-run before: one episode on a simulated robot, no arena.

    Args:
        openpi: address of an openpi or RoboArena server, such as ws://localhost:8000.
        lerobot: address of LeRobot's policy server, such as localhost:8080; goes with --policy.
        robot: a robot that can be made here, such as pour: it tells what cameras, parts of the state and actions there
            are. Without it --image and --state tell sizes.
        settings: JSON file with that robot's settings.
        like: layout of requests, which --image and --state override: libero (default; observation/image,
            observation/wrist_image, observation/state), droid (default for RoboArena), or aloha.
        image: KEY=CAMERA for each image, such as observation/image=front, or with a size
            observation/image=front:224x224.
        state: KEY=PART for each vector, such as observation/state=joints+gripper, or with sizes
            observation/state=joints:7.
        prompt_key: under which key the task in words goes; empty for none.
        resize: height and width that images are brought to before they are sent, between black bars.
        horizon: execute only the first so many actions of each answer.
        policy: what LeRobot's server loads, as TYPE:PATH, such as act:outputs/train/act/pretrained_model.
        chunk: actions that LeRobot's server is asked for at a time.
        device: where LeRobot's server runs the policy.
        name: label of the policy.
        url: address of the arena.
        submission: id that the arena gave to the submission.
        token_file: file that holds the token, instead of OFFBOOK_TOKEN.
        images: how pictures travel from the arena; by default raw (exact) up to 64 KiB a step, else as JPEG.
        once: end with the first connection instead of dialling again.
        dry_run: play one episode on --robot, a simulated one, and check what comes back.
        seconds: longest duration of the dry run.

    Examples:
        offbook policy bridge --openpi ws://localhost:8000 --robot pour --dry-run
        offbook policy bridge --openpi localhost:8000 --robot pour --submission 12 --url https://arena.example
        offbook policy bridge --openpi ws://localhost:8000 --like droid --horizon 8 --submission 12
            --image observation/exterior_image_1_left=front:224x224 --state observation/joint_position=joints:7
        offbook policy bridge --lerobot localhost:8080 --policy act:outputs/act --robot pour --submission 12
    """
    if (openpi is None) == (lerobot is None):
        got = "none" if openpi is None else "both"
        fix = "add --openpi ws://localhost:8000 or --lerobot localhost:8080"
        raise ConfigError("--openpi and --lerobot", expected="one server", got=got, fix=fix)
    if not dry_run and submission is None:
        expected, fix = "the submission to play for", "add it, or try the policy with --dry-run first"
        raise ConfigError("--submission", expected=expected, got="none", fix=fix)
    if dry_run and robot is None:
        raise ConfigError("--robot", expected="a robot to try it on", got="none", fix="add --robot pour")
    if seconds <= 0:
        raise ConfigError("--seconds", expected="a positive number", got=str(seconds), fix="allow some time")
    token = "" if dry_run else read_token(token_file)
    with ExitStack() as stack:
        machine = None
        if robot is not None:
            from offbook.robots import make_robot

            machine = stack.enter_context(closing(make_robot(robot, read_settings(settings))))
        spec = None if machine is None else machine.spec
        named = partial(
            make_names, spec.observation if spec else None, images=image, state=state, prompt=prompt_key, resize=resize
        )
        server, names = _openpi(openpi, like, named) if openpi else _lerobot(lerobot, policy, chunk, device, named)
        stack.enter_context(closing(server))
        label = name or (f"openpi at {openpi}" if openpi else f"lerobot {policy}")
        bridged = BridgedPolicy(server, names, action=spec.action if spec else None, horizon=horizon, name=label[:100])
        if dry_run and machine is not None:
            return rehearsed(bridged, machine, str(robot), 0, seconds)
        if machine is not None:
            machine.close()  # it has told what it shows; the trials are played elsewhere
        return play(bridged, url, token, str(submission), images, once)


def _openpi(address: str, like: str | None, named: Callable[..., Names]) -> tuple[Server, Names]:
    """The server and the names; what one of RoboArena's says that it wants goes before the usual."""
    server = OpenPiServer(address)
    try:
        names = named(like=like or ("droid" if server.arena else "libero"))
        server.check_images(names.images)
        if names.resize is None and server.resolution is not None:
            names = replace(names, resize=server.resolution)
    except OffbookError:
        server.close()
        raise
    return server, names


def _lerobot(
    address: str | None, policy: str | None, chunk: int, device: str, named: Callable[..., Names]
) -> tuple[Server, Names]:
    from offbook.bridges.lerobot import LeRobotServer

    names = named(like="lerobot")
    return LeRobotServer(address or "", policy or "", names.observation, chunk=chunk, device=device), names
