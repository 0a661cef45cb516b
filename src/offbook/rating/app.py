"""The rating service by itself: a folder with a database and files, one owner's token, one application."""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection

from offbook import __version__
from offbook.errors import ConfigError
from offbook.rating import routes
from offbook.rating.page import render, router
from offbook.rating.service import Rating
from offbook.rating.studies import hash_token
from offbook.rating.tables import SCHEMA
from offbook.runs.directory import write_atomic
from offbook.service import database
from offbook.service.pages import static_files
from offbook.service.refusal import RefusedError
from offbook.service.storage import BlobStore
from offbook.service.web import RESPONSES, Turnstile, dress

FILE = "rating.json"


class Database(database.Database):
    """A database of nothing but studies.

    Example:
        >>> import tempfile
        >>> made = Database(f"sqlite:///{tempfile.mkdtemp()}/rating.db")
        >>> made.migrate()
        >>> made.close()
    """

    schemas = (SCHEMA,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is decided about a rating service; kept as `rating.json` in its folder.

    Attributes:
        folder: where the settings, the embedded database and the files stand.
        owner: hash of the owner's token.
        database: its address; SQLite in the folder when empty.
        blobs: a folder or an fsspec address; the folder itself when empty.
    """

    folder: Path
    owner: str
    database: str = ""
    blobs: str = ""

    @classmethod
    def make(cls, folder: Path, database: str = "", blobs: str = "") -> tuple[Settings, str]:
        """New settings, saved, and the owner's token, which can be seen this once."""
        token = f"ro_{secrets.token_urlsafe(32)}"
        made = cls(folder=folder, owner=hash_token(token), database=database, blobs=blobs)
        record = {name: getattr(made, name) for name in ("owner", "database", "blobs")}
        # The database's address may hold a password.
        write_atomic(folder / FILE, json.dumps(record, indent=2) + "\n", mode=0o600)
        return made, token

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """Reads `rating.json`.

        Raises:
            ConfigError: there is none, or it cannot be used.
        """
        path = folder / FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return cls(folder=folder, **record)
        except FileNotFoundError:
            fix = "make one with: offbook rating serve, or offbook rating import"
            raise ConfigError(str(folder), expected=f"a folder with {FILE}", got="none", fix=fix) from None
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(str(path), expected="settings of a rating service", got=str(error),
                              fix="mend the file") from error  # fmt: skip

    def open(self) -> tuple[Database, BlobStore]:
        """The database, brought to this version's schema, and the files."""
        opened = Database(self.database or f"sqlite:///{self.folder.resolve() / 'rating.db'}")
        opened.migrate()
        return opened, BlobStore(self.blobs or str(self.folder.resolve()))


def rating_app(database: database.Database, blobs: BlobStore, owner: str) -> FastAPI:
    """An application that is a rating service and nothing else; the database is migrated when it starts.

    Args:
        database: with the schema of studies.
        blobs: for pictures and films.
        owner: hash of the token by which the owner is known (`studies.hash_token`).
    """
    turnstile = Turnstile()

    async def identify_owner(connection: HTTPConnection) -> str:
        kind, _, text = connection.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(hash_token(text.strip()), owner):
            return "owner"
        address = connection.client.host if connection.client else "unknown"
        turnstile.check(address)
        turnstile.fail(address)
        raise RefusedError(401, "unauthorised", "Authorization header", expected="Bearer ro_... of the owner",
                           got="something else" if text else "none",
                           fix="use the token that was shown when the service was made")  # fmt: skip

    rating = Rating(database=database, blobs=blobs, identify_owner=identify_owner, turnstile=turnstile)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(database.migrate)
        try:
            yield
        finally:
            await run_in_threadpool(database.close)

    app = FastAPI(
        title="offbook rating",
        version=__version__,
        description="Blind pairwise judgements. Errors are `{ok: false, error, detail, hint, status}`; tokens go into "
        "the Authorization header.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=RESPONSES,
    )
    app.state.rating = rating
    app.include_router(routes.router)
    app.include_router(router)
    app.add_api_route("/", lambda: RedirectResponse("/studies"), include_in_schema=False)
    app.mount("/static", static_files("offbook.rating.page"), name="static")
    dress(app, partial(render, rating, "error"), limit=routes.body_limit, admit=routes.admit)
    return app
