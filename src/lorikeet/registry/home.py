"""A home: the folder of a team's adapters and datasets, with the catalog and the blob store in it or behind URLs."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import LOCK, TOKENIZER_FILES, WEIGHTS, AdapterFile, read_lock
from lorikeet.errors import AdapterError, ConfigError, DataError
from lorikeet.registry.blobs import BlobStore, Report
from lorikeet.registry.catalog import Catalog, open_catalog
from lorikeet.registry.objects import disk_error
from lorikeet.registry.records import Actor, Dataset, DatasetContent, Resolved, Split, Version, VersionContent
from lorikeet.registry.rows import columns_of, split_rows

# What is taken of an adapter's folder: what makes it, and what says what it is.
TAKEN = (
    CONFIG,
    WEIGHTS,
    LOCK,
    *TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "README.md",
    "LICENSE",
)
KEEP_SECONDS = 7 * 86_400.0  # for which the files of what was deleted are kept
SPLITS = ("train", "validation", "test")
_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}

ReadRows = Callable[[Path], Sequence[Mapping[str, Any]]]  # `data.formats.read_rows`; raises for broken rows


class Home:
    """`catalog` and `blobs`, and what takes both of them."""

    def __init__(self, folder: Path, catalog: Catalog, blobs: BlobStore) -> None:
        self.folder = folder
        self.catalog = catalog
        self.blobs = blobs

    def close(self) -> None:
        self.catalog.close()

    # --- adapters ---------------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        who: Actor,
        repository: str,
        folder: Path,
        *,
        digest: str | None = None,
        description: str = "",
        parent: str | None = None,
        source: str | None = None,
        idempotency_key: str | None = None,
        report: Report | None = None,
    ) -> Version:
        """The PEFT folder as the next version of the repository, which is made where it is not there; `digest` as
        `read_adapter` takes it.

        Raises `AdapterError` for a folder that is no adapter, and what the catalog raises.
        """
        content = self.read_adapter(folder, digest=digest, source=source, report=report)
        return self.catalog.versions.add(
            who, repository, content, description=description, parent=parent, create=True,
            idempotency_key=idempotency_key,
        )  # fmt: skip

    def read_adapter(
        self, folder: Path, *, digest: str | None = None, source: str | None = None, report: Report | None = None
    ) -> VersionContent:
        """Check a PEFT folder and put its files: what a version is filled with. Raises `AdapterError`.

        With `digest` (its content hash) whoever calls has checked the tensors already.
        """
        if digest is None:
            with AdapterFile(folder) as file:
                digest = file.load()[1]
        lock = read_lock(folder)
        names = [name for name in TAKEN if (folder / name).is_file()]
        manifest = self.blobs.put_folder(folder, names, report=report)
        if lock is None:
            return VersionContent(manifest=manifest, digest=digest, base=_base_in(folder), source=source)
        return VersionContent(
            manifest=manifest, digest=digest, base=lock.base.name, base_sha256=lock.base.sha256,
            recipe_sha256=lock.recipe_sha256, data_sha256=lock.data_sha256, code_version=lock.code_version,
            lock=msgspec.to_builtins(lock), source=source,
        )  # fmt: skip

    def adapter_folder(self, who: Actor, reference: str) -> tuple[Resolved, Path]:
        """What a reference is at this moment, and a read-only folder with its files."""
        resolved = self.catalog.versions.resolve(who, reference)
        return resolved, self.blobs.materialise(resolved.manifest)

    # --- datasets ---------------------------------------------------------------------------------------------------

    def add_dataset(
        self,
        who: Actor,
        name: str,
        files: Mapping[str, Path],
        read: ReadRows,
        *,
        shares: Mapping[str, float] | None = None,
        seed: int = 0,
        description: str = "",
        report: Report | None = None,
    ) -> Dataset:
        """A dataset of files by split (train, and validation and test where there are), checked and fixed.

        With `shares` (split -> share) these splits are drawn from `train` by the seed, once and for all. Raises
        `DataError`, `ConfigError`, and what the catalog raises.
        """
        _check_splits(files, shares or {})
        rows = {split: read(path) for split, path in files.items()}
        with tempfile.TemporaryDirectory(dir=self.blobs.staging, prefix="dataset-") as place:
            folder = Path(place)
            if shares:
                rows |= split_rows(rows["train"], shares, seed)
                for split in ("train", *shares):
                    files = {**files, split: _write_rows(folder / f"{split}.jsonl", rows[split])}
            formats = {split: _FORMATS.get(path.suffix.lower(), "") for split, path in files.items()}
            if len(set(formats.values())) != 1 or "" in formats.values():
                said = ", ".join(f"{split}: {path.name}" for split, path in files.items())
                raise ConfigError(
                    f"the splits are of different formats ({said}); expected one of {', '.join(_FORMATS)}",
                    hint="convert them to the same one", param="format",
                )  # fmt: skip
            columns = columns_of(rows)
            named = {split: f"{split}{path.suffix.lower()}" for split, path in files.items()}
            manifest = self.blobs.put_files({named[split]: path for split, path in files.items()}, report=report)
        by_path = {one.path: one for one in manifest.files}
        content = DatasetContent(
            manifest=manifest, format=msgspec.convert(formats["train"], Any), columns=columns,
            splits={
                split: Split(file=file, sha256=by_path[file].sha256, rows=len(rows[split]), bytes=by_path[file].bytes)
                for split, file in named.items()
            },
        )  # fmt: skip
        return self.catalog.datasets.create(who, name, content, description)

    def dataset_folder(self, who: Actor, name: str) -> tuple[Dataset, Path]:
        """A dataset and a read-only folder with a file of each split."""
        dataset = self.catalog.datasets.get(who, name)
        return dataset, self.blobs.materialise(dataset.sha256)

    # --- housekeeping -----------------------------------------------------------------------------------------------

    def collect(self, keep_seconds: float = KEEP_SECONDS) -> int:
        """Remove the files of what was deleted that long ago; how many blobs went."""
        self.catalog.versions.collect(time.time() - keep_seconds)
        self.catalog.uploads.forget_expired()
        return self.blobs.collect()


def open_home(folder: Path | None = None, *, catalog: str | None = None, blobs: str | None = None) -> Home:
    """The home in this folder: else in `$LORIKEET_HOME`, else `~/.lorikeet`; made where it is not there.

    `catalog` is the URL of a PostgreSQL database (else `$LORIKEET_CATALOG`), `blobs` that of an object store (else
    `$LORIKEET_BLOBS`). Raises `ConfigError`, `UnavailableError`.
    """
    folder = (folder or Path(os.environ.get("LORIKEET_HOME") or "~/.lorikeet")).expanduser().absolute()
    catalog = catalog or os.environ.get("LORIKEET_CATALOG") or None
    blobs = blobs or os.environ.get("LORIKEET_BLOBS") or None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise disk_error(error, folder) from error
    opened = open_catalog(catalog or folder / "catalog.db")
    return Home(folder, opened, BlobStore(blobs or folder / "blobs", folder, opened.ledger))


def left_out(folder: Path) -> list[str]:
    """What of an adapter's folder is not taken."""
    return sorted(path.name for path in folder.iterdir() if path.name not in TAKEN)


def _base_in(folder: Path) -> str | None:
    """The base that the config names; it was read before."""
    try:
        base = json.loads((folder / CONFIG).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterError(f"{CONFIG}: {error}", param=CONFIG) from error
    return base if isinstance(base, str) and base else None


def _check_splits(files: Mapping[str, Path], shares: Mapping[str, float]) -> None:
    unknown = [split for split in (*files, *shares) if split not in SPLITS]
    if unknown or "train" not in files:
        raise ConfigError(
            f"splits: found {', '.join((*files, *shares))}; expected train, and validation and test where there are",
            param="splits",
        )
    both = sorted(set(files) & set(shares))
    if both:
        raise ConfigError(f"{both[0]}: given both as a file and as a share of train", param=both[0])


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    try:
        with path.open("wb") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    except (TypeError, ValueError) as error:
        raise DataError(f"{path.name}: a row cannot be written as JSON: {error}") from error
    return path
