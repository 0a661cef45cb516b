"""Settings that must hold before anything heavy is imported; the command line and PostgreSQL as fixtures."""

import os

# Threads of several processes on few cores wait for one another; EGL must be chosen before MuJoCo is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MUJOCO_GL"] = "egl"
os.environ["OFFBOOK_QUIET"] = "1"

import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

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


@pytest.fixture(scope="session")
def postgres_address() -> Iterator[str]:
    """The address of a PostgreSQL server without its database: socket only, in a temporary folder, nothing synced."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not binaries:
        pytest.skip("PostgreSQL is not installed (no /usr/lib/postgresql/*/bin/initdb)")
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    user = {}
    if os.geteuid() == 0:
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root and there is no user postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}

    def run(*command: str) -> None:
        # pg_ctl's server inherits what it is given: a pipe would keep this call waiting for ever.
        with (folder / "setup.log").open("ab") as log:
            subprocess.run(
                command, check=True, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=folder, timeout=60, **user
            )

    data, control = str(folder / "data"), str(binaries[-1].parent / "pg_ctl")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=80"
    options += " -c synchronous_commit=off -c full_page_writes=off"
    try:
        run(str(binaries[-1]), "-D", data, "-U", "offbook", "-A", "trust", "--no-sync", "-E", "UTF8")
        run(control, "-D", data, "-w", "-t", "30", "-o", options, "-l", str(folder / "server.log"), "start")
        try:
            yield f"postgresql+psycopg://offbook@/{{name}}?host={quote(str(folder), safe='')}"
        finally:
            run(control, "-D", data, "-w", "-t", "30", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("wants a CUDA device")
