"""Unattended campaigns of short training experiments that get better at choosing themselves.

The names below are the public API: pinned by a test, documented in `docs/api.md`, changed only with a word in the
changelog. Each is imported when it is first asked for, so that `import overnight` costs nothing and loads neither torch
nor LangGraph. The typed events are in `overnight.events`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overnight import events as events
    from overnight.agent.campaign import Campaign
    from overnight.agent.events import Event, Hooks
    from overnight.agent.graph import CustomNode, TurnGraph, build_graph
    from overnight.agent.knobs import Choice, Float, Int
    from overnight.agent.optimize import optimize
    from overnight.agent.proposers.protocol import (
        Answer,
        Ask,
        Proposer,
        ProposerContext,
        ProposerSettings,
        reply_text,
    )
    from overnight.agent.result import Result
    from overnight.agent.state import TurnInput, TurnOutput, TurnState, TurnUpdate
    from overnight.rails.gate import Candidate, Rail
    from overnight.rails.menu import Change, Menu
    from overnight.rails.registry import RailContext
    from overnight.store.errors import (
        CampaignError,
        InputError,
        LeaseHeldError,
        LeaseLostError,
        MenuError,
        NotAllowedError,
        OutsideError,
        OvernightError,
        ProposerError,
        QueryError,
        SchemaError,
        StorageFaultError,
        StoreError,
        TrainerError,
    )
    from overnight.store.opening import open_store
    from overnight.store.protocol import TrajectoryStore
    from overnight.store.reading import QueryResult, query
    from overnight.store.records import TrainerInfo, TrialProgress, TrialRequest, TrialResult
    from overnight.trainer.protocol import Trainer, TrainerContext

__all__ = [
    "Answer",
    "Ask",
    "Campaign",
    "CampaignError",
    "Candidate",
    "Change",
    "Choice",
    "CustomNode",
    "Event",
    "Float",
    "Hooks",
    "InputError",
    "Int",
    "LeaseHeldError",
    "LeaseLostError",
    "Menu",
    "MenuError",
    "NotAllowedError",
    "OutsideError",
    "OvernightError",
    "Proposer",
    "ProposerContext",
    "ProposerError",
    "ProposerSettings",
    "QueryError",
    "QueryResult",
    "Rail",
    "RailContext",
    "Result",
    "SchemaError",
    "StorageFaultError",
    "StoreError",
    "Trainer",
    "TrainerContext",
    "TrainerError",
    "TrainerInfo",
    "TrajectoryStore",
    "TrialProgress",
    "TrialRequest",
    "TrialResult",
    "TurnGraph",
    "TurnInput",
    "TurnOutput",
    "TurnState",
    "TurnUpdate",
    "build_graph",
    "events",
    "open_store",
    "optimize",
    "query",
    "reply_text",
]

_HOMES = {
    "agent.campaign": "Campaign",
    "agent.events": "Event Hooks",
    "agent.graph": "CustomNode TurnGraph build_graph",
    "agent.knobs": "Choice Float Int",
    "agent.optimize": "optimize",
    "agent.proposers.protocol": "Answer Ask Proposer ProposerContext ProposerSettings reply_text",
    "agent.result": "Result",
    "agent.state": "TurnInput TurnOutput TurnState TurnUpdate",
    "rails.gate": "Candidate Rail",
    "rails.menu": "Change Menu",
    "rails.registry": "RailContext",
    "store.errors": "CampaignError InputError LeaseHeldError LeaseLostError MenuError NotAllowedError OutsideError "
    "OvernightError ProposerError QueryError SchemaError StorageFaultError StoreError TrainerError",
    "store.opening": "open_store",
    "store.protocol": "TrajectoryStore",
    "store.reading": "QueryResult query",
    "store.records": "TrainerInfo TrialProgress TrialRequest TrialResult",
    "trainer.protocol": "Trainer TrainerContext",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


# Python in a checkout's own folder finds this folder before the installed package: the rest of it lies beside.
if not os.path.exists(os.path.join(__path__[0], "agent")):
    __path__.append(os.path.dirname(__path__[0]))


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name == "events":
        return importlib.import_module("overnight.events")
    if name == "__version__":
        from importlib.metadata import version

        return version("overnight")
    if name not in _HOME_OF:
        raise AttributeError(f"module `overnight` has no attribute `{name}`")
    value = getattr(importlib.import_module(f"overnight.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
