"""Engines that run single steps, by the same tests: plain transformers' tokens, and rows that do
not feel their neighbours. What "the same" is for each engine, step_engines.py tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from oracle import Oracle
from random_checkpoints import EDGE_VARIANTS, VARIANTS, in_shards, write_checkpoint
from safetensors.torch import load_file, save_file
from step_engines import (
    MODULES,
    assert_equal,
    assert_same,
    encoded,
    open_engine,
    random_ids,
    start,
    stepped,
)
from tasks import Example, held_out_examples

from handler.engines import Model, init_inference
from handler.engines.protocol import StepEngine
from handler.errors import RequestError
from handler.generation import GenerationRequest, GenerationResult
from handler.parameters import PARAMETERS, parse_parameters
from handler.scheduler import SUPPORTED_PARAMETERS
from handler.tokenizer import load_tokenizer

LENGTH = 40
LONGEST = 128  # that the demo answers
PROMPTS = [
    "{",  # no token of its own
    "x",
    "Write 7 in words.",
    "Sort these words: cat, apple",
    "What is the plural of mouse?",
    # beyond the farthest bucket of relative positions
    "Reverse the order of the words: " + "big cat red dog " * 40,
    "Count from 3 to 9.",
    "a b c d e f g",
    "Is this review positive, negative or neutral? Anna says that the garden was ordinary.",
    *(example.prompt for example in held_out_examples(7)),
]
EOS = 1


def test_the_prompts_fill_a_batch_and_are_of_many_lengths(demo: Path) -> None:
    tokenizer = load_tokenizer(demo, 640)
    lengths = [len(tokenizer.encode(prompt)) for prompt in PROMPTS]
    assert len(lengths) == 16
    assert min(lengths) <= 3
    assert max(lengths) > 150
    assert len(set(lengths)) > 8


BACKENDS = pytest.mark.parametrize("backend", MODULES)
OracleOf = Callable[[str], Oracle]


@dataclass
class Case:
    """One checkpoint, in the engine and in plain transformers."""

    model: Model
    oracle: Oracle

    @cached_property
    def exact(self) -> Oracle:
        return Oracle(self.oracle.folder, torch.float64)

    def run(self, prompts: Sequence[str], **parameters: Any) -> list[GenerationResult]:
        parsed = parse_parameters({"max_new_tokens": LENGTH, **parameters})
        return self.model.generate([GenerationRequest(prompt, parsed) for prompt in prompts])

    def logits(self, prompt: str, ids: Sequence[int]) -> torch.Tensor:
        return _without_padding(self.oracle, prompt, ids)

    def ties(self, prompt: str, result: GenerationResult, limit: int = LENGTH) -> int:
        """How often the engine chose the other one of two equals.

        Fails where it chose anything else than the oracle does after the same tokens: then
        ``generate`` would have gone on differently.
        """
        ids = result.token_ids
        best = self.logits(prompt, ids).argmax(-1)
        differing = (best != torch.tensor(ids)).nonzero().flatten().tolist()
        if differing:
            exact = _without_padding(self.exact, prompt, ids)
            for place in differing:
                two = exact[place].topk(2)
                assert ids[place] in two.indices, (prompt, place)
                assert two.values[0] - two.values[1] < 1e-4, (prompt, place)
        assert EOS not in ids[:-1]
        assert ids[-1] == EOS or len(ids) == limit
        assert result.text == self.oracle.text(ids)
        return len(differing)

    def assert_log_probs(self, prompt: str, result: GenerationResult) -> None:
        """Padded ids are never chosen, but they have their share of the probability."""
        expected = self.oracle.log_probs(prompt, result.token_ids)
        assert result.log_probs == pytest.approx(expected, abs=1e-4)


def _without_padding(oracle: Oracle, prompt: str, ids: Sequence[int]) -> torch.Tensor:
    logits = oracle.logits(prompt, tuple(ids)).clone()
    logits[:, oracle.padding] = -torch.inf
    return logits


@contextmanager
def opened(oracle: Oracle, backend: str) -> Iterator[Case]:
    model = init_inference(str(oracle.folder), backend=backend, threads=1)
    yield Case(model, oracle)
    model.close()


@pytest.fixture(scope="module", params=[*VARIANTS, *EDGE_VARIANTS])
def oracle(request: pytest.FixtureRequest, oracle_of: OracleOf) -> Oracle:
    return oracle_of(request.param)


@pytest.fixture(scope="module", params=MODULES)
def case(request: pytest.FixtureRequest, oracle: Oracle) -> Iterator[Case]:
    with opened(oracle, request.param) as case:
        yield case


@pytest.fixture
def checkpoint(tmp_path: Path, demo: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", "flan-t5", demo)


# Every variant of the family


def test_greedy(case: Case) -> None:
    results = case.run(PROMPTS)
    assert sum(case.ties(prompt, result) for prompt, result in zip(PROMPTS, results)) == 0
    for prompt, result in zip(PROMPTS, results):
        case.assert_log_probs(prompt, result)
    # worth comparing: texts differ, end at different places and are no single token for ever
    assert len({result.token_ids for result in results}) >= len(PROMPTS) - 3
    assert len({len(result.token_ids) for result in results}) >= 3
    assert max(len(set(result.token_ids)) for result in results) >= 8


def test_generate_gives_the_same(case: Case) -> None:
    for prompt in PROMPTS[2:4]:
        expected = case.oracle.generate(prompt, max_new_tokens=LENGTH)
        assert case.run([prompt])[0].token_ids == expected


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 3])
def test_batches_of_any_size_give_the_same(case: Case, size: int) -> None:
    together = case.run(PROMPTS)
    apart = [
        result
        for start in range(0, len(PROMPTS), size)
        for result in case.run(PROMPTS[start : start + size])
    ]
    assert_same(case.model.backend, apart, together)


@BACKENDS
def test_they_have_every_parameter_but_a_stream_that_nobody_reads(
    oracle_of: OracleOf, backend: str
) -> None:
    assert set(PARAMETERS) - SUPPORTED_PARAMETERS == {"stream"}
    with (
        opened(oracle_of("flan-t5"), backend) as flan,
        pytest.raises(RequestError, match=f"'stream' is not supported by backend {backend}"),
    ):
        flan.run(["x"], stream=True)


# Forms of a checkpoint


def answers_are_the_oracles(folder: Path) -> None:
    """Of every engine."""
    oracle = Oracle(folder)
    for backend in MODULES:
        with opened(oracle, backend) as case:
            for prompt, result in zip(PROMPTS[1:5], case.run(PROMPTS[1:5])):
                assert case.ties(prompt, result) == 0
                case.assert_log_probs(prompt, result)


def _in(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        weights = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})

    return change


def _with_spiece_alone(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "change",
    [
        in_shards,
        _in(torch.bfloat16),
        _in(torch.float16),
        _in(torch.float64),
        _with_spiece_alone,
    ],
    ids=["shards", "bf16", "fp16", "fp64", "spiece"],
)
def test_weights_in_other_forms(checkpoint: Path, change: Callable[[Path], None]) -> None:
    change(checkpoint)
    answers_are_the_oracles(checkpoint)


@pytest.mark.parametrize("variant", ["t5-v1.0", "flan-t5", "mt5", "umt5", "byt5"])
def test_a_checkpoint_that_transformers_5_saved(tmp_path: Path, demo: Path, variant: str) -> None:
    """It writes tie_word_embeddings=true for all of them."""
    folder = write_checkpoint(tmp_path / "first", variant, demo)
    transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    answers_are_the_oracles(folder)


@pytest.mark.parametrize(
    "name",
    ["relu", "gelu", "gelu_new", "silu", "gated-relu", "gated-gelu", "gated-gelu_new"],
)
def test_activations(tmp_path: Path, demo: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, "flan-t5", demo, feed_forward_proj=name)
    answers_are_the_oracles(folder)


# The demo


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return held_out_examples(500)


@BACKENDS
@pytest.mark.parametrize("count", [120, pytest.param(500, marks=pytest.mark.long)])
def test_prompts_of_the_demo(
    oracle_of: OracleOf, backend: str, count: int, examples: list[Example]
) -> None:
    prompts = [example.prompt for example in examples[:count]]
    with opened(oracle_of("demo"), backend) as case:
        results = case.run(prompts, max_new_tokens=LONGEST)
        ties = sum(case.ties(prompt, result, LONGEST) for prompt, result in zip(prompts, results))
    tokens = sum(len(result.token_ids) for result in results)
    print(f"{ties} ties in {tokens} tokens")
    assert ties <= 3


@pytest.fixture(scope="module")
def right_texts(model: Model, examples: list[Example]) -> list[str]:
    """The demo's in fp32."""
    prompts = [example.prompt for example in examples[:220]]
    return model.pipeline_generate(prompts, max_new_tokens=LONGEST)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("onnxruntime", "int8"),
        ("torch", "bf16"),
        *(pytest.param("torch", dtype, marks=pytest.mark.long) for dtype in ("int8", "fp16")),
    ],
)
def test_the_demo_in_fewer_bits(
    demo: Path,
    tmp_path: Path,
    right_texts: list[str],
    examples: list[Example],
    backend: str,
    dtype: str,
) -> None:
    """They turn few texts, and cost 0.5 points of exact matches at most."""
    examples = examples[: len(right_texts)]
    prompts = [example.prompt for example in examples]
    options: dict[str, Any] = {"threads": 1, "cache_dir": str(tmp_path)}
    small = init_inference(str(demo), backend=backend, dtype=dtype, **options)
    texts = small.pipeline_generate(prompts, max_new_tokens=LONGEST)
    small.close()
    right, others = (
        sum(text == example.target for text, example in zip(answers, examples))
        for answers in (texts, right_texts)
    )
    equal = sum(one == other for one, other in zip(texts, right_texts))
    print(f"{equal} of {len(prompts)} equal, right: {right}, in fp32 {others}")
    assert right >= others - 0.005 * len(prompts)
    assert equal >= 0.97 * len(prompts)


# Single steps


def given(engine: StepEngine, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """What the decoder reads where ``ids`` [rows, tokens] are to be scored."""
    start_tokens = np.full((len(ids), 1), engine.decoder_start_token_id)
    return np.concatenate([start_tokens, ids[:, :-1]], axis=1)


@pytest.fixture(scope="module", params=MODULES)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def engine(backend: str, oracle_of: OracleOf) -> Iterator[StepEngine]:
    opened = open_engine(backend, oracle_of("flan-t5").folder)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def handles(engine: StepEngine) -> Sequence[Any]:
    return encoded(engine, [engine.tokenizer.encode(prompt) for prompt in ("", *PROMPTS[1:])])


def test_given_continuations_are_scored_as_by_the_oracle(oracle: Oracle, backend: str) -> None:
    """Long ones: beyond the farthest bucket of the decoder's relative positions."""
    prompts = [PROMPTS[5], "", PROMPTS[3]]
    engine = open_engine(backend, oracle.folder)
    ids = random_ids(len(prompts), 150)
    tokens = given(engine, ids)
    start(engine, *encoded(engine, [engine.tokenizer.encode(prompt) for prompt in prompts]))
    scored = engine.decode(len(prompts), tokens, np.zeros(len(prompts), np.int64))
    assert scored.shape == (len(prompts), 150, oracle.model.config.vocab_size)
    for row, prompt in enumerate(prompts):
        expected = oracle.logits(prompt, tuple(ids[row].tolist())).numpy()
        assert np.abs(scored[row] - expected).max() < 1e-4 * np.abs(expected).max()
    assert_equal(backend, stepped(engine, tokens), scored)
    engine.close()


def test_a_continuation_is_scored_from_where_each_row_is(
    backend: str, engine: StepEngine, handles: Sequence[Any]
) -> None:
    tokens = random_ids(3, 30)
    start(engine, *handles[:3])
    whole = stepped(engine, tokens)
    places = np.array([4, 11, 0])
    rest = np.stack([tokens[row, place : place + 15] for row, place in enumerate(places)])
    scored = engine.decode(3, rest, places)
    for row, place in enumerate(places):
        assert_equal(backend, scored[row], whole[row, place : place + 15])


def test_the_caller_may_overwrite_logits(
    backend: str, engine: StepEngine, handles: Sequence[Any]
) -> None:
    tokens = random_ids(2, 5)
    start(engine, *handles[:2])
    untouched = stepped(engine, tokens)
    start(engine, *handles[:2])
    for k in range(5):
        logits = engine.decode(2, tokens[:, [k]], np.full(2, k))
        assert_equal(backend, logits[:, 0], untouched[:, k])
        logits[:] = np.nan


def test_a_moved_row_goes_on_where_it_was(
    backend: str, engine: StepEngine, handles: Sequence[Any]
) -> None:
    tokens = random_ids(4, 40)
    start(engine, handles[2], handles[5], handles[0], handles[8])
    undisturbed = stepped(engine, tokens)
    for dst in (0, 1, 2):
        start(engine, handles[2], handles[5], handles[0], handles[8])
        stepped(engine, tokens[:, :20])
        engine.move(3, dst)
        # what comes to the row that was left must not matter
        engine.attach(handles[6], 3)
        engine.decode(4, random_ids(4, 1, seed=9)[:, :1], np.array([20, 20, 20, 0]))
        order = [3 if row == dst else row for row in range(3)]
        assert_equal(backend, stepped(engine, tokens[order, 20:], 20), undisturbed[order, 20:])


def test_a_row_that_never_decoded_can_be_moved(
    backend: str, engine: StepEngine, handles: Sequence[Any]
) -> None:
    tokens = random_ids(1, 10)
    start(engine, handles[8])
    expected = stepped(engine, tokens)
    start(engine, handles[5], handles[8])
    engine.move(1, 0)
    assert_equal(backend, stepped(engine, tokens), expected)


def test_reordered_rows_go_on_from_their_parents_tokens(
    backend: str, engine: StepEngine, handles: Sequence[Any]
) -> None:
    """Rows 1 to 4 are beams of one prompt, row 0 is another's; they have different lengths."""
    lengths, parents = np.array([12, 3, 7, 12, 5]), [0, 3, 1, 3, 2]
    tokens, rest = random_ids(5, 12), random_ids(5, 8, seed=1)
    for row, handle in enumerate((handles[0], *[handles[4]] * 4)):
        engine.attach(handle, row)
    for step in range(12):
        positions = np.minimum(step, lengths - 1)
        engine.decode(5, tokens[np.arange(5), positions][:, None], positions)
    engine.reorder([1, 2, 3, 4], parents[1:])
    reordered = engine.decode(5, rest, lengths[parents])
    for row, parent in enumerate(parents):
        length = lengths[parent]
        start(engine, handles[4 if row else 0])
        whole = np.concatenate([tokens[[parent], :length], rest[[row]]], axis=1)
        assert_equal(backend, reordered[row], stepped(engine, whole)[0, length:])


def test_several_rows_on_one_prompt(
    backend: str, engine: StepEngine, handles: Sequence[Any]
) -> None:
    """Also later, when others have used the rows: decoding does not change a handle."""
    tokens = random_ids(3, 10)
    alone = []
    for row in range(3):
        start(engine, handles[5])
        alone.append(stepped(engine, tokens[[row]])[0])
    for _ in range(2):
        start(engine, *[handles[5]] * 3)
        assert_equal(backend, stepped(engine, tokens), np.stack(alone))
        start(engine, *handles[:6])
        stepped(engine, random_ids(6, 20))


def test_nothing_is_left_of_a_rows_last_prompt(
    backend: str, engine: StepEngine, handles: Sequence[Any]
) -> None:
    tokens = random_ids(1, 6)
    start(engine, handles[1])
    fresh = stepped(engine, tokens)
    start(engine, handles[5])
    stepped(engine, random_ids(1, 100))
    start(engine, handles[1])
    assert_equal(backend, stepped(engine, tokens), fresh)


@BACKENDS
def test_the_smallest_limits(oracle_of: OracleOf, backend: str) -> None:
    """One row, one token in and one out."""
    smallest = {"max_rows": 1, "max_input_tokens": 1, "max_output_tokens": 1}
    found = []
    for limits in (smallest, {}):
        engine = open_engine(backend, oracle_of("umt5").folder, **limits)
        start(engine, *encoded(engine, [[5]]))
        found.append(stepped(engine, np.array([[engine.decoder_start_token_id]])))
        engine.close()
    assert_equal(backend, *found)
