"""What every model folder has in common: JSON, safetensors, and the errors when they are not as they should be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from streaming.errors import DragomanError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        DragomanError: ``unsupported_dtype``.
    """
    if name not in DTYPES:
        raise DragomanError("unsupported_dtype", f"the dtype {name!r} is not supported: use {' or '.join(DTYPES)}")
    return DTYPES[name]


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


def required_file(folder: Path, name: str, contents: str) -> Path:
    """The file of that name, which must be there.

    Args:
        folder: A model folder.
        name: The file.
        contents: What such a folder holds, for who is told that it does not.

    Raises:
        DragomanError: ``model_not_found``.
    """
    if not folder.is_dir():
        hint = "; convert a .nemo archive with `dragoman models import`" if folder.suffix == ".nemo" else ""
        raise DragomanError("model_not_found", f"{folder} is not a model folder{hint}")
    if not (folder / name).is_file():
        raise DragomanError("model_not_found", f"{folder} has no {name}; {contents}")
    return folder / name


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DragomanError: ``bad_checkpoint``.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DragomanError("bad_checkpoint", f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise DragomanError("bad_checkpoint", f"{file} holds a JSON {type(data).__name__}, not an object")
    return data


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file.

    Raises:
        DragomanError: ``bad_checkpoint``.
    """
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise DragomanError("bad_checkpoint", f"{file} is not a safetensors file: {error}") from error
    return tensors


def write_model(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Writes config and weights, in the weights' own dtypes; the folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def require_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str = "the weights") -> None:
    """Makes sure that weights are those of a config.

    Args:
        own: The parameters that the config asks for.
        tensors: The weights.
        what: What they are, for the sentence.

    Raises:
        DragomanError: ``bad_checkpoint`` naming the tensors that are missing, unknown or of another shape.
    """
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    hint = "the config.json and the weights must come from one model"
    if missing or unknown:
        raise DragomanError(
            "bad_checkpoint",
            f"{what} do not fit the config: {len(missing)} tensors are missing"
            f" ({', '.join(missing[:3]) or 'none'}), {len(unknown)} are unknown ({', '.join(unknown[:3]) or 'none'});"
            f" {hint}",
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise DragomanError(
                "bad_checkpoint",
                f"{what} do not fit the config: {name} has shape {tuple(tensors[name].shape)}, the config asks for"
                f" {tuple(tensor.shape)}; {hint}",
            )
