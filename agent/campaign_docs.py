"""`docs/campaign.md`, `docs/campaign.schema.json` and `docs/events.md`, generated from what they tell of.

    python -P -m overnight.agent.campaign_docs docs

A test compares the files with what this makes, so a key cannot exist without its line.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from overnight.agent import campaign
from overnight.agent import campaign_file as tables
from overnight.agent.event_docs import events_markdown
from overnight.agent.proposers.endpoint import OpenAIProposer
from overnight.agent.proposers.sampler import OptunaProposer
from overnight.agent.proposers.scripted import ScriptedProposer
from overnight.agent.proposers.student import StudentProposer
from overnight.agent.proposers.uniform import RandomProposer
from overnight.trainer.command_settings import CommandSettings
from overnight.trainer.function import FunctionSettings
from overnight.trainer.gpt_settings import GptSettings
from overnight.trainer.scripted import ScriptedSettings

TABLES: tuple[tuple[str, type[BaseModel], str], ...] = (
    ("[campaign]", tables.CampaignSection, ""),
    ("[metric]", tables.MetricSection, ""),
    ("[budget]", tables.BudgetSection, ""),
    ("[decision]", tables.DecisionSection, ""),
    ("[knobs.NAME]", tables.KnobSection, "Give `range` or `choices`."),
    ("[[constraints]]", tables.ConstraintSection, ""),
    ("[rails]", tables.RailsSection, ""),
    ("[prompt]", tables.PromptSection, ""),
    ("[router]", tables.RouterSection, ""),
    ("[distill]", tables.DistillSection, ""),
    ("[notify]", tables.NotifySection, ""),
    ("[trainer] of `gpt`", GptSettings, ""),
    ("[trainer] of `command`", CommandSettings, ""),
    (
        "[trainer] of `function`",
        FunctionSettings,
        "From Python the function itself is given instead: see [the API](api.md).",
    ),
    ("[trainer] of `scripted`", ScriptedSettings, "For tests: a trainer without training."),
    ("[proposers.NAME] of kind `openai`", OpenAIProposer.Settings, ""),
    ("[proposers.NAME] of kind `student`", StudentProposer.Settings, ""),
    ("[proposers.NAME] of kind `optuna`", OptunaProposer.Settings, ""),
    ("[proposers.NAME] of kind `random`", RandomProposer.Settings, "No keys besides `kind`."),
    ("[proposers.NAME] of kind `scripted`", ScriptedProposer.Settings, "For tests: a fixed list of replies."),
)
HEADER = """# The campaign file

<!-- Made by `python -P -m overnight.agent.campaign_docs docs`; edit the models instead. -->

A campaign is a folder with a `campaign.toml`. It is read strictly: an unknown key, a default outside its range or a
constraint that cannot hold is an error that names file, key and remedy. Between runs these keys may not change, since
old and new trials would not compare: {frozen}. Everything else may.
"""


def campaign_markdown() -> str:
    """Return `docs/campaign.md`."""
    frozen = ", ".join(f"`{key}`" for key in campaign.FROZEN)
    return HEADER.format(frozen=frozen) + "".join(_table(*table) for table in TABLES)


def campaign_schema() -> str:
    """Return the JSON Schema of a campaign file, as text."""
    return json.dumps(tables.CampaignFile.model_json_schema(), indent=2) + "\n"


def _table(title: str, model: type[BaseModel], note: str) -> str:
    docs = dict(_field_docs(model))
    lines = [f"\n## `{title}`\n" if "`" not in title else f"\n## {title}\n", _first_paragraph(model)]
    if note:
        lines.append(f"\n{note}")
    if model.model_fields:
        lines += ["\n| key | type | default | what it is |", "|---|---|---|---|"]
        lines += [
            f"| `{name}` | {_type(field)} | {_default(field)} | {docs.get(name) or field.description or ''} |"
            for name, field in model.model_fields.items()
        ]
    return "\n".join(lines) + "\n"


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join(inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].split())


def _field_docs(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield the docstring under each field, from the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(tree, ast.ClassDef)
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match below:
                case ast.Expr(value=ast.Constant(value=str() as text)):
                    yield field.target.id, " ".join(text.split()).replace("|", "\\|")


def _type(field: FieldInfo) -> str:
    return _words(field.annotation).replace("|", "\\|")


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin is list:
        return f"list of {_words(arguments[0])}"
    if origin is dict:
        return "table"
    if arguments:
        return " or ".join(_words(argument) for argument in arguments if argument is not type(None))
    return {int: "integer", float: "number", str: "text", bool: "true or false"}.get(annotation, str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "" if value is None else f"`{json.dumps(value, default=str)}`"


def main() -> None:
    """Write the files into the folder named on the command line."""
    folder = Path(sys.argv[1])
    (folder / "campaign.md").write_text(campaign_markdown(), encoding="utf-8")
    (folder / "campaign.schema.json").write_text(campaign_schema(), encoding="utf-8")
    (folder / "events.md").write_text(events_markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
