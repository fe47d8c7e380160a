"""The tables of a campaign file as typed models: what each key is, its default and its bounds.

The tables `[trainer]` and `[proposers.<name>]` are validated by the chosen trainer and proposers themselves; here they
are plain mappings. `docs/campaign.md` is made from these docstrings.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from overnight.agent.decide import AUDIT_SHARE
from overnight.rails.gate import SKIPPABLE
from overnight.rails.menu import KnobType, Scale
from overnight.store.records import Direction, GainKind

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"


class Section(BaseModel):
    """A table of the file: unknown keys are errors, values are not converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CampaignSection(Section):
    """What the campaign is."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """Identity in the store: letters, digits, `_`, `.` and `-`."""
    trainer: str
    """`gpt`, `command`, or any installed plugin of the group `overnight.trainers`."""
    baseline: Literal["rolling", "fixed"] = "rolling"
    """`rolling`: a keep becomes the new baseline; `fixed`: always against the first."""
    brief: str | None = None
    """A text file beside this one: what the campaign is about, shown to the proposer; read again each iteration."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Every random draw of the campaign derives from it."""


class MetricSection(Section):
    """What is optimised."""

    name: str = "val_bpb"
    """The metric that the trainer reports."""
    direction: Direction = "min"
    """Whether less or more is better."""
    gain: GainKind = "relative"
    """`relative`: (baseline - candidate) / baseline when lower is better; `absolute`: without the division."""


class BudgetSection(Section):
    """When the campaign ends: whichever comes first."""

    iterations: Annotated[int, Field(ge=1)]
    """Turns in all; a turn's blocked tries do not count again."""
    until: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")] | None = None
    """Local time `HH:MM`, the next one after the start of the run."""
    gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """Hours spent in trials."""
    energy_kwh: Annotated[float, Field(gt=0)] | None = None
    """Energy spent in trials, where it is measured."""
    price_per_kwh: Annotated[float, Field(ge=0)] | None = None
    """What energy costs, in any currency: `campaign_stats.energy_cost` then says what the campaign cost."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Turns in a row without a keep."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Most memory of the device that a trial or a distillation may take; left out: what is free, less a reserve."""
    trial_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """A trial that takes longer is killed and recorded as `failed/timeout`."""


class DecisionSection(Section):
    """When a change is kept."""

    rule: Literal["confirmed", "single_shot"] = "confirmed"
    """`confirmed`: paired seeds until the evidence is in; `single_shot`: one run against the baseline."""
    min_gain: Annotated[float, Field(ge=0)] = 0.005
    """Smallest mean gain that is kept, in the unit of `metric.gain`."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    """Chance of keeping a change that does nothing."""
    calibration_trials: Annotated[int, Field(ge=1, le=200)] = 5
    """Seeds on which the baseline is measured at the start; one of them twice."""
    max_trials: Annotated[int, Field(ge=1, le=200)] = 5
    """Most trials for a candidate."""
    audit: Annotated[float, Field(ge=0, le=1)] = AUDIT_SHARE
    """Share of turns, drawn beforehand, that also measure both sides on audit seeds: how noisy pairs really are."""


class KnobSection(Section):
    """A knob of the menu."""

    type: KnobType
    """`int`, `float` or `str`."""
    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Smallest and largest value, both included."""
    choices: list[int | float | str] | None = None
    """Or the values to choose from."""
    scale: Scale = "linear"
    """How a range is gridded: `linear` or `log`."""
    levels: Annotated[int, Field(ge=2, le=1000)] = 9
    """How many grid points a range has for scoring; refined once when all were tried."""
    default: int | float | str
    """Where the campaign starts."""
    doc: str = ""
    """What the knob does, for the proposer."""


class ConstraintSection(Section):
    """A rule that every configuration has to keep."""

    id: Annotated[str, Field(pattern=NAME_PATTERN)]
    """Its name in verdicts."""
    rule: str
    """Arithmetic and comparisons over knobs and the numbers of `[trainer]`."""
    doc: str = ""
    """Why, in words."""


class RailsSection(Section):
    """Which rails to leave out."""

    skip: list[str] = []
    """`R6_novelty` and `R7_capability` may be skipped, to replay old campaigns; the others never."""
    extra: list[str] = []
    """Installed rails (group `overnight.rails`) that run after the built-in ones."""

    @model_validator(mode="after")
    def _only_skippable(self) -> RailsSection:
        for rail in self.skip:
            if rail not in SKIPPABLE:
                raise ValueError(f"`{rail}` cannot be skipped; only {' and '.join(sorted(SKIPPABLE))} can")
        return self


class PromptSection(Section):
    """What the proposer is shown."""

    recent: Annotated[int, Field(ge=0, le=50)] = 5
    """How many of the last attempts are shown whole, as far as they fit."""
    lineage: bool = True
    """Whether the summary of all history is shown."""


class RouterSection(Section):
    """Who proposes, and what it takes to take over."""

    champion: str | None = None
    """The `[proposers.<name>]` that has the turn; may be left out when there is one proposer."""
    challenger: str | None = None
    """The `[proposers.<name>]` that may take over when duels say that it proposes better: mostly a student."""
    controls: list[str] = []
    """Proposers that a race looks at beside champion and challenger."""
    warmup: bool = True
    """Each knob is tried once before the champion starts."""
    explore: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of turns for the least tried knobs."""
    evidence: Literal["duels", "heldout"] = "duels"
    """`duels`: both propose, both are measured; `heldout`: promote on the looking-back score alone (docs/promotion.md
    says what that costs)."""
    duel_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of turns, drawn beforehand, that begin a duel: champion and challenger answer one prompt in two turns in a
    row, and both are measured. From 0.5 on all turns but warm-up, exploring and requested ones are duels."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Chance, over the campaign's life, of promoting a proposer that is no better."""
    max_latency_s: Annotated[float, Field(gt=0)] = 5.0
    """A challenger whose proposals take longer (95th percentile) is not promoted."""
    inherit: str = ""
    """Another campaign of this store whose champion's adapter the challenger has until it is distilled here."""
    ask: bool = False
    """Whether a person is asked before a promotion."""


class DistillSection(Section):
    """When and how the challenger is trained on the campaign's own history; docs/learning.md says what each does."""

    every: Annotated[int, Field(ge=1)] = 25
    """Turns between two distillations."""
    min_rows: Annotated[int, Field(ge=1)] = 100
    """Rows that a distillation waits for, those held out included."""
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the rows, the newest, that is never trained on."""
    holdout: Annotated[int, Field(ge=1)] | None = None
    """Or how many rows."""
    objective: Literal["outcome", "clone", "filtered", "weighted"] = "outcome"
    """`outcome`: probability on changes by what they gained; `clone`: what was tried; `filtered`: what was tried and
    gained; `weighted`: what was tried, each by its gain."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.15
    """Of `outcome` and `weighted`, in standard deviations of the campaign's gains: smaller is sharper, down to half the
    noise of one gain."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Of `outcome`: least share of the probability that stays on changes nobody has tried."""
    write: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Of `outcome`: weight of one whole reply a row beside its choice, so that an adapter can also write; 0: none."""
    min_knobs: Annotated[int, Field(ge=1)] = 2
    """Different knobs that the trained rows must have tried, or distilling refuses."""
    min_pairs: Annotated[int, Field(ge=1)] = 8
    """Different changes that the trained rows must have tried, or distilling refuses."""
    max_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Largest share of the trained rows that may have tried the same change, or distilling refuses."""
    augment: list[Literal["permute", "earlier", "subsample", "synthetic"]] = ["permute", "subsample", "synthetic"]
    """How every other epoch varies the stored prompts: `permute` the lines of the history, cut it `earlier`,
    `subsample` it, or draw a `synthetic` one from measured changes. None of them changes what a row means."""
    keep_adapters: Annotated[int, Field(ge=1)] = 10
    """Newest adapters that stay on the disk; one that proposed, duelled or was promoted is never removed."""
    r: Annotated[int, Field(ge=1, le=512)] = 16
    """Rank of the LoRA matrices."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Their scale: `alpha / r` multiplies what they add."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Of their inputs, while training."""
    epochs: Annotated[int, Field(ge=1, le=1000)] = 20
    """Passes over the rows; a long history needs fewer, and takes longer for each."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-4
    """AdamW's peak; a cosine takes it to zero."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which it rises."""
    batch: Annotated[int, Field(ge=1)] = 8
    """Rows in a batch."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Batches in an optimizer step; how many rows go through the model at once is what memory allows."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's."""
    max_length: Annotated[int, Field(ge=64)] = 2048
    """Tokens; a longer row is left out whole, never cut, and counted."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Of initial weights, order, dropout and augmentation."""


class NotifySection(Section):
    """Who is told when something happens."""

    command: list[str] = []
    """A program and its arguments, run without a shell at finish, promotion, rollback and a stop by fault; the event
    comes as JSON on its standard input."""
    env: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]] = []
    """Names of environment variables that it sees besides the basic ones."""
    timeout_s: Annotated[float, Field(gt=0, le=300)] = 30.0
    """A program that takes longer is killed."""


class CampaignFile(Section):
    """A whole `campaign.toml`."""

    campaign: CampaignSection
    metric: MetricSection = MetricSection()
    budget: BudgetSection
    decision: DecisionSection = DecisionSection()
    trainer: dict[str, object] = {}
    """The chosen trainer's own settings, validated by it."""
    knobs: dict[str, KnobSection]
    """The menu."""
    constraints: list[ConstraintSection] = []
    proposers: dict[str, dict[str, object]]
    """Whoever may propose; each is validated by its `kind`."""
    rails: RailsSection = RailsSection()
    prompt: PromptSection = PromptSection()
    router: RouterSection = RouterSection()
    distill: DistillSection = DistillSection()
    notify: NotifySection = NotifySection()
