"""What a process printed, kept small: the last bytes of a stream, and untrusted text made fit to store and show."""

from __future__ import annotations

TAIL_BYTES = 16 * 1024
TRACE_CHARS = 4000
"""Enough for a Python traceback through a deep model; a store of 10,000 failures stays under 40 MB."""
NOTES_CHARS = 500
"""As long as a proposer's own reason may be: notes of several turns share one prompt."""
_KEPT = frozenset("\n\t")


class Tail:
    """The last `limit` bytes of a stream, in a buffer that never grows past twice that."""

    def __init__(self, limit: int = TAIL_BYTES) -> None:
        self._limit = limit
        self._bytes = bytearray()

    def add(self, chunk: bytes) -> None:
        """Append `chunk`, dropping what is older than the limit."""
        self._bytes += chunk[-self._limit :]
        if len(self._bytes) > 2 * self._limit:
            del self._bytes[: -self._limit]

    def clear(self) -> None:
        """Forget everything."""
        self._bytes.clear()

    def text(self) -> str:
        """Return the whole lines at the end of the stream as clean text of at most `TRACE_CHARS`."""
        return last_lines(self._bytes[-self._limit :].decode("utf-8", "replace"))


def last_lines(text: str, limit: int = TRACE_CHARS) -> str:
    """Return the end of `text`, cleaned, of at most `limit` characters, beginning at a line where one begins early."""
    cleaned = clean(text.rstrip())
    if len(cleaned) <= limit:
        return cleaned
    end = cleaned[-limit:]
    broken, _, rest = end.partition("\n")
    return rest if rest and len(broken) < limit // 4 else end


def clean(text: str) -> str:
    """Return `text` without anything a terminal, a prompt or a database would choke on.

    Control characters (escape sequences with them), lone surrogates and the marks that reorder text are written as
    Python escapes; tabs and line ends stay, a carriage return becomes a line end.
    """
    return "".join(
        character if character in _KEPT or character.isprintable() else _escaped(character)
        for character in text.replace("\r\n", "\n").replace("\r", "\n")
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def cut(text: str, limit: int = NOTES_CHARS) -> str:
    """Return `text` cleaned, on one line, of at most `limit` characters, saying where it was cut."""
    line = " ".join(clean(text[: 4 * limit]).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
