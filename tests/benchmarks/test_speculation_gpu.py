"""The step of fixed shape is the model's own, and the oracle is right as often as it shall be."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.speculation_gpu import SHAPES, Step, continued, main, measure, random_llm, report, speculated
from models.llm import Llm

B, BEGIN, TOKENS = 3, 30, 40


@pytest.fixture(scope="module")
def llm() -> Llm:
    torch.manual_seed(1)
    llm = Llm(SHAPES["tiny"])
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.4)
    return llm.freeze()


def memory_of(llm: Llm, ids: torch.Tensor) -> torch.Tensor:
    cache = llm.init_state(B, capacity=BEGIN + TOKENS + 12)
    return llm.step(ids[:, :BEGIN], torch.full((B,), BEGIN), cache)[1].memory  # type: ignore[union-attr]


def text_of(llm: Llm) -> tuple[np.ndarray, torch.Tensor]:
    ids = torch.randint(llm.config.vocab_size, (B, BEGIN + 1), generator=torch.Generator().manual_seed(0))
    memory = memory_of(llm, ids)
    text, seconds = continued(Step(llm, memory, 1, begin=BEGIN, graph=False), ids[:, BEGIN].numpy(), BEGIN, TOKENS)
    assert seconds > 0
    return text, ids


@torch.no_grad()
def test_the_step_continues_as_the_model_does(llm: Llm) -> None:
    """Windows, ragged rows and several tokens at once included."""
    text, ids = text_of(llm)
    whole = torch.cat([ids[:, :BEGIN], torch.from_numpy(text)], 1)
    logits, _ = llm.step(whole[:, :-1], torch.full((B,), whole.shape[1] - 1), None, logits_at=TOKENS)
    assert np.array_equal(logits.argmax(-1).numpy(), text[:, 1:])
    step, at = Step(llm, memory_of(llm, ids), 4, begin=BEGIN, graph=False), np.zeros(B, np.int64)
    for advance in ([4, 1, 2], [1, 3, 4], [4, 4, 4]):
        fed = text[np.arange(B)[:, None], at[:, None] + np.arange(4)]
        choices = step(fed, BEGIN + at)
        assert np.array_equal(choices, text[np.arange(B)[:, None], at[:, None] + np.arange(1, 5)])
        at += advance


@pytest.mark.parametrize(("acceptance", "tokens_per_step"), [(0.0, 1.0), (1.0, 4.0)])
def test_with_an_oracle_the_same_text_is_written(llm: Llm, acceptance: float, tokens_per_step: float) -> None:
    text, ids = text_of(llm)
    step = Step(llm, memory_of(llm, ids), 4, begin=BEGIN, graph=False)
    run = speculated(step, text, BEGIN, 3, acceptance, vocab_size=llm.config.vocab_size)
    assert (run.otherwise, run.tokens_per_step) == (0.0, tokens_per_step)
    some = [speculated(step, text, BEGIN, 3, 0.6, vocab_size=97, seed=seed) for seed in range(12)]
    assert all(one.otherwise == 0 for one in some)
    mean = np.mean([one.tokens_per_step for one in some])
    assert mean == pytest.approx(sum(0.6**i for i in range(4)), rel=0.15)


def test_the_table_on_a_machine_without_a_gpu() -> None:
    llm = random_llm(SHAPES["tiny"], "cpu", "float32")
    cells = measure(llm, batches=(1, 3), acceptances=(0.4, 0.8), lengths=(1, 3), prompt=12, tokens=30)
    assert [(one.mode, one.batch, one.acceptance) for one in cells] == [
        ("eager", batch, acceptance) for batch in (1, 3) for acceptance in (0.4, 0.8)
    ]
    for one in cells:
        assert one.otherwise == 0 and 1 <= one.tokens_per_step <= one.draft_tokens + 1
        assert one.ratio == pytest.approx(one.speculative / one.plain)
    assert report(cells, "cpu").count("needs CUDA") == 4


def test_the_command() -> None:
    app = typer.Typer()
    app.command()(main)
    arguments = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--batch", "2", "--prompt", "9"]
    result = CliRunner().invoke(app, [*arguments, "--tokens", "20", "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["cells"]) == 3
    assert CliRunner().invoke(app, ["--model", "2b", "--device", "cpu"]).exit_code == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_graph_chooses_what_the_eager_step_chooses() -> None:
    llm = random_llm(SHAPES["tiny"], "cuda", "float32")
    ids = torch.randint(97, (B, BEGIN + 1))
    texts = [
        continued(Step(llm, memory_of(llm, ids), 1, begin=BEGIN, graph=graph), ids[:, BEGIN].numpy(), BEGIN, 20)[0]
        for graph in (False, True)
    ]
    assert np.array_equal(*texts)
