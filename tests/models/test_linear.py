"""Products and convolutions with fixed weights are PyTorch's, and each row's its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.linear import Convolution, Linear


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_frozen_product_is_the_plain_one(scale: float, bias: bool) -> None:
    torch.manual_seed(0)
    module, x, residual = nn.Linear(24, 40, bias=bias), torch.randn(7, 24), torch.randn(7, 40)
    frozen = Linear(module.weight, module.bias, scale=scale, frozen=True)
    plain = scale * module(x)
    torch.testing.assert_close(frozen(x), plain)
    torch.testing.assert_close(frozen.silu(x), F.silu(plain))
    torch.testing.assert_close(frozen.add_to(residual, x), residual + plain)
    torch.testing.assert_close(frozen.weight, scale * module.weight)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(1, 16, 3, stride=2, padding=(0, 2)),
        nn.Conv2d(16, 16, 3, stride=2, padding=(0, 2), groups=16),
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, 1, bias=False),
    ],
)
@torch.no_grad()
def test_a_frozen_convolution_is_the_plain_one_and_a_rows_result_its_own(module: nn.Conv2d, relu: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, module.in_channels, 9, 21).contiguous(memory_format=torch.channels_last)
    plain, frozen = module(x), Convolution(module, relu=relu)
    together = frozen(x)
    torch.testing.assert_close(together, plain.relu() if relu else plain)
    assert torch.equal(together, torch.cat([frozen(row[None]) for row in x]))
