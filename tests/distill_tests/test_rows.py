"""Training rows are plain data: what is written is read, and what teaches nothing is refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.distill.recipe import LoraRecipe
from overnight.distill.rows import Pair, Reply, TrainingRow, read_rows, rows_digest, write_rows

TEXT = st.text(max_size=20)
ROWS = st.builds(
    TrainingRow,
    id=TEXT,
    prompt=TEXT,
    replies=st.lists(st.builds(Reply, TEXT, st.floats(0, 9)), max_size=2).map(tuple),
    candidates=st.lists(TEXT, max_size=3).map(tuple),
    choice=st.lists(st.floats(0, 1), max_size=3).map(tuple),
    pairs=st.lists(st.builds(Pair, st.integers(0, 3), st.integers(0, 3), st.floats(0, 1)), max_size=2).map(tuple),
    epoch=st.none() | st.integers(0, 9),
)
GOOD = TrainingRow(id="turn 7", prompt="p", candidates=("a", "b"), choice=(0.25, 0.75))


@given(st.lists(ROWS, max_size=4))
def test_rows_come_back_as_they_were_written(rows):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(rows, file)
        assert list(read_rows(file)) == rows


@pytest.mark.parametrize(
    "wrong",
    [
        TrainingRow(id="turn 7", prompt="p"),
        TrainingRow(id="turn 7", prompt="p", replies=(Reply(""),)),
        TrainingRow(id="turn 7", prompt="p", replies=(Reply("a", weight=0.0),)),
        replace(GOOD, weight=0.0),
        replace(GOOD, choice=(1.0,)),
        replace(GOOD, choice=(0.5, 0.6)),
        replace(GOOD, choice=(-0.5, 1.5)),
        replace(GOOD, candidates=("a", "a")),
        replace(GOOD, candidates=("a", "")),
        replace(GOOD, pairs=(Pair(0, 2),)),
        replace(GOOD, pairs=(Pair(-1, 0),)),
    ],
)
def test_a_row_that_teaches_nothing_or_makes_no_sense_is_named(wrong):
    with pytest.raises(AssertionError, match="training row `turn 7`"):
        wrong.check()


def test_a_good_row_passes():
    GOOD.check()


@pytest.mark.parametrize("change", [{"weight": 2.0}, {"prompt": "q"}, {"epoch": 1}, {"choice": (0.75, 0.25)}])
def test_a_corpus_hash_is_of_every_field(change):
    assert rows_digest([GOOD]) != rows_digest([replace(GOOD, **change)])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("r", 0), ("epochs", 0), ("batch", 0), ("seed", -1), ("alpha", 0.0), ("learning_rate", -1e-4)],
        *[("dropout", 1.0), ("warmup", -0.1), ("weight_decay", -1.0), ("targets", ()), ("alpha", float("nan"))],
    ],
)
def test_a_recipe_outside_its_range_is_refused_by_key(key, value):
    with pytest.raises(ValueError, match=f"`{key}"):
        LoraRecipe(**{key: value})
