"""On a CPU with AVX2 and no VNNI, emulated: int8 kernels that saturate are found and avoided."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from tasks import held_out_examples

from handler.checkpoints.partition import partition
from handler.config import configuration_of

EMULATOR = shutil.which("qemu-x86_64")
PROMPTS = [example.prompt for example in held_out_examples(11)]

# Runs in the emulated process. Prints one line of JSON.
PROGRAM = """
import json, shutil, sys
from pathlib import Path
import numpy as np
from handler.engines import init_inference
from handler.engines.onnx_t5 import choose
from handler.engines.onnx_t5.sessions import use_threads

demo, cache, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
use_threads(1)
found = {"right": {form: choose._is_right(form, Path(cache)) for form in choose._INT8_FORMS}}
for dtype in ("fp32", "int8"):
    model = init_inference(demo, dtype=dtype, cache_dir=cache)
    found[dtype] = model.pipeline_generate(prompts, max_new_tokens=40)
    found[f"{dtype} alone"] = [
        model.pipeline_generate([prompt], max_new_tokens=40)[0] for prompt in prompts
    ]
    model.close()
partitioned = Path(sys.argv[4])
for made_with_vnni in (partitioned / ".onnx_t5").glob("*/"):
    shutil.rmtree(made_with_vnni)
model = init_inference(str(partitioned))
found["partitioned"] = model.pipeline_generate(prompts, max_new_tokens=40)
model.close()
(built,) = (partitioned / ".onnx_t5").glob("*/")
found["partitioned decoder"] = [file.name for file in built.glob("decoder*.onnx")]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if EMULATOR is None:
        if os.environ.get("CI"):
            pytest.fail("no qemu-x86_64 here: apt-get install qemu-user")
        pytest.skip("no qemu-x86_64 here")
    folder = tmp_path_factory.mktemp("avx2")
    (folder / "graphs").mkdir()
    partition(configuration_of(str(demo), dtype="int8"), "native", folder / "partitioned")
    arguments = [demo, folder / "graphs", json.dumps(PROMPTS), folder / "partitioned"]
    ended = subprocess.run(
        [EMULATOR, "-cpu", "Haswell", Path(sys.executable).resolve(), "-c", PROGRAM, *arguments],
        cwd=ROOT,
        # the emulator starts the interpreter itself, which then does not see its environment
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def test_the_form_that_saturates_is_told_from_those_that_do_not(found: dict[str, Any]) -> None:
    assert found["right"] == {"int8_blocks": True, "int8_rows": False, "int8_rows_63": True}


def test_fp32_gives_the_same_texts_as_here(found: dict[str, Any], demo: Path) -> None:
    from handler.engines import init_inference

    here = init_inference(str(demo), dtype="fp32")
    assert found["fp32"] == here.pipeline_generate(PROMPTS, max_new_tokens=40)
    here.close()


def test_int8_answers_as_fp32_does(found: dict[str, Any]) -> None:
    equal = sum(a == b for a, b in zip(found["int8"], found["fp32"]))
    assert equal >= len(PROMPTS) - 1  # rounding to 8 bits may turn one text


def test_weights_that_a_cpu_with_vnni_partitioned(found: dict[str, Any]) -> None:
    """The same weights in the form that is right here, in graphs of their own."""
    assert found["partitioned decoder"] == ["decoder_int8_blocks.onnx"]
    equal = sum(a == b for a, b in zip(found["partitioned"], found["fp32"]))
    assert equal >= len(PROMPTS) - 1


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_text_does_not_depend_on_the_batch(found: dict[str, Any], dtype: str) -> None:
    assert found[dtype] == found[f"{dtype} alone"]
