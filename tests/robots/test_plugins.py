"""Robots of other packages: a distribution that is only files on the path, as installers leave them."""

import subprocess
import sys

import pytest

from offbook.errors import ConfigError, MissingExtraError
from offbook.robots import make_robot
from offbook.robots.gym import GymRobot

MODULE = '''
import dataclasses

from offbook.robots.gym import GymRobot

def bench(max_steps=7):
    """A pendulum that stands in for a cell."""
    return GymRobot("gym:Pendulum-v1", max_steps=max_steps)

def broken():
    raise OSError("no such port")

def no_robot():
    return 7

def real():
    robot = bench()
    robot.spec = dataclasses.replace(robot.spec, simulated=False)
    return robot

number = 7
'''
NAMES = {
    "bench": "acme_cells:bench",
    "broken": "acme_cells:broken",
    "wrong": "acme_cells:no_robot",
    "number": "acme_cells:number",
    "real": "acme_cells:real",
    "sdk": "acme_sdk_cells:bench [arm]",
    "bare": "acme_sdk_cells:bench",
    "gone": "acme_cells:gone",
}


def install(folder, dist, names, module, source):
    (folder / f"{module}.py").write_text(source)
    metadata = folder / f"{dist.replace('-', '_')}-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2\n")
    lines = [f"{name} = {target}" for name, target in names.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[offbook.robots]", *lines]) + "\n")


@pytest.fixture
def acme(tmp_path, monkeypatch):
    install(tmp_path, "acme-cells", NAMES, "acme_cells", MODULE)
    (tmp_path / "acme_sdk_cells.py").write_text("import acme_sdk\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    for module in ("acme_cells", "acme_sdk_cells"):
        sys.modules.pop(module, None)


def test_a_robot_of_another_package_is_found_and_made_with_its_settings(acme):
    robot = make_robot("bench", {"max_steps": 9})
    assert isinstance(robot, GymRobot)
    assert robot.spec.max_steps == 9
    robot.close()


@pytest.mark.parametrize(
    ("name", "settings", "kind", "words"),
    [
        ("bensh", {}, ConfigError, "did you mean 'bench'"),
        (
            "bench",
            {"steps": 1},
            ConfigError,
            "'bench of acme-cells 1.2': expected settings among max_steps, got .*steps",
        ),
        ("broken", {}, ConfigError, "got OSError: no such port"),
        ("wrong", {}, ConfigError, "expected a robot, got a int"),
        ("number", {}, ConfigError, "a function that makes a robot, got a int"),
        ("sdk", {}, MissingExtraError, r"the module 'acme_sdk', .*; run: pip install 'acme-cells\[arm\]'"),
        ("bare", {}, MissingExtraError, "'bare' of acme-cells 1.2.*install what acme-cells needs for it"),
        ("gone", {}, ConfigError, "acme_cells:gone to be importable, got AttributeError"),
        ("bench@4", {}, ConfigError, "drop @4"),
    ],
)
def test_what_is_wrong_with_a_package_is_one_sentence(acme, name, settings, kind, words):
    with pytest.raises(kind, match=words) as caught:
        make_robot(name, settings)
    assert "\n" not in str(caught.value)


def test_two_packages_that_offer_one_name_are_both_named(acme, tmp_path):
    install(tmp_path, "other-cells", {"bench": "other_cells:bench"}, "other_cells", "")
    with pytest.raises(ConfigError, match=r"acme-cells 1.2 and other-cells 1.2; uninstall one"):
        make_robot("bench")


def test_a_package_cannot_take_the_place_of_our_own_robots(acme, tmp_path):
    install(tmp_path, "other-cells", {"pour": "acme_cells:bench"}, "unused", "")
    robot = make_robot("pour")
    assert robot.spec.name == "offbook:pour"
    robot.close()


def test_a_worker_takes_settings_from_a_file(acme, cli, monkeypatch):
    monkeypatch.setenv("OFFBOOK_TOKEN", "ob_x")
    settings = acme / "cell.json"
    worker = ["arena", "worker", "--robot", "bench", "--settings", str(settings)]
    for content, words in (
        ('{"steps": 1}', "expected settings among max_steps"),
        ("[1]", "one JSON object"),
        ("{", "one JSON object"),
    ):
        settings.write_text(content)
        code, _, stderr = cli(worker)
        assert code == 2, stderr
        assert words in stderr
    settings.unlink()
    assert "No such file" in cli(worker).stderr


def test_a_dry_run_takes_a_robot_of_another_package_but_no_real_one(acme, cli, monkeypatch):
    monkeypatch.chdir(acme)
    (acme / "still_policy.py").write_text(
        "import numpy as np\nfrom offbook.client import *\n"
        "M = PolicyMeta(name='still', observation=ObservationSpec(state=(('observation', 3),)),\n"
        "               action=ActionSpec(size=1, low=(-2.0,), high=(2.0,)))\n"
        "policy = FunctionPolicy(M, lambda state, images: np.zeros(1))\n"
    )
    (acme / "cell.json").write_text('{"max_steps": 5}')
    check = ["policy", "check", "still_policy:policy", "--robot"]
    code, stdout, stderr = cli([*check, "bench", "--settings", str(acme / "cell.json")])
    assert code == 0, stderr
    assert "5 steps, 5 answers" in stdout
    code, _, stderr = cli([*check, "real"])
    assert code == 2
    assert "got real, a real one; try the policy on a simulated robot" in stderr


def test_nothing_of_a_robot_is_imported_before_it_is_asked_for():
    code = (
        "import sys, offbook.robots; before = set(sys.modules)\n"
        "assert not before & {'offbook.robots.franka', 'offbook.robots.lerobot', 'offbook.robots.gym', 'offbook.sim'}\n"
        "import offbook.robots.franka, offbook.robots.lerobot\n"
        "assert not set(sys.modules) & {'franky', 'lerobot', 'draccus', 'torch', 'mujoco', 'gymnasium', 'fastapi'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
