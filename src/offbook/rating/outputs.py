"""Outputs on their way into a study: described in JSON lines, their files stripped of what tells of their origin."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from sqlalchemy import select
from sqlalchemy.orm import Session

from offbook.errors import DataError
from offbook.rating import media
from offbook.rating.features import text_features
from offbook.rating.studies import Name, require
from offbook.rating.tables import Item, Output, Study, System
from offbook.service.fields import SmallRecord, Text
from offbook.service.refusal import RefusedError
from offbook.service.storage import BlobStore

MOST_OUTPUTS = 50_000
FILE_BYTES = 64 << 20
LONGEST_TEXT = 1_000_000

Number = Annotated[float, Field(ge=-1e300, le=1e300)]


class OutputRecord(BaseModel):
    """One line of an outputs file.

    Attributes:
        item: name of what it answers; outputs of the same item are compared.
        system: whose output it is. Names of items and systems reach no rater.
        prompt: shown above the pair; the same for all outputs of an item, or told once.
        cluster: of items that resemble each other.
        text: the output itself; or
        file: name of the file that holds it.
        gold: `better` or `worse`, for the two outputs of an item of which one is known to be better.
        features: numbers that describe it, beside those that are measured here.
        meta: of the system, told once, such as `{"variants_tried": 4}`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    item: Name
    system: Name
    prompt: Annotated[Text, Field(max_length=100_000)] = ""
    cluster: Name | None = None
    text: Annotated[Text, Field(max_length=LONGEST_TEXT)] | None = None
    file: Annotated[Text, Field(min_length=1, max_length=500)] | None = None
    gold: Literal["better", "worse"] | None = None
    features: Annotated[dict[Name, Number], Field(max_length=40)] = Field(default_factory=dict)
    meta: SmallRecord = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if (self.text is None) == (self.file is None):
            raise ValueError("either text or file")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """An output that is ready to be kept.

    Attributes:
        text: of a text.
        sha256: of the clean file in the blob store.
        media_type: how a browser takes it.
        size: bytes, or characters of a text.
        source: hash of what was handed in.
        features: by name.
    """

    text: str | None = None
    sha256: str | None = None
    media_type: str
    size: int
    source: str
    features: Mapping[str, float]


def read_records(content: bytes, name: str = "records") -> list[OutputRecord]:
    """Reads JSON lines.

    Args:
        content: UTF-8, one record a line; empty lines are passed over.
        name: what messages call the file.

    Raises:
        RefusedError: 422 with the line and the field at fault.
    """
    lines = [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if not 0 < len(lines) <= MOST_OUTPUTS:
        raise RefusedError(422, "bad_records", name, expected=f"1 to {MOST_OUTPUTS} lines", got=str(len(lines)),
                           fix="send one JSON object a line")  # fmt: skip
    return [_record(line, f"{name}, line {n}") for n, line in lines]


def _record(line: bytes, where: str) -> OutputRecord:
    try:
        return OutputRecord.model_validate(json.loads(line))
    except ValidationError as error:
        first = error.errors()[0]
        place = ", ".join([where, *(str(part) for part in first["loc"])])
        raise RefusedError(422, "bad_record", place, expected=first["msg"][:200], got=repr(first["input"])[:80],
                           fix="correct the line") from error  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise RefusedError(422, "bad_record", where, expected="one JSON object", got=repr(line[:60]),
                           fix="correct the line") from error  # fmt: skip


def prepare(record: OutputRecord, modality: str, blobs: BlobStore, file: Path | None) -> Content:
    """Measures an output and, if it is a file, keeps a clean copy of it.

    Args:
        record: which describes it.
        modality: of the study.
        blobs: where files go.
        file: the file that the record names; None for a text.

    Raises:
        RefusedError: 422, it is none of this modality, or damaged.
    """
    where = f"output of {record.system!r} for {record.item!r}"
    if (record.text is None) == (modality == "text"):
        raise RefusedError(422, "wrong_kind", where, expected="a text" if modality == "text" else "a file",
                           got=f"a {'file' if record.text is None else 'text'} in a study of {modality}s",
                           fix="give what the study compares")  # fmt: skip
    if record.text is not None:
        source = hashlib.sha256(record.text.encode()).hexdigest()
        features = text_features(record.text) | record.features
        return Content(text=record.text, media_type="text/plain", size=len(record.text), source=source,
                       features=features)  # fmt: skip
    if file is None:
        raise RefusedError(422, "missing_file", where, expected=f"the file {record.file!r}", got="none of that name",
                           fix="send it beside the records")  # fmt: skip
    if file.stat().st_size > FILE_BYTES:
        raise RefusedError(413, "too_large", where, expected=f"at most {FILE_BYTES} bytes",
                           got=str(file.stat().st_size), fix="send a smaller file")  # fmt: skip
    with file.open("rb") as content:
        source = hashlib.file_digest(content, "sha256").hexdigest()
    clean, media_type = (media.clean_image, "image/png") if modality == "image" else (media.clean_film, "video/mp4")
    with TemporaryDirectory() as folder:
        bare = Path(folder) / ("bare.png" if modality == "image" else "bare.mp4")
        try:
            features = clean(file, bare)
        except DataError as error:
            # Where the file stands on this machine is nobody's business.
            raise RefusedError(422, "bad_file", where, expected=error.expected, got=error.got.replace(str(file), ""),
                               fix=error.fix) from error  # fmt: skip
        return Content(sha256=blobs.put(bare), media_type=media_type, size=bare.stat().st_size, source=source,
                       features=features | record.features)  # fmt: skip


def add(session: Session, study: Study, outputs: Iterable[tuple[OutputRecord, Content]]) -> dict[str, int]:
    """Puts outputs into a draft; what is there already in the same form is passed over.

    Returns:
        How many were `added`, and how many were there: `known`.

    Raises:
        RefusedError: 409, the study is no draft, or something else is there in its place.
    """
    require(study, "draft", "add outputs before a study is opened")
    systems = {row.name: row for row in session.scalars(select(System).where(System.study_id == study.id))}
    items = {row.name: row for row in session.scalars(select(Item).where(Item.study_id == study.id))}
    rows = session.scalars(select(Output).join(Item).where(Item.study_id == study.id))
    known = {(row.item_id, row.system_id): row for row in rows}
    added = passed = 0
    for record, content in outputs:
        if record.system not in systems:
            systems[record.system] = System(study_id=study.id, name=record.system, meta={})
            session.add(systems[record.system])
        if record.item not in items:
            items[record.item] = Item(study_id=study.id, name=record.item, prompt="", cluster=None)
            session.add(items[record.item])
        item, system = items[record.item], systems[record.system]
        _tell(item, "prompt", record.prompt)
        _tell(item, "cluster", record.cluster)
        _tell(system, "meta", record.meta)
        session.flush()
        before = known.get((item.id, system.id))
        if before is None:
            known[item.id, system.id] = _output(item, system, record, content)
            session.add(known[item.id, system.id])
            added += 1
        else:
            there = {"content": before.source, "gold": before.gold, "features": before.features}
            given = {"content": content.source, "gold": record.gold, "features": dict(content.features)}
            for what in there:
                if there[what] != given[what]:
                    raise _differs(f"output of {record.system!r} for {record.item!r}", what)
            passed += 1
    return {"added": added, "known": passed}


def _output(item: Item, system: System, record: OutputRecord, content: Content) -> Output:
    return Output(
        item_id=item.id,
        system_id=system.id,
        gold=record.gold,
        text=content.text,
        opaque=None if content.sha256 is None else secrets.token_urlsafe(24),
        sha256=content.sha256,
        media_type=content.media_type,
        size=content.size,
        source=content.source,
        features=dict(content.features),
    )


def _tell(row: Item | System, name: str, value: Any) -> None:
    """Sets what one of the records says of an item or a system; another may not say otherwise."""
    before = getattr(row, name)
    if value and before and before != value:
        raise _differs(f"{type(row).__name__.lower()} {row.name!r}", name)
    if value:
        setattr(row, name, value)


def _differs(where: str, what: str) -> RefusedError:
    return RefusedError(409, "differs", where, expected=f"the {what} that is there", got=f"another {what}",
                        fix="give it another name, or make a new study")  # fmt: skip
