"""A merged adapter as it is served: made once, and compiled like any other. No torch, unless a method prunes.

What a merge gives is remembered beside the compiled files, under what went into it: the contents of the adapters, how
they are merged, and what they are compiled for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from lorikeet.adapters.compiled import Dtype, compiled_name, open_compiled
from lorikeet.adapters.files import check_lock, read_lock, write_peft
from lorikeet.adapters.merge import check_spec, merge, merge_key, read_source
from lorikeet.errors import AdapterError, UnavailableError
from lorikeet.types import AdapterInfo, BaseIdentity, MergeSpec

SUFFIX = ".merged"
_FRESH = "merging-"
_ABANDONED = 3600.0  # seconds after which a folder that a merge works in belongs to nobody any more


def compile_merged(
    spec: MergeSpec,
    digests: Sequence[str],
    base: BaseIdentity,
    dtype: Dtype,
    cache: Path,
    compile_folder: Callable[[Path], AdapterInfo],
    allow_lock_mismatch: bool = False,
    ranks: int = 1,
) -> AdapterInfo:
    """Merge the PEFT directories that `spec.adapters` names and compile the result with `compile_folder`, which is for
    `ranks` processes.

    `digests` are the contents asked for. Raises what `merge` and `compile_folder` raise, LockMismatchError for
    an adapter of another base, UnavailableError for one that was replaced in the meantime.
    """
    check_spec(spec)
    folders = [Path(folder) for folder in spec.adapters]
    for lock in map(read_lock, folders):
        if lock is not None and not allow_lock_mismatch:
            check_lock(lock, base)
    sources = [read_source(folder) for folder in folders]
    for source, digest in zip(sources, digests, strict=True):
        if source.digest != digest:
            raise UnavailableError(f"{source.name} was replaced while it was to be merged", hint="try again shortly")
    key = merge_key(spec, digests)
    note = cache / f"{compiled_name(key, base, dtype, ranks)}{SUFFIX}"
    with suppress(OSError, AdapterError):  # no such merge yet, or its compiled file was trimmed or damaged
        path = cache / note.read_text("ascii")
        info = open_compiled(path).header.info(path)
        os.utime(path)
        return info
    merged = merge(spec, sources)
    cache.mkdir(parents=True, exist_ok=True)
    _sweep(cache)
    with tempfile.TemporaryDirectory(prefix=_FRESH, dir=cache) as fresh:
        folder = Path(fresh) / "merged"
        write_peft(folder, merged.config, merged.pairs, base_name=base.name)
        info = compile_folder(folder)
    written = note.with_name(f".{note.name}.{os.getpid()}")
    written.write_text(Path(info.path).name, "ascii")
    written.replace(note)
    return info


def _sweep(cache: Path) -> None:
    """Notes about compiled files that are gone, and folders of merges that were killed."""
    for entry in list(os.scandir(cache)):
        with suppress(OSError):
            if entry.name.endswith(SUFFIX) and not (cache / Path(entry.path).read_text("ascii")).exists():
                os.unlink(entry.path)
            elif entry.name.startswith(_FRESH) and entry.stat().st_mtime < time.time() - _ABANDONED:
                shutil.rmtree(entry.path)
