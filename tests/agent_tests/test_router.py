"""Promotion, its gate, probation and the way back, each decided from plain records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.agent.evidence import share, weigh
from overnight.agent.race_gate import NOT_BESIDE, gate_on
from overnight.agent.router import (
    HELDOUT_ITEMS,
    PROBATION_TURNS,
    Gate,
    HeldOutAnswer,
    Look,
    check_gate,
    keeps_place,
    look,
    probation_turn,
    route_challenger,
    route_heldout,
    route_predecessor,
    why_not,
)
from overnight.store.contests import RaceItem

OPEN = Gate(())
SHUT = Gate(("collapse: 100% of its answers are `lr=0.001`, at most 50% may be",))
ENOUGH = weigh([0.5] * 40, share(0.05, 1))
TOO_FEW = weigh([0.5] * 4, share(0.05, 1))
NONE = weigh([], share(0.05, 1))


def _answers(values: list[int], *, valid: int | None = None, latency: float | None = 0.1) -> list[HeldOutAnswer]:
    passing = len(values) if valid is None else valid
    return [HeldOutAnswer(("n_layer", value), place < passing, latency) for place, value in enumerate(values)]


VARIED = look(_answers(list(range(20))))


def _failures(challenger: Look | None, champion: Look | None = VARIED) -> tuple[str, ...]:
    return check_gate(challenger, champion, max_latency_s=5.0).failures


def test_a_look_sums_up_answers() -> None:
    answers = [*_answers([1, 1, 2, 3]), HeldOutAnswer(None, False, 9.0)]
    found = look(answers)
    assert (found.items, found.valid, found.distinct, found.mode) == (5, 4, 3, ("n_layer", 1))
    assert found.mode_share == 0.5
    assert found.entropy == pytest.approx(1.0397, abs=1e-4)
    assert found.latency_p95_s == 9.0


def test_the_gate_holds_for_varied_valid_quick_answers() -> None:
    assert check_gate(VARIED, VARIED, max_latency_s=5.0).holds


def test_one_invalid_answer_in_twenty_fails_the_gate() -> None:
    assert _failures(look(_answers(list(range(20)), valid=19))) == (
        "validity: 19 of 20 held-out answers pass the rails, 99% are needed",
    )


def test_slow_answers_fail_the_gate() -> None:
    slow = _answers(list(range(18))) + _answers([18, 19], latency=6.0)
    assert [why.split(":")[0] for why in _failures(look(slow))] == ["latency"]
    assert _failures(look(_answers(list(range(20)), latency=None)))[0].startswith("latency")


def test_one_answer_whatever_the_prompt_is_a_collapse() -> None:
    failures = _failures(look(_answers([768] * 20)))
    assert failures[0] == "collapse: 100% of its answers are `n_layer=768`, at most 50% may be"
    assert all(why.startswith("collapse") for why in failures)
    assert len(failures) == 3


def test_one_answer_is_a_collapse_even_beside_a_collapsed_champion() -> None:
    collapsed = look(_answers([768] * 20))
    assert any("at most 90% may be" in why for why in _failures(collapsed, collapsed))


def test_few_distinct_answers_fail_the_gate() -> None:
    few = look(_answers([1, 2, 3, 4] * 5))
    assert any("4 distinct answers" in why and "at least 10" in why for why in _failures(few))


def test_low_entropy_fails_the_gate() -> None:
    """Ten distinct answers are enough, but nearly all of the weight is on two of them."""
    champion = replace(VARIED, distinct=10)
    uneven = look(_answers([1] * 10 + [2] * 10 + [3]))
    assert any("entropy" in why for why in _failures(replace(uneven, distinct=10), champion))


def test_a_champion_with_a_favourite_answer_excuses_one_as_frequent() -> None:
    champion = look(_answers([1] * 12 + list(range(2, 10))))
    assert _failures(look(_answers([5] * 12 + list(range(20, 28)))), champion) == ()
    assert _failures(look(_answers([5] * 13 + list(range(20, 27)))), champion)


@pytest.mark.parametrize("unseen", [None, look([])])
def test_without_held_out_answers_the_gate_does_not_hold(unseen: Look | None) -> None:
    assert _failures(unseen) == ("not looked back at: no held-out items were answered",)


def test_a_champion_that_could_not_answer_leaves_nothing_to_compare_with() -> None:
    gate = check_gate(VARIED, look([]), max_latency_s=5.0)
    words = "too few to compare with: the champion answered none of the challenger's 20 prompts, 3 are needed"
    assert (gate.failures, gate.wants) == ((words,), "champion")
    collapsed = check_gate(look(_answers([1] * 20)), None, max_latency_s=5.0)
    assert (collapsed.failures[0].split(":")[0], collapsed.wants) == ("collapse", None)


def _items(who: int, answers: list[int | None], *, valid: int = 99, latency: float = 0.1) -> list[RaceItem]:
    """Return a contestant's items for turns 1, 2, ...: the value that it named, or None where it gave no answer."""
    plain: dict[str, Any] = dict.fromkeys(RaceItem.__slots__)
    return [
        RaceItem(**plain | {"attempt_id": turn, "proposer_id": who, "draw": 0, "source": "asked"} | (
            {"failure": "connection refused"} if value is None else
            {"knob": "n_layer", "new_value": str(value), "valid": turn <= valid, "latency_s": latency}
        ))
        for turn, value in enumerate(answers, 1)
    ]  # fmt: skip


CHAMPION, CHALLENGER = 1, 2
AWAY: list[int | None] = [None] * 10


def _gate(challenger: list[RaceItem], champion: list[int | None]) -> Gate:
    return gate_on([*challenger, *_items(CHAMPION, champion)], CHALLENGER, CHAMPION, max_latency_s=5.0)


@pytest.mark.parametrize(
    ("challenger", "word"),
    [
        (_items(CHALLENGER, [1] * 10), "collapse"),
        (_items(CHALLENGER, list(range(10)), valid=9), "validity"),
        (_items(CHALLENGER, list(range(10)), latency=9.0), "latency"),
    ],
)
@pytest.mark.parametrize("answered", [1, 3])
def test_all_answers_of_a_challenger_count_whatever_the_champion_answered(
    challenger: list[RaceItem], word: str, answered: int
) -> None:
    gate = _gate(challenger, [*range(answered), *AWAY[answered:]])
    assert gate.failures[0].startswith(word)
    assert gate.wants is None


@pytest.mark.parametrize(
    ("challenger", "champion", "wants"),
    [
        ([5, 5, *AWAY[2:]], [*range(10)], None),
        ([5, 6, *AWAY[2:]], [*range(10)], "challenger"),
        ([*range(10)], [1, 2, *AWAY[2:]], "champion"),
        ([*range(10)], AWAY, "champion"),
        ([5], [1], "challenger"),
    ],
)
def test_too_few_answers_fail_the_gate(
    challenger: list[int | None], champion: list[int | None], wants: str | None
) -> None:
    gate = _gate(_items(CHALLENGER, challenger), champion)
    assert "too few" in gate.failures[-1]
    assert gate.wants == wants


@pytest.mark.parametrize("held_out", [2, 3, 4])
def test_a_small_holdout_is_enough_where_all_of_it_is_answered(held_out: int) -> None:
    assert _gate(_items(CHALLENGER, [*range(held_out)]), [*range(held_out)]).holds
    assert not _gate(_items(CHALLENGER, [7] * held_out), [*range(held_out)]).holds


def test_what_compares_is_judged_over_prompts_that_both_answered() -> None:
    """Beside a champion with five different answers, two to the same prompts are too few, whatever came later."""
    (failure, *_) = _gate(_items(CHALLENGER, [1, 1, 1, 2, 2, 3, 4, 5, 6, 7]), [*range(5), *AWAY[5:]]).failures
    assert failure.startswith("collapse: 2 distinct answers over 5 prompts, the champion gives 5")


def test_a_race_against_another_champion_says_nothing_about_this_one() -> None:
    items = [*_items(CHALLENGER, [*range(10)]), *_items(CHAMPION, [*range(10)])]
    assert gate_on(items, CHALLENGER, 3, max_latency_s=5.0) == NOT_BESIDE
    assert gate_on([*items, *_items(3, AWAY)], CHALLENGER, 3, max_latency_s=5.0) != NOT_BESIDE


def test_promotion_takes_evidence_and_the_gate() -> None:
    assert route_challenger(ENOUGH, OPEN, ask=False).action == "promote"
    assert route_challenger(ENOUGH, OPEN, ask=True).action == "ask"
    for evidence, gate in ((ENOUGH, SHUT), (TOO_FEW, OPEN), (NONE, OPEN), (TOO_FEW, SHUT)):
        for ask in (True, False):
            assert route_challenger(evidence, gate, ask=ask).action == "stay"


def test_the_reason_against_a_collapsed_student_says_collapse() -> None:
    assert "collapse" in route_challenger(ENOUGH, SHUT, ask=False).reason


def test_why_no_promotion_yet_gives_evidence_threshold_duels_and_gate() -> None:
    words = why_not(TOO_FEW, OPEN)
    assert "e-value 2.47" in words
    assert "of 32.9 after 4 duels" in words
    assert f"about {TOO_FEW.needed} more at the present rate" in words
    assert words.endswith("the gate holds")
    assert "out of reach" in why_not(weigh([-0.5] * 4, 0.05), OPEN)
    assert why_not(NONE, SHUT).startswith("e-value 1 of 32.9 after 0 duels; the gate does not hold: collapse")


def test_probation_alternates_and_then_ends() -> None:
    turns = [probation_turn(since) for since in range(1, PROBATION_TURNS + 3)]
    assert turns[:4] == ["duel", "predecessor", "duel", "predecessor"]
    assert turns.count("duel") == turns.count("predecessor") == PROBATION_TURNS // 2
    assert turns[PROBATION_TURNS:] == ["champion", "champion"]
    with pytest.raises(ValueError, match="from 1"):
        probation_turn(0)


def test_the_reversed_test_brings_the_predecessor_back() -> None:
    back = route_predecessor(weigh([0.6] * 15, 0.05))
    assert back.action == "rollback"
    assert "the predecessor proposes better" in back.reason
    assert route_predecessor(weigh([-0.6] * 15, 0.05)).action == "stay"


def test_a_challenger_in_the_lead_keeps_its_place() -> None:
    assert keeps_place(weigh([0.4] * 6, 0.01))
    assert not keeps_place(NONE)
    assert not keeps_place(weigh([-0.4] * 6, 0.01))


@given(st.dictionaries(st.integers(0, 30), st.floats(-1, 1)), st.dictionaries(st.integers(0, 30), st.floats(-1, 1)))
def test_looking_back_pairs_items_and_promotes_on_their_mean(
    challenger: dict[int, float], champion: dict[int, float]
) -> None:
    both = challenger.keys() & champion.keys()
    route = route_heldout(challenger, champion, OPEN, ask=False)
    if len(both) < HELDOUT_ITEMS:
        assert route.action == "stay"
    else:
        better = sum(challenger[item] - champion[item] for item in both)
        if abs(better) > 1e-9:
            assert route.action == ("promote" if better > 0 else "stay")
    assert route_heldout(challenger, champion, SHUT, ask=False).action == "stay"
