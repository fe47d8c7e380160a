"""The flywheel's table and plot, from what lies in results/.

    python -P benchmarks/flywheel/summary.py        # writes flywheel.md and flywheel.svg beside it

Missing gain is the share of the possible gain that the held configuration still lacks, by the table's truth. Intervals
are 95% percentile intervals of a bootstrap that draws tasks, and campaign seeds within them, with replacement; ratios
draw both arms together, since they play the same campaigns.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import router
import within
from numpy.typing import NDArray
from resumed import stored
from tasks import TASKS
from world import table

HERE = Path(__file__).parent
POINTS = (5, 10, 25, 50, 100)
DRAWS = 2000
STUDENT, COMBINED = "outcome-greedy", "student+tpe"
RIVALS = ("tpe", "free-tpe", "zero-shot", "zero-shot-greedy", "random")
CHECKS = (
    ("random-again", "random"),
    ("cheat", "outcome-greedy"),
    ("shuffled-greedy", "outcome-greedy"),
    ("shuffled", "random"),
    ("clone", "outcome"),
    ("others", "outcome-greedy"),
)
"""Two copies of chance should not differ; who reads the table should win; shuffled lessons should teach nothing."""
Curves = NDArray[np.float64]
"""(tasks, seeds, proposals)"""
ROUTER_HEAD = (
    "| arm | campaigns | duels each | last e-value, median | promotions | right by the truth | rollbacks | right |",
    "|" + "---|" * 8,
)
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8d6a9f", "#e0a030", "#555555", "#00a5a5", "#a0522d")
SHOWN = ("outcome-greedy", "student+tpe", "zero-shot", "tpe", "free-tpe", "random", "others", "cheat")


def load() -> tuple[dict[str, Curves], dict[str, dict[str, float]]]:
    """Read every arm's curves and what it spent, for the tasks and seeds that all of its file has."""
    found: dict[str, dict[tuple[str, int], dict[str, object]]] = defaultdict(dict)
    for file in sorted((HERE / "results").glob("*.jsonl")):
        if not file.name.startswith(("within-", "router-")):
            for result in stored(file):
                found[result["arm"]][result["task"], result["seed"]] = result
    curves, spent = {}, {}
    for arm, results in found.items():
        seeds = sorted({seed for _, seed in results})
        if all((task.name, seed) in results for task in TASKS for seed in seeds):
            curves[arm] = np.array([[results[task.name, seed]["missing"] for seed in seeds] for task in TASKS])
            proposals = sum(len(result["configs"]) for result in results.values())
            spent[arm] = {
                name: sum(float(result.get(name, 0.0)) for result in results.values()) / proposals
                for name in ("trials", "repeats", "seconds", "model_seconds")
            }
            spent[arm]["knobs"] = float(np.mean([float(result["knobs"]) for result in results.values()]))
    return curves, spent


def resampled(curves: Curves, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of one bootstrap draw: tasks, and for each its seeds."""
    tasks, seeds = curves.shape[:2]
    return rng.integers(tasks, size=tasks), rng.integers(seeds, size=(tasks, seeds))


def measures(curves: Curves) -> dict[str, Curves]:
    """(tasks, seeds) of each measure: missing gain after some proposals, and its mean over the first 25."""
    found = {f"{point}": curves[:, :, point - 1] for point in POINTS if curves.shape[2] >= point}
    return {**found, "area to 25": curves[:, :, :25].mean(axis=2)}


def ratio(one: Curves, other: Curves, seed: int = 0) -> tuple[float, float, float]:
    """The ratio of two arms' mean missing gain with its interval; both (tasks, seeds)."""
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(DRAWS):
        tasks, seeds = resampled(one[:, :, None], rng)
        pick = tasks[:, None], seeds[tasks]
        draws.append(one[pick].mean() / other[pick].mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(one.mean() / other.mean()), float(low), float(high)


def wins(one: Curves, other: Curves) -> str:
    """On how many tasks the mean is lower."""
    return f"{int((one.mean(axis=1) < other.mean(axis=1)).sum())} of {len(one)}"


def markdown(curves: dict[str, Curves], spent: dict[str, dict[str, float]]) -> str:
    """The tables."""
    split = json.loads((HERE / "heldout.json").read_text())
    names = [task.name for task in TASKS]
    groups = {"all tasks": names, "`report` tasks": split["report"], "`tune` tasks": split["tune"]}
    lines = ["# The flywheel benchmark: what was measured", "", *_preamble(), ""]
    columns = [*map(str, POINTS), "area to 25"]
    lines += ["## Missing gain after N proposals", "", "| arm | " + " | ".join(columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for arm in sorted(curves, key=lambda arm: float(curves[arm][:, :, 9].mean())):
        found = measures(curves[arm])
        cells = [f"{found[column].mean():.3f}" if column in found else "" for column in columns]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    for title, chosen in groups.items():
        rows = [names.index(name) for name in chosen]
        lines += ["", f"## Ratios of missing gain, {title}", ""]
        lines += ["| | against | at 10 | area to 25 | at 50 | tasks won at 10 |", "|---|---|---|---|---|---|"]
        for one in (STUDENT, "outcome", COMBINED):
            for other in RIVALS:
                if one in curves and other in curves:
                    lines.append(_ratio_line(one, other, curves[one][rows], curves[other][rows]))
    lines += ["", "## Checks", "", "| | against | at 10 | area to 25 | at 50 | tasks won at 10 |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [_ratio_line(a, b, curves[a], curves[b]) for a, b in CHECKS if a in curves and b in curves]
    lines += [
        "",
        "## Spent per proposal",
        "",
        "| arm | trials | repeats | knobs touched | ms in the model | ms in all |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for arm, s in sorted(spent.items()):
        own = f"{1e3 * s['model_seconds']:.1f}" if s["model_seconds"] else ""
        lines.append(
            f"| {arm} | {s['trials']:.2f} | {s['repeats']:.3f} | {s['knobs']:.1f} | {own} | {1e3 * s['seconds']:.1f} |"
        )
    lines += [*_within(), *_router(), "", "## Tasks", "", *_tasks()]
    return "\n".join(lines) + "\n"


def _ratio_line(one: str, other: str, mine: Curves, theirs: Curves) -> str:
    cells = []
    a, b = measures(mine), measures(theirs)
    for column in ("10", "area to 25", "50"):
        if column not in a or column not in b:
            cells.append("")
            continue
        seeds = min(a[column].shape[1], b[column].shape[1])
        value, low, high = ratio(a[column][:, :seeds], b[column][:, :seeds])
        cells.append(f"{value:.2f} ({low:.2f} to {high:.2f})")
    return f"| {one} | {other} | " + " | ".join(cells) + f" | {wins(a['10'], b['10'])} |"


def _within() -> list[str]:
    """The campaigns of `within.py`: what a student learned from its own campaign, each arm beside the teacher."""
    files = {arm: stored(HERE / "results" / f"within-{arm}.jsonl") for arm in within.ARMS}
    results = {arm: {(r["task"], r["seed"]): r for r in found} for arm, found in files.items() if found}
    if "teacher" not in results:
        return []
    lines = [
        "",
        "## Within a campaign",
        "",
        "`within.py` says what the arms are; each is set beside the teacher on the campaigns that both played.",
        "",
    ]
    lines += ["| arm | campaigns | at 10 | at 25 | area to 25 | teacher's area | duels |", "|" + "---|" * 7]
    ratios = []
    for arm, found in results.items():
        mine, theirs = _beside(found, results["teacher"])
        own, other = measures(mine), measures(theirs)
        duels = [r["duels"] for r in found.values() if "duels" in r]
        cells = [f"{own[c].mean():.3f}" for c in ("10", "25", "area to 25")] + [f"{other['area to 25'].mean():.3f}"]
        cells.append(f"{np.mean(duels):.1f}" if duels else "")
        lines.append(f"| {arm} | {mine.shape[0] * mine.shape[1]} | " + " | ".join(cells) + " |")
        if arm != "teacher":
            ratios.append(_ratio_line(arm, "teacher", mine, theirs))
    lines += ["", "| | against | at 10 | area to 25 | at 50 | tasks won at 10 |", "|---|---|---|---|---|---|", *ratios]
    contests = [_router_line(arm, results[arm].values()) for arm in ("routed", "inherited") if arm in results]
    return [*lines, "", "What the router made of it:", "", *ROUTER_HEAD, *contests]


def _router() -> list[str]:
    """The campaigns of `router.py`: contestants whose order is known."""
    lines = []
    for arm in router.ARMS:
        found = stored(HERE / "results" / f"router-{arm}.jsonl")
        for alpha in sorted({result["alpha"] for result in found}):
            own = [result for result in found if result["alpha"] == alpha]
            lines.append(_router_line(f"{arm}, alpha {alpha:g}", own))
    if not lines:
        return []
    about = "Contestants whose order is known, on all twelve tables (`router.py`)."
    return ["", "## The router", "", about, "", *ROUTER_HEAD, *lines]


def _router_line(name: str, found: Collection[dict[str, Any]]) -> str:
    duels = [result["duels"] for result in found if "duels" in result]
    values = [result["e_value"] for result in found if result.get("e_value") is not None]
    cells: list[object] = [len(found), f"{np.mean(duels):.1f}" if duels else ""]
    cells.append(f"{np.median(values):.2f} (up to {max(values):.1f})" if values else "")
    switches = [switch for result in found for switch in result["switches"]]
    for kind in ("promotion", "rollback"):
        made = [s for s in switches if s["kind"] == kind and s["new"] is not None]
        cells += [len(made), sum(s["new"] > s["old"] for s in made)]
    return f"| {name} | " + " | ".join(map(str, cells)) + " |"


def _beside(one: dict[Any, dict[str, Any]], other: dict[Any, dict[str, Any]]) -> tuple[Curves, Curves]:
    """The curves of two arms on the campaigns that both played, as far as both went: (tasks, seeds, turns)."""
    common = sorted(one.keys() & other.keys())
    names = sorted({task for task, _ in common})
    seeds = min(sum(task == name for task, _ in common) for name in names)
    turns = min(len(found[key]["missing"]) for key in common for found in (one, other))

    def curves(found: dict[Any, dict[str, Any]]) -> Curves:
        return np.array([[found[k]["missing"][:turns] for k in common if k[0] == name][:seeds] for name in names])

    return curves(one), curves(other)


def _preamble() -> list[str]:
    return [
        "Made by `make flywheel`; README.md says what the arms are and how to remake everything. A student was never",
        "trained on a task of the kind of text that it is asked about. Less is better: 1 is the start, 0 the best of",
        "the table.",
    ]


def _tasks() -> list[str]:
    lines = [
        "| task | configurations | best | median | starts | one change takes at most |",
        "|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        tab = table(task.name)
        reach = np.mean([tab.reach(start) for start in tab.starts[:: max(1, len(tab.starts) // 40)]])
        lines.append(
            f"| {task.name} | {len(tab.configs)} | {tab.best:.3f} | {np.median(tab.truth):.3f} | {len(tab.starts)} | "
            f"{reach:.0%} of the gain, on average |"
        )
    return lines


def plot(curves: dict[str, Curves]) -> str:
    """The curves of the main arms, as SVG."""
    width, height, left, top, steps = 560, 320, 60, 20, 50
    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 380" font-family="sans-serif" font-size="13">',
        '<rect width="780" height="380" fill="white"/>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = top + height * (1 - share)
        out.append(f'<line x1="{left}" y1="{y}" x2="{left + width}" y2="{y}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{share:g}</text>')
    for step in (1, 10, 20, 30, 40, 50):
        x = left + width * (step - 1) / (steps - 1)
        out.append(f'<text x="{x}" y="{top + height + 18}" text-anchor="middle">{step}</text>')
    out.append(f'<text x="{left + width / 2}" y="{top + height + 36}" text-anchor="middle">proposals</text>')
    for number, arm in enumerate(name for name in SHOWN if name in curves):
        mean = curves[arm].mean(axis=(0, 1))[:steps]
        points = " ".join(
            f"{left + width * i / (steps - 1):.1f},{top + height * (1 - value):.1f}" for i, value in enumerate(mean)
        )
        colour = COLOURS[number]
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = top + 14 + 20 * number
        out.append(f'<line x1="640" y1="{y - 4}" x2="662" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>')
        out.append(f'<text x="668" y="{y}">{arm}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    """Write table and plot."""
    curves, spent = load()
    (HERE / "flywheel.md").write_text(markdown(curves, spent))
    (HERE / "flywheel.svg").write_text(plot(curves))
    print(f"{len(curves)} arms in {HERE / 'flywheel.md'}", file=sys.stderr)


if __name__ == "__main__":
    main()
