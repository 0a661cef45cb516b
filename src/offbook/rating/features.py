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
        {'characters': 31.0, 'list_entries': 2.0, 'headings': 1.0, 'bold': 1.0}
    """
    return {
        "characters": float(len(text)),
        "list_entries": float(len(re.findall(r"(?m)^[ \t]{0,12}(?:[-*+]|\d{1,9}[.)])[ \t]", text))),
        "headings": float(len(re.findall(r"(?m)^ {0,3}#{1,6}[ \t]", text))),
        "bold": float(len(re.findall(r"\*\*[^*\n]{1,200}\*\*", text))),
    }


def telling_features(votes: Sequence[Vote]) -> list[str]:
    """The features in which some two outputs differ; of the others nothing can be learnt."""
    names = sorted(votes[0].left_features) if votes else []
    return [name for name in names if any(vote.left_features[name] != vote.right_features[name] for vote in votes)]
