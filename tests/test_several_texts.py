"""Several texts of one prompt: drawn ones, given ones that are scored, the likeliest tokens."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle
from step_engines import assert_same

from handler.engines import Model, init_inference
from handler.errors import RequestError
from handler.generation import GenerationRequest, ScoreRequest
from handler.parameters import GenerationParameters

PROMPT = "Write 4312 in words."
TARGETS = (
    "four thousand",
    "four thousand three hundred twelve",
    "x",
    "Count from 3 to 9. " * 5,
    "a",
    "b c",
)


def request(prompt: str = "a b c", **parameters: Any) -> GenerationRequest:
    return GenerationRequest(prompt, GenerationParameters(**parameters))


# Scores


def test_scores_are_those_of_a_plain_forward_pass(pair: tuple[Model, Oracle]) -> None:
    """More targets than rows, beside texts that are generated."""
    model, oracle = pair
    running = model.submit([request(max_new_tokens=30, ignore_eos_token=True)] * 2)
    prompts = (PROMPT, "a b c")
    for prompt, scores in zip(prompts, model.score([ScoreRequest(p, TARGETS) for p in prompts])):
        assert [score.text.strip() for score in scores] == [text.strip() for text in TARGETS]
        for target, score in zip(TARGETS, scores):
            assert score.token_ids == tuple(oracle.tokenizer(target).input_ids)
            expected = oracle.log_probs(prompt, score.token_ids)
            assert score.log_probs == pytest.approx(expected, abs=1e-4)
            assert sum(score.log_probs) == pytest.approx(sum(expected), abs=1e-3)
    assert running[0].result().token_ids == running[1].result().token_ids


def test_a_text_that_was_generated_scores_what_it_was_told_to(model: Model) -> None:
    (generated,) = model.generate([request(PROMPT)])
    ((score,),) = model.score([ScoreRequest(PROMPT, (generated.text,))])
    assert score.token_ids == generated.token_ids
    assert score.log_probs == pytest.approx(generated.log_probs, abs=1e-5)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("good", ""), "targets[1] must not be empty or blank"),
        (("good", 5), "targets[1] must be a string, got 5"),
        (("word " * 600,), "allowed are 512 (option.max_output_tokens)"),
        (("fine", "\u65e5\u672c"), "targets[1]: this model's vocabulary cannot write"),
        (("the </s> end",), "targets[0]: this model's vocabulary cannot write"),
    ],
)
def test_bad_targets(model: Model, targets: Any, words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)):
        model.score([ScoreRequest("x", targets)])


def test_too_many_texts_are_refused_before_they_are_made(model: Model) -> None:
    targets = tuple(map(str, range(900)))
    begin = time.monotonic()
    with pytest.raises(RequestError, match="810000 texts cannot be queued"):
        model.score([ScoreRequest("x", targets)] * 900)
    assert time.monotonic() - begin < 2


# Several draws


def test_draws_have_seeds_of_their_own(pair: tuple[Model, Oracle]) -> None:
    model, _ = pair
    p = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12}
    (several,) = model.generate([request(num_return_sequences=5, seed=7, **p)])
    (one,) = model.generate([request(seed=7, **p)])
    texts = [several.token_ids, *(other.token_ids for other in several.alternatives)]
    assert len(several.alternatives) == 4
    assert one.token_ids in texts
    means = [sum(r.log_probs) / len(r.log_probs) for r in (several, *several.alternatives)]
    assert means == sorted(means, reverse=True)
    assert len(set(texts)) > 1
    (again,) = model.generate(
        [replace(request(num_return_sequences=5, seed=7, **p), log_probs=False)]
    )
    assert_same(model.backend, [again], [several])  # ranked by log-probabilities, wanted or not


def test_several_draws_read_their_prompt_once(demo: Path) -> None:
    """Also without the cache of encoded prompts."""
    alone = init_inference(str(demo), backend="onnxruntime", max_rows=6, encoder_cache=0)
    (result,) = alone.generate([request(num_return_sequences=6, do_sample=True, seed=1)])
    cached = [one.input_cached for one in (result, *result.alternatives)]
    assert sorted(cached) == [False] + [True] * 5
    alone.close()


def test_few_encoded_prompts_are_held_for_draws_that_wait(demo: Path) -> None:
    """Else many clients' handles would fill the memory, outside of every budget."""
    model = init_inference(str(demo), backend="onnxruntime", max_rows=2, encoder_cache=0)
    requests = [
        request(f"Write {n} in words.", num_return_sequences=2, do_sample=True, seed=n)
        for n in range(40)
    ]
    futures = [model.submit([one])[0] for one in requests]  # clients take turns
    results = [future.result() for future in futures]
    assert results == [model.generate([one])[0] for one in requests]
    read = sum(not one.input_cached for r in results for one in (r, *r.alternatives))
    assert 40 < read <= 80
    model.close()


def test_with_transformers_too(demo: Path) -> None:
    other = init_inference(str(demo), backend="transformers")
    (result,) = other.generate(
        [request(num_return_sequences=3, do_sample=True, temperature=3.0, max_new_tokens=8)]
    )
    assert len({one.token_ids for one in (result, *result.alternatives)}) > 1
    other.close()


def test_cancelling_cancels_every_draw(model: Model) -> None:
    (future,) = model.submit(
        [request(num_return_sequences=9, do_sample=True, max_new_tokens=500, ignore_eos_token=True)]
    )
    assert future.cancel()
    assert model.generate([request(PROMPT)])[0].text == "four thousand three hundred twelve"
    assert (model.running, model.waiting) == (0, 0)


def test_more_draws_than_may_wait(demo: Path) -> None:
    small = init_inference(str(demo), backend="onnxruntime", max_queue=4)
    with pytest.raises(RequestError, match=r"5 texts cannot be queued.*option.max_queue"):
        small.generate([request(num_return_sequences=5, do_sample=True)])
    assert len(small.generate([request(num_return_sequences=4, do_sample=True)])) == 1
    small.close()


# The likeliest tokens


def test_top_tokens_are_the_oracles(pair: tuple[Model, Oracle]) -> None:
    model, oracle = pair
    (result,) = model.generate([request(PROMPT, top_n_tokens=5, max_new_tokens=8)])
    logits = oracle.logits(PROMPT, result.token_ids)
    for row, top in zip(torch.log_softmax(logits, -1), result.top_tokens):
        expected = row.topk(5)
        assert [token.log_prob for token in top] == pytest.approx(
            expected.values.tolist(), abs=1e-4
        )
        near = {i for i, v in enumerate(row.tolist()) if v > expected.values[-1] - 1e-4}
        assert {token.token_id for token in top} <= near
    assert len(result.top_tokens) == len(result.token_ids)


def test_the_chosen_token_leads_them_when_greedy(model: Model) -> None:
    results = model.generate(
        [request(PROMPT, top_n_tokens=n, max_new_tokens=8) for n in (0, 1, 20)]
    )
    assert results[0].top_tokens == ()
    for result, n in zip(results[1:], (1, 20)):
        for token, log_prob, top in zip(result.token_ids, result.log_probs, result.top_tokens):
            assert len(top) == n
            assert top[0].token_id == token
            assert math.isclose(top[0].log_prob, log_prob, abs_tol=1e-5)
