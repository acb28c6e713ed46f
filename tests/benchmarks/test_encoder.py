"""Eager steps beside replayed ones, on a machine without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import typer
from typer.testing import CliRunner

from benchmarks.encoder import main, measure_graphs
from models.graphs import Compute


def again(compute: Compute) -> Compute:
    compute()
    return compute


def test_eager_steps_beside_replayed_ones() -> None:
    rows = measure_graphs(
        ["tiny"], [1, 3], [0, 6], 0.01, device=torch.device("cpu"), dtype=torch.bfloat16, capture=again
    )
    assert [(row.batch, row.lookahead) for row in rows] == [(1, 0), (1, 6), (3, 0), (3, 6)]
    for row in rows:
        assert row.graph is not None and row.eager.median_ms > 0 and row.graph.steps == row.eager.steps >= 10


def test_without_a_gpu_there_is_no_graph(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    arguments = ["--graphs", "--shape", "tiny", "--device", "cpu", "--batch", "2", "--lookahead", "1"]
    result = CliRunner().invoke(app, [*arguments, "--seconds", "0.01", "--json", str(tmp_path / "figures.json")])
    assert result.exit_code == 0, result.output
    assert "needs CUDA" in result.output
    [row] = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["rows"]
    assert row["graph"] is None and row["eager"]["steps"] >= 10
