"""Other forms of the weights of products, put into a model that is built: int8, and fp16's wo."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Up to so many the weights, not the products, are what takes time.
_FEW_ROWS = 64
# Values are up to 127 and fp16 ends at 65504: inputs are divided by it, results multiplied.
_RANGE = 128.0


class Int8Linear(nn.Module):
    """y = x W^T, W = values * scales: values [out, in] in int8, scales [out] in fp32.

    Weights alone are quantized: the product is one of the inputs' dtype. few_rows: what computes
    it for some rows without a copy of the weights in that dtype, where there is such a kernel.
    """

    values: Tensor
    scales: Tensor
    few_rows: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        if self.few_rows is not None and x.numel() <= _FEW_ROWS * x.shape[-1]:
            return self.few_rows(x, self.values, self.scales)
        y = F.linear(x / _RANGE, self.values.to(x.dtype))  # which holds them to the bit
        return (y * (self.scales * _RANGE)).to(x.dtype)


class RescaledLinear(nn.Module):
    """A product in fp16 of rows in fp32 that may leave fp16's range: the largest number of each
    becomes 1 for it, and what comes out is scaled back in fp32.

    weight_scale: what the product's weights are to be multiplied by.
    """

    def __init__(self, product: nn.Module, weight_scale: float) -> None:
        super().__init__()
        self.product, self._weight_scale = product, weight_scale

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float16).tiny)
        y: Tensor = self.product((x / scale).half())
        return y.float() * (scale * self._weight_scale)
