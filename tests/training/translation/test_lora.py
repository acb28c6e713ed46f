"""A tuned model learns, and its folder is a translator that says what the tuned model said."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models

from models.translator import EAST_PROMPT, END_OF_READ, END_OF_WRITE, TranslationConfig, load_translator
from streaming.errors import DragomanError
from streaming.events import TranslationDelta
from streaming.text_session import TextSession
from training.translation.align import write_aligned
from training.translation.corpus import Pair
from training.translation.data import Encoder, Mix, RecogniserErrors, Writer, read_sentences

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
lora = pytest.importorskip("training.translation.lora")

WORDS = {"the": "el", "speaker": "hablante", "is": "sigue", "talking": "hablando", "still": "noch"}
SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip
RECIPE = lora.Recipe(rank=8, alpha=16, dropout=0.0, batch_ids=512, peak_lr=2e-2)


def published(folder: Path, family: str, *, spare: int = 0, chat: bool = True) -> Path:
    """A tiny random model of a published family, with a tokenizer that knows nothing of the two symbols."""
    tokenizer = Tokenizer(tokenizer_models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    text = [" ".join([*WORDS, *WORDS.values()]), EAST_PROMPT]
    tokenizer.train_from_iterator(text * 3, trainer)
    size = tokenizer.get_vocab_size() + spare
    config: Any = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config(vocab_size=size, tie_word_embeddings=family == "qwen3", **SHAPE)
    )
    with torch.no_grad():
        for parameter in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            parameter.mul_(15.0)  # as large as those of a trained model, or frozen ones could not say anything surely
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    if chat:
        (folder / "chat_template.jinja").write_text("<s>{{ messages[0]['content'] }}\nanswer:")
    return folder


def aligned(folder: Path) -> Path:
    words, pairs = list(WORDS), []
    for k in range(60):
        source = [words[(k * 7 + i * (1 + k % 4)) % 5] for i in range(1 + k % 6)]
        pair = Pair(("es", "de")[k % 2], " ".join(source), " ".join(WORDS[word] for word in source))
        pairs.append((pair, [(i, i) for i in range(len(source))]))
    write_aligned(folder / "aligned.tsv", pairs)
    return folder / "aligned.tsv"


@pytest.mark.parametrize(("family", "spare"), [("llama", 0), ("qwen3", 5)])
def test_a_tuned_model_learns_and_its_folder_is_a_translator(tmp_path: Path, family: str, spare: int) -> None:
    base, out = published(tmp_path / "base", family, spare=spare), tmp_path / "tuned"
    tokenizer = lora.add_symbols(base, out)
    translation = TranslationConfig(prompt=EAST_PROMPT, targets=("de", "es"))
    sentences, words = read_sentences(aligned(tmp_path))
    writer = Writer(Encoder(tokenizer, translation), Mix(max_ids=400), RecogniserErrors(words), {})
    tuner = lora.Tuner(base, tokenizer, RECIPE, "cpu", bf16=False)

    symbols = [tokenizer.id_of(END_OF_READ), tokenizer.id_of(END_OF_WRITE)]
    embedding = tuner.model.get_input_embeddings()
    before = embedding.weight.detach().clone()
    new, known = before[symbols], before[: min(symbols)]
    assert not torch.allclose(new[0], new[1]) and 0.3 < new.std() / known.std() < 3

    batches = lora.batched(lora.endless(sentences, writer, 1), RECIPE.batch_ids, random.Random(1))
    losses = [tuner.train_step(next(batches), min(1.0, (k + 1) / 10)) for k in range(60)]
    first, last = (sum(one["write"] for one in some) / 5 for some in (losses[:5], losses[-5:]))
    assert last < 0.6 * first

    batch = next(batches)
    tuner.model.eval()
    with torch.no_grad():
        said = tuner.logits(batch.ids)
    tuner.save(out, translation, "base")
    t = load_translator(out)
    assert t.config == translation and t.policy == "interleaved" and t.name == "tuned"
    with torch.no_grad():
        torch.testing.assert_close(t.llm(batch.ids), said, rtol=1e-3, atol=1e-3)
    matrix = t.llm.model.embed_tokens.weight[: len(before)]
    changed = (matrix - before).abs().amax(1) > 0
    assert changed[symbols].all() and changed.sum() == 2

    # What it was trained on is what a session of it begins with, and reads.
    row = batch.ids[0].tolist()
    prompts = [t.direction(language, latency).prompt for language in ("de", "es") for latency in t.config.latencies]
    (prompt,) = {one for one in prompts if tuple(row[: len(one)]) == one}
    assert row[len(prompt)] in {t.encode_word(word)[0] for word in WORDS}


def test_the_command_writes_a_translator(tmp_path: Path) -> None:
    base, out = published(tmp_path / "base", "llama"), tmp_path / "tuned"
    lora.run(base, aligned(tmp_path), out, steps=3, decay_steps=1, limit=20, rank=4, batch_ids=256, threads=1)
    session = TextSession(load_translator(out), ["es"], "low")
    events = [*session.push("the speaker is talking"), *session.finish()]
    assert any(isinstance(event, TranslationDelta) for event in events)
    assert "`base`, tuned to interpret from English into German and Spanish" in (out / "README.md").read_text()


def test_batches_hold_every_sequence_once_within_the_budget(tmp_path: Path) -> None:
    made = [lora.Interleaved([k] * (1 + k % 30), [3] * (1 + k % 30)) for k in range(300)]
    seen: list[int] = []
    for batch in lora.batched(made, 64, random.Random(0)):
        B, T = batch.ids.shape
        assert B == 1 or B * T <= 64
        lengths = (batch.kinds == 3).sum(1).tolist()
        assert all(not ids[n:].any() for ids, n in zip(batch.ids, lengths, strict=True))
        assert [1 + k % 30 for k in batch.ids[:, 0].tolist()] == lengths
        seen += batch.ids[:, 0].tolist()
    assert sorted(seen) == list(range(300))


def test_a_model_that_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DragomanError, match="has no chat template"):
        lora.add_symbols(published(tmp_path / "a", "llama", chat=False), tmp_path / "b")
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.raises(DragomanError, match="no tokenizer.json"):
        lora.add_symbols(tmp_path / "a", tmp_path / "b")
    (tmp_path / "none.tsv").write_text("")
    with pytest.raises(DragomanError, match="has no sentence pairs"):
        lora.run(tmp_path / "a", tmp_path / "none.tsv", tmp_path / "c")
