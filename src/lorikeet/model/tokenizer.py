"""Text to token ids and back, chat templates, stop ids: `tokenizers` and sandboxed jinja2. No torch."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import tokenizers
from tokenizers.processors import TemplateProcessing

from lorikeet.adapters.files import TOKENIZER_FILES
from lorikeet.errors import AdapterError, InvalidRequestError, ModelError
from lorikeet.model.chat import render
from lorikeet.model.families import configured_stop_ids, read_json
from lorikeet.model.streaming import StopMatcher, StreamDecoder, byte_level_bytes, fallback_byte

__all__ = ["StopMatcher", "StreamDecoder", "Tokenizer", "Tokenizers"]

RECENT = 4  # tokenizers of adapters that are kept though nobody uses them
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of a model folder, or of an adapter's.

    `stop_ids` are the end-of-sequence ids that config.json, generation_config.json and tokenizer_config.json name
    together. `special_tokens` are the named ones (`bos_token`, ...) that templates see. Decoding is exact: spaces
    before punctuation are never "cleaned up".

    An adapter's folder may hold any of `TOKENIZER_FILES`; what none of them says is as `base` has it, whose stop ids
    count too. `shares_vocabulary`: what maps text to ids is known to be the base's, and is not loaded again.
    """

    def __init__(self, folder: Path, base: Tokenizer | None = None, shares_vocabulary: bool = False) -> None:
        self.folder = folder
        config_path = folder / "tokenizer_config.json"
        inherited = {} if base is None else base._config
        self._config: dict[str, Any] = read_json(config_path) if config_path.exists() else inherited
        self._backend = _own_backend(folder, base, shares_vocabulary)
        if base is None or not shares_vocabulary:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._add_configured_tokens()
        self.special_tokens = self._named_tokens()
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        if base is None or not shares_vocabulary:
            self._configure_sentencepiece()
        own = () if self.eos_id is None else (self.eos_id,)
        if base is not None:
            configured = (*base.stop_ids, *configured_stop_ids(folder, ("generation_config.json",)))
        else:
            configured = configured_stop_ids(folder) if (folder / "config.json").exists() else ()
        self.stop_ids: tuple[int, ...] = tuple(sorted({*own, *configured}))
        self.vocab_size: int = self._backend.get_vocab_size()
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        decoder = str(self._backend.decoder.__getstate__()) if self._backend.decoder else ""
        self.byte_level = '"ByteLevel"' in decoder
        self.byte_fallback = '"ByteFallback"' in decoder
        self.templates: dict[str, str] = self._read_templates() or ({} if base is None else base.templates)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in the text are recognised, as every template needs."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [one.ids for one in encoded]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; incomplete characters become U+FFFD."""
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for one sequence that is still growing."""
        return StreamDecoder(self, skip_special_tokens)

    def piece(self, token: int) -> str | None:
        """The vocabulary's own spelling of a token, None beyond the vocabulary."""
        piece: str | None = self._backend.id_to_token(token)
        return piece

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token adds to a text; empty beyond the vocabulary."""
        piece = self.piece(token)
        if piece is None:
            return b""
        if self.byte_level:
            return byte_level_bytes(piece)
        byte = fallback_byte(piece) if self.byte_fallback else None
        return bytes([byte]) if byte is not None else piece.replace("\u2581", " ").encode()

    def token_text(self, token: int) -> str:
        """One token as text, special or not; U+FFFD where it is part of a character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        template: str | None = None,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation, to be encoded with `add_special_tokens=False`.

        `template` is an adapter's own; None takes the model's. Raises InvalidRequestError where there is none or it
        refuses the messages.
        """
        if template is None:
            template = self.templates.get("tool_use") if tools else None
            template = template or self.chat_template
        if template is None:
            raise InvalidRequestError(
                f"{self.folder.name} has no chat template", hint="send a plain prompt to /v1/completions"
            )
        given = {"tools": list(tools) if tools else None, "add_generation_prompt": add_generation_prompt}
        return render(template, messages, {"documents": None, **self.special_tokens, **given, **variables})

    def same_as(self, other: Tokenizer) -> bool:
        """Whether both make the same of texts, of conversations and of ends of sequences."""
        if self is other:
            return True
        mine, others = ((one.stop_ids, one.special_tokens, one.templates) for one in (self, other))
        return mine == others and (self._backend is other._backend or self.sha256 == other.sha256)

    @property
    def chat_template(self) -> str | None:
        """The model's own chat template."""
        return self.templates.get("default")

    @cached_property
    def largest_id(self) -> int:
        """The largest token id, -1 where there is none. A padding token does not count: texts do not have it."""
        ids = self._backend.get_vocab(with_added_tokens=True)
        ids.pop(self.special_tokens.get("pad_token"), None)
        return max(ids.values(), default=-1)

    @cached_property
    def sha256(self) -> str:
        """Hash of what maps text to ids and back, free of formatting, truncation and padding settings."""
        content = json.loads(self._backend.to_str())
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _named_tokens(self) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for name in _SPECIAL_NAMES:
            if (text := _token_content(self._config.get(name))) is not None:
                named[name] = text
        extra = [_token_content(token) for token in self._config.get("additional_special_tokens") or []]
        if extra:
            named["additional_special_tokens"] = extra
        return named

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        if text is None:
            return None
        token: int | None = self._backend.token_to_id(text)
        if token is None:
            raise ModelError(f"{self.folder / 'tokenizer_config.json'}: {name} {text!r} is not in the vocabulary")
        return token

    def _add_configured_tokens(self) -> None:
        """Tokens that only tokenizer_config.json knows."""
        for key, entry in sorted((self._config.get("added_tokens_decoder") or {}).items(), key=lambda kv: int(kv[0])):
            text = entry["content"]
            if self._backend.token_to_id(text) is None:
                flags = {k: bool(entry.get(k)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
                self._backend.add_tokens([tokenizers.AddedToken(text, **flags)])
            if (found := self._backend.token_to_id(text)) != int(key):
                raise ModelError(
                    f"{self.folder / 'tokenizer_config.json'}: added_tokens_decoder: {text!r} expected at id {key}, "
                    f"found at {found}"
                )

    def _configure_sentencepiece(self) -> None:
        """Llama 2 and Mistral say in tokenizer_config.json, not in tokenizer.json, whether bos and eos are added."""
        if not str(self._config.get("tokenizer_class", "")).startswith(("LlamaTokenizer", "CodeLlamaTokenizer")):
            return
        bos = self.special_tokens.get("bos_token") if self._config.get("add_bos_token", True) else None
        eos = self.special_tokens.get("eos_token") if self._config.get("add_eos_token", False) else None
        special = [(text, self._backend.token_to_id(text)) for text in (bos, eos) if text is not None]
        before, after = ([f"{text}:0"] if text else [] for text in (bos, eos))
        if special:
            self._backend.post_processor = TemplateProcessing(single=[*before, "$A:0", *after], special_tokens=special)

    def _read_templates(self) -> dict[str, str]:
        file = self.folder / "chat_template.jinja"
        if file.exists():
            return {"default": file.read_text("utf-8")}
        found = self._config.get("chat_template")
        if isinstance(found, list):
            return {entry["name"]: entry["template"] for entry in found}
        return {} if found is None else {"default": found}


def _token_content(value: Any) -> str | None:
    """A special token is written as text or as an object with `content`."""
    return value.get("content") if isinstance(value, dict) else value


def _own_backend(folder: Path, base: Tokenizer | None, shares_vocabulary: bool) -> tokenizers.Tokenizer:
    if base is None or ((folder / "tokenizer.json").exists() and not shares_vocabulary):
        return _load_backend(folder)
    if shares_vocabulary:
        return base._backend
    copy: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(base._backend.to_str())
    return copy


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{path}: not a readable tokenizer: {error}") from error
    if not any((folder / name).exists() for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json")):
        raise ModelError(f"{folder}: no tokenizer.json", hint="a model folder holds its tokenizer too")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelError(
            f"{folder}: no tokenizer.json", hint="converting other tokenizers needs `pip install transformers`"
        ) from error
    try:
        converted = AutoTokenizer.from_pretrained(folder, use_fast=True)
    except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be converted: {error}") from error
    if not converted.is_fast:
        raise ModelError(f"{folder}: the tokenizer {type(converted).__name__} has no fast form")
    backend: tokenizers.Tokenizer = converted.backend_tokenizer
    return backend


class Tokenizers:
    """The tokenizers that adapters ship, by content: folders with the same files have one, while anybody holds it.

    The last few are held here. May be used by several threads.
    """

    def __init__(self, load_base: Callable[[], Tokenizer]) -> None:
        self._load_base = load_base
        self._known: WeakValueDictionary[bytes, Tokenizer] = WeakValueDictionary()
        self._recent: deque[Tokenizer] = deque(maxlen=RECENT)
        self._loading = threading.Lock()

    @cached_property
    def base(self) -> Tokenizer:
        return self._load_base()

    def of(self, folder: Path, shares_vocabulary: bool = False) -> Tokenizer | None:
        """The tokenizer in an adapter's folder, None where it ships nothing of one. AdapterError where it is broken."""
        digest = hashlib.sha256(bytes([shares_vocabulary]))
        found = False
        for name in TOKENIZER_FILES:
            with suppress(FileNotFoundError):
                content = (folder / name).read_bytes()
                digest.update(f"{name} {len(content)} ".encode() + content)
                found = True
        if not found:
            return None
        with self._loading:
            known = self._known.get(digest.digest())
            if known is None:
                try:
                    known = self._known[digest.digest()] = Tokenizer(folder, self.base, shares_vocabulary)
                except ModelError as error:
                    raise AdapterError(error.message, hint=error.hint, param="tokenizer") from error
                except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
                    raise AdapterError(
                        f"{folder.name}: its tokenizer cannot be read: {type(error).__name__}: {error}",
                        hint="save it with transformers' save_pretrained, or remove its files",
                        param="tokenizer",
                    ) from error
            if known not in self._recent:
                self._recent.append(known)
        return known
