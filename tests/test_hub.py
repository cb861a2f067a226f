"""Models of the Hugging Face hub: what is downloaded, and what is said when it cannot be."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from test_find import write_files

MODEL = "someone/tiny-t5"


class Hub:
    """A hub of one model, as far as huggingface_hub asks it, on 127.0.0.1.

    ``files``: revision -> name -> content. ``downloaded``: names that were sent. ``token``:
    where it is set, nobody else is answered, and ``gated`` decides how they are refused.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.downloaded: list[str] = []
        self.token = ""
        self.gated = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            code = "GatedRepo" if self.gated else "RepoNotFound"
            return _send(request, 403 if self.gated else 401, {"x-error-code": code}, b"")
        path = unquote(urlsplit(request.path).path)
        parts = path.strip("/").split("/")
        if path == f"/api/models/{MODEL}":
            return self._send_info(request, "main")
        if path.startswith(f"/api/models/{MODEL}/revision/"):
            return self._send_info(request, parts[-1])
        if path.startswith(f"/api/models/{MODEL}/tree/"):
            return self._send_tree(request, parts[-1])
        if path.startswith(f"/{MODEL}/resolve/"):
            return self._send_file(request, parts[3], "/".join(parts[4:]))
        return _send(request, 404, {"x-error-code": "RepoNotFound"}, b"")

    def _revision(self, name: str) -> str | None:
        return next((r for r in self.files if name in (r, _commit(r))), None)

    def _send_info(self, request: BaseHTTPRequestHandler, name: str) -> None:
        revision = self._revision(name)
        if revision is None:
            return _send(request, 404, {"x-error-code": "RevisionNotFound"}, b"")
        siblings = [{"rfilename": file} for file in self.files[revision]]
        info = {"id": MODEL, "modelId": MODEL, "sha": _commit(revision), "siblings": siblings}
        return _send(request, 200, {}, json.dumps(info).encode())

    def _send_tree(self, request: BaseHTTPRequestHandler, name: str) -> None:
        revision = self._revision(name)
        if revision is None:
            return _send(request, 404, {"x-error-code": "RevisionNotFound"}, b"")
        tree = [
            {"type": "file", "path": file, "size": len(data), "oid": _etag(data)}
            for file, data in self.files[revision].items()
        ]
        return _send(request, 200, {}, json.dumps(tree).encode())

    def _send_file(self, request: BaseHTTPRequestHandler, name: str, file: str) -> None:
        revision = self._revision(name)
        if revision is None or file not in self.files[revision]:
            return _send(request, 404, {"x-error-code": "EntryNotFound"}, b"")
        data = self.files[revision][file]
        headers = {"etag": f'"{_etag(data)}"', "x-repo-commit": _commit(revision)}
        if request.command == "GET":
            self.downloaded.append(file)
        return _send(request, 200, headers, data)


def _commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


def _etag(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest()


def _send(
    request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes
) -> None:
    request.send_response(status)
    for name, value in {**headers, "content-length": str(len(body))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


def find_on(hub: Hub, cache: Path, what: str = "find_checkpoint", **properties: str) -> Path:
    """The folder that a new process finds: huggingface_hub reads HF_ENDPOINT when imported."""
    found = _run_find(hub, cache, what, **properties)
    assert found.returncode == 0, found.stderr
    return Path(found.stdout.strip())


def error_on(hub: Hub, cache: Path, **properties: str) -> str:
    found = _run_find(hub, cache, "find_checkpoint", **properties)
    assert found.returncode == 3, found.stderr
    assert found.stdout.count("\n") == 1
    return found.stdout


_FIND = """
import json, sys
from handler.checkpoints import find
from handler.config import read_configuration
from handler.errors import LoadError
try:
    print(getattr(find, sys.argv[2])(read_configuration(properties=json.loads(sys.argv[1]))))
except LoadError as error:
    print(error)
    sys.exit(3)
"""


def _run_find(
    hub: Hub, cache: Path, what: str, **properties: str
) -> subprocess.CompletedProcess[str]:
    properties = {"model_id": MODEL, "cache_dir": str(cache), **properties}
    return subprocess.run(
        [sys.executable, "-c", _FIND, json.dumps(properties), what],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )


_SMALL = {"config.json": b'{"model_type": "t5"}', "tokenizer.json": b"{}", "spiece.model": b"s"}
_LEFT_OUT = {
    "tf_model.h5": b"h",
    "flax_model.msgpack": b"m",
    "rust_model.ot": b"o",
    "onnx/model.onnx": b"g",
    "onnx/config.json": b"{}",
    "checkpoint-500/model.safetensors": b"c",
    ".gitattributes": b"a",
}


def test_a_model_of_the_hub_comes_with_safetensors_alone(hub: Hub, tmp_path: Path) -> None:
    wanted = {**_SMALL, "model.safetensors": b"weights"}
    hub.files["main"] = {**wanted, **_LEFT_OUT, "pytorch_model.bin": b"the same"}
    folder = find_on(hub, tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == wanted
    assert sorted(hub.downloaded) == sorted(wanted)
    assert folder.is_relative_to(tmp_path), "option.cache_dir"


def test_shards_count_as_safetensors(hub: Hub, tmp_path: Path) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": b"s%d" % n for n in (1, 2)}
    wanted = {**_SMALL, **shards, "model.safetensors.index.json": b"{}"}
    hub.files["main"] = {**wanted, "pytorch_model-00001-of-00001.bin": b"the same"}
    assert {file.name for file in find_on(hub, tmp_path).iterdir()} == set(wanted)


@pytest.mark.parametrize("other", ["adapter_model.safetensors", "model.fp16.safetensors", "t.bin"])
def test_bin_is_taken_where_there_is_no_other_form(hub: Hub, tmp_path: Path, other: str) -> None:
    wanted = {**_SMALL, "pytorch_model.bin": b"weights"}
    hub.files["main"] = {**wanted, **_LEFT_OUT, other: b"no weights of the model"}
    assert {file.name for file in find_on(hub, tmp_path).iterdir()} == set(wanted)


def test_a_revision(hub: Hub, tmp_path: Path) -> None:
    hub.files["main"] = {**_SMALL, "model.safetensors": b"new"}
    hub.files["v1"] = {**_SMALL, "model.safetensors": b"old"}
    assert (find_on(hub, tmp_path) / "model.safetensors").read_bytes() == b"new"
    for revision in ("v1", _commit("v1")):
        folder = find_on(hub, tmp_path, revision=revision)
        assert (folder / "model.safetensors").read_bytes() == b"old"


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_what_was_downloaded_once_needs_no_hub(hub: Hub, tmp_path: Path, weights: str) -> None:
    hub.files["main"] = {**_SMALL, weights: b"weights"}
    if weights == "model.safetensors":
        hub.files["main"]["pytorch_model.bin"] = b"the same"
    folder = find_on(hub, tmp_path)
    hub.downloaded.clear()
    assert find_on(hub, tmp_path) == folder
    assert hub.downloaded == []
    hub.close()
    assert find_on(hub, tmp_path) == folder


def test_a_folder_wins_over_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.files["main"] = dict(_SMALL)
    folder = write_files(tmp_path / "someone" / "tiny-t5", "config.json")
    assert find_on(hub, tmp_path / "cache", model_dir=str(tmp_path)) == folder


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"model_id": "someone/other"}, "option.model_id=someone/other is no folder and could not"),
        ({"model_id": "someone/other"}, "the hub has no such model, or hides it; correct the name"),
        ({"revision": "v9"}, "the hub has no such revision; change option.revision"),
        ({"model_id": "nowhere"}, "option.model_id=nowhere is no folder and could not be"),
        ({"revision": "v9"}, f"option.model_id={MODEL} at revision v9 is no folder and could not"),
        ({"model_id": "a--b"}, "option.model_id=a--b is no folder and could not be downloaded"),
        ({"model_id": "model.git"}, "option.model_id=model.git is no folder and could not be"),
    ],
    ids=str,
)
def test_what_the_hub_does_not_have(
    hub: Hub, tmp_path: Path, properties: dict[str, str], words: str
) -> None:
    hub.files["main"] = dict(_SMALL)
    assert words in error_on(hub, tmp_path, **properties)


@pytest.mark.parametrize(
    ("gated", "words"),
    [(True, "it is gated; accept its terms on its page and set HF_TOKEN"), (False, "hides it")],
)
def test_a_model_that_needs_a_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gated: bool, words: str
) -> None:
    hub.files["main"] = {**_SMALL, "model.safetensors": b"weights"}
    hub.token, hub.gated = "secret", gated
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert words in error_on(hub, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "set HF_TOKEN to" in error_on(hub, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert (find_on(hub, tmp_path) / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter(hub: Hub, tmp_path: Path, weights: str) -> None:
    wanted = {"adapter_config.json": b"{}", weights: b"w"}
    hub.files["main"] = {**_SMALL, **wanted, "model.safetensors": b"a whole model"}
    properties = {"model_id": "elsewhere", "merge_adapter": MODEL}
    folder = find_on(hub, tmp_path, what="find_adapter", **properties)
    assert {file.name for file in folder.iterdir()} == set(wanted)


def test_a_model_of_the_hub_without_config(hub: Hub, tmp_path: Path) -> None:
    hub.files["main"] = {"model.safetensors": b"weights"}
    assert "has no config.json; change option.model_id" in error_on(hub, tmp_path)


def test_a_hub_that_is_down(hub: Hub, tmp_path: Path) -> None:
    hub.close()
    error = error_on(hub, tmp_path)
    assert f"option.model_id={MODEL} is no folder and could not be downloaded" in error
    assert "Connection refused" in error


def test_plan_fetches_config_json_alone(hub: Hub, tmp_path: Path) -> None:
    config = (Path(__file__).parents[1] / "examples/demo/model/config.json").read_bytes()
    hub.files["main"] = {**_SMALL, "config.json": config, "model.safetensors": b"weights"}
    command = [sys.executable, "-m", "handler", "plan", "--option", f"cache_dir={tmp_path}"]

    def planned(model: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_ENDPOINT": hub.url}
        return subprocess.run([*command, model], env=environment, capture_output=True, text=True)

    assert "recommended: ml.g5.xlarge" in planned(MODEL).stdout
    assert hub.downloaded == ["config.json"]
    failed = planned("someone/else")
    assert failed.returncode == 1
    assert failed.stderr.startswith(
        "error: someone/else is no folder, and config.json of it on the hub could not be down"
    )
    assert failed.stderr.count("\n") == 1
