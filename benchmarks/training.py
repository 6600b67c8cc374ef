"""What the training loop and Ray Train cost: the same training of UniAD's transformer in four ways, in turn.

    python benchmarks/training.py --data-root DATA [--json FILE]

- plain: a hand-written loop over the same batches, one thread;
- loop: `harness.stages.train_stage` in this process, one thread;
- ray_1: one Ray Train worker with one core and one thread;
- ray_2: two such workers that share batches of twice the size, so that each has as many images per step as above.

Features of real images lie in memory on all sides. Seconds are those of an epoch after the first, starting Ray and the
workers left out. The overhead of a loop is its epoch against the plain one, the speed-up of two workers their epoch
against one worker's. The load average is printed: with other work on the machine two workers have less than two cores.
"""

import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

import ray
import ray.train
import torch
from _compare import encode_folder, interleave, make_parser, report
from ray.train.torch import TorchTrainer

from harness.contracts import Batch, Context, SampleKey, Share, derive_seed
from harness.stages import epoch_batches, train_stage
from harness.workers import Workers
from methods.uniad import Config, UniAD

SEED = 0


class MemorySplit:
    """Feature maps in memory, each image a few times over."""

    def __init__(self, levels, repeats):
        self.levels = [torch.cat([level] * repeats) for level in levels]
        self.samples = tuple(
            SampleKey(path=f"/{i}", category="c", sample_id=str(i)) for i in range(len(self.levels[0]))
        )

    def __len__(self):
        return len(self.samples)

    def take(self, indices):
        rows = list(indices)
        return Batch(samples=tuple(self.samples[i] for i in rows), levels=tuple(level[rows] for level in self.levels))


def make_stage(split, settings, batch_size):
    """UniAD's stage for these features."""
    context = Context(
        level_shapes=tuple(tuple(level.shape[1:]) for level in split.levels),
        image_size=(224, 224),
        categories=("c",),
        device=torch.device("cpu"),
        seed_of=lambda name: derive_seed(name, SEED),
        encode=lambda images: (),
    )
    config = Config(epochs=settings["epochs"], batch_size=batch_size, hidden_width=settings["width"], dropout=0.0)
    (stage,) = UniAD(config, context).stages()
    return stage


def run_plain(split, settings):
    """Seconds of each epoch of a loop that does what any training does, and no more."""
    stage = make_stage(split, settings, settings["batch"])
    (optimizer,) = stage.configure_optimizers()
    stage.module.train()
    seconds = []
    for epoch in range(settings["epochs"]):
        start = time.perf_counter()
        for step, places in enumerate(epoch_batches(len(split), settings["batch"], SEED, epoch)):
            share = Share(epoch=epoch, step=step, num_images=len(places), positions=tuple(range(len(places))))
            for loss in stage.losses(split.take(places), share):
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(stage.module.parameters(), stage.clip_norm)
                optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def run_loop(split, settings, workers=None):
    """Seconds of each epoch of the harness' loop."""
    workers = workers or Workers()
    stage = make_stage(split, settings, settings["batch"] * workers.size)
    ends = [time.perf_counter()]
    train_stage(stage, split, SEED, workers=workers, report=lambda *_: ends.append(time.perf_counter()))
    return [end - start for start, end in itertools.pairwise(ends)]


def work(settings):
    """What a Ray Train worker does."""
    torch.set_num_threads(1)
    place = ray.train.get_context()
    split = MemorySplit(torch.load(settings["levels"]), settings["repeats"])
    return run_loop(split, settings, Workers(rank=place.get_world_rank(), size=place.get_world_size()))


def run_ray(settings, num_workers, folder):
    """The same from inside a Ray Train group of one-core workers."""
    trainer = TorchTrainer(
        work,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(name=f"bench-{time.time_ns()}", storage_path=folder),
    )
    return trainer.fit().return_value


def main():
    parser = make_parser(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--epochs", type=int, default=2, help="the first is not counted")
    parser.add_argument("--repeats", type=int, default=2, help="times that each image stands in an epoch")
    parser.add_argument("--batch", type=int, default=8, help="images per step and worker")
    parser.add_argument("--width", type=int, default=256, help="of the transformer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    levels = encode_folder(options, options.images, (8, 16))
    split = MemorySplit(levels, options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "levels.pt"
        torch.save(levels, path)
        settings = {
            "epochs": options.epochs,
            "repeats": options.repeats,
            "batch": options.batch,
            "width": options.width,
            "levels": str(path),
        }
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        loads = []

        def epoch_of(run, *arguments):
            def measure():
                loads.append(os.getloadavg()[0])
                return statistics.median(run(*arguments)[1:])

            return measure

        seconds = interleave(
            {
                "plain": epoch_of(run_plain, split, settings),
                "loop": epoch_of(run_loop, split, settings),
                "ray_1": epoch_of(run_ray, settings, 1, folder),
                "ray_2": epoch_of(run_ray, settings, 2, folder),
            },
            options.rounds,
        )
        ray.shutdown()
    ratios = {
        name: [other / base for other, base in zip(seconds[top], seconds[bottom], strict=True)]
        for name, top, bottom in (
            ("loop_of_plain", "loop", "plain"),
            ("ray_1_of_plain", "ray_1", "plain"),
            ("ray_1_of_loop", "ray_1", "loop"),
            ("two_workers_times_faster", "ray_1", "ray_2"),
        )
    }
    figures = {
        "images_per_epoch": len(split),
        "steps_per_epoch": len(epoch_batches(len(split), options.batch, SEED, 0)),
        **{f"{name}_epoch_seconds": statistics.median(values) for name, values in seconds.items()},
        **{name: statistics.median(values) for name, values in ratios.items()},
        **{f"{name}_rounds": [round(value, 3) for value in values] for name, values in ratios.items()},
        "load_average_at_each_start": [round(load, 1) for load in loads],
    }
    report(figures, options.json)


if __name__ == "__main__":
    main()
