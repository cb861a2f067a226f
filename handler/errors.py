"""The two errors people meet: a request that cannot be answered, a model that cannot be loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

_LONGEST_SHOWN = 60
_LONGEST_MISSPELT = 100


class RequestError(ValueError):
    """A request that is refused or failed. Its text is one line of printable ASCII.

    DJLServing puts the text in the HTTP reason phrase, hence ASCII and one line.

    ``code`` is the HTTP status: 400 bad request, 424 the engine failed, 503 queue full,
    504 deadline passed, 507 out of memory.
    """

    def __init__(self, message: str, code: int = 400) -> None:
        super().__init__(one_line(message))
        self.code = code

    def at(self, place: str) -> RequestError:
        """The same error, naming where in the request it lies: ``inputs[2]: ...``."""
        return RequestError(f"{place}: {self}", self.code)


class LoadError(ValueError):
    """A model that cannot be loaded as configured: one line that names the property to change."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def as_request_error(error: BaseException) -> RequestError:
    """What a request is told when its engine raised ``error``."""
    if isinstance(error, RequestError):
        return error
    if _is_out_of_memory(error):
        return RequestError(
            f"out of memory: {error}; lower option.max_rows or option.max_input_tokens", 507
        )
    return RequestError(f"the engine failed: {type(error).__name__}: {error}", 424)


def _is_out_of_memory(error: BaseException) -> bool:
    # torch.cuda.OutOfMemoryError by name: torch need not be there. ONNX Runtime has none.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in ("Failed to allocate memory", "bad_alloc"))
    )


def one_line(text: str) -> str:
    """``text`` as one line of printable ASCII; everything else is escaped."""
    escaped = " ".join(text.split()).encode("ascii", "backslashreplace").decode("ascii")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in escaped)


def shown(value: Any) -> str:
    """``value`` as an error quotes it: its type stays visible, a long one is cut."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"<deeply nested {type(value).__name__}>"
    except ValueError:  # an int of more digits than Python agrees to print
        text = f"<huge {type(value).__name__}>"
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` is most likely a misspelling of, or None."""
    if len(name) > _LONGEST_MISSPELT:  # comparing a name of megabytes takes gigabytes
        return None
    folded = {k.lower().replace("-", "_"): k for k in known}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=0.75)
    return folded[found[0]] if found else None
