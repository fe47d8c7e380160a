"""Measure the tables of the flywheel's tasks with the project's own trainer, one process a core.

    python -P benchmarks/flywheel/measure.py OUT [--tasks NAME ...] [--processes N] [--sample N] [--seconds S]

Writes OUT/NAME.csv: one line a trial (the index of the configuration, seed, metric), flushed as it goes, so that a run
that was stopped goes on where it was. `--sample` measures that many configurations only, to see what a trial costs.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from tasks import NOISE_CONFIGS, NOISE_SEEDS, SEEDS, TASKS, Task
from texts import write_texts

Job = tuple[str, int, int]
_TRAINERS: dict[str, object] = {}


def jobs_of(task: Task, sample: int | None) -> Iterator[Job]:
    """Yield what a table needs: every configuration on `SEEDS`, a fixed random subset on `NOISE_SEEDS`."""
    count = sum(1 for _ in task.configs())
    chosen = random.Random(task.name).sample(range(count), NOISE_CONFIGS)
    if sample is not None:
        yield from ((task.name, index, 0) for index in random.Random(1).sample(range(count), sample))
        return
    for seed in SEEDS:
        yield from ((task.name, index, seed) for index in range(count))
    yield from ((task.name, index, seed) for index in chosen for seed in NOISE_SEEDS if seed not in SEEDS)


def _trainer(name: str, folder: Path) -> tuple[object, list[dict[str, int | float]]]:
    from overnight.trainer.gpt import GptTrainer
    from overnight.trainer.protocol import TrainerContext

    if name not in _TRAINERS:
        task = next(task for task in TASKS if task.name == name)
        knobs = {
            knob: "float" if any(isinstance(value, float) for value in values) else "int"
            for knob, values in task.setting.choices.items()
        }
        context = TrainerContext(campaign_dir=folder, cache_dir=folder / "cache", knobs=knobs, metric="val_bpb")
        trainer = GptTrainer.from_settings(task.trainer(), context)
        trainer.prepare()
        _TRAINERS[name] = (trainer, list(task.configs()))
    return _TRAINERS[name]  # type: ignore[return-value]


def _start(folder: str) -> None:
    global _FOLDER  # noqa: PLW0603
    _FOLDER = Path(folder)
    import torch

    torch.set_num_threads(1)


def _run(job: Job) -> tuple[Job, float | None, float]:
    from overnight.store.records import TrialRequest

    name, index, seed = job
    trainer, configs = _trainer(name, _FOLDER)
    result = trainer.run(TrialRequest(configs[index], seed, "val", 60.0), lambda _progress: None)  # type: ignore[attr-defined]
    return job, result.metric, result.wall_s


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="*", default=[task.name for task in TASKS])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this long")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    folder = Path(os.environ.get("FLYWHEEL_TEXTS") or tempfile.mkdtemp(prefix="flywheel-"))
    write_texts(folder)
    given.out.mkdir(parents=True, exist_ok=True)
    todo: list[Job] = []
    for task in TASKS:
        if task.name in given.tasks:
            file = given.out / f"{task.name}.csv"
            done = {(int(i), int(s)) for i, s, _ in csv.reader(file.open())} if file.exists() else set()
            todo += [job for job in jobs_of(task, given.sample) if (job[1], job[2]) not in done]
            _trainer(task.name, folder)  # the token file is built once, here
    random.Random(0).shuffle(todo)
    todo.sort(key=lambda job: job[2] > 1)  # the noise subset last
    files = {name: (given.out / f"{name}.csv").open("a", newline="") for name in given.tasks}
    writers = {name: csv.writer(file) for name, file in files.items()}
    started, spent = time.monotonic(), {name: [0.0, 0] for name in given.tasks}
    with multiprocessing.get_context("spawn").Pool(given.processes, _start, (str(folder),)) as pool:
        for count, (job, metric, wall_s) in enumerate(pool.imap_unordered(_run, todo, chunksize=4), 1):
            writers[job[0]].writerow([job[1], job[2], "" if metric is None else f"{metric:.6f}"])
            spent[job[0]][0] += wall_s
            spent[job[0]][1] += 1
            elapsed = time.monotonic() - started
            if count % 500 == 0 or count == len(todo):
                left = elapsed / count * (len(todo) - count)
                print(f"{count} of {len(todo)} trials, {elapsed:.0f} s, {left:.0f} s left", file=sys.stderr, flush=True)
                for file in files.values():
                    file.flush()
            if elapsed > given.seconds:
                print(f"stopped after {count} of {len(todo)} trials; run again to go on", file=sys.stderr)
                pool.terminate()
                break
    for file in files.values():
        file.close()
    for name, (total, number) in spent.items():
        if number:
            print(f"{name}: {number} trials, {total / number:.3f} s each", file=sys.stderr)


if __name__ == "__main__":
    main()
