"""The graph that `langgraph.json` names, for LangGraph Studio and `langgraph dev`; importing it opens nothing.

`OVERNIGHT_CAMPAIGN` names the campaign (default: the bundled `quickstart`) and `OVERNIGHT_DB` the store.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from langgraph.graph import StateGraph

    from overnight.agent.state import TurnInput, TurnOutput, TurnState


def make_graph() -> StateGraph[TurnState, None, TurnInput, TurnOutput]:
    """Open the store and return the uncompiled graph of one turn."""
    from overnight.agent.campaign import load_campaign
    from overnight.agent.graph import build_graph
    from overnight.store.sql_store import SqlStore

    store = SqlStore.open(os.environ.get("OVERNIGHT_DB", "overnight.db"), create=True)
    return build_graph(load_campaign(os.environ.get("OVERNIGHT_CAMPAIGN", "quickstart")), store=store)
