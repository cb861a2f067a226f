"""Steps of one's own around ours: what they get, what they may return, how they fail."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import ROOT

from handler.errors import RequestError
from handler.steps import NO_STEPS, Steps


def test_the_docs_show_the_example() -> None:
    example = (ROOT / "examples" / "entry_point" / "model.py").read_text()
    docs = (ROOT / "docs" / "djlserving.md").read_text()
    docstring, imports, exports, *rest = example.split("\n\n", 3)
    assert (docstring[:3], exports[:7]) == ('"""', "__all__")
    assert f"```python\n{imports}\n\n{rest[0]}```" in docs


def test_without_steps_bodies_are_not_touched() -> None:
    for body in (b"{bad", b'{"a":  1}', b""):
        assert NO_STEPS.request(body) is body
        assert NO_STEPS.answer(body) is body


def test_steps_change_objects() -> None:
    steps = Steps(lambda r: {"inputs": r["q"]}, lambda a: {"n": len(a["outputs"]), "é": 1})
    assert json.loads(steps.request(b'{"q": "x"}')) == {"inputs": "x"}
    assert steps.answer(b'{"outputs": ["a", "b"]}') == '{"n": 2, "é": 1}'.encode()


@pytest.mark.parametrize("body", [b"", b"{bad", b"[1]", b"5", b"[" * 100_000, b"\xff"])
def test_what_is_no_object_is_left_to_be_refused(body: bytes) -> None:
    steps = Steps(before=lambda r: 1 / 0)  # type: ignore[arg-type, return-value]
    assert steps.request(body) is body


def test_lines_do_not_pass_by_the_steps() -> None:
    with pytest.raises(RequestError, match="is several JSON texts") as refused:
        Steps(before=dict).request(b'{"inputs": "x"}\n{"inputs": "y"}')
    assert refused.value.code == 400


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "returned no dict, but NoneType"),
        ([1], "returned no dict, but list"),
        ({"a": {1}}, "returned is no JSON"),
        ({"a": float("nan")}, "returned is no JSON"),
        ({"a": "\ud800"}, "returned is no JSON"),
    ],
)
def test_what_steps_may_not_return(returned: Any, words: str) -> None:
    steps = Steps(lambda _: returned, lambda _: returned)
    for call in (steps.request, steps.answer):
        with pytest.raises(RequestError, match=words) as refused:
            call(b"{}")
        assert refused.value.code == 424
