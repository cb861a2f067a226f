"""Given answers: the best of several choices, and the likelihood of targets."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest

from handler.engines import Model
from handler.generation import ScoreRequest

PROMPT = "Write 47 in words."
CHOICES = ["forty", "forty seven", "eight", "seven"]


def post(server: httpx.Client, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    answer = server.post("/invocations", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()  # type: ignore[no-any-return]


def test_the_best_of_several_choices(server: httpx.Client, model: Model) -> None:
    body = post(server, {"inputs": PROMPT, "choices": CHOICES})
    assert body["outputs"] == ["forty seven"]
    (scores,) = body["scores"]
    assert [score["text"] for score in scores] == CHOICES
    (expected,) = model.score([ScoreRequest(PROMPT, tuple(CHOICES))])
    for score, result in zip(scores, expected):
        assert score["log_prob"] == pytest.approx(sum(result.log_probs), abs=1e-4)
    total = sum(math.exp(score["log_prob"]) for score in scores)
    for score in scores:
        assert score["probability"] == pytest.approx(math.exp(score["log_prob"]) / total, abs=1e-4)


def test_a_list_of_inputs_shares_its_choices(server: httpx.Client) -> None:
    inputs = [PROMPT, "Write 8 in words.", "Write 7 in words."]
    body = post(server, {"inputs": inputs, "choices": CHOICES})
    assert body["outputs"] == ["forty seven", "eight", "seven"]
    assert [len(scores) for scores in body["scores"]] == [4, 4, 4]


@pytest.mark.parametrize(
    ("inputs", "targets", "lengths"),
    [
        (PROMPT, "forty seven", [1]),
        (PROMPT, ["forty seven", "eight"], [2]),
        ([PROMPT], ["forty seven"], [1]),
        ([PROMPT, "Write 8 in words."], ["forty seven", ["eight", "seven"]], [1, 2]),
    ],
)
def test_targets(server: httpx.Client, inputs: Any, targets: Any, lengths: list[int]) -> None:
    body = post(server, {"inputs": inputs, "targets": targets, "parameters": {"details": True}})
    assert set(body) == {"scores"}
    assert [len(scores) for scores in body["scores"]] == lengths
    first = body["scores"][0][0]
    assert first["log_prob"] == pytest.approx(sum(token["log_prob"] for token in first["tokens"]))
    assert first["tokens"][-1]["text"] == "</s>"
    assert first["probability"] <= 1.0


def test_with_a_template(server: httpx.Client) -> None:
    body = {"inputs": "47", "template": "Write {input} in words.", "choices": CHOICES}
    assert post(server, body)["outputs"] == ["forty seven"]


def test_null_asks_for_nothing(server: httpx.Client) -> None:
    body = post(server, {"inputs": PROMPT, "choices": None, "targets": None})
    assert body == {"outputs": ["forty seven"]}


def test_choices_that_no_number_can_tell_apart_have_equal_shares(server: httpx.Client) -> None:
    """Sums far below what exp can tell."""
    texts = [f"{word} " * 60 for word in ("pony", "apple")]
    (scores,) = post(server, {"inputs": PROMPT, "choices": texts})["scores"]
    assert sum(score["probability"] for score in scores) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"choices": []}, "'choices' must be a list of at least one string, got []"),
        ({"choices": "yes"}, "'choices' must be a list of at least one string, got 'yes'"),
        ({"choices": ["a", 5]}, "choices[1] must be a string, got 5"),
        ({"choices": ["a", " "]}, "choices[1] must not be empty or blank"),
        ({"choices": ["a", "b", "a"]}, "choices[2] is there twice: 'a'"),
        ({"choices": ["a", " a"]}, "choices[1] is there twice: ' a'"),
        ({"choices": ["yes", "\u65e5\u672c"]}, "choices[1]: this model's vocabulary cannot write"),
        ({"choices": [str(n) for n in range(5000)]}, "5000 texts cannot be queued"),
        ({"choices": ["a"], "targets": ["a"]}, "'choices' and 'targets' are both there"),
        ({"targets": 5}, "'targets' must be a list of at least one string, got 5"),
        ({"targets": []}, "'targets' must be a list of at least one string, got []"),
        ({"inputs": ["x", "y"], "targets": ["a"]}, "for each of the 2 inputs, got ['a']"),
        ({"inputs": ["x"], "targets": "a"}, "for each of the 1 inputs, got 'a'"),
        ({"choices": ["a"], "stream": True}, "'stream' has no meaning beside 'choices'"),
        (
            {"choices": ["a"], "parameters": {"temperature": 0.5}},
            "has no meaning beside 'choices' and 'targets', allowed are truncate, details",
        ),
        ({"choices": ["a" * 5000]}, "tokens, allowed are 512 (option.max_output_tokens)"),
        ({"choices": ["a"], "echo": 1}, "unknown field 'echo'"),
        ({"choices": ["a"], "inputs": None}, "the field 'inputs' is missing"),
    ],
)
def test_bad_ones(server: httpx.Client, fields: dict[str, Any], words: str) -> None:
    body = post(server, {"inputs": "x", **fields}, status=400)
    assert words in body["error"]


def test_a_route_with_a_schema_of_its_own_has_no_choices(server: httpx.Client) -> None:
    answer = server.post("/generate", json={"inputs": "x", "choices": ["a"]})
    assert answer.status_code == 400
    assert "unknown field 'choices'" in answer.json()["error"]
