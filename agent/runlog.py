"""The log of a run: every event but single steps as one JSON line, in a rotating file beside the store.

Warnings and tracebacks of this package's own loggers go there too. Values of the variables that the campaign file names
(keys, what commands may see) never do. A log that cannot be written, on a full disk say, is no reason to stop.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Self

from overnight.agent import events
from overnight.agent.campaign import Campaign
from overnight.store.errors import LeaseHeldError

if TYPE_CHECKING:
    from structlog.typing import EventDict, WrappedLogger

MAX_BYTES = 16 * 2**20
"""A file is full when it has come to this: it may be a line larger."""
BACKUPS = 3
"""A turn takes about 2 KiB: some 30,000 turns are there before the oldest goes."""
MIN_SECRET = 6
"""Shorter values are no keys, and hiding them would hide half the text."""
_PACKAGE = "overnight"
_QUIET = (events.TrialStepped,)


def secrets_of(campaign: Campaign) -> tuple[str, ...]:
    """Return the values that no log may show: those of every variable that the file names, longest first."""
    values = {os.environ.get(name, "").strip() for name in _variables(campaign)}
    return tuple(sorted((value for value in values if len(value) >= MIN_SECRET), key=len, reverse=True))


def _variables(campaign: Campaign) -> Iterator[str]:
    for table in (*campaign.file.proposers.values(), campaign.file.trainer):
        for key in ("api_key_env", "env"):
            value = table.get(key)
            yield from [value] if isinstance(value, str) else value if isinstance(value, list) else ()
    yield from campaign.file.notify.env


def without(secrets: tuple[str, ...], text: str) -> str:
    """Return `text` with every secret replaced: plain, as JSON spells it, and as JSON in JSON (a body in an error)."""
    for secret in secrets:
        for ascii_only in (True, False):
            form = secret
            for _ in range(3):
                text = text.replace(form, "***")
                form = json.dumps(form, ensure_ascii=ascii_only)[1:-1]
    return text


class RunLog:
    """A consumer of the event stream; open while the campaign runs."""

    def __init__(self, path: Path, campaign: Campaign) -> None:
        self._path = path
        self._secrets = secrets_of(campaign)
        self._handler: logging.Handler | None = None
        self._log: WrappedLogger | None = None

    def __enter__(self) -> Self:
        """Open the file and listen to the package's loggers.

        Raises:
            OSError: the file cannot be opened.
        """
        import structlog

        shared = [_at, structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name]
        handler = _QuietFile(self._path, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8")
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=shared,
                processors=[
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    structlog.processors.format_exc_info,
                    _readable,
                    structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
                    lambda _logger, _name, line: without(self._secrets, str(line)),
                ],
            )
        )
        logging.getLogger(_PACKAGE).addHandler(handler)
        logger = logging.getLogger(f"{_PACKAGE}.run")
        logger.setLevel(logging.INFO)
        self._log = structlog.wrap_logger(
            logger,
            wrapper_class=structlog.stdlib.BoundLogger,
            processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        )
        self._handler = handler
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Log what ended the run, if something did, and close the file; another process' run did not end."""
        if self._log is not None and error is not None and not isinstance(error, LeaseHeldError):
            self._log.error("run_ended", exc_info=error)
        if self._handler is not None:
            logging.getLogger(_PACKAGE).removeHandler(self._handler)
            with suppress(OSError):  # what a full disk did not take is tried once more here
                self._handler.close()
        self._handler = self._log = None

    def on_event(self, event: events.Event) -> None:
        """Write one line."""
        if self._log is None or isinstance(event, _QUIET):
            return
        self._log.log(_level(event), event.kind, campaign=event.campaign, **event.payload())


class _QuietFile(RotatingFileHandler):
    """Says nothing where it cannot write: a full disk is told about elsewhere."""

    def shouldRollover(self, record: logging.LogRecord) -> bool:  # noqa: ARG002
        """Look at what is written; the standard look formats the record once more."""
        return self.stream is not None and self.stream.seekable() and self.stream.tell() >= self.maxBytes

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the line."""


def _level(event: events.Event) -> int:
    if isinstance(event, events.Stopped):
        return logging.ERROR
    failed = isinstance(event, events.Decided) and event.outcome == "failed"
    return logging.WARNING if failed or isinstance(event, events.Fault | events.ProposalFailed) else logging.INFO


def _readable(_logger: WrappedLogger, _name: str, line: EventDict) -> EventDict:
    """Put first what people look for first."""
    first = {key: line[key] for key in ("at", "level", "event") if key in line}
    return {**first, **line}


def _at(_logger: WrappedLogger, _name: str, line: EventDict) -> EventDict:
    from overnight.store import clock

    return {"at": clock.utc_text(clock.time()), **line}
