"""Asking each of a campaign's proposers for one real proposal, on the prompt that the next turn would show it.

Asked are those of the campaign file, and those who really propose: a champion that was promoted, and the challenger
with its newest or its inherited adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from overnight.agent.contest import Unusable, label_of, seated, standing, with_adapter
from overnight.agent.doctor.finding import Finding, amiss, note, ok
from overnight.agent.inherit import inherited_adapter
from overnight.agent.propose import StoredHistory
from overnight.agent.proposers.protocol import Answer, Ask, Proposer
from overnight.agent.proposers.student import StudentProposer
from overnight.agent.runtime import Runtime
from overnight.agent.turns import open_moves, turn_prompt
from overnight.rails.gate import Verdict, check_reply
from overnight.store.errors import CampaignError, ProposerError
from overnight.store.protocol import CampaignState, TrajectoryStore


def next_ask(runtime: Runtime, state: CampaignState) -> Ask | None:
    """Return what the next turn would ask; None where every legal change was tried."""
    store, menu = runtime.store, runtime.campaign.menu
    baseline = menu.default if state.baseline_config_id is None else store.config_of(state.baseline_config_id)
    open_now = open_moves(runtime, state, baseline)
    if not open_now:
        return None
    position = store.next_stage(state.id)
    prompt = turn_prompt(
        runtime,
        state,
        baseline=baseline,
        baseline_metric=None,
        totals=store.knob_totals(state.id),
        turns=position.iteration - 1,
    )
    return Ask(
        iteration=position.iteration,
        prompt=prompt,
        menu=menu,
        direction=runtime.campaign.file.metric.direction,
        baseline=baseline,
        baseline_metric=None,
        moves=open_now,
        history=StoredHistory(store, state.id),
        seed=runtime.draw_seed("doctor", position.iteration),
    )


def ask_all(
    runtime: Runtime, state: CampaignState, latencies: dict[str, float], *, others: TrajectoryStore | None = None
) -> Iterator[Finding]:
    """Ask every proposer, as it takes part now.

    Args:
        runtime: the campaign.
        state: where it stands.
        latencies: what each took, in seconds, is put here; the champion's under the name that the file gives it.
        others: the store of the other campaigns, where it is not the runtime's: the campaign is new there.
    """
    ask = next_ask(runtime, state)
    if ask is None:
        yield note("proposals", "every legal change was tried", "widen the menu, or start anew with `--fresh`")
        return
    asked = {f"proposer {name}": seated(runtime, state, name) for name in runtime.proposers}
    labels = {label_of(proposer) for proposer in asked.values()}
    champion, challenger = None, None
    try:
        champion, challenger = _contestants(runtime, state, others)
    except CampaignError as error:
        yield amiss("challenger", error)
    for proposer in (champion, challenger):
        if proposer is not None and label_of(proposer) not in labels:
            asked[f"proposer {label_of(proposer)}"] = proposer
    rails = runtime.rails(state)
    for what, proposer in asked.items():
        try:
            answer = proposer.propose(ask)
        except ProposerError as error:
            yield amiss(what, error, _remedy(proposer, error))
            continue
        except CampaignError as error:
            yield amiss(what, error)
            continue
        latencies[runtime.campaign.champion if proposer is champion else proposer.name] = answer.latency_s
        verdict = check_reply(answer.reply, menu=ask.menu, baseline=ask.baseline, rails=rails)
        yield _judged(runtime, what, proposer, answer, verdict)


def _remedy(proposer: Proposer, error: ProposerError) -> str:
    """Return what helps where the error does not say it itself."""
    if isinstance(proposer, Unusable):
        return "put its adapter back; `overnight distill` makes a new one, `overnight promote` another champion"
    return "" if "; " in str(error) else f"start what should answer, or correct `[proposers.{proposer.name}]`"


def _contestants(
    runtime: Runtime, state: CampaignState, others: TrajectoryStore | None
) -> tuple[Proposer | None, Proposer | None]:
    """Return who is champion and who challenges, where what the file names for them could be built.

    Raises:
        CampaignError: what the challenger should inherit is not there.
    """
    named = runtime.campaign.file.router.challenger
    if any(name is not None and name not in runtime.proposers for name in (runtime.campaign.champion, named)):
        return None, None
    if others is None:
        now = standing(runtime, state)
        return now.champion, None if now.challenge is None else now.challenge.proposer
    student = None if named is None else runtime.proposers[named]
    if not isinstance(student, StudentProposer):
        return None, None
    inherited = inherited_adapter(replace(runtime, store=others), None)
    return None, None if inherited is None else with_adapter(runtime, student, *inherited)


def _judged(runtime: Runtime, what: str, proposer: Proposer, answer: Answer, verdict: Verdict) -> Finding:
    said = f"answered in {answer.latency_s:.2f} s{_how(answer)}"
    if not verdict.passed:
        hint = "one blocked reply is no fault: it is told why; a model that fails often wants structured output"
        return note(what, f"{said}, blocked by {verdict.rail}: {verdict.reason[:300]}", hint)
    limit = runtime.campaign.file.router.max_latency_s
    if proposer.name == runtime.campaign.file.router.challenger and answer.latency_s > limit:
        return note(what, f"{said}: too slow to be promoted", f"raise `router.max_latency_s` above {limit:g}")
    return ok(what, f"{said}: {_change(verdict)}")


def _how(answer: Answer) -> str:
    mode = answer.settings.get("structured")
    if mode is None:
        return ""
    return ", free text (no structured output here)" if mode == "none" else f", structured ({mode})"


def _change(verdict: Verdict) -> str:
    assert verdict.diff is not None
    return ", ".join(f"{knob} {old} -> {new}" for knob, (old, new) in verdict.diff.items())
