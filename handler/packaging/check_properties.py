"""serving.properties and requirements.txt: what DJLServing and the handler make of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from handler.config import (
    DJL_OWNED,
    PROPERTIES,
    canonical_name,
    read_configuration,
    serving_properties,
)
from handler.errors import LoadError, nearest, shown
from handler.packaging.findings import Finding, Subject, checkpoint_folder, error, warning
from handler.packaging.requirements import THE_IMAGES_OWN
from handler.packaging.serving_properties import written_key

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# Engines that start Python workers; the last two are those of the images of 2023.
_ENGINES = ("Python", "MPI", "FasterTransformer", "DeepSpeed")
_OLD_ENGINES = ("FasterTransformer", "DeepSpeed")
_WHOLE_NUMBERS = {
    **dict.fromkeys(("batch_size", "minWorkers", "maxWorkers", "job_queue_size"), 1),
    **dict.fromkeys(("max_batch_delay", "max_idle_time"), 0),
    **dict.fromkeys(("option.model_loading_timeout", "option.predict_timeout"), 1),
}
_SET_BY_DJL = {"model_dir", "device_id"}
_SAGEMAKER_SECONDS = 60
_PREDICT_TIMEOUT, _LOADING_TIMEOUT = 120, 240  # DJLServing's defaults, seconds
# ContainerStartupHealthCheckTimeoutInSeconds is at most
_LONGEST_START = 3600
_LARGE = 10**9
_FIRST_WITH_ASYNC_MODE = (0, 33)


def encoding(s: Subject) -> Iterator[Finding]:
    file = s.folder / "serving.properties"
    if not file.is_file():
        yield warning(
            "no-properties",
            "there is no serving.properties: DJLServing guesses the engine and starts several "
            "workers on a CPU; add the shipped one",
        )
    elif file.read_bytes().startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        yield error(
            "bom-in-properties",
            "serving.properties begins with a byte order mark, which becomes part of its first "
            "key; save it as UTF-8 without BOM",
        )
    else:
        try:
            serving_properties(s.folder)
        except LoadError as problem:
            yield error("unreadable-properties", s.relative(problem))


def utf8(s: Subject) -> Iterator[Finding]:
    """Java reads each byte as a character; ``\\u00fc`` it reads as is meant."""
    from javaproperties import escape

    for key, value in (s.properties or {}).items():
        try:
            meant = value.encode("latin-1").decode("utf-8")
        except UnicodeError:
            continue
        if meant != value:
            yield warning(
                "utf8-in-properties",
                f"{key} is written in UTF-8, Java reads {shown(value)}; write "
                f"{escape(meant)}, or set it by --option of package",
            )


def names(s: Subject) -> Iterator[Finding]:
    for key in s.properties or {}:
        bare = key.removeprefix("option.")
        ours = canonical_name(bare) is not None
        if not ours and bare.lower() not in DJL_OWNED and not bare.startswith(("gpu.", "cpu.")):
            hint = nearest(bare, _known())
            yield warning(
                "unknown-property",
                f"{key} is no property of this handler or of DJLServing and has no effect"
                + (f"; did you mean {hint}?" if hint else "; remove it"),
            )
        elif ours and not key.startswith("option."):
            yield warning(
                "missing-option-prefix",
                f"{key} does not reach the handler without option.; write option.{key}",
            )


def values(s: Subject) -> Iterator[Finding]:
    """Each alone, so that one bad value does not hide the next; then all together."""
    good = {}
    for key, value in (s.properties or {}).items():
        try:
            read_configuration(properties={key: value})
            good[key] = value
        except LoadError as problem:
            yield error("bad-property-value", problem)
    try:
        read_configuration(properties=good)
    except LoadError as problem:
        yield error("conflicting-properties", problem)


def djls_values(s: Subject) -> Iterator[Finding]:
    for key, lowest in _WHOLE_NUMBERS.items():
        value = (s.properties or {}).get(key)
        if value is not None and _number(s, key, lowest) is None:
            yield error(
                "bad-property-value",
                f"{key} must be an integer from {lowest} on, got {shown(value)}",
            )


def places(s: Subject) -> Iterator[Finding]:
    c = s.configuration
    if c is None:
        return
    if c.s3url is not None and c.model_id is not None:
        yield error(
            "both-s3url-and-model_id",
            f"option.s3url={c.s3url} and option.model_id={c.model_id} are both set; remove one",
        )
        return
    try:
        checkpoint_folder(s.folder, c)
    except LoadError as problem:
        yield error("missing-model-folder", problem)


def engine(s: Subject) -> Iterator[Finding]:
    told = (s.properties or {}).get("engine")
    if told is None:
        return
    if told not in _ENGINES:
        hint = nearest(told, _ENGINES)
        yield error(
            "engine-unknown",
            f"engine={shown(told)} starts no Python worker, allowed are {', '.join(_ENGINES)}"
            + (f"; did you mean {hint}?" if hint else ""),
        )
    elif told in _OLD_ENGINES and s.image is not None and s.image.name != "fastertransformer":
        yield error(
            "engine-unknown",
            f"engine={told} is not in image {s.image.name} (DJLServing {s.image.djl_version}); set "
            "engine=Python, or take image fastertransformer",
        )


def batching(s: Subject) -> Iterator[Finding]:
    properties = s.properties or {}
    batch = _number(s, "batch_size", 1) or 1
    asynchronous = properties.get("option.async_mode", "false").lower() == "true"
    if asynchronous and s.image is not None:
        version = tuple(map(int, s.image.djl_version.split(".")[:2]))
        asynchronous = version >= _FIRST_WITH_ASYNC_MODE
    if asynchronous and batch > 1:
        yield error(
            "async-with-batch-size",
            f"batch_size={batch} beside option.async_mode=true: every group of requests would be "
            "refused; set batch_size=1, or async_mode=false",
        )
    queue = _number(s, "job_queue_size", 1)
    if queue is not None and queue < batch:
        yield warning(
            "job-queue-size",
            f"job_queue_size={queue} is below batch_size={batch}: no batch is ever full; raise it "
            "or remove the line (1000)",
        )


def workers(s: Subject) -> Iterator[Finding]:
    if s.on_gpu or s.properties is None or not (s.folder / "serving.properties").is_file():
        return
    most = s.properties.get("cpu.maxWorkers", s.properties.get("maxWorkers"))
    least = s.properties.get("cpu.minWorkers", s.properties.get("minWorkers"))
    if (least, most) != ("1", "1"):
        yield warning(
            "several-cpu-workers",
            f"minWorkers={least or 'unset'}, maxWorkers={most or 'unset'}: on a CPU each worker "
            "holds the whole model and has its part of the requests; set both to 1",
        )


def timeouts(s: Subject) -> Iterator[Finding]:
    c = s.configuration
    if c is None:
        return
    asynchronous = (s.properties or {}).get("option.async_mode", "false").lower() == "true"
    name = "option.chunked_read_timeout" if asynchronous else "option.predict_timeout"
    told = _number(s, name, 1) or _PREDICT_TIMEOUT
    if c.request_timeout >= told:
        yield error(
            "request-timeout-too-long",
            f"option.request_timeout={c.request_timeout:g} is not below {name}={told}, at which "
            "DJLServing gives the worker or the connection up; lower it",
        )
    elif c.request_timeout >= _SAGEMAKER_SECONDS:
        yield warning(
            "request-timeout-too-long",
            f"option.request_timeout={c.request_timeout:g}: SageMaker itself gives up after "
            f"{_SAGEMAKER_SECONDS} s, and the row runs on; set it below",
        )


def loading_timeout(s: Subject) -> Iterator[Finding]:
    key = "option.model_loading_timeout"
    seconds = _number(s, key, 1)
    if seconds is None:
        return
    size = sum(f.stat().st_size for f in s.folder.glob("*.safetensors")) + sum(
        f.stat().st_size for f in s.folder.glob("*.bin")
    )
    if seconds > _LONGEST_START:
        yield warning(
            "model-loading-timeout",
            f"{key}={seconds}: SageMaker waits {_LONGEST_START} s at most "
            "(ContainerStartupHealthCheckTimeoutInSeconds); set it below",
        )
    elif seconds < _LOADING_TIMEOUT and size > _LARGE:
        yield warning(
            "model-loading-timeout",
            f"{key}={seconds} is below DJLServing's own {_LOADING_TIMEOUT} for "
            f"{size / 1e9:.1f} GB of weights; the shipped serving.properties has 1200",
        )


def requirements(s: Subject) -> Iterator[Finding]:
    file = s.folder / "requirements.txt"
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        needed = _requirement(line)
        if needed is None:
            continue
        if needed.name.lower().replace("_", "-") in THE_IMAGES_OWN:
            yield error(
                "requirements-replace-torch",
                f"requirements.txt: {line.strip()!r} replaces the image's {needed.name}, which is "
                "built for its GPUs; remove the line",
            )
        has = s.image.transformers if s.image else None
        if needed.name == "transformers" and has and has not in needed.specifier:
            yield warning(
                "requirements-replace-transformers",
                f"requirements.txt: {line.strip()!r} replaces transformers {has} of image "
                f"{s.image.name if s.image else ''}; allow it, or remove the line",
            )


def python(s: Subject) -> Iterator[Finding]:
    if s.image is None or s.configuration is None:
        return
    version = tuple(map(int, s.image.python.split(".")))
    if s.configuration.backend == "onnxruntime" and version < (3, 10):
        yield error(
            "python-too-old",
            f"option.backend=onnxruntime needs Python 3.10, image {s.image.name} has "
            f"{s.image.python}; take image djl-cpu, or another backend",
        )


def _requirement(line: str) -> Requirement | None:
    from packaging.requirements import InvalidRequirement, Requirement

    text = line.split(" #")[0].strip()
    if not text or text.startswith(("#", "-")):
        return None
    try:
        return Requirement(text)
    except InvalidRequirement:  # an address or a file: pip's affair
        return None


def _number(s: Subject, key: str, lowest: int) -> int | None:
    """As Java reads it: digits alone. None where it is not there, or no such number."""
    value = (s.properties or {}).get(key, "")
    if not (value.isascii() and value.lstrip("-").isdigit()) or int(value) < lowest:
        return None
    return int(value)


def _known() -> list[str]:
    return [written_key(n) for n in sorted({*PROPERTIES, *DJL_OWNED} - _SET_BY_DJL)]


CHECKS = (
    encoding,
    utf8,
    names,
    values,
    djls_values,
    places,
    engine,
    batching,
    workers,
    timeouts,
    loading_timeout,
    requirements,
    python,
)
