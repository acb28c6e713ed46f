"""A matrix product with fixed weights, in the fastest form that the device has.

A streaming step multiplies few rows by large matrices, so its time is that of reading the weights. PyTorch's
default product reaches half of the memory's speed there or less, depending on the shape. oneDNN's, with the weights
reordered once, is near all of it for every shape, and takes the activation or the residual that follows along.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """``x W^T + b``.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
        scale: Multiplied into both.
        frozen: The weights will not change: on a CPU they are reordered, and no gradient flows through them. This
            object then needs nothing of the parameters that it was made from.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, scale: float = 1.0, frozen: bool = False) -> None:
        if scale != 1.0:
            weight, bias = weight * scale, None if bias is None else bias * scale
        on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self._packed = frozen and on_cpu
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._weight = weight.detach() if frozen else weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """``x W^T + b`` for ``x`` of shape ``[…, in]``."""
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return F.linear(x, self._weight, self._bias)

    @property
    def weight(self) -> Tensor:
        """``[out, in]``; on a CPU a copy, if frozen."""
        return self._weight.to_dense() if self._packed else self._weight

    def silu(self, x: Tensor) -> Tensor:
        """The product, then SiLU."""
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "swish", [], "")
            return y
        return F.silu(self(x))

    def add_to(self, residual: Tensor, x: Tensor, *, dropout: float = 0.0) -> Tensor:
        """``residual`` plus the product; in training a part of the product is dropped."""
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
            return y
        return residual + F.dropout(self(x), dropout)
