"""Names of the registry on a server: looked up for each request, whatever others do to them meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.server.hosting import Hosted

from lorikeet.errors import ConflictError, InvalidRequestError, NotFoundError
from lorikeet.registry.home import Home, open_home
from lorikeet.registry.records import Actor, JobRequest
from lorikeet.server.catalogue import AdapterFolder
from lorikeet.server.registry import RegistryAdapters

WHO = Actor()


@pytest.fixture
def home(adapters: Callable[..., list[Path]], tmp_path: Path) -> Iterator[Home]:
    """`r/1` to `r/3` are the adapters 0 to 2 of the tiny Llama."""
    home = open_home(tmp_path / "home")
    for folder in adapters("llama", 3):
        home.add_adapter(WHO, "r", folder)
    yield home
    home.close()


def names(adapters: RegistryAdapters, *wanted: str, who: Actor = WHO) -> list[str]:
    async def find() -> list[str]:
        return [(await adapters.find(who, name)).name for name in wanted]

    return asyncio.run(find())


def test_names(home: Home) -> None:
    found = RegistryAdapters(home)
    assert names(found, "r", "r/1", "r/3") == ["r/3", "r/1", "r/3"]
    home.catalog.aliases.move(WHO, "r", "production", 2)
    assert names(found, "r", "r@production", "r/1") == ["r/2", "r/2", "r/1"]
    home.catalog.aliases.remove(WHO, "r", "production")
    assert names(found, "r") == ["r/3"]
    for missing in ("nobody", "r/9", "r@production"):
        with pytest.raises(NotFoundError):
            names(found, missing)
    with pytest.raises(InvalidRequestError, match="expected name, name/3"):
        names(found, "r/x")
    home.catalog.jobs.submit(WHO, JobRequest(kind="train", spec={}, base="llama", repository="r"))
    with pytest.raises(ConflictError, match="r/4 is pending"):
        names(found, "r/4")
    assert names(found, "r") == ["r/3"]


def test_a_name_is_for_its_tenant(home: Home) -> None:
    found = RegistryAdapters(home)
    assert names(found, "r/1") == ["r/1"]
    other = Actor(tenant=home.catalog.people.create_tenant(WHO, "other").id)
    for who in (other, Actor(repositories=frozenset())):
        with pytest.raises(NotFoundError, match="there is no repository 'r'"):
            names(found, "r/1", who=who)
        assert asyncio.run(found.listing(who)) == []
    assert names(found, "r/1") == ["r/1"]


def test_files_are_those_of_the_version(home: Home, adapters: Callable[..., list[Path]]) -> None:
    found = RegistryAdapters(home)

    async def find() -> None:
        for number, source in enumerate(adapters("llama", 3), 1):
            one = await found.find(WHO, f"r/{number}")
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                assert (one.folder / name).read_bytes() == (source / name).read_bytes()
            assert (await found.find(WHO, f"r/{number}")) == one

    asyncio.run(find())
    [listed] = asyncio.run(found.listing(WHO))
    assert listed.name == "r" and {path.name for path in listed.folder.iterdir()} == {"adapter_config.json"}


def test_an_alias_that_moves_all_the_time(home: Home) -> None:
    """Who asks after a move is over gets what it moved to, or a later one; nobody gets anything between two."""
    found = RegistryAdapters(home)
    home.catalog.aliases.move(WHO, "r", "production", 1)
    manifests = {number: home.catalog.versions.resolve(WHO, f"r/{number}").manifest for number in (1, 2, 3)}
    moves = 60
    order = [turn % 3 + 1 for turn in range(1, moves + 1)]
    begun = ended = 0
    failures: list[str] = []

    def move() -> None:
        nonlocal begun, ended
        for number in order:
            begun += 1
            home.catalog.aliases.move(WHO, "r", "production", number)
            ended += 1

    def ask() -> None:
        async def run() -> None:
            while ended < moves:
                first = ended
                one = await found.find(WHO, "r")
                last = begun
                number = int(one.name.removeprefix("r/"))
                possible = {order[at - 1] if at else 1 for at in range(first, last + 1)}
                if number not in possible or one.folder.name != manifests[number]:
                    failures.append(f"{one.name} in {one.folder.name} after {first} to {last} moves")

        asyncio.run(run())

    threads = [threading.Thread(target=ask) for _ in range(4)] + [threading.Thread(target=move)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert names(found, "r") == [f"r/{order[-1]}"]


def test_a_folder_that_was_trimmed_comes_back(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    found = RegistryAdapters(home)
    first = asyncio.run(found.find(WHO, "r/1"))
    monkeypatch.setattr("lorikeet.registry.blobs.RECENT_SECONDS", -1.0)
    home.blobs.trim(0)
    assert not first.folder.is_dir()
    assert asyncio.run(found.find(WHO, "r/1")) == first
    assert first.folder.is_dir()


class ForEverybody(RegistryAdapters):
    """A server without a home knows no tenants."""

    async def find(self, who: Actor, name: str) -> AdapterFolder:
        return await super().find(WHO, name)


def test_the_next_request_is_served_by_the_new_version(live: Hosted, home: Home) -> None:
    """The real engine: what is generated is the version's own text, before and after the alias moves."""
    asked = {"prompt": "hello there", "max_tokens": 8, "temperature": 0}
    live.state.models.registry = ForEverybody(home)
    try:
        own = {number: live.complete(model=f"r/{number}", **asked)["choices"][0]["text"] for number in (1, 2, 3)}
        assert len(set(own.values())) > 1
        for number in (1, 2, 3, 1):
            home.catalog.aliases.move(WHO, "r", "production", number)
            assert live.complete(model="r@production", **asked)["choices"][0]["text"] == own[number]
            assert live.complete(model="r", **asked)["choices"][0]["text"] == own[number]
        assert live.post("/v1/completions", {"model": "r/9", **asked}).status_code == 404
        assert live.post("/v1/completions", {"model": "adapter-00", **asked}).status_code == 404
    finally:
        live.state.models.registry = None
