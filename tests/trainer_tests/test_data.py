"""Text, tokens, shards and batches of the GPT trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.store.errors import CampaignError
from overnight.trainer.data import BatchStream, Shard, documents, open_corpus, split, windows
from overnight.trainer.tokenizers import BpeTokenizer, ByteTokenizer

TEXTS = {
    "a.txt": "plain words, plain words, plain words again\n" * 20,
    "b.txt": "naïve café — 東京 😀\n" * 20,
    "c.txt": "def f(x):\n    return x + 1\n" * 20,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


class TestSources:
    def test_the_standard_library_comes_in_a_fixed_order_without_its_tests(self) -> None:
        names = [document.name for document in documents("stdlib", Path())]
        assert names == sorted(names)
        assert "json/decoder.py" in names
        assert not any("test" in name.split("/")[:-1] or "site-packages" in name for name in names)

    def test_a_glob_is_relative_to_the_campaign_and_sorted(self, folder: Path) -> None:
        assert [document.name for document in documents("*.txt", folder)] == ["a.txt", "b.txt", "c.txt"]

    def test_a_glob_that_matches_nothing_names_the_key_and_the_remedy(self, folder: Path) -> None:
        with pytest.raises(CampaignError, match=r"`trainer.data` = \"\*.md\" matches no file .* give a glob"):
            documents("*.md", folder)

    def test_a_local_dataset_folder_is_read_by_its_text_column(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"n": [1, 2], "text": ["one", "two"]}).save_to_disk(str(tmp_path / "rows"))
        assert [document.read() for document in documents("hf:rows", tmp_path)] == [b"one", b"two"]


class TestTokenFile:
    def test_bytes_come_back_as_they_were(self, folder: Path) -> None:
        corpus = open_corpus("*.txt", "byte", folder=folder, cache_dir=folder / "cache")
        text = bytes(corpus.tokens[corpus.tokens < 256].astype(np.uint8)).decode()
        assert text == "".join(TEXTS.values())

    def test_every_document_opens_with_a_separator_of_no_bytes(self, folder: Path) -> None:
        corpus = open_corpus("*.txt", "byte", folder=folder, cache_dir=folder / "cache")
        assert corpus.lengths[corpus.tokens[corpus.starts]].tolist() == [0, 0, 0]

    def test_a_bpes_lengths_add_up_to_the_texts_bytes(self, folder: Path) -> None:
        corpus = open_corpus("*.txt", "bpe:400", folder=folder, cache_dir=folder / "cache")
        assert int(corpus.lengths[corpus.tokens].sum()) == sum(len(text.encode()) for text in TEXTS.values())

    def test_a_second_campaign_builds_nothing(self, folder: Path) -> None:
        first = open_corpus("*.txt", "byte", folder=folder, cache_dir=folder / "cache")
        (target,) = (folder / "cache" / "tokens").iterdir()
        built = (target / "tokens.bin").stat().st_mtime_ns
        assert (
            open_corpus("*.txt", "byte", folder=folder, cache_dir=folder / "cache").content_hash == first.content_hash
        )
        assert (target / "tokens.bin").stat().st_mtime_ns == built

    def test_an_edited_text_never_meets_the_old_file(self, folder: Path) -> None:
        before = open_corpus("*.txt", "byte", folder=folder, cache_dir=folder / "cache").content_hash
        (folder / "a.txt").write_text("other words")
        assert open_corpus("*.txt", "byte", folder=folder, cache_dir=folder / "cache").content_hash != before

    def test_an_interrupted_build_is_done_again(self, folder: Path) -> None:
        whole = np.array(open_corpus("*.txt", "byte", folder=folder, cache_dir=folder / "cache").tokens)
        (target,) = (folder / "cache" / "tokens").iterdir()
        (target / "meta.json").unlink()
        (target / "tokens.bin").write_bytes(b"half")
        assert np.array_equal(open_corpus("*.txt", "byte", folder=folder, cache_dir=folder / "cache").tokens, whole)

    def test_two_processes_at_once_agree(self, folder: Path) -> None:
        code = (
            "import sys, pathlib; from overnight.trainer.data import open_corpus; f = pathlib.Path(sys.argv[1]);"
            "print(open_corpus('*.txt', 'byte', folder=f, cache_dir=f / 'cache').content_hash)"
        )
        command = [sys.executable, "-c", code, str(folder)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") for _ in range(2)]
        first, second = (process.communicate(timeout=60)[0] for process in running)
        assert len(first) == 65
        assert first == second

    def test_the_meta_file_says_what_the_tokens_are(self, folder: Path) -> None:
        corpus = open_corpus("*.txt", "byte", folder=folder, cache_dir=folder / "cache")
        (meta,) = (folder / "cache" / "tokens").glob("*/meta.json")
        assert json.loads(meta.read_text())["count"] == len(corpus.tokens)


class TestTokenizers:
    @given(st.binary(max_size=200))
    def test_the_byte_tokenizer_loses_nothing(self, text: bytes) -> None:
        (ids,) = ByteTokenizer().encode([text])
        assert bytes(ids[1:].astype(np.uint8)) == text

    def test_training_twice_gives_the_same_vocabulary(self) -> None:
        texts = [text.encode() for text in TEXTS.values()]
        first, second = (BpeTokenizer.train(texts, 350) for _ in range(2))
        assert [ids.tolist() for ids in first.encode(texts)] == [ids.tolist() for ids in second.encode(texts)]

    @given(st.text(max_size=100))
    def test_a_tokens_length_is_its_bytes(self, text: str) -> None:
        tokenizer = BpeTokenizer.train([b"the the then there\n" * 5], 300)
        (ids,) = tokenizer.encode([text.encode("utf-8", "replace")])
        assert int(tokenizer.lengths[ids].sum()) == len(text.encode("utf-8", "replace"))


class TestShards:
    @given(
        st.lists(st.integers(1, 400), min_size=1, max_size=40),
        st.integers(1, 200),
    )
    def test_shards_are_disjoint_ordered_and_large_enough(self, sizes: list[int], val_tokens: int) -> None:
        count = sum(sizes)
        starts = np.cumsum([0, *sizes[:-1]])
        if count < 5 * (val_tokens + 1):
            with pytest.raises(CampaignError, match=r"`trainer.val_tokens`"):
                split(count, starts, val_tokens)
            return
        shards = split(count, starts, val_tokens)
        assert (shards.train.start, shards.holdout.end) == (0, count)
        assert shards.train.end == shards.val.start
        assert shards.val.end == shards.holdout.start
        assert min(shards.val.size, shards.holdout.size) > val_tokens
        assert shards.train.size >= count / 2 - 1

    def test_a_shard_begins_with_a_document_where_one_is_near(self) -> None:
        shards = split(1000, np.array([0, 780, 890]), 100)
        assert (shards.val.start, shards.holdout.start) == (780, 890)


class TestBatches:
    TOKENS = np.arange(5000, dtype=np.uint16)

    def stream(self, *, seed: int = 0, batch_size: int = 4, seq_len: int = 16) -> BatchStream:
        return BatchStream(self.TOKENS, Shard(100, 3000), seed=seed, batch_size=batch_size, seq_len=seq_len)

    def test_the_same_seed_gives_the_same_order(self) -> None:
        first, second = self.stream(), self.stream()
        assert all(np.array_equal(first.next(), second.next()) for _ in range(5))

    def test_another_seed_gives_another_order(self) -> None:
        assert not np.array_equal(self.stream().next(), self.stream(seed=1).next())

    def test_batches_stay_in_their_shard(self) -> None:
        stream = self.stream()
        seen = np.concatenate([stream.next().ravel() for _ in range(200)])
        assert seen.min() >= 100
        assert seen.max() < 3000

    def test_a_smaller_batch_sees_the_same_sequences(self) -> None:
        large, small = self.stream(batch_size=4), self.stream(batch_size=2)
        assert np.array_equal(large.next(), np.concatenate([small.next(), small.next()]))

    @given(st.integers(1, 60), st.integers(1, 500))
    def test_validation_predicts_the_same_tokens_once_whatever_the_length(self, seq_len: int, targets: int) -> None:
        table = windows(self.TOKENS, Shard(1000, 2000), targets=targets, seq_len=seq_len)
        predicted = table[:, 1:].ravel()
        assert predicted[predicted >= 0].tolist() == list(range(1001, 1001 + targets))
