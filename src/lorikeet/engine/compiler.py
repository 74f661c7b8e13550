"""An adapter's folder as the engine takes it: its weights compiled, its tokenizer checked against them. No torch."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from lorikeet.adapters.compiled import compile_adapter
from lorikeet.engine.wire import LoaderSettings
from lorikeet.errors import AdapterError
from lorikeet.model.tokenizer import Tokenizer, Tokenizers
from lorikeet.types import AdapterInfo, TokenizerKind


class AdapterCompiler:
    """Compiles adapters for one base. A lock is compared with the tokenizer that the adapter's requests get: the one
    in its folder, where there is one."""

    def __init__(self, settings: LoaderSettings, tokenizers: Tokenizers) -> None:
        self._settings, self._tokenizers = settings, tokenizers

    def compile(self, folder: Path) -> AdapterInfo:
        """As `compile_adapter`. Raises AdapterError too where a token of its tokenizer has no row in its tables."""
        settings, tokenizer = self._settings, self._tokenizers.of(folder)
        base = settings.base
        kind: TokenizerKind = "base"
        if tokenizer is not None:
            kind = "settings" if tokenizer.sha256 == base.tokenizer_sha256 else "own"
            base = replace(base, tokenizer_sha256=tokenizer.sha256, stop_ids=tokenizer.stop_ids)
        info = compile_adapter(
            folder,
            settings.spec,
            base,
            settings.dtype,
            Path(settings.cache),
            settings.allow_lock_mismatch,
            [Path(path) for path in settings.checkpoint],
            settings.ranks,
        )
        rows = info.vocab_size or settings.spec.vocab_size
        if kind == "own" or info.vocab_size is not None:
            _check_vocabulary(folder, tokenizer or self._tokenizers.base, rows)
        for token in set(base.stop_ids) - set(settings.base.stop_ids):
            if token >= rows:
                raise AdapterError(
                    f"{folder.name}/generation_config.json: eos_token_id: expected ids below {rows}, found {token}",
                    param="eos_token_id",
                )
        return replace(info, tokenizer=kind)


def _check_vocabulary(folder: Path, tokenizer: Tokenizer, rows: int) -> None:
    last = tokenizer.largest_id
    if last >= rows:
        raise AdapterError(
            f"{folder.name}: {tokenizer.piece(last)!r} of its tokenizer has the id {last}, "
            f"but its embedding and head have {rows} rows",
            hint="save the resized tables with the adapter: save_embedding_layers=True, or modules_to_save with both",
            param="tokenizer",
        )
