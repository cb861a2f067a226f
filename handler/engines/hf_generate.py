"""Any sequence-to-sequence model, through transformers' ``generate``.

Slow beside the other engines, but it runs every architecture that transformers has, on whatever
torch runs on, and spreads a model over several GPUs with Accelerate.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handler.checkpoints.find import model_config
from handler.config import MAX_ROWS_ON_CPU, MAX_ROWS_ON_GPU, Configuration
from handler.continuation import TopToken
from handler.engines.hf_loading import (
    load_any_tokenizer,
    load_model,
    refuse_unsupported,
    token_rules,
)
from handler.engines.hf_processors import (
    BeamEnds,
    BeamRules,
    CountPenalties,
    Forms,
    OneTextEach,
    sees_every_end,
)
from handler.engines.protocol import BatchEngine
from handler.engines.token_lists import padded
from handler.errors import LoadError, RequestError
from handler.generation import Generation, nothing_left, too_few_texts
from handler.machine import usable_cpus
from handler.parameters import GenerationParameters, random_seed

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SUPPORTED_PARAMETERS = frozenset(
    """
    max_new_tokens min_new_tokens do_sample temperature top_k top_p typical_p num_beams
    length_penalty early_stopping num_return_sequences seed repetition_penalty presence_penalty
    frequency_penalty no_repeat_ngram_size stop_sequences bad_words_list regex choices details
    return_log_probs top_n_tokens return_full_text truncate ignore_eos_token
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
    "num_return_sequences",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_list",
    "ignore_eos_token",
)
_SCORING = "scoring"  # the key of given texts: they are read together, whatever was asked for
_LOGITS_AT_A_TIME = 2**27  # numbers that reading texts may make at once: 512 MiB of fp32


class HfGenerateEngine:
    """See BatchEngine. One ``generate`` call a batch; sampled requests run by themselves, so that
    their seed alone decides their text."""

    name = "transformers"
    quality_warning = None
    supported_parameters = SUPPORTED_PARAMETERS
    scores = True
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

    def batch_key(self, generation: Generation) -> Hashable | None:
        if generation.forced:
            return _SCORING
        parameters = generation.parameters
        return None if parameters.samples else _SHARED_BY_A_BATCH(parameters)

    def generate(self, batch: Sequence[Generation]) -> None:
        import torch

        parameters = batch[0].parameters
        if parameters.samples:
            torch.manual_seed(random_seed() if parameters.seed is None else parameters.seed)
        with torch.inference_mode():
            if batch[0].forced:
                self._score(batch)
            elif parameters.num_beams == 1:
                self._generate_step_by_step(batch)
            else:
                self._generate_beams(batch)

    def close(self) -> None:
        del self._model

    def _generate_step_by_step(self, batch: Sequence[Generation]) -> None:
        """Hand over each token as it is chosen, with its log-probability before any filter."""
        from transformers import StoppingCriteriaList

        logits: list[torch.Tensor] = []

        def keep_logits(module: Any, inputs: Any, output: Any) -> None:
            logits[:] = [output.logits[:, -1].float()]

        arguments = self._generate_arguments(batch, OneTextEach(batch))
        arguments["stopping_criteria"] = StoppingCriteriaList([_HandOver(batch, logits)])
        hook = self._model.register_forward_hook(keep_logits)
        try:
            self._model.generate(**arguments)
        finally:
            hook.remove()

    def _generate_beams(self, batch: Sequence[Generation]) -> None:
        """Search, and hand over the texts; their log-probabilities take one more forward pass."""
        from transformers import StoppingCriteriaList

        _refuse_what_older_ones_lack(batch[0].parameters)
        rules = BeamRules(batch, self.tokenizer.eos_token_id)
        arguments = self._generate_arguments(batch, rules)
        arguments["stopping_criteria"] = StoppingCriteriaList([BeamEnds(batch, rules)])
        ids = self._model.generate(**arguments)[:, 1:].tolist()
        each = len(ids) // len(batch)
        found = []
        for item, generation in enumerate(batch):
            of_it = [_to_its_end(generation, text) for text in ids[item * each : (item + 1) * each]]
            real = [text for text in dict.fromkeys(of_it) if rules.is_real(item, text)]
            if len(real) < each:
                after = rules.nothing_after.get(item, 0)
                generation.fail(too_few_texts(each, len(real)) if real else nothing_left(after))
            if not generation.done:
                found.append((generation, real))
        self._finish(found)

    def _finish(self, found: Sequence[tuple[Generation, Sequence[Sequence[int]]]]) -> None:
        """End each generation with its texts, read once more for their log-probabilities."""
        prompts = [generation.prompt_ids for generation, texts in found for _ in texts]
        read = self._read(prompts, [text for _, texts in found for text in texts])
        for generation, texts in found:
            continuations = []
            for text, logits in zip(texts, read):
                continuation = generation.continuation.fork()
                for token_id, log_prob in zip(text, _log_probs(logits[: len(text)], text)):
                    continuation.append(token_id, log_prob)
                continuations.append(continuation)
            generation.finish(continuations)

    def _score(self, batch: Sequence[Generation]) -> None:
        """Read the tokens that are given."""
        read = self._read([g.prompt_ids for g in batch], [g.forced for g in batch])
        for generation, logits in zip(batch, read):
            logits = logits[: len(generation.forced)]
            log_probs = _log_probs(logits, generation.forced)
            top = _top_tokens(logits, [generation.parameters.top_n_tokens] * len(logits))
            for token in zip(generation.forced, log_probs, top):
                if generation.done or generation.append(*token):
                    break

    def _read(
        self, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
    ) -> Iterator[torch.Tensor]:
        """For each prompt and its text [longest text, vocabulary]: the logits of the text's tokens,
        then those of padding. Equal prompts are encoded once."""
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        input_ids, attention_mask = self._padded(list(places))
        encode = self._model.get_encoder()
        states = encode(input_ids=input_ids, attention_mask=attention_mask)[0]
        rules = self._model.generation_config
        start = rules.decoder_start_token_id
        start = rules.bos_token_id if start is None else start
        given, _ = self._padded([[start, *text[:-1]] for text in texts])
        owners = torch.tensor([places[tuple(prompt)] for prompt in prompts])
        at_a_time = _LOGITS_AT_A_TIME // (given.shape[1] * self._model.config.vocab_size) or 1
        for begin in range(0, len(texts), at_a_time):
            part = slice(begin, begin + at_a_time)
            output = self._model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states[owners[part]]),
                attention_mask=attention_mask[owners[part]],
                decoder_input_ids=given[part],
                use_cache=False,
            )
            yield from output.logits.float()

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and attention_mask, [rows, longest row]."""
        import torch

        ids, mask = padded(rows, self.tokenizer.pad_token_id)
        device = self._model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _generate_arguments(
        self, batch: Sequence[Generation], last_processor: OneTextEach | BeamRules
    ) -> dict[str, Any]:
        """Our parameters as ``generate`` names them."""
        p = batch[0].parameters
        input_ids, attention_mask = self._padded([g.prompt_ids for g in batch])
        arguments: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "use_cache": self._use_cache,
            "max_new_tokens": p.max_new_tokens,
            "min_new_tokens": p.max_new_tokens if p.ignore_eos_token else p.min_new_tokens or None,
            "do_sample": p.samples,
            "num_beams": p.num_beams,
            "repetition_penalty": p.repetition_penalty,
            "no_repeat_ngram_size": p.no_repeat_ngram_size,
            "logits_processor": self._processors(batch, last_processor),
        }
        if batch[0].bad_words:
            of_the_model = self._model.generation_config.bad_words_ids or []
            arguments["bad_words_ids"] = [*of_the_model, *map(list, batch[0].bad_words)]
        if p.samples:
            arguments["temperature"] = p.temperature
            arguments["top_k"] = p.top_k
            arguments["top_p"] = p.top_p or 1.0
            arguments["typical_p"] = p.typical_p or 1.0
        if p.num_beams > 1:
            arguments["length_penalty"] = p.length_penalty
            arguments["early_stopping"] = p.early_stopping
            arguments["num_return_sequences"] = p.num_return_sequences
        return arguments

    def _processors(self, batch: Sequence[Generation], last: OneTextEach | BeamRules) -> Any:
        """Those that ``generate`` does not have; they come after its own and before temperature."""
        from transformers import LogitsProcessorList

        processors: list[Any] = []
        parameters = [generation.parameters for generation in batch]
        if any(p.presence_penalty or p.frequency_penalty for p in parameters):
            processors.append(CountPenalties(batch, self._model.device))
        if any(generation.guide is not None for generation in batch):
            rules = self._model.generation_config
            ends = (
                (0, rules.forced_bos_token_id),
                (parameters[0].max_new_tokens - 1, rules.forced_eos_token_id),
            )
            forced = frozenset(step for step, token in ends if token is not None)
            processors.append(Forms(batch, forced))
        return LogitsProcessorList([*processors, last])


class _HandOver:
    """A stopping criterion that gives each new token to its generation and stops the done rows.

    logits: [rows, vocabulary] of the last step, before any processor.
    """

    def __init__(self, batch: Sequence[Generation], logits: list[torch.Tensor]) -> None:
        self._batch = batch
        self._logits = logits
        self._top = [generation.parameters.top_n_tokens for generation in batch]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """input_ids: [rows, steps so far]. Returns [rows] booleans: done."""
        import torch

        tokens = input_ids[:, -1].tolist()
        log_probs = _log_probs(self._logits[0], tokens)
        rows = zip(self._batch, tokens, log_probs, _top_tokens(self._logits[0], self._top))
        done = [generation.done or generation.append(*token) for generation, *token in rows]
        return torch.tensor(done, device=input_ids.device)


def _log_probs(logits: torch.Tensor, tokens: Sequence[int]) -> list[float]:
    """Of a token for each row of logits [rows, vocabulary]."""
    chosen = (logits[range(len(tokens)), tokens] - logits.logsumexp(-1)).clamp(max=0.0)
    return [float(number) for number in chosen.tolist()]


def _top_tokens(logits: torch.Tensor, counts: Sequence[int]) -> list[tuple[TopToken, ...]]:
    """The likeliest tokens of each row of logits [rows, vocabulary], as many as it wants."""
    if not any(counts):
        return [()] * len(counts)
    best = logits.log_softmax(-1).topk(max(counts))
    rows = zip(counts, best.indices.tolist(), best.values.tolist())
    return [tuple(map(TopToken, ids[:count], values[:count])) for count, ids, values in rows]


def _refuse_what_older_ones_lack(p: GenerationParameters) -> None:
    import transformers

    if p.num_return_sequences > 1 and not sees_every_end():
        raise RequestError(
            "parameter 'num_return_sequences' must be 1 with num_beams > 1 on transformers "
            f"{transformers.__version__}, got {p.num_return_sequences}; a newer one has more"
        )


def _to_its_end(generation: Generation, token_ids: Sequence[int]) -> tuple[int, ...]:
    """What of these tokens comes before, and is, the end of the text; none where it has no end."""
    text = generation.continuation.fork()
    for token_id in token_ids:
        if text.append(token_id, None) is not None:
            return tuple(text.token_ids)
    return ()


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
