"""What training changes of its process, it changes for these tests alone."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def subnormal_numbers() -> Iterator[None]:
    """Training flushes them to zero; tests of other things want them back."""
    yield
    torch.set_flush_denormal(False)
