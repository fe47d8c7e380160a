"""Run the host's graph, or go on with it where it was cut off: `host-app --turns 4`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from langgraph.checkpoint.sqlite import SqliteSaver

from overnight import open_store

from .graph import CAMPAIGN, host_graph, loop_graph


def main() -> None:
    """Parse the command line and run to the campaign's end."""
    parser = argparse.ArgumentParser(description="A LangGraph application with overnight's loop as one of its nodes.")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--db", default="overnight.db", help="the loop's store")
    parser.add_argument("--checkpoints", default="host.db", help="the host's own checkpoints")
    options = parser.parse_args()
    config: Any = {"configurable": {"thread_id": "night"}, "recursion_limit": 2 * options.turns + 10}
    with (
        SqliteSaver.from_conn_string(options.checkpoints) as checkpointer,
        open_store(options.db, create=True) as store,
        loop_graph(store, options.turns) as loop,
    ):
        app = host_graph(loop, store).compile(checkpointer=checkpointer)
        cut_off = bool(app.get_state(config).next)
        if cut_off:
            sys.stdout.write("going on where the last run was cut off\n")
        for part in app.stream(None if cut_off else {"campaign": CAMPAIGN}, config, stream_mode="updates"):
            for line in part.get("write", {}).get("diary", ()):
                sys.stdout.write(f"{line}\n")
        sys.stdout.write(f"{len(app.get_state(config).values['diary'])} turns in the diary\n")


if __name__ == "__main__":
    main()
