"""What is in a corpus, counted, and whether that is enough to learn more than one answer from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from overnight.distill.objective import effective_size
from overnight.distill.rows import TrainingRow
from overnight.distill.teaching import Item
from overnight.store.errors import CorpusRefusedError
from overnight.store.hashing import JsonValue


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusReport:
    """What is in a corpus."""

    objective: str
    rows: int
    """Measured turns that teach, held-out ones included."""
    trained: int
    held_out: int
    first_turn: int
    cut_turn: int
    """The last turn that is trained on, or known to a target."""
    last_turn: int
    reconstructed: int
    """Rows whose prompt was rendered afterwards: imported attempts."""
    excluded: Mapping[str, int]
    """Measured attempts that teach nothing, by reason; rows over `max_length` are found when they are tokenized."""
    knobs: int
    """Different knobs tried in trained rows."""
    knobs_on_menu: int
    pairs: int
    """Different (knob, value) tried in trained rows."""
    top_pair: str
    top_share: float
    """Share of the trained rows that tried it."""
    effective_rows: float
    """Of the weights (Kish)."""
    kept_trained: int
    kept_held_out: int
    variants: Mapping[str, int]
    """Rows of augmentation, by kind, over all epochs."""

    def plain(self) -> dict[str, JsonValue]:
        """Return it as JSON data."""
        return asdict(self)


def report_on(
    rows: Sequence[TrainingRow],
    trained: Sequence[Item],
    held_out: Sequence[Item],
    *,
    objective: str,
    cut_turn: int,
    excluded: Mapping[str, int],
    knobs_on_menu: int,
) -> CorpusReport:
    """Count a corpus."""
    counts = Counter(item.lesson.change for item in trained)
    top, most = counts.most_common(1)[0] if counts else (None, 0)
    everything = [*trained, *held_out]
    turns = [item.lesson.attempt.iteration for item in everything]
    return CorpusReport(
        objective=objective,
        rows=len(everything),
        trained=len(trained),
        held_out=len(held_out),
        first_turn=min(turns, default=0),
        cut_turn=cut_turn,
        last_turn=max(turns, default=0),
        reconstructed=sum(item.lesson.attempt.prompt_kind == "reconstructed" for item in everything),
        excluded=dict(excluded),
        knobs=len({change.knob for change in counts}),
        knobs_on_menu=knobs_on_menu,
        pairs=len(counts),
        top_pair="" if top is None else f"{top.knob} = {top.value}",
        top_share=most / len(trained) if trained else 0.0,
        effective_rows=effective_size([row.weight for row in rows if row.epoch in (None, 0)]),
        kept_trained=sum(item.lesson.kept for item in trained),
        kept_held_out=sum(item.lesson.kept for item in held_out),
        variants=dict(Counter(row.id.partition("/")[2] for row in rows if "/" in row.id)),
    )


def check_diversity(name: str, report: CorpusReport, *, min_knobs: int, min_pairs: int, max_share: float) -> None:
    """Refuse what could only teach one answer.

    Raises:
        CorpusRefusedError: the message says which floor is missed, and what to run.
    """
    why = None
    if report.knobs < min_knobs:
        why = f"they try {report.knobs} knobs, `distill.min_knobs` is {min_knobs}"
    elif report.pairs < min_pairs:
        why = f"they try {report.pairs} different changes, `distill.min_pairs` is {min_pairs}"
    elif report.top_share > max_share:
        why = f"{report.top_share:.0%} of them try `{report.top_pair}`, `distill.max_share` is {max_share:.0%}"
    if why is not None:
        raise CorpusRefusedError(
            f"campaign `{name}`: its {report.trained} training rows are too alike to learn from: {why}; run more turns "
            "with a larger `router.explore`, or with a control (`random`, `optuna`) as champion"
        )
