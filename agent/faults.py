"""What went wrong outside, and for how long: each fault is one row when it begins and one when it is over.

Some faults a campaign works around (a proposer that is away: the fallback has the turn), others it waits out: `hold`
stands still for a growing interval, seen in `status` and ended by a pause, and returns for another try. A fault that
outlasts `GIVE_UP_S` stops the campaign. What had been committed is never touched.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from overnight.agent.events import Fault, FaultOver
from overnight.agent.signals import PauseRequested
from overnight.agent.state import BudgetSpent
from overnight.store import clock
from overnight.store.errors import LeaseLostError, OvernightError, StoreError

if TYPE_CHECKING:
    from overnight.agent.runtime import Runtime

FIRST_HOLD_S = 5.0
LONGEST_HOLD_S = 300.0
"""A disk that has room again, or a GPU that is free again, is noticed within five minutes."""
GIVE_UP_S = 12 * 3600.0
"""A fault that outlasts a night is not waited out."""
SLICE_S = 5.0
"""How often a pause is looked for, and the lease renewed."""
MAX_DETAIL = 500


class FaultLog:
    """The faults of one running campaign that are not over."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._since: dict[str, float] = {}
        self._holds: dict[str, int] = {}

    def noted(self, what: str, detail: str, *, iteration: int | None = None) -> None:
        """Record a fault that is over as soon as it is seen."""
        self._emit(what, detail, iteration, waits=False)

    def began(self, what: str, detail: str, *, iteration: int | None = None, waits: bool = False) -> None:
        """Record that a fault began; one that goes on is not recorded again."""
        if what not in self._since:
            self._since[what] = clock.time()
            self._emit(what, detail, iteration, waits=waits)

    def over(self, what: str) -> None:
        """Record that a fault is over, if it began."""
        self.tell_over(what)
        self.forget(what)

    def tell_over(self, what: str) -> None:
        """Emit that a fault is over, if it began; it is, once the transaction around this is committed."""
        since = self._since.get(what)
        if since is not None:
            wall_s = clock.time() - since
            self._runtime.emit(
                FaultOver(campaign=self._runtime.name, what=what, since=clock.utc_text(since), wall_s=wall_s)
            )

    def forget(self, what: str) -> None:
        """Know no more of a fault that was told to be over."""
        self._since.pop(what, None)
        self._holds.pop(what, None)

    def hold(self, what: str, error: OvernightError, *, last: bool = False) -> None:
        """Stand still for a while, longer each time, before what failed is tried again.

        Args:
            what: the fault's name; one of the `storage` is waited out past the campaign's end, which is written too.
            error: what went wrong.
            last: nothing but the look at the holdout is left to do, so that it may have all the time there is.

        Raises:
            PauseRequested: a pause was asked for meanwhile, or the time asked for in this run is over.
            BudgetSpent: the campaign's time is over, but for what the look at the holdout takes.
            OvernightError: `error`, when the fault has lasted too long, or nobody wants it waited out.
        """
        if not self._runtime.waits_out_faults:
            raise error
        self.began(what, str(error), waits=True)
        left = math.inf if what == "storage" else self._time_left(last)
        if left <= 0:
            until = self._runtime.until
            raise PauseRequested if until is not None and self._runtime.clock() >= until else BudgetSpent("until")
        if clock.time() - self._since[what] > GIVE_UP_S:
            raise error
        holds = self._holds.get(what, 0)
        self._holds[what] = holds + 1
        self._stand_still(min(FIRST_HOLD_S * 2.0 ** min(holds, 16), LONGEST_HOLD_S, left))

    def _time_left(self, last: bool) -> float:
        """Return the seconds until the campaign, or this run, has to come to its end; inf where nobody can tell."""
        from overnight.agent.budget import time_left

        try:
            return time_left(self._runtime, self._runtime.state(), last=last)
        except StoreError:
            return math.inf

    def _stand_still(self, seconds: float) -> None:
        until = clock.time() + seconds
        while (left := until - clock.time()) > 0:
            if self._pause_wanted():
                raise PauseRequested
            with self._runtime.waiting():
                clock.sleep(min(left, SLICE_S))
            self._runtime.renew()

    def _pause_wanted(self) -> bool:
        try:
            return self._runtime.pause_wanted() is not None
        except LeaseLostError:
            raise
        except StoreError:  # the store itself may be what is at fault
            return False

    def _emit(self, what: str, detail: str, iteration: int | None, *, waits: bool) -> None:
        self._runtime.emit(
            Fault(campaign=self._runtime.name, what=what, detail=detail[:MAX_DETAIL], iteration=iteration, waits=waits)
        )
