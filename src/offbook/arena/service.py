"""One arena in one process: its settings, its database, its blobs, and who is connected now."""

from __future__ import annotations

import asyncio
import collections
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from offbook.arena.database import Database
from offbook.arena.gateway import Gateway
from offbook.arena.trials import Rules
from offbook.errors import ConfigError, nearest
from offbook.runs.directory import write_atomic
from offbook.service.refusal import RefusedError
from offbook.service.storage import BlobStore
from offbook.service.web import Turnstile

_FILE = "arena.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What an operator decides about an arena; kept as `arena.json` in its folder.

    Attributes:
        folder: where the settings, the embedded database and the blobs stand.
        database: its address; SQLite in the folder when empty.
        blobs: a folder or an fsspec address; `blobs` of the folder itself when empty.
        seed: from which scenes and seeds of the benchmarks follow; whoever knows it can prepare for them.
        base_url: how people reach the arena, for the snippets on its pages; taken from each request when empty.
        lease_seconds: how long a lease lives without a heartbeat.
        watchdog_seconds: after this long without an answer to its heartbeats a worker stops its robot.
        fault_cap: robot faults of one trial after which a person must look.
        checkpoint_bytes: largest checkpoint that may be uploaded.
        artifact_bytes: largest file that a worker may upload.
        daily_bytes: most bytes that one user may upload as checkpoints in a day.
        policies_per_user: most policies of one user that may be connected at once.
        connections_per_address: most connections of one address at once; behind a proxy all come from one.
        listeners: most pages that may listen to live events at once.
        listeners_per_address: most of one address; behind a proxy all come from one.
        reserve_bytes: while less than this is free in a blob folder, no trial is given to a robot.
        sandbox: whether uploaded checkpoints are looked into in a sandbox, which must prove itself at the start.
    """

    folder: Path
    database: str = ""
    blobs: str = ""
    seed: int = 0
    base_url: str = ""
    lease_seconds: float = 15.0
    watchdog_seconds: float = 2.0
    fault_cap: int = 3
    checkpoint_bytes: int = 256 * 2**20
    artifact_bytes: int = 1024 * 2**20
    daily_bytes: int = 4 * 2**30
    policies_per_user: int = 32
    connections_per_address: int = 1000
    listeners: int = 500
    listeners_per_address: int = 50
    reserve_bytes: int = 256 * 2**20
    sandbox: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.watchdog_seconds < self.lease_seconds or self.fault_cap < 1:
            raise ConfigError(
                "arena settings",
                expected="0 < watchdog_seconds < lease_seconds, so that a lost robot stands still before its trial is "
                "given to another, and fault_cap of 1 or more",
                got=f"{self.watchdog_seconds:g}, {self.lease_seconds:g} and {self.fault_cap}",
                fix="correct arena.json",
            )

    @property
    def database_url(self) -> str:
        """The database's address, the embedded one by default."""
        return self.database or f"sqlite:///{self.folder.resolve() / 'arena.db'}"

    @property
    def blobs_url(self) -> str:
        """The blob store's address, the folder itself by default."""
        return self.blobs or str(self.folder.resolve())

    def portable(self) -> dict[str, Any]:
        """What another arena with the same content shall have in common: all but where things stand."""
        places = ("folder", "database", "blobs")
        return {name: value for name, value in asdict(self).items() if name not in places}

    @property
    def rules(self) -> Rules:
        """The times and counts of the protocol."""
        return Rules(lease_seconds=self.lease_seconds, watchdog_seconds=self.watchdog_seconds, fault_cap=self.fault_cap)

    def save(self) -> None:
        """Writes `arena.json`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {name: value for name, value in asdict(self).items() if name != "folder"}
        # The database's address may hold a password, and the seed tells what is coming.
        write_atomic(self.folder / _FILE, json.dumps(record, indent=2) + "\n", mode=0o600)

    @classmethod
    def load(cls, folder: Path | str) -> Settings:
        """Reads `arena.json` from an arena's folder.

        Raises:
            ConfigError: this is not an arena's folder, or the file cannot be used.
        """
        path = Path(folder) / _FILE
        try:
            record: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                str(folder), expected=f"an arena's folder with {_FILE}", got="none", fix="run: offbook arena init"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(str(path), expected="readable JSON", got=str(error), fix="mend the file") from error
        return cls.from_record(record, Path(folder), str(path))

    @classmethod
    def from_record(cls, record: Any, folder: Path, path: str) -> Settings:
        """Settings from plain data, checked.

        Args:
            record: by name.
            folder: of the arena.
            path: where the record stands, for messages.

        Raises:
            ConfigError: an unknown name, or a value of another kind.
        """
        types = {each.name: type(each.default) for each in fields(cls) if each.name != "folder"}
        for name, value in record.items() if isinstance(record, dict) else [("file", record)]:
            if name not in types:
                raise ConfigError(f"{path}: {name}", expected="a known setting", got=name, fix=nearest(name, types))
            if not isinstance(value, (int, float) if types[name] is float else types[name]):
                raise ConfigError(
                    f"{path}: {name}", expected=f"a {types[name].__name__}", got=repr(value), fix="correct the value"
                )
        return cls(folder=folder, **record)


class StorageWatch:
    """Whether recordings could be kept now; asked often, looked at every few seconds.

    Args:
        blobs: the store.
        reserve: bytes that must be free.
    """

    SECONDS = 10.0

    def __init__(self, blobs: BlobStore, reserve: int) -> None:
        self._blobs, self._reserve = blobs, reserve
        self._looked = -math.inf
        self._trouble: RefusedError | None = None

    def check(self) -> None:
        """Raises 507 when the last look found no room: a robot that plays now plays for nothing."""
        if time.monotonic() - self._looked > self.SECONDS:
            # Set first: of many who ask at once, one looks.
            self._looked = time.monotonic()
            try:
                self._blobs.check_room(self._reserve)
                self._trouble = None
            except RefusedError as error:
                self._trouble = error
        if self._trouble is not None:
            raise self._trouble.with_traceback(None)  # or it would grow with each who asks

    def failed(self, trouble: RefusedError) -> None:
        """Takes note that the store has just refused a file, whatever the next small file would say."""
        if trouble is not self._trouble:  # what `check` has said again is no news, and must not put off the next look
            self._trouble, self._looked = trouble, time.monotonic()

    def sound(self) -> bool:
        """Whether `check` would pass."""
        try:
            self.check()
        except RefusedError:
            return False
        return True


class Meters:
    """What `/metrics` shows of this process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "offbook_requests", "HTTP requests", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "offbook_request_seconds", "Time to answer, without streaming", ["route"], registry=self.registry
        )
        self.frames = Counter("offbook_frames", "Relayed websocket frames", ["sender"], registry=self.registry)
        self.broken = Counter(
            "offbook_broken_frames", "Websocket frames that broke the protocol", ["sender"], registry=self.registry
        )


class Arena:
    """All parts of a running arena.

    Args:
        settings: the operator's decisions.
        database: another way to the database; tests give one with their own clock.
        url: where workers reach this server itself, when several share the database.
    """

    def __init__(self, settings: Settings, database: Database | None = None, url: str = "") -> None:
        self.settings = settings
        self.database = database or Database(settings.database_url)
        self.blobs = BlobStore(settings.blobs_url)
        self.storage = StorageWatch(self.blobs, settings.reserve_bytes)
        self.meters = Meters()
        self.turnstile = Turnstile()
        self.checking = asyncio.Semaphore(1)
        # Bytes of the checkpoints that each user is sending now.
        self.incoming: collections.Counter[int] = collections.Counter()
        self.gateway = Gateway(self.database, self.meters, per_user=settings.policies_per_user, url=url)
