"""Choosing tokens: seeds that decide alone, rows that do not feel their neighbours, log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from random_checkpoints import write_checkpoint
from transformers_scores import EOS, generate_arguments, transformers_scores

from handler.bad_words import bad_word_ids
from handler.engines import Model, init_inference
from handler.errors import RequestError
from handler.generation import GenerationRequest, GenerationResult
from handler.parameters import MAX_SEED, GenerationParameters
from handler.sampling import RowSampling, choose_tokens, gumbel

Logits = npt.NDArray[np.float32]


def sampled(**values: Any) -> GenerationParameters:
    return GenerationParameters(do_sample=True, **values)


def random_logits(size: int, spread: float = 3.0, seed: int = 0) -> Logits:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def chosen(logits: Logits, rows: Sequence[RowSampling], step: int = 0) -> list[int]:
    """One token for each row, all from the same logits."""
    tokens, _ = choose_tokens(np.tile(logits, (len(rows), 1)), rows, [step] * len(rows), EOS)
    return tokens


parameters = st.builds(
    GenerationParameters,
    do_sample=st.booleans(),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 30, 300]),
    top_p=st.sampled_from([0.0, 0.5, 0.9]),
    typical_p=st.sampled_from([0.0, 0.2, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.3]),
    no_repeat_ngram_size=st.sampled_from([0, 1, 2]),
    min_new_tokens=st.sampled_from([0, 3]),
    ignore_eos_token=st.booleans(),
    seed=st.integers(0, MAX_SEED),
)


# Seeds


@pytest.fixture(scope="module")
def numbers() -> npt.NDArray[np.float64]:
    """[seeds, steps]"""
    rows = [RowSampling(sampled(seed=seed)) for seed in range(300)]
    return np.array([[row.uniform(step) for step in range(300)] for row in rows])


def chi_squared(counted: npt.NDArray[np.int64]) -> float:
    expected = counted.sum() / len(counted)
    return float(((counted - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("neighbours", ["steps", "seeds"])
def test_numbers_do_not_follow_from_their_neighbours(
    numbers: npt.NDArray[np.float64], neighbours: str
) -> None:
    """All pairs of a number and the next one are equally frequent."""
    table = numbers if neighbours == "steps" else numbers.T
    bins = (table * 10).astype(int)
    pairs = 10 * bins[:, :-1] + bins[:, 1:]
    counted = np.bincount(pairs.ravel(), minlength=100)
    assert chi_squared(counted) < 158  # exceeded once in ten thousand with 99 degrees of freedom


def test_numbers_do_not_repeat(numbers: npt.NDArray[np.float64]) -> None:
    assert len(np.unique(numbers)) == numbers.size


@settings(deadline=None)
@given(seed=st.integers(0, MAX_SEED), step=st.integers(0, 100_000))
def test_a_number_belongs_to_its_seed_and_step(seed: int, step: int) -> None:
    row = RowSampling(sampled(seed=seed))
    number = row.uniform(step)
    assert 0.0 <= number < 1.0
    row.uniform(step + 1)
    row.uniform(step + 1000)
    assert row.uniform(step) == number
    assert RowSampling(sampled(seed=seed)).uniform(step) == number
    assert RowSampling(sampled(seed=(seed + 1) % MAX_SEED)).uniform(step) != number
    assert row.uniform(step + 1) != number


def test_noise_of_different_steps_has_nothing_in_common() -> None:
    row = RowSampling(sampled(seed=3))
    noise = np.stack([gumbel(row, step, (500,)) for step in range(20)])
    assert (gumbel(row, 7, (500,)) == noise[7]).all()
    assert len(np.unique(noise)) > 0.999 * noise.size


def test_without_a_seed_each_request_has_its_own() -> None:
    seeds = {RowSampling(sampled()).seed for _ in range(10)}
    assert len(seeds) == 10


# Rows beside each other


@settings(deadline=None)
@given(
    cases=st.lists(
        st.tuples(parameters, st.lists(st.integers(0, 99), max_size=9)), min_size=1, max_size=16
    ),
    bad_words=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=2), max_size=3),
    size=st.sampled_from([100, 700, 5000]),
    spread=st.sampled_from([0.3, 3.0, 50.0]),
    seed=st.integers(0, 100),
)
def test_a_row_is_chosen_the_same_alone_and_among_others(
    cases: list[tuple[GenerationParameters, list[int]]],
    bad_words: list[list[int]],
    size: int,
    spread: float,
    seed: int,
) -> None:
    """Token and log-probability, to the last bit."""
    logits = np.stack([random_logits(size, spread, seed + row) for row in range(len(cases))])
    logits[0] *= 200

    def rows() -> list[RowSampling]:
        made = [RowSampling(p, bad_words=bad_words) for p, _ in cases]
        for row, (_, generated) in zip(made, cases):
            for token in generated:
                row.append(token)
        return made

    steps = [len(generated) for _, generated in cases]
    tokens, log_probs = choose_tokens(logits.copy(), rows(), steps, EOS)
    for row, sampling in enumerate(rows()):
        alone = choose_tokens(logits[row : row + 1].copy(), [sampling], [steps[row]], EOS)
        assert alone == ([tokens[row]], [log_probs[row]])


def test_a_copy_draws_the_same_and_has_its_own_history() -> None:
    p = sampled(seed=3, no_repeat_ngram_size=1)
    row = RowSampling(p)
    chosen(random_logits(50), [row])
    other = row.fork()
    assert chosen(random_logits(50), [row], 1) == chosen(random_logits(50), [other], 1)
    chosen(random_logits(50), [row], 2)
    assert row.history
    assert other.history
    assert len(row.history.counts()[0]) == len(other.history.counts()[0]) + 1


# Greedy, the end of the text, log-probabilities


@pytest.mark.parametrize(
    "p",
    [
        GenerationParameters(),
        GenerationParameters(seed=3),
        GenerationParameters(temperature=0.3, top_k=40),
        sampled(temperature=0.0),
        sampled(temperature=1e-6),
        sampled(top_k=1, temperature=9.0),
        sampled(top_p=1e-9),
    ],
    ids=str,
)
def test_greedy_takes_the_best(p: GenerationParameters) -> None:
    logits = np.stack([random_logits(500, seed=seed) for seed in range(50)])
    best = logits.argmax(-1).tolist()
    assert choose_tokens(logits, [RowSampling(p)] * 50, list(range(50)), EOS)[0] == best


def test_of_equals_greedy_takes_the_first() -> None:
    logits = np.array([0, 1, 5, 5, 2], np.float32)
    assert chosen(logits, [RowSampling(GenerationParameters())]) == [2]


@pytest.mark.parametrize("samples", [False, True])
def test_the_end_is_not_chosen_before_min_new_tokens(samples: bool) -> None:
    logits = random_logits(20)
    logits[EOS] = 30.0
    p = GenerationParameters(min_new_tokens=5, do_sample=samples, top_k=3, seed=1)
    for step in range(10):
        (token,) = chosen(logits, [RowSampling(p)], step)
        assert (token == EOS) == (step >= 5)


@pytest.mark.parametrize("samples", [False, True])
def test_the_end_is_never_chosen_where_it_is_ignored(samples: bool) -> None:
    logits = random_logits(20)
    logits[EOS] = 30.0
    p = GenerationParameters(ignore_eos_token=True, do_sample=samples, seed=1)
    for step in range(200):
        assert chosen(logits, [RowSampling(p)], step) != [EOS]


@settings(deadline=None)
@given(
    p=parameters,
    spread=st.sampled_from([0.1, 3.0, 40.0, 1e4]),
    shift=st.sampled_from([0.0, 55.0, -3000.0]),
    seed=st.integers(0, 50),
)
def test_log_probs_are_the_models_own(
    p: GenerationParameters, spread: float, shift: float, seed: int
) -> None:
    """Before penalties, temperature, filters and what must not be chosen."""
    logits = np.stack([random_logits(700, spread, seed + row) for row in range(2)])
    logits += np.float32(shift)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    rows = [RowSampling(p, bad_words=[[int(logits[0].argmax())]]) for _ in range(2)]
    tokens, log_probs = choose_tokens(logits.copy(), rows, [0, 9], EOS)
    for row in range(2):
        exact = expected[row, tokens[row]].item()
        log_prob = log_probs[row]
        assert log_prob is not None
        assert log_prob == pytest.approx(exact, abs=2e-5, rel=1e-6)
        assert log_prob <= 0.0


@pytest.mark.parametrize("p", [GenerationParameters(), sampled(), sampled(top_k=5)], ids=str)
def test_padding_of_the_vocabulary_counts_but_is_never_chosen(p: GenerationParameters) -> None:
    logits = np.stack([random_logits(5000, seed=seed) for seed in range(8)])
    logits[:4, 4990:] = 9.0
    logits[3, 4990:] = 150.0
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    rows = [RowSampling(replace(p, seed=row)) for row in range(8)]
    tokens, log_probs = choose_tokens(logits, rows, [0] * 8, EOS, 4990)
    assert max(tokens) < 4990
    assert log_probs == pytest.approx(expected[range(8), tokens].tolist(), abs=2e-5)


@settings(deadline=None)
@given(
    cases=st.lists(st.tuples(parameters, st.booleans()), min_size=1, max_size=8),
    size=st.sampled_from([100, 5000]),
    seed=st.integers(0, 50),
)
def test_a_row_that_wants_no_log_prob_gets_the_same_token(
    cases: list[tuple[GenerationParameters, bool]], size: int, seed: int
) -> None:
    logits = np.stack([random_logits(size, 2.0, seed + row) for row in range(len(cases))])
    steps = [0] * len(cases)
    all_told = [RowSampling(p, bad_words=[[5]]) for p, _ in cases]
    some_told = [RowSampling(p, bad_words=[[5]], log_probs=wants) for p, wants in cases]
    tokens, log_probs = choose_tokens(logits.copy(), all_told, steps, EOS, size - 3)
    told = [log_prob if wants else None for log_prob, (_, wants) in zip(log_probs, cases)]
    assert choose_tokens(logits, some_told, steps, EOS, size - 3) == (tokens, told)


# Logits that are no numbers, parameters that leave nothing


NOTHING_LEFT = {"bad_words": [[token] for token in range(20) if token != EOS]}


@pytest.mark.parametrize("log_probs", [True, False])
@pytest.mark.parametrize("p", [GenerationParameters(), sampled(), sampled(top_k=3)], ids=str)
@pytest.mark.parametrize("wrong", ["one NaN", "all NaN", "all -inf", "inf"])
def test_logits_that_are_no_numbers_fail_their_row_alone(
    p: GenerationParameters, wrong: str, log_probs: bool
) -> None:
    logits = np.stack([random_logits(20)] * 3)
    if wrong == "one NaN":
        logits[1, 7] = np.nan
    elif wrong == "inf":
        logits[1, 7] = np.inf
    else:
        logits[1] = -np.inf if wrong == "all -inf" else np.nan
    rows = [RowSampling(replace(p, seed=4), log_probs=log_probs) for _ in range(3)]
    alone = choose_tokens(logits[:1].copy(), rows[:1], [0], EOS)
    tokens, told = choose_tokens(logits, rows, [0] * 3, EOS)
    assert told[1] is not None
    assert np.isnan(told[1])
    assert ([tokens[0]], [told[0]]) == ([tokens[2]], [told[2]]) == alone


@pytest.mark.parametrize("p", [GenerationParameters(), sampled(), sampled(top_k=3)], ids=str)
def test_a_token_that_the_model_excludes_is_not_chosen(p: GenerationParameters) -> None:
    logits = np.full(20, -np.inf, np.float32)
    logits[13] = -5.0
    rows = [RowSampling(p)]
    assert choose_tokens(logits[None].copy(), rows, [0], EOS) == ([13], [0.0])


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("samples", [False, True])
def test_one_token_left_is_taken_and_none_left_is_told(samples: bool, wanted: bool) -> None:
    p = GenerationParameters(do_sample=samples)
    ending_too = GenerationParameters(do_sample=samples, ignore_eos_token=True)
    rows = [RowSampling(q, **NOTHING_LEFT, log_probs=wanted) for q in (p, ending_too)]
    logits = np.stack([random_logits(20)] * 2)
    tokens, log_probs = choose_tokens(logits, rows, [0, 0], EOS)
    assert tokens[0] == EOS
    assert (log_probs[0] is not None) == wanted
    assert log_probs[1] == -np.inf


# Through the engine


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(pair, marks=pytest.mark.long if pair == ("onnxruntime", "flan-t5") else ())
        for pair in (("onnxruntime", "demo"), ("onnxruntime", "flan-t5"), ("torch", "flan-t5"))
    ],
    ids="-".join,
)
def engine(
    request: pytest.FixtureRequest, oracle_of: Callable[[str], Oracle]
) -> Iterator[tuple[Model, Oracle]]:
    backend, variant = request.param
    model = init_inference(str(oracle_of(variant).folder), backend=backend, threads=1)
    yield model, oracle_of(variant)
    model.close()


PROMPTS = [
    "Write 7 in words.",
    "Sort these words: cat, apple",
    "Reverse the order of the words: big cat red dog big cat red dog",
    "Count from 3 to 9.",
]
ALONE: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.8},
    {"presence_penalty": 1.9},
    {"presence_penalty": -2.0, "frequency_penalty": -2.0},
    {"frequency_penalty": 1.2},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 20},
    {"ignore_eos_token": True},
]
# in `make test` these are in the mixed batch only
SIMILAR = ({"repetition_penalty": 0.8}, {"frequency_penalty": 1.2}, {"no_repeat_ngram_size": 1})
ALL = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "no_repeat_ngram_size": 3,
    "min_new_tokens": 15,
    "bad_words_list": ("seven", "cat", "dog"),
}


def expected(engine: tuple[Model, Oracle], prompt: str, p: GenerationParameters) -> tuple[int, ...]:
    model, oracle = engine
    words = bad_word_ids(p.bad_words_list, model.tokenizer)
    return oracle_text(oracle, prompt, p, tuple(map(tuple, words)))


@cache  # engines and tests ask for the same ones
def oracle_text(
    oracle: Oracle, prompt: str, p: GenerationParameters, words: tuple[tuple[int, ...], ...]
) -> tuple[int, ...]:
    return oracle.generate(prompt, **generate_arguments(p, words))


def greedy(values: dict[str, Any]) -> GenerationParameters:
    return GenerationParameters(max_new_tokens=24, **values)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(values, marks=pytest.mark.long if values in SIMILAR else ())
        for values in [*ALONE, ALL]
    ],
    ids=lambda values: "-".join(values) or "none",
)
def test_greedy_texts_are_those_of_transformers(
    engine: tuple[Model, Oracle], values: dict[str, Any]
) -> None:
    p = greedy(values)
    results = engine[0].generate([GenerationRequest(prompt, p) for prompt in PROMPTS])
    assert [r.token_ids for r in results] == [expected(engine, x, p) for x in PROMPTS]
    plain = [GenerationRequest(prompt, greedy({})) for prompt in PROMPTS]
    assert (results != engine[0].generate(plain)) == bool(values), "shows nothing here"


def test_what_it_would_have_said_as_bad_words(engine: tuple[Model, Oracle]) -> None:
    """A word of several tokens, one of a single token, and ids, from each text."""
    model, _ = engine
    words: list[Any] = []
    for result in model.generate([GenerationRequest(x, greedy({})) for x in PROMPTS]):
        ids = result.token_ids
        words += [model.tokenizer.decode(ids[1:4]), model.tokenizer.decode(ids[:1]), ids[2:4]]
    p = greedy({"bad_words_list": tuple(word for word in words if word)})
    results = model.generate([GenerationRequest(prompt, p) for prompt in PROMPTS])
    assert [r.token_ids for r in results] == [expected(engine, x, p) for x in PROMPTS]
    for result in results:
        for ids in bad_word_ids(p.bad_words_list, model.tokenizer):
            starts = range(len(result.token_ids))
            assert all(result.token_ids[i : i + len(ids)] != ids for i in starts)


def test_mixed_in_one_running_batch_each_keeps_to_its_own(engine: tuple[Model, Oracle]) -> None:
    requests = [
        GenerationRequest(PROMPTS[place % 4], greedy(values))
        for place, values in enumerate([*ALONE, ALL, *ALONE])
    ]
    results = engine[0].generate(requests)
    wanted = [expected(engine, r.input, r.parameters) for r in requests]
    assert [result.token_ids for result in results] == wanted


SAMPLING = [
    {"temperature": 1.5},
    {"top_k": 20},
    {"top_p": 0.9},
    {"typical_p": 0.6, "temperature": 2.0},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "typical_p": 0.9, **ALL},
]


@settings(deadline=None, max_examples=25)
@given(
    cases=st.lists(
        st.tuples(st.sampled_from(SAMPLING), st.integers(0, 3), st.integers(0, 2**64 - 1)),
        min_size=2,
        max_size=16,
    )
)
def test_same_seed_same_text_whatever_else_is_in_the_batch(
    model: Model, cases: list[tuple[dict[str, Any], int, int]]
) -> None:
    requests = [
        GenerationRequest(PROMPTS[prompt], sampled(max_new_tokens=24, seed=seed, **values))
        for values, prompt, seed in cases
    ]
    together = model.generate(requests)
    assert model.generate(requests[:1]) == together[:1]
    assert model.generate(requests[::-1]) == together[::-1]


def test_every_drawn_token_is_one_that_transformers_keeps(engine: tuple[Model, Oracle]) -> None:
    model, oracle = engine
    for place, values in enumerate(SAMPLING * 2):
        p = sampled(max_new_tokens=24, seed=place, **values)
        prompt = PROMPTS[place % 4]
        (result,) = model.generate([GenerationRequest(prompt, p)])
        assert_kept(model, oracle, prompt, p, result)


def assert_kept(
    model: Model, oracle: Oracle, prompt: str, p: GenerationParameters, result: GenerationResult
) -> None:
    ids = result.token_ids
    words = bad_word_ids(p.bad_words_list, model.tokenizer)
    logits = oracle.logits(prompt, ids)[:, : model.tokenizer.size].numpy()
    for step, token in enumerate(ids):
        scores = transformers_scores(logits[step], p, ids[:step], words)
        assert torch.isfinite(scores[token]), (values_of(p), step)


def values_of(p: GenerationParameters) -> str:
    return f"{p.temperature} {p.top_k} {p.top_p} {p.typical_p} seed {p.seed}"


def test_a_request_that_leaves_no_token_fails_alone(tmp_path: Path, demo: Path) -> None:
    """ByT5 has 384 tokens: without the start token and the end, 382 may come once."""
    model = init_inference(str(write_checkpoint(tmp_path, "byt5", demo)), backend="onnxruntime")
    values = {"max_new_tokens": 400, "ignore_eos_token": True}
    failing, answered = model.submit(
        [
            GenerationRequest("x", GenerationParameters(no_repeat_ngram_size=size, **values))
            for size in (1, 0)
        ]
    )
    with pytest.raises(RequestError, match="forbid every token after 382: relax bad_words") as e:
        failing.result(timeout=60)
    assert e.value.code == 400
    assert len(answered.result(timeout=60).token_ids) == 400
    model.close()


def test_a_bad_word_that_is_none_is_refused_before_it_waits(model: Model) -> None:
    request = GenerationRequest("x", GenerationParameters(bad_words_list=(" ",)))
    with pytest.raises(RequestError, match="'bad_words_list' must hold words") as caught:
        model.submit([request])
    assert caught.value.code == 400
