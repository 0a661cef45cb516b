"""The folder of one run, and the atomic writing that everything durable here goes through.

A run folder holds `config.json` (the resolved configuration and the command), `metrics.jsonl` (one line per logged
step), `checkpoints/NAME.safetensors` and `tensorboard/`; recipes add videos and figures beside them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shlex
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import offbook
from offbook.errors import CheckpointError, ConfigError
from offbook.runs.config import to_json

R = TypeVar("R")

_FORMAT = 1


@contextlib.contextmanager
def atomic_path(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Gives a temporary path in the same folder; when the block ends well, that file replaces `path` durably.

    A reader sees the old file or the new one, never a part, and after a crash one of the two is there whole.

    Args:
        path: the file to write; its folder is made where it is missing.
        mode: its rights, less those that the process masks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        # mkstemp makes files private; give the rights that an ordinary new file would have.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(mode & ~mask)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes | str, mode: int = 0o666) -> None:
    """Writes a whole file so that a crash leaves the old content or the new, never a mixture.

    Args:
        path: the file; its folder is made where it is missing.
        content: bytes, or text for UTF-8.
        mode: its rights, less those that the process masks.
    """
    with atomic_path(path, mode) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def kept(path: Path, make: Callable[[], R]) -> R:
    """A result as JSON types: from its file, or made and written there.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     kept(Path(folder) / "a.json", lambda: [1.0]), kept(Path(folder) / "a.json", lambda: [2.0])
        ([1.0], [1.0])
    """
    if not path.exists():
        write_atomic(path, json.dumps(make()) + "\n")
    found: R = json.loads(path.read_bytes())
    return found


class RunDirectory:
    """One run's folder: its configuration, metrics and checkpoints. Make one with `create` or `open`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     run = RunDirectory.create(Path(folder) / "a", {"steps": 2})
        ...     run.log(1, loss=0.5)
        ...     run.close()
        ...     run.metrics()
        [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole_lines = False
        self._board: Any = None
        self._purge_step: int | None = None

    @classmethod
    def create(cls, path: Path | str, config: Any, *, resume: bool = False) -> RunDirectory:
        """Makes the folder and writes `config.json`.

        Args:
            path: the folder; missing or empty, unless `resume`.
            config: a dataclass or a mapping of JSON types.
            resume: continue the run that is there; where there is none yet, start one.

        Raises:
            ConfigError: the folder has other content, or holds a run with a different configuration.
        """
        run = cls(Path(path))
        record = {
            "format": _FORMAT,
            "type": f"{type(config).__module__}:{type(config).__qualname__}" if is_dataclass(config) else "mapping",
            "config": to_json(config) if is_dataclass(config) else dict(config),
            "offbook": offbook.__version__,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            run._meet_existing(json.loads(json.dumps(record["config"])), resume)
        else:
            run.path.mkdir(parents=True, exist_ok=True)
            write_atomic(run.path / "config.json", json.dumps(record, indent=2) + "\n")
        (run.path / "checkpoints").mkdir(exist_ok=True)
        return run

    def _meet_existing(self, config: Mapping[str, Any], resume: bool) -> None:
        where = str(self.path)
        if not resume:
            fix = "choose another --out, or add --resume to continue the run that is there"
            raise ConfigError(where, expected="a new or empty folder", got="one that is in use", fix=fix)
        try:
            old = RunDirectory.open(self.path).config()
        except CheckpointError as error:
            raise ConfigError(where, expected="a run to resume", got=error.got, fix="choose another --out") from error
        difference = _first_difference(old, config)
        if difference:
            key, before, now = difference
            fix = "resume with the configuration in its config.json, or start a new run"
            raise ConfigError(f"{where}: {key}", expected=f"{before} as the run began", got=now, fix=fix)

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """Opens a run for reading, or for logging further.

        Raises:
            CheckpointError: the folder is not a run, or a newer offbook wrote it.
        """
        run = cls(Path(path))
        run._record()
        return run

    def _record(self) -> dict[str, Any]:
        file = self.path / "config.json"
        fix = "give the folder that a training command wrote with --out"
        try:
            record = json.loads(file.read_text())
        except OSError as error:
            got = "a folder without config.json" if self.path.is_dir() else error.strerror or "no folder"
            raise CheckpointError(str(self.path), expected="the folder of a run", got=got, fix=fix) from error
        except ValueError as error:
            got = f"a damaged one ({error})"
            raise CheckpointError(str(file), expected="the configuration of a run", got=got, fix=fix) from error
        if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
            got = "JSON without a configuration"
            raise CheckpointError(str(file), expected="the configuration of a run", got=got, fix=fix)
        if record.get("format") != _FORMAT:
            expected, fix = f"run format {_FORMAT}", "install the offbook that wrote it, or a newer one"
            raise CheckpointError(str(file), expected=expected, got=f"format {record.get('format')!r}", fix=fix)
        return record

    def config(self) -> dict[str, Any]:
        """The resolved configuration as JSON types."""
        return dict(self._record()["config"])

    def log(self, step: int, **metrics: float) -> None:
        """Appends one line of metrics, and hands them to TensorBoard in a process that has torch loaded.

        Args:
            step: the training step, 0 or more.
            metrics: numbers by name; NaN and infinities are kept as null and read back as NaN.
        """
        numbers = {name: float(value) for name, value in metrics.items()}
        if not self._whole_lines:
            self._drop_torn_line()
            self._whole_lines = True
        line = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": int(step), **line}) + "\n")
        board = self._tensorboard()
        if board is not None:
            for name, value in numbers.items():
                board.add_scalar(name, value, int(step))

    def _tensorboard(self) -> Any:
        # Torch takes seconds to load; a process that did without it so far shall not pay for a chart.
        if self._board is None and "torch" in sys.modules and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=self._purge_step)
            # Its thread buffers for minutes; without this the end of a run would be lost.
            weakref.finalize(self, self._board.close)
        return self._board

    def close(self) -> None:
        """Closes TensorBoard's file; a later `log` opens another."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def metrics(self) -> list[dict[str, float]]:
        """All logged rows, oldest first, each with its `step`. A last line that a crash cut short is left out.

        Raises:
            CheckpointError: another line is damaged.
        """
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        rows, lines = [], file.read_text().split("\n")
        for number, line in enumerate(lines[:-1], 1):
            try:
                row = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
                rows.append({**row, "step": int(row["step"])})
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                where, expected = f"{file}, line {number}", "a JSON object with a step"
                fix = "delete the line; the checkpoints do not depend on it"
                raise CheckpointError(where, expected=expected, got=repr(line[:60]), fix=fix) from error
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Keeps the rows up to and including a step: a resumed run writes the later ones anew."""
        self.close()
        rows = [row for row in self.metrics() if row["step"] <= step]
        lines = ({k: v if math.isfinite(v) else None for k, v in row.items()} for row in rows)
        write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        self._purge_step = step + 1

    def _drop_torn_line(self) -> None:
        file = self.path / "metrics.jsonl"
        if file.exists():
            content = file.read_bytes()
            if content and not content.endswith(b"\n"):
                os.truncate(file, content.rfind(b"\n") + 1)

    def checkpoint(self, name: str = "last") -> Path:
        """Where the checkpoint of this name lies, whether or not it exists yet.

        Raises:
            ConfigError: the name is not a plain file name.
        """
        if not name or name.startswith(".") or "/" in name:
            fix = "use letters, digits and dashes"
            raise ConfigError("checkpoint name", expected="a plain name", got=repr(name), fix=fix)
        return self.path / "checkpoints" / f"{name}.safetensors"


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, str, str] | None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            if name not in old or name not in new:
                shown = ("set" if name in old else "not set", "set" if name in new else "not set")
                return f"{key}.{name}".lstrip("."), *shown
            found = _first_difference(old[name], new[name], f"{key}.{name}".lstrip("."))
            if found:
                return found
        return None
    return None if old == new and type(old) is type(new) else (key, json.dumps(old), json.dumps(new))
