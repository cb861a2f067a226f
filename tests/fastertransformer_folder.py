"""Reads a ``<N>-gpu`` folder back into transformers' tensors.

Written from the table of axes that FasterTransformer's T5 loader goes by, and from nothing else:

    encoder SelfAttention.q|k|v, EncDecAttention.q|k|v, wi, wi2   [in, out / N]
    o, wo                                                         [in / N, out]
    relative_attention_bias                                       [heads / N, buckets]
    decoder SelfAttention.qkv                                     [in, 3, out / N]
    layer norms                                                   [d], whole
    shared.weight                                                 [d, vocabulary], whole
    shared.weight_T, lm_head.weight                               [vocabulary, d], whole
"""

from __future__ import annotations

import configparser
from pathlib import Path

import numpy as np

Array = np.ndarray


class FasterTransformerFolder:
    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.ranks = folder, ranks
        self.ini = configparser.ConfigParser()
        assert self.ini.read(folder / "config.ini")
        kind = self.ini["decoder"]["weight_data_type"]
        self.dtype = {"fp16": "<f2", "fp32": "<f4"}[kind]
        self.read: set[str] = {"config.ini", "verify"}

    def number(self, section: str, key: str) -> int:
        return self.ini.getint(section, key)

    def weights(self) -> dict[str, Array]:
        """transformers' name -> the tensor as transformers has it."""
        d, vocabulary = self.number("encoder", "d_model"), self.number("encoder", "vocab_size")
        found = {"shared.weight": self._file("shared.weight_T", (vocabulary, d))}
        transposed = self._file("shared.weight", (d, vocabulary))
        assert np.array_equal(transposed.T, found["shared.weight"])
        found["lm_head.weight"] = self._file("lm_head.weight", (vocabulary, d))
        for stack in ("encoder", "decoder"):
            found |= self._stack(stack)
        left = {file.name for file in self.folder.iterdir()} - self.read
        assert not left, f"nobody reads {left}"
        return found

    def _stack(self, stack: str) -> dict[str, Array]:
        d, heads = self.number(stack, "d_model"), self.number(stack, "num_heads")
        inner, d_ff = heads * self.number(stack, "d_kv"), self.number(stack, "d_ff")
        buckets = self.number(stack, "relative_attention_num_buckets_or_max_pos_seq_len")
        gated = self.ini.getboolean(stack, "is_gated_act")
        found: dict[str, Array] = {}
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found[bias] = self._joined(bias, (heads, buckets), 0).T
        for i in range(self.number(stack, "num_layers")):
            place = f"{stack}.block.{i}.layer"
            if stack == "encoder":
                for name in "qkv":
                    full = f"{place}.0.SelfAttention.{name}.weight"
                    found[full] = self._joined(full, (d, inner), 1).T
            else:
                fused = self._joined(f"{place}.0.SelfAttention.qkv.weight", (d, 3, inner), 2)
                for k, name in enumerate("qkv"):
                    found[f"{place}.0.SelfAttention.{name}.weight"] = fused[:, k].T
                    full = f"{place}.1.EncDecAttention.{name}.weight"
                    found[full] = self._joined(full, (d, inner), 1).T
                full = f"{place}.1.EncDecAttention.o.weight"
                found[full] = self._joined(full, (inner, d), 0).T
            full = f"{place}.0.SelfAttention.o.weight"
            found[full] = self._joined(full, (inner, d), 0).T
            last = 1 if stack == "encoder" else 2
            dense = f"{place}.{last}.DenseReluDense"
            names = {"wi": "wi_0", "wi2": "wi_1"} if gated else {"wi": "wi"}
            for stored, name in names.items():
                found[f"{dense}.{name}.weight"] = self._joined(
                    f"{dense}.{stored}.weight", (d, d_ff), 1
                ).T
            found[f"{dense}.wo.weight"] = self._joined(f"{dense}.wo.weight", (d_ff, d), 0).T
            for k in range(last + 1):
                norm = f"{place}.{k}.layer_norm.weight"
                found[norm] = self._file(norm, (d,))
        norm = f"{stack}.final_layer_norm.weight"
        found[norm] = self._file(norm, (d,))
        return found

    def _joined(self, name: str, shape: tuple[int, ...], axis: int) -> Array:
        part = list(shape)
        part[axis] //= self.ranks
        files = [self._file(f"{name}.{rank}", tuple(part)) for rank in range(self.ranks)]
        return np.concatenate(files, axis)

    def _file(self, name: str, shape: tuple[int, ...]) -> Array:
        file = f"{name}.bin"
        self.read.add(file)
        return np.fromfile(self.folder / file, self.dtype).reshape(shape)
