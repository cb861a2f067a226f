#!/usr/bin/env python3
"""Write docs/properties.md and docs/parameters.md from the tables in the code.

python docs/generate.py            write them
python docs/generate.py --check    exit status 1 if they are not what the code says
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from handler.config import PROPERTIES
from handler.engines.fastertransformer import SUPPORTED_PARAMETERS as OF_FASTERTRANSFORMER
from handler.engines.hf_generate import SUPPORTED_PARAMETERS as OF_TRANSFORMERS
from handler.inference import SUPPORTED_PARAMETERS as OF_EVERY_BACKEND
from handler.parameters import PARAMETERS
from handler.scheduler import SUPPORTED_PARAMETERS as OF_SCHEDULER

HERE = Path(__file__).resolve().parent

_DEFAULT_WORDS = {(): "none", None: "none"}
_SET_BY_DJL = ("model_dir", "device_id")

PROPERTIES_HEAD = """\
# Properties

<!-- Written by docs/generate.py from handler/config.py. -->

Set for the life of the process: as `option.NAME=value` in serving.properties, as `OPTION_NAME` in
the environment, or as `--option NAME=value` on the command line. The command line wins over
serving.properties, and that over the environment. A value that is not allowed stops the start with
one line that says what is. So does an unknown name on the command line; elsewhere one that
resembles one of these is a warning. Names that DJLServing owns are let through.

They are read from DJLServing's first (empty) call only. Headers of later calls never change them.

| property | default | example | meaning |
|---|---|---|---|
"""

PARAMETERS_HEAD = """\
# Generation parameters

<!-- Written by docs/generate.py from handler/parameters.py. -->

Sent with a request, in `parameters`. All names in the first column mean the first one; `null` means
absent. An unknown name is a 400 that names the nearest known one. A parameter that the engine does
not honour is a 400 too, never ignored: the last column tells which engines do. The formulas, and
the order in which they apply, are in [sampling.md](sampling.md).

| parameter (also as) | default | allowed | example | meaning | backends |
|---|---|---|---|---|---|
"""


def properties() -> str:
    rows = []
    for name, field in PROPERTIES.items():
        if name in _SET_BY_DJL:
            continue
        m = field.metadata
        others = [f"`{alias}`" for alias in m["aliases"]] + [f"env `{v}`" for v in m["environment"]]
        default = m["default_text"] or _code("" if field.default is None else field.default)
        rows.append(
            f"| `{name}`{_in_brackets(others)} | {default or 'unset'} | "
            f"`option.{name}={m['example']}` | {m['meaning']} |"
        )
    return PROPERTIES_HEAD + "\n".join(rows) + "\n"


def parameters() -> str:
    rows = []
    for name, field in PARAMETERS.items():
        m = field.metadata
        words = {**_DEFAULT_WORDS, None: "random"} if name == "seed" else _DEFAULT_WORDS
        default = words.get(field.default) or _code(json.dumps(field.default))
        others = _in_brackets([f"`{alias}`" for alias in m["aliases"]])
        engines = [
            backend
            for backend, supported in (
                ("fastertransformer", OF_FASTERTRANSFORMER),
                ("onnxruntime, torch", OF_SCHEDULER),
                ("transformers", OF_TRANSFORMERS),
            )
            if name in supported or name in OF_EVERY_BACKEND
        ]
        rows.append(
            f"| `{name}`{others} | {default} | {m['allowed']} | "
            f"`{json.dumps({name: m['example']})}` | {m['meaning']} | "
            f"{', '.join(engines) or 'none yet'} |"
        )
    return PARAMETERS_HEAD + "\n".join(rows) + "\n"


def _code(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text else ""


def _in_brackets(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


PAGES = {"properties.md": properties, "parameters.md": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [name for name, page in PAGES.items() if _read(HERE / name) != page()]
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python docs/generate.py")
    for name in stale:
        (HERE / name).write_text(PAGES[name](), encoding="utf-8")


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


if __name__ == "__main__":
    main()
