"""The metrics of lag are those of the field: worked by hand, and as OmniSTEval computes them from the same log."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.latency import (
    Instance,
    Lagging,
    average_lagging,
    average_proportion,
    differentiable_average_lagging,
    length_adaptive_average_lagging,
    normalized_erasure,
    simultaneous_average_lagging,
    word_delays,
    write_log,
)
from streaming.errors import DragomanError

# ------------------------------------------------------------------------------------------------ worked by hand

WAIT_2 = (2, 3, 4, 4)
"""Two words of four are read, then a word is written for each that is read."""


def test_wait_2_of_four_words() -> None:
    assert average_lagging(WAIT_2, 4, 4) == (2 + (3 - 1) + (4 - 2)) / 3
    assert length_adaptive_average_lagging(WAIT_2, 4, 4) == 2
    assert simultaneous_average_lagging(WAIT_2, 4, 4) == (2 + (3 - 1)) / 2
    assert differentiable_average_lagging(WAIT_2, 4) == (2 + (3 - 1) + (4 - 2) + (5 - 3)) / 4
    assert average_proportion(WAIT_2, 4, 4) == 13 / 16


def test_offline_waits_for_everything() -> None:
    assert average_lagging((4, 4, 4), 4, 3) == 4
    assert length_adaptive_average_lagging((4, 4, 4), 4, 3) == 4
    assert simultaneous_average_lagging((4, 4, 4), 4, 3) is None
    assert differentiable_average_lagging((4, 4, 4), 4) == pytest.approx(4)
    assert average_proportion((4, 4, 4), 4, 3) == 1


def test_a_long_translation_gains_by_al_and_not_by_laal() -> None:
    delays = (1, 1, 1, 2, 2, 2, 2, 2)
    assert average_lagging(delays, 2, 2) == (1 + 0 - 1 + (2 - 3)) / 4
    assert length_adaptive_average_lagging(delays, 2, 2) == (1 + 0.75 + 0.5 + 1.25) / 4


def test_what_is_late_makes_the_rest_late_in_dal_alone() -> None:
    delays = (3000.0, 3000.0, 3200.0)
    assert differentiable_average_lagging(delays, 3600) == (3000 + (4200 - 1200) + (5400 - 2400)) / 3
    assert average_lagging(delays, 3600, 3) == (3000 + 1800 + 800) / 3


def test_a_first_word_after_the_end_has_its_own_delay() -> None:
    """As computation-aware times may be."""
    assert average_lagging((5, 9), 4, 2) == 5
    assert length_adaptive_average_lagging((5, 9), 4, 2) == 5
    assert simultaneous_average_lagging((5, 9), 4, 2) is None


def test_without_a_reference_the_translation_stands_for_it() -> None:
    assert average_lagging(WAIT_2, 4, 0) == average_lagging(WAIT_2, 4, 4)
    assert average_proportion(WAIT_2, 4, 0) == average_proportion(WAIT_2, 4, 4)


@pytest.mark.parametrize(("delays", "source_length"), [((), 4.0), ((1.0,), 0.0)])
def test_nothing_written_or_nothing_said_has_no_lag(delays: tuple[float, ...], source_length: float) -> None:
    assert average_lagging(delays, source_length, 3) is None
    assert length_adaptive_average_lagging(delays, source_length, 3) is None
    assert simultaneous_average_lagging(delays, source_length, 3) is None
    assert differentiable_average_lagging(delays, source_length) is None
    assert average_proportion(delays, source_length, 3) is None


@pytest.mark.parametrize(
    ("texts", "erasure"),
    [
        ([], None),
        ([""], None),
        (["a", "a b", "a b c"], 0),
        (["a", "a b", "a c d"], 1 / 3),  # b
        (["a b c", "x", "x y"], 3 / 2),  # all three, and x stays
        (["a b c", "a"], 2),  # b and c
        (["a b", "a bc"], 1 / 2),  # a word that grows was not that word
        (["a b", ""], None),
    ],
)
def test_erasure(texts: list[str], erasure: float | None) -> None:
    assert normalized_erasure([texts]) == erasure


@given(st.lists(st.lists(st.lists(st.sampled_from("ab"), max_size=5), min_size=1, max_size=5)))
def test_erasure_is_that_of_a_naive_count(segments: list[list[list[str]]]) -> None:
    erased = 0
    for states in segments:
        for old, new in pairwise([[], *states]):
            while old != new[: len(old)]:  # take words back until what is left can be continued
                old = old[:-1]
                erased += 1
    final = sum(len(states[-1]) for states in segments)
    assert normalized_erasure([map(" ".join, states) for states in segments]) == (erased / final if final else None)


@given(st.lists(st.text(" ab", max_size=4), max_size=8))
def test_a_word_has_the_delay_of_its_last_piece(deltas: list[str]) -> None:
    text, delays = word_delays([(delta, i) for i, delta in enumerate(deltas)])
    assert text == "".join(deltas).strip()
    owners = [(character, i) for i, delta in enumerate(deltas) for character in delta]
    ends = [i for (c, i), (after, _) in pairwise([*owners, (" ", -1)]) if c != " " and after == " "]
    assert list(delays) == ends


# ----------------------------------------------------------------------------------------------------- OmniSTEval


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    source_length = draw(st.integers(1, 12) | st.integers(500, 5000))
    words = draw(st.integers(0, 12))
    delays = sorted(draw(st.lists(st.integers(1, source_length), min_size=words, max_size=words)))
    late = draw(st.lists(st.floats(0, source_length), min_size=words, max_size=words))
    return Instance(
        source="x.wav",
        prediction=" ".join(draw(st.sampled_from("abc")) for _ in range(words)),
        reference=" ".join(["a"] * draw(st.integers(1, 12))),
        delays=tuple(delays),
        source_length=source_length,
        elapsed=tuple(delay + more for delay, more in zip(delays, late, strict=True)),
    )


@settings(deadline=None)
@given(st.lists(instances(), min_size=1, max_size=8))
def test_omnisteval_computes_the_same_from_the_log(
    tmp_path_factory: pytest.TempPathFactory, log: list[Instance]
) -> None:
    omnisteval = pytest.importorskip("omnisteval")
    from omnisteval.io import load_shortform_instances
    from omnisteval.scoring import evaluate_instances

    assert omnisteval.__version__ == "0.1.10"
    file = tmp_path_factory.mktemp("log") / "log.jsonl"
    write_log(log, file)
    read = load_shortform_instances(str(file), None, "delays", "elapsed")
    scores, _, _ = evaluate_instances(read, compute_quality=False, is_longform=False)
    for prefix, lagging in (("", Lagging.of(log)), ("ca_", Lagging.of(log, computation_aware=True))):
        for name in ("al", "laal", "yaal", "dal", "ap"):
            theirs, ours = scores.get(prefix + name, math.nan), getattr(lagging, name)
            assert math.isnan(theirs) if ours is None else ours == pytest.approx(theirs)


# ------------------------------------------------------------------------------------------------------------- log


def test_a_line_of_the_log(tmp_path: Path) -> None:
    instance = Instance("good morning", "buenos días", "buen día", (1, 2), 2, (1.5, 2.5), {"language": "es"})
    write_log([instance, instance], tmp_path / "log.jsonl")
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines())
    assert first == {
        **{"index": 0, "source": "good morning", "prediction": "buenos días", "reference": "buen día"},
        **{"delays": [1, 2], "elapsed": [1.5, 2.5], "prediction_length": 2, "source_length": 2, "language": "es"},
    }
    assert second == {**first, "index": 1}


def test_every_word_needs_its_times() -> None:
    with pytest.raises(DragomanError, match="2 words has 1 delays and 0 elapsed") as raised:
        Instance("x", "a b", "a b", (1,), 2)
    assert raised.value.code == "log_invalid"
