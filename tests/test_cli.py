"""The command line: answers on stdout, errors in one line on stderr."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from handler import __version__
from handler.cli import command_parser, main
from handler.cli.common import choose_model
from handler.engines import Model
from handler.errors import LoadError

PROMPTS = ["Write 7 in words.", "Sort these words: warm, cat, apple"]
WAIT = 120


def run(
    *arguments: str | bytes, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "handler", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=WAIT,
    )


def answers(*arguments: str, environment: dict[str, str] | None = None) -> list[str]:
    ended = run("generate", *arguments, environment=environment)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def test_version() -> None:
    ended = run("--version")
    assert (ended.returncode, ended.stdout) == (0, f"python -m handler {__version__}\n")


def test_help_tells_the_commands() -> None:
    ended = run("--help")
    assert ended.returncode == 0
    for command in ("serve", "generate", "partition", "deploy", "invoke", "logs", "delete"):
        assert command in ended.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["generate"], ["serve", "--port", "x"]], ids=str
)
def test_a_wrong_command_line_is_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m handler")


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["serve", "--prot", "8090"], "unrecognized arguments: --prot; did you mean --port?"),
        (["serve", "m", "--dtype", "int8"], "did you mean --option dtype=VALUE?"),
        (["check", "m", "--img=lmi"], "unrecognized arguments: --img=lmi"),
        (["generate", "x", "--paramters", "{}"], "did you mean --parameters?"),
        (["batch", "in", "--model", "m", "out", "--strickt"], "did you mean --strict?"),
    ],
    ids=str,
)
def test_a_misspelt_argument_is_told_with_the_commands_usage(
    arguments: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command_parser().parse_args(arguments)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith(f"usage: python -m handler {arguments[0]} ")
    assert advice in told


def test_a_misspelt_property_ends_the_command() -> None:
    with pytest.raises(LoadError, match=r"--option dtyp is no property .* did you mean dtype\?"):
        choose_model(None, ["dtyp=int8"])


def test_a_property_may_be_written_as_in_serving_properties() -> None:
    assert choose_model(None, ["option.dtype=int8"]).configuration.dtype == "int8"


def test_generate_prints_a_line_for_each_prompt(model: Model) -> None:
    assert answers(*PROMPTS) == model.pipeline_generate(PROMPTS)


def test_generate_with_parameters_and_options(model: Model) -> None:
    told = ["--parameters", '{"max_new_tokens": 3}', "--option", "prompt_template=Write {input}."]
    expected = model.pipeline_generate(["Write 7 in words."], max_new_tokens=3)
    assert answers("7 in words", *told) == expected


@pytest.fixture
def folder(tmp_path: Path, demo: Path) -> Path:
    """A checkpoint with serving.properties, as DJLServing gets it."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, tmp_path)
    (tmp_path / "serving.properties").write_text("option.prompt_template=Write {input} in words.\n")
    return tmp_path


def test_generate_with_a_model_folder_and_its_properties(model: Model, folder: Path) -> None:
    assert answers("7", "--model", str(folder)) == model.pipeline_generate(["Write 7 in words."])


def test_the_environment_does_not_replace_the_folder_that_was_named(
    model: Model, folder: Path
) -> None:
    elsewhere = {"HF_MODEL_ID": "/no/such/folder", "OPTION_MODEL_ID": "/no/such/folder"}
    expected = model.pipeline_generate(["Write 7 in words."])
    assert answers("7", "--model", str(folder), environment=elsewhere) == expected


def test_the_environment_names_the_model_where_nothing_else_does(
    model: Model, folder: Path
) -> None:
    (folder / "serving.properties").unlink()
    named = answers(*PROMPTS, environment={"HF_MODEL_ID": str(folder)})
    assert named == model.pipeline_generate(PROMPTS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--parameters", "{"], "--parameters is not JSON: Expecting property name"),
        (["x", "--parameters", "[" * 100_000], "--parameters is not JSON: "),
        (["x", "--parameters", "[1]"], "--parameters must be a JSON object, got [1]"),
        (["x", "--parameters", '{"top_q": 1}'], "unknown parameter 'top_q'; did you mean 'top_p'?"),
        (["x", "--parameters", '{"top_p": NaN}'], "'top_p' must be a number from 0 to 1, got nan"),
        ([" "], "PROMPT must not be empty or blank, got ' '"),
        (["word " * 2000], "allowed are 1024 (option.max_input_tokens)"),
        (["x", "y", "--option", "max_queue=1"], "2 texts cannot be queued, allowed are 1"),
        (["x", "--model", "/no/such/folder"], "option.model_id=/no/such/folder: no such folder"),
        (["x", "--model", "tests"], "tests has no config.json"),
        (["x", "--option", "dtype=fp8"], "--option dtype must be one of auto, fp32"),
        (["x", "--option", "dtype"], "--option dtype must be NAME=VALUE"),
        (["x", "--option", "=1"], "--option =1 must be NAME=VALUE"),
    ],
    ids=[str(number) for number in range(13)],
)
def test_an_error_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", *arguments])
    assert capsys.readouterr() == ("", "")
    told = ended.value.code  # which Python writes to stderr before it ends with status 1
    assert isinstance(told, str)
    assert told.startswith("error: ")
    assert "\n" not in told
    assert words in told


def test_an_argument_that_is_no_text_is_an_error_of_one_line() -> None:
    ended = run("generate", b"caf\xe9")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert "PROMPT holds half a surrogate pair at character 3" in ended.stderr


def test_a_damaged_serving_properties(folder: Path) -> None:
    (folder / "serving.properties").write_text("option.prompt_template=\\u00zz\n")
    ended = run("generate", "x", "--model", str(folder))
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: {folder}/serving.properties cannot be read: ")
    assert ended.stderr.count("\n") == 1


def test_ctrl_c_ends_a_server_without_a_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "handler", "serve", "--port", "0"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "serving demo on" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, written = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert "Traceback" not in written


def test_bench_tells_percentiles_of_each_batch(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--batch", "1", "3", "--tokens-in", "9", "--tokens-out", "4", "--runs", "3"]
    main(["bench", str(demo), *sizes])
    told, head, *rows = capsys.readouterr().out.splitlines()
    assert "9 tokens in, 4 out, 3 runs" in told
    for row, batch in zip(rows, (1, 3)):
        cells = dict(zip(head.replace(" ms", "").split(), map(float, row.split())))
        assert cells["batch"] == batch
        assert 0 < cells["P50"] <= cells["P90"] <= cells["P99"]
        assert cells["tokens/s"] == pytest.approx(batch * 4 * 1e3 / cells["P50"], rel=0.1)


@pytest.mark.parametrize("wrong", [["--batch", "0"], ["--runs", "x"]], ids=["none", "no number"])
def test_bench_wants_whole_numbers(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", *wrong])
