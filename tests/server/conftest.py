"""Servers that several test files share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.fixtures import make_tokenizer
from tests.server.guarded import Guarded, guarded_platform
from tests.server.hosting import Hosted, hosted, own_cache


@pytest.fixture(scope="session")
def live(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hosted]:
    """The real engine over the tiny Llama, with adapters `adapter-00` to `adapter-03`; files may be added to
    `live.state.models.catalogue.root`."""
    folder = tmp_path_factory.mktemp("served")
    for one in adapters("llama", 4):
        shutil.copytree(one, folder / one.name)
    with (
        own_cache(tmp_path_factory.mktemp("cache")),
        hosted(checkpoint("llama"), folder, max_context=128, queue=64, max_seqs=16) as server,
    ):
        yield server


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer and no weights: enough for a scripted engine."""
    folder = make_tokenizer(tmp_path_factory.mktemp("bare") / "scripted")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 1}))
    return folder


@pytest.fixture
def scripted(bare_model: Path, tmp_path: Path) -> Iterator[Hosted]:
    """An engine that does as told (see `scripted_engine`), with adapters in `tmp_path / "adapters"`."""
    (tmp_path / "adapters").mkdir()
    with hosted(bare_model, tmp_path / "adapters", scripted=True, queue=8) as server:
        yield server


@pytest.fixture
def own_cache_folder(tmp_path: Path) -> Iterator[None]:
    with own_cache(tmp_path / "cache"):
        yield


@pytest.fixture(scope="session")
def guarded(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    """A platform with keys and two tenants, over a scripted engine; see `Guarded`."""
    place = tmp_path_factory.mktemp("guarded")
    with (
        own_cache(place / "cache"),
        guarded_platform(checkpoint("llama"), adapters("llama", 1)[0], place / "home") as found,
    ):
        yield found
