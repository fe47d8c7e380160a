"""What the worker says is checked: anything but a well-formed answer is a WireError, and nothing else is raised."""

import json
import math
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.store.records import TrainerInfo, TrialProgress, TrialResult
from overnight.trainer.output import TRACE_CHARS, Tail, clean, cut, last_lines
from overnight.trainer.wire import (
    ErrorFrame,
    Frame,
    Inbox,
    InfoFrame,
    ProgressFrame,
    ResultFrame,
    ValueFrame,
    WireError,
    pack_frame,
    unpack,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
RESULT = {"metric": 1.0, "failure": None}


@pytest.mark.parametrize(
    "frame",
    [
        ProgressFrame(call=1, progress=TrialProgress(1, None, 2.5)),
        ResultFrame(call=2, result=TrialResult(1.25, metrics={"speed": 2.0}, steps=60, notes="fine")),
        ResultFrame(call=2, result=TrialResult(None, "oom", "no more")),
        InfoFrame(call=3, info=TrainerInfo("t", "m", "0" * 64, {"device": "cpu"}, True, {"steps": 60.0})),
        ValueFrame(call=4, value=1 << 40),
        ErrorFrame(call=5, error="TrainerError", message="no device", trace="..."),
    ],
)
def test_every_answer_arrives_as_it_was_sent(frame: Frame) -> None:
    assert unpack(pack_frame(frame)[4:]) == frame


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_else_is_said_is_a_wire_error(body: bytes) -> None:
    with pytest.raises(WireError):
        unpack(body)


@given(st.sampled_from(sorted(TrialResult.__dataclass_fields__)), JSON)
def test_a_result_with_any_field_replaced_is_refused_or_fit_to_store(field: str, value: object) -> None:
    try:
        frame = unpack(json.dumps({"kind": "result", "call": 1, "result": {**RESULT, field: value}}).encode())
    except WireError:
        return
    assert isinstance(frame, ResultFrame)
    result = frame.result
    assert (result.metric is None) == (result.failure is not None)
    numbers = [result.metric, result.wall_s, result.train_s, result.val_s, result.peak_memory_gib, result.energy_j]
    assert all(number is None or math.isfinite(number) for number in [*numbers, *result.metrics.values()])
    assert "\x00" not in result.trace + result.mode + result.notes


@pytest.mark.parametrize(
    "result",
    [
        {"metric": "1.0", "failure": None},
        {"metric": True, "failure": None},
        {"metric": None, "failure": "tired"},
        {"metric": None, "failure": None},
        {"metric": 1.0, "failure": "nan"},
        {},
    ],
)
def test_a_result_that_contradicts_itself_is_refused(result: object) -> None:
    with pytest.raises(WireError):
        unpack(json.dumps({"kind": "result", "call": 1, "result": result}).encode())


def test_frames_arrive_whole_whatever_the_pieces() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        inbox = Inbox(ours)
        packed = pack_frame(ValueFrame(call=1, value="one")) + pack_frame(ValueFrame(call=2, value=None))
        bodies = []
        for byte in packed:
            theirs.sendall(bytes([byte]))
            inbox.fill()
            bodies += [body for body in [inbox.frame()] if body is not None]
        assert [unpack(body).call for body in bodies] == [1, 2]


@given(st.text(alphabet=st.characters(), max_size=300))
def test_clean_text_can_be_stored_and_shown(text: str) -> None:
    cleaned = clean(text)
    cleaned.encode("utf-8")
    assert all(character.isprintable() or character in "\n\t" for character in cleaned)


def test_notes_are_one_line_and_cut() -> None:
    assert cut("a\nb\r\nc  d") == "a b c d"
    assert cut("x" * 600) == "x" * 499 + "…"


@given(st.lists(st.binary(max_size=64), max_size=40))
def test_a_tail_is_the_end_of_all_that_was_added(chunks: list[bytes]) -> None:
    tail = Tail(limit=50)
    for chunk in chunks:
        tail.add(chunk)
    assert tail.text() == last_lines(b"".join(chunks)[-50:].decode("utf-8", "replace"))


def test_the_last_lines_begin_at_a_line() -> None:
    lines = last_lines("\n".join(f"line {n}" for n in range(10_000))).splitlines()
    assert lines[-1] == "line 9999"
    assert lines[0].startswith("line ")
    assert sum(map(len, lines)) <= TRACE_CHARS
