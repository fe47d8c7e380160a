"""How a campaign file is read: strictly, with one clear line for what is wrong.

Reading a file starts nothing and imports no plugin; its tables are the models of `agent/campaign_file.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from overnight.agent.campaign_file import CampaignFile, KnobSection
from overnight.agent.decide import DecisionSettings
from overnight.agent.knobs import knob_table
from overnight.rails.constraint import Constraint
from overnight.rails.menu import Knob, Menu
from overnight.store.errors import CampaignError, MenuError
from overnight.store.hashing import JsonValue, digest

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
SettingsModel = TypeVar("SettingsModel", bound=BaseModel)


@dataclass(frozen=True)
class Campaign:
    """A campaign that was read and found consistent."""

    file: CampaignFile
    path: Path
    """Its `campaign.toml`."""
    menu: Menu
    sha256: str
    """Of the file's bytes as they were read; of its content, where it comes from no file."""
    allowed: bool = False
    """Whether somebody has allowed what the file wants (`overnight.agent.trust`)."""

    @classmethod
    def load(cls, where: str | Path, *, allowed: bool = False) -> Campaign:
        """Read a folder, its `campaign.toml`, or the bare name of a bundled campaign.

        `allowed` says that the file is as trusted as your own code: it may then run its commands, use its plugins and
        read its paths; otherwise what nobody allowed it raises a `NotAllowedError` where it is used.

        Raises:
            CampaignError: there is none, or something in it is wrong; the message names file, key and remedy.
        """
        return replace(load_campaign(where), allowed=allowed)

    @classmethod
    def from_dict(cls, tables: Mapping[str, object], *, folder: str | Path = ".") -> Campaign:
        """Build a campaign in code: the tables of a campaign file, knobs also as `Float`, `Int`, `Choice` or short.

        Relative paths in it start at `folder`. It is allowed what it wants: your own code says it.

        Raises:
            CampaignError: something in it is wrong; the message names key and remedy.
        """
        path = Path(folder).absolute() / "<code>"
        knobs = tables.get("knobs")
        if isinstance(knobs, Mapping):
            try:
                tables = {**tables, "knobs": {name: knob_table(name, spec) for name, spec in knobs.items()}}
            except MenuError as error:
                raise CampaignError(f"{path}: {error}") from error
        return replace(parse_campaign(tables, path), allowed=True)

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


def renamed(campaign: Campaign, name: str) -> Campaign:
    """Return the campaign under another name."""
    section = campaign.file.campaign.model_copy(update={"name": name})
    return replace(campaign, file=campaign.file.model_copy(update={"campaign": section}))


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
        raw = path.read_bytes()
        data = tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        raise CampaignError(f"{path}: cannot be read ({error.strerror}); give a folder with a `{FILE_NAME}`") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CampaignError(f"{path}: not valid TOML: {error}; mend that line") from error
    return replace(parse_campaign(data, path), sha256=hashlib.sha256(raw).hexdigest())


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
    for key, names in (
        ("champion", [champion]),
        ("challenger", [file.router.challenger]),
        ("controls", file.router.controls),
    ):
        for name in names:
            if name is not None and name not in file.proposers:
                known = ", ".join(file.proposers)
                raise CampaignError(f"{path}: `router.{key}`: no proposer `{name}`; name one of {known}")
    if champion is None and len(file.proposers) > 1:
        raise CampaignError(f"{path}: `router.champion` is missing; name one of {', '.join(file.proposers)}")
    campaign = Campaign(file, path, _menu(file, path), digest(file.model_dump(mode="json")))
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
