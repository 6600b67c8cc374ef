"""Nearest neighbours of real patch features against faiss-cpu's IndexFlatL2.

    python benchmarks/neighbours.py --data-root DATA [--faiss-python PYTHON] [--json FILE]

The memory bank is a greedy coreset of the training patches, the queries are patches of test images (repeated and
slightly disturbed where there are too few). With `--faiss-python`, an interpreter that has faiss-cpu, faiss searches
in a process of its own; otherwise a chunked `torch.cdist` with `topk` stands in.
"""

import resource
import tempfile

import numpy as np
import torch
from _compare import OtherSide, compare, encode_folder, interleave, make_parser, peak_mib, report

from methods.components.coreset import greedy_coreset
from methods.components.neighbours import nearest
from methods.components.patches import average_and_concatenate


def chunked_cdist(queries, bank, k):
    """The usual search: all distances of a chunk, then topk."""
    return torch.cat([torch.cdist(chunk, bank).topk(k, largest=False).indices for chunk in queries.split(1024)])


def measure(queries, bank, indices):
    """(Q, k) float64 distances to the rows that were found, ascending."""
    pairs = zip(queries.split(4096), indices.split(4096), strict=True)
    return torch.cat([(q[:, None].double() - bank[rows].double()).norm(dim=2) for q, rows in pairs]).sort(dim=1).values


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--faiss-python", help="interpreter with faiss-cpu installed")
    parser.add_argument("--queries", type=int, default=60_000)
    parser.add_argument("--rows", type=int, default=16_000)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[1, 9], help="of every query, one search for each")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    train = encode_folder(options, options.images, strides=(8, 16))
    test = encode_folder(options, options.test_images, strides=(8, 16))
    embedding = average_and_concatenate([level.shape[1] for level in train], 3)
    bank_from, test_patches = embedding(train).flatten(0, 2), embedding(test).flatten(0, 2)
    bank = bank_from[greedy_coreset(bank_from, options.rows)].clone()
    generator = torch.Generator().manual_seed(0)
    repeats = -(-options.queries // len(test_patches))
    queries = test_patches.repeat(repeats, 1)[: options.queries]
    if repeats > 1:
        queries += 0.05 * test_patches.std() * torch.randn(queries.shape, generator=generator)
    del train, test, bank_from, test_patches

    figures = {
        "queries": len(queries),
        "rows": len(bank),
        "dimensions": bank.shape[1],
        "threads": options.threads,
        "other": "faiss IndexFlatL2" if options.faiss_python else "chunked cdist",
    }
    with tempfile.TemporaryDirectory() as folder:
        other = None
        if options.faiss_python:
            np.save(f"{folder}/queries.npy", queries.numpy())
            np.save(f"{folder}/bank.npy", bank.numpy())
            other = OtherSide(options.faiss_python, options.threads, folder)
        for k in options.neighbours:
            found, measured = search(queries, bank, k, other, options.rounds)
            if other:
                found["theirs"] = torch.from_numpy(np.load(f"{folder}/found.npy"))
            measured |= check(queries, bank, found)
            figures |= {f"k{k}_{name}": value for name, value in measured.items()}
        if other:
            other.close()
    figures["process_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report(figures, options.json)


def search(queries, bank, k, other, rounds):
    """What each side found, as far as it ran in this process, and its seconds."""
    found = {}

    def ours():
        found["ours"] = nearest(queries, bank, k)

    def theirs():
        if other:
            return other.ask("search", queries="queries", bank="bank", k=k)["seconds"]
        found["theirs"] = chunked_cdist(queries, bank, k)
        return None

    _, grown = peak_mib(ours)
    seconds = interleave({"ours": ours, "theirs": theirs}, rounds)
    return found, compare(seconds, "ours", "theirs") | {"ours_grew_by_mib": grown}


def check(queries, bank, found):
    """Errors of our distances, and how much farther than the other's rows ours are, in float64."""
    distances, indices = found["ours"]
    exact, theirs_exact = (measure(queries, bank, rows) for rows in (indices, found["theirs"]))
    return {
        "ours_relative_error": float((distances / exact - 1).nan_to_num(0).abs().max()),
        "ours_farther_than_theirs_at_most": float((exact - theirs_exact).max()),
        "theirs_farther_than_ours_at_most": float((theirs_exact - exact).max()),
    }


if __name__ == "__main__":
    main()
