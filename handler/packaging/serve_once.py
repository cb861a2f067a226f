"""Run by python -c in a model folder, whose own handler it loads, for one request.

With that folder as working directory and on the path, as DJL runs its workers.

Arguments: the entry point; ours, or djl for DJL's service loader. Standard input: {"properties",
"body"}. The last line of standard output: {"answer", "loading", "answering"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    entry_point, door = sys.argv[1:]
    told = json.load(sys.stdin)
    told["properties"]["model_dir"] = os.getcwd()
    print(json.dumps((_djl if door == "djl" else _ours)(entry_point, told)))


def _ours(entry_point: str, told: dict[str, Any]) -> dict[str, Any]:
    import importlib.util

    from handler.config import read_configuration
    from handler.responses import Reply
    from handler.service import service

    # the entry point must import, though the request goes past it: its Input is DJL's
    if entry_point.endswith(".py"):
        spec = importlib.util.spec_from_file_location("entry_point", entry_point)
        assert spec
        assert spec.loader
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    else:
        importlib.import_module(entry_point)
    start = time.perf_counter()
    service.load(read_configuration(properties=told["properties"], environment=os.environ))
    loaded = time.perf_counter()
    reply = service.answer(told["body"].encode())
    done = time.perf_counter()
    service.close()
    assert isinstance(reply, Reply), reply  # nothing asked for a stream
    if reply.status != 200:
        raise SystemExit(f"answered {reply.status}: {reply.error}")
    return {
        "answer": reply.body.decode(),
        "loading": loaded - start,
        "answering": done - loaded,
    }


def _djl(entry_point: str, told: dict[str, Any]) -> dict[str, Any]:
    from djl_python.inputs import Input
    from djl_python.service_loader import load_model_service

    start = time.perf_counter()
    service = load_model_service(os.getcwd(), entry_point, "-1")
    first = Input()
    first.properties.update(told["properties"])
    service.invoke_handler("handle", first)
    loaded = time.perf_counter()
    inputs = Input()
    inputs.properties["content-type"] = "application/json"
    inputs.content.add(key="data", value=told["body"].encode())
    output = service.invoke_handler("handle", inputs)
    done = time.perf_counter()
    if output.code != 200:
        raise SystemExit(f"answered {output.code}: {output.message}")
    body = output.content.value_at(0)
    text = body if isinstance(body, str) else bytes(body).decode()
    return {"answer": text, "loading": loaded - start, "answering": done - loaded}


if __name__ == "__main__":
    main()
