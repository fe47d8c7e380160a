"""`docs/events.md`, generated from the event classes; `overnight.agent.campaign_docs` writes it with the others."""

from __future__ import annotations

import dataclasses
import inspect

from overnight import events

HEADER = """# Events

<!-- Made by `python -P -m overnight.agent.campaign_docs docs`; edit the event classes instead. -->

What a campaign tells while it runs, as frozen dataclasses in `overnight.events`. Every `Hooks` hears all of them, in
order; LangGraph's stream mode `custom` carries them as dicts, with the kind under `event`. What is written in the same
transaction as what it tells of (a promotion, the end) is heard after the commit, and not at all where that fails. Those
with a row are also in the view `event_log`; what the others tell is in attempts and trials. All have `campaign`. How to
listen: [the API](api.md).

| event | kind | row | what happened | fields |
|---|---|---|---|---|
"""


def events_markdown() -> str:
    """Return `docs/events.md`."""
    kinds = [getattr(events, name) for name in events.__all__]
    kinds = [kind for kind in kinds if issubclass(kind, events.Event) and kind is not events.Event]
    return HEADER + "".join(_row(kind) for kind in kinds)


def _row(kind: type[events.Event]) -> str:
    what = " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split()).replace("|", "\\|")
    fields = ", ".join(f"`{field.name}`" for field in dataclasses.fields(kind) if field.name != "campaign")
    return f"| `{kind.__name__}` | `{kind.kind}` | {'yes' if kind.recorded else ''} | {what} | {fields} |\n"
