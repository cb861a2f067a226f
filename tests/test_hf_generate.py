"""Backend transformers: the answers of plain ``generate``, whatever runs beside them."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Oracle
from random_checkpoints import VARIANTS, write_checkpoint
from safetensors.numpy import load_file, save_file
from tasks import held_out_examples

from handler.bad_words import bad_word_ids
from handler.engines import Model, hf_generate, init_inference
from handler.errors import LoadError, RequestError
from handler.generation import GenerationRequest, GenerationResult, ScoreRequest
from handler.parameters import parse_parameters

LENGTH = 16
PROMPTS = [
    "x",
    "Write 7 in words.",
    "Sort these words: cat, apple",
    "What is the plural of mouse?",
    "Count from 3 to 9.",
    "Is this review positive, negative or neutral? Anna says that the garden was ordinary.",
    "a b c d e f g",
]


@dataclass
class Case:
    """One checkpoint, in our engine and in plain transformers."""

    model: Model
    oracle: Oracle

    def run(self, prompts: list[str], **parameters: Any) -> list[GenerationResult]:
        parsed = parse_parameters({"max_new_tokens": LENGTH, **parameters})
        return self.model.generate([GenerationRequest(prompt, parsed) for prompt in prompts])

    def assert_equal(self, parameters: dict[str, Any], arguments: dict[str, Any]) -> None:
        """Our batch under ``parameters`` is the oracle's one by one under ``arguments``."""
        results = self.run(PROMPTS, **parameters)
        for prompt, result in zip(PROMPTS, results):
            expected = self.oracle.generate(prompt, max_new_tokens=LENGTH, **arguments)
            assert result.token_ids == expected, prompt
            assert result.text == self.oracle.text(expected)


def open_case(folder: Path, **options: Any) -> Iterator[Case]:
    model = init_inference(str(folder), backend="transformers", **options)
    yield Case(model, Oracle(folder))
    model.close()


# The network is transformers' own: two of the family stand for all in `make test`.
_USUAL_VARIANTS = ("t5-v1.0", "byt5")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(variant, marks=[] if variant in _USUAL_VARIANTS else pytest.mark.long)
        for variant in VARIANTS
    ],
)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, demo: Path
) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp(request.param)
    yield from open_case(write_checkpoint(folder, request.param, demo))


@pytest.fixture(scope="module")
def flan(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Iterator[Case]:
    """The variant for what does not depend on the architecture."""
    yield from open_case(write_checkpoint(tmp_path_factory.mktemp("flan"), "flan-t5", demo))


# Every variant of the family


def test_greedy(case: Case) -> None:
    case.assert_equal({}, {})


@pytest.mark.parametrize(
    "search",
    [
        {},
        pytest.param({"length_penalty": 2.0, "early_stopping": True}, marks=pytest.mark.long),
        {"length_penalty": -1.0, "early_stopping": "never"},
    ],
    ids=str,
)
def test_beams(case: Case, search: dict[str, Any]) -> None:
    case.assert_equal({"num_beams": 4, **search}, {"num_beams": 4, **search})


def test_log_probs_are_the_models_own(case: Case) -> None:
    for parameters in ({}, {"num_beams": 3}, {"temperature": 2.0, "top_k": 5, "seed": 1}):
        for prompt, result in zip(PROMPTS, case.run(PROMPTS, **parameters)):
            expected = case.oracle.log_probs(prompt, result.token_ids)
            assert result.log_probs == pytest.approx(expected, abs=1e-3)


def test_the_random_checkpoints_are_worth_comparing(case: Case) -> None:
    results = case.run(PROMPTS)
    assert len({result.token_ids for result in results}) == len(PROMPTS)
    assert max(len(set(result.token_ids)) for result in results) >= 8


# Parameters


@pytest.mark.parametrize("num_beams", [1, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("parameters", "arguments"),
    [
        ({"min_new_tokens": 12}, {"min_new_tokens": 12}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        ({"ignore_eos_token": True}, {"suppress_tokens": [1]}),
    ],
    ids=lambda value: "-".join(value),
)
def test_parameters_mean_what_they_mean_in_transformers(
    flan: Case, parameters: dict[str, Any], arguments: dict[str, Any], num_beams: int
) -> None:
    search = {"num_beams": num_beams}
    changed = flan.run(PROMPTS, **search, **parameters)
    assert changed != flan.run(PROMPTS, **search), "shows nothing on this checkpoint"
    flan.assert_equal({**search, **parameters}, {**search, **arguments})


@pytest.mark.parametrize("num_beams", [pytest.param(1, marks=pytest.mark.long), 4])
@pytest.mark.parametrize("written_as", ["strings", "ids"])
def test_bad_words(flan: Case, num_beams: int, written_as: str) -> None:
    tokenizer = flan.model.tokenizer
    said = {i for r in flan.run(PROMPTS, num_beams=num_beams) for i in r.token_ids}
    words = [
        word
        for word in (tokenizer.decode([i]) for i in sorted(said) if tokenizer.token(i)[0] == "▁")
        if word
    ][:8]
    assert len(words) == 8
    sent: Any = words
    ids = [list(sequence) for sequence in bad_word_ids(words, tokenizer)]
    if written_as == "ids":
        joined = list(itertools.chain(*ids))
        ends = np.cumsum([len(word) for word in ids]).tolist()
        sent = [joined, ends + [-1] * (len(joined) - len(ends))]
    flan.assert_equal(
        {"num_beams": num_beams, "bad_words_list": sent},
        {"num_beams": num_beams, "bad_words_ids": ids},
    )


@pytest.mark.parametrize(
    "words", [" ", [[640], [1]], [[3, 10_000_000], [2, -1]]], ids=["blank", "padding", "huge"]
)
def test_bad_words_that_are_no_words_of_the_model(flan: Case, words: Any) -> None:
    with pytest.raises(RequestError, match="'bad_words_list' must hold words") as caught:
        flan.run(["x"], bad_words_list=words)
    assert caught.value.code == 400


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_stop_sequence_ends_its_own_row_only(flan: Case, num_beams: int) -> None:
    full = flan.run(PROMPTS, num_beams=num_beams)
    stop = full[1].text[5:8]
    stopped = flan.run(PROMPTS, num_beams=num_beams, stop_sequences=[stop])
    assert stopped[1].finish_reason == "stop_sequence"
    for before, after in zip(full, stopped):
        assert after.text == before.text.split(stop)[0]
        assert after.token_ids == before.token_ids[: len(after.token_ids)]


def test_why_a_text_ended(flan: Case) -> None:
    for result in flan.run(PROMPTS):
        if result.token_ids[-1] == 1:
            assert result.finish_reason == "eos_token"
        else:
            assert (result.finish_reason, len(result.token_ids)) == ("length", LENGTH)
    assert {result.finish_reason for result in flan.run(PROMPTS)} == {"eos_token", "length"}


def test_requests_of_different_parameters_in_one_call(flan: Case) -> None:
    sent: list[dict[str, Any]] = [
        {},
        {"num_beams": 4},
        {"repetition_penalty": 1.7},
        {"temperature": 1.5, "seed": 3},
        {"max_new_tokens": 3},
        {"num_beams": 4, "length_penalty": 3.0},
        {"ignore_eos_token": True},
    ]
    requests = [
        GenerationRequest(prompt, parse_parameters({"max_new_tokens": 2 * LENGTH, **parameters}))
        for prompt, parameters in zip(PROMPTS, sent)
    ]
    alone = [flan.model.generate([request])[0] for request in requests]
    together = flan.model.generate(requests)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.text(min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=6))
def test_any_texts_beside_each_other(flan: Case, prompts: list[str]) -> None:
    for prompt, result in zip(prompts, flan.run(prompts)):
        assert result.token_ids == flan.oracle.generate(prompt, max_new_tokens=LENGTH)


def test_several_texts_of_an_older_beam_search_are_refused(
    flan: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_generate, "sees_every_end", lambda: False)
    with pytest.raises(RequestError, match=r"must be 1 with num_beams > 1 on transformers \d") as e:
        flan.run(["x"], num_beams=2, num_return_sequences=2)
    assert e.value.code == 400


def test_scores_are_read_in_parts_where_they_are_many(
    flan: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [ScoreRequest(prompt, ("a b", "the pony", "x")) for prompt in PROMPTS]
    whole = flan.model.score(requests)
    monkeypatch.setattr(hf_generate, "_LOGITS_AT_A_TIME", 1)
    for part, expected in zip(flan.model.score(requests), whole):
        for one, other in zip(part, expected):
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


# Sampling


def test_a_seed_decides_alone_what_is_drawn(flan: Case) -> None:
    sent = [{"temperature": 1.5, "seed": seed} for seed in range(len(PROMPTS))]
    length = {"max_new_tokens": 2 * LENGTH}
    requests = [
        GenerationRequest(prompt, parse_parameters({**length, **parameters}))
        for prompt, parameters in zip(PROMPTS, sent)
    ]
    alone = [flan.model.generate([request])[0] for request in requests]
    greedy = [GenerationRequest(prompt, parse_parameters(length)) for prompt in PROMPTS]
    beside = flan.model.generate([*greedy, *reversed(requests), *greedy])
    assert beside[len(greedy) : -len(greedy)] == alone[::-1]


def test_seeds_differ_and_none_is_random(flan: Case) -> None:
    seeds: list[dict[str, Any]] = [{"seed": seed} for seed in (0, 1, 2, 2**64 - 1)]
    drawn = [flan.run(["x"], temperature=3.0, **seed)[0].token_ids for seed in [*seeds, {}, {}]]
    assert len(set(drawn)) == len(drawn)


def test_draws_follow_the_models_probabilities(flan: Case) -> None:
    draws, temperature, top_k = 400, 1.3, 5
    requests = [
        GenerationRequest(
            "x", parse_parameters({**_draw(seed), "temperature": temperature, "top_k": top_k})
        )
        for seed in range(draws)
    ]
    drawn = [result.token_ids[0] for result in flan.model.generate(requests)]
    logits = flan.oracle.logits("x", (0,))[0].clone() / temperature
    logits[flan.oracle.padding] = -torch.inf
    best = logits.topk(top_k)
    expected = torch.softmax(best.values, -1) * draws
    counted = torch.tensor([drawn.count(i) for i in best.indices.tolist()])
    assert counted.sum() == draws
    # chi-square of 4 degrees of freedom: 23.5 is exceeded once in ten thousand
    assert ((counted - expected) ** 2 / expected).sum() < 23.5


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(flan: Case, seed: int) -> None:
    p = 0.5
    (result,) = flan.run(["x"], top_p=p, seed=seed)
    logits = flan.oracle.logits("x", result.token_ids).clone()
    logits[:, flan.oracle.padding] = -torch.inf
    for row, token_id in zip(torch.softmax(logits, -1), result.token_ids):
        assert row[row > row[token_id]].sum() < p


def test_almost_no_choice_is_greedy(flan: Case) -> None:
    greedy = [r.token_ids for r in flan.run(PROMPTS)]
    for sent in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"temperature": 0}):
        drawn = flan.run(PROMPTS, do_sample=True, seed=1, **sent)
        assert [r.token_ids for r in drawn] == greedy, sent


# Other sequence-to-sequence models


SENTENCES = [prompt for example in held_out_examples(200) for prompt in (example.prompt,)]


def _byte_level_tokenizer() -> Any:
    """As BART's: tokenizer.json alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel()
    library.decoder = decoders.ByteLevel()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False
        ),
    )
    library.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=library,
        **dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), names)),
    )


def _write_bart(folder: Path) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer = _byte_level_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 48)
    config = BartConfig(vocab_size=len(tokenizer), **sizes, **_TWO_LAYERS, init_std=0.3)
    BartForConditionalGeneration(config).save_pretrained(folder)


def _write_marian(folder: Path) -> None:
    """Two sentencepiece models and a vocab.json, which only transformers can read."""
    import sentencepiece
    from transformers import MarianConfig, MarianMTModel, MarianTokenizer

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(folder / "source"),
        vocab_size=200,
        minloglevel=2,
    )
    (folder / "source.vocab").unlink()
    (folder / "source.model").rename(folder / "source.spm")
    shutil.copy(folder / "source.spm", folder / "target.spm")
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "source.spm"))
    pieces = [library.id_to_piece(i) for i in range(3, library.get_piece_size())]
    names = ["</s>", "<unk>", *pieces, "<pad>"]
    vocabulary = {piece: i for i, piece in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    MarianTokenizer.from_pretrained(folder).save_pretrained(folder)
    pad = vocabulary["<pad>"]
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 48)
    special = {"pad_token_id": pad, "eos_token_id": 0, "decoder_start_token_id": pad}
    config = MarianConfig(
        vocab_size=len(names), **sizes, **special, **_TWO_LAYERS, forced_eos_token_id=0
    )
    model = MarianMTModel(config)
    with torch.no_grad():
        model.final_logits_bias[0, pad] = 1000.0
    model.generation_config.bad_words_ids = [[pad]]
    model.generation_config.num_beams = 4
    model.save_pretrained(folder)


_TWO_LAYERS: dict[str, Any] = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}


@pytest.fixture(scope="module", params=[_write_bart, _write_marian])
def other_case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(0)
    request.param(folder)
    yield from open_case(folder)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_other_models_answer_as_in_transformers(other_case: Case, num_beams: int) -> None:
    other_case.assert_equal({"num_beams": num_beams}, {"num_beams": num_beams})


def test_other_models_score_given_texts(other_case: Case) -> None:
    """Each as the model's own target side writes it."""
    targets = ("the garden", "Count", "a b c d")
    oracle = other_case.oracle
    for prompt, scores in zip(
        PROMPTS, other_case.model.score([ScoreRequest(prompt, targets) for prompt in PROMPTS])
    ):
        for target, score in zip(targets, scores):
            assert score.text.strip() == target
            assert list(score.token_ids) == oracle.tokenizer(text_target=target).input_ids
            expected = oracle.log_probs(prompt, score.token_ids)
            assert score.log_probs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_other_models_write_texts_of_a_form(other_case: Case, num_beams: int) -> None:
    """Also where the checkpoint forces the last token."""
    for result in other_case.run(PROMPTS, num_beams=num_beams, regex="[a-f]{2} ?[a-f]{1,3}"):
        assert re.fullmatch("[a-f]{2} ?[a-f]{1,3}", result.text)
    for result in other_case.run(PROMPTS, num_beams=num_beams, regex="[a-f ]{60,}"):
        assert re.fullmatch("[a-f ]{5,59}", result.text)
        assert len(result.token_ids) == LENGTH
    for result in other_case.run(PROMPTS, num_beams=num_beams, choices=["the", "garden"]):
        assert result.text.strip() in ("the", "garden")


def test_other_models_tell_the_likeliest_tokens(other_case: Case) -> None:
    for prompt, result in zip(PROMPTS, other_case.run(PROMPTS, top_n_tokens=3)):
        logits = other_case.oracle.logits(prompt, result.token_ids)
        for row, top in zip(torch.log_softmax(logits, -1), result.top_tokens):
            expected = row.topk(3).values.tolist()
            assert [token.log_prob for token in top] == pytest.approx(expected, abs=1e-4)


# Checkpoints


Change = Callable[[Path], None]


def _draw(seed: int) -> dict[str, Any]:
    return {"seed": seed, "max_new_tokens": 1}


@pytest.fixture
def checkpoint(tmp_path: Path, demo: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", "flan-t5", demo)


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _as_pickle(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({k: torch.from_numpy(v) for k, v in weights.items()}, folder / "pytorch_model.bin")


def _in_shards(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    places = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in half}, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(half, file))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _with_a_search_of_its_own(folder: Path) -> None:
    """As summarization models come: their habits are not the client's request."""
    settings = {
        "num_beams": 3,
        "min_length": 14,
        "max_length": 5,
        "no_repeat_ngram_size": 1,
        "repetition_penalty": 3.0,
        "do_sample": True,
        "temperature": 9.0,
        "encoder_no_repeat_ngram_size": 1,
        "exponential_decay_length_penalty": [1, 2.0],
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "eos_token_id": [1, 2],
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))


def _with_old_search_settings(folder: Path) -> None:
    _edit_config(folder, num_beams=3, min_length=14, length_penalty=2.0, early_stopping=True)


@pytest.mark.parametrize(
    "change", [_as_pickle, _in_shards, _with_a_search_of_its_own, _with_old_search_settings]
)
def test_other_forms_of_a_checkpoint_answer_the_same(
    flan: Case, checkpoint: Path, change: Change
) -> None:
    change(checkpoint)
    model = init_inference(str(checkpoint), backend="transformers")
    assert Case(model, flan.oracle).run(PROMPTS) == flan.run(PROMPTS)
    model.close()


def test_bf16_on_a_cpu(checkpoint: Path) -> None:
    model = init_inference(str(checkpoint), dtype="bf16", backend="transformers")
    oracle = Oracle(checkpoint, torch.bfloat16)
    for prompt in PROMPTS:
        (result,) = Case(model, oracle).run([prompt])
        assert result.log_probs == pytest.approx(
            oracle.log_probs(prompt, result.token_ids), abs=0.2
        )
    model.close()


# What cannot be loaded


def _without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def _with_config(**changes: Any) -> Change:
    return lambda folder: _edit_config(folder, **changes)


def _cut_short(name: str) -> Change:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


def _without_decoder(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("decoder")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _without_the_second_shard(folder: Path) -> None:
    _in_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _with_a_broken_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")


def _with_gpt2_config(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(change, words, id=f"{number}-{words.split('.')[0]}")
        for number, (change, words) in enumerate(
            [
                (_without("config.json"), "has no config.json; change option.model_id"),
                (_cut_short("config.json"), "config.json is not JSON"),
                (_with_gpt2_config, "is of model type gpt2, which is no sequence-to-sequence"),
                (_with_config(model_type="t6"), "is of model type t6, which is no"),
                (_with_config(model_type=None), "config.json names no model_type"),
                (_without("model.safetensors"), "neither model.safetensors nor pytorch_model"),
                (_cut_short("model.safetensors"), "model.safetensors is truncated or padded"),
                (_without_the_second_shard, "names model-00002-of-00002.safetensors for"),
                (_with_a_broken_pickle, "pytorch_model.bin is damaged, torch cannot"),
                (_without_decoder, "model.safetensors: no tensor decoder.final_layer_norm"),
                (_with_config(d_model=40), "shared.weight has shape [640, 32], config.json"),
                (_with_config(num_decoder_layers=3), "no tensor decoder.block.2.layer.0"),
                (_cut_short("tokenizer.json"), "is not a tokenizer.json"),
            ]
        )
    ],
)
def test_a_damaged_checkpoint_is_told_in_one_line(
    checkpoint: Path, change: Change, words: str
) -> None:
    change(checkpoint)
    error = _load_error(str(checkpoint))
    assert words in error
    assert str(checkpoint) in error


def _with_bart_weights(change: Callable[[dict[str, np.ndarray]], Any]) -> Change:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


_FC1 = "model.decoder.layers.1.fc1.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_with_bart_weights(lambda w: w.pop(_FC1)), f"no tensor {_FC1}; 1 weights"),
        (
            _with_bart_weights(lambda w: w.update({_FC1: w[_FC1][:, :-1].copy()})),
            f"tensor {_FC1} has shape [48, 47], config.json makes it [48, 48]",
        ),
        (
            _with_bart_weights(lambda w: w.update({_FC1: np.full_like(w[_FC1], np.nan)})),
            f"tensor {_FC1} holds NaN or infinity",
        ),
        (_cut_short("model.safetensors"), "is truncated or padded"),
    ],
)
def test_damaged_weights_of_other_models_are_named(
    tmp_path: Path, change: Change, words: str
) -> None:
    _write_bart(tmp_path)
    change(tmp_path)
    error = _load_error(str(tmp_path))
    assert f"{tmp_path / 'model.safetensors'}" in error
    assert words in error


def test_a_tensor_that_another_model_does_not_know_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write_bart(tmp_path)
    _with_bart_weights(lambda w: w.update(extra=np.ones(3, np.float32)))(tmp_path)
    init_inference(str(tmp_path), backend="transformers").close()
    assert "model.safetensors: tensor extra has no place in the model" in caplog.text


def test_weights_beyond_the_range_of_the_dtype(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["shared.weight"][3, 4] = 3.4e38  # bf16's largest is 3.39e38
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    error = _load_error(str(checkpoint), dtype="bf16")
    assert "tensor shared.weight is beyond the range of torch.bfloat16" in error


def test_an_adapter_beside_the_weights_is_not_taken_for_a_name_of_another_base(
    checkpoint: Path,
) -> None:
    """As transformers does where peft is installed."""
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "t5-base"}')
    assert "move the adapter to a folder of its own" in _load_error(str(checkpoint))


def test_a_checkpoint_without_a_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "spiece.model").unlink()
    assert "has no tokenizer" in _load_error(str(checkpoint))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_numbers_that_are_none_are_an_error_of_the_model(checkpoint: Path, num_beams: int) -> None:
    """As when fp16 overflows. The argmax of such logits would be an answer."""
    weights = load_file(checkpoint / "model.safetensors")
    weights["decoder.final_layer_norm.weight"][:] = 3e38
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    model = init_inference(str(checkpoint), backend="transformers")
    with pytest.raises(RequestError, match=r"numbers that are none .* option\.dtype") as caught:
        model.pipeline_generate(["x"], num_beams=num_beams)
    assert caught.value.code == 424
    model.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "fp16"), ("tensor_parallel_degree", 2)], ids=str
)
def test_what_needs_a_gpu(checkpoint: Path, option: str, value: Any) -> None:
    error = _load_error(str(checkpoint), **{option: value})
    assert f"option.{option}={value} needs" in error


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dtype", "int8"),
        ("dtype", "int4"),
        ("pipeline_parallel_degree", 2),
        ("cpu_kernel", "per_batch"),
    ],
)
def test_options_that_it_does_not_have(checkpoint: Path, option: str, value: Any) -> None:
    error = _load_error(str(checkpoint), **{option: value})
    assert f"option.{option}={value} is not supported by backend transformers" in error


def test_an_unknown_backend(checkpoint: Path) -> None:
    with pytest.raises(LoadError, match=r"backend must be one of auto, .* got 'vllm'"):
        init_inference(str(checkpoint), backend="vllm")


def _load_error(model: str, **options: Any) -> str:
    with pytest.raises(LoadError) as caught:
        init_inference(model, backend="transformers", **options)
    text = str(caught.value)
    assert text.isprintable()
    assert text.isascii()
    assert len(text) < 700
    return text
