"""The CPU engine's own: graphs for each form of weights, and the same bits in any company."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from oracle import Oracle
from random_checkpoints import EDGE_VARIANTS, VARIANTS, VOCAB_SIZE, write_checkpoint
from safetensors.numpy import load_file, save_file
from step_engines import encoded, random_ids, start, stepped

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.checkpoints.read import CheckpointWeights
from handler.engines.onnx_t5 import build
from handler.engines.onnx_t5.build import GraphBuilder
from handler.engines.onnx_t5.choose import Forms
from handler.engines.onnx_t5.engine import OnnxT5StepEngine
from handler.engines.onnx_t5.graph import GraphWriter
from handler.engines.onnx_t5.linear import FORMS
from handler.engines.onnx_t5.sessions import open_session, use_threads
from handler.machine import usable_cpus
from handler.tokenizer import load_tokenizer

Array = npt.NDArray[np.float32]


def open_engine(
    checkpoint: Path, folder: Path, form: str = "fp32", max_rows: int = 16
) -> OnnxT5StepEngine:
    """The engine with graphs in ``folder``, whatever form is the fastest here."""
    use_threads(usable_cpus())
    architecture = T5Architecture.from_config(model_config(checkpoint))
    tokenizer = load_tokenizer(checkpoint, architecture.vocab_size)
    forms = Forms.single(form, form, max_rows)
    weights = CheckpointWeights(checkpoint)
    folder.mkdir(exist_ok=True)
    GraphBuilder(architecture, weights, forms).build(folder)
    return OnnxT5StepEngine(
        folder,
        architecture,
        forms,
        tokenizer,
        max_rows=max_rows,
        max_input_tokens=800,
        max_output_tokens=200,
    )


@pytest.mark.parametrize("variant", [*VARIANTS, *EDGE_VARIANTS])
def test_prompts_are_encoded_in_parts_of_any_size(
    oracle_of: Callable[[str], Oracle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
) -> None:
    """Small models are one part; here each layer is one."""
    folder = oracle_of(variant).folder
    ids = random_ids(20).tolist()
    whole = open_engine(folder, tmp_path / "whole")
    monkeypatch.setattr(build, "_GROUP_WEIGHTS", 1)
    layered = open_engine(folder, tmp_path / "layered")
    parts = list(layered.encode([ids, ids]))
    config = model_config(folder)
    layers = config["num_layers"] + config["num_decoder_layers"]
    assert [part is None for part in parts] == [True] * (len(parts) - 1) + [False]
    assert 2 * (layers - 1) <= len(parts) - 1 <= 2 * layers
    for handle in parts[-1] or ():
        for ours, theirs in zip(handle.keys_values, encoded(whole, [ids])[0].keys_values):
            assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    whole.close()
    layered.close()


# The same bits alone and among others

LOUD = 300


def _add_loud_token(folder: Path) -> Path:
    """A token whose activations are 200 times the others' in every layer.

    It alone has something in the first column of the residual stream, which no layer writes to and
    every norm makes 200 times larger.
    """
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("layer_norm.weight"):
            tensor[0] = 200.0
        elif name.endswith((".o.weight", ".wo.weight")):
            tensor[0] = 0.0
    shared = weights["shared.weight"]
    shared[:, 0] = 0.0
    shared[LOUD] = 0.0
    shared[LOUD, 0] = 1e9  # whatever the layers add, the norms keep this alone
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=FORMS)
def loud_engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, demo: Path
) -> Iterator[OnnxT5StepEngine]:
    folder = tmp_path_factory.mktemp("loud")
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 288}
    _add_loud_token(write_checkpoint(folder, "flan-t5", demo, **sizes))
    opened = open_engine(folder, folder / "graphs", request.param)
    yield opened
    opened.close()


def test_a_row_has_the_same_bits_alone_and_among_others(loud_engine: OnnxT5StepEngine) -> None:
    """Prompts of 1 to 46 tokens, rows that began at different steps, one of them loud."""
    engine, steps = loud_engine, 24
    prompts = [random_ids(1 + 3 * row, seed=row).tolist() for row in range(16)]
    prompts[5] = [LOUD] * 7
    tokens = random_ids(16, steps)
    tokens[5] = LOUD
    handles = encoded(engine, prompts)
    alone = np.empty((16, steps, VOCAB_SIZE), np.float32)
    for row in range(16):
        start(engine, handles[row])
        alone[row] = stepped(engine, tokens[[row]])[0]
    assert np.isfinite(alone).all()
    for n in (2, 3, 4, 6, 7, 8, 12, 16):
        start(engine, *handles[:n])
        for step in range(steps):
            positions = np.array([max(0, step - row) for row in range(n)])
            logits = engine.decode(n, tokens[np.arange(n), positions][:, None], positions)
            assert (logits[:, 0] == alone[np.arange(n), positions]).all(), (n, step)


def test_the_loud_row_is_loud(loud_engine: OnnxT5StepEngine) -> None:
    quiet, loud = encoded(loud_engine, [[5], [LOUD]])
    largest = [np.abs(handle.keys_values[0]).max() for handle in (quiet, loud)]
    assert largest[1] > 200 * largest[0]


def linear(form: str, weight: Array, folder: Path) -> Callable[[Array], Array]:
    """x [n, in] -> y [n, out]"""
    use_threads(usable_cpus())
    with GraphWriter(folder / f"{form}.onnx") as graph:
        x = graph.input("x", np.float32, ["n", weight.shape[1]])
        y = graph.output("y", np.float32, ["n", weight.shape[0]])
        graph.node("Identity", [FORMS[form](graph, x, weight, "weight")], y)
    session = open_session(folder / f"{form}.onnx")
    return lambda x: session.run(["y"], {"x": x})[0]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("shape", [(768, 512), (640, 1000), (100, 40)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_product_has_the_same_bits_for_any_number_of_rows(
    form: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    product = linear(form, normal(*shape), tmp_path)
    x = normal(40, shape[1], seed=1)
    x[3] *= 200
    alone = np.concatenate([product(x[[row]]) for row in range(len(x))])
    for n in (*range(2, 18), 33, 40):
        assert (product(x[:n]) == alone[:n]).all(), n


def relative_error(form: str, weight: Array, x: Array, folder: Path) -> float:
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    error = linear(form, weight, folder)(x) - exact
    return float(np.linalg.norm(error) / np.linalg.norm(exact))


@pytest.mark.parametrize(
    ("form", "plain", "with_outliers"),
    [
        ("fp32", 1e-6, 1e-6),
        ("int8_blocks", 0.011, 0.025),
        ("int8_rows", 0.015, 0.08),
        ("int8_rows_63", 0.023, 0.08),
    ],
)
def test_how_far_8_bits_are_from_fp32(
    form: str, plain: float, with_outliers: float, tmp_path: Path
) -> None:
    """Outliers: three columns of activations 50 times the others, as T5's feed-forwards have."""
    weight, x = normal(768, 1024), normal(32, 1024, seed=1)
    assert relative_error(form, weight, x, tmp_path) < plain
    x[:, [7, 300, 900]] *= 50
    assert relative_error(form, weight, x, tmp_path) < with_outliers


@pytest.mark.parametrize("form", FORMS)
def test_products_of_nothing_and_of_odd_sizes(form: str, tmp_path: Path) -> None:
    weight = normal(33, 52)
    weight[4] = 0.0
    product = linear(form, weight, tmp_path)
    assert (product(np.zeros((3, 52), np.float32)) == 0).all()
    x = normal(3, 52, seed=2)
    assert np.abs(product(x)[:, 4]).max() < 1e-20
    assert relative_error(form, weight, x, tmp_path) < 0.03


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_as_exact_beside_a_loud_one(form: str, tmp_path: Path) -> None:
    weight, x = normal(256, 512), normal(8, 512, seed=1)
    product = linear(form, weight, tmp_path)
    quiet = product(x)[1:]
    x[0] *= 200
    assert (product(x)[1:] == quiet).all()
