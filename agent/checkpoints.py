"""LangGraph's checkpoints beside a SQLite store: useful for streaming and Studio, never the campaign's position.

So nothing about this file can stop a campaign: one that is lost, older than the store, no database, or without room is
left behind or made anew. Old positions are pruned at each turn.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import BaseCheckpointSaver, ChannelVersions, Checkpoint, CheckpointMetadata
    from langgraph.checkpoint.sqlite import SqliteSaver

LOG = logging.getLogger(__name__)


@contextmanager
def checkpointer(path: Path | None) -> Iterator[BaseCheckpointSaver[str] | None]:
    """Open the checkpoint file; without a usable one the run goes on without."""
    saver = None if path is None else _open(path)
    try:
        yield saver
    finally:
        if saver is not None:
            saver.conn.close()


def _open(path: Path) -> SqliteSaver | None:
    """Return a saver on the file, made anew where it is no database; None where even that cannot be."""
    for _ in range(2):
        connection = None
        try:
            connection = sqlite3.connect(path, check_same_thread=False)
            # What is lost with the power is made again from the store, so nothing waits for the disk here.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = OFF")
            saver = _lenient(connection)
            saver.setup()
            return saver
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            if getattr(error, "sqlite_errorcode", None) not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                return None
            for each in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
                each.unlink(missing_ok=True)
    return None


def merge(path: Path) -> None:
    """Have SQLite take back what a killed process left beside the file, where there is one."""
    if path.exists():
        with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _lenient(connection: sqlite3.Connection) -> SqliteSaver:
    """Return a saver whose writes may fail: a full disk costs the checkpoint, not the turn."""
    from langgraph.checkpoint.sqlite import SqliteSaver

    class LenientSaver(SqliteSaver):
        def put(
            self,
            config: RunnableConfig,
            checkpoint: Checkpoint,
            metadata: CheckpointMetadata,
            new_versions: ChannelVersions,
        ) -> RunnableConfig:
            try:
                return super().put(config, checkpoint, metadata, new_versions)
            except sqlite3.Error as error:
                LOG.warning("a checkpoint was not written: %s", error)
                return config

        def put_writes(
            self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
        ) -> None:
            try:
                super().put_writes(config, writes, task_id, task_path)
            except sqlite3.Error as error:
                LOG.warning("a checkpoint was not written: %s", error)

        def delete_thread(self, thread_id: str) -> None:
            try:
                super().delete_thread(thread_id)
            except sqlite3.Error as error:
                LOG.warning("an old checkpoint was not deleted: %s", error)

    return LenientSaver(connection)
