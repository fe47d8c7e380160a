"""The headline of a report, in words: what was found, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Iterator

from overnight.report.analysis import Analysis, Turn
from overnight.store.records import gain_text

CLOSE = 3.0
"""A threshold below so many standard deviations of a difference is within reach of noise (single runs)."""
MANY_REPEATS = 0.3
OFTEN = 3
"""A change proposed so often is worth naming."""
MIN_HOURS = 0.01
"""Below it a gain per hour says nothing."""


def headline(found: Analysis) -> str:
    """Return one sentence: what came of it."""
    stats = found.stats
    turns = _count(stats["iterations"], "turn")
    if not found.best_so_far:
        return f"{turns}, nothing kept: no change beat the baseline beyond its noise."
    turn, metric = found.best_so_far[-1]
    best = next(each for each in found.turns if each.iteration == turn)
    gain = found.total_gain
    better = "" if gain is None else f", {gain_said(found, gain).lstrip('+')} better than the first baseline"
    return (
        f"{turns}, {stats['kept']} kept. Best: {best.knob} = {best.new_value} in turn {turn}, "
        f"{stats['metric_name']} {metric:.6g}{better}.{_doubt(found)}"
    )


def _doubt(found: Analysis) -> str:
    """Say in the headline already that the keeps may be luck, where they may."""
    if found.holdout is not None and found.holdout.get("gain_low", 0.0) > 0:
        return ""
    if found.kept_configs and len(found.contradicted) == found.kept_configs:
        return " Do not trust it yet: everything that was kept was also reverted when measured again."
    return " Do not trust it yet: noise alone could explain it." if is_within_noise(found) else ""


def is_within_noise(found: Analysis) -> bool:
    """Whether single runs were compared at a threshold that noise reaches."""
    rule = (found.spec.get("decision") or {}).get("rule")
    return found.noise is not None and rule == "single_shot" and found.noise.ratio < CLOSE


def findings(found: Analysis) -> list[str]:
    """Return what a reader should know, the most important first."""
    return [
        sentence
        for part in (_trust, _luck, _contradictions, _holdout, _contest, _search, _cost)
        for sentence in part(found)
    ]


def _trust(found: Analysis) -> Iterator[str]:
    noise, kept = found.noise, found.stats["kept"]
    if noise is None:
        yield "The noise of a run is not known here, so nothing says which keeps are luck."
        return
    rule = (found.spec.get("decision") or {}).get("rule")
    share = f" ({noise.sd / abs(found.baseline_metric):.2%} of the metric)" if found.baseline_metric else ""
    yield f"Noise: the same configuration run again scatters with a standard deviation of {noise.sd:.3g}{share}."
    if rule != "single_shot":
        yield (
            f"Keeps were confirmed on paired seeds. If no change did anything, {_at_most(noise.explained)} would be "
            f"expected; {kept} were kept."
        )
        return
    yield (
        f"A change was kept when ONE run beat the baseline by {noise.threshold:.3g}: only {noise.ratio:.1f} standard "
        f"deviations of a difference of two runs. If no change did anything, about {noise.explained:.1f} keeps would "
        f"be expected, and a baseline that was itself an unlucky run makes it more; {kept} were kept."
    )
    if is_within_noise(found):
        yield (
            "So this search could hardly tell progress from noise: single runs were compared at a threshold that noise "
            "reaches. Confirming on paired seeds, or a larger threshold, would."
        )


def _at_most(keeps: float) -> str:
    return "no keep" if keeps < 0.05 else f"at most {keeps:.1f} keeps"


def _luck(found: Analysis) -> Iterator[str]:
    again = found.winner_replicates
    if again is None or not found.best_so_far:
        return
    mean_gain, gain = found.gain_of(again.mean), found.total_gain
    if mean_gain is not None and gain is not None and mean_gain < gain:
        yield (
            f"The winner flatters: over all {len(again.metrics)} runs of its configuration ({again.label}) the mean is "
            f"{again.mean:.6g}, a gain of {gain_said(found, mean_gain)}, not {gain_said(found, gain)}."
        )


def _contradictions(found: Analysis) -> Iterator[str]:
    again = found.contradicted
    if not again:
        return
    names = "; ".join(f"{each.label} kept {each.kept}x, reverted {each.reverted}x" for each in again[:5])
    which = "Every configuration" if len(again) == found.kept_configs else f"{len(again)} of {found.kept_configs}"
    subject = "that was kept was" if len(again) == found.kept_configs else "configurations that were kept were"
    yield f"{which} {subject} also reverted when measured again: {names}."


def _holdout(found: Analysis) -> Iterator[str]:
    looked = found.holdout
    if looked is None:
        yield "No locked holdout was measured."
    elif "gain_low" in looked:
        low, high = looked["gain_low"], looked["gain_high"]
        verdict = "holds" if low > 0 else "is not certain"
        where = "Locked holdout" if looked.get("fresh_data", True) else "Fresh seeds, on data that decisions saw"
        yield (
            f"{where}: the gain {verdict}: {gain_said(found, looked['gain'])}, 95% interval "
            f"{gain_said(found, low)} to {gain_said(found, high)}, {looked['seeds']} paired seeds."
        )
    else:
        yield f"Locked holdout: not measured: {looked.get('reason', 'no reason given')}."


def _contest(found: Analysis) -> Iterator[str]:
    """Say who proposes since when, and why nobody else took over yet."""
    switches, weighed = found.promotions, found.weighed
    if switches:
        last = switches[-1]
        what = "took over from" if last["kind"] == "promotion" else "came back in the place of"
        yield (
            f"{last['to_proposer']} {what} {last['from_proposer']} after turn {last['iteration']} "
            f"(decided by: {last['decided_by']}): {last['reason']}."
        )
    if weighed and (not switches or weighed[-1]["iteration"] > switches[-1]["iteration"]):
        now = weighed[-1]
        yield f"No promotion of {now['challenger']} over {now['champion']} yet: {now['words']}."


def _search(found: Analysis) -> Iterator[str]:
    stats, top = found.stats, found.top_pair
    rate = stats["repeat_rate"]
    if rate is not None:
        many = " The search went in circles." if rate >= MANY_REPEATS else ""
        often = ""
        if top is not None and top["proposed"] >= OFTEN:
            often = f"; {top['knob']} = {top['new_value']} alone was proposed {top['proposed']} times"
            often += f" ({found.top_pair_share:.0%})"
        yield (
            f"{stats['repeats']} of {stats['repeats'] + stats['distinct_pairs']} proposals ({rate:.0%}) repeated a "
            f"(knob, value) already tried{often}.{many}"
        )
    if found.failure_repeats:
        yield f"{found.failure_repeats} proposals repeated a change that had already failed."
    touched = stats["knobs_touched"]
    if stats["knobs_on_menu"]:
        missed = f"; never tried: {', '.join(found.untouched)}" if found.untouched else ""
        yield f"{touched} of {stats['knobs_on_menu']} knobs were ever touched{missed}."
    else:
        of = f" of the {len(found.first_baseline)} settings in its configuration" if found.first_baseline else ""
        yield f"{touched} knobs were ever touched{of}; its menu is not known (`overnight import --campaign DIR`)."


def _cost(found: Analysis) -> Iterator[str]:
    hours = f"{found.gpu_hours:.2f} hours in trials"
    energy = "energy was not measured" if found.energy_kwh is None else f"{found.energy_kwh:.3g} kWh"
    pays = []
    if found.gain_per_gpu_hour is not None and found.gpu_hours >= MIN_HOURS:
        pays.append(f"{gain_said(found, found.gain_per_gpu_hour)} a GPU-hour")
    if found.gain_per_kwh is not None:
        pays.append(f"{gain_said(found, found.gain_per_kwh)} a kWh")
    gained = f"; gain {' and '.join(pays)}" if pays else ""
    yield f"Cost: {hours}, {energy}{gained}."
    first, best = found.seconds_to_first_keep, found.seconds_to_best
    if first is not None and best is not None:
        yield f"The first keep came after {duration(first)}, the best after {duration(best)}."


def gain_said(found: Analysis, gain: float | None) -> str:
    """Return a gain of this campaign as people read it."""
    return gain_text(gain, found.gain_kind)


def best_kept(found: Analysis) -> list[Turn]:
    """Return the kept turns, the best gains first."""
    kept = [turn for turn in found.turns if turn.outcome == "kept"]
    return sorted(kept, key=lambda turn: -(turn.gain if turn.gain is not None else -1e9))


def duration(seconds: float) -> str:
    """Return seconds as people read them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
