"""The tensors of a T5 checkpoint: their names, their shapes, and whether a checkpoint has them."""

from __future__ import annotations

from collections.abc import Container, Iterator

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.read import Weights, check_shape
from handler.errors import LoadError

Shape = tuple[int, ...]

HEAD = "lm_head.weight"
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# An unused table that checkpoints of 2020 have; transformers passes over it, too.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def embedding_name(weights: Container[str]) -> str:
    """The one table of embeddings under whichever of its names the checkpoint was saved with."""
    return next((name for name in EMBEDDINGS if name in weights), EMBEDDINGS[0])


def head_name(weights: Container[str], a: T5Architecture) -> str:
    """The tensor that makes logits: lm_head.weight, or the embedding of a tied model."""
    return embedding_name(weights) if a.tied and HEAD not in weights else HEAD


def check_tensors(weights: Weights, a: T5Architecture) -> None:
    """Compare names and shapes with the architecture; reads no tensor.

    Raises LoadError for a tensor that is missing, misshapen, or unknown to the architecture.
    """
    table = (a.vocab_size, a.d_model)
    needed = {
        embedding_name(weights): table,
        head_name(weights, a): table,
        **dict(tensors_of_the_stacks(a)),
    }
    for name, shape in needed.items():
        check_shape(weights, name, shape)
    for name in weights:
        if name in EMBEDDINGS:
            check_shape(weights, name, table)
        elif name not in needed and name != _UNUSED:
            raise LoadError(
                f"{weights.file(name)}: tensor {name} has no place in the {a.model_type} that "
                "config.json describes; correct config.json or change option.model_id"
            )


def tensors_of_the_stacks(a: T5Architecture) -> Iterator[tuple[str, Shape]]:
    """(name, shape) of all but the embedding and the head."""
    for stack, layers in (("encoder", a.num_layers), ("decoder", a.num_decoder_layers)):
        yield f"{stack}.final_layer_norm.weight", (a.d_model,)
        for i in range(layers):
            for name, shape in _of_a_layer(a, stack, i):
                yield f"{stack}.block.{i}.layer.{name}.weight", shape


def _of_a_layer(a: T5Architecture, stack: str, i: int) -> Iterator[tuple[str, Shape]]:
    """Names below ``stack.block.i.layer``, without ``.weight``; linear weights are [out, in]."""
    yield from _of_an_attention(a, "0.SelfAttention")
    if i == 0 or a.bias_in_every_layer:
        yield "0.SelfAttention.relative_attention_bias", (a.num_buckets, a.num_heads)
    if stack == "decoder":
        yield from _of_an_attention(a, "1.EncDecAttention")
    last = 2 if stack == "decoder" else 1
    for number in range(last + 1):
        yield f"{number}.layer_norm", (a.d_model,)
    for name in ("wi_0", "wi_1") if a.gated else ("wi",):
        yield f"{last}.DenseReluDense.{name}", (a.d_ff, a.d_model)
    yield f"{last}.DenseReluDense.wo", (a.d_model, a.d_ff)


def _of_an_attention(a: T5Architecture, place: str) -> Iterator[tuple[str, Shape]]:
    inner = a.num_heads * a.d_kv
    for name in "qkv":
        yield f"{place}.{name}", (inner, a.d_model)
    yield f"{place}.o", (a.d_model, inner)
