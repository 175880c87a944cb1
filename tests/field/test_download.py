"""`--download` against a hub on this machine: what is fetched, what is not, and what is said."""

import contextlib
import json
import os
import threading
import time
from collections import Counter
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from waits import wait_until

from offload_rt.cli import console
from offload_rt.cli.download import _Hub
from offload_rt.model.locate import HubId

COMMIT = "c0ffee" * 6 + "0000"


def etag(name):
    return sha256(name.encode()).hexdigest()


def suppressed(call, *arguments):
    with contextlib.suppress(Exception):
        call(*arguments)


class Hub(ThreadingHTTPServer):
    """Serves the files of one folder as the repository acme/tiny.

    Attributes:
        sent: bytes of content by name.
        lost: a name that it lists and does not have.
        cut: a name whose answer stops in the middle, until the hub ends.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Repository)
        self.folder, self.sent, self.lost, self.cut = folder, Counter(), None, None
        self.stalled, self.ended = threading.Event(), threading.Event()

    def others_are_there(self, name):
        """Wait until the other files of weights are in the cache."""
        others = [n for n in self.names if n.endswith(".safetensors") and n != name]
        blobs = Path(os.environ["HF_HUB_CACHE"]) / "models--acme--tiny" / "blobs"
        until = time.monotonic() + 20
        while not all((blobs / etag(n)).exists() for n in others) and time.monotonic() < until:
            time.sleep(0.01)

    @property
    def names(self):
        paths = (p for p in sorted(self.folder.rglob("*")) if p.is_file())
        return [str(path.relative_to(self.folder)) for path in paths]


class Repository(BaseHTTPRequestHandler):
    """The parts of the hub's API that a download needs."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        path = self.path.partition("?")[0]
        if path == "/api/models/acme/tiny/revision/main":
            self.send(json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": []}).encode(), body)
        elif path == f"/api/models/acme/tiny/tree/{COMMIT}":
            sizes = {name: os.stat(self.server.folder / name).st_size for name in self.server.names}
            tree = [
                {
                    "type": "file",
                    "path": name,
                    "size": size,
                    "oid": etag(name),
                }
                for name, size in sizes.items()
            ]
            self.send(json.dumps(tree).encode(), body)
        elif path.startswith(f"/acme/tiny/resolve/{COMMIT}/"):
            self.send_file(path.removeprefix(f"/acme/tiny/resolve/{COMMIT}/"), body)
        else:
            self.refuse("RepoNotFound")

    def refuse(self, code):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_file(self, name, body):
        if name == self.server.lost and body:
            self.server.others_are_there(name)
            return self.refuse("EntryNotFound")
        data = (self.server.folder / name).read_bytes()
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag(name)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            self.server.sent[name] += len(data) - start
            if name == self.server.cut:
                self.wfile.write(data[start : len(data) // 2])
                self.server.stalled.set()
                self.server.ended.wait(30)
            self.wfile.write(data[start:])

    def send(self, data, body):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that serves `tmp_path / "repo"`, and an empty cache."""
    (tmp_path / "repo").mkdir()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        # a verb keeps its process off the network; here the next one runs in the same process
        monkeypatch.delitem(console._QUIET_LIBRARIES, name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with Hub(tmp_path / "repo") as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


def fill(hub, folder, **more):
    """Put the files of a model into the repository, and others."""
    for file in folder.iterdir():
        (hub.folder / file.name).write_bytes(file.read_bytes())
    for name, data in more.items():
        path = hub.folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


def test_a_model_is_fetched_when_asked_for_and_not_again(hub, make_tiny, offload_run):
    fill(
        hub, make_tiny("llama", tokenizer=True), **{"original__consolidated.safetensors": b"x" * 99}
    )
    refused = offload_run("plan", "acme/tiny", "--draft", "none")
    assert "add --download" in refused.err and not hub.sent
    done = offload_run("plan", "acme/tiny", "--draft", "none", "--download")
    assert done.code == 0, done.err
    assert "downloading acme/tiny: 1 file," in done.err
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(hub.sent)
    assert not any(name.startswith("original/") for name in hub.sent)
    hub.sent.clear()
    again = offload_run("plan", "http://huggingface.co/acme/tiny", "--draft", "none", "--download")
    assert again.code == 0 and not hub.sent
    assert offload_run("plan", "acme/tiny", "--draft", "none").code == 0


def split(folder):
    """Put the tensors of a model into two files."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()


def test_after_an_interruption_whole_files_are_kept(hub, make_tiny, offload_run):
    fill(hub, make_tiny("llama"))
    split(hub.folder)
    hub.lost = "model-2.safetensors"
    done = offload_run("plan", "acme/tiny", "--draft", "none", "--download")
    assert done.code == 4 and "model-2.safetensors" in done.err and hub.sent["model-1.safetensors"]
    refused = offload_run("plan", "acme/tiny", "--draft", "none")
    assert refused.code == 4 and "or add --download" in refused.err
    hub.lost = None
    hub.sent.clear()
    assert offload_run("plan", "acme/tiny", "--draft", "none", "--download").code == 0
    assert list(hub.sent) == ["model-2.safetensors"]


def test_when_nobody_listens_no_half_file_is_left(hub, make_tiny, tmp_path):
    fill(hub, make_tiny("llama"))
    hub.cut = "model.safetensors"
    blobs = tmp_path / "cache" / "models--acme--tiny" / "blobs"
    with _Hub.open(HubId("acme/tiny")) as repository:
        threading.Thread(target=lambda: suppressed(repository.get, [hub.cut]), daemon=True).start()
        wait_until(lambda: any(blobs.glob("*.incomplete")))
        assert hub.stalled.wait(10)
    assert not list(blobs.glob("*.incomplete"))


def test_weights_of_a_kind_that_is_not_read_are_not_fetched(hub, make_tiny, offload_run):
    fill(hub, make_tiny("llama"))
    config = hub.folder / "config.json"
    raw = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    config.write_text(json.dumps(raw))
    done = offload_run("generate", "acme/tiny", "-p", "hi", "--download")
    assert done.code == 4 and "its weights are quantised (bitsandbytes" in done.err
    assert "model.safetensors" not in hub.sent


def test_a_repository_without_safetensors_is_refused_by_what_it_has(hub, make_tiny, offload_run):
    fill(hub, make_tiny("llama"), **{"x.gguf": b"GGUF" + bytes(2**21)})
    (hub.folder / "model.safetensors").unlink()
    done = offload_run("plan", "acme/tiny", "--download")
    assert (
        done.code == 4
        and "no safetensors weights on the hub (large files end in .gguf): get one with" in done.err
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["acme/none", "--download"], "has no acme/none, or it is private: check the name"),
        (["{folder}", "--download"], "--download has no effect"),
        (["acme/tiny", "--download", "--draft", "model:acme/small"], "has no acme/small"),
    ],
)
def test_what_cannot_be_fetched_gets_a_sentence(hub, make_tiny, offload_run, arguments, says):
    folder = make_tiny("llama")
    fill(hub, folder)
    done = offload_run("plan", *(part.format(folder=folder) for part in arguments))
    assert done.code in (2, 4) and says in done.err and "Traceback" not in done.err


def test_offline_by_choice_and_without_a_network(hub, offload_run, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    done = offload_run("plan", "acme/tiny", "--download")
    assert done.code == 4 and "check the network, and run it again" in done.err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = offload_run("plan", "acme/tiny", "--download")
    assert done.code == 2 and "--download contradicts HF_HUB_OFFLINE=1" in done.err
