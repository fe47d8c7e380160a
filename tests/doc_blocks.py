"""Reads the code blocks of a Markdown page, with what the HTML comments right above each say about running it.

A page is read from its top to its end in one empty folder, as a reader would follow it:

    <!-- not run: REASON -->        the block is left out, and listed with its reason
    <!-- file: NAME -->             the block is the content of a file
    <!-- appends: NAME -->          the block is added to a file
    <!-- replaces: MARK in FILE --> it takes the place of what stands between the file's `# ==== MARK` and the next mark
    <!-- exits: N or M -->          the commands may end with these codes instead of 0
    <!-- printed: ... -->           the commands above printed these lines, but for the numbers in them
    <!-- scene: NAME -->            something is there already (see `SCENES` in test_docs.py)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^( *)(`{3,})(.*)$")
_COMMENT = re.compile(r"^ *<!-- ([a-z ]+?)(?:: (.*?))? -->$")
_MARK = re.compile(r"^# ==== .+$", re.MULTILINE)
KINDS = ("not run", "file", "appends", "replaces", "exits", "printed", "scene")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    language: str
    text: str
    notes: dict[str, str]

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        return "not run" not in self.notes


def blocks_of(path: Path, page: str) -> list[Block]:
    """Return a page's blocks in their order; an unclosed fence or an unknown note is an error."""
    return list(_blocks(path.read_text(encoding="utf-8").splitlines(), page))


def _blocks(lines: list[str], page: str) -> Iterator[Block]:
    notes: dict[str, str] = {}
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if fence := _FENCE.match(line):
            indent, ticks, language = fence.groups()
            start = number
            while lines[number].strip() != ticks:
                number += 1
            inside = [each.removeprefix(indent) for each in lines[start:number]]
            number += 1
            if not language.startswith("{"):
                yield Block(page, start, language.strip(), "\n".join(inside) + "\n", notes)
            notes = {}
        elif comment := _COMMENT.match(line):
            notes |= _note(comment[1], comment[2], f"{page}:{number}")
        else:
            notes = {}


def _note(kind: str, words: str | None, where: str) -> dict[str, str]:
    if kind.startswith("exits "):
        raise ValueError(f"{where}: write `exits: ...`")
    if kind not in KINDS:
        return {}
    if not words:
        raise ValueError(f"{where}: `{kind}` says nothing")
    return {kind: words}


def replaced(text: str, mark: str, new: str) -> str:
    """Return a file's text with everything between the line of `mark` and the next mark replaced."""
    marks = list(_MARK.finditer(text))
    at = next(number for number, found in enumerate(marks) if found[0].startswith(f"# ==== {mark}"))
    return f"{text[: marks[at].end()]}\n\n{new}\n{text[marks[at + 1].start() :]}"
