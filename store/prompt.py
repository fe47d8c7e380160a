"""The one renderer of prompts: what a proposer is told, whoever it is, as text that is stored byte for byte.

First comes what never changes in a campaign (task, knobs, rules), so that scoring and training can reuse it; then the
brief, the current configuration, the summary of all history, and the last attempts. Text that a model or a trainer
wrote is quoted as JSON on one line and cut, so that it cannot forge a section. The history gets what the other parts
leave of `MAX_TOKENS`, by an estimate that counts every digit, as small vocabularies do; so the length does not grow
with history. It does not promise the bound for a menu whose own description fills it.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from overnight.store.protocol import Attempt, KnobTotal, PairTotal
from overnight.store.records import Config, Direction, GainKind, gain_text

MAX_TOKENS = 1_600
AIM_TOKENS = 1_520
"""What the estimate is held to: it falls short of real vocabularies by up to 3%."""
MIN_LINEAGE_TOKENS = 150
MAX_BRIEF_CHARS = 500
MAX_QUOTE_CHARS = 48
LETTERS_A_TOKEN = 6
_HISTORY = "# History\n"
_PIECES = re.compile(r"[A-Za-z]+|[^\sA-Za-z]")


@dataclass(frozen=True, slots=True)
class KnobFact:
    """A knob as the prompt shows it."""

    name: str
    values: str
    doc: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFacts:
    """Everything a prompt says."""

    metric: str
    direction: Direction
    gain: GainKind
    min_gain: float
    knobs: Sequence[KnobFact]
    rules: Sequence[str]
    brief: str
    config: Config
    baseline_metric: float | None
    turns: int
    totals: Sequence[KnobTotal]
    gain_sd: float | None
    """Standard deviation of one paired gain; None where it is not known yet."""
    recent: Sequence[Attempt]
    """Newest first."""
    lineage: bool


def render_prompt(facts: PromptFacts) -> str:
    """Return the prompt for one turn."""
    return render_constant(facts) + render_variable(facts)


def render_constant(facts: PromptFacts) -> str:
    """Return the part that is the same in every prompt of a campaign."""
    better = "lower" if facts.direction == "min" else "higher"
    threshold = f"{facts.min_gain:.2%}" if facts.gain == "relative" else f"{facts.min_gain:g}"
    knobs = "\n".join(f"- {k.name}: {k.values}" + (f" ({k.doc})" if k.doc else "") for k in facts.knobs)
    rules = "\n".join(f"- {rule}" for rule in facts.rules)
    return f"""# Task
You tune a short training run. Propose ONE change of ONE knob of the current configuration.
Your change is measured, and kept if `{facts.metric}` ({better} is better) improves by {threshold} or more.
Answer with one JSON object and nothing else:
{{"knob": "<name>", "new_value": <value>, "reason": "<why, in one short sentence>"}}

# Knobs
{knobs}

# Rules
- Change exactly one knob, to a value that it takes.
- Do not repeat a configuration that was measured: look at the history.
{rules}
"""


def render_variable(facts: PromptFacts) -> str:
    """Return the part that changes from turn to turn."""
    before, after = [], []
    if facts.brief:
        before.append("# Brief\n" + _brief(facts.brief))
    measured = "" if facts.baseline_metric is None else f"\nIts {facts.metric} is {facts.baseline_metric:.5g}."
    before.append(f"# Current configuration\n{json.dumps(dict(facts.config))}{measured}")
    if facts.recent:
        lines = [_attempt_line(attempt, facts) for attempt in facts.recent]
        after.append("# Last attempts, newest first\n" + "\n".join(lines))
    lineage = []
    if facts.lineage:
        taken = estimate_tokens(render_constant(facts)) + sum(map(estimate_tokens, before + after))
        lineage.append(_HISTORY + _lineage(facts, max(AIM_TOKENS - taken, MIN_LINEAGE_TOKENS)))
    return "\n" + "\n\n".join(before + lineage + after) + "\n"


def shuffle_history(prompt: str, rng: random.Random) -> str:
    """Return a rendered prompt with the knobs of its history in another order: it says the same.

    No other text can begin a line as the section does: the brief is quoted, and what models wrote is within a line.
    """
    before, mark, rest = prompt.partition("\n" + _HISTORY)
    section, gap, after = rest.partition("\n\n")
    header, *lines = section.rstrip("\n").split("\n")
    is_knob = [not line.startswith(("- never tried: ", "(")) for line in lines]
    knobs = [line for line, of_knob in zip(lines, is_knob, strict=True) if of_knob]
    rng.shuffle(knobs)
    notes = [line for line, of_knob in zip(lines, is_knob, strict=True) if not of_knob]
    end = "\n" if section.endswith("\n") else ""
    return before + mark + "\n".join([header, *knobs, *notes]) + end + gap + after


def estimate_tokens(text: str) -> int:
    """Return about how many tokens a small vocabulary makes of `text`: each digit and sign one, long words several."""
    return sum(1 + (len(piece) - 1) // LETTERS_A_TOKEN for piece in _PIECES.findall(text)) + text.count("\n")


def quote(text: str, limit: int = MAX_QUOTE_CHARS) -> str:
    """Return untrusted text as one line of JSON, cut to `limit` characters."""
    flat = " ".join(text.split())
    return json.dumps(flat if len(flat) <= limit else flat[: limit - 1] + "…", ensure_ascii=False)


def _brief(brief: str) -> str:
    text = brief.strip()
    cut = text if len(text) <= MAX_BRIEF_CHARS else text[: MAX_BRIEF_CHARS - 1] + "…"
    return "\n".join(f"> {line}".rstrip() for line in cut.splitlines())


def _lineage(facts: PromptFacts, room: int) -> str:
    by_knob = {total.knob: total for total in facts.totals}
    tried = [by_knob[knob.name] for knob in facts.knobs if knob.name in by_knob]
    if not tried:
        return "Nothing was tried yet."
    kept = sum(total.kept for total in tried)
    unit = " in %" if facts.gain == "relative" else ""
    error = " ± standard error" if facts.gain_sd is not None else ""
    header = f"{facts.turns} turns, {kept} kept. Of each value tried: mean gain{unit}{error}, xTRIALS"
    untouched = [knob.name for knob in facts.knobs if knob.name not in by_knob]
    footer = ["- never tried: " + ", ".join(untouched)] if untouched else []
    lines, dropped = _fit(tried, facts, room - estimate_tokens("\n".join([header, *footer])) - 10)
    if dropped:
        lines.append(f"({dropped} less informative values left out)")
    return "\n".join([header, *lines, *footer])


def _merged(totals: Iterable[PairTotal]) -> list[PairTotal]:
    """Put numbers that agree to two significant digits together, in the order of the best of each group."""
    groups: dict[str, list[PairTotal]] = {}
    for total in totals:
        groups.setdefault(_short(total.new_value), []).append(total)
    return [_sum(label, group) for label, group in groups.items()]


def _short(value: str) -> str:
    try:
        number = float(value)
    except ValueError:
        return value
    return value if number.is_integer() and abs(number) < 1e6 else f"{number:.2g}"


def _sum(label: str, group: Sequence[PairTotal]) -> PairTotal:
    failures = [total.last_failure for total in group if total.last_failure]
    trials = sum(total.trials for total in group)
    weighted = math.fsum(total.mean_gain * total.trials for total in group if total.mean_gain is not None)
    return PairTotal(
        knob=group[0].knob,
        new_value=label,
        proposed=sum(total.proposed for total in group),
        kept=sum(total.kept for total in group),
        reverted=sum(total.reverted for total in group),
        blocked=sum(total.blocked for total in group),
        failed=sum(total.failed for total in group),
        trials=trials,
        mean_gain=weighted / trials if trials else None,
        last_failure=failures[-1] if failures else None,
    )


def _fit(tried: Sequence[KnobTotal], facts: PromptFacts, room: int) -> tuple[list[str], int]:
    """Render each knob's most informative values in its share of the room, in estimated tokens.

    Returns the lines, and how many values were left out.
    """
    lines, dropped = [], 0
    for left, knob in zip(range(len(tried), 0, -1), tried, strict=True):
        head = f"- {knob.knob} {knob.proposed}x: "
        merged = _merged(knob.values)
        chosen: list[PairTotal] = []
        share = room // left - estimate_tokens(head)
        for total in merged:
            share -= estimate_tokens(_value(total, facts)) + 1
            if share < 0:
                break
            chosen.append(total)
        dropped += knob.distinct_values - len(knob.values) + len(merged) - len(chosen)
        line = head + "; ".join(_value(total, facts) for total in sorted(chosen, key=_by_value))
        room -= estimate_tokens(line) + 1
        lines.append(line.rstrip())
    return lines, dropped


def _by_value(total: PairTotal) -> tuple[float, str]:
    try:
        return (float(total.new_value), "")
    except ValueError:
        return (0.0, total.new_value)


def _value(total: PairTotal, facts: PromptFacts) -> str:
    words = [total.new_value]
    if total.mean_gain is not None:
        percent = 100 if facts.gain == "relative" else 1
        gain = f"{total.mean_gain * percent:+.2g}"
        if facts.gain_sd is not None:
            gain += f"±{facts.gain_sd * percent / total.trials**0.5:.1g}"
        words.append(f"{gain} x{total.trials}")
    if total.failed:
        words.append(f"failed {total.last_failure or ''}".strip() + (f" {total.failed}x" if total.failed > 1 else ""))
    elif total.blocked and total.mean_gain is None:
        words.append("blocked")
    if total.kept:
        words.append("kept")
    return " ".join(words)


def _attempt_line(attempt: Attempt, facts: PromptFacts) -> str:
    what = f"{attempt.knob} = {attempt.new_value}" if attempt.knob else "no valid proposal"
    came: list[str] = [attempt.outcome or "open"]
    if attempt.gain is not None:
        came.append(gain_text(attempt.gain, facts.gain))
    elif attempt.failure:
        came.append(attempt.failure)
    elif attempt.rail:
        came.append(attempt.rail)
    line = f"- turn {attempt.iteration}: {what}: {' '.join(came)}"
    if attempt.reason:
        line += f"; reason {quote(attempt.reason)}"
    if attempt.notes:
        line += f"; notes {quote(attempt.notes)}"
    return line
