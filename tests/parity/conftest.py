"""NeMo models with random weights, and the same weights in ours."""

import pytest

from benchmarks.nemo_reference import NemoReference, build
from models.recognizer import Recognizer


@pytest.fixture(scope="session", params=["hybrid_large", "medium", "nemotron4"])
def models(request: pytest.FixtureRequest) -> tuple[NemoReference, Recognizer]:
    """A NeMo model and ours with its weights."""
    pytest.importorskip("nemo")
    reference = build(request.param, seed=7)
    return reference, Recognizer.create(reference.config(), reference.state_dict(), reference.tokenizer_bytes)
