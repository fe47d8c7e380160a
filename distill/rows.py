"""What a training takes: rows of text with what to learn about it, as plain data.

A row is one prompt and what should follow it. Three kinds of lesson may stand together, and their losses add up:
`replies` (cross-entropy on whole replies), `choice` (listwise: a probability for each candidate of the menu) and
`pairs` (one candidate ahead of another). The loss of a step is the mean over its rows, each times its `weight`.
Nothing here loads torch; `overnight.distill.losses` says how each lesson is taught.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from overnight.store.hashing import digest


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply to learn by heart: the end of the turn is added when it is tokenized."""

    text: str
    weight: float = 1.0
    """Times the mean cross-entropy of its tokens, in nats."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One candidate that should come before another, by index into the row's candidates."""

    better: int
    worse: int
    probability: float = 1.0
    """How sure it is that `better` is better: 1/2 says nothing."""
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRow:
    """One prompt and its lessons."""

    id: str
    """Names the row in every message about it; unique within a corpus and epoch."""
    prompt: str
    """The user's turn, byte for byte as it was stored."""
    replies: tuple[Reply, ...] = ()
    candidates: tuple[str, ...] = ()
    """Beginnings of replies, as scoring has them (`overnight.rails.reply.candidate_text`)."""
    choice: tuple[float, ...] = ()
    """The probability that each candidate should have, summing to 1; or empty: no listwise lesson."""
    choice_weight: float = 1.0
    """Times the cross-entropy between `choice` and the softmax of the candidates' log-probabilities."""
    pairs: tuple[Pair, ...] = ()
    weight: float = 1.0
    epoch: int | None = None
    """The one epoch (from 0) that the row belongs to, so that each epoch may see another variant; None: all."""

    def check(self) -> None:
        """Assert that the row can be trained on.

        Raises:
            AssertionError: it cannot; the message names the row.
        """
        taught = bool(self.choice or self.pairs or any(reply.text and reply.weight > 0 for reply in self.replies))
        assert taught, f"training row `{self.id}` has no supervised token"
        assert not self.choice or len(self.choice) == len(self.candidates), (
            f"training row `{self.id}` has {len(self.choice)} probabilities for {len(self.candidates)} candidates"
        )
        assert not self.choice or (min(self.choice) >= 0 and math.isclose(math.fsum(self.choice), 1, abs_tol=1e-6)), (
            f"training row `{self.id}`: its `choice` is no probability distribution"
        )
        assert self.weight > 0, f"training row `{self.id}` has the weight {self.weight}, which teaches nothing"
        assert all(self.candidates), f"training row `{self.id}` has an empty candidate"
        assert len(set(self.candidates)) == len(self.candidates), f"training row `{self.id}` repeats a candidate"
        known = range(len(self.candidates))
        assert all(pair.better in known and pair.worse in known for pair in self.pairs), (
            f"training row `{self.id}` has a pair of candidates that are not there"
        )


def write_rows(rows: Iterable[TrainingRow], file: Path) -> None:
    """Write rows as JSON lines."""
    with file.open("w", encoding="utf-8", errors="surrogatepass") as stream:
        stream.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def read_rows(file: Path) -> Iterator[TrainingRow]:
    """Yield the rows that `write_rows` wrote."""
    with file.open(encoding="utf-8", errors="surrogatepass") as stream:
        for line in stream:
            fields = json.loads(line)
            replies = tuple(Reply(**reply) for reply in fields.pop("replies"))
            pairs = tuple(Pair(**pair) for pair in fields.pop("pairs"))
            candidates, choice = tuple(fields.pop("candidates")), tuple(fields.pop("choice"))
            yield TrainingRow(replies=replies, pairs=pairs, candidates=candidates, choice=choice, **fields)


def rows_digest(rows: Sequence[TrainingRow]) -> str:
    """Return the content address of a corpus: every field of every row, in order."""
    return digest([asdict(row) for row in rows])
