"""A campaign file as typed models, and how it is read: strictly, with one clear line for what is wrong.

The tables `[trainer]` and `[proposers.<name>]` are validated by the chosen trainer and proposers themselves; here they
are plain mappings. Reading a file starts nothing and imports no plugin.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from overnight.agent.decide import DecisionSettings
from overnight.rails.constraint import Constraint
from overnight.rails.gate import SKIPPABLE
from overnight.rails.menu import Knob, KnobType, Menu, Scale
from overnight.store.errors import CampaignError, MenuError
from overnight.store.hashing import JsonValue, digest
from overnight.store.records import Direction, GainKind

FILE_NAME = "campaign.toml"
FROZEN = (
    "knobs",
    "constraints",
    "metric",
    "trainer",
    "campaign.trainer",
    "campaign.baseline",
    "decision",
    "campaign.seed",
)
"""Keys that may not change between runs of one campaign."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
SettingsModel = TypeVar("SettingsModel", bound=BaseModel)


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
    calibration_trials: Annotated[int, Field(ge=1)] = 5
    """Seeds on which the baseline is measured at the start; one of them twice."""
    max_trials: Annotated[int, Field(ge=1)] = 5
    """Most trials for a candidate."""
    audit: Annotated[float, Field(ge=0, le=1)] = 0.05
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
    """How many of the last attempts are shown whole."""
    lineage: bool = True
    """Whether the summary of all history is shown."""


class RouterSection(Section):
    """Who proposes."""

    champion: str | None = None
    """The `[proposers.<name>]` that has the turn; may be left out when there is one proposer."""
    warmup: bool = True
    """Each knob is tried once before the champion starts."""
    explore: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of turns for the least tried knobs."""


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


@dataclass(frozen=True)
class Campaign:
    """A campaign that was read and found consistent."""

    file: CampaignFile
    path: Path
    """Its `campaign.toml`."""
    menu: Menu

    @property
    def name(self) -> str:
        """Its identity in the store."""
        return self.file.campaign.name

    @property
    def folder(self) -> Path:
        """Where relative paths start."""
        return self.path.parent

    @property
    def champion(self) -> str:
        """The proposer that has the turn."""
        return self.file.router.champion or next(iter(self.file.proposers))

    @property
    def decision(self) -> DecisionSettings:
        """The decision rule's settings, with the metric's direction and gain."""
        section, metric = self.file.decision, self.file.metric
        return DecisionSettings(
            rule=section.rule,
            min_gain=section.min_gain,
            alpha=section.alpha,
            calibration_trials=section.calibration_trials,
            max_trials=section.max_trials,
            direction=metric.direction,
            gain=metric.gain,
        )

    def spec(self) -> dict[str, JsonValue]:
        """The file as plain JSON data, defaults filled in."""
        return self.file.model_dump(mode="json")

    def frozen(self) -> dict[str, JsonValue]:
        """The part of the file that may not change between runs, by key."""
        return frozen_part(self.spec())

    def frozen_hash(self) -> str:
        """Content address of the frozen part."""
        return digest(self.frozen())

    def read_brief(self) -> str:
        """The brief as it is now, or an empty text when there is none.

        Raises:
            CampaignError: the file named by `brief` cannot be read.
        """
        if self.file.campaign.brief is None:
            return ""
        path = self.folder / self.file.campaign.brief
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CampaignError(
                f"{self.path}: `campaign.brief`: cannot read `{path}`; make it or drop the key"
            ) from error


def frozen_part(spec: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the keys of FROZEN out of a file's plain data."""
    part: dict[str, JsonValue] = {}
    for key in FROZEN:
        value: JsonValue = spec
        for name in key.split("."):
            assert isinstance(value, Mapping)
            value = value[name]
        part[key] = value
    return part


def load_campaign(where: str | Path) -> Campaign:
    """Read a campaign: a folder, its `campaign.toml`, or the bare name of a bundled campaign.

    Raises:
        CampaignError: there is none, or something in it is wrong; the message names file, key and remedy.
    """
    path = find_campaign(where)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CampaignError(f"{path}: cannot be read ({error.strerror}); give a folder with a `{FILE_NAME}`") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CampaignError(f"{path}: not valid TOML: {error}; mend that line") from error
    return parse_campaign(data, path)


def find_campaign(where: str | Path) -> Path:
    """Return the `campaign.toml` that `where` stands for.

    Raises:
        CampaignError: nothing is there; the message lists the bundled campaigns.
    """
    path = Path(where)
    if path.is_dir():
        path = path / FILE_NAME
    if path.is_file():
        return path.absolute()
    bundled = bundled_campaigns()
    if str(where) in bundled:
        return bundled[str(where)]
    raise CampaignError(
        f"{where}: no campaign here; give a folder with a `{FILE_NAME}`, make one with `overnight init`, or name a "
        f"bundled one: {', '.join(bundled)}"
    )


def bundled_campaigns() -> dict[str, Path]:
    """Return the campaigns that travel in the package, by name."""
    root = Path(__file__).parents[1] / "campaigns"
    return {path.parent.name: path for path in sorted(root.glob(f"*/{FILE_NAME}"))}


def parse_campaign(data: Mapping[str, object], path: Path) -> Campaign:
    """Check plain data as a campaign file read from `path`.

    Raises:
        CampaignError: as `load_campaign`.
    """
    endless = _not_finite(data, "")
    if endless is not None:
        raise CampaignError(f"{path}: `{endless}` is not a finite number; leave the key out for no limit")
    file = validated(CampaignFile, data, str(path))
    if not file.proposers:
        raise CampaignError(f'{path}: `proposers` is empty; add a `[proposers.random]` with `kind = "random"`')
    champion = file.router.champion
    if champion is None and len(file.proposers) > 1:
        raise CampaignError(f"{path}: `router.champion` is missing; name one of {', '.join(file.proposers)}")
    if champion is not None and champion not in file.proposers:
        raise CampaignError(
            f"{path}: `router.champion`: no proposer `{champion}`; name one of {', '.join(file.proposers)}"
        )
    campaign = Campaign(file, path, _menu(file, path))
    try:
        _ = campaign.decision
    except ValueError as error:
        raise CampaignError(f"{path}: `decision`: {error}") from error
    return campaign


def _not_finite(value: object, key: str) -> str | None:
    """Return the key of the first number that is infinite or not a number."""
    if isinstance(value, float):
        return None if math.isfinite(value) else key
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    found = (_not_finite(part, f"{key}.{name}".lstrip(".")) for name, part in parts)
    return next((where for where in found if where is not None), None)


def _menu(file: CampaignFile, path: Path) -> Menu:
    numbers = {k: v for k, v in file.trainer.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    clash = sorted(set(numbers) & set(file.knobs))
    if clash:
        raise CampaignError(f"{path}: `trainer.{clash[0]}` is also a knob; remove one of the two")
    try:
        return Menu(
            tuple(_knob(name, section) for name, section in file.knobs.items()),
            tuple(Constraint(c.id, c.rule, c.doc) for c in file.constraints),
            numbers,
        )
    except MenuError as error:
        raise CampaignError(f"{path}: {error}") from error


def _knob(name: str, section: KnobSection) -> Knob:
    low, high = section.range if section.range is not None else (None, None)
    return Knob(
        name=name,
        type=section.type,
        default=section.default,
        choices=tuple(section.choices or ()),
        low=low,
        high=high,
        scale=section.scale,
        levels=section.levels,
        doc=section.doc,
    )


def validated(model: type[SettingsModel], data: Mapping[str, object], where: str, prefix: str = "") -> SettingsModel:
    """Validate `data` as `model`, or say the first thing that is wrong in one line.

    Raises:
        CampaignError: `<where>: `<prefix.key>`: what is wrong; the remedy`.
    """
    try:
        return model.model_validate(data, strict=True)
    except ValidationError as error:
        errors = error.errors()
        line = _explain(errors[0], model, prefix)
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise CampaignError(f"{where}: {line}{more}") from error


def _explain(error: Mapping[str, object], model: type[BaseModel], prefix: str) -> str:
    location = error["loc"]
    assert isinstance(location, Sequence)
    parts = [str(part) for part in location if not str(part).startswith(("function-", "constrained"))]
    key = ".".join([*([prefix] if prefix else []), *parts])
    kind = error["type"]
    if kind == "missing":
        return f"`{key}` is missing; add it"
    if kind == "extra_forbidden":
        known = _keys_at(model, parts[:-1])
        close = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(known)}"
        return f"`{key}` is not a key; {hint}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"`{key}`: {message[0].lower()}{message[1:]}, not {error.get('input')!r:.60}"


def _keys_at(model: type[BaseModel], parts: Sequence[str]) -> list[str]:
    current = model
    for part in parts:
        field = current.model_fields.get(part)
        inner = [a for a in _types_in(field.annotation if field else None) if issubclass(a, BaseModel)]
        if field is None or not inner:
            if inner or part not in current.model_fields:
                continue
            break
        current = inner[0]
    return list(current.model_fields)


def _types_in(annotation: object) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    return [found for arg in getattr(annotation, "__args__", ()) for found in _types_in(arg)]
