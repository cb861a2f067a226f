"""lm-evaluation-harness over a server: the commands of its README, and the model class."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from conftest import ROOT, serving
from make_items import FILES, items, lines
from tasks import is_held_out

from handler.engines import Model
from handler.generation import ScoreRequest

if TYPE_CHECKING:
    from handler_lm import HandlerLM
    from lm_eval.api.instance import Instance

FOLDER = ROOT / "examples" / "lm_eval"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SERVER, CHECKPOINT = re.findall(r"^HF_HUB_OFFLINE.*\\\n(?:.*\\\n)*.*", README, re.MULTILINE)
LABELS = ("positive", "negative", "neutral")
ADDRESS = "http://127.0.0.1:8080"

long = pytest.mark.long  # lm-eval brings many packages: only make test-long installs it


def run(command: str, folder: Path) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """What a command of the README prints, and its samples by task."""
    *settings, program, script = shlex.split(command.partition(".py ")[0] + ".py")
    assert program == ".venv/bin/python"
    arguments = shlex.split(command.partition(".py ")[2].replace("\\\n", ""))
    printed = subprocess.run(
        [sys.executable, script, *arguments, "--log_samples", "--output_path", str(folder / "out")],
        cwd=ROOT,
        env={**os.environ, **dict(s.split("=") for s in settings), "HF_HOME": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    samples = {}
    for file in (folder / "out").rglob("samples_*.jsonl"):
        records = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        task = file.name.removeprefix("samples_").rpartition("_")[0]
        samples[task] = sorted(records, key=lambda record: record["doc_id"])
    return printed, samples


def log_likelihoods(sample: dict[str, Any]) -> list[float]:
    return [float(log_prob) for log_prob, _ in sample["filtered_resps"]]


@long
def test_the_readmes_command_says_what_the_model_says(
    server: httpx.Client, model: Model, tmp_path: Path
) -> None:
    assert ADDRESS in SERVER
    printed, samples = run(SERVER.replace(ADDRESS, str(server.base_url)), tmp_path)
    table = "".join(re.findall(r"^\|.*\n", printed, re.MULTILINE))
    assert table.count("\n") == 4
    assert table in README
    prompts = [sample["doc"]["prompt"] for sample in samples["demo_sentiment"]]
    expected = model.score([ScoreRequest(prompt, LABELS) for prompt in prompts])
    assert len(expected) == 50
    for sample, results in zip(samples["demo_sentiment"], expected):
        sums = [sum(result.log_probs) for result in results]
        assert log_likelihoods(sample) == pytest.approx(sums, abs=1e-4)
        assert sample["acc"] == (LABELS[sums.index(max(sums))] == sample["doc"]["answer"])
    prompts = [sample["doc"]["prompt"] for sample in samples["demo_number_to_words"]]
    texts = [sample["resps"] for sample in samples["demo_number_to_words"]]
    assert texts == [[[text]] for text in model.pipeline_generate(prompts, max_new_tokens=64)]


@long
def test_without_the_end_token_the_numbers_are_those_of_lm_evals_own_model(
    server: httpx.Client, tmp_path: Path
) -> None:
    served = SERVER.replace(ADDRESS, str(server.base_url))
    served = served.replace("/invocations", "/invocations,end_token=false")
    _, ours = run(served, tmp_path / "ours")
    _, theirs = run(CHECKPOINT, tmp_path / "theirs")
    assert ours.keys() == theirs.keys() == {"demo_sentiment", "demo_number_to_words"}
    for sample, expected in zip(ours["demo_sentiment"], theirs["demo_sentiment"]):
        assert log_likelihoods(sample) == pytest.approx(log_likelihoods(expected), abs=1e-3)
        greedy = [[is_greedy for _, is_greedy in s["filtered_resps"]] for s in (sample, expected)]
        assert greedy[0] == greedy[1]
    texts = [[s["resps"] for s in each["demo_number_to_words"]] for each in (ours, theirs)]
    assert texts[0] == texts[1]


def lm(server: httpx.Client, path: str = "/invocations", **arguments: Any) -> HandlerLM:
    from handler_lm import HandlerLM

    return HandlerLM(str(server.base_url.join(path)), **arguments)


def instances(*arguments: tuple[Any, ...], kind: Any = "loglikelihood") -> list[Instance]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


PAIRS = [
    ("Write 47 in words.", " forty seven"),
    ("Write 8 in words.", " eight"),
    ("Write 47 in words.", " forty"),
    ("Write 47 in words.", " forty eight"),
    ("Write 47 in words.", " forty seven"),  # as some tasks have one twice
]


@long
@pytest.mark.parametrize(
    ("end_token", "greedy"),
    [(True, [True, True, False, False, True]), (False, [True, True, True, False, True])],
)
@pytest.mark.parametrize("batch_size", [1, "2"])
def test_log_likelihoods_and_what_is_greedy(
    server: httpx.Client, model: Model, end_token: bool, greedy: list[bool], batch_size: Any
) -> None:
    asked = lm(server, end_token=end_token, batch_size=batch_size)
    found = asked.loglikelihood(instances(*PAIRS))
    assert [is_greedy for _, is_greedy in found] == greedy
    expected = model.score([ScoreRequest(prompt, (text.strip(),)) for prompt, text in PAIRS])
    for (log_prob, _), (result,) in zip(found, expected):
        counted = result.log_probs if end_token else result.log_probs[:-1]
        assert log_prob == pytest.approx(sum(counted), abs=1e-4)


@long
def test_texts_come_in_their_order_each_with_its_own_parameters(server: httpx.Client) -> None:
    count, seven = "Count from 3 to 9.", "Write 7 in words."
    arguments = [
        (count, {"until": [", 7"], "max_gen_toks": 64}),
        (seven, {"until": [], "do_sample": False, "temperature": 0.0}),
        (count, {"until": "4"}),
        (count, {"max_gen_toks": 2}),
        (seven, {"until": [", 7"], "max_gen_toks": 64}),
    ]
    texts = lm(server, batch_size=4).generate_until(instances(*arguments, kind="generate_until"))
    assert texts == ["3, 4, 5, 6", "seven", "3, ", "3", "seven"]


@long
@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("/invocations", ("x " * 5000, {}), "option.max_input_tokens"),
        ("/invocations", ("x", {"top_q": 1}), "unknown parameter 'top_q'"),
        ("/predictions/other", ("x", {}), "answered 404: .*other"),
    ],
)
def test_an_error_of_the_server_is_quoted(
    server: httpx.Client, path: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        lm(server, path).generate_until(instances(arguments, kind="generate_until"))


@long
def test_another_response_schema_is_named() -> None:
    with (
        serving("--option=response_schema=lmi") as (client, _),
        pytest.raises(RuntimeError, match=r"option\.response_schema must be outputs"),
    ):
        lm(client).loglikelihood(instances(("Write 7 in words.", " seven")))


class DynamicBatch(BaseHTTPRequestHandler):
    """Answers as DJLServing's dynamic batch does a bad request beside others."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"code": 400, "error": "the inputs are bad"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@long
def test_an_error_with_status_200_is_one() -> None:
    with HTTPServer(("127.0.0.1", 0), DynamicBatch) as stub:
        thread = threading.Thread(target=stub.handle_request)
        thread.start()
        with (
            httpx.Client(base_url=f"http://127.0.0.1:{stub.server_port}") as client,
            pytest.raises(RuntimeError, match=r"the inputs are bad\"}$"),
        ):
            lm(client).generate_until(instances(("x", {}), kind="generate_until"))
        thread.join()


@long
def test_what_cannot_be_is_refused(server: httpx.Client) -> None:
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        lm(server).loglikelihood_rolling(instances(("x",), kind="loglikelihood_rolling"))
    for batch_size in (0, "auto"):
        with pytest.raises(ValueError, match=f"integer from 1, got {batch_size!r}"):
            lm(server, batch_size=batch_size)


@pytest.mark.parametrize("task", FILES)
def test_the_items_are_held_out_and_as_made(task: str) -> None:
    assert (FOLDER / FILES[task]).read_text(encoding="utf-8") == lines(task)
    assert all(map(is_held_out, items(task)))
