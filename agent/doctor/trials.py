"""Trying the trainer: its data, the baseline, and two steps of the largest configuration that the menu allows.

The largest is looked for by the trainer's own estimate of memory: each knob that needs more of it at its upper end is
put there, and lowered a step at a time until constraints hold and the machine can run it. A trainer that cannot
estimate, or does not stop after two steps, is tried at the defaults, for a whole trial.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from overnight.agent.calibrate import changed_environment, check_same_trainer, is_calibrated, remedy_of
from overnight.agent.doctor.finding import Finding, amiss, note, ok
from overnight.agent.measure import calibration_seeds, last_line
from overnight.agent.pace import in_words
from overnight.agent.run import prepared
from overnight.agent.runtime import Runtime
from overnight.rails.menu import Menu
from overnight.store.errors import CampaignError, OvernightError
from overnight.store.protocol import CampaignState
from overnight.store.records import Config, KnobValue, TrialProgress, TrialRequest, TrialResult

TRIED_STEPS = 2


@dataclass(frozen=True, slots=True)
class Tried:
    """How a trial went that was cut short."""

    config: Config
    result: TrialResult
    whole_s: float
    """What a whole trial would take, in seconds."""


def prepare(runtime: Runtime, state: CampaignState) -> Iterator[Finding]:
    """Prepare the trainer: build its data, find its device; `runtime.info` is None afterwards where that failed.

    Both are compared with those that the campaign's trials ran with.
    """
    try:
        runtime.info = prepared(runtime.campaign, runtime.trainer)
    except OvernightError as error:
        yield amiss("trainer", error)
        return
    info = runtime.info
    holdout = "a holdout kept aside" if info.has_holdout and info.holdout_data else "no holdout data"
    yield ok("data", f"{info.data or f'hash {info.data_hash[:12]}'}; {holdout}")
    yield ok("device", ", ".join(f"{key} {value}" for key, value in info.environment.items()))
    try:
        check_same_trainer(runtime, state)
    except CampaignError as error:
        yield amiss("trainer", error)
        return
    if state.baseline_config_id is not None and not is_calibrated(runtime, state):
        changed = ", ".join(changed_environment(runtime, state))
        yield note("environment", f"changed since the last run: {changed}", "the run measures the baseline anew first")


def moves(runtime: Runtime) -> Finding:
    """Say how many first changes there are, and which of them this machine cannot run."""
    menu, rail = runtime.campaign.menu, runtime.capability()
    all_moves = list(menu.moves(menu.default))
    blocked = {f"{move.knob} = {move.value}": rail.problem(menu.apply(menu.default, move)) for move in all_moves}
    reasons = [f"{move}: {why}" for move, why in blocked.items() if why is not None]
    if not reasons:
        return ok("menu", f"{len(all_moves)} first changes, all of which this machine can run")
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    first = reasons[0].rpartition("; ")[0] or reasons[0]
    found = f"{len(reasons)} of {len(all_moves)} first changes are beyond this machine: {first}{more}"
    return note("menu", found, "`R7_capability` blocks them; leave them off the menu to spare the proposer")


def largest(runtime: Runtime) -> Config | None:
    """Return the largest configuration that constraints and machine allow; None where the trainer cannot tell."""
    menu, trainer, rail = runtime.campaign.menu, runtime.trainer, runtime.capability()
    first = trainer.estimate_memory(menu.default)
    ladders = _ladders(menu)
    growing: dict[str, list[KnobValue]] = {}
    for knob, ladder in ladders.items():
        estimate = trainer.estimate_memory({**menu.default, knob: ladder[-1]})
        if first is not None and estimate is not None and estimate > first:
            growing[knob] = ladder
    if not growing:
        return None
    config = {**menu.default, **{knob: ladder[-1] for knob, ladder in growing.items()}}

    def runs(candidate: Config) -> bool:
        return menu.broken_constraint(candidate) is None and rail.problem(candidate) is None

    while not runs(config):
        lower = [
            {**config, knob: ladder[ladder.index(config[knob]) - 1]}
            for knob, ladder in growing.items()
            if ladder.index(config[knob]) > 0
        ]
        if not lower:
            return None
        # Of those that run the largest; while none does, the smallest: it comes to one soonest.
        sizes = [(runs(each), trainer.estimate_memory(each) or 0) for each in lower]
        found = max(range(len(lower)), key=lambda i: (sizes[i][0], sizes[i][1] if sizes[i][0] else -sizes[i][1]))
        config = lower[found]
    return config


def _ladders(menu: Menu) -> dict[str, list[KnobValue]]:
    """Return each numeric knob's values from its default up."""
    found = {}
    for knob in menu.knobs:
        if knob.type != "str":
            above = [value for value in knob.grid() if float(value) > float(knob.default)]
            if above:
                found[knob.name] = [knob.default, *sorted(above, key=float)]
    return found


def try_config(runtime: Runtime, config: Config) -> Tried:
    """Run two steps of a configuration, or a whole trial where the trainer does not stop by then.

    A first trial warms the worker up and says little about the time of the next, so two steps are run twice.

    Raises:
        OvernightError: the worker cannot be started.
    """
    steps: list[TrialProgress] = []
    section = runtime.campaign.file.budget
    request = TrialRequest(
        config, calibration_seeds(runtime)[0], timeout_s=section.trial_timeout_s, max_steps=TRIED_STEPS
    )
    result = runtime.trainer.run(request, steps.append)
    if result.failure is None and steps and steps[-1].step <= TRIED_STEPS:
        steps.clear()
        result = runtime.trainer.run(request, steps.append)
    return Tried(config, result, _whole_s(runtime, result, steps))


def _whole_s(runtime: Runtime, result: TrialResult, steps: list[TrialProgress]) -> float:
    """Return what a whole trial takes, from one that was cut short: its steps take longer, the rest does not."""
    done = steps[-1].step if steps else 0
    trained = result.wall_s if result.train_s is None else result.train_s
    seconds = runtime.campaign.file.trainer.get("seconds")
    if not done:
        return result.wall_s
    if steps[-1].steps is None and isinstance(seconds, int | float):
        return result.wall_s - trained + seconds
    return result.wall_s - trained + trained / done * max(steps[-1].steps or done, done)


def baseline(runtime: Runtime, tried: Tried) -> Finding:
    """Say how a trial of the defaults went: without one that is over in time the campaign cannot start."""
    problem = _problem(runtime, tried)
    failure = tried.result.failure or "timeout"
    return ok("baseline", _said(tried)) if problem is None else amiss("baseline", problem, remedy_of(failure))


def biggest(runtime: Runtime, tried: Tried) -> Finding:
    """Say how a trial of the largest configuration went; one that fails costs a turn, no campaign."""
    brief = _in_brief(tried.config, runtime.campaign.menu)
    problem = _problem(runtime, tried)
    if problem is None:
        return ok("largest", f"{brief}: {_said(tried)}")
    return note("largest", f"{brief}: {problem}", "take the largest values off the menu to spare such turns")


def _problem(runtime: Runtime, tried: Tried) -> str | None:
    limit = runtime.campaign.file.budget.trial_timeout_s
    if tried.result.failure is not None:
        return f"failed ({tried.result.failure}): {last_line(tried.result.trace)}"
    return f"{_said(tried)}: more than `trial_timeout_s` = {limit:g}" if tried.whole_s > limit else None


def _said(tried: Tried) -> str:
    peak = tried.result.peak_memory_gib
    memory = "" if peak is None else f", {peak:.2g} GiB at its peak"
    return f"a whole trial takes about {in_words(tried.whole_s)}{memory}"


def _in_brief(config: Config, menu: Menu) -> str:
    """Return what a configuration changes about the defaults."""
    changed = [f"{knob} {value}" for knob, value in config.items() if value != menu.default[knob]]
    return ", ".join(changed) or "the defaults"
