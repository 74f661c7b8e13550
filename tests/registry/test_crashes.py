"""`kill -9` in the middle of an upload, an alias move, a migration: nothing is lost, nothing is half done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

OPERATIONS = ["upload", "alias", "migration"]


def crash(operation: str, folder: Path, kills: int, seed: int) -> None:
    command = [sys.executable, "-m", "tests.registry.crashing", operation, str(folder), str(kills), str(seed)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert f"{operation}: {kills} kills" in result.stdout


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kills(operation: str, tmp_path: Path) -> None:
    crash(operation, tmp_path, 5, 0)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_many_kills(operation: str, tmp_path: Path) -> None:
    crash(operation, tmp_path, 50, 1)
