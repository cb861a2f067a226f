"""Merging LoRA adapters: peft's own merge_and_unload is the oracle."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoints import write_checkpoint
from safetensors.numpy import load_file as load_numpy_file
from safetensors.numpy import save_file as save_numpy_file
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from handler.checkpoints.lora import MergedWeights
from handler.checkpoints.lora_config import LoraConfig
from handler.checkpoints.read import CheckpointWeights
from handler.engines import init_inference
from handler.errors import LoadError

PROMPTS = ["Count from 3 to 9.", "What is the plural of mouse?", "x"]
TOKENS = 16
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BACKENDS = pytest.mark.parametrize("backend", ["onnxruntime", "torch", "transformers"])


@dataclass
class Case:
    """An adapter as peft saves it, and the base with it merged as peft merges it."""

    adapter: Path
    merged: Any

    def texts(self, base: Path, backend: str) -> list[str]:
        """What transformers answers with the model that peft merged."""
        folder = self.adapter.parent / "merged"
        self.merged.save_pretrained(folder)
        for name in ("tokenizer.json", "spiece.model"):
            (folder / name).write_bytes((base / name).read_bytes())
        return answers(folder, backend)


def answers(folder: Path, backend: str, **options: Any) -> list[str]:
    model = init_inference(str(folder), backend=backend, **options)
    texts = model.pipeline_generate(PROMPTS, max_new_tokens=TOKENS)
    model.close()
    return texts


def make(base: Path, folder: Path, seed: int = 0, **settings: Any) -> Case:
    """An adapter with random values, none of them zero, and what peft makes of it."""
    torch.manual_seed(seed)
    settings = {"r": 4, "target_modules": ["q", "v"], **settings}
    model = peft.get_peft_model(
        AutoModelForSeq2SeqLM.from_pretrained(base),
        peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **settings),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.normal_(0, 0.2)
        elif "magnitude" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
        elif "modules_to_save" in name:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return Case(folder, model.merge_and_unload())


def merged_weights(base: Path, adapter: Path, *, tied: bool = False) -> dict[str, np.ndarray]:
    weights = MergedWeights(CheckpointWeights(base), adapter, tied=tied)
    return {name: weights.get(name, weights.shape(name)) for name in weights}


def assert_equal(found: dict[str, np.ndarray], merged: Any) -> None:
    for name, array in found.items():
        np.testing.assert_allclose(
            array, merged.get_parameter(name).detach().numpy(), rtol=1e-6, atol=1e-6, err_msg=name
        )


SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {},
    "everything": {"target_modules": "all-linear"},
    "regex": {"target_modules": r"decoder\.block\.[01]\..*\.(q|wo)"},
    "alpha": {"lora_alpha": 3},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "target_modules": ["q", "k", "wo"],
        "rank_pattern": {"k": 2, r"encoder\.block\.0\..*\.q": 7},
        "alpha_pattern": {"wo": 1, "encoder.block.1.layer.0.SelfAttention.q": 13},
    },
    "norms to save": {"modules_to_save": ["final_layer_norm"]},
    "dora": {"use_dora": True, "target_modules": ["q", "wo", "wi_0"]},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
    "bias": {"bias": "all"},
    "bias of lora": {"bias": "lora_only"},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "block"},
    "excluded": {"target_modules": ["q", "v"], "exclude_modules": r"encoder.*"},
}


# The demo's head holds the same numbers as its embedding: peft would change both.
OF_THE_TABLES: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["q", "shared"]},
    "head": {"target_modules": ["lm_head"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="session")
def untied(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("untied"), "flan-t5", demo)


@pytest.fixture(scope="session")
def tied(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tied"), "t5-v1.0", demo)


@pytest.mark.parametrize("name", OF_THE_TABLES)
def test_embedding_and_head(untied: Path, tmp_path: Path, name: str) -> None:
    case = make(untied, tmp_path / "adapter", **OF_THE_TABLES[name])
    assert_equal(merged_weights(untied, case.adapter), case.merged)


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_are_those_that_peft_merges(demo: Path, tmp_path: Path, name: str) -> None:
    case = make(demo, tmp_path / "adapter", **SETTINGS[name])
    found = merged_weights(demo, case.adapter)
    assert_equal(found, case.merged)
    base = CheckpointWeights(demo)
    changed = [n for n, array in found.items() if (array != base.get(n, array.shape)).any()]
    assert changed, "the adapter changes something"


@settings(max_examples=15, deadline=None)
@given(
    r=st.integers(1, 9),
    alpha=st.integers(1, 40),
    rslora=st.booleans(),
    dora=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_rank_and_scaling(
    demo: Path,
    tmp_path_factory: pytest.TempPathFactory,
    r: int,
    alpha: int,
    rslora: bool,
    dora: bool,
    seed: int,
) -> None:
    case = make(
        demo,
        tmp_path_factory.mktemp("any") / "adapter",
        seed,
        r=r,
        lora_alpha=alpha,
        use_rslora=rslora,
        use_dora=dora,
    )
    assert_equal(merged_weights(demo, case.adapter), case.merged)


@BACKENDS
@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("demo", "everything"),
        pytest.param("demo", "dora", marks=pytest.mark.long),
        ("tied", "embedding"),
        pytest.param("untied", "embedding", marks=pytest.mark.long),
        ("untied", "head"),
        ("untied", "modules_to_save"),
    ],
)
def test_texts_are_those_of_the_merged_model(
    request: pytest.FixtureRequest, tmp_path: Path, base: str, name: str, backend: str
) -> None:
    folder = request.getfixturevalue(base)
    case = make(folder, tmp_path / "adapter", **{**SETTINGS, **OF_THE_TABLES}[name])
    cache = {"cache_dir": str(tmp_path / "cache")}
    texts = answers(folder, backend, merge_adapter=str(case.adapter), **cache)
    assert texts == case.texts(folder, "transformers")
    assert texts != answers(folder, backend, **cache), "the base has graphs of its own"


@BACKENDS
def test_a_head_of_its_own_changes_alone(demo: Path, tmp_path: Path, backend: str) -> None:
    """Also where it holds the same numbers as the embedding, which transformers 5 then ties."""
    case = make(demo, tmp_path / "adapter", modules_to_save=["lm_head"])
    changed = tmp_path / "changed"
    shutil.copytree(demo, changed, ignore=shutil.ignore_patterns(".*"))
    save_numpy_file(merged_weights(demo, case.adapter), changed / "model.safetensors")
    options = {"merge_adapter": str(case.adapter), "cache_dir": str(tmp_path / "cache")}
    assert answers(demo, backend, **options) == answers(changed, backend)


@BACKENDS
def test_a_tied_head_cannot_be_changed_alone(tied: Path, tmp_path: Path, backend: str) -> None:
    case = make(tied, tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(LoadError, match=r"belongs to lm_head\.weight, which .* has not"):
        answers(tied, backend, merge_adapter=str(case.adapter))


def test_on_the_command_line(demo: Path, tmp_path: Path) -> None:
    case = make(demo, tmp_path / "adapter", target_modules="all-linear")
    options = [f"merge_adapter={case.adapter}", f"cache_dir={tmp_path / 'cache'}"]
    told = [word for option in options for word in ("--option", option)]
    command = [sys.executable, "-m", "handler", "generate", "--model", demo, *told, PROMPTS[0]]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (expected, *_) = answers(
        demo, "onnxruntime", merge_adapter=str(case.adapter), cache_dir=str(tmp_path / "cache")
    )
    assert ended.stdout.startswith(expected), ended.stderr


@BACKENDS
def test_another_version_of_an_adapter_is_noticed(demo: Path, tmp_path: Path, backend: str) -> None:
    """Also when only its scaling is another: graphs are found by the adapter's files."""
    options = {"merge_adapter": str(tmp_path / "adapter"), "cache_dir": str(tmp_path / "cache")}
    make(demo, tmp_path / "adapter", target_modules="all-linear")
    first = answers(demo, backend, **options)
    change_config(tmp_path / "adapter", lora_alpha=0.5)
    assert answers(demo, backend, **options) != first


def test_bf16_merges_as_peft_does_on_a_bf16_model(demo: Path, tmp_path: Path) -> None:
    case = make(demo, tmp_path / "adapter", target_modules="all-linear")
    options = {"merge_adapter": str(case.adapter), "dtype": "bf16"}
    texts = answers(demo, "transformers", **options)
    assert len(texts) == len(PROMPTS)
    assert texts != answers(demo, "transformers", dtype="bf16")


def test_an_adapter_in_a_bin(demo: Path, tmp_path: Path) -> None:
    case = make(demo, tmp_path / "adapter")
    torch.save(load_file(case.adapter / WEIGHTS), case.adapter / "adapter_model.bin")
    (case.adapter / WEIGHTS).unlink()
    assert_equal(merged_weights(demo, case.adapter), case.merged)


def test_fan_in_fan_out_is_passed_over(demo: Path, tmp_path: Path) -> None:
    """As peft does for nn.Linear, which all of T5's layers are."""
    case = make(demo, tmp_path / "adapter", target_modules="all-linear")
    change_config(case.adapter, fan_in_fan_out=True)
    assert_equal(merged_weights(demo, case.adapter), case.merged)


def stored_twice(tied: Path, folder: Path) -> Path:
    """As torch.save keeps a tied model: its one table under each of its names."""
    shutil.copytree(tied, folder)
    tensors = load_numpy_file(folder / "model.safetensors")
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = tensors["shared.weight"]
    save_numpy_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("target", ["shared", "lm_head"])
def test_a_table_that_is_stored_twice_changes_under_all_its_names(
    tied: Path, tmp_path: Path, target: str
) -> None:
    base = stored_twice(tied, tmp_path / "base")
    case = make(base, tmp_path / "adapter", target_modules=["q", target])
    found = merged_weights(base, case.adapter, tied=True)
    assert_equal(found, case.merged)
    assert (found["lm_head.weight"] == found["shared.weight"]).all()


@BACKENDS
def test_its_texts_are_those_of_the_merged_model(tied: Path, tmp_path: Path, backend: str) -> None:
    base = stored_twice(tied, tmp_path / "base")
    case = make(base, tmp_path / "adapter", target_modules=["q", "shared"])
    cache = {"cache_dir": str(tmp_path / "cache")}
    texts = answers(base, backend, merge_adapter=str(case.adapter), **cache)
    assert texts == case.texts(base, "transformers")


def test_one_copy_of_a_tied_table_cannot_be_replaced_alone(tied: Path, tmp_path: Path) -> None:
    base = stored_twice(tied, tmp_path / "base")
    case = make(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(LoadError, match=r"lm_head\.weight is changed by itself, which this base"):
        merged_weights(base, case.adapter, tied=True)


# What is refused


@pytest.fixture(scope="session")
def sound(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(demo, tmp_path_factory.mktemp("sound") / "adapter").adapter


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    """One that fits, to be spoilt."""
    return Path(shutil.copytree(sound, tmp_path / "adapter"))


def change_config(adapter: Path, **changes: Any) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, **changes}))


def config_with(**changes: Any) -> Callable[[Path], None]:
    return lambda adapter: change_config(adapter, **changes)


def tensors_with(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        change(tensors)
        save_file(tensors, adapter / WEIGHTS)

    return apply


Q = "encoder.block.0.layer.0.SelfAttention.q"
A, B = (f"base_model.model.{Q}.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (config_with(peft_type="IA3"), (CONFIG, "peft_type 'IA3'", "allowed is 'LORA'")),
        (config_with(peft_type="PREFIX_TUNING"), ("'PREFIX_TUNING' cannot be merged",)),
        (config_with(peft_type=None), ("peft_type None cannot be merged",)),
        (config_with(init_lora_weights="pissa"), ("init_lora_weights='pissa'", "changed base")),
        (config_with(lora_bias=True), ("lora_bias=True cannot be merged",)),
        (config_with(alora_invocation_tokens=[1]), ("alora_invocation_tokens=[1] cannot",)),
        (config_with(trainable_token_indices=[3]), ("trainable_token_indices=[3] cannot",)),
        (config_with(something_new={"a": 1}), ("something_new={'a': 1} cannot be merged",)),
        (config_with(r=0), ("r must be an integer of at least 1 and at most 2147483647, got 0",)),
        (config_with(r="8"), ("at least 1 and at most 2147483647, got '8'",)),
        (
            config_with(lora_alpha="big"),
            ("lora_alpha must be a number up to 2147483647, got 'big'",),
        ),
        (config_with(r=10**400), ("r must be an integer of at least 1 and at most 2147483647",)),
        (config_with(lora_alpha=10**400), ("lora_alpha must be a number up to 2147483647, got 1",)),
        (config_with(lora_alpha=float("inf")), ("lora_alpha must be a number up to",)),
        (config_with(modules_to_save=5), ("modules_to_save must be a list of names, got 5",)),
        (config_with(rank_pattern=[1]), ("rank_pattern must be an object, got [1]",)),
        (config_with(rank_pattern={"(": 1}), ("rank_pattern", "'('", "is no regex")),
        (config_with(target_modules="("), ("target_modules '(' is no regex",)),
        (config_with(target_modules=[1]), ("target_modules must be a list of names or a regex",)),
        (config_with(r=5), (WEIGHTS, "lora_A.weight has shape [4, 128]", "[5, 128]", "r of")),
        (config_with(target_modules=["q", "v", "k"]), ("no tensors for", "SelfAttention.k")),
        (config_with(use_dora=True), ("no tensor lora_magnitude for", "incomplete")),
        (
            tensors_with(lambda t: t.update({A: torch.ones(4, 64)})),
            (f"{A} has shape [4, 64]", "[4, 128]", f"for {Q}.weight [128, 128]", "merge_adapter"),
        ),
        (
            tensors_with(lambda t: t.update({B: torch.ones(64, 4)})),
            (f"{B} has shape [64, 4]", "must be [128, 4]"),
        ),
        (tensors_with(lambda t: t.pop(B)), (f"no tensor lora_b for {Q}", "incomplete")),
        (
            tensors_with(lambda t: (t.pop(A), t.pop(B))),
            (f"no tensors for {Q}", "incomplete or of another base"),
        ),
        (
            tensors_with(lambda t: t.update({B.replace("block.0", "block.7"): t[B].clone()})),
            ("block.7", "model.safetensors has not", "option.merge_adapter"),
        ),
        (
            tensors_with(lambda t: t.update({A.replace("lora_A", "hada_w1_a"): t[A].clone()})),
            (WEIGHTS, "hada_w1_a", "has not"),
        ),
        (
            tensors_with(lambda t: t.update({A: torch.full((4, 128), torch.nan)})),
            (WEIGHTS, A, "holds NaN"),
        ),
        (
            tensors_with(
                lambda t: t.update({A: torch.full((4, 128), 3e38), B: torch.full((128, 4), 3e38)})
            ),
            (WEIGHTS, "makes NaN or infinity", Q),
        ),
        (lambda a: (a / CONFIG).write_text("{"), (CONFIG, "is not JSON")),
        (lambda a: (a / CONFIG).unlink(), (CONFIG, "cannot be read: No such file")),
        (lambda a: (a / WEIGHTS).unlink(), ("neither adapter_model.safetensors nor",)),
        (lambda a: (a / WEIGHTS).write_bytes(b"half"), (WEIGHTS, "is not a safetensors file")),
    ],
)
def test_an_adapter_that_cannot_be_merged(
    demo: Path, adapter: Path, change: Callable[[Path], Any], words: tuple[str, ...]
) -> None:
    change(adapter)
    with pytest.raises(LoadError) as caught:
        merged_weights(demo, adapter)
    error = str(caught.value)
    assert error.isprintable()
    for word in words:
        assert word in error


@BACKENDS
def test_every_engine_refuses_it(demo: Path, adapter: Path, tmp_path: Path, backend: str) -> None:
    tensors_with(lambda t: t.pop(B))(adapter)
    options = {"merge_adapter": str(adapter), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(LoadError, match=rf"no tensor lora_b for {Q}; the adapter is incomplete"):
        init_inference(str(demo), backend=backend, **options)


def test_an_adapter_of_another_base(demo: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "flan-t5", demo)
    make(other, tmp_path / "adapter")
    with pytest.raises(LoadError, match=re.escape("q.lora_A.weight has shape [4, 32]")) as caught:
        merged_weights(demo, tmp_path / "adapter")
    assert "must be [4, 128]" in str(caught.value)


def test_one_name_of_a_tied_table_cannot_be_changed_alone(demo: Path, tmp_path: Path) -> None:
    make(demo, tmp_path / "adapter", target_modules=["q", "shared"])
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    renamed = {n.replace("shared", "encoder.embed_tokens"): t for n, t in tensors.items()}
    save_file(renamed, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(LoadError, match=r"encoder\.embed_tokens"):
        merged_weights(demo, tmp_path / "adapter")


def test_scaling_by_name(tmp_path: Path) -> None:
    """As peft: the first pattern that matches the end of a module's name."""
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {r"block\.1\..*\.q": 2, "q": 4},
        "alpha_pattern": {"q": 3},
    }
    (tmp_path / CONFIG).write_text(json.dumps(config))
    read = LoraConfig.read(tmp_path / CONFIG)
    assert read.scaling("encoder.block.0.layer.0.SelfAttention.v") == 16 / 8
    assert read.scaling("encoder.block.0.layer.0.SelfAttention.q") == 3 / 4
    assert read.scaling("encoder.block.1.layer.0.SelfAttention.q") == 3 / 2
