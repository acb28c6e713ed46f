"""The recipe of the n-grams: which chunks of the packed sequences it reads, and the file that it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.tokenizer import SentencePieceTokenizer
from streaming.drafts import MARK, load_seeds
from tests import tiny
from training.translation.data import PROMPT, READ_ON, SOURCE, WRITE, Interleaved, pack
from training.translation.drafts import rows, run


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Eight sequences into Spanish, one into German, and another pass; two chunks each."""
    pieces = SentencePieceTokenizer(tiny.translation_tokenizer())
    (tmp_path / "tokenizer.model").write_bytes(tiny.translation_tokenizer())
    read, write = pieces.id_of("<|end-of-read|>"), pieces.id_of("<|end-of-write|>")
    assert read is not None and write is not None

    def sequence(language: str, last: int = 0) -> Interleaved:
        prompt = pieces.encode_prompt(f"<s><|en|><|{language}|><|medium|>")
        ids = [*prompt, 50, 51, read, 60, 61, write, 52 + last, read, 62 + last, write]
        kinds = [PROMPT] * len(prompt)
        kinds += [SOURCE, READ_ON, WRITE, WRITE, WRITE, WRITE, SOURCE, PROMPT, WRITE, WRITE]
        return Interleaved(ids, kinds)

    first = [sequence("es"), sequence("es", 1)] * 4 + [sequence("de")]
    pack([first, [sequence("es")] * 99], tmp_path / "packed", {})
    return tmp_path


def test_the_chunks_of_one_pass_are_read(packed: Path) -> None:
    pieces = SentencePieceTokenizer((packed / "tokenizer.model").read_bytes())
    es, read, write = (pieces.id_of(f"<|{name}|>") for name in ("es", "end-of-read", "end-of-write"))
    assert es is not None and read is not None and write is not None
    found = [[(a.tolist(), b.tolist()) for a, b in row] for row in rows(packed / "packed", es, read, write)]
    assert found == [[([50, 51], [60, 61, write]), ([52 + last], [62 + last, write])] for last in (0, 1)] * 4


def test_the_seeds_of_all_languages_stand_beside_the_model(packed: Path) -> None:
    run(packed / "packed", packed / "tokenizer.model", packed / "model", 100)
    seeds = load_seeds(packed / "model")
    pieces = SentencePieceTokenizer((packed / "tokenizer.model").read_bytes())
    end = pieces.id_of("<|end-of-write|>")
    assert seeds["es"][chr(60)] == (61, pytest.approx(7.2 / 8, abs=1 / 255))
    assert end is not None
    assert [seeds["es"][chr(word) + MARK + chr(end)][0] for word in (52, 53)] == [62, 63]  # as the source says
    assert not seeds.get("de")  # said once only
