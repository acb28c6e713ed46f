"""Fixtures of tests in several folders."""

import shutil
import subprocess
from pathlib import Path

import pytest

from streaming import scheduler
from tests.fakes import FakeSession, fake_tick


@pytest.fixture
def fake_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service's engine works without models."""
    monkeypatch.setattr(scheduler, "Session", FakeSession)
    monkeypatch.setattr(scheduler, "tick", fake_tick)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key
