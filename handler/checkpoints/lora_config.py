"""What a peft LoRA adapter's adapter_config.json says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from handler.checkpoints.find import read_json_object
from handler.errors import LoadError, shown

# Initial values that leave the base as it is. The others (pissa, olora, loftq, corda ...) subtract
# from the base what the adapter begins with, so that it only fits that changed base.
_PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# fan_in_fan_out: of layers that lie transposed; peft resets it for nn.Linear, which T5's all are.
_NO_PART_IN_A_MERGE = frozenset(
    """
    auto_mapping base_model_name_or_path bias corda_config eva_config fan_in_fan_out inference_mode
    lora_dropout lora_ga_config loftq_config megatron_core peft_type peft_version qalora_group_size
    revision runtime_config task_type
    """.split()
)
_UNDERSTOOD = frozenset(
    """
    alpha_pattern exclude_modules init_lora_weights layers_pattern
    layers_to_transform lora_alpha modules_to_save r rank_pattern target_modules use_dora use_rslora
    """.split()
)

_HIGHEST = 2**31 - 1  # of r and lora_alpha

Targets = Union[str, "tuple[str, ...]", None]


@dataclass(frozen=True)
class LoraConfig:
    """Names of fields are peft's. file: where it was read from."""

    file: Path
    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    use_rslora: bool
    use_dora: bool
    target_modules: Targets
    exclude_modules: Targets
    modules_to_save: tuple[str, ...]
    some_layers: bool

    @staticmethod
    def read(file: Path) -> LoraConfig:
        """Raises LoadError: not LoRA, or something in it cannot be merged."""
        config = read_json_object(file)
        _refuse_what_cannot_be_merged(file, config)
        found = LoraConfig(
            file=file,
            r=config.get("r", 8),
            lora_alpha=config.get("lora_alpha", 8),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            use_rslora=bool(config.get("use_rslora")),
            use_dora=bool(config.get("use_dora")),
            target_modules=_targets(file, "target_modules", config.get("target_modules")),
            exclude_modules=_targets(file, "exclude_modules", config.get("exclude_modules")),
            modules_to_save=_names(file, "modules_to_save", config.get("modules_to_save")),
            some_layers=config.get("layers_to_transform") not in (None, []),
        )
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(found, name), dict):
                raise LoadError(f"{file}: {name} must be an object, got {shown(config[name])}")
            for pattern in getattr(found, name):
                _check_regex(file, name, pattern)
        found.scaling("")
        return found

    def rank(self, module: str) -> int:
        rank = self.rank_pattern.get(_key_for(module, self.rank_pattern), self.r)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= _HIGHEST:
            raise LoadError(
                f"{self.file}: r must be an integer of at least 1 and at most {_HIGHEST}, got "
                f"{shown(rank)}"
            )
        return rank

    def scaling(self, module: str) -> float:
        """The factor of B @ A (Hu et al. 2021: alpha / r; Kalajdzievski 2023: alpha / sqrt(r))."""
        alpha = self.alpha_pattern.get(_key_for(module, self.alpha_pattern), self.lora_alpha)
        is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not is_number or not abs(alpha) <= _HIGHEST:
            raise LoadError(
                f"{self.file}: lora_alpha must be a number up to {_HIGHEST}, got {shown(alpha)}"
            )
        rank = self.rank(module)
        return float(alpha) / (rank**0.5 if self.use_rslora else rank)

    def targets(self, module: str) -> bool | None:
        """Whether the adapter must have tensors for a linear module; None: not told by names."""
        if self.some_layers or self.target_modules in (None, "all-linear"):
            return None
        if _matches(module, self.exclude_modules) or any(
            re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in self.modules_to_save
        ):
            return False
        return _matches(module, self.target_modules)


def _refuse_what_cannot_be_merged(file: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LoadError(
            f"{file}: adapters of peft_type {shown(kind)} cannot be merged, allowed is 'LORA'; "
            "change option.merge_adapter"
        )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_INITIALIZATIONS:
        raise LoadError(
            f"{file}: init_lora_weights={shown(start)} means an adapter of a changed base, which "
            "cannot be merged into this one; convert it with peft "
            "(path_initial_model_for_weight_conversion)"
        )
    for name, value in config.items():
        if value and name not in _UNDERSTOOD | _NO_PART_IN_A_MERGE:
            raise LoadError(
                f"{file}: {name}={shown(value)} cannot be merged by this version; merge the "
                "adapter with peft and unset option.merge_adapter"
            )


def _targets(file: Path, name: str, value: Any) -> Targets:
    if isinstance(value, str):
        _check_regex(file, name, value)
        return value
    return None if value is None else _names(file, name, value, " or a regex")


def _names(file: Path, name: str, value: Any, else_: str = "") -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise LoadError(f"{file}: {name} must be a list of names{else_}, got {shown(value)}")
    return tuple(value)


def _check_regex(file: Path, name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise LoadError(f"{file}: {name} {shown(pattern)} is no regex: {error}") from error


def _matches(module: str, targets: Targets) -> bool:
    """As peft matches: a regex the whole name, a listed name its end."""
    if targets is None:
        return False
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, module))
    return any(module == name or module.endswith(f".{name}") for name in targets)


def _key_for(module: str, patterns: Mapping[str, Any]) -> str:
    """The first pattern (a regex for a name's end) that matches, as in peft; else the name."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)
