"""The engine: requests in, events out, one step at a time. One process, one thread, one model."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, Self

import torch
from msgspec.structs import replace

from lorikeet import kernels
from lorikeet.adapters.compiled import OpenAdapter, open_compiled
from lorikeet.config import EngineConfig
from lorikeet.engine.blocks import BlockPool, root_key
from lorikeet.engine.copies import StreamCopier, pinned_memory
from lorikeet.engine.grammar import Choices
from lorikeet.engine.host_tier import HostTier
from lorikeet.engine.parallel import Followers, LeadingRunner, check_ranks, threads_of_rank
from lorikeet.engine.plan import Plan
from lorikeet.engine.request import (
    ENDLESS,
    EVERYWHERE,
    NOWHERE,
    Sequence,
    Stretch,
    check_prompt,
    check_sampling,
    effective_sampling,
)
from lorikeet.engine.residency import Place, Residency
from lorikeet.engine.runner import Launched, Runner
from lorikeet.engine.scheduler import Scheduler
from lorikeet.engine.sizing import Sizes, choose_cache_dtype, choose_device, choose_sizes, choose_table, choose_weights
from lorikeet.engine.slab import AdapterSlab
from lorikeet.engine.transfer import Transfer
from lorikeet.errors import AdapterInUseError, AdapterLostError, InvalidRequestError
from lorikeet.kernels.precision import choose_dtype
from lorikeet.model import sources
from lorikeet.model import weights as model_weights
from lorikeet.model.decoder import DecoderWeights, ServingOps
from lorikeet.model.shard import Shard
from lorikeet.model.spec import ModelSpec
from lorikeet.types import AdapterAction, AdapterInfo, BaseIdentity, EngineStats, Event, Request, SamplingParams

log = logging.getLogger(__name__)


class Engine:
    """Serves one base model and any number of registered adapters.

    `add` and `cancel` between steps; `step` while `has_work`. Every request that `add` took gets exactly one event
    with `finish` set, its last.
    """

    def __init__(
        self,
        spec: ModelSpec,
        base: BaseIdentity,
        weights: DecoderWeights,
        ops: ServingOps,
        sizes: Sizes,
        config: EngineConfig,
        open_adapter: OpenAdapter = open_compiled,
        clock: Callable[[], float] = time.time,
        slab: AdapterSlab | None = None,
        runner: Callable[..., Runner] = Runner,
    ) -> None:
        self.spec, self.base, self.sizes, self.config = spec, base, sizes, config
        self.max_context = sizes.max_context
        self._clock = clock
        self.stop_ids = frozenset(base.stop_ids) | frozenset(spec.eos_ids)
        self._arrivals = self._steps = 0
        self._overlaps = sizes.device != "cpu"  # where host and device are one there is nothing to overlap
        self._ahead: tuple[Plan, Launched] | None = None  # a step that was launched before the one before it was done
        self._blocks = BlockPool(sizes.blocks)
        self._residency = Residency(sizes.slab_bytes, copy_bytes=sizes.copy_bytes, clock=clock)
        self._scheduler = Scheduler(
            self._blocks,
            self._residency,
            block_size=config.block_size,
            max_seqs=config.max_seqs,
            step_tokens=config.step_tokens,
            chunk_tokens=config.chunk_tokens,
            free_tokens=sizes.free_tokens,
            logit_rows=sizes.logit_rows,
            queue=config.queue,
            prefix_cache=config.prefix_cache,
            tenant_queue=config.tenant_queue,
            fair=config.fair,
            tenant_weights=config.tenant_weights,
        )
        local = Shard(spec, 0, config.tensor_parallel).local
        slab = make_slab(sizes, local, open_adapter) if slab is None else slab
        self._runner = make_runner(runner, local, weights, ops, slab, sizes, config)

    @classmethod
    def build(cls, config: EngineConfig, on_lost: Callable[[], None] | None = None) -> Self:
        """Load the model, pick the kernels, choose the sizes. Raises ModelError or ConfigError.

        With `tensor_parallel` this process is the first of several (`engine.parallel`, also for `on_lost`).
        """
        device, ranks = choose_device(config), config.tensor_parallel
        check_ranks(config, device)
        if (threads := threads_of_rank(config)) is not None:
            torch.set_num_threads(threads)
        dtype = choose_dtype(config.dtype, device)
        ops = kernels.pick(device)
        started = time.perf_counter()
        folder = sources.find_model(config.model)
        local = Shard(model_weights.load_spec(folder), 0, ranks).local
        make_weight, make_table = choose_weights(config, dtype, device), choose_table(config, device)
        choose_cache_dtype(config, dtype, device)  # what is refused is refused before anything is loaded
        with ExitStack() as undo:
            followers = None if ranks == 1 else undo.enter_context(closing(Followers(config, on_lost)))
            spec, weights = model_weights.load(folder, dtype, make_weight, device, 0, ranks, make_table)
            base = sources.identify(folder, config.model)
            sizes = choose_sizes(config, local, dtype, device)
            leads: dict[str, Any] = {}
            if followers is not None:
                ops.ranks = followers.join(sizes, device)
                leads["open_adapter"] = partial(open_compiled, rank=0, ranks=ranks)
                leads["runner"] = partial(LeadingRunner, followers, ops.ranks)
            engine = cls(spec, base, weights, ops, sizes, config, **leads)
            engine._runner.warm()
            undo.pop_all()
        log.info(
            "%s (%s) ready in %.1f s: %s on %s, context %d, %d sequences, cache %.0f MiB (%d tokens), "
            "adapters %.0f MiB %s",
            base.name,
            spec.family,
            time.perf_counter() - started,
            str(dtype).removeprefix("torch."),
            device,
            sizes.max_context,
            config.max_seqs,
            sizes.kv_bytes / 2**20,
            sizes.blocks * config.block_size,
            sizes.slab_bytes / 2**20,
            str(sizes.adapter_dtype).removeprefix("torch."),
        )
        return engine

    def register(self, info: AdapterInfo) -> None:
        """Make a compiled adapter known under its digest. Raises AdapterError when it could never fit."""
        self._residency.register(info)

    def manage(self, action: AdapterAction, digest: str) -> None:
        """`load` brings a known adapter into the slab with the next steps, `pin` also keeps it there, `unpin` lets it
        go when others need the room, `unload` takes it out. Raises AdapterLostError or AdapterInUseError."""
        residency = self._residency
        if not residency.knows(digest):
            raise _not_known(digest)
        if action == "unload":
            self._scheduler.intake.unload(digest)
        elif action == "unpin":
            residency.pin(digest, False)
        elif not residency.fits(digest):
            raise AdapterInUseError("the pinned adapters leave no room for it", hint="unpin or unload some of them")
        elif not self._scheduler.intake.bring_in(digest):
            raise AdapterInUseError("the adapters in use leave no room for it now", hint="try again later")
        elif action == "pin":
            residency.pin(digest)

    def add(self, request: Request) -> None:
        """Take a request, or raise a LorikeetError that says why not.

        Generation ends at `sampling.stop_token_ids` and at the base's own stop ids, unless `ignore_eos`; the stop
        token is the last of the event's tokens. It ends with "length" after `max_tokens` or where the context ends.
        """
        sampling = effective_sampling(request)
        if request.adapter is not None and not self._residency.knows(request.adapter):
            raise _not_known(request.adapter)
        adapter = None if request.adapter is None else self._residency.info(request.adapter)
        vocab_size = (adapter and adapter.vocab_size) or self.spec.vocab_size
        check_sampling(sampling, vocab_size)
        check_prompt(request.tokens, vocab_size, self.max_context, generates=sampling.max_tokens > 0)
        if self._scheduler.knows(request.request_id):
            raise InvalidRequestError(f"request_id: {request.request_id!r} is in use", param="request_id")
        limit = min(len(request.tokens) + sampling.max_tokens, self.max_context)
        stop_ids = frozenset(token for token in self.stop_ids.union(sampling.stop_token_ids) if token < vocab_size)
        choices = None
        if sampling.choices is not None:
            self._check_room(len(request.tokens), max(map(len, sampling.choices)))
            choices = Choices(sampling.choices, stop_ids)
        sequence = Sequence(
            request=_with(request, sampling),
            arrival=self._arrivals,
            seed=_seed(sampling.seed),
            limit=limit,
            stop_ids=frozenset() if sampling.ignore_eos else stop_ids,
            root=root_key(self.base.sha256, request.tenant),
            choices=choices,
            acts=EVERYWHERE if adapter is None else _where(request.tokens, adapter),
        )
        self._scheduler.add(sequence, self._clock())
        self._arrivals += 1
        if adapter is not None and self._residency.place(adapter.digest) is Place.FULL:
            self._runner.prefetch(adapter)

    def cancel(self, request_id: str) -> None:
        """End a request: its blocks are free at once, its final event comes from the next step."""
        self._scheduler.cancel(request_id)

    def step(self) -> list[Event]:
        """Schedule, launch, collect, update. On a GPU the next step is launched before this one is collected, where it
        cannot be another one whatever comes of this."""
        plan, launched = self._ahead or self._launch(self._scheduler.schedule(self._clock()))
        self._ahead = None
        if self._overlaps and (following := self._scheduler.follow(plan, self._clock())) is not None:
            self._ahead = self._launch(following)
        outcome = self._runner.collect(launched)
        self._steps += 1
        return self._scheduler.update(plan, outcome)

    def _launch(self, plan: Plan) -> tuple[Plan, Launched]:
        return plan, self._runner.launch(plan)

    def close(self) -> None:
        """End the other processes that hold the model, where there are any. No step can follow."""
        self._runner.close()

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work or self._ahead is not None

    def stats(self) -> EngineStats:
        """Counters and gauges of now."""
        scheduler, blocks, residency = self._scheduler, self._blocks, self._residency
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_total=blocks.total,
            blocks_free=blocks.free,
            blocks_cached=blocks.cached,
            block_size=self.config.block_size,
            kv_bytes=self.sizes.kv_bytes,
            slab_used=residency.used,
            slab_total=residency.budget,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.preemptions,
            steps=self._steps,
            prefill_tokens=scheduler.prefill_tokens,
            decode_tokens=scheduler.decode_tokens,
            finished=scheduler.finished,
            adapters=residency.stats(),
        )

    def _check_room(self, prompt: int, longest: int) -> None:
        if prompt + longest > self.max_context:
            raise InvalidRequestError(
                f"choices: the longest has {longest} tokens, the context has {self.max_context - prompt} left",
                param="choices",
            )


def make_runner(
    kind: Callable[..., Runner],
    spec: ModelSpec,
    weights: DecoderWeights,
    ops: ServingOps,
    slab: AdapterSlab,
    sizes: Sizes,
    config: EngineConfig,
) -> Runner:
    """A runner of these sizes. `spec` and `weights` are what this process holds of the model."""
    return kind(
        spec,
        weights,
        ops,
        slab,
        blocks=sizes.blocks,
        block_size=config.block_size,
        max_seqs=config.max_seqs,
        max_context=sizes.max_context,
        step_tokens=config.step_tokens,
        dtype=sizes.dtype,
        device=sizes.device,
        fp8_cache=config.kv_cache_dtype == "fp8",
    )


def make_slab(sizes: Sizes, spec: ModelSpec, open_adapter: OpenAdapter) -> AdapterSlab:
    """The slab of these sizes; beside a GPU with a tier of pinned host memory behind it."""
    transfer = None
    if sizes.device != "cpu":
        copier = StreamCopier(sizes.device)
        transfer = Transfer(copier, HostTier(pinned_memory(sizes.host_bytes), open_adapter, copier), spec)
    return AdapterSlab(sizes.slab_bytes, spec, sizes.adapter_dtype, open_adapter, sizes.device, transfer)


def _not_known(digest: str) -> AdapterLostError:
    message = f"adapter: no adapter with digest {digest!r} is registered"
    return AdapterLostError(message, hint="register it, or register it again if it failed", param="adapter")


def _where(tokens: list[int], info: AdapterInfo) -> tuple[Stretch, Stretch]:
    """The stretches of positions on which an adapter acts.

    Everywhere; or from the last occurrence of its invocation tokens in the prompt on (aLoRA); or on the first and the
    last tokens of the prompt (LoReFT), either at most half of it, as pyreft counts them.
    """
    if info.positions is not None:
        first, last, left_out = info.positions
        end = max(len(tokens) - left_out, 0)
        return (0, min(first, end // 2)), (end - min(last, end // 2), end)
    if info.invocation is None:
        return EVERYWHERE
    wanted = list(info.invocation)
    for at in range(len(tokens) - len(wanted), -1, -1):
        if tokens[at : at + len(wanted)] == wanted:
            return (at, ENDLESS), NOWHERE
    raise InvalidRequestError(
        f"prompt: the adapter acts from its invocation tokens on; found none of {wanted}",
        hint="the prompt must contain these token ids, most often as the end of the adapter's own chat template",
        param="prompt",
    )


def _with(request: Request, sampling: SamplingParams) -> Request:
    return request if sampling is request.sampling else replace(request, sampling=sampling)


def _seed(seed: int | None) -> int:
    """As an unsigned 64-bit number; drawn where none is given."""
    return secrets.randbits(64) if seed is None else seed % 2**64
