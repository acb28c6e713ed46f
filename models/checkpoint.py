"""Models on disk: the Hugging Face layout, read and written.

A model folder holds ``config.json``, ``model.safetensors``, ``tokenizer.model`` and ``README.md`` (its card).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from models.config import ModelConfig
from models.folder import (
    CONFIG,
    WEIGHTS,
    dtype_of,
    read_object,
    read_tensors,
    require_device,
    required_file,
    write_model,
)
from models.recognizer import Recognizer

TOKENIZER = "tokenizer.model"
_CONTENTS = f"a model folder holds {CONFIG}, {WEIGHTS} and {TOKENIZER}"
#: The model in the repository, used when none is named.
EMBEDDED_MODEL = Path(__file__).parent / "en-small"


def load_recognizer(path: Path | None = None, *, device: str = "cpu", dtype: str = "float32") -> Recognizer:
    """Reads a model folder; without a path, the embedded one.

    Args:
        path: The folder.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``float32`` or ``bfloat16``, whatever the weights are stored in.

    Raises:
        DragomanError: ``model_not_found``, ``bad_checkpoint`` or ``unsupported_model``, saying which file and why;
            ``unsupported_device`` or ``unsupported_dtype``.
    """
    weights_dtype, folder = dtype_of(dtype), EMBEDDED_MODEL if path is None else path
    require_device(device)
    config, weights, tokenizer = (required_file(folder, name, _CONTENTS) for name in (CONFIG, WEIGHTS, TOKENIZER))
    parsed = ModelConfig.from_dict(read_object(config))
    return Recognizer.create(parsed, read_tensors(weights), tokenizer.read_bytes(), device=device, dtype=weights_dtype)


def save_checkpoint(out: Path, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: bytes, card: str) -> None:
    """Writes a model folder.

    Args:
        out: The folder; made if it is not there.
        config: Shape and name of the model.
        weights: Tensors under the published names, in the dtype to be stored.
        tokenizer: A SentencePiece model, serialised.
        card: The model card, Markdown.
    """
    write_model(out, config.to_dict(), weights)
    (out / TOKENIZER).write_bytes(tokenizer)
    (out / "README.md").write_text(card, encoding="utf-8")
