"""Any sequence-to-sequence model, through transformers' ``generate``.

Slow beside the other engines, but it runs every architecture that transformers has, on whatever
torch runs on, and spreads a model over several GPUs with Accelerate.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handler.checkpoints.find import model_config
from handler.config import MAX_ROWS_ON_CPU, MAX_ROWS_ON_GPU, Configuration
from handler.engines.hf_loading import (
    load_any_tokenizer,
    load_model,
    refuse_unsupported,
    token_rules,
)
from handler.engines.protocol import BatchEngine
from handler.engines.token_lists import padded
from handler.errors import LoadError
from handler.generation import Generation
from handler.machine import usable_cpus
from handler.parameters import GenerationParameters, random_seed

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SUPPORTED_PARAMETERS = frozenset(
    """
    max_new_tokens min_new_tokens do_sample temperature top_k top_p typical_p num_beams
    length_penalty early_stopping seed repetition_penalty no_repeat_ngram_size stop_sequences
    bad_words_list details return_log_probs return_full_text truncate ignore_eos_token
    """.split()
)
# Older ones cannot stop single rows (4.39), nor were they tried.
_OLDEST = (4, 44)
# What a batch of greedy or beam searches must agree on; the rest is done per request.
_SHARED_BY_A_BATCH = operator.attrgetter(
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_list",
    "ignore_eos_token",
)


class HfGenerateEngine:
    """See BatchEngine. One ``generate`` call a batch; sampled requests run by themselves, so that
    their seed alone decides their text."""

    name = "transformers"
    quality_warning = None
    supported_parameters = SUPPORTED_PARAMETERS
    draws_seeds = False

    def __init__(self, folder: Path, configuration: Configuration) -> None:
        import torch

        refuse_unsupported(configuration)
        on_gpu = torch.cuda.is_available() and configuration.device_id != -1
        config = model_config(folder)
        if not on_gpu:  # DJLServing's start script sets OMP_NUM_THREADS=1
            torch.set_num_threads(configuration.threads or usable_cpus())
        self.max_rows = configuration.max_rows or (MAX_ROWS_ON_GPU if on_gpu else MAX_ROWS_ON_CPU)
        self._model = load_model(folder, config, configuration, on_gpu)
        self.tokenizer = load_any_tokenizer(folder, config, configuration.trust_remote_code)
        self._model.generation_config = token_rules(self._model, self.tokenizer)
        # transformers' cache takes the encoder's layers for the decoder's: it fails where those
        # are more
        layers = config.get("num_layers", 0)
        self._use_cache = config.get("num_decoder_layers", layers) <= layers

    def batch_key(self, parameters: GenerationParameters) -> Hashable | None:
        return None if parameters.samples else _SHARED_BY_A_BATCH(parameters)

    def generate(self, batch: Sequence[Generation]) -> None:
        import torch

        parameters = batch[0].parameters
        input_ids, attention_mask = self._padded([g.prompt_ids for g in batch])
        if parameters.samples:
            torch.manual_seed(random_seed() if parameters.seed is None else parameters.seed)
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "use_cache": self._use_cache,
            **self._generate_arguments(parameters, batch[0].bad_words),
        }
        with torch.inference_mode():
            if parameters.num_beams == 1:
                self._generate_step_by_step(batch, arguments)
            else:
                texts = self._generate_beams(batch, arguments)
                self._append_scored(batch, input_ids, attention_mask, texts)

    def close(self) -> None:
        del self._model

    def _generate_step_by_step(
        self, batch: Sequence[Generation], arguments: dict[str, Any]
    ) -> None:
        """Hand over each token as it is chosen, with its log-probability before any filter."""
        from transformers import StoppingCriteriaList

        logits: list[torch.Tensor] = []

        def keep_logits(module: Any, inputs: Any, output: Any) -> None:
            logits[:] = [output.logits[:, -1].float()]

        hook = self._model.register_forward_hook(keep_logits)
        try:
            self._model.generate(
                stopping_criteria=StoppingCriteriaList([_HandOver(batch, logits)]), **arguments
            )
        finally:
            hook.remove()

    def _generate_beams(
        self, batch: Sequence[Generation], arguments: dict[str, Any]
    ) -> torch.Tensor:
        """[rows, steps + 1], beginning with the decoder's start token; ends early when nobody
        waits for any of the batch."""
        import torch
        from transformers import StoppingCriteriaList

        def nobody_waits(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full(
                input_ids.shape[:1], all(g.done for g in batch), device=input_ids.device
            )

        criteria = StoppingCriteriaList([nobody_waits])
        texts: torch.Tensor = self._model.generate(stopping_criteria=criteria, **arguments)
        return texts

    def _append_scored(
        self,
        batch: Sequence[Generation],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        texts: torch.Tensor,
    ) -> None:
        """Hand over finished beams; their log-probabilities take one more forward pass.

        texts: [rows, steps + 1], beginning with the decoder's start token.
        """
        import torch

        output = self._model(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=texts[:, :-1]
        )
        log_probs = torch.log_softmax(output.logits.float(), dim=-1)
        chosen = log_probs.gather(-1, texts[:, 1:, None]).squeeze(-1).tolist()
        for row, generation in enumerate(batch):
            for token_id, log_prob in zip(texts[row, 1:].tolist(), chosen[row]):
                if generation.done or generation.append(token_id, log_prob):
                    break

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and attention_mask, [rows, longest prompt]."""
        import torch

        ids, mask = padded(prompts, self.tokenizer.pad_token_id)
        device = self._model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _generate_arguments(
        self, p: GenerationParameters, bad_words: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        """Our parameters as ``generate`` names them."""
        arguments: dict[str, Any] = {
            "max_new_tokens": p.max_new_tokens,
            "min_new_tokens": p.max_new_tokens if p.ignore_eos_token else p.min_new_tokens or None,
            "do_sample": p.samples,
            "num_beams": p.num_beams,
            "repetition_penalty": p.repetition_penalty,
            "no_repeat_ngram_size": p.no_repeat_ngram_size,
        }
        if bad_words:
            of_the_model = self._model.generation_config.bad_words_ids or []
            arguments["bad_words_ids"] = [*of_the_model, *map(list, bad_words)]
        if p.samples:
            arguments["temperature"] = p.temperature
            arguments["top_k"] = p.top_k
            arguments["top_p"] = p.top_p or 1.0
            arguments["typical_p"] = p.typical_p or 1.0
        if p.num_beams > 1:
            arguments["length_penalty"] = p.length_penalty
            arguments["early_stopping"] = p.early_stopping
        return arguments


class _HandOver:
    """A stopping criterion that gives each new token to its generation and stops the done rows."""

    def __init__(self, batch: Sequence[Generation], logits: list[torch.Tensor]) -> None:
        self._batch = batch
        self._logits = logits

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """input_ids: [rows, steps so far]. Returns [rows] booleans: done."""
        import torch

        tokens = input_ids[:, -1]
        logits = self._logits[0]
        chosen = logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)
        rows = zip(self._batch, tokens.tolist(), chosen.tolist())
        done = [g.done or g.append(token_id, log_prob) for g, token_id, log_prob in rows]
        return torch.tensor(done, device=input_ids.device)


def load(folder: Path, configuration: Configuration) -> BatchEngine:
    """The engine on the checkpoint in ``folder``. Raises LoadError."""
    try:
        import transformers
    except ImportError as error:
        raise LoadError(
            f"option.backend=transformers needs the packages torch and transformers: {error}"
        ) from error
    version = transformers.__version__
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        raise LoadError(
            f"option.backend=transformers needs transformers {'.'.join(map(str, _OLDEST))} or "
            f"newer, this image has {version}; take a newer image or another option.backend"
        )
    return HfGenerateEngine(folder, configuration)
