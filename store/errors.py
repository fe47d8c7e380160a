"""Every error that `overnight` raises on purpose.

The tree (an exit code of the command line in brackets)::

    OvernightError
    ├── InputError            [2]  wrong use or bad input: what, where, the remedy
    │   ├── CampaignError          a campaign file that cannot be run
    │   ├── NotAllowedError        it wants something that nobody has allowed it
    │   ├── MenuError              a knob, a value or a constraint that makes no sense
    │   ├── CorpusRefusedError     a history that cannot teach yet
    │   └── QueryError             SQL that is wrong or not allowed
    ├── StoreError            [3]  the database cannot be used
    │   ├── SchemaError            it is older or newer than this code
    │   ├── StorageFaultError      the disk or the server is at fault for now: the same may work later
    │   ├── LeaseHeldError    [2]  another process is writing this campaign
    │   └── LeaseLostError         this process was replaced as the writer
    └── OutsideError          [3]  an endpoint, a device or a disk is at fault
        ├── TrainerError           the trainer cannot start or cannot measure its baseline
        └── ProposerError          a proposer cannot answer (its class says how)

Nothing below the command line turns these into text on a terminal; a message names the thing in backticks, says what
was wrong, where, and what to do next.
"""

from __future__ import annotations

from typing import Literal


class OvernightError(Exception):
    """Root of every error raised on purpose."""


class InputError(OvernightError):
    """Wrong use or bad input; nothing was written."""


class CampaignError(InputError):
    """A campaign file that cannot be run; the message names file, key and remedy."""


class NotAllowedError(InputError):
    """A campaign file wants a command, a plugin, a path or a key that nobody has allowed it; names each."""


class MenuError(InputError):
    """A knob, a value or a constraint that makes no sense."""


class CorpusRefusedError(InputError):
    """A history that cannot teach yet; the message says what is missing and what to run to mend it."""


class QueryError(InputError):
    """SQL that is wrong, not a single read, or cut by a limit."""


class StoreError(OvernightError):
    """The database cannot be used."""


class SchemaError(StoreError):
    """The database is older or newer than this code; the message names `overnight db upgrade`."""


class StorageFaultError(StoreError):
    """The disk or the database server is at fault for now; nothing of the transaction is there, repeat it later."""


class LeaseHeldError(StoreError):
    """Another process is writing this campaign; the message says who, and since when."""


class LeaseLostError(StoreError):
    """This process was replaced as the campaign's writer; nothing of the refused transaction was written."""


class OutsideError(OvernightError):
    """Something outside this program is at fault: an endpoint, a device, a disk."""


class TrainerError(OutsideError):
    """The trainer cannot start, or cannot measure the baseline."""


class ProposerError(OutsideError):
    """A proposer could not answer in time (`llm_timeout`) or at all (`llm_error`)."""

    def __init__(self, message: str, *, failure: Literal["llm_timeout", "llm_error"]) -> None:
        super().__init__(message)
        self.failure = failure
