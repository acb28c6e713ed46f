"""Thresholds are where the lag is that of a level, for each language by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from tests import tiny
from training.translation import calibrate
from training.translation.calibrate import LEVEL_LAGS, calibrated
from training.translation.chunks import LEVEL_WORDS
from training.translation.validate import Task

TOKENIZER = tiny.translator().tokenizer
TASKS = [Task(x, ["word"] * n, ["eine Referenz"]) for n in (3, 5, 10) for x in ("es", "de")]


def test_lags_that_rise_with_the_threshold_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    def lags(_: object, __: object, tasks: Sequence[Task], latency: str, limits: Mapping[str, float]) -> list[float]:
        power = {"es": 1.0, "de": 2.0}
        return [len(task.source) * limits[task.language] ** power[task.language] for task in tasks]

    monkeypatch.setattr(calibrate, "translate", lags)
    monkeypatch.setattr(calibrate, "laal", lambda task, lag, tokenizer: lag)
    found = calibrated(
        tiny.translation_llm(), TOKENIZER, TASKS, {"low": 0.36, "high": 0.64, "never": 0.99, "at once": 0.0}
    )
    assert found["es"]["low"] == pytest.approx(0.36, abs=0.015) and found["de"]["low"] == pytest.approx(0.6, abs=0.015)
    assert found["es"]["high"] == pytest.approx(0.64, abs=0.015) and found["de"]["high"] == pytest.approx(
        0.8, abs=0.015
    )
    assert found["es"]["never"] > 0.92 and found["es"]["at once"] < 0.08, "a threshold is never out of reach"


def test_a_real_model_has_a_threshold_for_each_level() -> None:
    with torch.inference_mode():
        found = calibrated(tiny.translation_llm().freeze(), TOKENIZER, TASKS)
    assert {language: list(levels) for language, levels in found.items()} == {
        x: list(LEVEL_WORDS) for x in ("es", "de")
    }
    assert list(LEVEL_LAGS) == list(LEVEL_WORDS) and sorted(LEVEL_LAGS.values()) == list(LEVEL_LAGS.values())
