"""DJLServing looks for model.py; the package handler beside it does the work."""

from handler.model import handle, partition

__all__ = ["handle", "partition"]
