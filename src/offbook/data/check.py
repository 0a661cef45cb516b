"""Is a store sound? What can be told from the recordings alone, and dropping what a killed writer left."""

import fcntl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from offbook.data.alignment import Alignment, check_alignment
from offbook.data.index import JOURNAL, Index
from offbook.data.layout import (
    check_file,
    data_files,
    disk_dtype,
    field_file,
    films,
    final_file,
    offset,
    orphans,
    video_folder,
)
from offbook.data.schema import DAMAGED, Schema
from offbook.data.store import EpisodeStore
from offbook.data.video import stamps, video_file
from offbook.errors import DataError
from offbook.runs.progress import track

Result = Literal["ok", "look", "wrong", "unclear"]
_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        check: which one: `index`, `leftovers`, `checksums`, `videos`, `numbers`, `bounds` or `alignment`.
        result: `"ok"`; `"wrong"`; `"look"` for what may be meant so; `"unclear"` where the data cannot tell.
        text: one sentence.
        details: field, first episode and step, counts: whatever the sentence says in numbers.
    """

    check: str
    result: Result
    text: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StoreCheck:
    """The state of a store.

    Attributes:
        path: its folder.
        episodes: finished episodes; None when it cannot be opened.
        steps: their steps; None when it cannot be opened.
        findings: at least one of each check that was made.
        repaired: what was done about leftovers; empty when nothing.
    """

    path: Path
    episodes: int | None
    steps: int | None
    findings: tuple[Finding, ...]
    repaired: str = ""

    @property
    def sound(self) -> bool:
        """Whether no check found something wrong."""
        return all(finding.result != "wrong" for finding in self.findings)


def check_store(path: str | Path, *, repair: bool = False) -> StoreCheck:
    """Reads everything in a store and tells what is not as it should be.

    Args:
        path: folder of the store.
        repair: drop what a killed writer left behind the last finished episode. Finished episodes are never touched.

    Raises:
        DataError: the folder is no store at all.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from offbook.data.store import FieldSpec, Schema
        >>> with TemporaryDirectory() as folder:
        ...     with EpisodeStore.create(folder, Schema((FieldSpec("x", "float32", (), "reward"),))) as writer:
        ...         values = np.array([1, np.nan], np.float32)
        ...         number = writer.append({"x": values}, terminated=True, truncated=False)
        ...     [finding.text for finding in check_store(folder).findings if finding.result == "wrong"]
        ["field 'x': 1 value that is NaN or infinite, in 1 episode; the first in episode 0, step 1"]
    """
    path = Path(path)
    try:
        store = EpisodeStore.open(path)
    except DataError as error:
        if not (path / "store.json").exists():
            raise
        finding = Finding(check="index", result="wrong", text=str(error), details={"where": error.where})
        return StoreCheck(path=path, episodes=None, steps=None, findings=(finding,))
    leftovers, repaired = _leftovers(path, store), ""
    if repair and leftovers.result == "wrong" and leftovers.details.get("repairable"):
        before = len(store)
        EpisodeStore.append_to(path).close()
        store = EpisodeStore.open(path)
        repaired = (
            f"dropped {leftovers.details['bytes']} bytes of unfinished episodes; all {len(store)} finished are kept"
        )
        if len(store) < before:
            raise DataError(str(path), expected=f"{before} episodes", got=str(len(store)), fix=DAMAGED)
        leftovers = _leftovers(path, store)
    checks = (_index, _checksums, _videos, _numbers, _bounds, _alignment)
    findings = [finding for check in track(checks, "checking", len(checks)) for finding in check(store)]
    return StoreCheck(
        path=path,
        episodes=len(store),
        steps=store.steps,
        findings=(findings[0], leftovers, *findings[1:]),
        repaired=repaired,
    )


def _index(store: EpisodeStore) -> Iterator[Finding]:
    start, length = store.episodes["start"], store.episodes["length"]
    off = np.flatnonzero((start != np.cumsum(length) - length) | (length < 1))
    if len(off):
        text = f"episode {off[0]} does not begin where the one before it ends"
        yield Finding(check="index", result="wrong", text=text, details={"episode": int(off[0])})
    else:
        yield Finding(check="index", result="ok", text=f"{len(store)} episodes, {store.steps} steps, without a gap")


def _leftovers(path: Path, store: EpisodeStore) -> Finding:
    """What lies behind the last finished episode."""
    owner, more, beyond = _writer(path), 0, 0
    if not owner:
        more, beyond = _behind(path, store.schema)
        # One may have begun meanwhile.
        owner = _writer(path)
    if owner:
        return Finding(
            check="leftovers", result="ok", text=f"{owner} is writing; what it has not finished is not looked at"
        )
    if more > 0:
        text = f"the files hold {more} finished rows more than the index: it has lost episodes; copy the store again"
        return Finding(check="leftovers", result="wrong", text=text, details={"rows": more, "repairable": False})
    if beyond:
        text = (
            f"{beyond} bytes behind the last finished episode, as a killed writer leaves them; drop them with --repair"
        )
        return Finding(check="leftovers", result="wrong", text=text, details={"bytes": beyond, "repairable": True})
    return Finding(check="leftovers", result="ok", text="nothing behind the last finished episode")


def _behind(path: Path, schema: Schema) -> tuple[int, int]:
    """How many rows were finished that the index does not know, and how many bytes lie behind those that it knows."""
    index = Index.read(path)
    journal = path / JOURNAL
    more, beyond = 0, journal.stat().st_size - index.journal_bytes if journal.exists() else 0
    for name, file, rows in data_files(path, schema, index):
        spec = schema[name]
        more = max(more, check_file(file, spec, rows) - rows)
        beyond += file.stat().st_size - offset(spec, rows) if file.exists() else 0
    for spec in schema.fields:
        if spec.video:
            unused = orphans(video_folder(path, spec.name), films(path, spec, index.steps))
            beyond += sum(file.stat().st_size for file in unused)
    return more, beyond


def _video_rows(store: EpisodeStore, name: str) -> dict[int, np.ndarray]:
    """By file of a camera kept as video: time stamps and episodes of all frames in it, [n, 2], by episode and time."""
    length = store.episodes["length"]
    spec = store.schema[name]
    files = (field_file(store.path, name), store.steps), (final_file(store.path, name), len(store))
    rows = np.concatenate(
        [np.fromfile(file, disk_dtype(spec), 2 * count, offset=offset(spec, 0)).reshape(-1, 2) for file, count in files]
    )
    episodes = np.concatenate([np.repeat(np.arange(len(store)), length), np.arange(len(store))])
    table = np.column_stack([rows, episodes])[rows[:, 0] >= 0]
    table = table[np.argsort(table[:, 0], kind="stable")]
    numbers, first = np.unique(table[:, 0], return_index=True)
    return dict(zip(numbers.tolist(), np.split(table[:, 1:], first[1:]), strict=False))


def _videos(store: EpisodeStore) -> Iterator[Finding]:
    """Whether each frame that a row speaks of is in its video, and the ends of each episode can be decoded."""
    names = [spec.name for spec in store.schema.fields if spec.video and len(store)]
    frames, wrong = 0, False
    for name in names:
        folder, start = video_folder(store.path, name), store.episodes["start"].tolist()
        try:
            for number, table in _video_rows(store, name).items():
                frames += len(table)
                file = video_file(folder, number)
                absent = table[~np.isin(table[:, 0], stamps(file)[0])]
                if len(absent):
                    where, got = f"{file}, episode {absent[:, 1].min()}", f"{len(absent)} frames missing"
                    raise DataError(where, expected=f"{len(table)} frames", got=got, fix=DAMAGED)
            for number in np.flatnonzero(store.present(name)).tolist():
                _ = store.field(name)[start[number]], store.final(name)[number]
        except DataError as error:
            wrong = True
            details = {"field": name, "where": error.where}
            yield Finding(check="videos", result="wrong", text=str(error), details=details)
    if names and not wrong:
        text = f"{frames} frames are where the rows say; the first and last of each episode decode"
        yield Finding(check="videos", result="ok", text=text)


def _writer(path: Path) -> str:
    """Who holds the lock of the store, if anybody does."""
    try:
        with (path / ".lock").open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return f"process {stream.read(32).decode(errors='replace').strip() or 'unknown'}"
    except OSError:
        pass
    return ""


def _checksums(store: EpisodeStore) -> Iterator[Finding]:
    try:
        store.verify()
    except DataError as error:
        yield Finding(check="checksums", result="wrong", text=str(error), details={"where": error.where})
    else:
        yield Finding(check="checksums", result="ok", text="all values are those that were written")


def _numbers(store: EpisodeStore) -> Iterator[Finding]:
    """NaN and infinities, field by field."""
    found = False
    for spec in store.schema.fields:
        if not spec.dtype.startswith("float"):
            continue
        rows = _not_finite(np.asarray(store.field(spec.name)))
        episodes = np.searchsorted(store.episodes["start"], rows[:, 0], "right") - 1
        steps = rows[:, 0] - store.episodes["start"][episodes]
        if spec.role == "observation":
            last = _not_finite(np.asarray(store.final(spec.name)))
            rows = np.concatenate([rows, last])
            episodes = np.concatenate([episodes, last[:, 0]])
            steps = np.concatenate([steps, store.episodes["length"][last[:, 0]]])
        if not len(rows):
            continue
        found, first, count = True, int(np.lexsort((steps, episodes))[0]), int(rows[:, 1].sum())
        episode, step, several = int(episodes[first]), int(steps[first]), len(set(episodes.tolist()))
        values = "value that is" if count == 1 else "values that are"
        text = (
            f"field {spec.name!r}: {count} {values} NaN or infinite, in {several} episode{'s' * (several > 1)}; "
            f"the first in episode {episode}, step {step}"
        )
        details = {"field": spec.name, "count": count, "episodes": several, "episode": episode, "step": step}
        yield Finding(check="numbers", result="wrong", text=text, details=details)
    if not found:
        yield Finding(check="numbers", result="ok", text="neither NaN nor infinities")


def _not_finite(values: np.ndarray) -> np.ndarray:
    """Rows with values that are not finite, and how many: [n, 2]."""
    parts = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(values), _ROWS):
        part = values[start : start + _ROWS]
        counts = (~np.isfinite(part)).reshape(len(part), -1).sum(axis=1)
        rows = np.flatnonzero(counts)
        parts.append(np.stack([rows + start, counts[rows]], axis=1))
    return np.concatenate(parts)


def _bounds(store: EpisodeStore) -> Iterator[Finding]:
    """Actions outside the bounds that the schema declares."""
    spec, names = store.schema.action, store.schema.actions
    finite = spec is not None and bool(np.isfinite([*spec.low, *spec.high]).any())
    if spec is None or not names or not finite or sum(store.schema[name].size for name in names) != spec.size:
        yield Finding(check="bounds", result="unclear", text="the schema does not say how large actions may be")
        return
    low, high = np.asarray(spec.low), np.asarray(spec.high)
    # Bounds are often written in another precision than actions.
    low, high = low - 1e-6 * (1 + np.abs(low)), high + 1e-6 * (1 + np.abs(high))
    outside = np.zeros(store.steps, bool)
    worst = 0.0
    for start in range(0, store.steps, _ROWS):
        parts = [store.field(name)[start : start + _ROWS] for name in names]
        values = np.concatenate([part.reshape(len(part), -1).astype(np.float64) for part in parts], axis=1)
        excess = np.maximum(low - values, values - high)
        outside[start : start + len(values)] = (excess > 0).any(axis=1)
        worst = max(worst, float(np.nan_to_num(excess).max(initial=0)))
    count = int(outside.sum())
    if not count:
        if store.schema.extra.get("import", {}).get("bounds") == "recorded":
            text = "the declared bounds are the range of the recorded actions, so that none can be outside"
            yield Finding(check="bounds", result="unclear", text=text)
        else:
            yield Finding(check="bounds", result="ok", text="all actions are within the declared bounds")
        return
    row = int(np.argmax(outside))
    episode = int(np.searchsorted(store.episodes["start"], row, "right")) - 1
    step, share = row - int(store.episodes["start"][episode]), count / store.steps
    text = (
        f"{count} of {store.steps} steps ({share:.2%}) have actions outside the declared bounds, by up to {worst:.3g}; "
        f"the first in episode {episode}, step {step}. They are kept as they are"
    )
    details = {"count": count, "share": share, "excess": worst, "episode": episode, "step": step}
    yield Finding(check="bounds", result="look", text=text, details=details)


_WORDS: dict[str, tuple[Result, str]] = {
    "aligned": ("ok", "the next state depends on the action of its own step"),
    "early": (
        "look",
        "the next state depends on the action of the step before: actions are stored a step early, or take effect late",
    ),
    "late": (
        "look",
        "the next state depends on the action of the step after: actions are stored a step late, or follow the states "
        "and hardly drive them",
    ),
}


def _alignment(store: EpisodeStore) -> Iterator[Finding]:
    found: Alignment = check_alignment(store)
    result, text = _WORDS.get(found.verdict, ("unclear", found.reason))
    gains = ", ".join(
        f"{gain:.2f} at lag {lag:+d}" if lag else f"{gain:.2f} at lag 0" for lag, gain in found.gains.items()
    )
    details = {
        "verdict": found.verdict,
        "gains": {str(lag): gain for lag, gain in found.gains.items()},
        "steps": found.steps,
    }
    yield Finding(check="alignment", result=result, text=text + (f" ({gains})" if gains else ""), details=details)
