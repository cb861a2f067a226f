"""ONNX Runtime sessions that share one thread pool and one arena; bindings to numpy's memory."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime

from handler.errors import LoadError

logger = logging.getLogger(__name__)

_PROVIDERS = ["CPUExecutionProvider"]
_pool_lock = threading.Lock()
_pool_threads = 0


def use_threads(threads: int) -> None:
    """Size the pool that all sessions of the process share. The first call decides."""
    global _pool_threads
    with _pool_lock:
        if not _pool_threads:
            onnxruntime.set_global_thread_pool_sizes(threads, 1)
            memory = onnxruntime.OrtMemoryInfo(
                "Cpu",
                onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
                0,
                onnxruntime.OrtMemType.DEFAULT,
            )
            onnxruntime.create_and_register_allocator(memory, None)
            _pool_threads = threads
        elif threads != _pool_threads:
            logger.warning(
                "option.threads=%s has no effect: the process already runs %s threads, set by the "
                "first model",
                threads,
                _pool_threads,
            )


def threads_in_use() -> int:
    return _pool_threads


def open_session(model: Path | bytes) -> onnxruntime.InferenceSession:
    """Raises LoadError where ONNX Runtime cannot read the graph."""
    options = onnxruntime.SessionOptions()
    # Sessions run one after the other: pools of their own would spin against each other.
    options.use_per_session_threads = False
    # And arenas of their own would each keep what a long prompt once took.
    options.add_session_config_entry("session.use_env_allocators", "1")
    # What a step needs varies with its rows; patterns kept for every shape would only grow.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=_PROVIDERS)
    except Exception as error:  # the library's exceptions have no common base
        raise LoadError(f"ONNX Runtime cannot load {model!r}: {error}") from error


class Binding:
    """A session's inputs and outputs in the memory of numpy arrays, without copies.

    Arrays must be contiguous; the binding keeps those that it holds now alive.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def input(self, name: str, array: npt.NDArray[Any]) -> None:
        self._arrays[name] = array
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def output(self, name: str, array: npt.NDArray[Any]) -> None:
        self._arrays[name] = array
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)
