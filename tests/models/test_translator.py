"""The translator's folder, its prompt, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.llm import Llm
from models.llm_config import LlmConfig
from models.tokenizer import SentencePieceTokenizer, decode
from models.translator import (
    EAST_PROMPT,
    END_OF_READ,
    END_OF_WRITE,
    TranslationConfig,
    Translator,
    load_translator,
    save_translator,
)
from streaming.errors import DragomanError
from streaming.events import TranslationDelta
from streaming.text_session import TextSession
from tests import tiny
from tests.models.test_tokenizer import hugging_face

SHAPE: dict[str, Any] = {"d_model": 16, "d_ff": 24, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}


def saved(folder: Path, **translation: Any) -> Path:
    torch.manual_seed(0)
    config = LlmConfig(vocab_size=SentencePieceTokenizer(tiny.translation_tokenizer()).size, name="own", **SHAPE)
    weights = Llm(config).state_dict()
    save_translator(folder, config, weights, tiny.translation_tokenizer(), TranslationConfig(**translation))
    return folder


def changed(folder: Path, **values: Any) -> Path:
    """The folder with other values in its config; None takes a key out."""
    data = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return folder


def published(folder: Path, *, template: bool = True, **values: Any) -> Path:
    """A model of the Llama family with a tokenizer.json."""
    source = hugging_face("byte-level")
    size = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    config = LlmConfig(vocab_size=len(size) + 8, tied=True, **SHAPE)
    from models.folder import write_model

    torch.manual_seed(0)
    hf = {
        "model_type": "llama", "vocab_size": config.vocab_size, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "tie_word_embeddings": True, "max_position_embeddings": 512, **values,
    }  # fmt: skip
    write_model(folder, hf, Llm(config).state_dict())
    (folder / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    if template:
        (folder / "chat_template.jinja").write_text("<s>{{ messages[0]['content'] }}\nanswer:")
    return folder


def test_a_saved_translator_is_loaded_as_it_was(tmp_path: Path) -> None:
    t = load_translator(saved(tmp_path, read_threshold=0.25, targets=("es",), max_context_tokens=100))
    assert t.config == TranslationConfig(read_threshold=0.25, targets=("es",), max_context_tokens=100)
    assert (t.name, t.policy, t.device.type) == ("own", "interleaved", "cpu")
    ids = tuple(map(t.tokenizer.id_of, ("<s>", "<|en|>", "<|es|>", "<|low-medium|>")))
    assert t.direction("es", "low-medium").prompt == ids
    again = load_translator(tmp_path, dtype="bfloat16")
    assert again.llm.dtype == torch.bfloat16


def test_what_may_be_written() -> None:
    t = tiny.translator()
    assert t.unwritable.shape == (t.llm.config.vocab_size,)
    assert not t.unwritable[t.end_of_write] and t.unwritable[t.end_of_read]
    assert t.unwritable[t.tokenizer.size :].all()  # rows of the embedding without a piece
    assert not t.unable_to_begin[t.tokenizer.encode_word("the")[0]]
    assert t.unable_to_begin[list(t.tokenizer.encode_word("🎉")[1:])].all()
    marks = {decode(t.tokenizer, [i]).strip() for i in t.marks - {t.end_of_write}}
    assert {".", "?", "!"} <= marks and not any(c.isalnum() or c == "\ufffd" for mark in marks for c in mark or "x")


def test_what_the_model_has_not_learnt_to_read_is_left_out() -> None:
    t = tiny.translator()
    assert t.encode_word("🎉") == t.encode_word("同声传译") == ()
    assert t.encode_word("the🎉") == t.encode_word("the")
    assert decode(t.tokenizer, t.encode_word("speaker")) == " speaker"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("xx",), "unsupported_language", "cannot write the language 'xx'; it knows es, de, fr"),
        (("es", "soon"), "unsupported_latency", "'soon'; it knows low, low-medium"),
    ],
)
def test_what_the_model_cannot_do_is_refused(arguments: tuple[str, ...], code: str, message: str) -> None:
    with pytest.raises(DragomanError, match=message) as refused:
        tiny.translator().direction(*arguments)
    assert refused.value.code == code
    with pytest.raises(DragomanError, match="read the language 'fr'; it knows en"):
        tiny.translator().direction("es", source="fr")


@pytest.mark.parametrize(
    ("translation", "message"),
    [
        ("interleaved", "JSON str, not an object"), ({"kind": "other"}, "'other'"),
        ({"kinds": "x"}, "known keys are kind"),
        ({"latencies": ["soon"]}, "'soon'"), ({"read_threshold": 2}, "0 to 1"), ({"targets": []}, "name a language"),
        ({"casing": "upper"}, "'any' or 'lower'"), ({"targets": "es"}, "targets is 'es'; it has to be a list"),
        ({"max_context_tokens": "512"}, "'512'; it is a number"), ({"read_threshold": "half"}, "'half'"),
        ({"read_thresholds": [0.5]}, "object of objects"), ({"read_thresholds": {"es": {"low": 2}}}, "is 2; it"),
        ({"read_thresholds": {"it": {"low": 0.5}}}, "'it' at 'low'"), ({"endpoint": 2}, "a symbol of the tokenizer"),
        ({"prompt": "<s>{to}"}, "field {to}; known are"), ({"prompt": "<s>{"}, "prompt is not"),
    ],
)  # fmt: skip
def test_a_broken_translation_object_is_refused(tmp_path: Path, translation: Any, message: str) -> None:
    with pytest.raises(DragomanError, match=message) as refused:
        load_translator(changed(saved(tmp_path), translation=translation))
    assert refused.value.code == "unsupported_model"


def test_a_context_that_the_prompt_fills_is_refused(tmp_path: Path) -> None:
    t = load_translator(saved(tmp_path, max_context_tokens=20))
    with pytest.raises(DragomanError, match="4 tokens, which leaves 16 of its max_context_tokens 20; 32 are needed"):
        t.direction("es")


def test_a_model_that_nothing_tells_how_it_translates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DragomanError, match='no "translation" in its config.json and no chat template'):
        load_translator(changed(saved(tmp_path), translation=None))
    with pytest.raises(DragomanError, match='no "translation"'):
        load_translator(published(tmp_path / "b", template=False))


def test_a_model_without_the_symbols_is_refused(tmp_path: Path) -> None:
    (saved(tmp_path) / "tokenizer.model").write_bytes(tiny.tokenizer())
    with pytest.raises(DragomanError, match=r"no symbol <\|end-of-read\|>"):
        load_translator(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    small = LlmConfig(vocab_size=100, **SHAPE)
    save_translator(tmp_path, small, Llm(small).state_dict(), tiny.translation_tokenizer(), TranslationConfig())
    with pytest.raises(DragomanError, match=r"has 309 pieces, the model of 'unnamed' 100"):
        load_translator(tmp_path)


def test_a_tuned_published_model_is_prompted_in_its_chat(tmp_path: Path) -> None:
    t = load_translator(published(tmp_path, translation={"prompt": EAST_PROMPT, "targets": ["de"]}))
    assert t.policy == "interleaved"
    said = b"".join(t.tokenizer.bytes_of(i) for i in t.direction("de", "high").prompt).decode()
    assert said.startswith("You are a professional simultaneous interpreter")
    assert "English text into German with high latency.\nanswer:" in said
    assert t.direction("de").prompt[0] == t.tokenizer.id_of("<s>")


@pytest.mark.parametrize("policy", ["wait-k", "local-agreement"])
def test_a_plain_model_runs_under_a_declared_policy(tmp_path: Path, policy: Any) -> None:
    t = load_translator(published(tmp_path), fallback=policy)
    assert t.policy == policy and t.config.max_context_tokens == 512
    session = TextSession(t, ["de", "es"], "low")
    assert session.policy == policy
    events = session.push("the speaker is still talking and nothing is shown") + session.finish()
    for language in ("de", "es"):
        own = [e for e in events if isinstance(e, TranslationDelta) and e.language == language]
        assert own and own[-1].endpoint and own[-1].source_words[1] == 8


def test_casing_is_what_the_model_knows(tmp_path: Path) -> None:
    lower = load_translator(saved(tmp_path, casing="lower"))
    assert lower.encode_word("THE") == lower.tokenizer.encode_word("the")
    assert tiny.translator().encode_word("THE") == (), "capitals are not in its vocabulary"


def test_the_two_symbols_are_the_papers() -> None:
    t: Translator = tiny.translator()
    assert (t.tokenizer.id_of(END_OF_READ), t.tokenizer.id_of(END_OF_WRITE)) == (t.end_of_read, t.end_of_write)
