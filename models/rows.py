"""The rows of a batch, each in memory of its own."""

from __future__ import annotations

import torch
from torch import Tensor


def parted(x: Tensor, dim: int) -> list[Tensor]:
    """Copies of the rows of a batch, which stand along ``dim`` and keep it with a size of 1; without gradient.

    On a GPU one kernel copies them all, where a copy of each row would be as many launches.
    """
    shape, rows = list(x.shape), x.shape[dim]
    shape[dim] = 1
    copies = [x.new_empty(shape) for _ in range(rows)]
    with torch.no_grad():
        torch.split_with_sizes_copy(x, [1] * rows, dim, out=copies)
    return copies
