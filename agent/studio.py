"""The graph that `langgraph.json` names, for LangGraph Studio and `langgraph dev`; importing it opens nothing.

`OVERNIGHT_CAMPAIGN` names the campaign (default: the bundled `quickstart`) and `OVERNIGHT_DB` the store. A server asks
for the graph at every run and for every drawing; it gets the same one, so that the trial worker stays warm.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from overnight.agent.graph import TurnGraph


_LOCK = threading.Lock()
_built: list[TurnGraph] = []


async def make_graph() -> TurnGraph:
    """Return the uncompiled graph of one turn, built in a thread: the server's event loop must not wait for a disk."""
    return await asyncio.to_thread(_graph)


def _graph() -> TurnGraph:
    """Return the one graph, also where two requests come first at once."""
    with _LOCK:
        if not _built:
            _built.append(_build())
        return _built[0]


def _build() -> TurnGraph:
    from overnight.agent.campaign import load_campaign
    from overnight.agent.graph import build_graph
    from overnight.store.sql_store import SqlStore

    store = SqlStore.open(os.environ.get("OVERNIGHT_DB", "overnight.db"), create=True)
    return build_graph(load_campaign(os.environ.get("OVERNIGHT_CAMPAIGN", "quickstart")), store=store)
