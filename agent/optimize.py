"""`optimize`: a Python function in, a campaign's result out.

It is a campaign like any other, with the function as its trainer: calibrated, confirmed on paired seeds, recorded turn
by turn. It blocks until the campaign is over, in any thread, inside a running event loop too.
"""

from __future__ import annotations

import logging
import re
import shutil
import signal
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from overnight.agent.campaign import Campaign
from overnight.agent.events import Hooks
from overnight.agent.knobs import KnobSpec
from overnight.agent.proposers.protocol import Proposer
from overnight.agent.result import Result, read_result
from overnight.store.records import Direction, GainKind
from overnight.trainer.function import Objective, check_signature, name_of

LOG = logging.getLogger(__name__)
Search = Literal["tpe", "gp", "cmaes", "random"]
FALLBACK = "random"


def optimize(
    fn: Objective,
    knobs: Mapping[str, KnobSpec],
    *,
    iterations: int,
    direction: Direction = "min",
    gain: GainKind = "relative",
    min_gain: float = 0.0,
    metric: str = "value",
    proposer: Search | Mapping[str, object] | Proposer = "tpe",
    constraints: Sequence[str] = (),
    timeout_s: float = 600.0,
    seed: int = 0,
    name: str | None = None,
    db: str | Path | None = None,
    version: str = "",
    settings: Mapping[str, Mapping[str, object]] | None = None,
    hooks: Sequence[Hooks] = (),
    progress: bool = False,
) -> Result:
    """Search for a better configuration of a function, and say how much better it really is.

    The function runs in a process of its own, one trial at a time: a trial that raises, returns no number, takes all
    memory, hangs or kills its process is recorded as failed, and the next one runs. Ctrl-C pauses after the trial
    under way and returns what there is.

    Args:
        fn: takes a configuration (a dict) and a seed, and returns the metric. With a third parameter called `split` it
            is told `val` or `holdout`, and can measure the final gain on data that no decision saw.
        knobs: what may change: `Float`, `Int`, `Choice`, or `(low, high)`, `(low, high, "log")`, a list of values.
            The campaign starts from their defaults.
        iterations: turns, of one proposed change each; a turn takes one trial or, where it looks good, several.
        direction: whether less or more is better.
        gain: `relative` to the baseline's metric, or `absolute`.
        min_gain: smallest gain that is kept; 0 keeps whatever is really better.
        metric: what the returned number is called.
        proposer: an Optuna sampler, `random`, the table of a `[proposers.<name>]`, or a `Proposer`.
        constraints: rules that every configuration keeps, such as `"d_model % n_head == 0"`.
        timeout_s: a trial that takes longer is killed and recorded as failed.
        seed: every draw derives from it.
        name: the campaign's name; the function's, if left out.
        db: a SQLite file or a PostgreSQL URL; the same call with the same one goes on where it stopped. None: a
            temporary file that is deleted with the result.
        version: change it when what the function calls changed so that old and new results do not compare.
        settings: further tables of a campaign file, such as `{"budget": {"patience": 20}}`.
        hooks: consumers of the typed events.
        progress: show the campaign as it runs.

    Raises:
        InputError: the function cannot be called with (config, seed), or cannot be sent to another process.
        CampaignError: a knob or a setting is wrong, or the baseline does not run; the message says what to change.
        TrainerError: the baseline, which ran before, fails now.
    """
    check_signature(fn)
    proposers, table = _proposers(proposer)
    trainer = {"version": version} if version else {}
    tables: dict[str, dict[str, Any]] = {
        "campaign": {"name": name or _name_for(fn), "trainer": "function", "seed": seed},
        "metric": {"name": metric, "direction": direction, "gain": gain},
        "budget": {"iterations": iterations, "trial_timeout_s": float(timeout_s)},
        "decision": {"min_gain": float(min_gain)},
        "trainer": trainer,
        "knobs": dict(knobs),
        "proposers": table,
        "router": {"champion": next(iter(table))},
    }
    for section, keys in (settings or {}).items():
        tables[section] = {**tables.get(section, {}), **keys}
    rules: dict[str, object] = {
        "constraints": [{"id": f"constraint_{n}", "rule": rule} for n, rule in enumerate(constraints, 1)]
    }
    campaign = Campaign.from_dict({**tables, **(rules if constraints else {})})
    folder = None if db is not None else tempfile.mkdtemp(prefix="overnight-")
    if folder is not None:
        _TEMPORARY[folder] = 0
    try:
        where = str(db) if folder is None else f"{folder}/overnight.db"
        result = _run(campaign, fn, where, proposers=proposers, hooks=hooks, progress=progress)
    except BaseException:  # raised on: Ctrl-C too leaves no temporary database behind
        if folder is not None:
            del _TEMPORARY[folder]
            shutil.rmtree(folder, ignore_errors=True)
        raise
    _keep_while_used(result, folder or str(Path(where).parent))
    return result


_TEMPORARY: Counter[str] = Counter()
"""How many results read each temporary folder: it goes with the last, as a later call may have gone on in it."""


def _keep_while_used(result: Result, folder: str) -> None:
    if folder in _TEMPORARY:
        _TEMPORARY[folder] += 1
        weakref.finalize(result, _let_go, folder)


def _let_go(folder: str) -> None:
    _TEMPORARY[folder] -= 1
    if not _TEMPORARY[folder]:
        del _TEMPORARY[folder]
        shutil.rmtree(folder, ignore_errors=True)


def _proposers(proposer: Search | Mapping[str, object] | Proposer) -> tuple[dict[str, Proposer] | None, dict[str, Any]]:
    """Return proposers to use as they are, or None, and the campaign's table of them."""
    if isinstance(proposer, str):
        kind = {"kind": "random"} if proposer == FALLBACK else {"kind": "optuna", "sampler": proposer}
        return None, {proposer: kind}
    if isinstance(proposer, Mapping):
        return None, {str(proposer.get("kind", "proposer")): dict(proposer)}
    return {proposer.name: proposer}, {proposer.name: {"kind": str(proposer.describe().get("kind", proposer.name))}}


def _name_for(fn: Objective) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "", name_of(fn)).lstrip("_.-")[:60].replace("lambda", "") or "optimize"


def _run(
    campaign: Campaign,
    fn: Objective,
    db: str,
    *,
    proposers: Mapping[str, Proposer] | None,
    hooks: Sequence[Hooks],
    progress: bool,
) -> Result:
    from overnight.agent.budget import is_over
    from overnight.agent.calibrate import check_same_trainer
    from overnight.agent.cli.progress import progress_hook
    from overnight.agent.run import open_runtime, prepared, run_campaign
    from overnight.agent.signals import PauseSwitch
    from overnight.store.sql_store import SqlStore

    with ExitStack() as stack:
        store = SqlStore.open(db, create=True)
        stack.callback(store.close)
        shown = [stack.enter_context(progress_hook(campaign))] if progress else []
        runtime = open_runtime(campaign, store, trainer=fn, proposers=proposers, hooks=[*hooks, *shown])
        stack.callback(runtime.close)
        runtime.waits_out_faults = False
        state = store.campaign(campaign.name)
        if state is not None and state.status == "finished" and is_over(runtime, state):
            runtime.info = prepared(campaign, runtime.trainer)
            check_same_trainer(runtime, state)
        else:
            switch = PauseSwitch(on_signal=lambda name: LOG.warning("%s: pausing after the current trial", name))
            with _listening(switch):
                run_campaign(runtime, switch=switch)
        return read_result(store, campaign, db)


@contextmanager
def _listening(switch: Any) -> Iterator[None]:
    """Let Ctrl-C pause, where it would otherwise raise a KeyboardInterrupt; a second one does."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, switch.receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
