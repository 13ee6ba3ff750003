"""Markdown of the studies' reports."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import Any


def markdown_table(head: Iterable[Any], rows: Iterable[Iterable[Any]], align: str = "---") -> str:
    """A table; all columns but the first are aligned as ``align`` says, such as ``---:`` to the right."""
    head = list(head)
    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def fill_in(template: str, parts: dict[str, Any]) -> str:
    """A template with its parts, prose in lines of at most 120 characters; sections with a part that is None go."""
    sections = re.split(r"\n(?=## )", template)
    kept = [text for text in sections if None not in map(parts.get, re.findall(r"{(\w+)", text))]
    blocks = [block.strip("\n") for block in "\n".join(kept).format(**parts).split("\n\n")]
    return "\n\n".join(block if block[0] in "#|-!" else _wrapped(block) for block in blocks if block) + "\n"


def _wrapped(prose: str) -> str:
    return textwrap.fill(prose, 120, break_long_words=False, break_on_hyphens=False)
