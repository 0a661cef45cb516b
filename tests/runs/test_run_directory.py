import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from offbook.errors import CheckpointError, ConfigError
from offbook.runs.directory import RunDirectory, atomic_path, write_atomic


@dataclass(frozen=True, kw_only=True)
class Fit:
    steps: int = 10
    sizes: tuple[int, ...] = (4,)


@dataclass(frozen=True, kw_only=True)
class Config:
    fit: Fit = Fit()
    name: str = "a"


def test_create_writes_the_resolved_configuration(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", Config())
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["config"] == {"fit": {"steps": 10, "sizes": [4]}, "name": "a"}
    assert record["type"].endswith(":Config")
    assert record["command"]
    assert RunDirectory.open(tmp_path / "run").config() == record["config"]


def test_folder_in_use_needs_resume_and_the_same_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunDirectory.create(path, Config()).log(1, loss=2.0)
    before = sorted(p.name for p in path.iterdir())
    with pytest.raises(ConfigError, match="add --resume"):
        RunDirectory.create(path, Config())
    with pytest.raises(ConfigError, match=r"fit\.steps: expected 10 as the run began, got 20"):
        RunDirectory.create(path, Config(fit=Fit(steps=20)), resume=True)
    with pytest.raises(ConfigError, match=r"fit\.sizes"):
        RunDirectory.create(path, Config(fit=Fit(sizes=(4, 4))), resume=True)
    assert sorted(p.name for p in path.iterdir()) == before
    assert RunDirectory.create(path, Config(), resume=True).metrics() == [{"step": 1, "loss": 2.0}]


def test_resume_starts_a_run_where_there_is_none_but_never_in_a_foreign_folder(tmp_path: Path) -> None:
    assert RunDirectory.create(tmp_path / "new", Config(), resume=True).metrics() == []
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").touch()
    with pytest.raises(ConfigError, match="a run to resume"):
        RunDirectory.create(tmp_path / "photos", Config(), resume=True)
    with pytest.raises(ConfigError, match="in use"):
        RunDirectory.create(tmp_path / "photos/a.png", Config())
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a folder without config.json"),
        ("{", "a damaged one"),
        ("[]", "JSON without a configuration"),
        ('{"format": 2, "config": {}}', "expected run format 1, got format 2"),
    ],
)
def test_open_refuses_what_is_no_run(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        RunDirectory.open(tmp_path)


def test_metrics_survive_a_torn_line_and_resume(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    for step in (1, 2, 3):
        run.log(step, loss=step / 2)
    run.log(4, loss=math.nan)
    run.close()
    file = tmp_path / "run/metrics.jsonl"
    # Every line is JSON that any tool reads, not Python's NaN.
    json.loads(file.read_text().splitlines()[-1], parse_constant=lambda name: pytest.fail(name))
    with file.open("a") as torn:
        torn.write('{"step": 5, "lo')
    again = RunDirectory.open(tmp_path / "run")
    assert [row["step"] for row in again.metrics()] == [1, 2, 3, 4]
    assert math.isnan(again.metrics()[-1]["loss"])
    again.log(6, loss=0.0)
    assert [row["step"] for row in again.metrics()] == [1, 2, 3, 4, 6]
    again.truncate_metrics(2)
    again.log(3, loss=9.0)
    assert again.metrics() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9.0}]


def test_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\nnoise\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2"):
        run.metrics()


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "a/b"])
def test_checkpoint_names_stay_inside(tmp_path: Path, name: str) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    assert run.checkpoint("best") == tmp_path / "run/checkpoints/best.safetensors"
    with pytest.raises(ConfigError, match="checkpoint name"):
        run.checkpoint(name)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "deep/a.txt", "old")

    def fail() -> None:
        with atomic_path(tmp_path / "deep/a.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [(p.name, p.read_text()) for p in (tmp_path / "deep").iterdir()] == [("a.txt", "old")]


@pytest.mark.faults
def test_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_atomic(target, "old")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom offbook.runs.directory import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"


def test_files_get_the_rights_of_ordinary_ones(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_atomic(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_tensorboard_only_where_torch_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom offbook.runs.directory import RunDirectory\n"
        "if len(sys.argv) > 2: import torch\n"
        "run = RunDirectory.create(sys.argv[1], {})\nrun.log(1, loss=0.5)\n"
        "print('torch' in sys.modules)\n"
    )
    for path, extra, shown in [(tmp_path / "light", [], "False"), (tmp_path / "full", ["torch"], "True")]:
        command = [sys.executable, "-c", code, str(path), *extra]
        done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
        assert done.stdout.strip() == shown
        events = list((path / "tensorboard").glob("events*")) if (path / "tensorboard").exists() else []
        # The event must have reached the disk although nobody closed the run: 100 bytes and more with it.
        assert [event.stat().st_size > 100 for event in events] == ([True] if extra else [])
