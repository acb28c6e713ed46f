"""The learning rate over a run."""

import pytest

from training.schedule import lr_scale


def test_the_learning_rate_is_a_trapezoid() -> None:
    scales = [lr_scale(step, 10, 100, 20) for step in range(101)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9:81] == [1.0] * 72
    assert scales[90] == pytest.approx(0.5)
    assert scales[100] == 0
    assert all(a > b for a, b in zip(scales[80:], scales[81:], strict=False))
