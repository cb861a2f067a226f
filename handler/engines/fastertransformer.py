"""T5 on the ``fastertransformer`` wheel, which exists in the LMI images 0.21 to 0.24 only.

The wheel has two objects. Its own runs in this process, under MPI in one process per GPU, and tells
token ids. Triton's (``use_triton``, from 0.22 on) starts processes for the GPUs itself and tells
texts. DJLServing's ``engine=FasterTransformer`` means the first, ``engine=Python`` the second.
"""

from __future__ import annotations

import logging
import operator
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.checkpoints.partitioned import read_partition
from handler.config import MAX_ROWS_ON_GPU, Configuration
from handler.engines.fastertransformer_loading import (
    accepts,
    degrees,
    init_inference,
    quality_warning,
    refusal,
)
from handler.engines.token_lists import padded, word_list
from handler.errors import LoadError, RequestError, shown
from handler.generation import Generation
from handler.parameters import GenerationParameters
from handler.ranks import agreed_seed, end_with_parent, world_of
from handler.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

# The widest top-k kernel; FasterTransformer cuts a larger k with no more than a warning.
_LARGEST_TOP_K = 1024

_OF_BOTH_OBJECTS = frozenset(
    """
    max_new_tokens min_new_tokens do_sample temperature top_k top_p num_beams length_penalty seed
    repetition_penalty presence_penalty stop_sequences return_full_text ignore_eos_token
    """.split()
)
# These need token ids, or the prompt as ids.
SUPPORTED_PARAMETERS = _OF_BOTH_OBJECTS | {"bad_words_list", "details", "truncate"}

# What one call of the wheel has for all of its rows; the rest is done per request.
_SHARED_BY_A_CALL = operator.attrgetter(
    "max_new_tokens",
    "min_new_tokens",
    "samples",
    "temperature",
    "top_k",
    "top_p",
    "num_beams",
    "length_penalty",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "stop_sequences",
    "bad_words_list",
    "ignore_eos_token",
)

# Our parameters -> the wheel's. len_penalty has our meaning: a beam's log-probability is divided by
# length ** len_penalty (apply_length_penalty in beam_search_topk_kernels.cu), the default differs.
_ARGUMENTS: dict[str, Callable[[GenerationParameters], Any]] = {
    "beam_width": lambda p: p.num_beams,
    "min_length": lambda p: p.max_new_tokens if p.ignore_eos_token else p.min_new_tokens,
    "len_penalty": lambda p: p.length_penalty,
    "temperature": lambda p: p.temperature if p.samples else 1.0,
    # top_k 0 with top_p 0.0 would be greedy (setup_topk_runtime_args in TopKSamplingLayer.cu)
    "top_k": lambda p: p.top_k if p.samples else 1,
    "top_p": lambda p: (p.top_p or 1.0) if p.samples else 0.0,
    # One of the two, the other absent: the wheel refuses both, its default of 1.0 among them.
    "repetition_penalty": lambda p: None if p.presence_penalty else p.repetition_penalty,
    # Subtracted after the logits were divided by the temperature; ours is before that.
    "presence_penalty": lambda p: (
        p.presence_penalty / (p.temperature if p.samples else 1.0) or None
    ),
}
_OF_TRITON = {"top_k": "runtime_top_k", "top_p": "runtime_top_p"}


class FasterTransformerEngine:
    """See BatchEngine. One call of the wheel for requests that ask for the same.

    Every row of a call draws the numbers that the call's seed gives (curandInitialize in
    sampling_topk_kernels.cu), so equal seeds may share a call. Requests without a seed share one,
    too, unless their prompts are equal: these would get equal texts.
    """

    name = "fastertransformer"
    scores = False
    draws_seeds = True

    def __init__(self, folder: Path, c: Configuration, *, ready_made: bool) -> None:
        """ready_made: it was partitioned for the wheel."""
        world = world_of()
        architecture = T5Architecture.from_config(model_config(folder))
        self.quality_warning: str | None = None
        self._uses_triton = not world.by_mpirun and accepts("use_triton")
        self._streams = c.enable_streaming
        if self._streams and not self._uses_triton:
            raise LoadError(
                "option.enable_streaming=true needs Triton: set engine=Python, on an image of 0.22 "
                "or newer, or unset it"
            )
        tensor, pipeline = degrees(
            c, architecture, world, uses_triton=self._uses_triton, ready_made=ready_made
        )
        self.supported_parameters = _OF_BOTH_OBJECTS if self._uses_triton else SUPPORTED_PARAMETERS
        self.max_rows = c.max_rows or MAX_ROWS_ON_GPU
        self.tokenizer = load_tokenizer(folder, architecture.vocab_size)
        # ids that stand for no token: T5's vocabulary is padded from 32100 to 32128
        self._padding = [[i] for i in range(self.tokenizer.size, architecture.vocab_size)]
        if world.by_mpirun:
            end_with_parent()
        self.seeds = random.Random(agreed_seed(world))
        arguments: dict[str, Any] = {"dtype": "fp32" if c.dtype == "auto" else c.dtype}
        if self._uses_triton:
            arguments |= {"use_triton": True, "do_streaming": self._streams}
        self._model = init_inference(folder, tensor, pipeline, arguments)

    def batch_key(self, generation: Generation) -> Hashable | None:
        return _SHARED_BY_A_CALL(generation.parameters)

    def generate(self, batch: Sequence[Generation]) -> None:
        parameters = batch[0].parameters
        _refuse(parameters, self._uses_triton, self._streams)
        without_seed = parameters.samples and parameters.seed is None
        for part in _without_twins(batch) if without_seed else [batch]:
            arguments = {name: of(parameters) for name, of in _ARGUMENTS.items()}
            if parameters.samples:
                seed = self.seeds.getrandbits(64) if without_seed else parameters.seed
                arguments["random_seed"] = seed
                for generation in part:
                    generation.seed = seed
            if self._uses_triton:
                self._call_triton(part, arguments)
            else:
                self._call(part, arguments)

    def close(self) -> None:
        del self._model

    def _call(self, batch: Sequence[Generation], arguments: dict[str, Any]) -> None:
        """The wheel's own object: ids [rows, beams, max_seq_len] and lengths [rows, beams]."""
        p = batch[0].parameters
        if "random_seed" in arguments:  # a signed one, of which the wheel reads the bits
            arguments["random_seed"] -= (arguments["random_seed"] >> 63) << 64
        ids, lengths = self._model.generate(
            self._tokens([g.prompt_ids for g in batch]),
            max_seq_len=p.max_new_tokens,
            bad_words_list=_on_gpu([*batch[0].bad_words, *self._padding], len(batch)),
            stop_words_list=_on_gpu(_stops_as_ids(p), len(batch)),
            **arguments,
        )
        for row, generation in enumerate(batch):
            tokens = ids[row][0][: int(lengths[row][0])].tolist()
            # whether the length counts the closing </s> is not for us to know
            for token_id in (*tokens, self.tokenizer.eos_token_id):
                if generation.done or generation.append(token_id, None):
                    break

    def _call_triton(self, batch: Sequence[Generation], arguments: dict[str, Any]) -> None:
        """Triton's object: texts, or pieces of them."""
        inputs = [g.prompt for g in batch]
        lengths = [g.parameters.max_new_tokens for g in batch]
        arguments = {
            _OF_TRITON.get(name, name): value
            for name, value in arguments.items()
            if value is not None
        }
        pieces: Iterator[list[str]]
        if self._streams:
            pieces = self._model.stream_generate(inputs, lengths, **arguments)
        else:
            pieces = iter([self._model.pipeline_generate(inputs, lengths, **arguments)])
        for texts in pieces:
            for generation, text in zip(batch, texts):
                if not generation.done:
                    generation.append_text(text, last=False)
        for generation in batch:
            if not generation.done:
                generation.append_text("", last=True)

    def _tokens(self, prompts: Sequence[Sequence[int]]) -> Any:
        """What the wheel's own tokenizer would give it."""
        import torch
        from transformers import BatchEncoding

        ids, mask = padded(prompts, self.tokenizer.pad_token_id)
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})


def _refuse(p: GenerationParameters, uses_triton: bool, streams: bool) -> None:
    """Raises RequestError for what the wheel would do otherwise than it was asked."""
    if uses_triton and _stops_as_ids(p):
        raise RequestError(
            "parameter 'stop_sequences' must be texts on backend fastertransformer under "
            f"engine=Python, got token ids {shown(_stops_as_ids(p)[0])}"
        )
    if streams and p.num_beams > 1:
        raise RequestError(
            f"parameter 'num_beams' must be 1 with option.enable_streaming=true, got {p.num_beams}"
        )
    if p.presence_penalty and p.repetition_penalty != 1.0:
        raise RequestError(
            "parameters 'presence_penalty' and 'repetition_penalty' cannot be combined by backend "
            f"fastertransformer, got {p.presence_penalty:g} and {p.repetition_penalty:g}; send one "
            "of them"
        )
    if p.samples and p.num_beams > 1:
        raise RequestError(
            "parameter 'num_beams' must be 1 when the request samples on backend "
            f"fastertransformer, got {p.num_beams}"
        )
    if p.samples and p.top_k > _LARGEST_TOP_K:
        raise RequestError(
            f"parameter 'top_k' must be at most {_LARGEST_TOP_K} on backend fastertransformer, got "
            f"{p.top_k}"
        )


def _stops_as_ids(p: GenerationParameters) -> list[tuple[int, ...]]:
    """Stop sequences given as ids, at which the wheel can end; texts are found afterwards."""
    return [stop for stop in p.stop_sequences if not isinstance(stop, str)]


def _on_gpu(words: Sequence[Sequence[int]], rows: int) -> Any:
    """A word list for each row, [rows, 2, ids], where the wheel's kernels read; None for none."""
    import torch

    if not words:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.tensor([word_list(words)] * rows, dtype=torch.int32, device=device)


def _without_twins(batch: Sequence[Generation]) -> list[list[Generation]]:
    """The batch in parts, in none of which a prompt occurs twice."""
    parts: list[dict[tuple[int, ...], Generation]] = []
    for generation in batch:
        prompt = tuple(generation.prompt_ids)
        part = next((part for part in parts if prompt not in part), None)
        if part is None:
            parts.append(part := {})
        part[prompt] = generation
    return [list(part.values()) for part in parts]


def load(folder: Path, configuration: Configuration) -> FasterTransformerEngine:
    """The engine on the checkpoint in ``folder``. Raises LoadError."""
    config = model_config(folder)
    ready_made = read_partition(folder) is not None
    refused = refusal(config, configuration, ready_made=ready_made)
    if refused:
        raise LoadError(refused)
    warning = quality_warning(config, configuration)
    if warning and configuration.strict_dtype:
        raise LoadError(warning)
    if warning:
        logger.warning("%s", warning)
    try:
        import fastertransformer  # noqa: F401
    except ImportError as error:
        raise LoadError(
            "option.backend=fastertransformer needs the package fastertransformer, which only the "
            f"LMI images 0.21 to 0.24 named fastertransformer have: {error}"
        ) from error
    engine = FasterTransformerEngine(folder, configuration, ready_made=ready_made)
    engine.quality_warning = warning
    return engine
