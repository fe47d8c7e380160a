"""A corpus as conversations: one JSON object a line with `messages`, which TRL and axolotl read as they are.

Every row is the stored prompt and one whole reply; what else is known of it (which side of the cut, the outcome, the
gain, the weight) stands beside it, where both tools leave unknown columns alone. Of an `outcome` corpus the reply is
what was tried, as in `clone`: a conversation has room for one answer. Variants of augmentation are not exported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from overnight.distill.corpus import Corpus
from overnight.distill.teaching import Item
from overnight.rails.reply import reply_text
from overnight.store.hashing import JsonValue
from overnight.trainer.noise import Posterior


def chat_lines(corpus: Corpus, *, campaign: str) -> Iterator[str]:
    """Yield a corpus' conversations, oldest first, each as a line of JSON ending in a newline."""
    weights = {row.id: row.weight for row in corpus.rows}
    for split, items in (("train", corpus.trained), ("held_out", corpus.held_out)):
        for item in items:
            weight = weights.get(item.id, 1.0)
            told = {"campaign": campaign, "split": split, **_metadata(corpus, item), "weight": weight}
            yield json.dumps({"messages": _messages(item), "metadata": told}, ensure_ascii=False) + "\n"


def _messages(item: Item) -> list[dict[str, str]]:
    change = item.lesson.change
    reply = reply_text(change.knob, change.value, item.lesson.attempt.reason or "")
    return [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": reply}]


def _metadata(corpus: Corpus, item: Item) -> dict[str, JsonValue]:
    attempt, worth = item.lesson.attempt, corpus.now.knowledge.worth(item.lesson)
    return {
        "id": item.id,
        "iteration": attempt.iteration,
        "attempt_id": attempt.id,
        "prompt_sha256": item.prompt_id,
        "prompt_kind": attempt.prompt_kind,
        "proposer": attempt.proposer,
        "outcome": attempt.outcome,
        "failure": attempt.failure,
        "gain": attempt.gain,
        "shrunken_gain": worth.mean if isinstance(worth, Posterior) else None,
    }
