"""Fetches a published model by name and pins the revision that was fetched.

The hub is Hugging Face's, or the server that ``HF_ENDPOINT`` names. Downloads go through the hub's own cache,
so that an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError, the HTTP library's own
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from models.config import ModelConfig
from models.nemo import import_nemo
from streaming.errors import DragomanError

LAYOUT = ("config.json", "model.safetensors", "tokenizer.model", "README.md")


def fetch(name: str, revision: str | None = None, out: Path | None = None) -> Path:
    """Downloads a model and writes it as a model folder.

    A repository that holds a model folder is copied as it is; one with a NeMo archive is converted. Either
    way ``config.json`` records the name and the commit that the revision stood for.

    Args:
        name: The repository on the hub, ``owner/name``.
        revision: Branch, tag or commit; the main branch if None.
        out: The folder to write; one in the working directory that is called like the repository if None.

    Returns:
        The folder.

    Raises:
        DragomanError: ``model_not_found`` or ``revision_not_found`` if the hub does not have it,
            ``hub_unreachable`` if the hub does not answer, ``unsupported_model`` if the repository holds no
            model that runs here.
    """
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    folder = out or Path(name.rpartition("/")[2])
    try:
        info = HfApi(endpoint=endpoint).model_info(name, revision=revision)
        files = [entry.rfilename for entry in info.siblings or []]
        wanted = list(LAYOUT) if set(LAYOUT) <= set(files) else [_archive(name, files)]
        paths = [Path(hf_hub_download(name, file, revision=info.sha, endpoint=endpoint)) for file in wanted]
    except (HTTPError, OSError, HFValidationError) as error:
        raise _explained(error, name, revision, endpoint) from error
    source = f"{name}@{info.sha}"
    if len(paths) == 1:
        import_nemo(paths[0], folder, source=source)
    else:
        _copy(paths, folder, source)
    return folder


def _archive(name: str, files: list[str]) -> str:
    """The one NeMo archive among the files of a repository."""
    archives = [file for file in files if file.endswith(".nemo")]
    if len(archives) == 1:
        return archives[0]
    if archives:
        raise DragomanError(
            "unsupported_model",
            f"{name} has {len(archives)} NeMo archives ({', '.join(archives)}), one is needed; download the"
            " right one and give it to `dragoman models import`",
        )
    raise DragomanError(
        "unsupported_model",
        f"{name} has neither a .nemo archive nor {', '.join(LAYOUT[:3])} among its {len(files)} files; choose"
        " the repository of a NeMo streaming model",
    )


def _copy(paths: list[Path], folder: Path, source: str) -> None:
    """Writes a model folder's files, with their origin in the config."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copyfile(path, folder / path.name)
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        config = ModelConfig.from_dict({**settings, "source": source})
    except (ValueError, TypeError) as error:
        raise DragomanError("unsupported_model", f"{source} is not a model of this engine: {error}") from error
    file.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")


def _explained(error: Exception, name: str, revision: str | None, endpoint: str) -> DragomanError:
    """What went wrong, in a sentence that says what to do."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        # "Not in the cache either" hides why the hub did not give it.
        error = error.__cause__
    if isinstance(error, HFValidationError):
        return DragomanError("model_not_found", f"{name!r} is not a model's name; names look like owner/name")
    if isinstance(error, RevisionNotFoundError):
        return DragomanError(
            "revision_not_found",
            f"{name} has no revision {revision}; leave it out for the newest one of its main branch",
        )
    if isinstance(error, GatedRepoError):
        return DragomanError(
            "model_not_found", f"{name} is gated; accept its terms at {endpoint}/{name} and set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return DragomanError(
            "model_not_found",
            f"{endpoint} has no model {name}; check the name (owner/name), and set HF_TOKEN if it is private",
        )
    if isinstance(error, HfHubHTTPError):
        return DragomanError("hub_unreachable", f"{endpoint} refused {name}: {str(error).splitlines()[0]}; try again")
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return DragomanError(
            "hub_unreachable",
            f"{endpoint} cannot be reached; check the network, or import a .nemo file that you have",
        )
    return DragomanError("hub_unreachable", f"{name} cannot be downloaded: {error}")
