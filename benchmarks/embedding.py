"""What it costs to have the loop in an application: the import, a turn in a host's graph, a trial of a function.

Prints one JSON line: seconds of `import overnight` and of the first look at `build_graph` (median of fresh processes);
milliseconds of processor time of a turn in a host's graph, which takes and gives back the lease, and of a turn of
`run_campaign`, which keeps it, both with a trainer in this process that takes no time; milliseconds of a trial of a
function in the trial worker, and called here; super-steps of the longest turn, with two nodes of a host's own and
without.

    python benchmarks/embedding.py
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import overnight
from overnight.agent.proposers.scripted import ScriptedProposer
from overnight.agent.run import open_runtime, run_campaign
from overnight.store.records import TrialRequest
from overnight.trainer.protocol import TrainerContext
from overnight.trainer.scripted import ScriptedTrainer
from overnight.trainer.shipping import ShippedFunction
from overnight.trainer.worker import WorkerTrainer

FRESH = 15
TURNS = 60
TRIALS = 200


def campaign(name: str, turns: int) -> overnight.Campaign:
    knobs = {f"k{n}": overnight.Int(1, 9, default=5) for n in range(5)}
    return overnight.Campaign.from_dict(
        {
            "campaign": {"name": name, "trainer": "scripted"},
            "budget": {"iterations": turns},
            "knobs": knobs,
            "proposers": {"random": {"kind": "random"}},
            "router": {"warmup": False, "explore": 0.0},
        }
    )


def fresh_seconds(code: str) -> float:
    timed = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-P", "-c", timed], capture_output=True, check=True) for _ in range(FRESH)]
    return statistics.median(float(run.stdout) for run in runs)


def embedded_ms(folder: Path) -> float:
    times = []
    with (
        overnight.open_store(folder / "embedded.db", create=True) as store,
        overnight.build_graph(campaign("embedded", TURNS), store=store, trainer=ScriptedTrainer()) as graph,
    ):
        app = graph.compile()
        for _ in range(TURNS):
            started = time.process_time()
            app.invoke({"campaign": "embedded"})
            times.append((time.process_time() - started) * 1e3)
    return statistics.median(times[1:])


def run_ms(folder: Path) -> float:
    times: list[float] = []

    class Clock:
        def on_event(self, event: overnight.Event) -> None:
            if isinstance(event, overnight.events.Decided):
                times.append(time.process_time() * 1e3)

    with overnight.open_store(folder / "run.db", create=True) as store:
        runtime = open_runtime(campaign("run", TURNS), store, trainer=ScriptedTrainer(), hooks=[Clock()])
        run_campaign(runtime)
        runtime.close()
    return statistics.median(after - before for before, after in itertools.pairwise(times))


def trial_ms(folder: Path) -> tuple[float, float]:
    def objective(config: dict[str, Any], seed: int) -> float:
        return float(config["x"]) + seed

    context = TrainerContext(campaign_dir=folder, cache_dir=folder, knobs={"x": "float"}, metric="loss")
    worker = WorkerTrainer("function", {}, context, function=ShippedFunction(objective))
    worker.prepare()
    request = TrialRequest({"x": 1.0}, 0, timeout_s=60.0)
    times = []
    for _ in range(TRIALS):
        started = time.perf_counter()
        worker.run(request, lambda _progress: None)
        times.append((time.perf_counter() - started) * 1e3)
    worker.close()
    started = time.perf_counter()
    for _ in range(TRIALS):
        objective({"x": 1.0}, 0)
    return statistics.median(times), (time.perf_counter() - started) * 1e3 / TRIALS


def steps_of_the_longest_turn(folder: Path, name: str, places: tuple[str, ...]) -> int:
    """Calibration, three blocked tries and the fallback, a whole measurement, and the end of the campaign."""
    nodes: dict[str, overnight.CustomNode] = {place: lambda _state: {} for place in places}
    proposers = {"random": ScriptedProposer("random", ["no JSON"])}
    with (
        overnight.open_store(folder / f"{name}.db", create=True) as store,
        overnight.build_graph(
            campaign(name, 1), store=store, trainer=ScriptedTrainer(), proposers=proposers, nodes=nodes
        ) as graph,
    ):
        return sum(len(part) for part in graph.compile().stream({"campaign": name}))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        worker, here = trial_ms(folder)
        result = {
            "import_s": round(fresh_seconds("import overnight"), 4),
            "import_build_graph_s": round(fresh_seconds("import overnight; overnight.build_graph"), 3),
            "embedded_turn_cpu_ms": round(embedded_ms(folder), 1),
            "run_turn_cpu_ms": round(run_ms(folder), 1),
            "function_trial_in_worker_ms": round(worker, 2),
            "function_called_here_ms": round(here, 5),
            "steps": steps_of_the_longest_turn(folder, "plain", ()),
            "steps_with_two_nodes": steps_of_the_longest_turn(folder, "nodes", ("after:propose", "after:check_rails")),
            "python": platform.python_version(),
            "machine": platform.machine(),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
