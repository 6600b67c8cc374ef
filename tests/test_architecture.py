"""The import directions, by reading the code: a rule we care about is a test."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
# A module may import those of lower layers, and within a layer only what stands to its left.
LAYERS = [
    ["contracts"],
    ["registry", "identity", "measure", "maps", "pixel_counts", "curves", "quantisation", "metrics"],
    ["row_files", "store", "claims"],
    ["bundle", "intervals", "ranks"],
    ["workers", "watch", "notes", "checkpoints", "placement", "options", "datasets"],
    ["taps", "imagebind", "positions", "backbone_table", "download", "weights", "backbones", "backbone_check"],
    ["feature_store", "image_split", "features", "stages", "auxiliary"],
    ["matrices", "tables", "matrix_page", "figures", "truth", "given_references", "resolve", "represented"],
    ["evaluate", "rows", "footprint", "fitting", "sheets", "details"],
    ["reference_source", "pretraining", "trial", "training"],
    ["search", "study", "space", "plan_representations", "study_plan", "plan", "progress", "dataset_check"],
    ["published", "matching", "estimates", "compare", "comparison_figures", "comparison_tables", "reproduction"],
    [
        "sweep",
        "study_track",
        "studies",
        "study_figures",
        "report",
        "html_cells",
        "html_report",
        "study_report",
        "leaderboard",
        "mirror_values",
        "tracking",
        "mirrored",
    ],
    ["run_folder", "run_report", "tracker", "sources", "compare_commands", "rescore", "submit"],
    ["run", "report_commands", "mlflow_commands"],
    ["golden", "verify", "audit", "chaos"],
    ["cli"],
]
HOMES = {
    "timm": {"harness/backbones.py"},
    "torchvision": {"harness/backbones.py"},
    "mlflow": {"harness/tracking.py", "harness/mirrored.py"},  # writing and reading share nothing but the tags
    "pandas": {"harness/report.py"},
    "ray.tune": {"harness/sweep.py", "harness/studies.py", "harness/study_track.py"},
    "ray.train": {"harness/training.py"},
    "ray": {
        "harness/chaos.py",
        "harness/sweep.py",
        "harness/studies.py",
        "harness/study_track.py",
        "harness/submit.py",
        "harness/training.py",
    },
    "matplotlib": {"harness/figures.py", "harness/study_figures.py"},
}


def python_files(folder):
    return sorted(path for path in (REPO / folder).rglob("*.py"))


def imports_of(path, skip_type_checking=True):
    """Dotted names of everything a file imports; annotations-only imports are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if skip_type_checking and id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(module):
    for layer, names in enumerate(LAYERS):
        if module in names:
            return layer, names.index(module)
    raise AssertionError(f"harness/{module}.py stands in no layer; add it to LAYERS")


@pytest.mark.parametrize("path", python_files("harness"), ids=lambda path: str(path.relative_to(REPO)))
def test_the_harness_imports_downwards(path):
    parts = path.relative_to(REPO / "harness").with_suffix("").parts
    own = parts[0]
    if own == "__init__":
        return
    for name in imports_of(path):
        if name.startswith("harness.") and (other := name.split(".")[1]) != own and other != "__version__":
            assert place(other) < place(own), f"{own} imports {other}, which stands above it"
        assert not name.startswith("methods"), f"{own} imports {name}: the harness knows no particular method"


@pytest.mark.parametrize("path", python_files("methods"), ids=lambda path: str(path.relative_to(REPO)))
def test_a_method_imports_contracts_and_components_alone(path):
    folder = path.relative_to(REPO / "methods").parts[0].removesuffix(".py")
    for name in imports_of(path):
        ours = name.split(".")[0] in ("harness", "methods")
        allowed = ("harness.contracts", "methods.components", f"methods.{folder}")
        assert not ours or name in ("harness", "methods") or name.startswith(allowed), f"{path.name} imports {name}"


@pytest.mark.parametrize("library", HOMES)
def test_every_outside_library_has_one_home(library):
    found = {
        str(path.relative_to(REPO))
        for folder in ("harness", "methods")
        for path in python_files(folder)
        if any(name == library or name.startswith(f"{library}.") for name in imports_of(path))
    }
    assert found <= HOMES[library]


def test_no_module_reads_environment_variables_of_our_own():
    readers = {
        str(path.relative_to(REPO))
        for folder in ("harness", "methods")
        for path in python_files(folder)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    # The homes of Ray and MLflow set what those libraries read only from the environment.
    assert readers <= {"harness/chaos.py", "harness/sweep.py", "harness/training.py", "harness/tracking.py"}


def test_contracts_do_not_import_torch():
    import subprocess
    import sys

    code = "import sys, harness.contracts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
