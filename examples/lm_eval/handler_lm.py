"""A model class for lm-eval (EleutherAI's lm-evaluation-harness): the model of a running server.

Run, this file is lm-eval's own command line, which then knows ``--model handler`` too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import lm_eval.models  # noqa: F401 - lm-eval's own models: it loads them where no other is registered
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from requests import Session
from tqdm import tqdm

_TIMEOUT_SECONDS = 600  # the server gives up earlier, after option.request_timeout, and says so

Json = dict[str, Any]
T = TypeVar("T")


@register_model("handler")
class HandlerLM(LM):
    """Asks a server whose option.response_schema is ``outputs``, the default.

    url: where requests are posted; of DJLServing ``http://<host>:8080/predictions/<model>``.
    batch_size: inputs of one HTTP request.
    end_token: whether a log-likelihood counts ``</s>``. With it, it is that of the whole answer;
        without it that of every answer that begins so, as lm-eval's own model ``hf`` computes it.
    device: lm-eval always passes one; the server chose its own.

    Methods raise RuntimeError where the server answers with an error, which it quotes.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080/invocations",
        batch_size: int | str = 1,
        end_token: bool = True,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be an integer from 1, got {batch_size!r}")
        self._url = url
        self._batch_size = int(batch_size)
        self._end_token = end_token
        self._session = Session()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): its log-probability, and whether greedy search gives it.

        The space that joins it to its context is left out: here it is a text of its own.
        """
        pairs = [(context, continuation.lstrip()) for context, continuation in _args(requests)]
        targets: dict[str, dict[str, None]] = {}  # none twice, which the server would refuse
        for context, target in pairs:
            targets.setdefault(context, {})[target] = None
        found = {}
        for contexts in self._batches(list(targets), "log-likelihoods"):
            given = [list(targets[context]) for context in contexts]
            scores = self._ask("scores", inputs=contexts, targets=given, details=True)
            longest = max(len(score["tokens"]) for each in scores for score in each)
            greedy = self._ask("details", inputs=contexts, max_new_tokens=longest, details=True)
            for context, each, best in zip(contexts, scores, greedy, strict=True):
                for score in each:
                    found[context, score["text"]] = self._compared(score["tokens"], best["tokens"])
        return [found[pair] for pair in pairs]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text of each (context, generation_kwargs); kwargs that are not lm-eval's own names
        go to the server as they are."""
        places: dict[str, list[int]] = {}  # of equal kwargs: an HTTP request has one set of them
        arguments = _args(requests)
        for place, (_, kwargs) in enumerate(arguments):
            places.setdefault(json.dumps(kwargs, sort_keys=True), []).append(place)
        found: dict[int, str] = {}
        for kwargs, equal in places.items():
            parameters = _parameters(json.loads(kwargs))
            for batch in self._batches(equal, "texts"):
                inputs = [arguments[place][0] for place in batch]
                texts = self._ask("outputs", inputs=inputs, **parameters)
                found.update(zip(batch, texts, strict=True))
        return [found[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError(
            "an encoder-decoder has no log-likelihood of a text without an input: tasks with "
            "output_type loglikelihood_rolling (perplexities) cannot be run with --model handler"
        )

    def _batches(self, whole: Sequence[T], what: str) -> Iterator[Sequence[T]]:
        for start in tqdm(range(0, len(whole), self._batch_size), desc=f"batches of {what}"):
            yield whole[start : start + self._batch_size]

    def _compared(self, tokens: list[Json], greedy: list[Json]) -> tuple[float, bool]:
        counted = tokens if self._end_token else tokens[:-1]
        ids = [token["id"] for token in counted]
        is_greedy = ids == [token["id"] for token in greedy[: len(ids)]]
        return sum(token["log_prob"] for token in counted), is_greedy

    def _ask(self, field: str, inputs: list[str], targets: Any = None, **parameters: Any) -> Any:
        """``field`` of the server's answer."""
        body = {"inputs": inputs, "targets": targets, "parameters": parameters}
        reply = self._session.post(self._url, json=body, timeout=_TIMEOUT_SECONDS)
        answer = reply.json() if reply.ok else None
        if isinstance(answer, dict) and field in answer:
            return answer[field]
        # DJLServing's dynamic batch answers errors with the status 200.
        wrong_schema = answer is not None and "error" not in answer
        hint = " (option.response_schema must be outputs)" if wrong_schema else ""
        raise RuntimeError(f"{self._url} answered {reply.status_code}: {reply.text}{hint}")


def _args(requests: list[Instance]) -> list[tuple[Any, ...]]:
    return [request.args for request in requests]


def _parameters(kwargs: Json) -> Json:
    """lm-eval's generation_kwargs under the server's names."""
    names = {"until": "stop_sequences", "max_gen_toks": "max_new_tokens"}
    return {names.get(name, name): value for name, value in kwargs.items() if value != []}


if __name__ == "__main__":
    cli_evaluate()
