"""Text to tokens, the way the model meets them: the chat template around a stored prompt, then an answer that begins.

The template's own text, the prompt and the candidates are tokenized apart: the template's marks become special tokens,
and the same marks inside a prompt (a model's reason, a trainer's notes) stay plain text, so that nobody who is quoted
there can end the turn. A candidate's tokens follow the prompt's as they would when generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SENTINEL = "@@overnight-content@@"


class ChatEncoder:
    """Encodes prompts and candidates for one tokenizer.

    Args:
        tokenizer: a `transformers` tokenizer; without a chat template the prompt is continued as it stands.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of a chat up to where the assistant begins to write.

        Args:
            messages: the turns, each with `role` and `content`; a score has one, of the user.
        """
        if self._tokenizer.chat_template is None:
            text = "\n".join(message["content"] for message in messages)
            return [*self._start(), *self._encode(text, special=False)]
        sentinels = [f"{_SENTINEL}{number}@@" for number in range(len(messages))]
        turns = [{"role": m["role"], "content": s} for m, s in zip(messages, sentinels, strict=True)]
        rest = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids: list[int] = []
        for message, sentinel in zip(messages, sentinels, strict=True):
            before, rest = rest.split(sentinel, 1)
            ids += [*self._encode(before, special=True), *self._encode(self._content(message), special=False)]
        return ids + self._encode(rest, special=True)

    def candidates(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the tokens of each candidate; each text is tokenized once in the life of the encoder."""
        if len(self._known) > 100_000:
            self._known.clear()
        new = [text for text in texts if text not in self._known]
        for text in new:
            self._known[text] = tuple(self._encode(text, special=False))
        return [self._known[text] for text in texts]

    def ending(self) -> tuple[int, ...]:
        """Return the tokens that end a reply: up to the template's first special token, or the end of text."""
        end = self._tokenizer.eos_token_id
        if self._tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
            rendered = self._tokenizer.apply_chat_template(turns, tokenize=False)
            ids = self._encode(rendered.rsplit(_SENTINEL, 1)[1], special=True)
            special = [place for place, token in enumerate(ids) if token in self._tokenizer.all_special_ids]
            if special:
                return tuple(ids[: special[0] + 1])
        return () if end is None else (int(end),)

    def stops(self) -> list[int]:
        """Return the tokens after which a reply is over, whatever the model's own settings say: it was taught them."""
        own = self._tokenizer.eos_token_id
        return sorted({*self.ending()[-1:], *(() if own is None else (int(own),))})

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated tokens, without special ones."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _content(self, message: Mapping[str, str]) -> str:
        """Return a turn's content, trimmed where the template would trim it."""
        padded = f"   {_SENTINEL}   "
        rendered = self._tokenizer.apply_chat_template([{"role": "user", "content": padded}], tokenize=False)
        return message["content"] if padded in rendered else message["content"].strip()

    def _start(self) -> list[int]:
        """Return what the tokenizer puts before a text of its own accord."""
        bare, dressed = self._encode("a", special=True), list(self._tokenizer.encode("a"))
        return dressed[: len(dressed) - len(bare)] if dressed[-len(bare) :] == bare else []

    def _encode(self, text: str, *, special: bool) -> list[int]:
        if not text:
            return []
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids
        return [int(i) for i in ids]
