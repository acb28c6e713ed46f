"""Text to ids and back: word by word, append-only, and no word becomes a control."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from models.tokenizer import (
    MAX_WORD_IDS,
    ChatTemplate,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    decode,
    encode_words,
    load_tokenizer,
)
from streaming.errors import DragomanError
from tests import tiny

CONTROLS = ["<|end-of-read|>", "<|end-of-write|>", "<|es|>", "<s>"]
KINDS = ["sentencepiece", "byte-level", "metaspace"]
TEXT = ["the speaker is still talking", "el hablante sigue hablando, y nada se retira", "der Sprecher redet noch"]


@cache
def hugging_face(kind: str) -> Path:
    """A folder with a small tokenizer of Llama 3's kind or of Gemma's."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=kind == "metaspace", unk_token=None))
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "metaspace" else []
    if kind == "byte-level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        start = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        start = []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*CONTROLS, *alphabet], initial_alphabet=start, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    folder = Path(mkdtemp())
    tokenizer.save(str(folder / "tokenizer.json"))
    if alphabet:  # byte pieces are no added tokens in published files
        data = json.loads((folder / "tokenizer.json").read_text())
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in CONTROLS]
        (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


@cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "sentencepiece":
        return SentencePieceTokenizer(tiny.translation_tokenizer())
    return HuggingFaceTokenizer(hugging_face(kind))


plain_words = st.lists(
    st.text(
        st.characters(exclude_categories=("Cs", "Cc", "Cf", "Zs", "Zl", "Zp", "Mn"), max_codepoint=0x1FFFF),
        min_size=1,
        max_size=8,
    ).filter(lambda word: len(word.split()) == 1),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), words=plain_words)
def test_the_ids_of_a_text_are_its_words_ids_and_its_bytes(kind: str, words: list[str]) -> None:
    t = tokenizer(kind)
    if kind == "sentencepiece":  # whose rules turn some characters into others, like the ligature of f and i
        import unicodedata

        words = [word for word in words if unicodedata.normalize("NFKC", word) == word and "▁" not in word]
    words = [word for word in words if "▁" not in word]
    ids = encode_words(t, "  ".join(words))
    assert ids == tuple(token for word in words for token in t.encode_word(word))
    assert decode(t, ids) == "".join(" " + word for word in words)
    assert not t.controls & set(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("control", CONTROLS)
def test_a_word_that_spells_a_control_is_text(kind: str, control: str) -> None:
    t = tokenizer(kind)
    assert t.id_of(control) in t.controls
    for word in (control, f"a{control}b", control * 2):
        ids = t.encode_word(word)
        assert decode(t, ids) == " " + word
        assert not t.controls & set(ids)
    assert t.encode_prompt(control) == (t.id_of(control),)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_words_are_cut_or_replaced(kind: str) -> None:
    t = tokenizer(kind)
    assert len(t.encode_word("x" * 5_000)) == MAX_WORD_IDS
    assert decode(t, t.encode_word("a\ud800b")) == " a?b"
    assert decode(t, t.encode_word("🎉👩‍👧")) == " 🎉👩‍👧"
    assert t.id_of("<|xx|>") is None and t.id_of("the") is None


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_is_replaced(kind: str) -> None:
    t = tokenizer(kind)
    ids = t.encode_word("語")
    assert decode(t, ids[:-1]).endswith("\ufffd")


def test_a_prompt_of_symbols_has_an_id_for_each() -> None:
    t = tokenizer("sentencepiece")
    assert t.encode_prompt("<s><|en|><|es|>") == tuple(map(t.id_of, ("<s>", "<|en|>", "<|es|>")))
    assert decode(t, t.encode_prompt("<s>the speaker")) == " the speaker"


def test_a_template_is_rendered_as_in_transformers(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}\n    <|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    config = {"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    chat = ChatTemplate.read(tmp_path)
    assert chat is not None
    assert chat.render(" hello ") == "<s>    <|user|>hello<|end|>\n<|assistant|>"
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    refusing = ChatTemplate.read(tmp_path)
    assert refusing is not None
    with pytest.raises(DragomanError, match="cannot be rendered: no"):
        refusing.render("hello")


def test_a_template_is_somebody_elses_program() -> None:
    chat = ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", {})
    with pytest.raises(DragomanError, match="cannot be rendered"):
        chat.render("hello")


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DragomanError, match=r"has no tokenizer.*tokenizer.model or tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(DragomanError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DragomanError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
