"""The command line, `adgrid`: run, plan, report, rescore, compare, leaderboard, mlflow, verify, datasets, ...

Exit codes: 0 all is well, 1 something failed (a row without a number, a broken layout, a full disk), 2 bad input,
130 stopped.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness import __version__
from harness.contracts import AdgridError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `adgrid`; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # What follows `--` is for `adgrid run` on a cluster.
    mine = words[: words.index("--")] if words[:1] == ["submit"] and "--" in words else words
    options = _parser().parse_args(mine)
    options.run_options = words[len(mine) + 1 :]
    console = Console(highlight=False)
    try:
        return options.handle(options, console, shlex.join(["adgrid", *words]))
    except AdgridError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; every finished row is saved, the same command goes on from here")
        return 130


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adgrid", description="Distributed benchmark harness for industrial image anomaly detection."
    )
    parser.add_argument("--version", action="version", version=f"adgrid {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run what is missing of a search space, then report")
    run.add_argument("space", help="YAML file, such as search_spaces/quickstart.yaml")
    _add_places(run)
    _add_narrowing(run)
    _add_cluster(run)
    run.add_argument(
        "--cluster-config", metavar="FILE", help="file of the cluster launcher, for what its autoscaler may add"
    )
    run.add_argument("--tracking-uri", help="MLflow tracking URI (default: a SQLite file under --root; off: none)")
    run.add_argument("--experiment", default="adgrid", help="MLflow experiment (default: adgrid)")
    run.add_argument("--download", action="store_true", help="fetch weights that are not here from the hub")
    run.add_argument("--skip-missing", action="store_true", help="run the rest when datasets or weights are missing")
    run.add_argument("--save-fitted", action="store_true", help="keep every fitted method under artifacts/")
    run.add_argument("--no-pictures", dest="pictures", action="store_false", help="draw no contact sheet per cell")
    run.add_argument("--cache-gib", type=float, default=50.0, help="bound of the feature cache (default: 50)")
    run.add_argument(
        "--prediction-gib", type=float, default=20.0, help="bound of the stored anomaly maps under --root (default: 20)"
    )
    run.add_argument(
        "--checkpoint-seconds", type=float, default=60.0, help="least time between two of a training (default: 60)"
    )
    run.set_defaults(handle=_run)

    submit = commands.add_parser(
        "submit",
        help="run a search space as a job of a Ray cluster",
        usage="adgrid submit SPACE [options] -- [options of run]",
    )
    submit.add_argument("space", help="YAML file here")
    submit.add_argument("--dashboard", default="http://127.0.0.1:8265", help="of the cluster (default: port 8265 here)")
    submit.add_argument("--ship-code", action="store_true", help="send this checkout's code along")
    submit.add_argument("--python", default="python", help="interpreter on the cluster's nodes (default: python)")
    submit.add_argument("--no-wait", dest="wait", action="store_false", help="do not wait for the end")
    submit.add_argument(
        "run_options", nargs="*", metavar="-- OPTIONS", help="of `adgrid run`, with paths of the cluster"
    )
    submit.set_defaults(handle=_submit)

    plan = commands.add_parser("plan", help="show what a run would do; computes nothing")
    plan.add_argument("space", help="YAML file")
    _add_places(plan)
    _add_narrowing(plan)
    plan.set_defaults(handle=_plan)

    report = commands.add_parser("report", help="remake tables and pictures of a run")
    report.add_argument("run", help="id of a run, or its folder")
    report.add_argument("--no-pictures", dest="pictures", action="store_false", help="draw no pictures per cell")
    report.add_argument("--papers", action="store_true", help="pictures of matrices as PDF and SVG too")
    report.add_argument("--html", action="store_true", help="print where report.html is, and no tables")
    _add_places(report)
    report.set_defaults(handle=_report)

    rescore = commands.add_parser(
        "rescore", help="score a run again from its stored maps, without a model: another protocol, or an ensemble"
    )
    rescore.add_argument("run", help="id of a run, or its folder")
    rescore.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="protocol.FIELD=VALUE",
        help="protocol.aupro_limit=0.05, protocol.smoothing=8, protocol.score_reduction=max, ...",
    )
    rescore.add_argument("--ensemble", choices=["backbone"], help="add the mean over the backbones of each setting")
    _add_places(rescore)
    rescore.set_defaults(handle=_rescore)

    compare = commands.add_parser("compare", help="compare runs, or one axis of them, or a run with published numbers")
    compare.add_argument(
        "runs", nargs="+", metavar="RUN", help="run id, run folder or mlflow:RUN; the first is the baseline"
    )
    compare.add_argument("--axis", default="run", help="what is compared: run, method, backbone, method+backbone, ...")
    compare.add_argument("--baseline", help="value of the axis that others are compared with (default: the first)")
    compare.add_argument("--ignore", action="append", default=[], help="field that may differ as well, such as layers")
    _add_where(compare)
    compare.add_argument("--metric", action="append", dest="metrics", help="metric to compare (default: image_auroc)")
    compare.add_argument("--interval", choices=["delong", "bootstrap"], default="delong", help="of AUROC over images")
    compare.add_argument("--confidence", type=float, default=0.95, help="of intervals and verdicts (default: 0.95)")
    compare.add_argument(
        "--published",
        action="append",
        metavar="NAME | FILE",
        help="compare with published numbers: a name, all, or a CSV",
    )
    compare.add_argument("--fail-if-worse", type=float, metavar="RATE", help="exit 1 where a mean lost more than this")
    compare.add_argument("--out", help="folder for tables and pictures")
    compare.add_argument("--tracking-uri", help="of mlflow: runs (default: the SQLite file under --root)")
    _add_places(compare)
    compare.set_defaults(handle=_compare)

    board = commands.add_parser("leaderboard", help="rank the newest finished row of every cell of many runs")
    board.add_argument(
        "places", nargs="*", metavar="ROOT | RUN", help="storage roots, run folders, run ids, mlflow:RUN"
    )
    board.add_argument("--experiment", help="every run of this MLflow experiment")
    _add_where(board)
    board.add_argument("--metric", default="image_auroc", help="metric to sort by (default: image_auroc)")
    board.add_argument("--out", help="CSV file to write")
    board.add_argument("--tracking-uri", help="of MLflow (default: the SQLite file under --root)")
    _add_places(board)
    board.set_defaults(handle=_leaderboard)

    mirror = commands.add_parser("mlflow", help="mirror runs to MLflow, after an outage or to a second server")
    mirror.add_argument("action", choices=["sync"])
    mirror.add_argument("runs", nargs="+", metavar="RUN", help="run id or run folder")
    mirror.add_argument("--tracking-uri", help="MLflow tracking URI (default: the SQLite file under --root)")
    mirror.add_argument("--experiment", default="adgrid", help="MLflow experiment (default: adgrid)")
    _add_places(mirror)
    mirror.set_defaults(handle=_mlflow)

    verify = commands.add_parser("verify", help="compute small cells whose numbers are known, and compare")
    verify.add_argument("--gpu", action="store_true", help="every method on the accelerator against the CPU's numbers")
    verify.add_argument(
        "--chaos", type=int, metavar="N", help="kill N processes of runs at random moments, and compare what is left"
    )
    verify.add_argument("--seed", type=int, default=0, help="of the order and the moments of --chaos (default: 0)")
    _add_cluster(verify)
    _add_places(verify)
    verify.set_defaults(handle=_verify)

    datasets = commands.add_parser(
        "datasets", help="list known datasets, show what one should hold, or check its files"
    )
    datasets.add_argument("action", nargs="?", choices=["list", "show", "check"], default="list")
    datasets.add_argument("name", nargs="?", help="dataset to show or check")
    datasets.add_argument("--layout", help="layout on disk, where it is not called like the dataset")
    datasets.add_argument("--dataset-root", help="folder of this dataset (default: DATA_ROOT/NAME)")
    datasets.add_argument("--variant", help="which published split, where there are several")
    datasets.add_argument("--categories", help="check only these, separated by commas")
    datasets.add_argument("--decode", action="store_true", help="check every pixel instead of headers alone")
    _add_places(datasets)
    datasets.set_defaults(handle=_datasets)

    backbones = commands.add_parser("backbones", help="list known backbones, check their weights, or fetch them")
    backbones.add_argument("action", nargs="?", choices=["list", "check", "fetch"], default="list")
    backbones.add_argument("names", nargs="*", metavar="SPACE.yaml | NAME", help="all backbones of a space, or these")
    backbones.add_argument("--weights", help="file or folder to look into instead of what the space says")
    backbones.add_argument("--into", help="fetch: folder to put the weights into; a space names it as `weights: DIR`")
    _add_places(backbones)
    backbones.set_defaults(handle=_backbones)

    methods = commands.add_parser("methods", help="list known methods")
    _add_places(methods)
    methods.set_defaults(handle=_methods)

    ui = commands.add_parser("ui", help="open MLflow on this machine's loopback address")
    _add_places(ui)
    ui.add_argument("--tracking-uri", help="MLflow tracking URI (default: the SQLite file under --root)")
    ui.add_argument("--port", type=int, default=5000)
    ui.set_defaults(handle=_ui)
    return parser


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", default="results", help="storage root, a path or URI (default: results)")
    parser.add_argument("--data-root", help="folder with one subfolder per dataset")
    parser.add_argument("--cache-dir", help="node-local cache (default: the user's cache folder)")


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", help="Ray cluster to join (auto, HOST:PORT); without it one starts on this machine"
    )
    parser.add_argument("--num-cpus", type=int, help="cores of the Ray started here (default: all)")


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="AXIS=VALUE",
        help="only these rows: method=patchcore, dataset=a,b",
    )


def _add_narrowing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="AXIS=VALUE",
        help="narrow an axis or set a field: methods=padim, seeds=0,1, protocol.aupro_limit=0.05",
    )
    parser.add_argument("--random-weights", action="store_true", help="test the plumbing; stamps every row")


def _options(parsed: argparse.Namespace) -> Any:
    import dataclasses

    from harness.options import RunOptions

    fields = {field.name for field in dataclasses.fields(RunOptions)}
    return RunOptions(**{name: value for name, value in vars(parsed).items() if name in fields})


def _run(parsed: argparse.Namespace, console: Console, command: str) -> int:
    from harness.report import build_matrices, failures_table, rows_frame, terminal_table
    from harness.run import execute
    from harness.study_report import study_table
    from harness.tracking import ui_command

    outcome = execute(parsed.space, _options(parsed), console, command)
    for study in outcome.studies:
        console.print()
        console.print(study_table(study.record, study.results))
    for matrix in build_matrices(rows_frame(outcome.rows), metrics=("image_auroc", "pixel_auroc")):
        console.print()
        console.print(terminal_table(matrix))
    if outcome.num_failed:
        console.print()
        console.print(failures_table(outcome.rows))
    searched = sum(len(result.rows) for study in outcome.studies for result in study.results)
    kept = len(outcome.rows) + searched - outcome.num_computed
    also = f" and {searched} in {outcome.num_samples} trials of studies" if outcome.studies else ""
    console.print(
        f"\n{len(outcome.rows)} cells{also}: {outcome.num_computed} computed now, {kept} from earlier runs, "
        f"{outcome.num_failed} without a number"
    )
    for item in outcome.plan.missing:
        console.print(f"left out ({item.num_trials} trials): {item.kind} {item.name}: {_escape(item.reason)}")
    for note in outcome.notes:
        console.print(f"[yellow]{_escape(note)}[/]", soft_wrap=True)
    console.print(f"run folder  {outcome.run_folder}", soft_wrap=True)
    console.print(f"report      {outcome.run_folder}/report/report.html", soft_wrap=True)
    if outcome.tracking_uri:
        shown = ui_command(outcome.tracking_uri)
        if shown.startswith("mlflow ") and shutil.which("mlflow") is None:
            shown = f"{shlex.quote(str(Path(sys.executable).parent))}/{shown}"
        console.print(f"MLflow      {shown}", soft_wrap=True)
    return 1 if outcome.num_failed else 0


def _submit(parsed: argparse.Namespace, console: Console, command: str) -> int:
    from harness.space import load_space
    from harness.submit import follow, submit

    load_space(parsed.space)  # mistakes are told here, not on the cluster
    chosen = _parser().parse_args(["run", parsed.space, *parsed.run_options])
    if "://" not in chosen.root and not Path(chosen.root).is_absolute():
        raise AdgridError(
            f"--root {chosen.root}: the job runs elsewhere; after --, give a path or URI that all nodes of the "
            f"cluster see, such as --root /mnt/shared/results"
        )
    client, job = submit(parsed.space, parsed.run_options, parsed.dashboard, parsed.ship_code, parsed.python)
    console.print(f"job {job} on {parsed.dashboard}; `ray job stop {job}` ends it, finished rows stay", soft_wrap=True)
    if not parsed.wait:
        return 0
    return 0 if follow(client, job, lambda text: console.out(text, end="", highlight=False)) else 1


def _plan(parsed: argparse.Namespace, console: Console, command: str) -> int:
    from harness.plan import find_encoding_methods, measure_progress
    from harness.progress import describe, describe_seconds, find_varied
    from harness.run import plan_run
    from harness.run_folder import foresee_studies
    from harness.store import Store
    from harness.study_report import list_studies

    plan = plan_run(parsed.space, _options(parsed), console)
    store = Store(parsed.root)
    rows = store.load_rows()
    predictions = {name.removesuffix(".arrow") for name in store.names("predictions")}
    table = Table(
        title=f"{plan.space.name}: {len(plan.trials)} trials, {len(plan.cell_ids)} cells", title_justify="left"
    )
    for column in ("trial", "categories", "layers", "asks for", "features", "done"):
        table.add_column(column, overflow="fold")
    varied = find_varied(plan.trials)
    for trial in plan.trials:
        done = sum(cell.cell_id in rows and rows[cell.cell_id].status == "ok" for cell in trial.cells)
        asks = [f"{trial.resources.cpu:g} cpu"] + [f"{trial.resources.gpu:g} gpu"] * bool(trial.resources.gpu)
        asks += [f"{trial.resources.memory_gib:g} GiB"] * bool(trial.resources.memory_gib)
        workers = f"{trial.resources.workers} workers: " if trial.resources.workers > 1 else ""
        table.add_row(
            describe(trial, varied),
            ", ".join(trial.categories) if len(trial.categories) <= 4 else f"{len(trial.categories)} categories",
            ", ".join(trial.layers),
            workers + ", ".join(asks),
            _describe_bytes(trial.footprint.feature_bytes if trial.footprint else 0),
            f"{done}/{len(trial.cells)}",
        )
    for pretraining in plan.pretrainings:
        console.print(_describe_pretraining(pretraining, store, parsed), soft_wrap=True)
    if plan.trials:
        console.print(table)
    if plan.studies:
        console.print(list_studies(plan.studies, rows, store))
    progress = measure_progress(plan, rows, predictions, *foresee_studies(plan.studies, store))
    time = (
        "unknown, no earlier rows"
        if progress.estimated_seconds is None
        else describe_seconds(progress.estimated_seconds)
    )
    console.print(f"done {progress.done} · to do {progress.todo}, of these {progress.rescore} only scored again")
    console.print(f"failed before {progress.failed} · estimated time on one worker: {time}")
    encoding = find_encoding_methods(plan.trials)
    if encoding:
        console.print(f"{', '.join(encoding)}: the backbone encodes changed images in every epoch, no stored features")
    for warning in plan.warnings:
        console.print(f"[yellow]{_escape(warning)}[/]", soft_wrap=True)
    if plan.missing:
        console.print(f"\n[red]missing on this machine[/], {_count(len(plan.missing), 'thing', 'things')}:")
        for item in sorted(plan.missing, key=lambda item: item.kind):
            console.print(
                f"  [bold]{item.kind} {item.name}[/] ({_count(item.num_trials, 'trial waits', 'trials wait')} for it)"
            )
            for part in _escape(item.reason).split("; "):
                console.print(f"    {part}", soft_wrap=True)
    return 1 if plan.missing else 0


def _describe_bytes(amount: int) -> str:
    return f"{amount / 2**30:.1f} GiB" if amount >= 2**30 else f"{amount / 2**20:.0f} MiB" if amount else ""


def _describe_pretraining(pretraining: Any, store: Any, parsed: argparse.Namespace) -> str:
    """One line: what is trained before the trials, on what, and where its references come from."""
    from harness.backbones import resolve_backbone
    from harness.fitting import pick_device
    from harness.progress import describe
    from harness.reference_source import choose_source

    categories = _count(sum(len(choice.categories) for choice in pretraining.data), "category", "categories")
    text = f"first: {_escape(describe(pretraining))}, {categories}, {pretraining.num_images} images"
    if store.has_state(pretraining.trial_id):
        return f"{text} · done"
    options = _options(parsed)
    backbone = resolve_backbone(pretraining.backbone, pretraining.weights, options.places.cache_dir)
    try:
        device = pick_device(pretraining.resources)
    except RuntimeError:
        return f"{text} · to do; speeds are measured where there is an accelerator"
    choice = choose_source(pretraining, backbone, options.places.cache_dir, options.cache_gib, device)
    return f"{text} · to do; {choice.reason}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _report(parsed: argparse.Namespace, console: Console, command: str) -> int:
    from harness.report_commands import remake

    return remake(parsed, console)


def _rescore(parsed: argparse.Namespace, console: Console, command: str) -> int:
    from harness.report_commands import rescore

    return rescore(parsed, console, command)


def _verify(parsed: argparse.Namespace, console: Console, command: str) -> int:
    from harness.verify import verify_accelerator, verify_golden

    if parsed.chaos is not None:
        from harness.chaos import run_chaos, show_chaos

        outcome = run_chaos(parsed.chaos, parsed.seed, _options(parsed), console)
        show_chaos(outcome, console)
        return 1 if outcome.problems else 0
    verify = verify_accelerator if parsed.gpu else verify_golden
    return 0 if verify(_options(parsed), console, command) else 1


def _compare(parsed: argparse.Namespace, console: Console, command: str) -> int:
    from harness.compare_commands import compare_runs

    return compare_runs(parsed, console, command)


def _leaderboard(parsed: argparse.Namespace, console: Console, command: str) -> int:
    from harness.compare_commands import show_leaderboard

    return show_leaderboard(parsed, console)


def _mlflow(parsed: argparse.Namespace, console: Console, command: str) -> int:
    from harness.mlflow_commands import sync_runs

    return sync_runs(parsed, console)


def _datasets(parsed: argparse.Namespace, console: Console, command: str) -> int:
    from harness.contracts import DatasetRef
    from harness.dataset_check import check_dataset, describe_dataset, list_datasets
    from harness.registry import build_dataset, dataset_layouts

    places = _options(parsed).places
    if parsed.action == "list":
        refs = [DatasetRef(name=name, layout=name) for name in dataset_layouts()]
        console.print(list_datasets({ref.name: build_dataset(ref, places) for ref in refs}))
        searched = f"searched {places.data_root}" if places.data_root else "no data root: name one with --data-root"
        console.print(f"{_escape(searched)}; `adgrid datasets check NAME` says how to get what is not here")
        return 0
    if not parsed.name:
        raise AdgridError(
            f"datasets {parsed.action}: name a dataset, such as `adgrid datasets {parsed.action} folder "
            "--dataset-root DIR`"
        )
    layout = parsed.layout or parsed.name
    ref = DatasetRef(name=parsed.name, layout=layout, root=parsed.dataset_root, variant=parsed.variant)
    if parsed.action == "show":
        describe_dataset(build_dataset(ref, places), ref.layout, console)
        return 0
    names = None if parsed.categories is None else [name.strip() for name in parsed.categories.split(",")]
    return 0 if check_dataset(ref, places, names, parsed.decode, console) else 1


def _backbones(parsed: argparse.Namespace, console: Console, command: str) -> int:
    from harness.backbones import backbone_names, describe_backbone, missing_weights

    cache_dir = _options(parsed).places.cache_dir
    if parsed.action == "check":
        return _check_backbones(parsed, console)
    if parsed.action == "fetch":
        return _fetch_backbones(parsed, console)
    table = Table("backbone", "what it is", "weights here")
    for name in backbone_names():
        table.add_row(name, describe_backbone(name), _here(missing_weights(name, cache_dir=cache_dir)))
    console.print(table)
    console.print("Any other model of timm works by its name.")
    return 0


def _chosen_backbones(parsed: argparse.Namespace) -> list[tuple[str, str]]:
    """(name, weights) of the backbones named on the command line, those of search spaces included, each once."""
    from harness.space import grid_points, load_space

    chosen: dict[tuple[str, str], None] = {}
    for word in parsed.names:
        if word.endswith((".yaml", ".yml")) or Path(word).is_file():
            entries = [point.backbone for point in grid_points(load_space(word))]
            chosen.update(dict.fromkeys((entry.name, parsed.weights or entry.weights) for entry in entries if entry))
        else:
            chosen[word, parsed.weights or "auto"] = None
    return list(chosen)


def _check_backbones(parsed: argparse.Namespace, console: Console) -> int:
    from harness.backbone_check import check_weights
    from harness.backbones import backbone_names

    chosen = _chosen_backbones(parsed) or [(name, "auto") for name in backbone_names()]
    table = Table("backbone", "size", "weights here", "compared")
    lines, lacking, all_here = [], [], True
    for name, weights in chosen:
        with console.status(f"checking {name}"):
            check = check_weights(name, weights, _options(parsed).places.cache_dir)
        size = f"{'about ' if check.is_estimate else ''}{check.num_bytes / 1e6:,.0f} MB"
        state = "yes" if check.problem is None else "do not fit" if check.path else "no"
        table.add_row(name, size, f"[{'green' if state == 'yes' else 'red'}]{state}[/]", check.verified)
        published = f"from {', or '.join(check.sources)}"
        missing_only = check.path is None and check.can_be_fetched and weights == "auto"
        lines.append(f"{name}: {published if missing_only else check.problem or check.path or 'random weights'}")
        all_here &= check.problem is None
        if check.problem and check.can_be_fetched:
            lacking.append(name)
    console.print(table)
    for line in lines:
        console.print(_escape(line), soft_wrap=True)
    if lacking:
        fetch = f"adgrid backbones fetch {' '.join(dict.fromkeys(lacking))} --into DIR"
        console.print(f"`{fetch}` where there is internet, then `weights: DIR` in the space", soft_wrap=True)
    return 0 if all_here else 1


def _fetch_backbones(parsed: argparse.Namespace, console: Console) -> int:
    from harness.backbone_check import fetch_weights

    chosen = _chosen_backbones(parsed)
    if not chosen or not parsed.into:
        raise AdgridError("backbones fetch: name a search space or backbones, and a folder with --into DIR")
    failed = 0
    for name, weights in chosen:
        with console.status(f"fetching {name}") as status:

            def show(done: int, total: int | None, status: Any = status, name: str = name) -> None:
                of = f" of {total / 1e6:,.0f}" if total else ""
                status.update(f"fetching {name}: {done / 1e6:,.0f}{of} MB")

            try:
                fetched = fetch_weights(name, parsed.into, weights, _options(parsed).places.cache_dir, show)
            except AdgridError as error:  # the others are fetched all the same
                failed += 1
                console.print(f"[red]{name}[/]: {_escape(str(error))}", soft_wrap=True)
                continue
        if fetched.replaced:
            console.print(f"[yellow]{name}: replaced, {_escape(fetched.replaced)}[/]", soft_wrap=True)
        size = f"{fetched.num_bytes / 1e6:,.0f} MB"
        console.print(f"{name}: {fetched.action}, {size}, {_escape(fetched.path)}", soft_wrap=True)
    console.print(f"in a search space: `backbones: [{{name: NAME, weights: {_escape(parsed.into)}}}]`", soft_wrap=True)
    return 1 if failed else 0


def _methods(parsed: argparse.Namespace, console: Console, command: str) -> int:
    from harness.registry import load_method, method_names, method_version

    table = Table("method", "what it is", "fit per", "backbone", "version", "here")
    for name in method_names():
        try:
            method = load_method(name)
            version = str(method_version(name))
        except Exception as error:  # one broken plug-in must not hide the others
            table.add_row(name, "", "", "", "", _escape(f"{type(error).__name__}: {error}"))
        else:
            table.add_row(name, method.summary, method.scope, method.backbone_use, version, _here(None))
    console.print(table)
    return 0


def _here(reason: str | None) -> str:
    return "[green]yes[/]" if reason is None else _escape(reason)


def _ui(parsed: argparse.Namespace, console: Console, command: str) -> int:
    from harness.store import Store
    from harness.tracker import default_tracking_uri
    from harness.tracking import ui_command

    uri = default_tracking_uri(parsed.tracking_uri, Store(parsed.root))
    if uri is None:
        raise AdgridError("ui: --root is no local folder; name the server with --tracking-uri")
    words = shlex.split(ui_command(uri))
    if "://" in uri and not uri.startswith(("http:", "https:")):
        words = [sys.executable, "-m", *words, "--host", "127.0.0.1", "--port", str(parsed.port)]
    return subprocess.call(words)


if __name__ == "__main__":
    sys.exit(main())
