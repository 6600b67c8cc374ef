"""What the harness itself costs: grids of cells that do nothing, from planning to the report, at several sizes.

Every step is a process of its own, as a user would start it: `plan`, `run` with the MLflow mirror, the same `run`
again, when everything is done, and `report`. Methods and images are those of `noop.py`, so that what remains is the
harness.
Cells are ten to a trial, five datasets, ten seeds; what grows is the number of configurations.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path

TARGETS = {
    "plan_seconds": 5.0,
    "cell_ms": 50.0,
    "driver_peak_mib": 1024.0,
    "resume_seconds": 10.0,
    "report_seconds": 20.0,
}
"""At 10,000 cells."""
CELLS_PER_CONFIGURATION = 5 * 10 * 10
"""Datasets, seeds, categories."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[1000, 3000, 10000], help="multiples of 500")
    parser.add_argument("--num-cpus", type=int, default=2, help="cores that Ray gets")
    parser.add_argument("--profile", help="write a profile of the driver of each step into this folder")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        take_step(options.step, Path(options.folder), options.num_cpus, options.profile)
        return
    figures = {}
    for cells in options.cells:
        figures[cells] = measure(cells, options)
        print(f"{cells:>6} cells  " + "  ".join(f"{name} {value:.4g}" for name, value in figures[cells].items()))
    if len(figures) > 1:
        print(f"growth from {min(figures)} to {max(figures)} cells, as a power of the number of cells:")
        print("  " + "  ".join(f"{name} {power:.2f}" for name, power in growth(figures).items()))
    if options.json:
        told = {"load_average": os.getloadavg(), "targets": TARGETS, "figures": figures, "growth": growth(figures)}
        Path(options.json).write_text(json.dumps(told, indent=1))


def growth(figures):
    """The power of the number of cells with which each figure grows, between the smallest and the largest grid."""
    low, high = min(figures), max(figures)
    if low == high:
        return {}
    import math

    return {
        name: math.log(figures[high][name] / figures[low][name]) / math.log(high / low)
        for name in figures[high]
        if figures[low][name] > 0 and figures[high][name] > 0
    }


def measure(cells, options):
    """All figures of one grid, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="adgrid-scale-") as folder:
        install(Path(folder))
        write_space(Path(folder), cells // CELLS_PER_CONFIGURATION)
        steps = {}
        for step in ("hash", "plan", "run", "resume", "report"):
            command = [
                sys.executable,
                __file__,
                "--step",
                step,
                "--folder",
                folder,
                "--num-cpus",
                str(options.num_cpus),
            ]
            if options.profile:
                command += ["--profile", options.profile]
            paths = [folder, str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{step} failed:\n{done.stdout}\n{done.stderr}")
            steps[step] = json.loads(done.stdout.splitlines()[-1])
        return {
            "plan_seconds": steps["plan"]["seconds"],
            "run_seconds": steps["run"]["seconds"],
            "trials_seconds": steps["run"]["trials_seconds"],
            "cell_ms": steps["run"]["cell_ms"],
            "trial_start_ms": steps["run"]["trial_start_ms"],
            "num_workers": steps["run"]["num_workers"],
            "worker_cpu_ms_per_cell": 1000 * steps["run"]["worker_cpu_seconds"] / cells,
            "driver_cpu_ms_per_cell": 1000 * steps["run"]["driver_cpu_seconds"] / cells,
            "driver_peak_mib": steps["run"]["peak_mib"],
            "mirror_lag_seconds": steps["run"]["mirror_lag_seconds"],
            "resume_seconds": steps["resume"]["seconds"],
            "report_seconds": steps["report"]["seconds"],
            **{f"{step}_cpu_seconds": steps[step]["cpu_seconds"] for step in ("plan", "resume", "report")},
        }


def install(folder):
    """The plug-ins of `noop.py` as an installed package, as far as entry points go."""
    package = folder / "adgrid_noop-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: adgrid-noop\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[adgrid.methods]\nnoop = noop:Noop\n\n[adgrid.datasets]\nspecks = noop:Specks\n"
    )


def write_space(folder, configurations):
    (folder / "space.yaml").write_text(
        "name: scale\n"
        f"methods: [{{name: noop, params: {{number: {list(range(configurations))}}}}}]\n"
        f"datasets: [{', '.join(f'{{name: {name}, layout: specks}}' for name in 'abcde')}]\n"
        f"seeds: {list(range(10))}\n"
        "protocol: {image_size: 16}\n"
    )


def take_step(step, folder, num_cpus, profile):
    """Runs one step in this process and prints its figures as JSON."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    from rich.console import Console

    import harness.run
    import harness.run_report
    from harness.options import RunOptions
    from harness.run_folder import read_run
    from harness.store import Store

    root = str(folder / "root")
    options = RunOptions(root=root, cache_dir=str(folder / "cache"), num_cpus=num_cpus, pictures=False)
    space, console = str(folder / "space.yaml"), Console(file=io.StringIO())
    marks = {}
    with profiled(profile, step):
        start, cpu = time.perf_counter(), time.process_time()
        if step in ("hash", "plan"):
            harness.run.plan_run(space, options, console)
        elif step == "report":
            store = Store(root)
            (run_id,) = [path.name for path in (folder / "root" / "runs").iterdir()]
            harness.run_report.remake_report(store, read_run(store, run_id))
        else:
            watch_phases(marks)
            outcome = harness.run.execute(space, options, console, "benchmark")
            assert outcome.num_failed == 0, outcome.rows
            assert not outcome.notes, outcome.notes
        seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    told = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "peak_mib": usage.ru_maxrss / 1024}
    if step == "run":
        told |= time_cells(outcome.rows, marks, num_cpus)
        told |= {name: marks[name] for name in ("driver_cpu_seconds", "worker_cpu_seconds", "num_workers")}
        told["mirror_lag_seconds"] = marks["mirrored"] - marks["ended"]
    print(json.dumps(told))


@contextlib.contextmanager
def profiled(folder, step):
    """Keeps a cProfile of the driver's main thread, if asked to."""
    if folder is None:
        yield
        return
    import cProfile

    Path(folder).mkdir(parents=True, exist_ok=True)
    with cProfile.Profile() as profiler:
        yield
    profiler.dump_stats(Path(folder) / f"{step}.prof")


def watch_phases(marks):
    """Notes when trials begin and end, how many workers ran them, what all computed, and when the mirror was done."""
    import harness.sweep
    import harness.tracker

    run_trials, close = harness.sweep.run_trials, harness.tracker.Tracker._close

    def timed(*arguments, **options):
        cpu, spent, over = time.process_time(), {}, threading.Event()
        # Workers are gone when the last trial has ended.
        watch = threading.Thread(target=watch_workers, args=(spent, over), daemon=True)
        watch.start()
        marks["began"] = time.time()
        try:
            return run_trials(*arguments, **options)
        finally:
            marks["ended"] = time.time()
            marks["driver_cpu_seconds"] = time.process_time() - cpu
            over.set()
            watch.join()
            marks["worker_cpu_seconds"], marks["num_workers"] = sum(spent.values()), len(spent)

    def close_and_note(tracker):
        close(tracker)
        marks.setdefault("mirrored", time.time())

    harness.sweep.run_trials, harness.tracker.Tracker._close = timed, close_and_note


def watch_workers(spent, over):
    """Notes every second what each process that runs trials has computed, in seconds, by its number."""
    import psutil

    while not over.wait(1.0):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith("ray::ImplicitFunc"):
                    spent[process.pid] = sum(process.cpu_times()[:2])


def time_cells(rows, marks, num_cpus):
    """Milliseconds from one row to the next within a trial, and what is left of the workers' time per trial."""
    ends = defaultdict(list)
    for row in rows:
        ends[row.trial_id].append(datetime.fromisoformat(row.provenance["finished_at"]).timestamp())
    gaps = [later - earlier for times in ends.values() for earlier, later in itertools.pairwise(sorted(times))]
    cell = statistics.fmean(gaps)
    seconds = marks["ended"] - marks["began"]
    return {
        "trials_seconds": seconds,
        "cell_ms": 1000 * cell,
        "trial_start_ms": 1000 * (seconds * num_cpus - cell * len(rows)) / len(ends),
    }


if __name__ == "__main__":
    main()
