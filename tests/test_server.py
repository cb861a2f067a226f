"""The server without Java, through its own process and a real client: DJLServing's contract."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import ROOT, lasting, serving

from handler.cli.serve import bind, listen
from handler.errors import LoadError

PROMPT = "Write 7 in words."
PROMPTS = [PROMPT, "Sort these words: warm, cat, apple", "Count from 3 to 9."]
ROUTES = ["/invocations", "/", "/predictions/demo", "/models/demo/invoke"]
# At some milliseconds a step, many minutes: nobody waits for its end.
ENDLESS = 1_000_000
ENDLESS_REQUEST = {
    "inputs": "x",
    "parameters": {"ignore_eos_token": True, "max_new_tokens": ENDLESS},
}
WAIT = 120
ENDLESS_OPTIONS = [
    "--option=backend=transformers",
    f"--option=max_output_tokens={ENDLESS}",
    "--option=max_rows=1",
]


def ask(client: httpx.Client, inputs: Any, **parameters: Any) -> Any:
    reply = client.post("/invocations", json={"inputs": inputs, "parameters": parameters})
    assert reply.status_code == 200, reply.text
    return reply.json()


def texts_of(client: httpx.Client, inputs: Any, **parameters: Any) -> list[str]:
    texts: list[str] = ask(client, inputs, **parameters)["outputs"]
    return texts


# Routes


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_answers_the_same(server: httpx.Client, route: str) -> None:
    reply = server.post(route, json={"inputs": PROMPT})
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == {"outputs": texts_of(server, PROMPT)}


def test_the_model_may_be_named_in_the_query(server: httpx.Client) -> None:
    assert server.post("/invocations?model_name=demo", json={"inputs": "x"}).status_code == 200
    assert server.post("/invocations?model_name=other", json={"inputs": "x"}).status_code == 404


def test_ping(server: httpx.Client) -> None:
    reply = server.get("/ping")
    assert (reply.status_code, reply.json()) == (200, {"demo": {"status": "Healthy"}})
    assert server.head("/ping").status_code == 200


def test_models(server: httpx.Client) -> None:
    (model,) = server.get("/models").json()["models"]
    assert model["modelName"] == "demo"
    assert model["status"] == "READY"
    assert model["modelUrl"].endswith("examples/demo/model")


def test_describe_model(server: httpx.Client) -> None:
    (description,) = server.get("/models/demo").json()
    (model,) = description["models"]
    assert model["modelName"] == "demo"
    assert model["status"] == "Healthy"
    assert model["queueSize"] == 1000
    assert model["requestInQueue"] == 0


def test_metrics(server: httpx.Client) -> None:
    def count(code: str) -> float:
        return metric(server, f'handler_requests_total{{code="{code}"}}')

    before = count("200"), count("400"), metric(server, "handler_request_seconds_count")
    ask(server, PROMPT)
    server.post("/invocations", json={})
    assert count("200") == before[0] + 1
    assert count("400") == before[1] + 1
    assert metric(server, "handler_request_seconds_count") == before[2] + 2
    assert metric(server, "handler_prompts_waiting") == 0
    assert server.get("/metrics").headers["content-type"].startswith("text/plain")


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + " "))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("method", "path", "code", "type_name"),
    [
        ("GET", "/nothing", 404, "ResourceNotFoundException"),
        ("POST", "/invocations/more", 404, "ResourceNotFoundException"),
        ("POST", "/predictions/other", 404, "ModelNotFoundException"),
        ("POST", "/models/other/invoke", 404, "ModelNotFoundException"),
        ("GET", "/models/other", 404, "ModelNotFoundException"),
        ("POST", "/predictions/%0a%22%C3%A9", 404, "ModelNotFoundException"),
        ("GET", "/invocations", 405, "MethodNotAllowedException"),
        ("PUT", "/predictions/demo", 405, "MethodNotAllowedException"),
        ("DELETE", "/models/demo", 405, "MethodNotAllowedException"),
        ("POST", "/metrics", 405, "MethodNotAllowedException"),
    ],
)
def test_errors_of_the_server_have_djls_form(
    server: httpx.Client, method: str, path: str, code: int, type_name: str
) -> None:
    reply = server.request(method, path, content=b"{}" if method in ("POST", "PUT") else None)
    assert reply.status_code == code
    error = reply.json()
    assert (error["code"], error["type"]) == (code, type_name)
    assert error["message"]


@pytest.mark.parametrize("told", [True, False], ids=["content-length", "chunked"])
def test_a_body_larger_than_djls_limit(server: httpx.Client, told: bool) -> None:
    size = 64 * 1024 * 1024 + 1
    piece = b" " * 65536
    headers = {"content-length": str(size)} if told else {}

    def pieces() -> Iterator[bytes]:
        for start in range(0, size, len(piece)):
            yield piece[: size - start]

    reply = server.post("/invocations", content=pieces(), headers=headers)
    assert reply.status_code == 413
    assert reply.json()["code"] == 413
    assert "larger than 67108864 bytes" in reply.json()["message"]
    assert texts_of(server, PROMPT)


# Payloads


def test_a_string_and_a_list(server: httpx.Client) -> None:
    answers = texts_of(server, PROMPTS)
    assert answers == [texts_of(server, prompt)[0] for prompt in PROMPTS]
    assert len(set(answers)) == len(PROMPTS)
    assert texts_of(server, PROMPTS[::-1]) == answers[::-1]


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"parameters": None},
        {"parameters": {}},
        {"parameters": {"max_length": 200}},
        {"batch_size": 4, "padding": True},
        {"batch_size": 1, "parameters": {"temperature": 0, "seed": None}},
        {"stream": False},
    ],
    ids=str,
)
def test_payloads_of_the_article(server: httpx.Client, extra: dict[str, Any]) -> None:
    reply = server.post("/invocations", json={"inputs": PROMPTS, **extra})
    assert reply.json() == {"outputs": texts_of(server, PROMPTS)}


def test_temperature_samples(server: httpx.Client) -> None:
    """The article's payload: FasterTransformer itself would answer greedily."""
    drawn = texts_of(server, ["x"] * 8, max_seq_len=20, temperature=5.0)
    assert len(set(drawn)) > 1


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "application/json; charset=utf-8"},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"batch_size": "7", "model_id": "other", "trust_remote_code": "true"},
        {"x-amzn-sagemaker-custom-attributes": "max_output_tokens=1,batch_size=3"},
    ],
    ids=str,
)
def test_headers_change_nothing(server: httpx.Client, headers: dict[str, str]) -> None:
    body = json.dumps({"inputs": PROMPTS}).encode()
    reply = server.post("/invocations", content=body, headers=headers)
    assert reply.json() == {"outputs": texts_of(server, PROMPTS)}


def test_text_of_any_script_comes_back_as_utf8(server: httpx.Client) -> None:
    text = 'naïve 東京 🙂 \u2028 \x00 " \\ </s> <extra_id_0>'
    body = json.dumps({"inputs": text, "parameters": {"return_full_text": True}}).encode()
    reply = server.post("/invocations", content=b"\xef\xbb\xbf" + body)
    assert reply.json()["outputs"][0].startswith(text)
    assert "東京".encode() in reply.content


def test_return_full_text(server: httpx.Client) -> None:
    answers = texts_of(server, PROMPTS)
    full = texts_of(server, PROMPTS, return_full_text=True)
    assert full == [prompt + answer for prompt, answer in zip(PROMPTS, answers)]


def test_details(server: httpx.Client) -> None:
    body = ask(server, PROMPTS, details=True)
    assert body["outputs"] == texts_of(server, PROMPTS)
    assert len(body["details"]) == len(PROMPTS)
    for detail in body["details"]:
        tokens = detail["tokens"]
        assert detail["generated_tokens"] == len(tokens)
        assert detail["finish_reason"] in ("eos_token", "length")
        assert detail["input_tokens"] > 1
        assert detail["truncated"] is False
        assert detail["cumulative_log_prob"] == pytest.approx(sum(t["log_prob"] for t in tokens))
        for token in tokens:
            assert set(token) == {"id", "text", "log_prob"}
    again = ask(server, PROMPTS, is_return_output_log_probs=True)
    assert lasting(again) == lasting(body)
    assert all(detail["input_cached"] for detail in again["details"])
    assert all(detail["timing"]["generated_ms"] > 0 for detail in again["details"])


def test_why_an_answer_ended(server: httpx.Client) -> None:
    def reason(**parameters: Any) -> str:
        (detail,) = ask(server, PROMPT, details=True, **parameters)["details"]
        return str(detail["finish_reason"])

    (answer,) = texts_of(server, PROMPT)
    assert reason() == "eos_token"
    assert reason(max_tokens=1) == "length"
    assert reason(stop=answer[-1]) == "stop_sequence"


# Many at a time


def _different_requests() -> list[dict[str, Any]]:
    """64 requests, no two the same."""
    kinds: list[dict[str, Any]] = [
        {},
        {"max_new_tokens": 3},
        {"temperature": 1.5},
        {"top_k": 7},
        {"top_p": 0.9},
        {"min_new_tokens": 12},
        {"details": True},
        {"stop": ["e", " t"]},
    ]
    requests = []
    for number in range(64):
        parameters = {"max_new_tokens": 24, **kinds[number % len(kinds)], "seed": number}
        prompt = f"Write {37 * number} in words."
        inputs: Any = [prompt, f"Count from {number} to {number + 5}."] if number % 3 else prompt
        requests.append({"inputs": inputs, "parameters": parameters})
    return requests


def test_a_short_request_returns_before_long_ones() -> None:
    with serving("--option=max_output_tokens=1500") as (server, _):
        finished = asyncio.run(_short_behind_long(str(server.base_url)))
    assert finished == ["short", "long", "long", "long"]


async def _short_behind_long(url: str) -> list[str]:
    """What is done, in order, where a short request is sent once long ones run."""
    finished: list[str] = []

    async def send(client: httpx.AsyncClient, name: str, **parameters: Any) -> None:
        body = {"inputs": PROMPT, "parameters": parameters}
        reply = await client.post("/invocations", json=body)
        assert reply.status_code == 200
        finished.append(name)

    async with httpx.AsyncClient(base_url=url, timeout=WAIT) as client:
        tokens = {"ignore_eos_token": True, "max_new_tokens": 1500}
        long = [asyncio.create_task(send(client, "long", **tokens)) for _ in range(3)]
        while _running(await client.get("/metrics")) < len(long):
            assert not finished
        await send(client, "short", max_new_tokens=2)
        await asyncio.gather(*long)
    return finished


def _running(metrics: httpx.Response) -> float:
    (line,) = (m for m in metrics.text.splitlines() if m.startswith("handler_prompts_running "))
    return float(line.split()[1])


def test_64_clients_get_what_each_gets_alone(server: httpx.Client) -> None:
    requests = _different_requests()
    alone = [server.post("/invocations", json=request).json() for request in requests]

    async def send_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.base_url, timeout=60, limits=limits) as client:
            calls = (client.post("/invocations", json=request) for request in requests)
            return list(await asyncio.gather(*calls))

    together = asyncio.run(send_all())
    for expected, reply in zip(alone, together):
        assert reply.status_code == 200
        body = reply.json()
        assert body["outputs"] == expected["outputs"]
        assert _tokens(body) == _tokens(expected)


def _tokens(body: dict[str, Any]) -> list[list[int]]:
    return [[token["id"] for token in detail["tokens"]] for detail in body.get("details", ())]


# Clients that do as they please


@contextmanager
def connection(client: httpx.Client) -> Iterator[socket.socket]:
    address = urlsplit(str(client.base_url))
    with socket.create_connection((address.hostname, address.port), timeout=60) as stream:
        yield stream


def test_a_client_that_leaves_in_the_middle_of_its_body(server: httpx.Client) -> None:
    """The fixture's end looks for a traceback in the log."""
    with connection(server) as stream:
        stream.sendall(b"POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    assert texts_of(server, PROMPT)


def test_a_body_in_small_pieces(server: httpx.Client) -> None:
    body = json.dumps({"inputs": PROMPT}).encode()
    reply = server.post("/invocations", content=(body[i : i + 1] for i in range(len(body))))
    assert reply.json()["outputs"] == texts_of(server, PROMPT)


def test_what_is_no_http(server: httpx.Client) -> None:
    with connection(server) as stream:
        stream.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert b" 400 " in stream.recv(1000)
    assert texts_of(server, PROMPT)


def test_a_request_behind_another_on_one_connection(server: httpx.Client) -> None:
    one = json.dumps({"inputs": PROMPT}).encode()
    request = b"POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s"
    last = b"GET /ping HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with connection(server) as stream:
        stream.sendall(request % (len(one), one) * 2 + last)
        received = b"".join(iter(lambda: stream.recv(65536), b""))
    assert received.count(b"HTTP/1.1 200") == 3
    assert received.count(texts_of(server, PROMPT)[0].encode()) == 2


# Limits


@pytest.fixture(scope="module")
def patient() -> Iterator[httpx.Client]:
    """One row, three places to wait, all the time in the world, answers as TGI gives them."""
    options = ["--option=max_queue=3", "--option=request_timeout=600"]
    options += ["--option=response_schema=tgi"]
    with serving(*ENDLESS_OPTIONS, *options) as (client, _):
        yield client


@contextmanager
def endless_requests(client: httpx.Client, count: int) -> Iterator[None]:
    """So many, each on a connection of its own, until the end of the block; the first one runs."""
    body = json.dumps(ENDLESS_REQUEST).encode()
    head = b"POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with ExitStack() as connections:
        for number in range(count):
            connections.enter_context(connection(client)).sendall(head + body)
            busy = "running" if number == 0 else "waiting"
            until(lambda: metric(client, f"handler_prompts_{busy}") == max(number, 1))  # noqa: B023
        yield


def test_a_full_queue_is_503_with_the_time_to_come_back(patient: httpx.Client) -> None:
    with endless_requests(patient, 4):
        reply = patient.post("/invocations", json={"inputs": "x"})
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["code"] == 503
        assert "3 prompts wait already, allowed are 3 (option.max_queue)" in reply.json()["error"]
        assert patient.get("/ping").status_code == 200


def test_a_list_longer_than_the_queue_is_400(patient: httpx.Client) -> None:
    reply = patient.post("/invocations", json={"inputs": ["x"] * 4})
    assert reply.status_code == 400
    assert "allowed are 3 (option.max_queue); split it" in reply.json()["error"]


def test_a_client_that_leaves_frees_its_row(patient: httpx.Client) -> None:
    with endless_requests(patient, 3):
        pass
    # there is one row: this would wait for ever
    assert ask(patient, PROMPT, max_tokens=5)


def test_answers_as_tgi_gives_them(patient: httpx.Client) -> None:
    one = ask(patient, PROMPT, details=True)
    (answer,) = one
    assert set(answer) == {"generated_text", "details"}
    assert lasting(ask(patient, [PROMPT], details=True)) == lasting(one)
    texts = [item["generated_text"] for item in ask(patient, PROMPTS[:2])]
    assert texts == [ask(patient, prompt)[0]["generated_text"] for prompt in PROMPTS[:2]]


# Configuration, from all its sources


@dataclass
class Configured:
    client: httpx.Client
    log: list[str]
    name: str


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Iterator[Configured]:
    """A model folder with serving.properties; variables and options that contradict it."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "serving.properties").write_text(
        "engine=Python\n"
        f"option.model_id={demo}\n"
        "option.response_schema=tgi\n"
        "option.prompt_template=Write {input} in words.\n"
    )
    environment = {
        "OPTION_RESPONSE_SCHEMA": "outputs",
        "OPTION_PROMPT_TEMPLATE": "never: {input}",
        "OPTION_REQUEST_TIMEOUT": "2",
        "OPTION_LOG_PROMPTS": "true",
    }
    log: list[str] = []
    arguments = [str(folder), "--option=response_schema=lmi", *ENDLESS_OPTIONS]
    with serving(*arguments, environment=environment, log=log) as (client, _):
        yield Configured(client, log, folder.name)


def test_the_command_line_wins_over_serving_properties(configured: Configured) -> None:
    """response_schema: lmi, neither tgi nor outputs."""
    one = ask(configured.client, "7")
    assert set(one) == {"generated_text"}
    assert ask(configured.client, ["7"]) == [one]
    assert set(ask(configured.client, "7", details=True)) == {"generated_text", "details"}


def test_serving_properties_win_over_the_environment(
    configured: Configured, server: httpx.Client
) -> None:
    """prompt_template: the whole prompt is the one that the other server gets."""
    ours = ask(configured.client, "7", details=True)["details"]
    (expected,) = ask(server, "Write 7 in words.", details=True)["details"]
    assert ours["input_tokens"] == expected["input_tokens"]
    assert [t["id"] for t in ours["tokens"]] == [t["id"] for t in expected["tokens"]]


def test_the_full_text_has_the_prompt_as_it_was_sent(configured: Configured) -> None:
    answer = ask(configured.client, "7")["generated_text"]
    assert ask(configured.client, "7", return_full_text=True)["generated_text"] == "7" + answer


def test_the_model_is_named_as_its_folder(configured: Configured) -> None:
    assert configured.client.get("/ping").json() == {configured.name: {"status": "Healthy"}}


def test_time_out_is_504_and_frees_the_row(configured: Configured) -> None:
    """request_timeout: from the environment."""
    reply = configured.client.post("/invocations", json=ENDLESS_REQUEST)
    assert reply.status_code == 504
    assert reply.json() == {
        "code": 504,
        "error": "not done after 2 s (option.request_timeout); ask for fewer tokens or raise it",
    }
    # there is one row
    assert ask(configured.client, "7")["generated_text"]


def test_a_list_that_is_not_done_in_time_is_504(configured: Configured) -> None:
    request = {**ENDLESS_REQUEST, "inputs": ["7", "8", "9"]}
    assert configured.client.post("/invocations", json=request).status_code == 504
    until(lambda: metric(configured.client, "handler_prompts_waiting") == 0)
    assert ask(configured.client, "7")["generated_text"]


def test_log_prompts_writes_prompts_and_answers(configured: Configured) -> None:
    prompt = "unmistakable words"
    answer = ask(configured.client, prompt)["generated_text"]
    until(lambda: any(prompt in line for line in configured.log))
    until(lambda: any(repr(answer) in line for line in configured.log))


# Beginning and end


def test_sigterm_finishes_and_answers_what_was_accepted_then_exits_0() -> None:
    log: list[str] = []
    request = {"inputs": PROMPT, "parameters": {"ignore_eos_token": True, "max_new_tokens": 120}}
    with serving(*ENDLESS_OPTIONS, log=log) as (client, process), ThreadPoolExecutor() as threads:
        asked = [threads.submit(client.post, "/invocations", json=request) for _ in range(2)]
        until(lambda: metric(client, "handler_prompts_waiting") == 1)
        process.send_signal(signal.SIGTERM)
        answers = [future.result(WAIT) for future in asked]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].json() == answers[1].json()
        assert process.wait(WAIT) == 0
    written = "".join(log)
    assert all(" handler." in line for line in log), "only our own log, no library's chatter"
    assert PROMPT not in written, "log_prompts is off"
    assert answers[0].json()["outputs"][0] not in written


def test_sigterm_while_loading() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "handler", "serve", "--port", "0", *ENDLESS_OPTIONS],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "backend transformers" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, written = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert "Traceback" not in written


def test_an_address_of_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with serving("--host", "::1") as (client, _):
        assert client.base_url.host == "::1"
        assert client.get("/ping").status_code == 200


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = _error_of_serve("--port", str(port))
    assert error.startswith(f"error: cannot listen on 127.0.0.1 port {port}: ")
    assert error.endswith("; change --host or --port\n")


def test_a_port_that_another_takes_while_the_model_loads() -> None:
    with bind("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        with bind("127.0.0.1", port) as ours:
            other.listen()
            with pytest.raises(LoadError, match=f"cannot listen on 127.0.0.1 port {port}: "):
                listen(ours)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "cannot listen on 127.0.0.1 port 70000"),
        (["/no/such/folder"], "/no/such/folder: no such folder"),
        (["--option", "max_rows"], "--option max_rows must be NAME=VALUE"),
        (["--option", "max_rows=none"], "--option max_rows must be an integer of at least 1"),
        (["--option", "backend=vllm"], "--option backend must be one of auto"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_one_line(arguments: list[str], words: str) -> None:
    assert words in _error_of_serve(*arguments)


def _error_of_serve(*arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "handler", "serve", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT,
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    return ended.stderr


# Uploads that never end


def _raw(server: httpx.Client, head: bytes) -> socket.socket:
    url = urlsplit(str(server.base_url))
    connection = socket.create_connection((url.hostname, url.port), timeout=60)
    connection.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\n" + head)
    return connection


@pytest.mark.long
def test_an_upload_that_stands_still_is_given_up(server: httpx.Client) -> None:
    with _raw(server, b"Content-Length: 100\r\n\r\n{") as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"Nothing of the body came for 20 s" in answer


def test_a_body_that_is_announced_too_large_is_refused_at_once(server: httpx.Client) -> None:
    with _raw(server, b"Content-Length: 99999999999999999999\r\n\r\n{") as connection:
        connection.settimeout(15)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_huge_answer_holds_nobody_up(server: httpx.Client) -> None:
    """It is written beside the event loop; the answer itself is whole."""
    many = {"inputs": ["Count from 3 to 9."] * 900, "parameters": {"details": True}}
    with ThreadPoolExecutor(1) as threads:
        answering = threads.submit(server.post, "/invocations", json=many)
        while not answering.done():
            reply = server.post("/invocations", json={"inputs": "Write 7 in words."})
            assert reply.json() == {"outputs": ["seven"]}
        body = answering.result().json()
    assert len(body["outputs"]) == len(body["details"]) == 900
