"""Any sequence-to-sequence model, through transformers' ``generate``.

Slow beside the other engines, but it runs every architecture that transformers has, on whatever
torch runs on, and spreads a model over several GPUs with Accelerate.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handler.checkpoints.find import model_config, weight_bytes
from handler.config import MAX_ROWS_ON_CPU, MAX_ROWS_ON_GPU, Configuration
from handler.engines.protocol import BatchEngine
from handler.errors import LoadError, RequestError, shown
from handler.generation import Generation
from handler.parameters import GenerationParameters, random_seed
from handler.tokenizer import Detokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T5_FAMILY = ("t5", "mt5", "umt5")
# Part of a GPU's free memory that weights may take; the rest is for caches and activations.
_WEIGHTS_SHARE = 0.8

SUPPORTED_PARAMETERS = frozenset(
    """
    max_new_tokens min_new_tokens do_sample temperature top_k top_p typical_p num_beams
    length_penalty early_stopping seed repetition_penalty no_repeat_ngram_size stop_sequences
    bad_words_list details return_log_probs return_full_text truncate ignore_eos_token
    """.split()
)
# What a checkpoint's generation_config.json may say: which tokens, never how to search.
_KEPT_OF_GENERATION_CONFIG = """
    bos_token_id pad_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    bad_words_ids suppress_tokens begin_suppress_tokens
""".split()
_LONGEST_REASON = 300
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
    supported_parameters = SUPPORTED_PARAMETERS

    def __init__(self, folder: Path, configuration: Configuration) -> None:
        import torch

        _refuse_unsupported(configuration)
        on_gpu = torch.cuda.is_available() and configuration.device_id != -1
        config = model_config(folder)
        if configuration.threads and not on_gpu:
            torch.set_num_threads(configuration.threads)
        self.max_rows = configuration.max_rows or (MAX_ROWS_ON_GPU if on_gpu else MAX_ROWS_ON_CPU)
        self._model = _load_model(folder, config, configuration, on_gpu)
        self.tokenizer = _load_tokenizer(folder, config, configuration.trust_remote_code)
        self._model.generation_config = _token_rules(self._model, self.tokenizer)
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
            **self._generate_arguments(parameters),
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

        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = [[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts]
        mask = [[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts]
        device = self._model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _generate_arguments(self, p: GenerationParameters) -> dict[str, Any]:
        """Our parameters as ``generate`` names them."""
        arguments: dict[str, Any] = {
            "max_new_tokens": p.max_new_tokens,
            "min_new_tokens": p.max_new_tokens if p.ignore_eos_token else p.min_new_tokens or None,
            "do_sample": p.samples,
            "num_beams": p.num_beams,
            "repetition_penalty": p.repetition_penalty,
            "no_repeat_ngram_size": p.no_repeat_ngram_size,
        }
        if p.bad_words_list:
            of_the_model = self._model.generation_config.bad_words_ids or []
            arguments["bad_words_ids"] = [*of_the_model, *self._bad_words(p)]
        if p.samples:
            arguments["temperature"] = p.temperature
            arguments["top_k"] = p.top_k
            arguments["top_p"] = p.top_p or 1.0
            arguments["typical_p"] = p.typical_p or 1.0
        if p.num_beams > 1:
            arguments["length_penalty"] = p.length_penalty
            arguments["early_stopping"] = p.early_stopping
        return arguments

    def _bad_words(self, p: GenerationParameters) -> list[list[int]]:
        """Raises RequestError for a word that the vocabulary cannot write."""
        words = []
        for word in p.bad_words_list:
            ids = self.tokenizer.encode_plain(word) if isinstance(word, str) else list(word)
            if not ids or max(ids) >= self.tokenizer.size:
                raise RequestError(
                    f"parameter 'bad_words_list' must hold words of this model's "
                    f"{self.tokenizer.size} tokens, got {shown(word)}"
                )
            words.append(ids)
        return words


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


class TransformersTokenizer:
    """A tokenizer that only transformers can read (Marian, M2M100, ...). See Tokenizer."""

    def __init__(self, folder: Path, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer

        try:
            self._library = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
            self.eos_token_id = int(self._library.eos_token_id)
            self.pad_token_id = int(self._library.pad_token_id)
        except Exception as error:  # each tokenizer class fails in its own way
            raise LoadError(
                f"{folder} holds no tokenizer that transformers can read "
                f"({_reason(error)}); add its files or change option.model_id"
            ) from error
        self.size = len(self._library)

    def encode(self, text: str) -> list[int]:
        return list(self._library(text).input_ids)

    def encode_plain(self, text: str) -> list[int]:
        return list(self._library(text, add_special_tokens=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids), skip_special_tokens=True))

    def token(self, token_id: int) -> str:
        return str(self._library.convert_ids_to_tokens(token_id))

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self)


def load(folder: Path, configuration: Configuration) -> BatchEngine:
    """The engine on the checkpoint in ``folder``. Raises LoadError."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise LoadError(
            f"option.backend=transformers needs the packages torch and transformers: {error}"
        ) from error
    return HfGenerateEngine(folder, configuration)


def _refuse_unsupported(c: Configuration) -> None:
    if c.dtype in ("int8", "int4"):
        raise LoadError(
            f"option.dtype={c.dtype} is not supported by backend transformers, allowed are auto, "
            "fp32, fp16 and bf16"
        )
    if c.merge_adapter:
        raise LoadError(
            f"option.merge_adapter={c.merge_adapter} is not supported by backend transformers; "
            "merge the adapter into the checkpoint and unset it"
        )
    if c.pipeline_parallel_degree > 1:
        raise LoadError(
            f"option.pipeline_parallel_degree={c.pipeline_parallel_degree} is not supported by "
            "backend transformers, allowed is 1; set option.tensor_parallel_degree to the number "
            "of GPUs that the layers may be spread over"
        )
    if c.cpu_kernel != "auto":
        raise LoadError(
            f"option.cpu_kernel={c.cpu_kernel} is not supported by backend transformers, allowed "
            "is auto"
        )


def _load_model(folder: Path, config: dict[str, Any], c: Configuration, on_gpu: bool) -> Any:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    _refuse_other_models(folder, config, c.trust_remote_code)
    devices = _devices(c, on_gpu)
    arguments: dict[str, Any] = {
        _dtype_argument(): _torch_dtype(c.dtype, on_gpu),
        "trust_remote_code": c.trust_remote_code,
        "local_files_only": True,
        "output_loading_info": True,
    }
    if len(devices) == 1 and on_gpu and weight_bytes(folder) > _free_memory(devices):
        devices = list(range(torch.cuda.device_count()))
    if len(devices) > 1:
        arguments["device_map"] = "auto"
        arguments["max_memory"] = {i: int(_free_memory([i])) for i in devices}
    try:
        with _without_chatter():
            model, told = AutoModelForSeq2SeqLM.from_pretrained(folder, **arguments)
    except Exception as error:  # torch, safetensors, pickle: each has errors of its own
        raise LoadError(
            f"{folder} cannot be loaded by transformers ({_reason(error)}); complete its files or "
            "change option.model_id"
        ) from error
    # transformers would go on with random numbers in their place
    if told["missing_keys"]:
        missing = sorted(told["missing_keys"])
        raise LoadError(
            f"{folder} lacks {len(missing)} weights of a model of type {config['model_type']}, the "
            f"first is {missing[0]}; complete its files or change option.model_id"
        )
    if len(devices) == 1 and on_gpu:
        model = model.to(f"cuda:{devices[0]}")
    return model.eval()


def _refuse_other_models(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    import transformers
    from transformers.models.auto import modeling_auto

    known = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if config["model_type"] in known or (trust_remote_code and "auto_map" in config):
        return
    raise LoadError(
        f"{folder} is of model type {config['model_type']}, which is no sequence-to-sequence model "
        f"of transformers {transformers.__version__}; change option.model_id"
    )


def _token_rules(model: Any, tokenizer: Tokenizer) -> Any:
    """A GenerationConfig of the tokens that must or must not be chosen, and nothing else."""
    from transformers import GenerationConfig

    own = model.generation_config
    rules = {name: getattr(own, name, None) for name in _KEPT_OF_GENERATION_CONFIG}
    # ids that stand for no token: T5's vocabulary is padded from 32100 to 32128
    padding = range(tokenizer.size, model.config.vocab_size)
    suppressed = [*(rules["suppress_tokens"] or ()), *padding]
    return GenerationConfig(
        **{**rules, "suppress_tokens": suppressed or None, "eos_token_id": tokenizer.eos_token_id}
    )


def _reason(error: Exception) -> str:
    """The beginning of what a library says: some list every class they know."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


def _dtype_argument() -> str:
    """What from_pretrained calls the dtype: since 4.56 ``dtype``."""
    import transformers

    major, minor = map(int, transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """No progress bar in a server's log, and no advice on tied weights that is wrong for T5."""
    from transformers.utils import logging as library

    level = library.get_verbosity()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        library.enable_progress_bar()


def _devices(c: Configuration, on_gpu: bool) -> list[int]:
    """GPUs to use; one entry stands for the CPU, too."""
    import torch

    if not on_gpu:
        if c.tensor_parallel_degree not in (1, "max"):
            raise LoadError(
                f"option.tensor_parallel_degree={c.tensor_parallel_degree} needs as many GPUs, "
                "there is none; allowed here is 1"
            )
        return [0]
    count = torch.cuda.device_count()
    if c.tensor_parallel_degree == "max":
        return list(range(count))
    degree = int(c.tensor_parallel_degree)
    if degree > count:
        raise LoadError(
            f"option.tensor_parallel_degree={degree} needs as many GPUs, there are {count}"
        )
    return list(range(degree)) if degree > 1 else [max(c.device_id or 0, 0)]


def _free_memory(devices: list[int]) -> float:
    """Bytes of these GPUs that weights may take."""
    import torch

    return _WEIGHTS_SHARE * sum(torch.cuda.mem_get_info(i)[0] for i in devices)


def _torch_dtype(dtype: str, on_gpu: bool) -> torch.dtype:
    import torch

    if dtype == "fp16" and not on_gpu:
        raise LoadError("option.dtype=fp16 needs a GPU; allowed on a CPU are fp32 and bf16")
    if dtype == "auto":
        if not on_gpu:
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]


def _load_tokenizer(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> Tokenizer:
    try:
        return load_tokenizer(folder, int(config.get("vocab_size", 0)))
    except LoadError:
        if config["model_type"] in T5_FAMILY:
            raise
        return TransformersTokenizer(folder, trust_remote_code)
