"""Data at a URI are listed, hashed and read exactly as in a local folder."""

import fsspec
import numpy as np
import pytest
from trees import make_category

from harness.contracts import AdgridError, Places, Preprocessing
from harness.datasets.files import is_folder, list_folder, open_file, resolve_path, stat_file
from harness.datasets.fingerprint import content_hashes
from harness.datasets.folder import Folder
from harness.datasets.images import load_image, load_mask


@pytest.fixture
def remote(tmp_path):
    """The same category in a local folder and in a file system that only a URI reaches."""
    make_category(tmp_path / "mine", "Tür grün")
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/mine", "/bucket/mine", recursive=True)
    yield "memory://bucket/mine"
    memory.rm("/bucket", recursive=True)


def test_a_dataset_at_a_uri_gives_the_same_samples_pixels_and_hashes(tmp_path, remote):
    local = Folder("mine", str(tmp_path / "mine"), Places(cache_dir="unused"))
    far = Folder("mine", None, Places(data_root="memory://bucket/", cache_dir="unused"))
    assert far.root == remote
    assert far.missing() is None
    assert far.check(decode=True) == []
    here, there = local.category("Tür grün"), far.category("Tür grün")
    assert [s.sample_id for s in there.train + there.test] == [s.sample_id for s in here.train + here.test]
    small = Preprocessing(image_size=(6, 6))
    for near, away in zip(here.test, there.test, strict=True):
        assert away.path.startswith(remote)
        np.testing.assert_array_equal(load_image(away.path, small), load_image(near.path, small))
        np.testing.assert_array_equal(load_mask(away, small), load_mask(near, small))
    cache = str(tmp_path / "cache")
    hashes = [
        list(content_hashes([sample.path for sample in samples], cache).values()) for samples in (here.test, there.test)
    ]
    assert hashes[0] == hashes[1]


def test_a_root_too_low_at_a_uri_is_recognised(remote):
    dataset = Folder("mine", f"{remote}/Tür grün", Places(cache_dir="unused"))
    assert f"name {remote} as its root, or memory://bucket as --data-root" in dataset.missing()


def test_what_is_not_at_a_uri_is_reported(remote):
    assert list_folder(f"{remote}/absent") == []
    assert not is_folder(f"{remote}/absent")
    with pytest.raises(AdgridError, match="no such file"):
        stat_file(f"{remote}/absent.png")
    with pytest.raises(FileNotFoundError):
        open_file(f"{remote}/absent.png")
    with pytest.raises(AdgridError, match="no such file"):
        load_image(f"{remote}/absent.png", Preprocessing())


def test_an_unknown_scheme_is_refused():
    with pytest.raises(AdgridError, match="cannot open nowhere://bucket"):
        list_folder("nowhere://bucket/data")


def test_paths_are_made_absolute_and_uris_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("a/../b/") == f"{tmp_path}/b"
    assert resolve_path("file:///data/my%20parts") == "/data/my parts"
    assert resolve_path("s3://bucket/data/") == "s3://bucket/data"
    with pytest.raises(AdgridError, match="takes no options"):
        resolve_path("s3://bucket/data?endpoint_override=localhost:9000")


def test_a_folder_that_may_not_be_listed_is_an_error_and_an_absent_one_is_empty(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert list_folder(str(tmp_path / "absent")) == []
    assert list_folder(str(tmp_path / "file")) == []

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("harness.datasets.files.os.scandir", refuse)
    with pytest.raises(AdgridError, match=r"cannot list the folder .*Permission denied.*permissions"):
        list_folder(str(tmp_path))
