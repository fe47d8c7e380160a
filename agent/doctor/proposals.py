"""Asking each of a campaign's proposers for one real proposal, on the prompt that the next turn would show it."""

from __future__ import annotations

from collections.abc import Iterator

from overnight.agent.contest import seated
from overnight.agent.doctor.finding import Finding, amiss, note, ok
from overnight.agent.propose import StoredHistory
from overnight.agent.proposers.protocol import Answer, Ask, Proposer
from overnight.agent.runtime import Runtime
from overnight.agent.turns import open_moves, turn_prompt
from overnight.rails.gate import Verdict, check_reply
from overnight.store.errors import CampaignError, ProposerError
from overnight.store.protocol import CampaignState


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


def ask_all(runtime: Runtime, state: CampaignState, latencies: dict[str, float]) -> Iterator[Finding]:
    """Ask every proposer, as it takes part now; what each took goes into `latencies`, in seconds."""
    ask = next_ask(runtime, state)
    if ask is None:
        yield note("proposals", "every legal change was tried", "widen the menu, or start anew with `--fresh`")
        return
    rails = runtime.rails(state)
    for name in runtime.proposers:
        proposer, what = seated(runtime, state, name), f"proposer {name}"
        try:
            answer = proposer.propose(ask)
        except ProposerError as error:
            hint = "" if "; " in str(error) else f"start what should answer, or correct `[proposers.{name}]`"
            yield amiss(what, error, hint)
            continue
        except CampaignError as error:
            yield amiss(what, error)
            continue
        latencies[name] = answer.latency_s
        verdict = check_reply(answer.reply, menu=ask.menu, baseline=ask.baseline, rails=rails)
        yield _judged(runtime, what, proposer, answer, verdict)


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
