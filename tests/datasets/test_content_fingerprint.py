"""Content hashes and the k-shot draw: the same on every node, cheap the second time, safe between processes."""

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace

import pytest

from harness.contracts import AdgridError, Category, Sample
from harness.datasets import fingerprint
from harness.datasets.fingerprint import content_hashes, draw_shots


@pytest.fixture
def files(tmp_path):
    """Six settled files in two folders."""
    paths = []
    for number in range(6):
        path = tmp_path / "data" / f"folder {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content %d" % number * 1000)
        os.utime(path, (1_600_000_000, 1_600_000_000))
        paths.append(str(path))
    return paths


@pytest.fixture
def reads(monkeypatch):
    """Counts how often each file is really read."""
    counter = Counter()
    original = fingerprint._hash_file

    def counted(path):
        counter[path] += 1
        return original(path)

    monkeypatch.setattr(fingerprint, "_hash_file", counted)
    return counter


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def test_hashes_are_sha256_of_the_bytes_in_the_order_asked_for(tmp_path, files):
    asked = [files[3], files[0], files[3], files[5]]
    hashes = content_hashes(asked, str(tmp_path / "cache"))
    assert list(hashes.items()) == [(path, sha256(path)) for path in (files[3], files[0], files[5])]
    assert content_hashes([], str(tmp_path / "cache")) == {}


def test_the_second_call_reads_no_file(tmp_path, files, reads):
    first = content_hashes(files, str(tmp_path / "cache"))
    assert reads == Counter(files)
    assert content_hashes(files, str(tmp_path / "cache")) == first
    assert reads == Counter(files)


def test_only_a_changed_file_is_read_again(tmp_path, files, reads):
    cache = str(tmp_path / "cache")
    before = content_hashes(files, cache)
    with open(files[2], "r+b") as file:
        file.write(b"C")  # the same size
    os.utime(files[2], (1_600_000_001, 1_600_000_001))
    after = content_hashes(files, cache)
    assert [path for path in files if after[path] != before[path]] == [files[2]]
    assert after[files[2]] == sha256(files[2])
    assert reads == Counter(files) + Counter([files[2]])


def test_a_new_date_alone_changes_no_hash(tmp_path, files):
    cache = str(tmp_path / "cache")
    before = content_hashes(files, cache)
    for path in files:
        os.utime(path, (1_650_000_000, 1_650_000_000))
    assert content_hashes(files, cache) == before


def test_hashes_do_not_depend_on_the_place(tmp_path, files):
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    copies = [path.replace(f"{tmp_path}/data", f"{tmp_path}/elsewhere") for path in files]
    cache = str(tmp_path / "cache")
    assert list(content_hashes(files, cache).values()) == list(content_hashes(copies, cache).values())


def test_a_file_written_a_moment_ago_is_not_trusted_to_stay(tmp_path, files, reads):
    cache = str(tmp_path / "cache")
    now = time.time_ns()
    os.utime(files[0], ns=(now, now))
    content_hashes(files, cache)
    # Written again within the same tick of the clock, with the same size: size and time cannot tell.
    with open(files[0], "r+b") as file:
        file.write(b"C")
    os.utime(files[0], ns=(now, now))
    assert content_hashes(files, cache)[files[0]] == sha256(files[0])
    assert reads == Counter(files) + Counter([files[0]])


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"files": {"0.png": [1]}}', b"\xff\xfe"])
def test_a_damaged_memory_is_made_anew(tmp_path, files, reads, damage):
    cache = tmp_path / "cache"
    first = content_hashes(files, str(cache))
    memories = list((cache / "hashes").iterdir())
    assert len(memories) == 2
    for memory in memories:
        memory.write_bytes(damage)
    assert content_hashes(files, str(cache)) == first
    assert content_hashes(files, str(cache)) == first
    assert reads == Counter(files + files)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, files):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert content_hashes(files, str(tmp_path / "cache"))[files[0]] == sha256(files[0])


def test_a_missing_file_is_named(tmp_path, files):
    with pytest.raises(AdgridError, match=r"gone\.png.*copy the file again"):
        content_hashes([*files, f"{tmp_path}/gone.png"], str(tmp_path / "cache"))


def test_progress_counts_up_to_all_files(tmp_path, files):
    seen = []
    content_hashes(files[:2], str(tmp_path / "cache"))
    content_hashes(files, str(tmp_path / "cache"), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 6), (4, 6), (5, 6), (6, 6)]


def test_threads_writing_at_once_leave_a_whole_memory(tmp_path, files):
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda number: content_hashes(files[number % 3 :], str(cache)), range(24)))
    for result in results:
        assert all(digest == sha256(path) for path, digest in result.items())
    assert {path.suffix for path in (cache / "hashes").iterdir()} == {".json"}
    remembered = [json.loads(path.read_bytes())["files"] for path in (cache / "hashes").iterdir()]
    assert all(len(names) == 3 for names in remembered)


@pytest.mark.slow
def test_processes_writing_at_once_agree(tmp_path, files):
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(content_hashes, [files] * 6, [str(tmp_path / "cache")] * 6))
    assert all(result == {path: sha256(path) for path in files} for result in results)


# --- the k-shot draw -----------------------------------------------------------------------------------------------


def make_listing(number=20, name="bottle"):
    def sample(split, kind, i):
        sample_id = f"{split}/{kind}/{i:03d}.png"
        label = 0 if kind == "good" else 1
        return Sample(
            path=f"/data/{sample_id}", category=name, sample_id=sample_id, split=split, label=label, defect_type=kind
        )

    return Category(
        name=name,
        train=tuple(sample("train", "good", i) for i in range(number)),
        test=(sample("test", "good", 0), sample("test", "crack", 0)),
        has_masks=False,
    )


def test_no_shots_means_all_training_images():
    listing = make_listing()
    assert draw_shots("mvtec_ad", listing, None, 0) == listing.train
    assert draw_shots("mvtec_ad", listing, 20, 0) == listing.train


def test_a_draw_keeps_the_order_and_takes_training_images_only():
    listing = make_listing()
    drawn = draw_shots("mvtec_ad", listing, 6, 0)
    assert len(set(drawn)) == 6
    assert set(drawn) <= set(listing.train)
    assert list(drawn) == sorted(drawn, key=lambda sample: sample.path)


def test_a_smaller_draw_is_part_of_a_larger_one():
    listing = make_listing()
    for shots in range(1, 20):
        assert set(draw_shots("d", listing, shots, 3)) < set(draw_shots("d", listing, shots + 1, 3))


def test_a_draw_depends_on_dataset_category_and_seed_but_not_on_the_place():
    listing = make_listing()
    drawn = [sample.sample_id for sample in draw_shots("d", listing, 6, 0)]
    for dataset, category, seed in (("e", "bottle", 0), ("d", "cable", 0), ("d", "bottle", 1)):
        other = draw_shots(dataset, make_listing(name=category), 6, seed)
        assert [sample.sample_id for sample in other] != drawn
    moved = replace(listing, train=tuple(replace(s, path=s.path.replace("/data", "/mnt")) for s in listing.train))
    assert [sample.sample_id for sample in draw_shots("d", moved, 6, 0)] == drawn


def test_the_draw_is_the_same_for_ever():
    drawn = draw_shots("mvtec_ad", make_listing(), 4, 0)
    assert [sample.sample_id[-7:-4] for sample in drawn] == ["003", "006", "017", "018"]


def test_draws_are_fair():
    listing = make_listing(10)
    times = Counter(sample.path for seed in range(400) for sample in draw_shots("d", listing, 3, seed))
    # 120 expected; five standard deviations of a binomial with p = 0.3
    assert all(abs(times[sample.path] - 120) < 46 for sample in listing.train)


@pytest.mark.parametrize("shots", [0, -1, 21])
def test_more_shots_than_images_is_an_error_with_both_numbers(shots):
    with pytest.raises(AdgridError, match=rf"shots={shots} .*'bottle' of dataset 'd', which has 20 normal"):
        draw_shots("d", make_listing(), shots, 0)
