"""Choosing tokens on a device: what handler/sampling.py chooses on the host, row for row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from draws import FILTERS, assert_draws_follow
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoints import write_checkpoint
from test_sampling import parameters, random_logits

from handler.config import configuration_of
from handler.engines.torch_t5.part import load_part
from handler.engines.torch_t5.sampling import DeviceSampler
from handler.generation import GenerationRequest
from handler.inference import Model
from handler.parameters import GenerationParameters, parse_parameters
from handler.sampling import Chosen, HostSampler, RowSampling, choose_tokens
from handler.scheduler import Scheduler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EOS = 1
# Sums of thousands of weights differ in their last bits, and so does where a row's number falls.
NEAR = 2e-5


class Nudged(RowSampling):
    """Its numbers lie a little further."""

    nudge = 0.0

    def uniform(self, step: int) -> float:
        return min(max(super().uniform(step) + self.nudge, 0.0), 1.0 - 1e-12)


def on_device(
    logits: npt.NDArray[np.float32], rows: Sequence[RowSampling], steps: Sequence[int], in_use: int
) -> Chosen:
    given_logits = torch.from_numpy(logits).to(DEVICE)
    chosen = torch.full((len(rows) + 1,), -1, device=DEVICE)
    told = DeviceSampler(chosen).choose(given_logits, rows, steps, EOS, in_use)()
    assert chosen.tolist() == [*told[0], -1]
    return told


@settings(deadline=None, max_examples=120)
@given(
    cases=st.lists(
        st.tuples(parameters, st.lists(st.integers(0, 99), max_size=9)), min_size=1, max_size=6
    ),
    bad_words=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=2), max_size=3),
    size=st.sampled_from([100, 700, 5000]),
    spread=st.sampled_from([0.3, 3.0, 50.0]),
    seed=st.integers(0, 100),
    told=st.integers(0, 6),
)
def test_the_device_chooses_what_the_host_does(
    cases: list[tuple[GenerationParameters, list[int]]],
    bad_words: list[list[int]],
    size: int,
    spread: float,
    seed: int,
    told: int,
) -> None:
    """The first so many rows are told log-probabilities."""
    logits = np.stack([random_logits(size, spread, seed + row) for row in range(len(cases))])

    def rows(nudge: float = 0.0) -> list[RowSampling]:
        made = [
            Nudged(p, bad_words=bad_words, log_probs=row < told) for row, (p, _) in enumerate(cases)
        ]
        for row, (_, generated) in zip(made, cases):
            row.nudge = nudge
            for token in generated:
                row.append(token)
        return list(made)

    steps = [len(generated) for _, generated in cases]
    in_use = size - 3
    tokens, log_probs = on_device(logits, rows(), steps, in_use)
    near = [
        choose_tokens(logits.copy(), rows(nudge), steps, EOS, in_use)
        for nudge in (0.0, NEAR, -NEAR)
    ]
    for row, token in enumerate(tokens):
        matching = [host for host in near if host[0][row] == token]
        assert matching, (token, [host[0][row] for host in near])
        expected = matching[0][1][row]
        if expected is not None:
            expected = pytest.approx(expected, abs=2e-5, rel=1e-6)
        assert log_probs[row] == expected


@pytest.mark.parametrize("wrong", ["one NaN", "all NaN", "all -inf", "inf"])
@pytest.mark.parametrize(("samples", "told"), [(False, True), (True, True), (False, False)])
def test_logits_that_are_no_numbers_fail_their_row_alone(
    samples: bool, told: bool, wrong: str
) -> None:
    logits = np.stack([random_logits(20)] * 3)
    if wrong == "one NaN":
        logits[1, 7] = np.nan
    elif wrong == "inf":
        logits[1, 7] = np.inf
    else:
        logits[1] = -np.inf if wrong == "all -inf" else np.nan
    p = GenerationParameters(do_sample=samples, top_p=0.9, seed=4)
    rows = [RowSampling(p, log_probs=told) for _ in range(3)]
    tokens, log_probs = on_device(logits, rows, [0] * 3, 20)
    assert np.isnan(log_probs[1])
    assert (tokens[0], log_probs[0]) == (tokens[2], log_probs[2])
    assert np.isfinite(log_probs[0]) if told else log_probs[0] is None


@pytest.mark.parametrize(("samples", "told"), [(False, True), (True, True), (False, False)])
def test_none_left_is_told(samples: bool, told: bool) -> None:
    p = GenerationParameters(do_sample=samples, ignore_eos_token=True, seed=1)
    words = [[token] for token in range(20)]
    row = RowSampling(p, bad_words=words, log_probs=told)
    _, log_probs = on_device(random_logits(20)[None], [row], [0], 20)
    assert log_probs == [-np.inf]


@pytest.mark.parametrize(
    "filters",
    [*(pytest.param(one, marks=pytest.mark.long) for one in FILTERS[:4]), *FILTERS[4:]],
    ids=str,
)
def test_draws_follow_the_probabilities(filters: dict[str, Any]) -> None:
    def choose(
        logits: npt.NDArray[np.float32], rows: Sequence[RowSampling], steps: Sequence[int]
    ) -> list[int]:
        return on_device(logits, rows, steps, logits.shape[-1])[0]

    assert_draws_follow(choose, random_logits(30, spread=1.5, seed=4), filters)


def test_through_the_scheduler(tmp_path: Path, demo: Path) -> None:
    """Rows that the host must look into, beams, scores and likeliest tokens, beside others."""
    folder = write_checkpoint(tmp_path, "flan-t5", demo)
    settings_of = [
        {},
        {"temperature": 1.4, "seed": 1},
        {"num_beams": 3, "num_return_sequences": 2},
        {"top_n_tokens": 3, "repetition_penalty": 1.3},
        {"regex": "(a|b)+"},
    ]
    requests = [
        GenerationRequest("Count from 3 to 9.", parse_parameters({"max_new_tokens": 9, **values}))
        for values in settings_of
    ]
    answers = []
    for on_device in (False, True):
        part = load_part(folder, configuration_of(str(folder), max_rows=4))
        engine = part.engine(4)
        if on_device:
            engine.run_ahead()
        else:
            engine.sampler, engine.runs_ahead = HostSampler(), False
        model = Model(
            Scheduler(engine, 100), backend="torch", max_input_tokens=99, max_output_tokens=99
        )
        answers.append(model.generate(requests))
        model.close()
    for host, device in zip(*answers):
        assert device.token_ids == host.token_ids
        assert device.log_probs == pytest.approx(host.log_probs, abs=1e-5)
        assert [r.text for r in device.alternatives] == [r.text for r in host.alternatives]
