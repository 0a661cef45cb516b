"""`offbook rating ...`: blind pairwise judgements, from a folder of outputs to a ranking with intervals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from offbook.cli.report import Report, as_json, table
from offbook.errors import ConfigError, DataError, needs_extra
from offbook.runs.directory import write_atomic
from offbook.runs.progress import track

if TYPE_CHECKING:
    from fastapi import FastAPI

    from offbook.rating.outputs import OutputRecord
    from offbook.rating.records import Vote
    from offbook.rating.studies import Design
    from offbook.rating.tables import Study
    from offbook.service.database import Database
    from offbook.service.storage import BlobStore

    _Bring = Callable[[Database, BlobStore], dict[str, Any]]

_FOLDER, _URL = Path("rating"), "http://127.0.0.1:8001"
_QUESTION = "Which one is better?"
_KINDS = {
    "text": (".txt", ".md"),
    "image": (".png", ".jpg", ".jpeg", ".webp"),
    "video": (".mp4", ".mov", ".mkv", ".webm"),
}


def serve(
    folder: tyro.conf.Positional[Path] = _FOLDER,
    *,
    host: str = "127.0.0.1",
    port: int = 8001,
    database: str = "",
    blobs: str = "",
) -> Report:
    """Runs a rating service until it is interrupted; a new folder is set up, and the owner's token printed once.

    Args:
        folder: of the service. The studies of an arena are served by the arena itself.
        host: address to listen on. Beyond this machine put a server with TLS in front; tokens travel in headers.
        port: 0 for any free one.
        database: address of a PostgreSQL database, for a new folder; SQLite in the folder when empty.
        blobs: folder or fsspec address for pictures and films, for a new folder; the folder itself when empty.

    Examples:
        offbook rating serve
        offbook rating serve /srv/rating --database postgresql+psycopg://rating@localhost/rating --port 8080
    """
    with needs_extra("arena"):
        from offbook.rating.app import FILE, rating_app
        from offbook.service.serving import Server
    if (folder / "arena.json").exists():
        fix = f"run: offbook arena serve {folder}"
        raise ConfigError(str(folder), expected="a folder of a rating service", got="an arena", fix=fix)
    if (folder / FILE).exists() and (database or blobs):
        fix = f"edit {folder / FILE}"
        raise ConfigError(str(folder), expected="a new folder for these settings", got="one in use", fix=fix)
    settings = _settings(folder, database, blobs)

    def announce(url: str) -> None:
        print(f"Studies are at {url}/studies (interrupt to close).", file=sys.stderr, flush=True)

    def make(url: str) -> FastAPI:
        opened, files = settings.open()
        return rating_app(opened, files, settings.owner)

    server = Server(make, announce, host=host, port=port)
    server.serve_here()
    if not server.started:
        fix = f"check the addresses in {folder / FILE}"
        raise ConfigError(str(folder), expected="to start", got="a failure that is told above", fix=fix)
    return Report(text=f"The rating service at {server.url} is closed.", data={"url": server.url})


def import_outputs(
    source: tyro.conf.Positional[Path | None] = None,
    *,
    folder: Path = _FOLDER,
    question: str = "",
    name: str = "",
    modality: Literal["text", "image", "video", "rollout"] | None = None,
    anchor: str = "",
    design: Path | None = None,
    open: bool = False,
    raters: int = 0,
    kind: Literal["human", "llm", "script"] = "human",
    runs: tuple[int, ...] = (),
    url: str = _URL,
) -> Report:
    """Makes a study of outputs, of two submissions' runs, or of somebody else's votes.

    Outputs are JSON lines (item, system, text or file; prompt, cluster, gold, features), or files SYSTEM/ITEM.EXTENSION
    of a folder, with prompts by item in its prompts.json. Files lose all metadata. Sent again, nothing doubles.

    Args:
        source: a folder, an outputs file, or a votes.jsonl.
        folder: of the rating service, made when missing, or of an arena.
        question: that raters are asked; which one is better, when empty.
        name: of the study; that of the source when empty. A draft of that name takes more outputs.
        modality: text, image, video or rollout; that of the draft, or seen from the outputs, when not given.
        anchor: system on which the scale of the ranking is fixed, such as a teacher.
        design: JSON file with further settings of a study, such as raters_per_pair, reasons, min_watch, prereg; a draft
            that is there must have the same.
        open: make the pairs and let raters in; outputs cannot be added afterwards.
        raters: how many invitations to make and print, once.
        kind: of these raters.
        runs: two submissions of the arena whose films are compared, instead of a source; of two that were sent with
            --against either is enough.
        url: where raters will reach the service, for the links of invitations.

    Examples:
        offbook rating import answers/ --question "Which answer is better?" --anchor teacher --open --raters 5
        offbook rating import outputs.jsonl --design design.json --open
        offbook rating import --folder arena --runs 7 4 --raters 3 --url https://arena.example
        offbook rating import votes.jsonl --name "their study"
    """
    with needs_extra("arena"):
        from offbook.rating import studies
    if not 0 <= raters <= studies.MOST_RATERS:
        expected = f"0 to {studies.MOST_RATERS}"
        raise ConfigError("--raters", expected=expected, got=str(raters), fix="change --raters")
    flags = {"question": question, "name": name, "modality": modality, "anchor": anchor}
    wanted = {key: value for key, value in flags.items() if value}
    for key, value in ({} if design is None else _json_object(design, f"--design {design}")).items():
        if wanted.setdefault(key, value) != value:
            fix = "give it once"
            raise ConfigError(f"--{key}", expected=f"{value!r} as in {design}", got=repr(wanted[key]), fix=fix)
    # What cannot be read leaves no new folder behind.
    bring = _reading(source, runs, folder, wanted, open or raters > 0)
    with _opened(folder, make=True) as (database, blobs):
        done = bring(database, blobs)
        with database.write() as session:
            study = studies.find(session, done["study"], lock=True)
            if open and study.state == "draft":
                done["pairs"] = studies.open_study(session, study)["real"]
            made = studies.invite(session, study, raters, kind) if raters else []
            links = [f"{url.rstrip('/')}/rate#{row['token']}" for row in made]
            done |= {"state": study.state, "name": study.name}
    return Report(text=_told(done, links), data=done | {"invitations": links})


def _told(done: Mapping[str, Any], links: list[str]) -> str:
    parts = [f"{count} {what}" for what, count in done.items() if isinstance(count, int) and what != "study"]
    text = f"Study {done['study']} ({done['name']}) is {done['state']}: {', '.join(parts)}"
    if links:
        text += "\n\nOne link for each rater, shown this once:\n\n" + "\n".join(f"  {link}" for link in links)
    return text


def export(
    study: tyro.conf.Positional[str], *, folder: Path = _FOLDER, out: Path = Path("votes.jsonl"), close: bool = False
) -> Report:
    """Writes the votes of a study as votes.jsonl, of which all statistics are a function.

    Args:
        study: its number or its name.
        folder: of the rating service, or of an arena.
        out: the file to write.
        close: take no more votes first; from then on everybody may see the results.

    Examples:
        offbook rating export 1
        offbook rating export "first round" --close --out results/votes.jsonl
    """
    with needs_extra("arena"):
        from offbook.rating import studies
        from offbook.rating.exports import export_votes, votes_with_rules
        from offbook.rating.records import write_votes
    with _opened(folder) as (database, _):
        with database.write() as session:
            found = _find(session, study)
            if close and found.state == "open":
                studies.close_study(session, found)
        with database.read() as session:
            found = _find(session, study)
            votes = export_votes(session, found)
            if found.state == "open":
                votes = votes_with_rules(found, votes)
            state, name = found.state, found.name
    write_votes(out, votes)
    excluded = sum(bool(vote.excluded) for vote in votes)
    text = f"{out}: {len(votes)} votes of {name!r} ({state}), {excluded} of them left out by rules."
    return Report(text=text, data={"out": out, "votes": len(votes), "excluded": excluded, "state": state})


def stats(
    votes: tyro.conf.Positional[Path],
    *,
    out: Path | None = None,
    anchor: str | None = None,
    features: tuple[str, ...] | None = None,
    min_dwell_ms: int | None = None,
    seed: int = 0,
) -> Report:
    """Ranks systems from votes: ratings with clustered intervals, agreement, position bias, what the order hangs on.

    Args:
        votes: a votes.jsonl.
        out: folder for the figures as stats.json, the tables as stats.txt, and a picture as ratings.png.
        anchor: system whose rating is 0, and beside which shares are told.
        features: of the outputs, to control for in a second ranking; all that differ when not given.
        min_dwell_ms: faster votes are counted as hasty.
        seed: of resampling.

    Examples:
        offbook rating stats votes.jsonl --anchor teacher --out results/
        offbook rating stats votes.jsonl --features characters headings --json
    """
    with needs_extra("models"):
        from offbook.rating.analysis import analyse
        from offbook.rating.features import telling_features
        from offbook.rating.records import read_votes
        from offbook.rating.report import draw_ratings, tables
    if seed < 0:
        raise ConfigError("--seed", expected="0 or more", got=str(seed), fix="change --seed")
    given = read_votes(votes)
    wanted = telling_features(given) if features is None else features
    found = analyse(given, anchor=anchor, features=wanted, min_dwell_ms=min_dwell_ms, seed=seed)
    parts = [f"{part.title}\n{table(part.head, part.rows)}" if part.head else part.title for part in tables(found)]
    text = "\n\n".join(parts)
    if out is not None:
        write_atomic(out / "stats.json", as_json(found.to_json()) + "\n")
        write_atomic(out / "stats.txt", text + "\n")
        if any(group.ranking for group in found.groups if not group.with_excluded):
            draw_ratings(out / "ratings.png", found)
    return Report(text=text, data=found.to_json())


@contextmanager
def _opened(folder: Path, *, make: bool = False) -> Iterator[tuple[Database, BlobStore]]:
    """Database and files of a rating service or of an arena."""
    with needs_extra("arena"):
        from offbook.rating.app import Settings
        from offbook.service.storage import BlobStore
    database: Database
    if (folder / "arena.json").exists():
        from offbook.arena import database as arena
        from offbook.arena.service import Settings as ArenaSettings

        found = ArenaSettings.load(folder)
        database, blobs = arena.Database(found.database_url), BlobStore(found.blobs or str(folder.resolve()))
        database.migrate()
    else:
        database, blobs = (_settings(folder) if make else Settings.load(folder)).open()
    try:
        yield database, blobs
    finally:
        database.close()


def _settings(folder: Path, database: str = "", blobs: str = "") -> Any:
    """The settings of a folder; a new one is set up, and the owner's token told."""
    from offbook.rating.app import FILE, Settings

    if (folder / FILE).exists():
        return Settings.load(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(str(folder), expected="a new or empty folder", got="something else", fix="choose another")
    settings, token = Settings.make(folder, database, blobs)
    print(f"A rating service stands in {folder}. The owner's token, shown this once:\n\n  {token}\n", file=sys.stderr)
    return settings


def _find(session: Any, wanted: str) -> Study:
    from sqlalchemy import select

    from offbook.rating import studies
    from offbook.rating.tables import Study

    named = session.scalar(select(Study.id).where(Study.name == wanted))
    if named is None and not (wanted.isascii() and wanted.isdigit() and len(wanted) < 10):
        known = session.scalars(select(Study.name).order_by(Study.id)).all()
        fix = f"choose one of: {', '.join(known)}" if known else "make one with: offbook rating import"
        raise ConfigError("study", expected="its number or name", got=repr(wanted), fix=fix)
    return studies.find(session, int(wanted) if named is None else named)


def _json_object(path: Path, where: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(where, expected="a JSON object", got=str(error), fix="mend the file") from error
    if not isinstance(record, dict):
        raise ConfigError(where, expected="a JSON object", got="something else", fix="mend the file")
    return record


def _holds_votes(source: Path) -> bool:
    """Whether the first line of a file is a vote."""
    if not source.is_file():
        return False
    with source.open("rb") as file:
        try:
            first = json.loads(next((line for line in file if line.strip()), b"null"))
        except ValueError:
            return False
    return isinstance(first, dict) and {"choice", "left", "right"} <= first.keys()


def _reading(source: Path | None, runs: tuple[int, ...], folder: Path, wanted: dict[str, Any], judging: bool) -> _Bring:
    """Reads what is brought, and gives what takes it into a service; what would do nothing there is refused."""
    if (source is None) == (not runs):
        got = "neither" if source is None else "both"
        raise ConfigError("source", expected="a source, or --runs", got=got, fix="give one of them")
    if len(runs) > 2:
        raise ConfigError("--runs", expected="one or two submissions", got=str(len(runs)), fix="name two")
    if source is None and not (folder / "arena.json").exists():
        raise ConfigError("--runs", expected="--folder of an arena", got=str(folder), fix="name the arena's folder")
    if source is None:
        _refuse_others(wanted, ("question", "name"), "--runs")
        return partial(_take_runs, folder / "cache", runs, wanted)
    asked = {"question": _QUESTION} | wanted
    if _holds_votes(source):
        return _reading_votes(source, asked, judging)
    from offbook.rating import studies

    base, records = _read_outputs(source)
    asked = {"name": source.resolve().stem, "modality": _modality(records)} | asked
    return partial(_take_outputs, base, records, studies.design(**asked), wanted)


def _reading_votes(source: Path, wanted: dict[str, Any], judging: bool) -> _Bring:
    from dataclasses import replace

    from offbook.rating.exports import design_of_votes
    from offbook.rating.records import read_votes

    _refuse_others(wanted, ("question", "name", "anchor"), "votes")
    if judging:
        got = "--open or --raters"
        raise ConfigError(str(source), expected="outputs to judge", got=f"votes, and {got}", fix=f"leave out {got}")
    votes = read_votes(source)
    name = wanted.pop("name", "")
    votes = [replace(vote, study=name) for vote in votes] if name else votes
    return partial(_take_votes, votes, design_of_votes(votes, **wanted))


def _refuse_others(wanted: Mapping[str, Any], used: Sequence[str], what: str) -> None:
    for name in wanted:
        if name not in used:
            fix = f"leave out {name!r}"
            expected = f"no settings but {', '.join(used)} beside {what}"
            raise ConfigError("study", expected=expected, got=repr(name), fix=fix)


def _take_runs(
    cache: Path, runs: tuple[int, ...], wanted: dict[str, Any], database: Database, blobs: BlobStore
) -> dict[str, Any]:
    from offbook.arena.comparisons import study_of_runs

    return study_of_runs(database, blobs, cache, "operator", *runs, **wanted)


def _take_votes(votes: Sequence[Vote], design: Design, database: Database, blobs: BlobStore) -> dict[str, Any]:
    from offbook.rating.exports import import_votes

    with database.write() as session:
        study = import_votes(session, "import", votes, design)
        return {"study": study.id, "votes": len(votes)}


def _take_outputs(
    base: Path,
    records: Sequence[OutputRecord],
    design: Design,
    wanted: Mapping[str, Any],
    database: Database,
    blobs: BlobStore,
) -> dict[str, Any]:
    from sqlalchemy import select

    from offbook.rating import outputs, studies
    from offbook.rating.tables import Study

    named = select(Study).where(Study.name == design.name)
    with database.read() as session:
        draft = session.scalar(named)
        modality = design.modality if draft is None else draft.modality
        if draft is not None:
            studies.require(draft, "draft", "add outputs before a study is opened")
            _check_same(draft, design, wanted)
    prepared = [
        (record, outputs.prepare(record, modality, blobs, _file(base, record))) for record in track(records, "outputs")
    ]
    with database.write() as session:
        study = session.scalar(named) or studies.create(session, "import", design)
        return {"study": study.id, **outputs.add(session, study, prepared)}


def _check_same(draft: Study, design: Design, wanted: Mapping[str, Any]) -> None:
    """Refuses settings that are not those of the draft, which keeps its own."""
    from offbook.rating import studies

    asked = studies.settings(design)
    for name in wanted:
        before = getattr(draft, name)
        if asked[name] not in (before, None):
            where, expected = f"study {draft.name!r}, {name}", f"{before!r} as in the draft"
            fix = "leave it out, or choose another name"
            raise ConfigError(where, expected=expected, got=repr(asked[name]), fix=fix)


def _read_outputs(source: Path) -> tuple[Path, list[OutputRecord]]:
    """The outputs of a file or a folder, and the folder that their files are named from."""
    from offbook.rating.outputs import read_records

    if source.is_dir() and not (source / "outputs.jsonl").exists():
        lines = list(_walk(source))
        if not lines:
            known = ", ".join(suffix for suffixes in _KINDS.values() for suffix in suffixes)
            expected, fix = "files SYSTEM/ITEM.EXTENSION, or outputs.jsonl", f"known extensions: {known}"
            raise DataError(str(source), expected=expected, got="none", fix=fix)
        return source, read_records("\n".join(map(json.dumps, lines)).encode(), str(source))
    file = source / "outputs.jsonl" if source.is_dir() else source
    return file.parent, read_records(file.read_bytes(), str(file))


def _walk(folder: Path) -> Iterator[dict[str, str]]:
    prompts: Mapping[str, str] = {}
    if (folder / "prompts.json").exists():
        prompts = _json_object(folder / "prompts.json", str(folder / "prompts.json"))
    for path in sorted(folder.glob("*/*")):
        suffix = path.suffix.lower()
        line = {"item": path.stem, "system": path.parent.name, "prompt": prompts.get(path.stem, "")}
        if suffix in _KINDS["text"]:
            yield line | {"text": path.read_text(encoding="utf-8", errors="replace")}
        elif suffix in _KINDS["image"] + _KINDS["video"]:
            yield line | {"file": f"{path.parent.name}/{path.name}"}


def _modality(records: list[OutputRecord]) -> str:
    if records[0].file is None:
        return "text"
    return "image" if Path(records[0].file).suffix.lower() in _KINDS["image"] else "video"


def _file(base: Path, record: OutputRecord) -> Path | None:
    """The file of an output; one outside of the folder is none of ours to publish."""
    if record.file is None:
        return None
    path = (base / record.file).resolve()
    return path if path.is_relative_to(base.resolve()) and path.is_file() else None
