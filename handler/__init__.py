"""Serving T5-family models on DJLServing: the handler package that travels in a model tarball."""

__version__ = "0.1.0"
