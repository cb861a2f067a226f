"""What a request's parameters may be together, and what the deployment allows of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from handler.errors import RequestError

if TYPE_CHECKING:
    from handler.parameters import GenerationParameters


@dataclass(frozen=True)
class ParameterLimits:
    """What the deployment allows a request to ask for."""

    max_input_tokens: int = 1024
    max_output_tokens: int = 512
    max_rows: int = 64


DEFAULT_LIMITS = ParameterLimits()


def check_limits(p: GenerationParameters, limits: ParameterLimits) -> None:
    """Raises RequestError where a request asks for more than the deployment allows."""
    for name, limit, option in (
        ("max_new_tokens", limits.max_output_tokens, "max_output_tokens"),
        ("num_beams", limits.max_rows, "max_rows"),
        ("num_return_sequences", limits.max_rows, "max_rows"),
        ("truncate", limits.max_input_tokens, "max_input_tokens"),
    ):
        value = getattr(p, name)
        if value > limit:
            raise RequestError(
                f"parameter {name!r} must be at most {limit} (option.{option}), got {value}"
            )


def check_together(p: GenerationParameters) -> None:
    """Raises RequestError where one parameter rules out the value of another."""
    if p.min_new_tokens > p.max_new_tokens:
        raise RequestError(
            f"parameter 'min_new_tokens' must be at most max_new_tokens ({p.max_new_tokens}), "
            f"got {p.min_new_tokens}"
        )
    if p.num_return_sequences > p.num_beams and not (p.samples and p.num_beams == 1):
        raise RequestError(
            "parameter 'num_return_sequences' must be at most num_beams "
            f"({p.num_beams}) unless the request samples without beams, got "
            f"{p.num_return_sequences}"
        )
    if p.top_n_tokens and p.num_beams > 1:
        raise RequestError(
            f"parameter 'top_n_tokens' must be 0 with num_beams > 1, got {p.top_n_tokens}"
        )
    if p.regex is not None and p.choices:
        raise RequestError("parameters 'regex' and 'choices' are both there; send one of them")
    for name in ("num_beams", "num_return_sequences"):
        value = getattr(p, name)
        if p.stream and value > 1:
            raise RequestError(
                f"parameter 'stream' must be false with {name} > 1, got {name} {value}"
            )
