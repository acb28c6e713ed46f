"""The benchmark of speculation: what it counts, and the command that prints it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import benchmarks.speculation
from benchmarks.speculation import (
    BATCHES,
    TALK,
    Build,
    Run,
    Talk,
    identity,
    measure,
    over_best,
    report,
    talks_of,
    translate,
)
from client.cli import app
from models.translator import Translator
from streaming.drafts import Recycling
from streaming.speculation import Speculation
from tests import tiny

TEXTS = ["the speaker is still talking", "and nothing is taken back"] * 3


def test_sentences_are_dealt_out() -> None:
    assert talks_of(["a b", "c", "d e f"], 2, 3) == [
        [("a", False), ("b", True)],
        [("c", True), ("d", False), ("e", False)],
    ]


def test_the_same_is_written_in_fewer_forwards() -> None:
    t, drafter = tiny.translator(0), Recycling()
    runs = [
        translate(t, talks_of(TEXTS, 1, 30), build, target="es", latency="offline")
        for build in (lambda: None, *[lambda: Speculation([drafter], max_tokens=3, fixed=True)] * 2)
    ]
    assert runs[0].ids == runs[1].ids == runs[2].ids
    assert runs[0].forwards > runs[1].forwards > runs[2].forwards
    assert len(runs[0].word_s) == 30 and runs[0].seconds >= sum(runs[0].word_s)


def test_figures_of_all_ways_and_of_each_drafter() -> None:
    found = measure(tiny.translator(0), TEXTS, target="es", latency="offline", words=24, repeats=2, batches=(1, 3))
    assert found["identical"] is True
    assert [(one["talks"], one["words"]) for one in found["batches"]] == [(1, 24), (3, 24)]
    plain = found["batches"][0]["plain"]
    assert plain["forward_ratio"] == plain["wall_ratio"] == 1.0
    assert found["tokens_per_forward"] >= plain["tokens_per_forward"] > 0
    assert {"fixed", "controller", "n-grams without seed", "repetition", "recycling", "recycling tree"} == set(
        found["acceptance"]
    )
    assert all(0 <= share <= 1 for sources in found["acceptance"].values() for share in sources.values())
    assert "3 talks, 24 words" in report(found)
    for name in ("controller_over_best", "controller_over_best_cpu"):
        assert found[name] == min(one[name] for one in found["batches"]) > 0
    assert f"controller over best: {found['controller_over_best']:.3f}" in report(found)


def test_the_controller_is_held_against_the_better_way_of_each_turn() -> None:
    """Its own 4, 8 and 2 seconds against 3, 8 and 1."""
    seconds = {"plain": [3.0, 9.0, 1.0], "fixed": [6.0, 8.0, 5.0], "controller": [4.0, 8.0, 2.0]}
    runs = {name: [Run([], seconds=one) for one in some] for name, some in seconds.items()}
    assert over_best(runs, lambda run: run.seconds) == 0.75


def test_identity_is_of_all_ways_and_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    t, how = tiny.translator(0), {"target": "es", "latency": "offline", "words": 24, "batch": 3}
    found = identity(t, TEXTS, **how)
    assert found["identical"] is True and found["words"] == 24 and found["tokens"] > 24
    assert {"fixed", "controller", "recycling tree", "repetition"} < set(found["ways"])
    real = benchmarks.speculation.translate

    def wrong(translator: Translator, talks: Sequence[Talk], build: Build, **how: Any) -> Run:
        run = real(translator, talks, build, **how)
        if isinstance(speculation := build(), Speculation) and speculation.top_k > 1:  # the tree
            run.ids[1][0] = (*run.ids[1][0], 7)
        return run

    monkeypatch.setattr(benchmarks.speculation, "translate", wrong)
    found = identity(t, TEXTS, **how)
    assert found["identical"] is False
    assert [name for name, same in found["ways"].items() if not same] == ["recycling tree"]


def test_the_command_prints_json(tmp_path: Path) -> None:
    folder = tiny.save_tiny_translator(tmp_path / "model", 5)
    arguments = ["bench", "speculation", "--translator", str(folder), "--words", "16", "--repeats", "1", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["identical"] and {"tokens_per_forward", "wall_ratio"} < set(found)
    assert [one["talks"] for one in found["batches"]] == list(BATCHES)
    small = tiny.save_tiny_translator(tmp_path / "small", 1)
    result = CliRunner().invoke(app, [*arguments, "--identity", "--batch", "2", "--draft-model", str(small)])
    assert result.exit_code == 0, result.output
    assert (same := json.loads(result.stdout))["identical"] is True
    assert {"draft model", "draft model, controlled"} < set(same["ways"])
    assert len(TALK.read_text(encoding="utf-8").split()) > 1000


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    folder = tiny.save_tiny_translator(tmp_path / "model", 5)
    for arguments, sentence in [
        (["--to", "ja"], "cannot write the language"),
        (["--latency", "none"], "at the latency"),
    ]:
        result = CliRunner().invoke(app, ["bench", "speculation", "--translator", str(folder), *arguments])
        assert result.exit_code == 2 and sentence in result.stderr


@pytest.mark.parametrize("batch", BATCHES)
def test_the_talk_is_enough_for_every_batch(batch: int) -> None:
    assert all(
        len(talk) == 1000 // batch
        for talk in talks_of(TALK.read_text(encoding="utf-8").splitlines(), batch, 1000 // batch)
    )
