"""The one renderer of prompts: what a proposer is told, whoever it is, as text that is stored byte for byte.

First comes what never changes in a campaign (task, knobs, rules), so that scoring and training can reuse it; then the
brief, the current configuration, the summary of all history, and the last attempts. Text that a model or a trainer
wrote is quoted as JSON on one line and cut, so that it cannot forge a section. The brief and the last attempts have a
share of `MAX_TOKENS` each and the history gets what they leave, by an estimate that counts every digit and every byte
of what is not ASCII, as small vocabularies do; so the length grows with nothing. It does not promise the bound for a
menu whose own description fills it.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from overnight.store.protocol import Attempt, KnobTotal, PairTotal
from overnight.store.records import Config, Direction, FailureClass, GainKind, gain_text

MAX_TOKENS = 1_600
AIM_TOKENS = 1_580
"""What the parts are held to; what joins them comes on top."""
MIN_LINEAGE_TOKENS = 300
MIN_SHARE_TOKENS = 60
"""What the brief and the last attempts have at least, whatever the menu takes."""
MAX_BRIEF_TOKENS = 200
MAX_RECENT_TOKENS = 480
MAX_BRIEF_CHARS = 500
MAX_QUOTE_CHARS = 48
MAX_QUOTE_TOKENS = 32
MAX_LABEL_CHARS = 24
LETTERS_A_TOKEN = 6
MAX_WORD = 12
"""Letters of the longest run that is taken for a word of a language."""
LEFT_OUT_TOKENS = 16
"""What a line takes that says how much was left out."""
_HISTORY = "# History\n"
_PIECES = re.compile(r"[A-Z]?[a-z]+|[^\sa-z]", re.ASCII)
_VOWELS = re.compile(r"[aeiouy]", re.IGNORECASE)
_ONE_TOKEN = str.maketrans("…±", ".+")
"""Marks of ours that every vocabulary has, though they are not ASCII."""
_PLAIN = re.compile(r"[A-Za-z0-9_.+-]+")
_TEMPLATE_MARKS = re.compile(r"<(?=[^\s=])|\[(?=/?[A-Z])")
"""Where a chat template's marks begin: `<|im_end|>`, `<s>`, `<<SYS>>`, `[INST]`."""


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
    measured = "" if facts.baseline_metric is None else f"\nIts {facts.metric} is {facts.baseline_metric:.5g}."
    current = f"# Current configuration\n{json.dumps(dict(facts.config))}{measured}"
    room = AIM_TOKENS - estimate_tokens(render_constant(facts) + current)
    kept_free = max(MIN_LINEAGE_TOKENS, estimate_tokens(_lineage(facts, 0))) if facts.lineage else 0
    brief, lineage, recent = "", "", ""
    if facts.brief:
        brief = "# Brief\n" + _brief(facts.brief, _share(room - kept_free, MAX_BRIEF_TOKENS))
        room -= estimate_tokens(brief)
    if facts.recent:
        most = MAX_RECENT_TOKENS if facts.lineage else AIM_TOKENS
        recent = "# Last attempts, newest first\n" + _recent(facts, _share(room - kept_free, most))
        room -= estimate_tokens(recent)
    if facts.lineage:
        lineage = _HISTORY + _lineage(facts, max(room, kept_free))
    return "\n" + "\n\n".join(part for part in (brief, current, lineage, recent) if part) + "\n"


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
    """Return about how many tokens a small vocabulary makes of `text`.

    Each digit, sign and capital is one, long words are several, letters that make no word are one each, and what is not
    ASCII is one a byte of UTF-8.
    """
    text = text.translate(_ONE_TOKEN)
    bytes_more = len(text.encode("utf-8", "surrogatepass")) - len(text)
    return sum(map(_piece_tokens, _PIECES.findall(text))) + text.count("\n") + bytes_more


@lru_cache(maxsize=4096)
def _piece_tokens(piece: str) -> int:
    letters = len(piece)
    if letters > MAX_WORD or len(_VOWELS.findall(piece)) * 5 < letters:
        return letters
    return 1 + (letters - 1) // LETTERS_A_TOKEN


def quote(text: str, limit: int = MAX_QUOTE_CHARS) -> str:
    """Return untrusted text as one line of JSON, cut to `limit` characters and `MAX_QUOTE_TOKENS`.

    A space goes into whatever may be a mark of a chat template, so that no server reads it as one; what does not show
    is spelt out.
    """
    quoted = json.dumps(_cut(_without_marks(" ".join(text.split())), limit, MAX_QUOTE_TOKENS), ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in quoted)


def information(total: PairTotal) -> tuple[int, int, float, str]:
    """Return a key that sorts the most informative value first.

    What was kept comes first, then what was measured or failed most often; of those a failure, then the largest gain or
    loss.
    """
    gain = math.inf if total.mean_gain is None else abs(total.mean_gain)
    return -total.kept, -(total.trials + total.failed), -gain, total.new_value


def _share(room: int, most: int) -> int:
    return max(min(room, most), MIN_SHARE_TOKENS)


def _cut(text: str, chars: int, tokens: int) -> str:
    """Return text of at most `chars` characters and `tokens` estimated tokens; an ellipsis says that it was cut."""
    if len(text) <= chars and estimate_tokens(text) <= tokens:
        return text
    shown = text[: chars - 1]
    while shown and (over := estimate_tokens(shown) + 1 - tokens) > 0:
        shown = shown[: -max(over // 4, 1)]
    return shown.rstrip() + "…"


def _without_marks(text: str) -> str:
    return _TEMPLATE_MARKS.sub(r"\g<0> ", text)


def _label(text: str) -> str:
    """Return a name or a value as it is where it can be nothing else, and quoted where it might."""
    plain = len(text) <= MAX_LABEL_CHARS and _PLAIN.fullmatch(text)
    return text if plain else quote(text, MAX_LABEL_CHARS)


def _brief(brief: str, tokens: int) -> str:
    lines = _without_marks(brief.strip()[: MAX_BRIEF_CHARS + 1]).splitlines()
    return _cut("\n".join(f"> {line}".rstrip() for line in lines), MAX_BRIEF_CHARS, tokens)


def _recent(facts: PromptFacts, room: int) -> str:
    """Render the newest attempts that fit, the last one always."""
    lines: list[str] = []
    for attempt in facts.recent:
        line = _attempt_line(attempt, facts)
        room -= estimate_tokens(line) + 1
        if lines and room < (LEFT_OUT_TOKENS if len(lines) + 1 < len(facts.recent) else 0):
            lines.append(f"({len(facts.recent) - len(lines)} older ones left out)")
            break
        lines.append(line)
    return "\n".join(lines)


def _lineage(facts: PromptFacts, room: int) -> str:
    by_knob = {total.knob: total for total in facts.totals}
    tried = [by_knob[knob.name] for knob in facts.knobs if knob.name in by_knob]
    if not tried:
        return "Nothing was tried yet."
    kept = sum(total.kept for total in tried)
    unit = " in %" if facts.gain == "relative" else ""
    error = " ± standard error" if facts.gain_sd is not None else ""
    header = f"{facts.turns} turns, {kept} kept. Of each value tried: mean gain{unit}{error}, xTRIALS"
    untouched = [knob.name for knob in facts.knobs if knob.name not in by_knob or not by_knob[knob.name].tried]
    footer = ["- never tried: " + ", ".join(untouched)] if untouched else []
    lines, dropped = _fit(tried, facts, room - estimate_tokens("\n".join([header, *footer])) - LEFT_OUT_TOKENS)
    if dropped:
        lines.append(f"({dropped} less informative values left out)")
    return "\n".join([header, *lines, *footer])


def _merged(totals: Iterable[PairTotal]) -> list[PairTotal]:
    """Put numbers that agree to two significant digits together, the most informative group first."""
    groups: dict[str, list[PairTotal]] = {}
    for total in totals:
        groups.setdefault(_short(total.new_value), []).append(total)
    return sorted((_sum(label, group) for label, group in groups.items()), key=information)


def _short(value: str) -> str:
    try:
        number = float(value)
    except ValueError:
        return value
    return value if number.is_integer() and abs(number) < 1e6 else f"{number:.2g}"


def _sum(label: str, group: Sequence[PairTotal]) -> PairTotal:
    failures: Counter[FailureClass] = Counter()
    for total in group:
        if total.failed:
            failures.update(total.failures)
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
        failures=failures,
    )


def _fit(tried: Sequence[KnobTotal], facts: PromptFacts, room: int) -> tuple[list[str], int]:
    """Render each knob's tally, and its most informative values in its share of the room, in estimated tokens.

    Returns the lines, and how many values were left out.
    """
    lines, dropped = [], 0
    for left, knob in zip(range(len(tried), 0, -1), tried, strict=True):
        head = f"- {knob.knob} {knob.tried}x{_tally(knob)}: "
        share = room // left - estimate_tokens(head)
        merged = _merged(knob.values) if share > 0 else knob.values
        chosen: list[PairTotal] = []
        for total in merged:
            share -= estimate_tokens(_value(total, facts)) + 1
            if share < 0:
                break
            chosen.append(total)
        dropped += knob.distinct_values - len(knob.values) + len(merged) - len(chosen)
        line = head + "; ".join(_value(total, facts) for total in sorted(chosen, key=_by_value))
        room -= estimate_tokens(line) + 1
        lines.append(line.rstrip(": "))
    return lines, dropped


def _tally(knob: KnobTotal) -> str:
    """Return what became of a knob's proposals that were not measured, whatever the value."""
    blocked = f", blocked {knob.blocked}" if knob.blocked else ""
    return blocked + (f", failed: {_by_class(knob.failures)}" if knob.failures else "")


def _by_class(failures: Mapping[FailureClass, int]) -> str:
    return ", ".join(
        f"{name} {times}" for name, times in sorted(failures.items(), key=lambda item: (-item[1], item[0]))
    )


def _by_value(total: PairTotal) -> tuple[float, str]:
    try:
        return (float(total.new_value), "")
    except ValueError:
        return (0.0, total.new_value)


def _value(total: PairTotal, facts: PromptFacts) -> str:
    words = [_label(total.new_value)]
    if total.mean_gain is not None:
        percent = 100 if facts.gain == "relative" else 1
        gain = f"{total.mean_gain * percent:+.2g}"
        if facts.gain_sd is not None:
            gain += f"±{facts.gain_sd * percent / total.trials**0.5:.1g}"
        words.append(f"{gain} x{total.trials}")
    if total.failed:
        words.append(f"failed {_by_class(total.failures)}".strip())
    elif total.blocked and total.mean_gain is None:
        words.append("blocked")
    if total.kept:
        words.append("kept")
    return " ".join(words)


def _attempt_line(attempt: Attempt, facts: PromptFacts) -> str:
    what = f"{_label(attempt.knob)} = {_label(attempt.new_value or '')}" if attempt.knob else "no valid proposal"
    came: list[str] = [attempt.outcome or "open"]
    if attempt.gain is not None:
        came.append(gain_text(attempt.gain, facts.gain))
    elif attempt.failure:
        came.append(_label(attempt.failure))
    elif attempt.rail:
        came.append(_label(attempt.rail))
    line = f"- turn {attempt.iteration}: {what}: {' '.join(came)}"
    if attempt.reason:
        line += f"; reason {quote(attempt.reason)}"
    if attempt.notes:
        line += f"; notes {quote(attempt.notes)}"
    return line
