"""Runs in the interpreter of another library and times what it is asked to; see `_compare.OtherSide`.

Reads one JSON object a line, answers with one. Arrays come as .npy files in the given folder.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np


def load(folder, name):
    return np.load(Path(folder) / f"{name}.npy")


class Anomalib:
    """The numerics of anomalib's PatchCore and PaDiM, on arrays of ours."""

    def __init__(self, threads, folder):
        import torch

        torch.set_num_threads(threads)
        self.torch, self.folder = torch, folder

    def tensor(self, name):
        return self.torch.from_numpy(load(self.folder, name))

    def coreset(self, features, start, num):
        """Seconds of `num` steps of `KCenterGreedy` on projected features, and its choices."""
        from anomalib.models.components import KCenterGreedy

        points = self.tensor(features)
        sampler = KCenterGreedy(points, sampling_ratio=0.1)
        sampler.features = points
        index, chosen = self.torch.tensor(start), [start]
        begin = time.perf_counter()
        for _ in range(num):
            sampler.update_distances(cluster_center=index)
            index = sampler.get_new_idx()
            sampler.min_distances.scatter_(0, index.unsqueeze(0).unsqueeze(1), 0.0)
            chosen.append(index)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "chosen": [int(i) for i in chosen]}

    def padim(self, train, test):
        """Seconds of fitting Gaussians to (N, D, h, w) and of the distances of test images; the distances."""
        from anomalib.models.components import MultiVariateGaussian
        from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator

        train, test = self.tensor(train), self.tensor(test)
        gaussian = MultiVariateGaussian()
        begin = time.perf_counter()
        stats = gaussian.fit(train)
        fitted = time.perf_counter()
        distances = [AnomalyMapGenerator.compute_distance(batch, stats) for batch in test.split(32)]
        done = time.perf_counter()
        np.save(Path(self.folder) / "distances.npy", self.torch.cat(distances)[:, 0].numpy())
        return {"fit_seconds": fitted - begin, "predict_seconds": done - fitted}


class Faiss:
    """faiss-cpu's exact search."""

    def __init__(self, threads, folder):
        import faiss

        faiss.omp_set_num_threads(threads)
        self.faiss, self.folder = faiss, folder

    def search(self, queries, bank, k):
        queries, bank = load(self.folder, queries), load(self.folder, bank)
        begin = time.perf_counter()
        index = self.faiss.IndexFlatL2(bank.shape[1])
        index.add(bank)
        _, found = index.search(queries, k)
        seconds = time.perf_counter() - begin
        np.save(Path(self.folder) / "found.npy", found)
        return {"seconds": seconds}


def main():
    threads, folder = int(sys.argv[1]), sys.argv[2]
    libraries = {"coreset": Anomalib, "padim": Anomalib, "search": Faiss}
    opened = {}
    for line in sys.stdin:
        request = json.loads(line)
        task = request.pop("task")
        library = libraries[task]
        if library not in opened:
            opened[library] = library(threads, folder)
        print(json.dumps(getattr(opened[library], task)(**request)), flush=True)


if __name__ == "__main__":
    main()
