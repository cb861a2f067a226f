"""Given answers in place of generated ones: which of them fits best, or how likely each is.

``choices``: the same answers for every input; ``targets``: each input's own. An answer's log_prob
is the sum of its tokens', ``</s>`` included; its probability is its share among those given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handler.errors import RequestError, shown
from handler.generation import GenerationResult, ScoreRequest, checked_text
from handler.parameters import parameters_in_use
from handler.schemas.inputs import FIELDS, check_fields, parse_inputs
from handler.schemas.protocol import Deployment, ParsedRequest, StreamWriter
from handler.schemas.records import check_finite, lmi_error, vocabulary_token
from handler.tokenizer import Tokenizer

CHOICES, TARGETS = "choices", "targets"
# What has a meaning where nothing is generated.
_PARAMETERS = ("truncate", "details", "return_log_probs")

Json = dict[str, Any]


@dataclass(frozen=True)
class GivenRequest(ParsedRequest):
    """What a request with given answers has besides. answers: for each input.

    chooses: whether the best one is asked for.
    """

    answers: tuple[tuple[str, ...], ...] = ()
    chooses: bool = False


class GivenAnswers:
    """See Schema. ``{"outputs": [...], "scores": [[...], ...]}``: of each input the best choice,
    and what each answer came to, in the order given; for targets ``scores`` alone."""

    def parse(self, body: Mapping[str, Any], deployment: Deployment) -> GivenRequest:
        check_fields(body, (*FIELDS, CHOICES, TARGETS))
        choices, targets = body.get(CHOICES), body.get(TARGETS)
        if choices is not None and targets is not None:
            raise RequestError("'choices' and 'targets' are both there; send one of them")
        asked = parse_inputs({k: v for k, v in body.items() if k in FIELDS}, deployment)
        for name in parameters_in_use(asked.parameters):
            if name not in _PARAMETERS:
                raise RequestError(
                    f"parameter {name!r} has no meaning beside 'choices' and 'targets', allowed "
                    f"are {', '.join(_PARAMETERS)}"
                )
        answers = (
            (_answers(choices, CHOICES),) * len(asked.inputs)
            if choices is not None
            else _targets(targets, len(asked.inputs), asked.is_list)
        )
        field = CHOICES if choices is not None else TARGETS
        prompts = tuple(
            ScoreRequest(prompt.input, given, asked.parameters, field)
            for prompt, given in zip(asked.prompts, answers)
        )
        return GivenRequest(
            asked.inputs, asked.is_list, asked.parameters, prompts, answers, choices is not None
        )

    def answer(
        self, request: ParsedRequest, results: Sequence[GenerationResult], tokenizer: Tokenizer
    ) -> Json:
        assert isinstance(request, GivenRequest)
        p = request.parameters
        scores = [
            _scores(given, (result, *result.alternatives))
            for given, result in zip(request.answers, results)
        ]
        if p.wants_details:
            for each, result in zip(scores, results):
                for score, one in zip(each, (result, *result.alternatives)):
                    score["tokens"] = _tokens(one, tokenizer)
        if not request.chooses:
            return {"scores": scores}
        best = [max(each, key=lambda score: score["log_prob"])["text"] for each in scores]
        return {"outputs": best, "scores": scores}

    def stream(self, request: ParsedRequest, tokenizer: Tokenizer, accept: str) -> StreamWriter:
        raise RequestError("what is scored cannot be streamed; send 'stream' false")

    def worded(self, error: RequestError) -> RequestError:
        return error

    def error(self, error: RequestError) -> Json:
        return lmi_error(error)


def _answers(given: Any, place: str) -> tuple[str, ...]:
    """A list of texts, none of them twice."""
    if not isinstance(given, list) or not given:
        raise RequestError(
            f"the field {place!r} must be a list of at least one string, got {shown(given)}"
        )
    texts = tuple(checked_text(text, f"{place}[{i}]") for i, text in enumerate(given))
    seen: set[str] = set()
    for i, text in enumerate(texts):
        if text.strip() in seen:
            raise RequestError(f"{place}[{i}] is there twice: {shown(text)}")
        seen.add(text.strip())
    return texts


def _targets(targets: Any, inputs: int, is_list: bool) -> tuple[tuple[str, ...], ...]:
    """For one input a text or several; for a list of inputs a list with as much for each."""
    each = targets if is_list else [targets]
    if not isinstance(each, list) or len(each) != inputs:
        raise RequestError(
            f"the field 'targets' must be a list with a string or a list of strings for each of "
            f"the {inputs} inputs, got {shown(targets)}"
        )
    places = [f"targets[{i}]" if is_list else TARGETS for i in range(inputs)]
    return tuple(
        (checked_text(one, place),) if isinstance(one, str) else _answers(one, place)
        for one, place in zip(each, places)
    )


def _scores(given: Sequence[str], results: Sequence[GenerationResult]) -> list[Json]:
    for result in results:
        check_finite(result)
    sums = [sum(result.log_probs) for result in results]
    weights = [math.exp(one - max(sums)) for one in sums]
    return [
        {"text": text, "log_prob": log_prob, "probability": weight / sum(weights)}
        for text, log_prob, weight in zip(given, sums, weights)
    ]


def _tokens(result: GenerationResult, tokenizer: Tokenizer) -> list[Json]:
    told = zip(result.token_ids, result.log_probs)
    return [vocabulary_token(token_id, log_prob, tokenizer) for token_id, log_prob in told]
