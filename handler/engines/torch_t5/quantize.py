"""Other forms of the weights of products, put into a model that is built: int8, and fp16's wo."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """y = x W^T, W = values * scales: values [out, in] in int8, scales [out] in fp32.

    Weights alone are quantized: the product is one of the inputs' dtype.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.values * self.scales[:, None]).to(x.dtype))


class RescaledLinear(nn.Module):
    """A product in fp16 of rows in fp32 that may leave fp16's range: the largest number of each
    becomes 1 for it, and what comes out is scaled back in fp32."""

    def __init__(self, product: nn.Module) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float16).tiny)
        y: Tensor = self.product((x / scale).half())
        return y.float() * scale
