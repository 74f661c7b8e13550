"""Checkpoints and adapters for every room's tests, made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.fixtures import SHAPES, make_adapter, make_checkpoint

MakeCheckpoint = Callable[..., Path]
MakeAdapters = Callable[..., list[Path]]


def pytest_configure() -> None:
    """Where there is no CUDA device, GPU kernels are interpreted on the CPU: said before anything imports triton."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a CUDA device, whatever uses `device` needs it: `-m gpu` runs the interpreter's tests there too."""
    if torch.cuda.is_available():
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker("gpu")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where tests of GPU kernels put their tensors: a CUDA device where there is one, else Triton's interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    if request.node.get_closest_marker("gpu"):
        pytest.skip("needs a CUDA device")
    pytest.importorskip("triton", reason="GPU kernels need triton")
    return "cpu"


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models lose a factor of ten to thread teams that wait for each other on a busy machine."""
    before = torch.get_num_threads()
    if "kernels" not in request.node.path.parts:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """`checkpoint(family, dtype=torch.float32)`: the folder of a tiny checkpoint; do not write to it."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = make_checkpoint(family, tmp_path_factory.mktemp("base") / family, dtype)
        return made[family, dtype]

    return get


@pytest.fixture(scope="session")
def adapters(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> MakeAdapters:
    """`adapters(family, count=8, dtype=torch.float32)`: PEFT folders of `SHAPES[:count]`; do not write to them.

    The first 8 have the ranks 1, 2, 3, 5, 8, 16, 24, 64 and different targets. All lie in one folder by name.
    """
    made: dict[tuple[str, torch.dtype, int], Path] = {}
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def get(family: str, count: int = 8, dtype: torch.dtype = torch.float32) -> list[Path]:
        if (family, dtype) not in folders:
            folders[family, dtype] = tmp_path_factory.mktemp(f"adapters-{family}")
        for i in range(count):
            if (family, dtype, i) not in made:
                folder = folders[family, dtype] / f"adapter-{i:02d}"
                made[family, dtype, i] = make_adapter(checkpoint(family, dtype), folder, SHAPES[i], i, dtype)
        return [made[family, dtype, i] for i in range(count)]

    return get


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that `$LORIKEET_CACHE` names."""
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
