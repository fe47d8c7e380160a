"""Text for the GPT trainer: sources, one memory-mapped token file, its three shards, and the order of batches.

The token file is built once under a file lock and named after a hash of what went into it, so that two campaigns on
the same text share it and an edited text never meets a stale file. Shards are disjoint parts of the documents' order:
training first, then validation, then the holdout, which only a request for that split reads. A batch is a pure
function of (seed, position in the stream).
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import itertools
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from overnight.store.errors import CampaignError
from overnight.store.hashing import digest

if TYPE_CHECKING:
    from overnight.trainer.tokenizers import TextTokenizer

FORMAT = 1
"""Raised when the same inputs would give another token file."""
BPE_TRAIN_SHARE = 0.5
"""A trained vocabulary sees only this first share of the documents, so that no held-out text shapes it."""
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
Tokens = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Document:
    """A piece of text with a name that does not depend on the machine."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Shard:
    """A half-open range of the token file."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """Tokens in the shard."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Shards:
    """Disjoint parts of one token file, in the documents' order."""

    train: Shard
    val: Shard
    holdout: Shard


@dataclass(frozen=True, slots=True)
class Corpus:
    """One text, tokenized."""

    tokens: Tokens
    """All ids, memory-mapped and read-only."""
    starts: NDArray[np.int64]
    """Where each document begins."""
    lengths: NDArray[np.int32]
    """True bytes of each id."""
    vocab: int
    content_hash: str
    """SHA-256 of the ids and their byte lengths."""


def documents(data: str, folder: Path) -> Sequence[Document]:
    """Return the documents that `data` names, in a fixed order; globs are relative to `folder`.

    Raises:
        CampaignError: it names nothing that can be read.
    """
    if data == "stdlib":
        return _stdlib_documents()
    if data.startswith("hf:"):
        return _hub_documents(data.removeprefix("hf:"), folder)
    names = sorted(glob.glob(data, root_dir=folder, recursive=True))
    files = [Document(name, (folder / name).read_bytes) for name in names if (folder / name).is_file()]
    if not files:
        raise CampaignError(
            f'`trainer.data` = "{data}" matches no file in {folder}; give a glob of text files, relative to the '
            'campaign file or absolute, or "stdlib"'
        )
    return files


def _stdlib_documents() -> Sequence[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
    return [
        Document(path.relative_to(root).as_posix(), path.read_bytes)
        for path in paths
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1])
    ]


def _hub_documents(name: str, folder: Path) -> Sequence[Document]:
    try:
        from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    except ImportError:
        raise CampaignError(
            f'`trainer.data` = "hf:{name}" needs the `datasets` library; `pip install "overnight[hub]"`'
        ) from None
    local = folder / name
    try:
        if (local / "dataset_info.json").is_file() or (local / "dataset_dict.json").is_file():
            loaded = load_from_disk(str(local))
        else:
            loaded = load_dataset(str(local) if local.is_dir() else name)
    except Exception as error:
        raise CampaignError(
            f'`trainer.data` = "hf:{name}" cannot be loaded ({error!s:.200}); give a dataset id or a local folder'
        ) from error
    rows = loaded["train"] if isinstance(loaded, DatasetDict) and "train" in loaded else loaded
    if not isinstance(rows, Dataset):
        raise CampaignError(f'`trainer.data` = "hf:{name}" has no `train` split; save one under that name')
    texts = [column for column, feature in rows.features.items() if getattr(feature, "dtype", "") == "string"]
    if not texts:
        raise CampaignError(f'`trainer.data` = "hf:{name}" has no text column; its columns: {list(rows.features)}')
    column = "text" if "text" in texts else texts[0]

    def row(index: int) -> bytes:
        return str(rows[index][column]).encode()

    return [Document(str(index), lambda index=index: row(index)) for index in range(len(rows))]  # type: ignore[misc]


def open_corpus(data: str, tokenizer: str, *, folder: Path, cache_dir: Path) -> Corpus:
    """Return the tokenized text, building its file under a lock when nobody has.

    Raises:
        CampaignError: `data` or `tokenizer` cannot be met.
    """
    found = documents(data, folder)
    names = [[document.name, hashlib.sha256(document.read()).hexdigest()] for document in found]
    key = digest({"format": FORMAT, "tokenizer": tokenizer, "documents": names})[:32]
    target = cache_dir / "tokens" / key
    if not (target / "meta.json").is_file():
        target.mkdir(parents=True, exist_ok=True)
        with _locked(target / "lock"):
            if not (target / "meta.json").is_file():
                _build(target, found, tokenizer)
    return _map(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(target: Path, found: Sequence[Document], spec: str) -> None:
    """Write ids, document starts and byte lengths; `meta.json` comes last, so that its presence means complete."""
    tokenizer = _make_tokenizer(found, spec)
    dtype = np.uint16 if tokenizer.vocab <= 2**16 else np.uint32
    starts: list[int] = []
    count = 0
    content = hashlib.sha256()
    partial = target / "tokens.part"  # one name under the lock, so that what a killed process left is written over
    with partial.open("wb") as handle:
        for ids in tokenizer.encode(document.read() for document in found):
            raw = ids.astype(dtype).tobytes()
            content.update(raw)
            handle.write(raw)
            starts.append(count)
            count += len(ids)
    lengths = tokenizer.lengths
    content.update(lengths.tobytes())
    np.save(target / "starts.npy", np.array(starts, dtype=np.int64))
    np.save(target / "lengths.npy", lengths)
    partial.replace(target / "tokens.bin")
    meta = {"dtype": np.dtype(dtype).name, "count": count, "vocab": tokenizer.vocab, "sha256": content.hexdigest()}
    draft = target / "meta.part"
    draft.write_text(json.dumps(meta))
    draft.replace(target / "meta.json")


def _make_tokenizer(found: Sequence[Document], spec: str) -> TextTokenizer:
    from overnight.trainer.tokenizers import BpeTokenizer, ByteTokenizer

    if spec == "byte":
        return ByteTokenizer()
    if spec == "gpt2":
        return BpeTokenizer.gpt2()
    return BpeTokenizer.train(_first_share(found), int(spec.removeprefix("bpe:")))


def _first_share(found: Sequence[Document]) -> Iterable[bytes]:
    texts = [document.read() for document in found]
    total = sum(len(text) for text in texts)
    before = itertools.accumulate((len(text) for text in texts), initial=0)
    return [text for text, seen in zip(texts, before, strict=False) if seen < BPE_TRAIN_SHARE * total]


def _map(target: Path) -> Corpus:
    meta = json.loads((target / "meta.json").read_text())
    return Corpus(
        tokens=np.memmap(target / "tokens.bin", dtype=meta["dtype"], mode="r", shape=(meta["count"],)),
        starts=np.load(target / "starts.npy"),
        lengths=np.load(target / "lengths.npy"),
        vocab=meta["vocab"],
        content_hash=meta["sha256"],
    )


def split(count: int, starts: NDArray[np.int64], val_tokens: int) -> Shards:
    """Cut `count` tokens into training, validation and holdout, at a document's start where one is near.

    Validation and holdout each get `val_tokens` targets (one token more, for context) and at most a quarter more than
    that, to begin with a document; training keeps at least half.

    Raises:
        CampaignError: there are too few tokens.
    """
    need = val_tokens + 1
    if count < 5 * need:
        raise CampaignError(
            f"`trainer.val_tokens` = {val_tokens} is too much for the {count} tokens of `trainer.data`: validation and "
            f"holdout each take that many and training keeps half; lower `val_tokens` to {max(count // 5 - 1, 1)} or "
            "name more text"
        )
    holdout = _near_start(count - need, starts, need)
    val = _near_start(holdout - need, starts, need)
    return Shards(Shard(0, val), Shard(val, holdout), Shard(holdout, count))


def _near_start(cut: int, starts: NDArray[np.int64], need: int) -> int:
    before = int(starts[np.searchsorted(starts, cut, side="right") - 1])
    return before if cut - before <= need // 4 else cut


class BatchStream:
    """Windows of the training shard at random places, a pure function of the seed.

    Sequence `i` of the stream starts at the same fraction of the shard whatever `batch_size` and `seq_len` are, so
    that two configurations on one seed see nearly the same text.
    """

    def __init__(self, tokens: Tokens, shard: Shard, *, seed: int, batch_size: int, seq_len: int) -> None:
        self._tokens = tokens
        self._start = shard.start
        self._room = shard.size - seq_len
        self._batch_size = batch_size
        self._window = np.arange(seq_len + 1)
        self._random = np.random.default_rng([seed, 1])

    def next(self) -> NDArray[np.int64]:
        """Return the next batch as (batch_size, seq_len + 1) ids: inputs and, one to the right, targets."""
        offsets = self._start + (self._random.random(self._batch_size) * self._room).astype(np.int64)
        return np.asarray(self._tokens[offsets[:, None] + self._window], dtype=np.int64)


def windows(tokens: Tokens, shard: Shard, *, targets: int, seq_len: int) -> NDArray[np.int64]:
    """Return a shard's first `targets` predictions as (n, seq_len + 1) ids; unused targets of the last row are -1.

    Rows overlap by one token, so that each target is predicted exactly once whatever `seq_len` is.
    """
    rows = -(-targets // seq_len)
    padded = np.full(rows * seq_len + 1, -1, dtype=np.int64)
    padded[: targets + 1] = tokens[shard.start : shard.start + targets + 1]
    return np.lib.stride_tricks.sliding_window_view(padded, seq_len + 1)[::seq_len].copy()
