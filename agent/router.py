"""Who proposes next: promotion, probation, rollback, and why not yet. Pure decisions over plain records.

The caller reads the records from the store and writes what is decided. Nothing here opens a store, asks a model or
draws at random, so that a resumed campaign decides what an undisturbed one would.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from overnight.agent.evidence import Evidence
from overnight.store.contests import Promotion
from overnight.store.records import KnobValue

MIN_VALIDITY = 0.99
"""Share of a challenger's held-out answers that must pass the rails."""
DISTINCT_SHARE = 0.5
"""A challenger names at least this share of the champion's distinct (knob, value) pairs over the same prompts."""
ENTROPY_SHARE = 0.5
"""The entropy of its answers is at least this share of the champion's."""
MODE_CAP = 0.5
"""Its most frequent answer makes at most this share of its answers, or the champion's own share where that is more,"""
MODE_CAP_MOST = 0.9
"""but never more than this: one answer whatever the prompt is a collapse whoever else collapsed."""
PROBATION_TURNS = 40
"""Turns after a promotion during which the promoted student alternates with its predecessor."""
LEAD = 1.5
"""An e-value from which a challenger is in the lead: it keeps its place when a newer version is trained."""
MIN_ITEMS = 3
"""Held-out turns that a challenger must have answered, and the champion beside it, for a gate to hold. Where fewer are
held out on purpose, all of them, and never less than two: one answer cannot show a collapse."""
HELDOUT_ITEMS = 5
"""Held-out items with both picks measured that `evidence = "heldout"` asks for."""


@dataclass(frozen=True, slots=True)
class HeldOutAnswer:
    """One contestant's first answer (draw 0) to one held-out prompt."""

    pair: tuple[str, KnobValue] | None
    """(knob, new value); None when the answer was not even a proposal."""
    valid: bool
    """Whether it passed the rails of that moment."""
    latency_s: float | None


@dataclass(frozen=True, slots=True)
class Look:
    """What looking back showed about one contestant, over the prompts that it answered."""

    items: int
    valid: int
    latency_p95_s: float | None
    distinct: int
    """Distinct (knob, value) pairs."""
    entropy: float
    """Of the pairs, in nats."""
    mode_share: float
    """Share of the most frequent pair; 0 without pairs."""
    mode: tuple[str, KnobValue] | None

    @property
    def validity(self) -> float:
        """Share of the answers that passed the rails."""
        return self.valid / self.items if self.items else 0.0


def look(answers: Sequence[HeldOutAnswer]) -> Look:
    """Sum up a contestant's held-out answers; leave out prompts that an endpoint was down for (missing, not lost)."""
    counts = Counter(answer.pair for answer in answers if answer.pair is not None)
    total = sum(counts.values())
    mode, top = counts.most_common(1)[0] if counts else (None, 0)
    latencies = sorted(answer.latency_s for answer in answers if answer.latency_s is not None)
    return Look(
        items=len(answers),
        valid=sum(answer.valid for answer in answers),
        latency_p95_s=latencies[math.ceil(0.95 * len(latencies)) - 1] if latencies else None,
        distinct=len(counts),
        entropy=-sum(n / total * math.log(n / total) for n in counts.values()) if total else 0.0,
        mode_share=top / total if total else 0.0,
        mode=mode,
    )


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether looking back allows a promotion, and if not, each reason in words."""

    failures: tuple[str, ...]
    wants: Literal["challenger", "champion"] | None = None
    """Whose answers are too few, where nothing else stands against a promotion: another look may bring them."""

    @property
    def holds(self) -> bool:
        """Whether nothing stands against a promotion."""
        return not self.failures


def check_gate(
    challenger: Look | None,
    champion: Look | None,
    *,
    max_latency_s: float,
    beside: Look | None = None,
    held_out: int = MIN_ITEMS,
) -> Gate:
    """Check a challenger's held-out answers, and compare them with the champion's to the same prompts.

    Args:
        challenger: all its answers; None, or no items, when it was not looked back at: the gate does not hold.
        champion: its answers to prompts that both answered; None, or too few items, when it could not answer: the gate
            does not hold, and only what no champion could excuse is judged.
        max_latency_s: `[router] max_latency_s`.
        beside: the challenger's answers to the champion's prompts; None: it answered no others.
        held_out: how many turns are held out; less than `MIN_ITEMS` of them are enough where there are no more.
    """
    if challenger is None or challenger.items == 0:
        return Gate(("not looked back at: no held-out items were answered",), wants="challenger")
    needed = max(2, min(MIN_ITEMS, held_out))
    common = 0 if champion is None else champion.items
    if common < needed:
        champion = None
    failures = []
    if challenger.validity < MIN_VALIDITY:
        failures.append(
            f"validity: {challenger.valid} of {challenger.items} held-out answers pass the rails, "
            f"{MIN_VALIDITY:.0%} are needed"
        )
    if challenger.latency_p95_s is None or challenger.latency_p95_s > max_latency_s:
        took = "was not measured" if challenger.latency_p95_s is None else f"is {challenger.latency_p95_s:.2g} s"
        failures.append(f"latency: the 95th percentile {took}, `max_latency_s` is {max_latency_s:g} s")
    failures += _collapse(challenger, champion, beside or challenger)
    if challenger.items < needed:
        few = f"too few answers: {challenger.items} to {held_out} held-out turns, {needed} are needed"
        return Gate((*failures, few), wants=None if failures else "challenger")
    if champion is None:
        few = f"the champion answered {common or 'none'} of the challenger's {challenger.items} prompts"
        return Gate(
            (*failures, f"too few to compare with: {few}, {needed} are needed"), None if failures else "champion"
        )
    return Gate(tuple(failures))


def _collapse(challenger: Look, champion: Look | None, beside: Look) -> list[str]:
    """Judge the most frequent of all answers, and compare the variety of those to prompts that both answered."""
    cap = MODE_CAP_MOST if champion is None else min(max(MODE_CAP, champion.mode_share), MODE_CAP_MOST)
    failures = []
    if challenger.mode is not None and challenger.items > 1 and challenger.mode_share > cap:
        knob, value = challenger.mode
        failures.append(
            f"collapse: {challenger.mode_share:.0%} of its answers are `{knob}={value}`, at most {cap:.0%} may be"
        )
    if champion is None:
        return failures
    distinct, entropy = DISTINCT_SHARE * champion.distinct, ENTROPY_SHARE * champion.entropy
    if beside.distinct < distinct:
        failures.append(
            f"collapse: {beside.distinct} distinct answers over {beside.items} prompts, the champion gives "
            f"{champion.distinct}; at least {math.ceil(distinct)} are needed"
        )
    if beside.entropy < entropy:
        failures.append(
            f"collapse: the entropy of its answers is {beside.entropy:.2f} nats, the champion's "
            f"{champion.entropy:.2f}; at least {entropy:.2f} are needed"
        )
    return failures


@dataclass(frozen=True, slots=True)
class Route:
    """What to do about the champion, and why in words."""

    action: Literal["stay", "ask", "promote", "rollback"]
    reason: str


def route_challenger(evidence: Evidence, gate: Gate, *, ask: bool) -> Route:
    """Whether a challenger takes over on its duels; the reason is also the answer to "why no promotion yet".

    Args:
        evidence: `weigh(items, share(alpha, k))` of the k-th challenger's duels.
        gate: `check_gate` of its newest race.
        ask: `[router] ask`: a person is asked first.
    """
    if evidence.reached and gate.holds:
        reason = f"e-value {evidence.e_value:.3g} reaches {evidence.threshold:.3g} after {_duels(evidence)}"
        return Route("ask" if ask else "promote", reason)
    return Route("stay", why_not(evidence, gate))


def why_not(evidence: Evidence, gate: Gate) -> str:
    """Why there is no promotion yet: e-value, threshold, duels still needed, the gate's state."""
    if evidence.reached:
        words = f"e-value {evidence.e_value:.3g} reaches {evidence.threshold:.3g}"
    else:
        words = f"e-value {evidence.e_value:.3g} of {evidence.threshold:.3g} after {_duels(evidence)}"
        if evidence.duels:
            words += (
                ", out of reach at the present rate"
                if evidence.needed is None
                else f", about {evidence.needed} more at the present rate"
            )
    return words + ("; the gate holds" if gate.holds else "; the gate does not hold: " + "; ".join(gate.failures))


def _duels(evidence: Evidence) -> str:
    return f"{evidence.duels} duel{'' if evidence.duels == 1 else 's'}"


def route_heldout(challenger: Mapping[int, float], champion: Mapping[int, float], gate: Gate, *, ask: bool) -> Route:
    """`evidence = "heldout"`: promote on the looking-back score alone, as the first design had it.

    Args:
        challenger: expected gain of its picks by held-out attempt id, where they were measured.
        champion: the champion's; items that both have are paired.
        gate: as for duels.
        ask: a person is asked first.
    """
    both = sorted(challenger.keys() & champion.keys())
    if len(both) < HELDOUT_ITEMS:
        words = f"looking back: {len(both)} held-out items have both picks measured, {HELDOUT_ITEMS} are needed"
        return Route("stay", words)
    mean = math.fsum(challenger[item] - champion[item] for item in both) / len(both)
    words = f"looking back: mean expected gain {mean:+.3g} over the champion's on {len(both)} items"
    if not gate.holds:
        return Route("stay", words + "; the gate does not hold: " + "; ".join(gate.failures))
    if mean <= 0:
        return Route("stay", words)
    return Route("ask" if ask else "promote", words)


def reigns(switches: Sequence[Promotion]) -> list[Promotion]:
    """Return the promotions that were not rolled back, oldest first: the last one made the champion."""
    stack: list[Promotion] = []
    for switch in switches:
        if switch.kind == "promotion":
            stack.append(switch)
        elif stack:
            stack.pop()
    return stack


Turn = Literal["duel", "predecessor", "champion"]


def probation_turn(since: int) -> Turn:
    """Whose turn it is `since` turns after a promotion (1 is the first turn after it).

    Through `PROBATION_TURNS` the promoted student alternates with its predecessor: a duel between the two begins on the
    odd turns, the even ones are the predecessor's, as the duel's other side or alone. Later the turn is the champion's,
    and duels with the predecessor come at `explore`.
    """
    if since < 1:
        raise ValueError(f"turns after a promotion are counted from 1, got {since}")
    if since > PROBATION_TURNS:
        return "champion"
    return "duel" if since % 2 else "predecessor"


def route_predecessor(reversed_evidence: Evidence) -> Route:
    """Whether the predecessor of a promoted student comes back.

    Args:
        reversed_evidence: `weigh(items, alpha)` of all duels since the promotion, the predecessor as challenger.
    """
    e, threshold = reversed_evidence.e_value, reversed_evidence.threshold
    if reversed_evidence.reached:
        words = f"the predecessor proposes better: e-value {e:.3g} reaches {threshold:.3g}"
        return Route("rollback", f"{words} after {_duels(reversed_evidence)}")
    return Route("stay", f"reversed e-value {e:.3g} of {threshold:.3g} after {_duels(reversed_evidence)}")


def keeps_place(evidence: Evidence) -> bool:
    """Whether a challenger goes on duelling although a newer version has been trained.

    A newer version starts from no evidence with a smaller share of alpha, and 25 turns bring about five duels, too few
    for any test that holds its level; so a challenger in the lead keeps its place until it is promoted or falls back,
    and versions that never duelled are not counted in `share`. When to replace it depends on past duels alone, so each
    e-process stays valid (benchmarks/promotion.md has what this gains).
    """
    return evidence.e_value >= LEAD
