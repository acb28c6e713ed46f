"""Matrix products and convolutions with fixed weights, in the fastest form that the device has.

A streaming step multiplies few rows by large matrices, so its time is that of reading the weights. PyTorch's
default product reaches half of the memory's speed there or less, depending on the shape. oneDNN's, with the weights
reordered once, is near all of it for every shape, and takes the activation or the residual that follows along. So it is
with convolutions, whose results are many times as large as their weights: what matters there is to write them once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        self._packed = frozen and _has_onednn(weight)
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._weight = weight.detach() if frozen else weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """``x W^T + b`` for ``x`` of shape ``[…, in]``."""
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, "none", [], "")
            return y
        return F.linear(x, self._weight, self._bias)

    @property
    def weight(self) -> Tensor:
        """``[out, in]``; on a CPU a copy, if frozen."""
        return self._weight.to_dense() if self._packed else self._weight

    def silu(self, x: Tensor) -> Tensor:
        """The product, then SiLU."""
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, "swish", [], "")
            return y
        return F.silu(self(x))

    def add_to(self, residual: Tensor, x: Tensor, *, dropout: float = 0.0) -> Tensor:
        """``residual`` plus the product; in training a part of the product is dropped."""
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
            return y
        return residual + F.dropout(self(x), dropout)


class Convolution:
    """A frozen 2-D convolution, with a ReLU behind it or without.

    On a CPU images stand with their channels last, and the weights are reordered; this object then needs nothing of the
    module that it was made from.
    """

    def __init__(self, module: nn.Conv2d, *, relu: bool) -> None:
        weight = module.weight.detach()
        assert isinstance(module.padding, tuple)
        self._shape = (list(module.padding), list(module.stride), list(module.dilation), module.groups)
        self._packed, self._relu, self._bias = _has_onednn(weight), relu, module.bias
        if self._packed:
            weight = weight.contiguous(memory_format=torch.channels_last)
            weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._shape, None)
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """``[B, in, H, W]`` to ``[B, out, H', W']``."""
        padding, stride, dilation, groups = self._shape
        if self._packed:
            activation = "relu" if self._relu else "none"
            y: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
                x, self._weight, self._bias, padding, stride, dilation, groups, activation, [], ""
            )
            return y
        y = F.conv2d(x, self._weight, self._bias, stride, padding, dilation, groups)
        return y.relu_() if self._relu else y


def _has_onednn(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
