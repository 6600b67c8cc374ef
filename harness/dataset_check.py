"""What `adgrid datasets` prints: which datasets there are, what one should hold, and what is wrong with its files.

The check itself belongs to the layout (`Dataset.check`). Here its complaints are sorted by category and kind, and set
beside the number of images that were found and that are published.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from harness.contracts import AdgridError, Category, Dataset, DatasetRef, LayoutProblem, Places
from harness.datasets.base import LayoutDataset, Scan, unify_name
from harness.datasets.checks import Counts
from harness.registry import build_dataset

_SIGNS = {
    "wrong size": r"pixels \(H x W\) but",
    "empty mask": r"marks no pixel",
    "unpaired": r"ha(s|ve) no mask|without (a mask|an image)|belong to no image|share a mask|one to one",
    "extra": r"that are extra",
    "missing": r"no such file|not there|(is|are) not in |there is no (category|folder)|(the|or) missing|has no images"
    r"|are published",
    "unreadable": r"cannot (read|use|list)",
}
"""Kind of a complaint to the words that tell it, in complaint and remedy; the first that fits."""
KINDS = ("missing", "extra", "unreadable", "unpaired", "wrong size", "empty mask", "layout")
"""Kinds of complaint in the order they are told; what fits no other is a matter of the layout."""


@dataclass(frozen=True, kw_only=True)
class CategoryCheck:
    """What was found of one category."""

    name: str
    found: Category | None
    """Its images; None where it cannot be listed."""
    expected: Counts | None
    """Published counts; None where there are none."""
    problems: tuple[LayoutProblem, ...]


def list_datasets(datasets: Mapping[str, Dataset]) -> Table:
    """Name, summary, licence, number of categories and presence of every layout, at its default place.

    Args:
        datasets: layout name to the dataset of that name.
    """
    table = Table(
        "dataset", Column("what it is", overflow="fold"), "licence", Column("categories", justify="right"), "here"
    )
    for name, dataset in datasets.items():
        published = published_counts(dataset).keys()
        found = () if dataset.missing() else dataset.category_names()
        missing = len(published - set(found))
        if not found:
            here = Text("no", "dim")
        elif missing:
            here = Text(f"{len(published) - missing} of {len(published)}", "yellow")
        else:
            here = Text("yes", "green")
        row = (name, dataset.summary, dataset.licence, str(len(published) or len(found) or ""))
        table.add_row(*map(Text, row), here)
    return table


def describe_dataset(dataset: Dataset, layout: str, console: Console) -> None:
    """Prints licence, home page, citation, place on disk, variants and published counts of a dataset."""
    counts = published_counts(dataset)
    has_numbers = any(_is_known(wanted) for wanted in counts.values())
    facts = {
        "what it is": dataset.summary,
        "layout": layout,
        "licence": dataset.licence,
        "home page": dataset.home_page,
        "citation": dataset.citation,
        "read from": f"{dataset.root or f'DATA/{dataset.name}'}/{getattr(dataset, 'tree', '')}".rstrip("/"),
        **{f"variant {name}": text for name, text in getattr(dataset, "variants", {}).items()},
    }
    if counts and not has_numbers:
        facts["categories"] = f"{len(counts)}: {', '.join(sorted(counts))}"
    console.print(Text(dataset.name, "bold"))
    _print_facts(console, facts)
    if not has_numbers:
        console.print("\nNo numbers per category are published; `adgrid datasets check` counts what is there.")
        return
    variant = getattr(dataset, "variant", None)
    totals = [_total(column) for column in zip(*map(_parts, counts.values()), strict=True)]
    table = Table(
        Column("category", footer=f"{len(counts)} categories"),
        *(
            Column(name, footer=_show(number), justify="right")
            for name, number in zip(("train", "test normal", "test anomalous"), totals, strict=True)
        ),
        Column("of which", overflow="fold"),
        title=f"published number of images{f', variant {variant}' if variant else ''}",
        title_justify="left",
        title_style="bold",
        show_footer=len(counts) > 1,
    )
    for name, wanted in sorted(counts.items()):
        kinds = ", ".join(f"{kind} {number}" for kind, number in sorted((wanted.defects or {}).items()))
        table.add_row(Text(name), *map(_show, _parts(wanted)), Text(kinds, "dim"))
    console.print()
    console.print(table)


def check_dataset(
    ref: DatasetRef, places: Places, categories: Sequence[str] | None, decode: bool, console: Console
) -> bool:
    """Compares a dataset's files with its layout and its published counts, and prints what it finds.

    Args:
        ref: which dataset, in which layout, where.
        places: the data root and the cache.
        categories: which to check; None for all that are there or published.
        decode: decode every pixel instead of reading headers alone.
        console: where to print; complaints are wrapped on a terminal and keep their lines elsewhere.

    Returns:
        Whether all is well.

    Raises:
        AdgridError: the layout or variant is unknown, or the layout cannot decode.
    """
    dataset = build_dataset(ref, places)
    if decode and not isinstance(dataset, LayoutDataset):
        raise AdgridError(f"dataset {ref.name!r}: its layout {ref.layout!r} has no check of pixels; leave out --decode")
    reason = dataset.missing()
    if reason is not None:
        _print_missing(dataset, reason, console)
        return False
    dataset.prepare()
    names = None if categories is None else sorted({unify_name(name) for name in categories})
    if isinstance(dataset, LayoutDataset):
        problems, listings = _watch_check(dataset, names, decode, console)
    else:
        problems = dataset.check(names)
        listings = {name: _list_category(dataset, name) for name in names or dataset.category_names()}
    checks = _sort_by_category(dataset, names, problems, listings)
    _print_table(dataset, ref, checks, console)
    _print_problems(dataset, problems, {check.name for check in checks if check.found is None}, console)
    if problems:
        told = Counter(kind_of(problem) for problem in problems)
        summary = ", ".join(f"{told[kind]} {kind}" for kind in KINDS if told[kind])
        number = f"{len(problems)} complaints" if len(problems) > 1 else "1 complaint"
        console.print(Text.assemble((number, "bold red"), f": {summary}"))
    elif not decode and isinstance(dataset, LayoutDataset):
        console.print("[green]all is well[/]; headers were read, --decode reads every pixel")
    else:
        console.print("[green]all is well[/]")
    return not problems


def kind_of(problem: LayoutProblem) -> str:
    """One of `KINDS`, by the words of a complaint."""
    words = f"{problem.what}; {problem.remedy}"
    return next((kind for kind, sign in _SIGNS.items() if re.search(sign, words)), "layout")


def published_counts(dataset: Dataset) -> Mapping[str, Counts]:
    """Published counts per category; empty where there are none."""
    return dataset.published_counts() if isinstance(dataset, LayoutDataset) else {}


def _watch_check(
    dataset: LayoutDataset, names: Sequence[str] | None, decode: bool, console: Console
) -> tuple[list[LayoutProblem], dict[str, Category | None]]:
    """Complaints of a check, and the images of every category that it came by; shows where it is."""
    listings: dict[str, Category | None] = {}
    scan = dataset.scan
    columns = (TextColumn("checking {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(dataset.name, total=len(names or dataset.category_names()))

        def watched(name: str) -> Scan:
            progress.update(task, description=name, completed=len(listings))
            result = scan(name)
            listings[name] = result.category
            return result

        # A check scans one category after the other. Watching it spares a second scan for the counts.
        dataset.scan = watched  # type: ignore[method-assign]
        problems = dataset.check(names, decode)
    return problems, listings


def _list_category(dataset: Dataset, name: str) -> Category | None:
    try:
        return dataset.category(name)
    except AdgridError:  # a broken or absent category, of which the complaints speak
        return None


def _sort_by_category(
    dataset: Dataset,
    names: Sequence[str] | None,
    problems: Sequence[LayoutProblem],
    listings: Mapping[str, Category | None],
) -> list[CategoryCheck]:
    """What is known of each category that was asked for, or else of all that are there or published."""
    counts = published_counts(dataset)
    return [
        CategoryCheck(
            name=name,
            found=listings.get(name),
            expected=counts.get(name),
            problems=tuple(problem for problem in problems if problem.category == name),
        )
        for name in sorted({*listings, *(counts if names is None else names)})
    ]


def _print_table(dataset: Dataset, ref: DatasetRef, checks: Sequence[CategoryCheck], console: Console) -> None:
    layout = "" if ref.layout == ref.name else f" in layout {ref.layout}"
    variant = getattr(dataset, "variant", None)
    console.print(Text(f"{ref.name}{layout}{f', variant {variant}' if variant else ''}", "bold"))
    console.print(Text(dataset.root, "dim"), soft_wrap=True)
    table = Table("category")
    for column in ("train", "test normal", "test anomalous"):
        table.add_column(column, justify="right")
    table.add_column("files")
    for check in checks:
        table.add_row(Text(check.name), *_count_cells(check), _state(check, bool(published_counts(dataset))))
        for kind, found, wanted in _differing_defects(check):
            table.add_row(Text(f"  {kind}", "dim"), "", "", _against(found, wanted))
    console.print(table)
    if any(_is_known(check.expected) for check in checks):
        console.print("[dim]found / published number of images[/]")
    maskless = [check.name for check in checks if check.found is not None and not check.found.has_masks]
    if maskless:
        console.print(Text(f"no masks, so pixel metrics are not available: {', '.join(maskless)}"), soft_wrap=True)


def _count_cells(check: CategoryCheck) -> list[Text]:
    found = (0, 0, 0)
    if check.found is not None:
        anomalous = sum(sample.label for sample in check.found.test)
        found = (len(check.found.train), len(check.found.test) - anomalous, anomalous)
    wanted = _parts(check.expected or Counts())
    return [_against(number, published) for number, published in zip(found, wanted, strict=True)]


def _parts(counts: Counts) -> tuple[int | None, int | None, int | None]:
    """Images for training, normal and anomalous ones for testing; None where the number is not published."""
    anomalous = counts.anomalous if counts.defects is None else sum(counts.defects.values())
    return counts.train, counts.good, anomalous


def _is_known(counts: Counts | None) -> bool:
    """Whether any number is published."""
    return counts is not None and any(part is not None for part in _parts(counts))


def _total(numbers: Iterable[int | None]) -> int | None:
    """The sum; None where a part is not known."""
    known = list(numbers)
    return None if None in known else sum(number or 0 for number in known)


def _differing_defects(check: CategoryCheck) -> list[tuple[str, int, int]]:
    """Defect type, found and published number, where these differ and there is more than one type."""
    if check.found is None or check.expected is None or check.expected.defects is None:
        return []
    found = Counter(sample.defect_type for sample in check.found.test if sample.label == 1)
    wanted = Counter(check.expected.defects)
    kinds = sorted(found.keys() | wanted.keys())
    return [(kind, found[kind], wanted[kind]) for kind in kinds if found[kind] != wanted[kind] and len(kinds) > 1]


def _show(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _against(found: int, published: int | None) -> Text:
    return (
        Text(str(found)) if published is None else Text(f"{found} / {published}", "" if found == published else "red")
    )


def _state(check: CategoryCheck, published: bool) -> Text:
    if check.found is None:
        return Text("absent", "red")
    if check.problems:
        return Text(", ".join(sorted({kind_of(problem) for problem in check.problems}, key=KINDS.index)), "red")
    return Text("ok", "green") if check.expected or not published else Text("ok, not published", "yellow")


def _print_problems(dataset: Dataset, problems: Sequence[LayoutProblem], absent: Set[str], console: Console) -> None:
    """Every complaint below its category, kind and remedy; absent categories are complaints about the dataset.

    The root, which the heading of the table names, is left out of paths.
    """
    # category -> kind -> remedy -> complaints
    groups: dict[str, dict[str, dict[str, list[str]]]] = {}
    for problem in sorted(problems, key=lambda problem: KINDS.index(kind_of(problem))):
        kinds = groups.setdefault("" if problem.category in absent else problem.category, {})
        remedies = kinds.setdefault(kind_of(problem), {})
        remedies.setdefault(problem.remedy, []).append(problem.what.replace(f"{dataset.root}/", ""))
    console.print()
    for category in sorted(groups):
        console.print(Text(category or dataset.name, "bold"))
        for kind, remedies in groups[category].items():
            number = sum(map(len, remedies.values()))
            console.print(Text.assemble("  ", (kind, "red"), f" ({number})"))
            for remedy, complaints in remedies.items():
                for complaint in complaints:
                    _print_beside("    ", Text(complaint), console)
                _print_beside("    → ", Text(remedy, "cyan"), console)
        console.print()


def _print_missing(dataset: Dataset, reason: str, console: Console) -> None:
    console.print(Text.assemble((dataset.name, "bold"), ": ", ("not here", "bold red")))
    facts = {"why": reason, "home page": dataset.home_page, "licence": dataset.licence}
    counts = published_counts(dataset)
    if counts:
        number = _total(part for wanted in counts.values() for part in _parts(wanted))
        categories = "1 category" if len(counts) == 1 else f"{len(counts)} categories"
        facts["should have"] = categories if number is None else f"{categories}, {number:,} images"
    _print_facts(console, facts)


def _print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Names in a column of their own, texts beside them."""
    width = max(12, *map(len, facts))
    for name, fact in facts.items():
        _print_beside(f"  {name:<{width}} ", Text(fact), console)


def _print_beside(head: str, text: Text, console: Console) -> None:
    """A text beside a head: wrapped there on a terminal, one line elsewhere, so that paths survive in a log."""
    width = max(console.width - len(head), 20)
    for place, line in enumerate(text.wrap(console, width) if console.is_terminal else [text]):
        console.print(Text.assemble((head if place == 0 else " " * len(head), "dim"), line), soft_wrap=True)
