"""DJLServing looks for model.py in a model folder; the work is done in the package beside it."""

from handler.model import handle, partition

__all__ = ["handle", "partition"]
