"""serving.properties of an archive: the shipped one or the folder's own, with what was told."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from handler.config import (
    DJL_OWNED,
    PROPERTIES,
    Configuration,
    canonical_name,
    read_configuration,
)
from handler.errors import LoadError, nearest, shown
from handler.packaging.images import Image

if TYPE_CHECKING:
    from javaproperties import PropertiesFile

FILE = "serving.properties"
TEMPLATE = Path(__file__).with_name(FILE)
_SET_BY_DJL = ("model_dir", "device_id")
# DJLServing reads its own names as they are written here, and these without "option.".
_DJL_WITHOUT_PREFIX = {
    name.lower(): name
    for name in (
        *("engine", "batch_size", "max_batch_delay", "max_idle_time", "job_queue_size"),
        *("minWorkers", "maxWorkers", "load_on_devices"),
    )
}
_DJL_SPELLED = {name.lower(): name for name in ("entryPoint", "modelName", "pythonExecutable")}
_FIRST_WITH_ASYNC_MODE = (0, 33)


@dataclass(frozen=True)
class ServingProperties:
    """The file's text, and what the handler reads in it."""

    text: str
    configuration: Configuration

    @property
    def content(self) -> bytes:
        """The file's bytes: Java reads each as one character, and so did we."""
        return self.text.encode("latin-1")

    def without(self, *names: str) -> ServingProperties:
        """The same less some of our properties."""
        return _read(_edited(self.text, {}, [key for n in names for key in _keys_of(n)]))

    def but(self, **values: str) -> ServingProperties:
        """The same with other values of some of our properties."""
        return _read(_edited(self.text, {f"option.{n}": v for n, v in values.items()}, []))


def serving_properties(
    image: Image, options: Sequence[tuple[str, str]], own: Path | None = None
) -> ServingProperties:
    """What an archive for ``image`` gets. Raises LoadError.

    own: the model folder's serving.properties, taken in the place of the shipped one where it is
    there. options: (name, value), of ours or DJLServing's, which win over the file.
    """
    told: dict[str, str] = {}
    replaced: list[str] = []
    if own is not None and own.is_file():
        text = _text_of(own)
        _refuse_misspelt(own, _parsed(text))
    else:
        text = TEMPLATE.read_text(encoding="latin-1")
        told.update(_defaults_of(image))
    for name, value in options:
        key = written_key(name)
        told[key] = value
        replaced += _keys_of(name.removeprefix("option."))
    edited = _read(_edited(text, told, [key for key in replaced if key not in told]))
    _check(edited, image)
    return edited


def written_key(name: str) -> str:
    """How serving.properties spells the option. Raises LoadError where nobody knows it."""
    bare = name.removeprefix("option.")
    canonical, folded = canonical_name(bare), bare.lower()
    if canonical in _SET_BY_DJL:
        raise LoadError(f"--option {bare} is set by DJLServing itself; leave it out")
    if canonical is not None:
        return f"option.{canonical if folded != 'quantize' else folded}"
    if folded in _DJL_WITHOUT_PREFIX:
        return _DJL_WITHOUT_PREFIX[folded]
    if folded in DJL_OWNED:
        return f"option.{_DJL_SPELLED.get(folded, folded)}"
    hint = nearest(bare, _known())
    raise LoadError(
        f"--option {bare} is no property of this handler or of DJLServing"
        + (f"; did you mean {hint}?" if hint else "; docs/properties.md has all of them")
    )


def _known() -> Iterable[str]:
    aliases = (alias for f in PROPERTIES.values() for alias in f.metadata["aliases"])
    return [
        *(name for name in PROPERTIES if name not in _SET_BY_DJL),
        *aliases,
        *(_DJL_WITHOUT_PREFIX.get(n) or _DJL_SPELLED.get(n, n) for n in sorted(DJL_OWNED)),
    ]


def _defaults_of(image: Image) -> dict[str, str]:
    """Where an image wants something else than what is shipped for today's."""
    if image.name != "fastertransformer":
        return {}
    return {
        "engine": "FasterTransformer",
        "option.async_mode": "false",
        "option.model_loading_timeout": "3600",  # the wheel converts the checkpoint first
    }


def _keys_of(name: str) -> list[str]:
    """All that means our property ``name``."""
    canonical = canonical_name(name)
    if canonical is None:
        return []
    return [f"option.{n}" for n in (canonical, *PROPERTIES[canonical].metadata["aliases"])]


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="latin-1")
    except OSError as error:
        raise LoadError(f"{file} cannot be read: {error.strerror}") from error


def _parsed(text: str) -> PropertiesFile:
    from javaproperties import PropertiesFile

    try:
        return PropertiesFile.loads(text)
    except ValueError as error:
        raise LoadError(f"{FILE} cannot be read: {error}") from error


def _read(text: str) -> ServingProperties:
    return ServingProperties(text, read_configuration(properties=dict(_parsed(text).items())))


def _edited(text: str, told: Mapping[str, str], dropped: Iterable[str]) -> str:
    """``text`` with some lines changed, dropped or added; its comments stay."""
    parsed = _parsed(text)
    for key in dropped:
        parsed.pop(key, None)
    for key, value in told.items():
        if key in parsed:
            parsed[key] = value
    text = parsed.dumps()
    for key, value in told.items():
        if key not in parsed:
            text = _with_line(text, key, _line(key, value))
    return text


def _with_line(text: str, key: str, line: str) -> str:
    """In the place of the key's commented default, else at the end."""
    default = re.compile(rf"^#{re.escape(key)}=.*$", re.MULTILINE)
    if default.search(text):
        return default.sub(lambda _: line, text, count=1)
    return f"{text.rstrip()}\n\n{line}\n"


def _line(key: str, value: str) -> str:
    from javaproperties import join_key_value

    # in a value these may be escaped, and are easier to read as they are
    return re.sub(r"\\([:=#!])", r"\1", join_key_value(key, value))


def _refuse_misspelt(file: Path, properties: PropertiesFile) -> None:
    for key in properties:
        bare = key.removeprefix("option.")
        if canonical_name(bare) is None and bare.lower() not in DJL_OWNED:
            hint = nearest(bare, PROPERTIES)
            if hint:
                raise LoadError(f"{file}: {key} has no effect; did you mean option.{hint}?")


def _check(made: ServingProperties, image: Image) -> None:
    properties = dict(_parsed(made.text).items())
    asynchronous = properties.get("option.async_mode", "false").lower() == "true"
    batch = properties.get("batch_size", "1")
    if not batch.isdecimal() or int(batch) < 1:
        raise LoadError(f"batch_size must be an integer of at least 1, got {shown(batch)}")
    new = tuple(map(int, image.djl_version.split(".")[:2])) >= _FIRST_WITH_ASYNC_MODE
    if asynchronous and int(batch) > 1 and new:
        raise LoadError(
            f"batch_size={batch} and option.async_mode=true exclude each other: DJLServing would "
            "refuse every group of requests; set batch_size=1 or async_mode=false"
        )
