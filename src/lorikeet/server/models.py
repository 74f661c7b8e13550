"""What a request's `model` stands for: the base or an adapter, with the tokenizer and the templates that go with it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import msgspec

from lorikeet.adapters.files import Lock, LockedTemplate, Signature, read_lock, signature_of
from lorikeet.adapters.references import Credentials, parse
from lorikeet.engine.link import EngineClient
from lorikeet.errors import InvalidRequestError, LorikeetError, UnavailableError
from lorikeet.model.tokenizer import Tokenizer, Tokenizers
from lorikeet.registry.records import Actor
from lorikeet.server.catalogue import AdapterFolder, Catalogue, Refusal
from lorikeet.server.fetcher import Fetcher
from lorikeet.template import Template
from lorikeet.types import AdapterInfo, MergeSpec

LONG_TEXT = 20_000  # characters from which on tokenising goes to a thread, so that it holds nobody up
ATTEMPTS = 3  # to read files that are replaced meanwhile
MERGES = 1024  # merged adapters that are remembered by what they are made of


@dataclass(frozen=True)
class ServedModel:
    """The base (`adapter` is None) or an adapter that the engine knows under `adapter.digest`.

    `stop_ids` end its answers beside the base's own: those that the adapter's tokenizer adds.
    """

    name: str
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...] = ()
    adapter: AdapterInfo | None = None
    lock: Lock | None = None
    prompt_template: Template | None = None
    source: str = "local"
    folder: Path | None = None  # where an adapter's files are

    @property
    def digest(self) -> str | None:
        return None if self.adapter is None else self.adapter.digest

    def vocab_size(self, base: int) -> int:
        """How many token ids it knows; `base` is the base's number."""
        return (self.adapter and self.adapter.vocab_size) or base

    @property
    def label(self) -> str:
        """Its name in metrics. All merges have one, as has what comes from one kind of source: clients invent them."""
        if self.adapter is not None and self.folder is None:
            return "(merged)"
        return self.name if self.source == "local" else f"({self.source})"

    @property
    def chat_template(self) -> str | None:
        """The chat template in the adapter's lock; None: that of its tokenizer."""
        template = self.lock.template if self.lock is not None else None
        return template.text if template is not None and template.kind == "chat" else None

    def chat_prompt(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.chat(messages, self.chat_template)

    def render_columns(self, columns: dict[str, object]) -> str:
        """The prompt of a row, in the words the adapter was trained with. Raises `InvalidRequestError`, `DataError`."""
        if self.prompt_template is None:
            raise InvalidRequestError(
                f"{self.name!r} has no prompt template, so `inputs` cannot be columns",
                hint="send the prompt itself as `inputs`",
                param="inputs",
            )
        return self.prompt_template.render(columns)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if len(text) > LONG_TEXT:
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
        return self.tokenizer.encode(text, add_special_tokens)


@dataclass
class _Known:
    """What was found out about an adapter's folder as it was at `signature`."""

    signature: Signature
    model: ServedModel | None = None
    error: LorikeetError | None = None
    checking: asyncio.Lock = field(default_factory=asyncio.Lock)


class Registry(Protocol):
    """What names stand for on a server with a catalog, for whoever asks, at this moment."""

    async def find(self, who: Actor, name: str) -> AdapterFolder:
        """The exact name and the folder behind `name`. Raises `NotFoundError`, also for what is not for `who`."""

    async def listing(self, who: Actor) -> list[AdapterFolder]:
        """What `who` may use."""


class Models:
    """Resolves names. An adapter is validated and compiled on first use, and again when its files change.

    With a `registry` its names are the only ones, and whoever asks gets what is theirs.
    """

    def __init__(self, base: ServedModel, catalogue: Catalogue, engine: EngineClient, fetcher: Fetcher) -> None:
        self.base = base
        self.catalogue = catalogue
        self.registry: Registry | None = None
        self._fetcher = fetcher
        self._engine = engine
        self._known: dict[str, _Known] = {}
        self._merges: dict[MergeSpec, AdapterInfo] = {}  # by specs that name adapters by content
        self._tokenizers = Tokenizers(lambda: base.tokenizer)
        self._looking = asyncio.Lock()  # one look at the disk at a time

    async def get(
        self, name: str | None, who: Actor, *, source: str | None = None, token: str | None = None
    ) -> ServedModel:
        """The model of this name for this caller, None is the base. Raises 404, 409 or 422 errors that say why.

        A reference such as `hf://org/name`, or `org/name` of the source `hf`, is fetched; `token` is for its source.
        """
        if name is not None and (source is not None or "://" in name):
            return await self._get_remote(name, source, token)
        if token is not None:
            raise InvalidRequestError("'api_token' is for adapters that are fetched, such as hf://org/name",
                                      hint="leave it out", param="api_token")  # fmt: skip
        if name is None or name == self.base.name:
            return self.base
        if self.registry is not None:
            found = await self.registry.find(who, name)
            return replace(await self._get_folder(found, str(found.folder)), name=found.name)
        return await self._get_folder(self.catalogue.peek(name) or await self._look(name), name)

    async def _get_remote(self, name: str, source: str | None, token: str | None) -> ServedModel:
        """Access is checked here, for every request; behind it the adapter is known by its folder, which is content."""
        reference = parse(name, source)
        folder = await self._fetcher.folder(reference, Credentials(token))
        signature = signature_of(folder)
        if signature is None:
            raise UnavailableError(f"{reference} was removed from the downloads", hint="try again", retry_after=1.0)
        model = await self._get_folder(AdapterFolder(str(folder), folder, signature), str(folder))
        return replace(model, name=name, source=reference.kind)

    async def _get_folder(self, found: AdapterFolder, name: str) -> ServedModel:
        """The adapter that is known as `name`, as its files are now."""
        known = self._known.get(name)
        if known is None or known.signature != found.signature:
            known = self._known[name] = _Known(found.signature)
        if known.error is not None:  # the same files are refused for the same reason
            raise known.error
        model = known.model
        if model is not None and model.adapter is not None and self._engine.holds(model.adapter):
            return model
        async with known.checking:
            return await self._resolve(found, known)

    async def merged(
        self, spec: MergeSpec, who: Actor, *, source: str | None = None, token: str | None = None
    ) -> ServedModel:
        """What becomes of the adapters that `spec` names, each of which must be one that `get` gives.

        The template is theirs where all have the same. Raises as `get`, and for what cannot be merged.
        """
        parts = [await self.get(name, who, source=source, token=token) for name in spec.adapters]
        for part in parts:
            if part.folder is None:
                raise InvalidRequestError(
                    f"{part.name!r} is the base, and only adapters can be merged", param="merged_adapters.ids"
                )
        digests = tuple(str(part.digest) for part in parts)
        contents = msgspec.structs.replace(spec, adapters=digests)
        adapter = self._merges.pop(contents, None)
        if adapter is None or not self._engine.holds(adapter):
            folders = msgspec.structs.replace(spec, adapters=tuple(str(part.folder) for part in parts))
            adapter = await self._engine.merge(folders, digests)
        self._merges[contents] = adapter  # at the end: the first is the one that was asked for longest ago
        while len(self._merges) > MERGES:
            del self._merges[next(iter(self._merges))]
        first = parts[0]
        other = next((part for part in parts if not part.tokenizer.same_as(first.tokenizer)), None)
        if other is not None:
            raise InvalidRequestError(
                f"{first.name!r} and {other.name!r} have different tokenizers, stop ids or chat templates",
                hint="merge adapters whose folders hold the same tokenizer",
                param="merged_adapters.ids",
            )
        if any(_template_of(part) != _template_of(first) for part in parts):
            lock = None if first.lock is None else msgspec.structs.replace(first.lock, template=None)
            first = replace(first, lock=lock, prompt_template=None)
        return replace(first, name="+".join(part.name for part in parts), adapter=adapter, folder=None)

    async def _look(self, name: str) -> AdapterFolder:
        async with self._looking:
            return await asyncio.to_thread(self.catalogue.find, name)

    async def listing(self, who: Actor) -> tuple[list[ServedModel], list[Refusal]]:
        """Every adapter there is now for this caller, compiled or not, and what is not served and why."""
        if self.registry is not None:
            found, refusals = await self.registry.listing(who), list[Refusal]()
        else:
            async with self._looking:
                found = await asyncio.to_thread(self.catalogue.entries)
                refusals = await asyncio.to_thread(self.catalogue.refusals)
        served = []
        for one in found:
            try:
                known = self._known.get(one.name)
                current = known.model if known is not None and known.signature == one.signature else None
                served.append(current or self.describe(one))
            except LorikeetError as error:
                refusals.append(Refusal(one.name, str(error), (one.folder,)))
        return served, refusals

    async def _resolve(self, found: AdapterFolder, known: _Known) -> ServedModel:
        if known.model is not None and known.model.adapter is not None and self._engine.holds(known.model.adapter):
            return known.model
        for _ in range(ATTEMPTS):
            before = await asyncio.to_thread(signature_of, found.folder)
            model, error = await self._read(found, before)
            if before is not None and before == await asyncio.to_thread(signature_of, found.folder):
                break
        else:
            raise UnavailableError(
                f"the files of {found.name!r} were replaced while they were read",
                hint="try again; write a new folder and rename it into place",
                retry_after=1.0,
            )
        if before == found.signature or self.registry is not None:  # else it is something newer, to be known as such
            known.model = model
            known.error = None if error is None or error.retryable or error.status >= 500 else error
        if error is not None:
            raise error
        assert model is not None
        return model

    async def _read(
        self, found: AdapterFolder, signature: Signature | None
    ) -> tuple[ServedModel | None, LorikeetError | None]:
        """The adapter in a folder whose files have this signature, or what is wrong with it."""
        try:
            adapter = await self._engine.resolve(found.folder, signature)
            tokenizer = await self._tokenizer(found.folder, adapter)
            stop_ids = tuple(sorted(set(tokenizer.stop_ids) - set(self.base.tokenizer.stop_ids)))
            return replace(self.describe(found), adapter=adapter, tokenizer=tokenizer, stop_ids=stop_ids), None
        except LorikeetError as error:
            return None, error

    async def _tokenizer(self, folder: Path, adapter: AdapterInfo) -> Tokenizer:
        """The one in the adapter's folder, the base's where that has none. In a thread: a large one takes a second."""
        if adapter.tokenizer == "base":
            return self.base.tokenizer
        shared = adapter.tokenizer == "settings"
        return await asyncio.to_thread(self._tokenizers.of, folder, shared) or self.base.tokenizer

    def describe(self, found: AdapterFolder) -> ServedModel:
        """The adapter's lock and template, without compiling it."""
        lock = read_lock(found.folder)
        template = None
        if lock is not None and lock.template is not None and lock.template.kind == "prompt":
            template = Template(lock.template.text, where=f"{found.name}'s prompt template")
        return replace(self.base, name=found.name, lock=lock, prompt_template=template, folder=found.folder)


def _template_of(model: ServedModel) -> LockedTemplate | None:
    return None if model.lock is None else model.lock.template


def base_model(folder: Path, name: str) -> ServedModel:
    return ServedModel(name=name, tokenizer=Tokenizer(folder))
