"""Settings that must hold before anything heavy is imported, and the command line as a fixture."""

import os

# Threads of several processes on few cores wait for one another; EGL must be chosen before MuJoCo is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MUJOCO_GL"] = "egl"
os.environ["OFFBOOK_QUIET"] = "1"

from collections.abc import Callable
from typing import NamedTuple

import pytest

from offbook.cli.main import main


class Outcome(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], Outcome]:
    """Runs the command line in this process: `cli(["systems", "--json"])` gives exit code, stdout and stderr."""

    def run(argv: list[str]) -> Outcome:
        capsys.readouterr()
        code = main(argv)
        return Outcome(code, *capsys.readouterr())

    return run


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("wants a CUDA device")
