"""Small runs in this process, without Ray: what most tests of the harness need."""

import uuid

from rich.console import Console

from harness.contracts import RunSettings
from harness.plan import make_plan
from harness.pretraining import run_pretraining
from harness.space import parse_space
from harness.store import Store
from harness.trial import run_trial

SPACE = """
name: toys
methods: [toy_features]
backbones: [toy_resnet]
datasets: [toy_squares]
protocol: {image_size: 64}
"""


class SmallRun:
    """Plans and runs spaces in one storage root, trial after trial."""

    def __init__(self, tmp_path, places):
        self.places = places
        self.root = str(tmp_path / "root")
        self.store = Store(self.root)
        self.notes = []

    def plan(self, space=SPACE, overrides=(), random_weights=True):
        return make_plan(parse_space(space, "test.yaml", overrides), self.places, random_weights)

    def settings(self, plan, **changes):
        return RunSettings(
            root=self.root,
            places=self.places,
            run_id=plan.run_id,
            command="test",
            invocation=uuid.uuid4().hex,
            **{"pictures": False, **changes},
        )

    def run_plan(self, plan, **changes):
        """Rows computed now, by category (or by method and category where there are several methods)."""
        settings = self.settings(plan, **changes)
        for pretraining in plan.pretrainings:
            run_pretraining(pretraining, settings, lambda *note: self.notes.append(note))
        rows = [
            row for trial in plan.trials for row in run_trial(trial, settings, lambda *note: self.notes.append(note))
        ]
        several = len({row.method for row in rows}) > 1
        return {(row.method, row.category) if several else row.category: row for row in rows}

    def __call__(self, space=SPACE, overrides=(), **changes):
        return self.run_plan(self.plan(space, overrides), **changes)

    def options(self, **changes):
        from harness.run import RunOptions  # brings pandas and MLflow, which tests of single trials do without

        return RunOptions(
            data_root=self.places.data_root,
            cache_dir=self.places.cache_dir,
            **{"root": self.root, "random_weights": True, "tracking_uri": "off", "pictures": False, **changes},
        )


def quiet_console():
    return Console(quiet=True)


def write(tmp_path, text):
    """The path of a search space with this text."""
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return str(path)
