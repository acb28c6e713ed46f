"""How sentences sound: one symbol a sound, of which none is lost."""

import json
import shutil
from pathlib import Path

import pytest

from training.asr import phones
from training.asr.phones import PHONES, phones_of, pronounce, pronounce_packed
from training.asr.voices import run_program

pytestmark = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")

TEXTS = [
    "the speaker is still talking",
    "he's not my father",
    "which azure measure did george choose with the thing you saw",
    "a boy cried out loud while the lady hoped to go home",
    "her bird could look at good water in los angeles",
]


def test_a_text_is_its_sounds() -> None:
    assert pronounce(["six", "thank you"]) == ["sɪks", "θæŋkju"]


def test_every_sound_is_written_and_nothing_else_is_lost() -> None:
    spoken = pronounce(TEXTS)
    assert set("".join(spoken)) <= set(PHONES) and len(set("".join(spoken))) > 36
    marks = set(" ˈˌːʲ^\n")
    for text, sounds in zip(TEXTS, spoken, strict=True):
        raw = run_program(list(phones._COMMAND), f"{text}.").decode()
        # Diphthongs and affricates are two letters and one sound; r-coloured vowels the other way round.
        letters = [x for x in raw if x not in marks]
        assert abs(len(letters) - len(sounds)) <= raw.count("^") + raw.count("ɚ") + raw.count("ɜː")
    assert phones_of("t^ʃˈa^ɪld") == "ʧIld"


def test_a_text_that_is_spoken_as_two_clauses_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(command: list[str], text: str) -> bytes:
        return run_program(command, text.replace("while", ".\n\n"))

    whole = pronounce([text.replace("while ", "") for text in TEXTS])
    monkeypatch.setattr(phones, "run_program", broken)
    assert pronounce(TEXTS) == whole


def test_the_index_tells_the_sounds_afterwards(tmp_path: Path) -> None:
    lines = [{"text": text, "speaker": "s"} for text in (*TEXTS, TEXTS[0])]
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert pronounce_packed(tmp_path, workers=2) == 6
    after = [json.loads(line) for line in (tmp_path / "index.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{key: line[key] for key in ("text", "speaker")} for line in after] == lines
    assert [line["phones"] for line in after] == pronounce([line["text"] for line in lines])
