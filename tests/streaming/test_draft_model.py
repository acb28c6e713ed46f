"""Draft models: what they propose is what reading all from the beginning gives, and the text is that without them."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.llm import Llm
from models.llm_config import LlmConfig
from models.tokenizer import SentencePieceTokenizer
from models.translator import END_OF_READ, END_OF_WRITE, TranslationConfig, Translator
from streaming.draft_model import (
    DraftModel,
    Listener,
    Skipped,
    common_prefix,
    load_draft_model,
    require_same_tokens,
    search_layers,
)
from streaming.drafts import Context, spelled
from streaming.errors import DragomanError
from streaming.speculation import Speculation
from streaming.translation import Interleaved
from tests import tiny
from tests.streaming.test_speculation import begun, plain
from tests.streaming.test_translation import Spoken, fed, run, seeds, words_

few = settings(max_examples=6, deadline=None)
SENTENCE = "the speaker is still talking and nothing that was shown".split()
SPOKEN: Spoken = [(word, i % 6 == 5) for i, word in enumerate(SENTENCE * 5)]


@cache
def deep(seed: int = 0) -> Translator:
    """A tiny translator of five layers, of which the second does next to nothing."""
    tokenizer = SentencePieceTokenizer(tiny.translation_tokenizer())
    torch.manual_seed(seed)
    llm = Llm(
        LlmConfig(tokenizer.size, d_model=32, d_ff=48, n_layers=5, n_heads=4, n_kv_heads=2, head_dim=8, tied=False)
    )
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
        for name, parameter in llm.model.layers[1].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1e-4)
        assert llm.lm_head is not None
        for symbol in (END_OF_READ, END_OF_WRITE):
            llm.lm_head.weight[tokenizer.id_of(symbol)] *= 2.0
    return Translator(llm.freeze(), tokenizer, TranslationConfig(), name="deep")


def model(t: Translator, seed: int, *, min_probability: float = 0.0, max_rows: int = 64) -> DraftModel:
    return DraftModel(tiny.translation_llm(seed).freeze(), t, min_probability=min_probability, max_rows=max_rows)


@given(a=st.text("ab", max_size=9), b=st.text("ab", max_size=9))
def test_the_common_prefix(a: str, b: str) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])


# ---------------------------------------------------------------------------------------------------------- drafts


def at(t: Translator, sequence: str) -> Context:
    """A place whose target side is what stands behind the last beginning of a write."""
    return Context("es", sequence.rpartition(chr(t.end_of_read))[2], t.end_of_write, sequence=sequence)


@few
@given(lies=st.integers(0, 1 << 32).map(random.Random), max_rows=st.sampled_from([1, 3, 64]))
def test_what_was_read_before_changes_nothing(lies: random.Random, max_rows: int) -> None:
    """Rows that come and go, go on as drafted or otherwise, or forget their beginning, beside a model that is new."""
    t = tiny.translator(0)
    kept = model(t, 1, max_rows=max_rows)
    rows = [spelled([5, 6, t.end_of_read])] * 4
    for _ in range(6):
        asked = lies.sample(range(4), lies.randint(1, 4))
        contexts = [at(t, rows[i]) for i in asked]
        proposals = kept.propose_all(contexts, 4)
        for i, context, proposal in zip(asked, contexts, proposals, strict=True):
            assert proposal.draft == model(t, 1).propose(context, 4).draft
            assert proposal.sources == (kept.name,) * len(proposal.sure)
            assert t.end_of_write not in proposal.draft.tokens
            assert not any(t.unwritable[token] for token in proposal.draft.tokens)
            taken = proposal.draft.tokens[: lies.randint(0, 4)]
            rows[i] += spelled([*taken, *(lies.choice([t.end_of_write, 9, 40, 77]) for _ in range(lies.randint(1, 3)))])
            if lies.random() < 0.2:
                rows[i] = rows[i][:2] + rows[i][5:]
        assert kept.rows <= max_rows


def test_what_a_row_has_read_is_not_read_again() -> None:
    t = tiny.translator(0)
    draft = model(t, 1)
    rows = [spelled([5, 6, 7 + i] * 10) + chr(t.end_of_read) for i in range(3)]
    draft.propose_all([at(t, row) for row in rows], 1)
    assert (draft.forwards, draft.read_tokens) == (1, 93)
    draft.propose_all([at(t, row + "a") for row in rows], 1)
    assert (draft.forwards, draft.read_tokens) == (2, 96)
    draft.propose(at(t, rows[1] + "ab"), 1)
    assert draft.read_tokens == 97
    draft.propose_all([at(t, row + "abc") for row in rows], 1)
    assert draft.read_tokens == 97 + 2 + 1 + 2
    assert draft.rows == 3


def test_a_draft_ends_where_the_model_is_not_sure() -> None:
    t = tiny.translator(0)
    contexts = [at(t, spelled([5, 6 + i, t.end_of_read])) for i in range(20)]
    context, whole = max(
        zip(contexts, model(t, 1).propose_all(contexts, 6), strict=True), key=lambda one: len(one[1].sure)
    )
    assert len(whole.sure) > 2 and all(0 < sure <= 1 for sure in whole.sure)
    least = sorted(whole.sure)[len(whole.sure) // 2]
    shorter = model(t, 1, min_probability=least + 1e-4).propose(context, 6)
    n = next(i for i, sure in enumerate(whole.sure) if sure < least + 1e-4)
    assert shorter == whole.first(n)
    assert not model(t, 1).propose(Context("es", "", t.end_of_write), 6).sure


@few
@given(seed=seeds, other=seeds, talks=st.lists(words_, min_size=1, max_size=2), fixed=st.booleans())
def test_the_text_is_the_text_without(seed: int, other: int, talks: list[Spoken], fixed: bool) -> None:
    t = tiny.translator(seed, max_context_tokens=60)
    expected = [plain(t, talk, ["es", "de"]) for talk in talks]
    interpreter = Interleaved(t, Speculation([model(t, other)], fixed=fixed, max_tokens=4))
    states = [fed(interpreter, begun(t, ["es", "de"], {}), talk) for talk in talks]
    chunks = [[] for _ in talks]
    while any(map(interpreter.ready, states)):
        found, states = interpreter.step(states, max_forwards=3)
        chunks = [before + new for before, new in zip(chunks, found, strict=True)]
    for found, (before, state), after in zip(chunks, expected, states, strict=True):
        for row in range(2):
            assert [c for c in found if c.row == row] == [c for c in before if c.row == row]
        assert after.rows == state.rows


def test_a_model_that_knows_all_is_always_right() -> None:
    t = tiny.translator(0)
    expected, _ = plain(t, SPOKEN, ["es"])
    speculation = Speculation([model(t, 0)], fixed=True, max_tokens=4)
    interpreter = Interleaved(t, speculation)
    found, _ = run(interpreter, fed(interpreter, begun(t, ["es"], {}), SPOKEN))
    assert found == expected
    assert speculation.accepted["draft model"] == speculation.drafted["draft model"] > 0


# --------------------------------------------------------------------------------------------------- its tokenizer


def test_a_draft_model_is_loaded_if_its_tokens_are_the_translators(tmp_path: Path) -> None:
    t = tiny.translator(0)
    draft = load_draft_model(tiny.save_tiny_translator(tmp_path / "small", 1), t)
    assert draft.name == "draft model small"
    context = at(t, spelled([5, 6, t.end_of_read]))
    draft._min_probability = 0.0
    assert draft.propose(context, 3).draft == model(t, 1).propose(context, 3).draft


class Renamed(SentencePieceTokenizer):
    """Two tokens have changed places."""

    def bytes_of(self, token: int) -> bytes:
        return super().bytes_of({300: 301, 301: 300}.get(token, token))


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    t, folder = tiny.translator(0), Path("small")
    with pytest.raises(DragomanError, match="token 300 is .* for small and .*must have the translator's") as raised:
        require_same_tokens(Renamed(tiny.translation_tokenizer()), t, folder)
    assert raised.value.code == "unsupported_model"
    with pytest.raises(DragomanError, match=rf"of 64 pieces, the translator 'tiny' one of {t.tokenizer.size}"):
        require_same_tokens(SentencePieceTokenizer(tiny.tokenizer()), t, folder)
    shape = LlmConfig(64, d_model=8, d_ff=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8)
    with pytest.raises(DragomanError, match="the draft model has 64 tokens"):
        DraftModel(Llm(shape).freeze(), t)


# ------------------------------------------------------------------------------------------------------- fewer layers


def test_a_view_is_the_model_that_has_the_other_layers_only() -> None:
    shape = LlmConfig(
        50, d_model=16, d_ff=24, n_layers=4, n_heads=2, n_kv_heads=2, head_dim=8, windows=(0, 3, 0, 3), tied=False
    )
    torch.manual_seed(0)
    whole = Llm(shape)
    tensors = {name: torch.randn_like(tensor) for name, tensor in whole.state_dict().items()}
    whole.load_state_dict(tensors)
    short = Llm(LlmConfig(**{**vars(shape), "n_layers": 2, "windows": (0, 3)}))
    names = {name: name.replace("layers.1.", "layers.3.") for name in short.state_dict()}
    short.load_state_dict({name: tensors[of] for name, of in names.items()})
    view, short = whole.freeze().without([1, 2]), short.freeze()
    tokens = torch.randint(50, (2, 9))
    counts = torch.tensor([9, 9])
    mine, theirs = (m.step(tokens, counts, m.init_state(2, capacity=4), logits_at=None)[0] for m in (view, short))
    assert torch.equal(mine, theirs)
    assert view.model.embed_tokens.weight.data_ptr() == whole.model.embed_tokens.weight.data_ptr()
    for wrong in ([4], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="cannot be left out of a model of 4"):
            whole.without(wrong)


def listened(t: Translator) -> Listener:
    listener = Listener()
    interpreter = Interleaved(t, Speculation([listener], fixed=True))
    chunks, _ = run(interpreter, fed(interpreter, begun(t, ["es"], {}), SPOKEN))
    written = [one.tokens[one.begin :] for one in listener.writes]
    ended = [c.ids for c, tokens in zip(chunks, written, strict=True) if tokens == (*c.ids, t.end_of_write)]
    assert len(written) == len(chunks) and len(ended) > 0.5 * len(chunks)  # others were cut
    return listener


def test_the_search_finds_the_layer_that_does_nothing() -> None:
    t = deep()
    writes = listened(t).writes
    assert sum(len(one.tokens) - one.begin for one in writes) > 40, "the test is empty if nothing is written"
    found = search_layers(t, writes, overhead=0.2)
    assert [len(one.layers) for one in found] == [1, 2, 3]
    assert found[0].layers == (1,) and found[0].matches > 0.97
    assert found[0].cost == pytest.approx(0.2 + 0.8 * 4 / 5)
    assert all(set(a.layers) < set(b.layers) for a, b in zip(found, found[1:], strict=False))


def test_leaving_layers_out_pays_only_if_more_is_right_than_a_draft_costs() -> None:
    assert Skipped.of([3, 1], 0.5, 0.6) == Skipped((1, 3), 0.5, 0.6, 0, 1.0)
    good = Skipped.of([1], 0.9, 0.3)
    assert good.tokens == 5 and good.speedup == pytest.approx(sum(0.9**i for i in range(6)) / 2.5)


def test_the_model_drafts_for_itself_with_fewer_layers() -> None:
    t = deep()
    expected, _ = plain(t, SPOKEN, ["es"])
    view = DraftModel(t.llm.without([1]), t, min_probability=0.0, name="layers")
    speculation = Speculation([view], fixed=True, max_tokens=3)
    interpreter = Interleaved(t, speculation)
    assert run(interpreter, fed(interpreter, begun(t, ["es"], {}), SPOKEN))[0] == expected
    assert speculation.accepted["layers"] > 0.9 * speculation.drafted["layers"] > 0
