"""Text to token ids, and each id's true length in bytes, for the byte, trained-BPE and GPT-2 vocabularies.

A tokenizer also has one separator that opens every document; it stands for no bytes, so it never counts in bits per
byte. The byte tokenizer needs nothing but numpy; the others import the `tokenizers` library when they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from overnight.store.errors import CampaignError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
Ids = NDArray[np.uint32]


class TextTokenizer(Protocol):
    """Encodes documents; `lengths[i]` is how many bytes of text token `i` stands for."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """True bytes of each id, as (vocab,)."""
        ...

    @property
    def vocab(self) -> int:
        """Ids that the model must have a row for: more than are ever used, when a BPE ran out of pairs."""
        ...

    def encode(self, documents: Iterable[bytes]) -> Iterator[Ids]:
        """Yield each document's ids, the separator first."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """One id a byte, and 256 for the separator."""

    vocab: int = 257

    @property
    def lengths(self) -> NDArray[np.int32]:
        """One byte each, none for the separator."""
        return np.array([1] * 256 + [0], dtype=np.int32)

    def encode(self, documents: Iterable[bytes]) -> Iterator[Ids]:
        """Yield each document's ids, the separator first."""
        for document in documents:
            ids = np.empty(len(document) + 1, dtype=np.uint32)
            ids[0] = 256
            ids[1:] = np.frombuffer(document, dtype=np.uint8)
            yield ids


class BpeTokenizer:
    """A byte-level BPE: every character of a token's spelling stands for one byte (GPT-2's alphabet)."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self._tokenizer = tokenizer
        self.vocab = vocab
        separator = tokenizer.token_to_id(SEPARATOR)
        if separator is None:
            raise CampaignError(f"`trainer.tokenizer`: the vocabulary has no `{SEPARATOR}`; use `byte` or `bpe:<size>`")
        self._separator = int(separator)

    @classmethod
    def train(cls, documents: Iterable[bytes], size: int) -> BpeTokenizer:
        """Train on `documents` up to `size` ids; the same documents give the same vocabulary."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[SEPARATOR],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator((document.decode("utf-8", "replace") for document in documents), trainer)
        return cls(tokenizer, size)

    @classmethod
    def gpt2(cls) -> BpeTokenizer:
        """GPT-2's own vocabulary of 50,257 ids, fetched from the hub once.

        Raises:
            CampaignError: the hub cannot be reached and no copy is cached.
        """
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_pretrained("openai-community/gpt2")
        except Exception as error:
            raise CampaignError(
                f'`trainer.tokenizer` = "gpt2" could not be fetched from the hub ({error!s:.200}); '
                'fetch it once while online, or use "bpe:50257"'
            ) from error
        return cls(tokenizer, 50257)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """True byte lengths, 0 for the separator and for ids that no pair was left for."""
        lengths = np.zeros(self.vocab, dtype=np.int32)
        for token, index in self._tokenizer.get_vocab().items():
            lengths[index] = 0 if index == self._separator else len(token)
        return lengths

    def encode(self, documents: Iterable[bytes]) -> Iterator[Ids]:
        """Yield each document's ids, the separator first; documents are taken 64 at a time."""
        batch: list[str] = []
        for document in documents:
            batch.append(document.decode("utf-8", "replace"))
            if len(batch) == 64:
                yield from self._encode_batch(batch)
                batch = []
        yield from self._encode_batch(batch)

    def _encode_batch(self, texts: list[str]) -> Iterator[Ids]:
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array([self._separator, *encoding.ids], dtype=np.uint32)
