"""The language model against Transformers', family by family: tiny random models, written by it and read by us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.kv_cache import KvCache
from models.llm import Llm, load_llm

transformers = pytest.importorskip("transformers")

ATOL = 1e-4
VOCAB = 61
#: More tokens than the windows below, fewer, and one alone.
LENGTHS = (23, 11, 1, 16)
LAYERS = 3
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
PER_LAYER_TYPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
WINDOW = {"sliding_window": 6}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4, "head_dim": 8}),
    "llama_grouped_tied_biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 12}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama_linear_rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}}),
    "mistral": ("Mistral", WINDOW),
    "mistral_no_window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {**WINDOW, "head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", {**WINDOW, "head_dim": 16, "sliding_window_pattern": 2, "rope_parameters": PER_LAYER_TYPE}),
}


def build(family: str) -> Any:
    """A model of Transformers whose weights are large enough that every part of it shows in the logits."""
    name, own = FAMILIES[family]
    torch.manual_seed(5)
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    # Eager attention is the one that knows all of the families' features.
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(
        **{**shape, **own}, attn_implementation="eager"
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Llm, Path]:
    """Theirs, and ours with the same weights, and the folder."""
    theirs = build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_llm(folder), folder


def rows() -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (n,), generator=random) for n in LENGTHS]


def logits_of(theirs: Any, row: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = theirs(row[None]).logits[0]
    return logits


def padded(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ragged rows as a batch whose padding would be an error if it were read."""
    counts = torch.tensor([len(part) for part in parts])
    tokens = torch.full((len(parts), max(1, int(counts.max()))), -1)
    for to, part in zip(tokens, parts, strict=True):
        to[: len(part)] = part
    return tokens, counts


def stepped(net: Llm, sequences: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """All logits of ragged rows, read in steps; row ``b`` takes ``sizes[b + i]`` tokens in step ``i``, going round."""
    cache: KvCache | None = net.init_state(len(sequences), capacity=8)
    done, out, i = [0] * len(sequences), [[] for _ in sequences], 0
    while any(d < len(row) for d, row in zip(done, sequences, strict=True)):
        taken = [sizes[(b + i) % len(sizes)] for b in range(len(sequences))]
        parts = [row[d : d + n] for row, d, n in zip(sequences, done, taken, strict=True)]
        logits, cache = net.step(*padded(parts), cache, logits_at=None)
        for b, part in enumerate(parts):
            out[b].append(logits[b, : len(part)])
            done[b] += len(part)
        i += 1
    return [torch.cat(parts) for parts in out]


def test_ragged_rows_at_once(models: tuple[Any, Llm, Path]) -> None:
    theirs, net, _ = models
    logits, _ = net.step(*padded(rows()), net.init_state(len(LENGTHS)), logits_at=None)
    stateless, _ = net.step(*padded(rows()), None, logits_at=None)
    for got, whole, row in zip(logits, stateless, rows(), strict=True):
        expected = logits_of(theirs, row)
        assert expected.std() > 0.1
        torch.testing.assert_close(got[: len(row)], expected, atol=ATOL, rtol=0)
        torch.testing.assert_close(whole[: len(row)], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("sizes", [[1], [1, 3, 0, 7]], ids=["token by token", "ragged chunks"])
def test_step_by_step(models: tuple[Any, Llm, Path], sizes: list[int]) -> None:
    theirs, net, _ = models
    for got, row in zip(stepped(net, rows(), sizes), rows(), strict=True):
        torch.testing.assert_close(got, logits_of(theirs, row), atol=ATOL, rtol=0)


def test_greedy_tokens(models: tuple[Any, Llm, Path]) -> None:
    theirs, net, _ = models
    logits, cache = net.step(*padded(rows()), net.init_state(len(LENGTHS)))
    written = [logits[:, -1].argmax(-1)]
    for _ in range(19):
        logits, cache = net.step(written[-1][:, None], torch.ones(len(LENGTHS), dtype=torch.int64), cache)
        written.append(logits[:, -1].argmax(-1))
    theirs.generation_config.eos_token_id = None
    for prompt, ours in zip(rows(), torch.stack(written, 1), strict=True):
        mask = torch.ones_like(prompt)[None]  # else it would take a family's padding token for padding
        expected = theirs.generate(prompt[None], attention_mask=mask, max_new_tokens=20, do_sample=False)
        assert ours.tolist() == expected[0, len(prompt) :].tolist()


def test_what_is_read_in_training_has_the_same_logits(models: tuple[Any, Llm, Path]) -> None:
    theirs, _, folder = models
    net, row = load_llm(folder, frozen=False), rows()[0]
    torch.testing.assert_close(net(row[None])[0], logits_of(theirs, row), atol=ATOL, rtol=0)


@pytest.mark.parametrize("models", ["llama3_rope", "gemma3"], indirect=True)
def test_shards_and_the_older_form_of_the_config(models: tuple[Any, Llm, Path], tmp_path: Path) -> None:
    """What Transformers 4 wrote: rotary positions in other keys, and here the weights in many files."""
    theirs, net, _ = models
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    new = config.pop("rope_parameters")
    scaling = dict(new.get("full_attention", new))
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    if "sliding_attention" in new:
        config["rope_local_base_freq"] = new["sliding_attention"]["rope_theta"]
        del config["layer_types"]
    config["sliding_window_pattern"] = config.pop("_sliding_window_pattern", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_llm(tmp_path).config == net.config


def test_the_text_model_inside_gemma_3_with_images(tmp_path: Path) -> None:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**build("gemma3").config.to_dict(), "num_hidden_layers": 2, "layer_types": None}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    row = rows()[0]
    logits, _ = load_llm(tmp_path).step(row[None], torch.tensor([len(row)]), None, logits_at=None)
    torch.testing.assert_close(logits[0], logits_of(theirs, row), atol=ATOL, rtol=0)
