"""The table of generation parameters: names, aliases, ranges, defaults, meanings.

Everything that knows a parameter (parsing, errors, documentation) reads it from here. To add one,
add a field to GenerationParameters and name it in ``supported_parameters`` of the engines that
honour it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from handler.errors import RequestError, nearest, shown
from handler.parameter_checks import (
    Refused,
    StopSequence,
    boolean,
    early_stopping,
    integer,
    number,
    sequences,
    text,
    texts,
    truncate,
)
from handler.parameter_limits import DEFAULT_LIMITS, ParameterLimits, check_limits, check_together

MAX_SEED = 2**64 - 1
# Below this temperature the softmax puts all its weight on the best token in fp32.
GREEDY_TEMPERATURE = 1e-5


def _parameter(
    default: Any,
    check: Callable[[Any], Any],
    meaning: str,
    *,
    allowed: str,
    example: Any,
    aliases: tuple[str, ...] = (),
) -> Any:
    metadata = {
        "check": check,
        "meaning": meaning,
        "allowed": allowed,
        "example": example,
        "aliases": aliases,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class GenerationParameters:
    """How one prompt is to be continued; every value is checked, whoever makes one.

    Raises RequestError naming the parameter, the value seen and what is allowed.
    """

    max_new_tokens: int = _parameter(
        200,
        integer(1),
        "Most tokens generated. Also under the name max_length: the prompt never counts.",
        allowed="1 to option.max_output_tokens",
        example=64,
        aliases=("max_seq_len", "max_length", "max_tokens"),
    )
    min_new_tokens: int = _parameter(
        0,
        integer(0),
        "The end of the text is not chosen before this many tokens.",
        allowed="0 to max_new_tokens",
        example=5,
        aliases=("min_length",),
    )
    do_sample: bool = _parameter(
        False,
        boolean,
        "Draw tokens at random instead of taking the best one. True when not given but "
        "temperature, top_k > 1, top_p or typical_p is.",
        allowed="true, false",
        example=True,
    )
    temperature: float = _parameter(
        1.0,
        number(0.0, 1e6, "a number from 0 to 1000000"),
        "Divides the logits before sampling; 0 (and anything below 1e-5) is greedy.",
        allowed="0 to 1000000",
        example=0.7,
    )
    top_k: int = _parameter(
        0,
        integer(0),
        "Sample among the k best tokens only; 0 is off.",
        allowed=">= 0",
        example=50,
        aliases=("runtime_top_k",),
    )
    top_p: float = _parameter(
        0.0,
        number(0.0, 1.0, "a number from 0 to 1"),
        "Sample among the fewest best tokens whose probabilities reach p; 0 and 1 are off.",
        allowed="0 to 1",
        example=0.9,
        aliases=("runtime_top_p",),
    )
    typical_p: float = _parameter(
        0.0,
        number(0.0, 1.0, "a number from 0 to 1"),
        "Locally typical sampling with mass p; 0 and 1 are off.",
        allowed="0 to 1",
        example=0.95,
    )
    num_beams: int = _parameter(
        1,
        integer(1),
        "Beam search with this many beams; 1 is off.",
        allowed="1 to option.max_rows",
        example=4,
        aliases=("beam_width",),
    )
    length_penalty: float = _parameter(
        1.0,
        number(-10.0, 10.0, "a number from -10 to 10"),
        "Exponent of the length by which a beam's score is divided; above 0 favours long texts. "
        "FasterTransformer's len_penalty is the same; its own default was 0.",
        allowed="-10 to 10",
        example=0.6,
        aliases=("len_penalty",),
    )
    early_stopping: bool | str = _parameter(
        False,
        early_stopping,
        "When beam search ends: true, as soon as num_beams texts are complete; false, when a "
        'better one is unlikely; "never", when none can come.',
        allowed='true, false, "never"',
        example=True,
    )
    num_return_sequences: int = _parameter(
        1,
        integer(1),
        "Texts returned for a prompt.",
        allowed="1 to option.max_rows; with beams, to num_beams",
        example=3,
        aliases=("n", "best_of"),
    )
    seed: int | None = _parameter(
        None,
        integer(0, MAX_SEED),
        "Seed of the random draws: same seed, same text, whatever else is running.",
        allowed="0 to 2**64 - 1",
        example=42,
        aliases=("random_seed",),
    )
    repetition_penalty: float = _parameter(
        1.0,
        number(1e-6, 100.0, "a number above 0, to 100"),
        "Divides positive logits (multiplies negative ones) of tokens already generated and of the "
        "decoder's start token; 1 is off.",
        allowed="above 0, to 100",
        example=1.2,
    )
    presence_penalty: float = _parameter(
        0.0,
        number(-2.0, 2.0, "a number from -2 to 2"),
        "Subtracted from the logit of every token already generated; 0 is off.",
        allowed="-2 to 2",
        example=0.5,
    )
    frequency_penalty: float = _parameter(
        0.0,
        number(-2.0, 2.0, "a number from -2 to 2"),
        "Subtracted from a token's logit once for each time it was generated; 0 is off.",
        allowed="-2 to 2",
        example=0.5,
    )
    no_repeat_ngram_size: int = _parameter(
        0,
        integer(0),
        "No sequence of this many tokens is generated twice; 0 is off.",
        allowed=">= 0",
        example=3,
    )
    stop_sequences: tuple[StopSequence, ...] = _parameter(
        (),
        sequences,
        "Generation ends where one of these appears; the text is cut before it.",
        allowed="a string, strings, or FasterTransformer's [token ids, end offsets]",
        example=["."],
        aliases=("stop", "stop_words_list"),
    )
    bad_words_list: tuple[StopSequence, ...] = _parameter(
        (),
        sequences,
        "Token sequences that are never generated; a string stands for what it is after a space "
        "and within a word.",
        allowed="a string, strings, or FasterTransformer's [token ids, end offsets]",
        example=["foo"],
        aliases=("bad_words",),
    )
    regex: str | None = _parameter(
        None,
        text,
        "The whole text matches this regular expression (Rust's syntax, without look-around and "
        "back references).",
        allowed="a regular expression of up to 2000 characters",
        example="[0-9]{4}-[0-9]{2}",
        aliases=("guided_regex",),
    )
    choices: tuple[str, ...] = _parameter(
        (),
        texts,
        "The text is one of these. To score given answers instead, send choices beside inputs.",
        allowed="a list of up to 256 different strings",
        example=["yes", "no"],
        aliases=("guided_choice",),
    )
    details: bool = _parameter(
        False,
        boolean,
        "Answer with the tokens, their log-probabilities (null on fastertransformer) and the "
        "finish reason, too.",
        allowed="true, false",
        example=True,
    )
    return_log_probs: bool = _parameter(
        False,
        boolean,
        "The same as details, under FasterTransformer's names.",
        allowed="true, false",
        example=True,
        aliases=("is_return_output_log_probs", "is_return_cum_log_probs"),
    )
    top_n_tokens: int = _parameter(
        0,
        integer(0, 20),
        "Answer with details, the n likeliest tokens of every step among them; 0 is off.",
        allowed="0 to 20",
        example=3,
    )
    stream: bool = _parameter(
        False,
        boolean,
        "Send tokens as they come. Also accepted beside inputs.",
        allowed="true, false",
        example=True,
    )
    return_full_text: bool = _parameter(
        False,
        boolean,
        "Put the prompt before the generated text.",
        allowed="true, false",
        example=True,
    )
    truncate: bool | int = _parameter(
        False,
        truncate,
        "Cut a longer input to option.max_input_tokens (true) or to this many tokens; "
        "without it a longer input is refused.",
        allowed="true, false, 1 to option.max_input_tokens",
        example=True,
    )
    ignore_eos_token: bool = _parameter(
        False,
        boolean,
        "Go on to max_new_tokens: the end of the text is never chosen.",
        allowed="true, false",
        example=True,
    )

    def __post_init__(self) -> None:
        for name, f in PARAMETERS.items():
            value = getattr(self, name)
            if value is not f.default:
                object.__setattr__(self, name, _checked(name, name, value))
        check_together(self)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.do_sample and self.temperature >= GREEDY_TEMPERATURE

    @property
    def wants_details(self) -> bool:
        """Whether an answer is to tell its tokens."""
        return self.details or self.return_log_probs or self.top_n_tokens > 0


PARAMETERS = {f.name: f for f in fields(GenerationParameters)}
"""name -> dataclass field; field.metadata has check, meaning, allowed, example, aliases."""

_CANONICAL = {
    accepted: name for name, f in PARAMETERS.items() for accepted in (name, *f.metadata["aliases"])
}


# What other servers' clients may send. null and false ask for nothing, so they pass.
NOT_OFFERED = ("adapter_id", "decoder_input_details", "grammar", "watermark")


def parse_parameters(
    raw: Mapping[str, Any], limits: ParameterLimits = DEFAULT_LIMITS
) -> GenerationParameters:
    """Check and normalize what a client sent as ``parameters``.

    None stands for absent. Raises RequestError, naming the parameter, the value seen and what is
    allowed; for an unknown name the nearest known one.
    """
    values = _by_canonical_name(raw)
    if "do_sample" not in values:
        values["do_sample"] = _implies_sampling(values)
    values.setdefault(
        "max_new_tokens", min(GenerationParameters.max_new_tokens, limits.max_output_tokens)
    )
    parameters = GenerationParameters(**values)
    check_limits(parameters, limits)
    return parameters


def with_defaults(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``raw``, and of ``defaults`` what it has under none of that parameter's names."""
    sent = {_CANONICAL.get(name, name) for name in raw}
    kept = {n: value for n, value in defaults.items() if _CANONICAL.get(n, n) not in sent}
    return {**kept, **raw}


def random_seed() -> int:
    """A seed for a request that gives none."""
    return random.SystemRandom().randrange(MAX_SEED + 1)


def _by_canonical_name(raw: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    sent_as: dict[str, str] = {}
    for accepted, value in raw.items():
        name = _CANONICAL.get(accepted)
        if accepted in NOT_OFFERED:
            if value is None or value is False:
                continue
            raise RequestError(f"parameter {accepted!r} is not supported; leave it out")
        if name is None:
            hint = nearest(accepted, _CANONICAL)
            advice = f"; did you mean {hint!r}?" if hint else f"; known are {', '.join(PARAMETERS)}"
            raise RequestError(f"unknown parameter {shown(accepted)}{advice}")
        if value is None:
            continue
        checked = _checked(accepted, name, value)
        if name in values and values[name] != checked:
            raise RequestError(
                f"parameters {sent_as[name]!r} and {accepted!r} mean the same and differ: "
                f"{shown(raw[sent_as[name]])} and {shown(value)}; send one of them"
            )
        values[name] = checked
        sent_as[name] = accepted
    return values


def _checked(accepted: str, name: str, value: Any) -> Any:
    try:
        return PARAMETERS[name].metadata["check"](value)
    except Refused as refused:
        raise RequestError(
            f"parameter {accepted!r} must be {refused}, got {shown(value)}"
        ) from None


def _implies_sampling(values: Mapping[str, Any]) -> bool:
    return any(
        (
            values.get("temperature", 0.0) >= GREEDY_TEMPERATURE,
            values.get("top_k", 0) > 1,
            values.get("top_p", 0.0) > 0.0,
            values.get("typical_p", 0.0) > 0.0,
        )
    )


def parameters_in_use(parameters: GenerationParameters) -> list[str]:
    """Names of the parameters whose value differs from the default."""
    return [name for name, f in PARAMETERS.items() if getattr(parameters, name) != f.default]
