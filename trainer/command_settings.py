"""The command trainer's `[trainer]` table: what may be written there, and how a command line is filled in.

A command is a list of words, never a shell's line. `{name}` in a word stands for a knob's value, or for one of
`{seed}`, `{split}` (`val` or `holdout`), `{config}` (the path of a JSON file of all knobs) and `{python}` (the
interpreter that runs overnight); `{{` and `}}` are braces. Importing this loads pydantic and nothing heavier.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from overnight.store.errors import CampaignError
from overnight.store.records import Split
from overnight.trainer.protocol import TrainerContext

RESERVED = ("seed", "split", "config", "python")
Word = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]


class CommandSettings(BaseModel):
    """The `[trainer]` table of a campaign whose trainer is `command`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    command: list[Word] = Field(
        min_length=1, description="the script and its arguments, one word each, with `{knob}`, `{seed}`, `{config}`"
    )
    holdout_command: list[Word] | None = Field(
        default=None, min_length=1, description="the command for the locked holdout; or put `{split}` in `command`"
    )
    cwd: Word = Field(default=".", description="working directory, relative to the campaign's folder")
    env: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]] = Field(
        default_factory=list, description="names of environment variables that the command sees besides the basic ones"
    )
    metric_from: Word | None = Field(
        default=None, description="key of the metric in a JSON line; default: the metric's own name"
    )
    metric_regex: Word | None = Field(
        default=None, description="instead: a regular expression with the named group `metric`, searched in each line"
    )
    notes_prefix: Word | None = Field(
        default=None, description="lines that start with it are notes for the proposer, besides the JSON key `notes`"
    )
    data_files: list[Word] = Field(
        default_factory=list, description="globs of files that a result depends on, relative to the campaign's folder"
    )

    @classmethod
    def parse(cls, settings: Mapping[str, object], context: TrainerContext) -> Self:
        """Validate the table against itself and the menu.

        Raises:
            CampaignError: naming the key, what is wrong, and the remedy.
        """
        try:
            parsed = cls.model_validate(dict(settings))
        except ValidationError as error:
            raise _campaign_error(error) from error
        parsed._check_metric()
        parsed._check_words(context)
        return parsed

    def _check_metric(self) -> None:
        if self.metric_regex is None:
            return
        if self.metric_from is not None:
            raise CampaignError("`trainer.metric_regex` and `trainer.metric_from` are both given; remove one")
        try:
            groups = re.compile(self.metric_regex).groupindex
        except re.error as error:
            raise CampaignError(f"`trainer.metric_regex` is not a regular expression: {error}") from error
        if "metric" not in groups:
            raise CampaignError(r"`trainer.metric_regex` has no group named `metric`; write `(?P<metric>\S+)` in it")

    def _check_words(self, context: TrainerContext) -> None:
        taken = sorted(set(RESERVED) & set(context.knobs))
        if taken:
            raise CampaignError(f"knob `{taken[0]}` has a name that the command trainer uses itself; rename the knob")
        for key, words in (("command", self.command), ("holdout_command", self.holdout_command or [])):
            used = {name for word in words for name in fields(word, key)}
            unknown = sorted(used - set(context.knobs) - set(RESERVED))
            if unknown:
                names = ", ".join([*context.knobs, *RESERVED])
                raise CampaignError(
                    f"`trainer.{key}` has the placeholder `{{{unknown[0]}}}`, which is none of {names}; "
                    "rename it, or double its braces"
                )
            unused = [knob for knob in context.knobs if knob not in used]
            if words and unused and "config" not in used:
                raise CampaignError(
                    f"`trainer.{key}` does not pass on knob `{unused[0]}`; add `{{{unused[0]}}}`, or `{{config}}`"
                )

    def words(self, split: Split) -> list[str] | None:
        """Return the command for `split`, not filled in; None where there is no holdout."""
        if split == "val":
            return self.command
        if self.holdout_command is not None:
            return self.holdout_command
        return self.command if any("split" in fields(word, "command") for word in self.command) else None

    def folder(self, context: TrainerContext) -> Path:
        """Return the working directory as an absolute path."""
        return (context.campaign_dir / self.cwd).absolute()


def _campaign_error(error: ValidationError) -> CampaignError:
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = ", ".join(CommandSettings.model_fields)
        return CampaignError(f"`trainer.{key}` is not a setting of the command trainer; it has {known}")
    if first["type"] == "missing":
        return CampaignError(
            f'`trainer.{key}` is missing; write e.g. `{key} = ["{{python}}", "train.py", "{{config}}"]`'
        )
    return CampaignError(f"`trainer.{key}`: {first['msg']}")


def fields(word: str, key: str) -> list[str]:
    """Return the names of the placeholders in `word`.

    Raises:
        CampaignError: its braces do not match, or a placeholder is more than a name.
    """
    try:
        parts = list(string.Formatter().parse(word))
    except ValueError as error:
        raise CampaignError(f"`trainer.{key}`: `{word}`: {error}; double a brace that is meant as one") from error
    for _, name, spec, conversion in parts:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise CampaignError(
                f"`trainer.{key}`: the placeholder `{{{name}}}` in `{word}` is not a plain name; "
                "double a brace that is meant as one"
            )
    return [name for _, name, _, _ in parts if name is not None]


def fill(words: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """Return `words` with their placeholders replaced; what is put in is never read for placeholders again."""
    filled = []
    for word in words:
        parts = string.Formatter().parse(word)
        filled.append("".join(text + (values[name] if name is not None else "") for text, name, _, _ in parts))
    return filled
