"""Users and their tokens: 256 random bits shown once, kept only as a hash, with scopes, an expiry and a revocation."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from offbook.arena.tables import Audit, Token, User
from offbook.service.database import now
from offbook.service.refusal import RefusedError, unknown

SCOPES = ("admin", "submit", "worker")
"""What a token may allow. `admin` includes all others; a person without a token may read the public pages."""

DAILY_TRIALS = 400
"""Trials that a new user may ask for in a day."""

_NAME = re.compile(r"[\w][\w .@+-]{0,63}")
_TOKEN = re.compile(r"ob_([a-z0-9]{8})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """Who is asking, after their token was checked."""

    user_id: int
    user: str
    token_id: int
    prefix: str
    scopes: frozenset[str]

    def allows(self, scope: str) -> bool:
        """Whether this token may do what `scope` covers."""
        return scope in self.scopes or "admin" in self.scopes

    def require(self, scope: str) -> None:
        """Refuses a token that lacks a scope, naming both sides."""
        if not self.allows(scope):
            raise RefusedError(403, "missing_scope", f"token ob_{self.prefix}", expected=f"the scope {scope!r}",
                               got=", ".join(sorted(self.scopes)) or "no scopes",
                               fix="ask the operator for a token with this scope")  # fmt: skip


def find_user(session: Session, name: str, *, create: bool = False) -> User:
    """The user of that name, made when missing and wanted.

    Raises:
        RefusedError: the name is not usable (422) or not known (404).
    """
    if not _NAME.fullmatch(name):
        raise RefusedError(422, "bad_name", f"user name {name[:80]!r}",
                           expected="1 to 64 letters, digits or . _ @ + - and blanks", got=f"{len(name)} characters",
                           fix="choose another name")  # fmt: skip
    user = session.scalar(select(User).where(User.name == name))
    if user is None:
        if not create:
            raise unknown("user", name, "create a token for it with: offbook arena token create")
        user = User(name=name, daily_trials=DAILY_TRIALS, created=session.scalar(select(now(session))))
        session.add(user)
        session.flush()
    return user


def issue_token(
    session: Session, user: User, scopes: Iterable[str], *, label: str = "", days: float | None = 90.0
) -> str:
    """Makes a token and returns it; this is the only time that its secret can be seen.

    Args:
        session: a writing session.
        user: whose token it is.
        scopes: some of `SCOPES`.
        label: a note to recognise it by.
        days: until it expires; None for never.

    Raises:
        RefusedError: a scope is unknown, there is none, or the expiry is not in the future.
    """
    wanted = sorted(set(scopes))
    strange = [scope for scope in wanted if scope not in SCOPES]
    if strange or not wanted or (days is not None and not 0 < days <= 3660):
        raise RefusedError(
            422,
            "bad_token_request",
            "token",
            expected=f"some scopes of {', '.join(SCOPES)} and an expiry of 0 to 3660 days",
            got=f"scopes {', '.join(wanted) or 'none'}, days {days}",
            fix="correct the request",
        )
    prefix, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    text = f"ob_{prefix}_{secret}"
    created = float(session.execute(select(now(session))).scalar_one())
    session.add(
        Token(
            user_id=user.id,
            prefix=prefix,
            hash=_hash(text),
            scopes=",".join(wanted),
            label=label[:200],
            created=created,
            expires=None if days is None else created + days * 86400,
        )
    )
    session.flush()
    return text


def authenticate(session: Session, header: str | None) -> Principal:
    """Who stands behind an `Authorization: Bearer ob_...` header.

    Raises:
        RefusedError: 401 for a header that is missing, malformed, unknown, expired or revoked.
    """
    kind, _, text = (header or "").strip().partition(" ")
    match = _TOKEN.fullmatch(text.strip()) if kind.lower() == "bearer" else None
    if match is None:
        raise _unauthorised("no token" if not header else "something else")
    present = now(session)
    row = session.execute(
        select(Token, User, (Token.expires.is_not(None) & (Token.expires <= present)).label("expired"))
        .join(User, User.id == Token.user_id)
        .where(Token.prefix == match[1])
    ).one_or_none()
    # An unknown prefix costs the same comparison as a known one.
    known = hmac.compare_digest(row[0].hash if row else _hash("nobody"), _hash(text.strip()))
    if row is None or not known:
        raise _unauthorised("a token that nobody holds")
    token, user, expired = row
    if token.revoked is not None or expired:
        raise _unauthorised("a revoked token" if token.revoked is not None else "an expired token")
    return Principal(
        user_id=user.id,
        user=user.name,
        token_id=token.id,
        prefix=token.prefix,
        scopes=frozenset(token.scopes.split(",")),
    )


def list_tokens(session: Session, user_id: int | None = None) -> list[dict[str, Any]]:
    """All tokens, or those of one user, newest first; never a secret or a hash."""
    query = select(Token, User.name).join(User, User.id == Token.user_id).order_by(Token.id.desc()).limit(1000)
    if user_id is not None:
        query = query.where(Token.user_id == user_id)
    return [
        {
            "prefix": token.prefix,
            "user": name,
            "label": token.label,
            "scopes": token.scopes.split(","),
            "created": token.created,
            "expires": token.expires,
            "revoked": token.revoked,
        }
        for token, name in session.execute(query)
    ]


def revoke_token(session: Session, prefix: str, user_id: int | None = None) -> int:
    """Ends a token, at once and for good; returns its id, so that its open sockets can be closed.

    Args:
        session: a writing session.
        prefix: the eight characters after `ob_`.
        user_id: restricts to this user's own tokens.

    Raises:
        RefusedError: 404, no such token.
    """
    token = session.scalar(select(Token).where(Token.prefix == prefix.removeprefix("ob_")[:8]))
    if token is None or (user_id is not None and token.user_id != user_id):
        raise unknown("token", prefix[:16], "list the tokens first")
    session.execute(
        update(Token).where(Token.id == token.id, Token.revoked.is_(None)).values(revoked=now(session)),
        execution_options={"synchronize_session": False},
    )
    return token.id


def record_audit(session: Session, who: Principal | None, action: str, subject: str) -> None:
    """Writes down who did what; without a principal it was the operator at the machine itself."""
    session.add(
        Audit(
            time=now(session),
            user=who.user if who else "operator",
            token=who.prefix if who else "",
            action=action,
            subject=subject[:2000],
        )
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _unauthorised(got: str) -> RefusedError:
    return RefusedError(401, "unauthorised", "Authorization header",
                        expected="Bearer ob_PREFIX_SECRET with a valid token", got=got,
                        fix="ask the operator for a token: offbook arena token create")  # fmt: skip
