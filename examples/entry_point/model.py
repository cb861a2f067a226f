"""A model.py of your own: ours answers, with a step before and a step after."""

from handler.errors import RequestError
from handler.model import partition, with_steps

__all__ = ["handle", "partition"]


def before(request):
    """Clients send a number; the model was trained on a sentence."""
    if not isinstance(request.get("number"), int):
        raise RequestError("the field 'number' must be an integer")
    return {"inputs": f"Write {request['number']} in words."}


def after(answer):
    return {"words": answer["outputs"][0].split()}


handle = with_steps(before, after)
