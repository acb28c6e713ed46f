"""The trainer learns to read and write, resumes exactly where it was, and validates by the loop that it says."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.llm import Llm
from models.llm_config import LlmConfig
from models.tokenizer import SentencePieceTokenizer
from models.translator import TranslationConfig, save_translator, write_masks
from streaming.errors import DragomanError
from tests import tiny
from training.schedule import lr_scale
from training.translation import data
from training.translation.align import write_aligned
from training.translation.chunks import OFFLINE
from training.translation.corpus import Pair
from training.translation.data import Encoder, Packed
from training.translation.train import Recipe, Trainer, read_tasks, run, translator_config
from training.translation.validate import Task, translate, validate

TOKENIZER = SentencePieceTokenizer(tiny.translation_tokenizer())
ENCODER = Encoder(TOKENIZER)
CONFIG = LlmConfig(TOKENIZER.size, d_model=64, d_ff=96, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=32)
RECIPE = Recipe(batch_ids=512, warmup_steps=5, peak_lr=5e-3, ema=0.8)
WORDS = {"the": "el", "speaker": "hablante", "is": "sigue", "talking": "hablando", "still": "noch"}


def corpus(folder: Path) -> tuple[Path, Path]:
    """Sentences that are translated word by word, packed, and the tokenizer."""
    words = list(WORDS)
    pairs = []
    for k in range(120):
        source = [words[(k * 7 + i * (1 + k % 4)) % 5] for i in range(1 + k % 6)]
        pair = Pair("es", " ".join(source), " ".join(WORDS[word] for word in source))
        pairs.append((pair, [(i, i) for i in range(len(source))]))
    write_aligned(folder / "aligned.tsv", pairs)
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(tiny.translation_tokenizer())
    data.run(folder / "aligned.tsv", tokenizer, folder / "packed", passes=1)
    return folder / "packed", tokenizer


def trainer(recipe: Recipe = RECIPE) -> Trainer:
    return Trainer(CONFIG, recipe, ENCODER.end_of_read, "cpu", bf16=False)


def trained(steps: int, folder: Path, recipe: Recipe = RECIPE) -> Trainer:
    one, batches = trainer(recipe), Packed(folder).batches(recipe.batch_ids, recipe.seed)
    for _ in range(steps):
        one.train_step(next(batches), 1.0)
    return one


def test_it_learns_to_read_and_to_write(tmp_path: Path) -> None:
    one, batches = trainer(), Packed(corpus(tmp_path)[0]).batches(RECIPE.batch_ids, 1)
    for step in range(260):
        one.train_step(next(batches), lr_scale(step, 10, 260, 150))
    source = "the speaker is still talking the speaker is".split()
    tasks = [Task("es", source, [" ".join(WORDS[word] for word in source)])]
    offline, low = (next(iter(validate(one.averaged(), TOKENIZER, tasks, [x]))) for x in (OFFLINE, "low"))
    assert low.bleu > 80 and low.laal < 3
    assert offline.laal == 8


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    folder, _ = corpus(tmp_path)
    whole, part = trained(8, folder), trained(5, folder)
    part.save(tmp_path / "last.pt")
    resumed = trainer()
    resumed.load(tmp_path / "last.pt")
    batches = Packed(folder).batches(RECIPE.batch_ids, RECIPE.seed, skip=resumed.step)
    for _ in range(3):
        resumed.train_step(next(batches), 1.0)
    assert resumed.step == whole.step == 8
    for name, tensor in whole.average.items():
        torch.testing.assert_close(resumed.average[name], tensor, rtol=0, atol=0)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    batch = next(Packed(corpus(tmp_path)[0]).batches(512, 1))
    wide = dataclasses.replace(
        batch,
        ids=torch.nn.functional.pad(batch.ids, (0, 16)),
        kinds=torch.nn.functional.pad(batch.kinds, (0, 16)),
    )
    one, other = trainer(), trainer()
    found, padded = one.train_step(batch, 1.0), other.train_step(wide, 1.0)
    assert found == pytest.approx(padded, rel=1e-4)


def test_attention_with_a_gradient_is_attention_without() -> None:
    torch.manual_seed(0)
    net = Llm(dataclasses.replace(CONFIG, n_heads=4, head_dim=16))
    tokens = torch.randint(0, TOKENIZER.size, (3, 21))
    with torch.no_grad():
        plain = net(tokens)
    torch.testing.assert_close(net(tokens), plain, rtol=1e-4, atol=1e-5)


def naive(net: Llm, task: Task, latency: str) -> tuple[list[int], list[int]]:
    """Reads and writes one sentence, computing everything anew for each id."""

    def scores(ids: list[int]) -> Tensor:
        return net.step(torch.tensor([ids]), torch.tensor([len(ids)]), None)[0][0, -1]

    ids, written, delays = list(ENCODER.begin(task.language, latency).ids), list[int](), list[int]()
    masks = write_masks(TOKENIZER, ENCODER.end_of_write, TOKENIZER.size)
    words, read, upon = [ENCODER.word(word) for word in task.source], 0, 0
    for word in [*words, ENCODER.endpoint]:
        ids += word
        last = read == len(words)
        read += not last
        decided = latency != OFFLINE and scores(ids).softmax(0)[ENCODER.end_of_read] >= 0.5
        if not decided and not last:
            continue
        ids.append(ENCODER.end_of_read)
        left, first, closing = 25 + 2 * sum(map(len, words[:read])) - len(written), True, upon == read
        while True:
            z = scores(ids)
            z[masks[int(first and not closing)]] = -torch.inf
            token, left, first = int(z.argmax()), left - 1, False
            if token == ENCODER.end_of_write or left <= 0 or (closing and token not in ENCODER.marks):
                break
            ids.append(token)
            written.append(token)
            delays.append(read)
        ids.append(ENCODER.end_of_write)
        upon = read
    return written, delays


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["es", "de"]), st.integers(1, 6)), min_size=1, max_size=4),
    st.sampled_from(["low", OFFLINE]),
    st.integers(0, 5),
)
def test_a_batch_translates_as_the_naive_loop(rows: list[tuple[str, int]], latency: str, seed: int) -> None:
    torch.manual_seed(seed)
    net = Llm(CONFIG)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(8.0) if p.dim() > 1 else None
    net.eval().requires_grad_(False)
    words = list(WORDS)
    tasks = [Task(x, [words[(i + n + seed) % 5] for i in range(n)], ["x"]) for x, n in rows]
    for task, row in zip(tasks, translate(net, ENCODER, tasks, latency), strict=True):
        assert (row.written, row.delays) == naive(net, task, latency)


def test_the_embedded_shape_has_eight_and_a_half_million_parameters() -> None:
    with torch.device("meta"):
        net = Llm(translator_config(8192, 256, 8))
    assert 8.3e6 < sum(p.numel() for p in net.parameters()) < 8.7e6


def test_every_other_task_is_as_the_recogniser_writes(tmp_path: Path) -> None:
    file = tmp_path / "dev.jsonl"
    file.write_text('{"text": "Hi, Tom!", "es": ["Hola."], "de": []}\n' * 2, encoding="utf-8")
    assert [task.source for task in read_tasks(file, ("es", "de"), 9)] == [["Hi,", "Tom!"], ["hi", "tom"]]


def test_the_command_trains_validates_and_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, tokenizer = corpus(tmp_path)
    dev = tmp_path / "dev.jsonl"
    dev.write_text('{"text": "the speaker", "es": ["el hablante"]}\n', encoding="utf-8")
    caplog.set_level(logging.INFO)

    def go(steps: int) -> None:
        run(
            folder, tokenizer, tmp_path / "run", steps=steps, decay_steps=2, valid=dev, valid_every_steps=2,
            width=64, layers=1, batch_ids=256, threads=1,
        )  # fmt: skip

    go(3)
    assert "step 3 es medium BLEU" in caplog.text and "resumed" not in caplog.text
    go(4)
    assert "resumed at step 3" in caplog.text
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 4


def test_a_new_run_starts_from_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, tokenizer = corpus(tmp_path)
    old = trained(3, folder)
    save_translator(
        tmp_path / "model", CONFIG, {k: v.bfloat16() for k, v in old.average.items()}, tokenizer.read_bytes(),
        TranslationConfig(),
    )  # fmt: skip
    new = trainer()
    new.start_from(tmp_path / "model")
    assert new.step == 0
    for name, tensor in new.net.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, old.average[name].bfloat16().float(), rtol=0, atol=0)
        torch.testing.assert_close(new.average[name], tensor, rtol=0, atol=0)
    new.train_step(next(Packed(folder).batches(512, 2)), 1.0)  # the optimisers hold the weights that were taken over
    assert not new.net.model.embed_tokens.weight.equal(old.average["model.embed_tokens.weight"].bfloat16().float())

    caplog.set_level(logging.INFO)
    run(folder, tokenizer, tmp_path / "run", steps=1, decay_steps=1, init=tmp_path / "model", batch_ids=256, threads=1)
    assert "started from" in caplog.text
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["config"] == CONFIG.to_dict()
    (tmp_path / "model" / "tokenizer.model").write_bytes(tiny.tokenizer())
    with pytest.raises(DragomanError, match="pack them anew"):
        run(folder, tokenizer, tmp_path / "another", init=tmp_path / "model")
    with pytest.raises(DragomanError, match="do not fit the config"):
        Trainer(dataclasses.replace(CONFIG, n_layers=3), RECIPE, 3, "cpu", bf16=False).start_from(tmp_path / "model")
