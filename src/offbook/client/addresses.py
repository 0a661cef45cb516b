"""Addresses that people type."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit


def split_address(url: str) -> SplitResult:
    """The parts of an address; of one that is none, such as `http://[::` or `http://host:port`, all are empty.

    Example:
        >>> split_address("http://[::1]:8000").hostname, split_address("http://[::").hostname
        ('::1', None)
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # which is looked at only now
    except ValueError:
        return urlsplit("")
    return parts
