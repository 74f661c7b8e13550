"""Names and folders: what is served, what is refused and why, and what changes on disk do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lorikeet.errors import ConfigError, NotFoundError
from lorikeet.server.catalogue import Catalogue


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def put(folder: Path, text: str = "{}") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(text)
    return folder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr("lorikeet.server.catalogue.RESCAN_SECONDS", 1.0)  # servers of other tests shorten it
    return Clock()


def test_every_folder_below_is_served_under_its_leaf_name(tmp_path: Path, clock: Clock) -> None:
    for name in ("b", "deep/er/a", "with-dash_1.0"):
        put(tmp_path / name)
    (tmp_path / "empty").mkdir()
    put(tmp_path / ".being-written")
    catalogue = Catalogue(tmp_path, "base", clock)
    found = {entry.name: entry.folder for entry in catalogue.entries()}
    expected = (("a", "deep/er/a"), ("b", "b"), ("with-dash_1.0", "with-dash_1.0"))
    assert found == {name: tmp_path / path for name, path in expected}
    assert catalogue.refusals() == []
    assert catalogue.find("a").folder == tmp_path / "deep/er/a"


def test_names_that_cannot_be_served_are_listed_and_the_rest_is_served(tmp_path: Path, clock: Clock) -> None:
    for name in ("fine", "x/twice", "y/twice", "the base", "base", "n" * 129):
        put(tmp_path / name)
    catalogue = Catalogue(tmp_path, "base", clock)
    assert [entry.name for entry in catalogue.entries()] == ["fine"]
    refused = {refusal.name: refusal.reason for refusal in catalogue.refusals()}
    assert set(refused) == {"twice", "the base", "base", "n" * 129}
    assert str(tmp_path / "x/twice") in refused["twice"] and str(tmp_path / "y/twice") in refused["twice"]
    assert "base's" in refused["base"] and "must match" in refused["the base"]
    with pytest.raises(NotFoundError, match="not served: several folders"):
        catalogue.find("twice")


def test_links_are_followed_and_circles_end(tmp_path: Path, clock: Clock) -> None:
    put(tmp_path / "elsewhere/far")
    (tmp_path / "served").mkdir()
    (tmp_path / "served/far").symlink_to(tmp_path / "elsewhere/far")
    (tmp_path / "served/again").symlink_to(tmp_path / "served")
    assert [entry.name for entry in Catalogue(tmp_path / "served", "base", clock).entries()] == ["far"]


def test_files_that_are_links_out_of_the_folder_are_refused(tmp_path: Path, clock: Clock) -> None:
    """Of the adapter alone; one that becomes such a link later is no longer served, either."""
    (tmp_path / "secret").write_text("{}")
    root = tmp_path / "served"
    put(root / "fine")
    put(root / "shared/blobs")
    for name, target in (("out", "secret"), ("within", "served/shared/blobs/adapter_config.json")):
        (root / name).mkdir()
        (root / name / "adapter_config.json").symlink_to(tmp_path / target)
    catalogue = Catalogue(root, "base", clock)
    assert [entry.name for entry in catalogue.entries()] == ["blobs", "fine", "within"]
    with pytest.raises(NotFoundError, match=r"adapter_config.json is a link that leads out of the folder"):
        catalogue.find("out")
    (root / "fine/adapter_config.json").unlink()
    (root / "fine/adapter_config.json").symlink_to(tmp_path / "secret")
    clock.now = 2.0
    with pytest.raises(NotFoundError, match="leads out of the folder"):
        catalogue.find("fine")


def test_the_disk_is_looked_at_once_a_second(tmp_path: Path, clock: Clock) -> None:
    catalogue = Catalogue(tmp_path, "base", clock)
    with pytest.raises(NotFoundError, match="'late'"):
        catalogue.find("late")
    put(tmp_path / "late")
    clock.now = 0.5
    with pytest.raises(NotFoundError):
        catalogue.find("late")
    clock.now = 1.0
    first = catalogue.find("late")
    assert catalogue.peek("late") == first
    (first.folder / "adapter_config.json").write_text("{} ")
    clock.now = 1.5
    assert catalogue.find("late") == first == catalogue.peek("late")
    clock.now = 2.0
    assert catalogue.peek("late") is None
    assert catalogue.find("late").signature != first.signature
    shutil.rmtree(first.folder)
    clock.now = 3.0
    with pytest.raises(NotFoundError):
        catalogue.find("late")


def test_a_replaced_file_of_the_same_size_is_another_adapter(tmp_path: Path, clock: Clock) -> None:
    folder = put(tmp_path / "a", "{1}")
    catalogue = Catalogue(tmp_path, "base", clock)
    before = catalogue.find("a")
    (folder / "adapter_config.json").write_text("{2}")
    os.utime(folder / "adapter_config.json", ns=(1, 1))
    clock.now = 1.0
    assert catalogue.find("a").signature != before.signature


def test_without_a_folder_there_is_only_the_base(tmp_path: Path) -> None:
    catalogue = Catalogue(None, "base")
    assert catalogue.entries() == []
    with pytest.raises(NotFoundError) as error:
        catalogue.find("x")
    assert error.value.hint == "served are base"
    with pytest.raises(ConfigError, match="is not a folder"):
        Catalogue(tmp_path / "none", "base")
