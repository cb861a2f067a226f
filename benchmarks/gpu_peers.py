"""What gpu.py compares with: transformers in the ways it can decode, and CTranslate2."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peers import ctranslate2_spec

_EOS = 1
MakePeer = Callable[[Mapping[str, Any], torch.dtype, torch.device], "Peer"]


class Peer(Protocol):
    """serves: whether it is also measured under load."""

    serves: bool

    def generate(self, prompts: Sequence[Sequence[int]], tokens_out: int) -> None:
        """So many tokens for each of the prompts, greedily."""


class Transformers:
    """``arguments`` go to generate."""

    def __init__(
        self, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device, **arguments: Any
    ) -> None:
        self.serves = not arguments  # prompts of many lengths compile again and again
        self._arguments = arguments
        self._model = random_transformers(config, dtype, device)
        self._device = device

    def generate(self, prompts: Sequence[Sequence[int]], tokens_out: int) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts])
        mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts])
        with torch.inference_mode():
            texts = self._model.generate(
                ids.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=tokens_out,
                min_new_tokens=tokens_out,
                do_sample=False,
                num_beams=1,
                **self._arguments,
            )
        assert texts.shape == (len(prompts), tokens_out + 1)


class CTranslate2:
    serves = False

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        import ctranslate2

        form = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(dtype, "float32")
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder)
            _convert(config, dtype, target)
            self._translator = ctranslate2.Translator(
                str(target), device=device.type, compute_type=form
            )

    def generate(self, prompts: Sequence[Sequence[int]], tokens_out: int) -> None:
        words = [["</s>" if i == _EOS else f"w{i}" for i in ids] for ids in prompts]
        results = self._translator.translate_batch(
            words, beam_size=1, max_decoding_length=tokens_out, min_decoding_length=tokens_out
        )
        assert all(len(result.hypotheses[0]) == tokens_out for result in results)


def random_transformers(config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """T5 of this configuration, its numbers made on the device."""
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**config)).to(dtype)
    model = model.to_empty(device=device).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=1.0 if "shared" in name else parameter.shape[-1] ** -0.5)
    return model


def _convert(config: Mapping[str, Any], dtype: torch.dtype, target: Path) -> None:
    model = random_transformers(config, dtype, torch.device("cpu")).float()
    spec = ctranslate2_spec(model)
    spec.optimize(quantization="float16" if dtype == torch.float16 else None)
    spec.save(str(target))


def _with(**arguments: Any) -> Callable[..., Peer]:
    return lambda *a: Transformers(*a, **arguments)


PEERS: dict[str, MakePeer] = {
    "transformers": Transformers,
    "transformers-static": _with(cache_implementation="static", disable_compile=True),
    "transformers-compiled": _with(cache_implementation="static"),
    "ctranslate2": CTranslate2,
}
