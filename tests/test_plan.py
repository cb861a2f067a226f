"""``plan``: which types hold a model, and what a person reads of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from handler.cli import main
from handler.config import Configuration, configuration_of
from handler.engines import choose_backend
from handler.errors import LoadError
from handler.packaging.instances import find_instance
from handler.packaging.plan import Plan, Wanted, backend_on, plan, plan_for, recommended

# T5 1.1 XXL's published shape: 11.1 billion numbers
XXL = {
    "model_type": "t5",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(XXL))
    return file


def planned(config: Path, instance: str, **options: object) -> Plan:
    c = configuration_of(str(config), **options)
    return plan_for(Wanted.of(c), find_instance(instance))


def test_the_least_gpus_that_hold_it_are_taken(config: Path) -> None:
    p = planned(config, "ml.g5.12xlarge", backend="torch")
    assert (p.fits, p.options["tensor_parallel_degree"], p.options["dtype"]) == (True, "4", "bf16")
    assert p.footprint.weights == pytest.approx(2 * 11.135e9 / 4, rel=0.01)
    assert planned(config, "ml.p5.48xlarge", backend="torch").footprint.degree == 1


def test_why_one_does_not_hold_it(config: Path) -> None:
    p = planned(config, "ml.g5.xlarge", backend="torch", max_rows=8)
    assert "27.5 GiB needed (20.7 GiB of them weights), 24 GB has 21.9 GiB; not" in p.reason


def test_how_many_rows_would_fit_is_told_and_true(config: Path) -> None:
    p = planned(config, "ml.g6e.xlarge", backend="torch", max_rows=500)
    assert f"{p.most_rows} rows instead of 500 would fit" in p.reason
    assert planned(config, "ml.g6e.xlarge", backend="torch", max_rows=p.most_rows).fits
    assert not planned(config, "ml.g6e.xlarge", backend="torch", max_rows=p.most_rows + 1).fits


def test_a_step_takes_what_must_be_read_over_the_bandwidth(config: Path) -> None:
    options = {"backend": "torch", "max_input_tokens": 1, "max_output_tokens": 1}
    p = planned(config, "ml.p5.48xlarge", **options)
    # 24 layers of 6 square and 3 wide matrices, and the head; 2 bytes each, 3.35 TB/s
    numbers = 24 * (6 * 4096 * 4096 + 3 * 4096 * 10240) + 32128 * 4096
    assert p.step_ms(1) == pytest.approx(1000 * 2 * numbers / 3.35e12, rel=0.01)
    assert planned(config, "ml.r7i.48xlarge").step_ms(1) is None


def test_transformers_reads_layers_one_device_after_the_other(config: Path) -> None:
    options = {"max_input_tokens": 8, "max_output_tokens": 8, "max_rows": 1}
    ranks, layers = (
        planned(config, "ml.g5.12xlarge", tensor_parallel_degree=4, backend=b, **options)
        for b in ("torch", "transformers")
    )
    assert layers.step_ms(1) == pytest.approx(4 * ranks.step_ms(1), rel=0.01)


@pytest.mark.parametrize(
    ("instance", "options", "reason"),
    [
        ("ml.g5.xlarge", {"tensor_parallel_degree": 4}, "needs 4 GPUs, it has 1"),
        ("ml.m5.large", {"tensor_parallel_degree": 4}, "needs 4 GPUs, it has 0"),
        (
            "ml.p4d.24xlarge",
            {"tensor_parallel_degree": 3, "backend": "torch"},
            "tensor_parallel_degree=3 does not divide num_heads=64 and d_ff=10240; possible are 1,",
        ),
        ("ml.g5.xlarge", {"backend": "onnxruntime"}, "backend onnxruntime serves no bf16 on a GPU"),
        ("ml.g5.xlarge", {"dtype": "int4", "backend": "torch"}, "torch serves no int4 on a GPU"),
        (
            "ml.c7i.4xlarge",
            {"dtype": "fp16", "backend": "transformers"},
            "transformers serves no fp16 on CPUs, only fp32",
        ),
        (
            "ml.g6e.xlarge",
            {"dtype": "fp32", "backend": "transformers"},
            "transformers puts the weights, 41.5 GiB, into its memory of 32.0 GiB first",
        ),
    ],
    ids=str,
)
def test_other_reasons(config: Path, instance: str, options: dict, reason: str) -> None:
    assert reason in planned(config, instance, **options).reason


def test_a_small_disk_is_told(demo: Path) -> None:
    wanted = Wanted.of(configuration_of(str(demo)))
    huge = Wanted(wanted.architecture, wanted.configuration, stored=10**11)
    reason = plan_for(huge, find_instance("ml.g4dn.xlarge")).reason
    assert reason == "200 GB of disk are needed, it has at most 125 GB"


def test_a_partition_tells_its_dtype(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    main(["partition", str(demo), "-o", str(folder), "--dtype", "int8"])
    assert planned(folder, "ml.c7i.xlarge").options["dtype"] == "int8"


def test_old_gpus_compute_in_fp16_and_are_recommended_last(demo: Path) -> None:
    plans = plan(Wanted.of(configuration_of(str(demo))))
    assert planned(demo, "ml.g4dn.xlarge").footprint.dtype == "fp16"
    best = recommended(p for p in plans if p.instance.gpus)
    assert best is not None
    assert best.instance.name == "ml.g5.xlarge"
    assert plans == sorted(plans, key=lambda p: not p.fits)


@pytest.mark.parametrize("dtype", ["auto", "fp32", "int8", "bf16"])
def test_on_cpus_the_backend_is_the_one_that_would_be_chosen(demo: Path, dtype: str) -> None:
    c = configuration_of(str(demo), dtype=dtype, device_id=-1)
    assert backend_on(find_instance("ml.c7i.xlarge"), c) == choose_backend(c, demo)[0]


def test_other_models_and_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    for place, told in (
        (str(tmp_path), "model type bart is not of the T5 family"),
        ("s3://bucket/x", "copy its config.json"),
        (str(tmp_path / "none"), "no such folder or file"),
    ):
        with pytest.raises(LoadError, match=told):
            Wanted.of(configuration_of(place))
    with pytest.raises(LoadError, match="no model given"):
        Wanted.of(Configuration())


def test_the_table_is_for_people(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(config), "--rows", "16", "--input-tokens", "512", "--output-tokens", "64"])
    printed = capsys.readouterr().out
    head, *lines = printed.splitlines()
    assert head.split()[:4] == ["instance", "GPUs", "degree", "backend"]
    assert any(line.startswith("recommended: ml.g") for line in lines)
    assert "--option max_rows=16 --option max_input_tokens=512" in printed
    assert "ml.p3.2xlarge: " in printed.partition("do not hold it:")[2]


def test_json_tells_every_type_asked_for(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(config), "--json", "--instance-type", "g5.xlarge", "--dtype", "bf16"])
    told = json.loads(capsys.readouterr().out)
    (instance,) = told["instances"]
    assert (told["recommended"], instance["name"], instance["fits"]) == (
        None,
        "ml.g5.xlarge",
        False,
    )
    parts = ("weights_bytes", "caches_bytes", "workspace_bytes")
    assert sum(instance[part] for part in parts) == instance["needed_bytes"]


def test_a_mistake_is_one_line(config: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: no instance type 'ml\.g9\.xlarge'"):
        main(["plan", str(config), "--instance-type", "ml.g9.xlarge"])
    with pytest.raises(SystemExit, match="max_rows must be an integer of at least 1, got 'x'"):
        main(["plan", str(config), "--rows", "x"])
