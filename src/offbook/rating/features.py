"""Figures of how an output looks, to tell style from substance."""

from __future__ import annotations

import re
from collections.abc import Sequence

from offbook.rating.records import Vote


def text_features(text: str) -> dict[str, float]:
    r"""What gives style away in a text: characters, list entries, headings, words in bold.

    Source: the style control of Chatbot Arena, which counts these in Markdown.

    Example:
        >>> text_features("# Tea\n- **hot** water\n- leaves")
        {'characters': 30.0, 'list_entries': 2.0, 'headings': 1.0, 'bold': 1.0}
    """
    return {
        "characters": float(len(text)),
        "list_entries": float(len(re.findall(r"(?m)^[ \t]{0,12}(?:[-*+]|\d{1,9}[.)])[ \t]", text))),
        "headings": float(len(re.findall(r"(?m)^ {0,3}#{1,6}[ \t]", text))),
        "bold": float(len(re.findall(r"\*\*[^*\n]{1,200}\*\*", text))),
    }


def telling_features(votes: Sequence[Vote]) -> list[str]:
    """The features that all votes on real pairs have and in which some outputs differ: those that can explain them."""
    ranked = [vote for vote in votes if vote.pair_kind == "real" and vote.choice != "skip"]
    names = set.intersection(*(set(vote.left_features) for vote in ranked)) if ranked else set()
    return [
        name for name in sorted(names) if any(vote.left_features[name] != vote.right_features[name] for vote in ranked)
    ]
