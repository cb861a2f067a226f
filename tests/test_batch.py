"""``python -m handler batch``: complete, in order, once each, whenever it is killed."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from handler.cli import main
from handler.engines import Model
from handler.engines.onnx_t5.engine import OnnxT5StepEngine

WAIT = 120
BAD_EVERY = 97  # lines


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "handler", "batch", *map(str, arguments)]


def done(*arguments: str | Path) -> str:
    """What it said at the end."""
    with contextlib.redirect_stderr(io.StringIO()) as log:
        main(["batch", *map(str, arguments)])
    return log.getvalue().splitlines()[-1]


def refused(*arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["batch", *map(str, arguments)])
    error = ended.value.code
    assert isinstance(error, str)
    assert error.startswith("error: ")
    return error


def write_lines(file: Path, values: list[Any]) -> Path:
    text = "".join(json.dumps(value) + "\n" for value in values).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return file


def read_lines(file: Path) -> list[Any]:
    content = file.read_bytes()
    text = gzip.decompress(content) if file.suffix == ".gz" else content
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", ["Write 7 in words.", "bad", "Write 48 in words."])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


# What lines are


def test_lines_are_requests_or_strings(tmp_path: Path, out: Path, model: Model) -> None:
    lines = [
        "Write 7 in words.",
        {"inputs": ["Write 8 in words.", "Write 9 in words."]},
        {"inputs": "Write 4312 in words.", "parameters": {"max_tokens": 2}},
        {"inputs": "Write 4312 in words.", "parameters": None},
    ]
    given = write_lines(tmp_path / "in.jsonl", lines)
    end = done(given, out, "--parameters", '{"max_new_tokens": 3}')
    assert end == f"{out}: 4 lines answered"
    (two, three) = (
        model.pipeline_generate(["Write 4312 in words."], max_new_tokens=n)[0] for n in (2, 3)
    )
    texts = [["seven"], ["eight", "nine"], [two], [three]]
    assert read_lines(out) == [{"outputs": each} for each in texts]


def test_a_field_of_any_object(tmp_path: Path, out: Path) -> None:
    lines = [{"id": 1.5, "text": "Write 7 in words."}, {"text": ["Write 8 in words."], "id": None}]
    given = write_lines(tmp_path / "in.jsonl", lines)
    done(given, out, "--input-field", "text", "--output-field", "words")
    assert read_lines(out) == [{**lines[0], "words": "seven"}, {**lines[1], "words": ["eight"]}]
    assert out.read_text().startswith('{"id": 1.5, ')


def test_answers_have_the_configured_schema(three: Path, out: Path) -> None:
    done(three, out, "--option", "response_schema=lmi", "--parameters", '{"max_new_tokens": 1}')
    assert read_lines(out)[0] == {"generated_text": "seven"}


def test_bad_lines_go_beside(tmp_path: Path, out: Path) -> None:
    given = tmp_path / "in.jsonl"
    good = b'{"q": "Write 7 in words."}\n'
    bad = [b"{", b"[1]", b'{"a": 1}', b'{"q": 5}', b'{"q": "x", "output": 1}', b'{"q": "\xff"}']
    given.write_bytes(good + b"\n" + b"\n".join(bad) + b"\n\r\n" + good.strip())
    end = done(given, out, "--input-field", "q")
    assert end == f"{out}: 2 lines answered, 6 bad ones in {out}.errors"
    assert read_lines(out) == [{"q": "Write 7 in words.", "output": "seven"}] * 2
    told = read_lines(Path(f"{out}.errors"))
    assert [each["line"] for each in told] == [3, 4, 5, 6, 7, 8]
    assert {each["code"] for each in told} == {400}
    for each, words in zip(
        told,
        ["not JSON", "must be a JSON object", "'q' is missing", "got 5", "--output-field", "UTF-8"],
    ):
        assert words in each["error"]


def test_strict_ends_at_the_first_bad_line(tmp_path: Path, out: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", ["Write 7 in words.", 5, "x"])
    assert "line 2: a line must be a JSON object or a string, got 5" in refused(
        given, out, "--strict"
    )
    assert read_lines(out) == [{"outputs": ["seven"]}]
    assert done(given, out) == f"{out}: 2 lines answered, 1 bad ones in {out}.errors"


def test_lists_that_fill_the_queue_wait_for_room(tmp_path: Path, out: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", [{"inputs": ["Write 7 in words."] * 4}] * 9)
    given.write_text(given.read_text() + json.dumps({"inputs": ["x"] * 6}))
    end = done(given, out, "--option", "max_queue=5", "--option", "max_rows=2")
    assert end == f"{out}: 9 lines answered, 1 bad ones in {out}.errors"
    assert "allowed are 5 (option.max_queue)" in read_lines(Path(f"{out}.errors"))[0]["error"]


def test_an_engine_that_pads_gets_lines_by_length_and_the_order_stays(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    submit = Model.submit

    def seen(model: Model, requests: Any) -> Any:
        lengths.append(len(requests[0].input))
        return submit(model, requests)

    monkeypatch.setattr(Model, "submit", seen)
    texts = ["Count from 3 to 9.", "Write 4312 in words.", "Write 7 in words."] * 3
    given = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    options = ["--option", "backend=transformers", "--option", "max_rows=1"]
    done(given, out, "--input-field=text", *options)
    assert lengths == [*sorted(map(len, texts[:8])), len(texts[8])]
    assert [each["text"] for each in read_lines(out)] == texts
    assert read_lines(out)[8]["output"] == "seven"


def test_gzip_by_suffix(tmp_path: Path, three: Path, out: Path) -> None:
    done(three, out)
    packed = write_lines(tmp_path / "in.jsonl.gz", read_lines(three))
    done(packed, tmp_path / "out.jsonl.gz")
    assert read_lines(tmp_path / "out.jsonl.gz") == read_lines(out)


def test_pipes(three: Path, out: Path) -> None:
    done(three, out)
    given = three.read_bytes() + b"5\n"
    ended = subprocess.run(
        command("-", "-"), cwd=ROOT, input=given, capture_output=True, timeout=WAIT
    )
    assert ended.returncode == 0
    assert ended.stdout == out.read_bytes()
    log = ended.stderr.decode()
    assert "a pipe cannot be gone on with" in log
    assert '{"line": 4, "code": 400, "error": "a line must be' in log


@pytest.mark.parametrize(
    ("redirected", "words"),
    [
        ("- {out} <&-", "standard input is closed"),
        ("{in} - >&-", "standard output and standard error must not be closed"),
        ("{in} - >/dev/full", "standard output cannot be written: No space left on device"),
    ],
)
def test_closed_and_full_pipes_are_one_line(
    three: Path, out: Path, redirected: str, words: str
) -> None:
    shell = f"{shlex.join(command())} {redirected.format_map({'in': three, 'out': out})}"
    ended = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, timeout=WAIT)
    assert ended.returncode == 1
    assert ended.stderr.decode().splitlines()[-1] == f"error: {words}"


# Interruptions


def varied(count: int) -> list[Any]:
    """Prompts that tell which they are, long and short ones, and some bad lines."""
    return [
        {"id": i, "text": f"Write {i} in words." if i % 3 else f"Count from {i % 90} to 99."}
        if i % BAD_EVERY
        else {"id": i}
        for i in range(count)
    ]


def committed(out: Path) -> int:
    """Lines that the journal counts."""
    try:
        lines: int = json.loads(Path(f"{out}.progress").read_text())["checkpoint"]["lines"]
    except FileNotFoundError:
        return 0
    return lines


# So often that what is done to it falls in between on a fast machine, too.
COMMITS_OFTEN = """
import sys
from handler.batch import results
from handler.cli import main
results.COMMIT_SECONDS = 0.05
main(["batch", *sys.argv[1:]])
"""


def command_that_commits_often(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", COMMITS_OFTEN, *map(str, arguments)]


def kill_in_between(arguments: list[str | Path], out: Path, kills: int, count: int) -> None:
    """kill -9 at any moment: while it starts, and then the farther on the more often."""
    draw = random.Random(kills)
    told = command_that_commits_often(*arguments)
    for kill in range(kills):
        process = subprocess.Popen(told, cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and committed(out) < count * kill // (2 * kills):
            time.sleep(0.01)
        time.sleep(draw.random() / (20 if kill else 2))
        process.kill()
        process.wait()


def check_interrupted(folder: Path, count: int, kills: int, suffix: str) -> None:
    given = write_lines(folder / f"in.jsonl{suffix}", varied(count))
    out = folder / f"out.jsonl{suffix}"
    arguments: list[str | Path] = [given, out, "--input-field=text"]
    arguments += ["--parameters", '{"max_new_tokens": 12}']
    kill_in_between(arguments, out, kills, count)
    assert 0 < committed(out) < count
    subprocess.run(command(*arguments), cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    bad = list(range(0, count, BAD_EVERY))
    answers = read_lines(out)
    assert [each["id"] for each in answers] == sorted(set(range(count)) - set(bad))
    assert [each["line"] - 1 for each in read_lines(Path(f"{out}.errors"))] == bad
    for each in answers[:: max(1, count // 50)]:
        assert each["text"] == varied(each["id"] + 1)[-1]["text"]
    words = {7: "seven", 10: "ten", 19: "nineteen", 20: "twenty", 40: "forty"}
    assert {i: answers[i - 1]["output"] for i in words} == words


@pytest.mark.parametrize(
    ("count", "kills", "suffix"),
    [(1000, 2, ""), (600, 2, ".gz"), pytest.param(2000, 3, "", marks=pytest.mark.long)],
)
def test_killed_several_times(tmp_path: Path, count: int, kills: int, suffix: str) -> None:
    check_interrupted(tmp_path, count, kills, suffix)


def test_stopped_by_a_signal_it_tells_how_to_go_on(tmp_path: Path, out: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", varied(5000))
    arguments: list[str | Path] = [given, out, "--input-field=text"]
    for number in (signal.SIGINT, signal.SIGTERM):
        before = committed(out)
        process = subprocess.Popen(
            command_that_commits_often(*arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        while committed(out) < before + BAD_EVERY:  # good lines, too
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        log = process.communicate(timeout=WAIT)[1]
        lines = committed(out)
        assert process.returncode == 128 + number
        assert log.splitlines()[-1] == (
            f"stopped by {number.name} after {lines} of 5000 lines; the same command goes on from "
            "there"
        )
        bad = len(range(0, lines, BAD_EVERY))
        assert [each["id"] for each in read_lines(out)][-1] <= lines
        assert len(read_lines(out)) == lines - bad


# An engine that fails


def failing(monkeypatch: pytest.MonkeyPatch, lines: Callable[[int], bool]) -> None:
    """The engine fails on those steps that ``lines`` says."""
    decode, step = OnnxT5StepEngine.decode, itertools.count()

    def sometimes(*arguments: Any) -> Any:
        if lines(next(step)):
            raise RuntimeError("device lost")
        return decode(*arguments)

    monkeypatch.setattr(OnnxT5StepEngine, "decode", sometimes)


def test_an_engine_that_is_broken_makes_no_bad_lines(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = write_lines(tmp_path / "in.jsonl", ["Write 7 in words."] * 300)
    with monkeypatch.context() as broken:
        failing(broken, lambda step: step >= 9)
        assert "the engine failed on 101 lines in a row, the first is line " in refused(given, out)
    assert not Path(f"{out}.errors").exists()
    assert done(given, out) == f"{out}: 300 lines answered"


def test_a_failure_now_and_then_is_its_lines(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = write_lines(tmp_path / "in.jsonl", ["Write 7 in words."] * 100)
    failing(monkeypatch, lambda step: step == 9)
    done(given, out)
    told = read_lines(Path(f"{out}.errors"))
    assert told
    assert {(each["code"], each["error"]) for each in told} == {
        (424, "the engine failed: RuntimeError: device lost")
    }
    assert len(read_lines(out)) == 100 - len(told)


# What is not gone on with


@pytest.fixture
def stopped(three: Path, out: Path) -> list[str | Path]:
    """The arguments of a run that ended in the middle."""
    three.write_text(three.read_text() + "5\n" + three.read_text())
    assert "line 4: " in refused(three, out, "--strict")
    return [three, out]


def test_a_changed_input_is_refused(stopped: list[str | Path], three: Path, out: Path) -> None:
    three.write_text(three.read_text().replace("48", "49"))
    assert f"the input has changed since {out} was begun" in refused(*stopped)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (['--parameters={"top_k": 1}'], "--parameters {}, it is now {'top_k': 1}"),
        (["--input-field=a"], "--input-field None, it is now 'a'"),
        (["--option=dtype=int8"], "option.dtype 'auto', it is now 'int8'"),
        (["--option=prompt_template=a{input}"], "option.prompt_template '{input}', it is now"),
    ],
    ids=lambda value: str(value),
)
def test_other_settings_are_refused_by_name(
    stopped: list[str | Path], out: Path, arguments: list[str], words: str
) -> None:
    assert f"{out} was begun with {words}" in refused(*stopped, *arguments)


def test_a_file_that_is_no_batchs_is_not_overwritten(three: Path, out: Path) -> None:
    out.write_text("mine\n")
    assert f"{out} is there already" in refused(three, out)
    assert out.read_text() == "mine\n"


def test_a_refused_run_leaves_the_file_of_bad_lines(
    stopped: list[str | Path], three: Path, out: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine\n")
    assert f"{notes} is there already" in refused(three, tmp_path / "new", "--errors", notes)
    assert notes.read_text() == "mine\n"
    done(*stopped)
    bad = Path(f"{out}.errors").read_bytes()
    refused(*stopped, "--option=dtype=int8")
    assert Path(f"{out}.errors").read_bytes() == bad


def test_bad_lines_alone_are_gone_on_with(tmp_path: Path, out: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", [5])
    for _ in range(2):
        assert done(given, out) == f"{out}: 0 lines answered, 1 bad ones in {out}.errors"
    assert len(read_lines(Path(f"{out}.errors"))) == 1


def test_a_cut_output_is_refused(stopped: list[str | Path], out: Path) -> None:
    out.write_bytes(out.read_bytes()[:-5])
    assert f"{out} is shorter than {out}.progress says" in refused(*stopped)


def test_what_is_complete_is_not_answered_again(three: Path, out: Path) -> None:
    done(three, out)
    before = out.read_bytes()
    assert done("--option=threads=1", three, out) == f"{out}: 3 lines answered"
    assert out.read_bytes() == before
    out.unlink()
    assert done(three, out) == f"{out}: 3 lines answered"
    assert len(read_lines(out)) == 3


def test_one_process_at_a_time(tmp_path: Path, out: Path) -> None:
    given = write_lines(tmp_path / "in.jsonl", varied(5000))
    process = subprocess.Popen(
        command_that_commits_often(given, out, "--input-field=text"),
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    while not committed(out):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # or it could end before
    assert f"{out} is being written by another process" in refused(given, out)
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{in}", "{in}"], "INPUT, OUTPUT and --errors must be different files"),
        (["{in}", "{out}", "--errors={out}"], "must be different files"),
        (["/no/such", "{out}"], "/no/such: no such file"),
        (["{in}", "/no/such/out"], "/no/such/out cannot be written: No such file"),
        (["{in}", "/dev/null"], "/dev/null is no plain file; - is standard output"),
        (["{in}", "{out}", "--errors=/dev/null"], "/dev/null is no plain file"),
        (["{in}", "{out}", "--parameters=[]"], "--parameters must be a JSON object, got []"),
        (["{in}", "{out}", '--parameters={"top_q": 1}'], "did you mean 'top_p'?"),
        (["{in}", "{out}", '--parameters={"max_tokens": 9999}'], "(option.max_output_tokens)"),
        (
            ["{in}", "{out}", "--input-field=x", '--parameters={"details": true}'],
            "--input-field has room for texts only",
        ),
        (["{in}", "{out}", "--input-field=output"], "--output-field must not be --input-field"),
        (["{gz}", "{out}"], "in.gz cannot be read: "),
    ],
    ids=[str(number) for number in range(12)],
)
def test_an_error_is_one_line(
    three: Path, out: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "in.gz").write_bytes(gzip.compress(b"x" * 999)[:-9])
    names = {"in": three, "out": out, "gz": tmp_path / "in.gz"}
    told = [
        a.replace("{in}", f"{three}").replace("{out}", f"{out}").replace("{gz}", f"{names['gz']}")
        for a in arguments
    ]
    assert words in refused(*told)


@pytest.mark.long
def test_a_hundred_thousand_lines_killed_in_the_middle(tmp_path: Path) -> None:
    check_interrupted(tmp_path, 100_000, kills=3, suffix="")
