"""Configuration: the property table, and how it is read.

``option.X`` in serving.properties, ``OPTION_X`` in the environment, ``--option X=v`` on the command
line become one frozen Configuration. DJL hands everything over as strings, with the empty first
call only; what later calls carry as properties are client headers and never reach this module.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Union

from handler.errors import LoadError, nearest, shown
from handler.property_checks import (
    Refused,
    boolean,
    choice,
    degree,
    integer,
    seconds,
    streaming,
    template,
    text,
)

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "fastertransformer", "torch", "onnxruntime", "transformers")
DTYPES = ("auto", "fp32", "fp16", "bf16", "int8", "int4")
_DTYPE_NAMES = {
    **{name: name for name in DTYPES},
    "float32": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
}
MAX_ROWS_ON_CPU, MAX_ROWS_ON_GPU = 16, 64

Degree = Union[int, str]


def _dtype(value: Any) -> str:
    try:
        return _DTYPE_NAMES[str(value).lower()]
    except KeyError:
        raise Refused(f"one of {', '.join(DTYPES)}") from None


def _property(
    default: Any,
    convert: Callable[[Any], Any],
    meaning: str,
    *,
    example: str,
    aliases: tuple[str, ...] = (),
    environment: tuple[str, ...] = (),
    default_text: str | None = None,
) -> Any:
    """A field of Configuration. ``environment``: variables that count besides OPTION_<NAME>."""
    metadata = {
        "convert": convert,
        "meaning": meaning,
        "example": example,
        "aliases": aliases,
        "environment": environment,
        "default_text": default_text,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Configuration:
    """Everything that is set for the life of the process."""

    model_id: str | None = _property(
        None,
        text,
        "The weights: a folder, a model id of the Hugging Face hub, or s3://bucket/prefix.",
        example="google/flan-t5-xl",
        environment=("HF_MODEL_ID",),
        default_text="the model folder",
    )
    revision: str | None = _property(
        None, text, "Branch, tag or commit of a model id.", example="main"
    )
    s3url: str | None = _property(
        None,
        text,
        "The weights, in S3; the same as model_id with such an address.",
        example="s3://my-bucket/flan-t5-xxl/",
    )
    backend: str = _property(
        "auto",
        choice(*BACKENDS),
        "The engine that computes; auto takes the fastest that serves this model here.",
        example="transformers",
    )
    dtype: str = _property(
        "auto",
        _dtype,
        "Number format of the weights. auto: bf16 on GPUs of compute capability 8.0 and up, fp16 "
        "on older ones, fp32 on CPUs and on the fastertransformer wheel. int8 quantizes the "
        "weights; int4 is not in this version.",
        example="bf16",
        aliases=("quantize",),
    )
    tensor_parallel_degree: Degree = _property(
        1,
        degree,
        'GPUs that share the model; "max" takes all that the worker is given. Under MPI it must be '
        "the number of ranks. On a CPU: processes that share it. See docs/tensor-parallel.md.",
        example="4",
        environment=("TENSOR_PARALLEL_DEGREE",),
    )
    pipeline_parallel_degree: int = _property(
        1, integer(1), "Groups of layers on different GPUs.", example="1"
    )
    max_rows: int | None = _property(
        None,
        integer(1),
        "Texts generated at the same time.",
        example="32",
        aliases=("max_rolling_batch_size",),
        default_text=f"{MAX_ROWS_ON_CPU} on CPUs, {MAX_ROWS_ON_GPU} on GPUs",
    )
    max_input_tokens: int = _property(
        1024,
        integer(1),
        "Longest input; a longer one is refused unless the request sets truncate.",
        example="2048",
    )
    max_output_tokens: int = _property(
        512, integer(1), "Most tokens a request may ask for.", example="256"
    )
    response_schema: str = _property(
        "outputs",
        choice("outputs", "lmi", "tgi"),
        'Form of an answer: {"outputs": [...]}, LMI\'s {"generated_text": ...}, or LMI\'s in a '
        "list as TGI has it.",
        example="lmi",
    )
    request_timeout: float = _property(
        55.0,
        seconds,
        "Seconds until a request is answered 504; SageMaker itself gives up after 60. MPI ranks "
        "wait for DJLServing's predict_timeout instead.",
        example="20",
    )
    max_queue: int = _property(
        1000, integer(1), "Waiting prompts beyond which requests are answered 503.", example="200"
    )
    encoder_cache: int = _property(
        256,
        integer(0),
        "MiB of encoded prompts that are kept, so that a prompt that comes again is not encoded "
        "again; 0 is off. Same answers with and without.",
        example="1024",
    )
    prompt_template: str = _property(
        "{input}",
        template,
        "Put around every input. A request's variables fill other names in braces, and its own "
        "template takes this one's place; {{ and }} stand for braces.",
        example="Summarize: {input}",
    )
    merge_adapter: str | None = _property(
        None,
        text,
        "A peft LoRA adapter that is merged into the weights at load: a folder, a model id of the "
        "hub, or s3://bucket/prefix.",
        example="adapter/",
    )
    cache_dir: str | None = _property(
        None,
        text,
        "Where downloaded models and built graphs are kept.",
        example="/tmp/models",
        default_text="graphs beside the model, else in the user's cache (~/.cache/djl-t5-handler); "
        "downloads from S3 in the user's cache, those from the hub in the Hugging Face cache",
    )
    cpu_kernel: str = _property(
        "auto",
        choice("auto", "per_batch"),
        "auto: one weight form for the life of the process, so that an answer never depends on "
        "what else is running; per_batch: the faster one for each batch size.",
        example="auto",
    )
    threads: int | None = _property(
        None,
        integer(1),
        "CPU threads of the engine.",
        example="8",
        default_text="the cores that the process may use",
    )
    strict_dtype: bool = _property(
        False,
        boolean,
        "Refuse a dtype that is known to spoil this model's answers, instead of warning.",
        example="true",
    )
    trust_remote_code: bool = _property(
        False, boolean, "Run Python code that comes with a checkpoint.", example="true"
    )
    log_prompts: bool = _property(
        False, boolean, "Write prompts and answers to the log.", example="true"
    )
    enable_streaming: bool = _property(
        False,
        streaming,
        "On the fastertransformer wheel under engine=Python: get texts piece by piece. The other "
        "engines always do.",
        example="true",
    )
    save_mp_checkpoint_path: str | None = _property(
        None,
        text,
        "The folder that DJLServing's partition command writes.",
        example="/opt/ml/model-partitioned",
    )
    model_path_on_host: str = _property(
        "/opt/ml/model",
        text,
        "Partitioning for FasterTransformer: the folder from which the result will be served. "
        "Loaded from another one, it would be converted again.",
        example="/models/flan-t5-xxl",
    )
    use_passive_workers: bool | None = _property(
        None,
        boolean,
        "DJLServing's own: under MPI its requests reach rank 0 alone. false: every rank gets each "
        "of them, which the fastertransformer wheel needs; backend torch streams nothing then.",
        example="true",
        default_text="true where DJLServing has it (0.33 and newer)",
    )
    # Set by DJLServing itself, not by people.
    model_dir: str | None = _property(None, text, "The unpacked model folder.", example="/opt/m")
    device_id: int | None = _property(
        None, integer(-1), "The worker's GPU; -1 is the CPU.", example="0"
    )


PROPERTIES = {f.name: f for f in fields(Configuration)}
"""name -> dataclass field; field.metadata has convert, meaning, example, aliases, environment."""

_CANONICAL = {
    accepted: name for name, f in PROPERTIES.items() for accepted in (name, *f.metadata["aliases"])
}
_FOLDED = {accepted.lower(): name for accepted, name in _CANONICAL.items()}

# Names that DJLServing or its other handlers own. They are let through without a warning, however
# much they look like one of ours.
DJL_OWNED = frozenset(
    """
    async_mode batch_size chunked_read_timeout cluster_size device_map draft_model_id enable_lora
    enable_venv engine entrypoint env gpu_id handler input_formatter job_queue_size
    load_on_devices log_request_metric low_cpu_mem_usage max_batch_delay max_idle_time max_input_len
    max_lora_rank max_loras max_num_tokens max_rolling_batch_prefill_tokens max_tokens maxworkers
    metric_dimension minworkers model_id_or_path model_loading_timeout model_name model_url
    model_version modelname mpi_mode output_formatter parallel_loading partition_handler
    predict_timeout pythonexecutable request_tracking_id requestid retry_threshold rolling_batch
    speculative_draft_model task tgi_compat tokenizer tokenizer_revision
    waiting_steps
    """.split()
)


def canonical_name(name: str) -> str | None:
    """The property that ``name`` means, in any case or as an alias, or None."""
    return _FOLDED.get(name.lower())


def read_configuration(
    *,
    command_line: Mapping[str, Any] | None = None,
    properties: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Configuration:
    """Merge the three sources: the command line wins over properties, they over the environment.

    ``properties`` are those of serving.properties, with or without the prefix ``option.``, as DJL
    hands them over. Raises LoadError naming the property, the value seen and what is allowed.
    """
    merged: dict[str, Any] = {}
    for source in (
        _from_environment(environment or {}),
        _by_canonical_name(properties or {}, "option.{}"),
        _by_canonical_name(command_line or {}, "--option {}"),
    ):
        merged.update(source)
    return Configuration(**merged)


def serving_properties(folder: Path) -> dict[str, str]:
    """A model folder's serving.properties as Java reads it; none without one. Raises LoadError."""
    file = folder / "serving.properties"
    if not file.is_file():
        return {}
    import javaproperties

    try:
        with file.open("rb") as stream:
            return dict(javaproperties.load(stream))
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} cannot be read: {error}") from error


def without_djls_own(
    properties: Mapping[str, Any], environment: Mapping[str, str]
) -> Mapping[str, Any]:
    """DJLServing's properties less the one that it makes up.

    0.27 and newer add max_rolling_batch_size=32 to every model with a config.json: unless
    serving.properties or the environment has it, nobody asked for it.
    """
    name = "max_rolling_batch_size"
    if str(properties.get(name)) != "32" or f"OPTION_{name}".upper() in environment:
        return properties
    file = Path(str(properties.get("model_dir", ""))) / "serving.properties"
    try:
        written = file.read_text(encoding="latin-1")
    except OSError:
        written = ""
    if re.search(rf"^\s*option\.{name}\s*[=: ]", written, re.MULTILINE):
        return properties
    return {key: value for key, value in properties.items() if key != name}


def configuration_of(model: str, **options: Any) -> Configuration:
    """The Configuration that init_inference's arguments stand for. Raises LoadError."""
    for name in options:
        if name not in _CANONICAL:
            hint = nearest(name, _CANONICAL)
            raise LoadError(
                f"unknown option {name!r}" + (f"; did you mean {hint!r}?" if hint else "")
            )
    return Configuration(**_by_canonical_name({"model_id": model, **options}, "{}"))


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values = {
        f.name: environment[variable]
        for f in PROPERTIES.values()
        for variable in f.metadata["environment"]
        if environment.get(variable)
    }
    found = _by_canonical_name(values, "{}")
    options = {k[len("OPTION_") :]: v for k, v in environment.items() if k.startswith("OPTION_")}
    found.update(_by_canonical_name(options, "OPTION_{}"))
    return found


def _by_canonical_name(source: Mapping[str, Any], written_as: str) -> dict[str, Any]:
    """Convert one source's values; ``written_as`` is how errors name a property of this source."""
    values: dict[str, Any] = {}
    written: dict[str, str] = {}
    for key, value in source.items():
        bare = key.removeprefix("option.")
        name = canonical_name(bare)
        if name is None:
            _warn_if_misspelt(bare, written_as)
            continue
        if value is None or value == "":
            continue
        place = written_as.format(bare)
        converted = _converted(name, bare, value, place)
        if name in values and values[name] != converted:
            raise LoadError(
                f"{written[name]}={values[name]} and {place}={converted} mean the same property "
                "and differ; set one of them"
            )
        values[name], written[name] = converted, place
    return values


def _converted(name: str, written: str, value: Any, place: str) -> Any:
    try:
        converted = PROPERTIES[name].metadata["convert"](value)
        if written == "quantize" and converted not in ("int8", "int4"):
            raise Refused("int8 or int4")
    except Refused as refused:
        raise LoadError(f"{place} must be {refused}, got {shown(value)}") from None
    return converted


def _warn_if_misspelt(bare: str, written_as: str) -> None:
    if bare.lower() in DJL_OWNED:
        return
    hint = nearest(bare, _CANONICAL)
    if hint:
        logger.warning(
            "%s is not a property of this handler and has no effect; did you mean %s?",
            written_as.format(bare),
            hint,
        )
