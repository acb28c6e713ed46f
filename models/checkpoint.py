"""Models on disk: the Hugging Face layout, read and written.

A model folder holds ``config.json``, ``model.safetensors``, ``tokenizer.model`` and ``README.md`` (its card).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.config import ModelConfig
from models.recognizer import Recognizer
from streaming.errors import DragomanError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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
    if dtype not in DTYPES:
        raise DragomanError("unsupported_dtype", f"the dtype {dtype!r} is not supported: use {' or '.join(DTYPES)}")
    require_device(device)
    folder = EMBEDDED_MODEL if path is None else path
    config = _read_config(folder)
    weights = _required(folder, "model.safetensors")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise DragomanError("bad_checkpoint", f"{weights} is not a safetensors file: {error}") from error
    tokenizer = _required(folder, "tokenizer.model").read_bytes()
    return Recognizer.create(config, tensors, tokenizer, device=device, dtype=DTYPES[dtype])


def require_device(device: str) -> None:
    """Makes sure that PyTorch has a device of that name.

    Raises:
        DragomanError: ``unsupported_device``.
    """
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise DragomanError("unsupported_device", f"the device {device!r} is not supported: use cpu, cuda or cuda:N")
    there = torch.cuda.device_count()
    if kind == "cuda" and int(number or 0) >= there:
        raise DragomanError(
            "unsupported_device", f"{device} was asked for and PyTorch sees {there} CUDA devices; use --device cpu"
        )


def save_checkpoint(out: Path, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: bytes, card: str) -> None:
    """Writes a model folder.

    Args:
        out: The folder; made if it is not there.
        config: Shape and name of the model.
        weights: Tensors under the published names, in the dtype to be stored.
        tokenizer: A SentencePiece model, serialised.
        card: The model card, Markdown.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    (out / "tokenizer.model").write_bytes(tokenizer)
    (out / "README.md").write_text(card, encoding="utf-8")
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _read_config(folder: Path) -> ModelConfig:
    file = _required(folder, "config.json")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DragomanError("bad_checkpoint", f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise DragomanError("bad_checkpoint", f"{file} holds a JSON {type(data).__name__}, not an object")
    return ModelConfig.from_dict(data)


def _required(folder: Path, name: str) -> Path:
    """The file of that name, which must be there."""
    if not folder.is_dir():
        hint = "; convert a .nemo archive with `dragoman models import`" if folder.suffix == ".nemo" else ""
        raise DragomanError("model_not_found", f"{folder} is not a model folder{hint}")
    file = folder / name
    if not file.is_file():
        raise DragomanError(
            "model_not_found",
            f"{folder} has no {name}; a model folder holds config.json, model.safetensors and tokenizer.model",
        )
    return file
