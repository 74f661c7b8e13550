"""A tiny random base with adapters in memory, an engine around it, and a dense oracle beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from lorikeet.adapters.compiled import CompiledAdapter, lay_out
from lorikeet.adapters.normal import Entry
from lorikeet.adapters.overrides import Override
from lorikeet.config import EngineConfig
from lorikeet.engine.engine import Engine
from lorikeet.engine.residency import Residency
from lorikeet.engine.sizing import Sizes
from lorikeet.engine.slab import AdapterSlab
from lorikeet.kernels.batch import Batch, Segments, Slab
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.kernels.weight import DenseWeight
from lorikeet.model.decoder import DecoderWeights, LayerWeights, Ops, forward
from lorikeet.model.spec import ModelSpec
from lorikeet.model.weights import rope_tables
from lorikeet.types import AdapterInfo, BaseIdentity, Event, Request, SamplingParams

EOS = 0


@dataclass
class Answer:
    """All events of one request, joined."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    events: list[Event] = field(default_factory=list)

    @property
    def logprobs(self) -> list[float]:
        return [entry.logprob for event in self.events for entry in event.logprobs or []]

    @property
    def prompt_logprobs(self) -> list[float | None]:
        said = [event.prompt_logprobs for event in self.events if event.prompt_logprobs is not None]
        assert len(said) <= 1
        return [entry and entry.logprob for entry in said[0]] if said else []


@dataclass
class World:
    """One base, its adapters by digest, and where engines find them."""

    spec: ModelSpec
    weights: DecoderWeights
    base: BaseIdentity
    adapters: dict[str, CompiledAdapter] = field(default_factory=dict)

    def adapter(self, seed: int, rank: int = 3, roles: Iterable[str] = ("q", "v", "o", "gate", "down"),
                scaled: bool = False, overrides: bool = False, invocation: tuple[int, ...] | None = None,
                positions: tuple[int, int, int] | None = None) -> AdapterInfo:  # fmt: skip
        """A random adapter, strong enough to change greedy tokens."""
        generator = np.random.default_rng(seed)
        entries = []
        for site in (*self.spec.sites, *self.spec.residual_sites):
            if site.role in roles:
                a = generator.normal(0, site.d_in**-0.5, (rank, site.d_in)).astype(np.float32)
                b = generator.normal(0, 0.5, (rank, site.d_out)).astype(np.float32)
                vectors = generator.normal(1, 0.3, (2, site.d_out)).astype(np.float32) if scaled else (None, None)
                entries.append(Entry(site, a, b, 0.7, *vectors))
        digest = hashlib.sha256(f"{seed} {rank} {scaled} {overrides} {invocation} {positions}".encode()).hexdigest()
        own = self._overrides(generator) if overrides else []
        header, data = lay_out(
            entries, digest, self.base, "float32", invocation=invocation, positions=positions, overrides=own
        )
        self.adapters[digest] = CompiledAdapter(header, data)
        return header.info(Path(digest))

    def _overrides(self, generator: np.random.Generator) -> list[Override]:
        """Some rows of the embedding, a head and two norms."""
        hidden, vocabulary = self.spec.hidden_size, self.spec.vocab_size

        def random(*shape: int) -> np.ndarray:
            return generator.normal(0, 1, shape).astype(np.float32)

        return [
            Override("embed", None, random(3, hidden), (2, 5, 40)),
            Override("head", None, random(vocabulary, hidden)),
            Override("mlp_norm", 1, 1 + random(1, hidden) / 4),
            Override("norm", None, 1 + random(1, hidden) / 4),
        ]

    def engine(
        self,
        adapters: Iterable[AdapterInfo] = (),
        *,
        blocks: int = 64,
        slab_bytes: int = 2**20,
        max_context: int = 128,
        logit_rows: int = 64,
        clock: Callable[[], float] | None = None,
        ops: Ops | None = None,
        slab: AdapterSlab | None = None,
        **config: object,
    ) -> Engine:
        settings = EngineConfig(**{"block_size": 4, "max_seqs": 8, "step_tokens": 64, **config})  # type: ignore[arg-type]
        sizes = Sizes(
            dtype=torch.float32,
            adapter_dtype=torch.float32,
            max_context=min(max_context, blocks * settings.block_size),
            blocks=blocks,
            kv_bytes=0,
            slab_bytes=slab_bytes,
            logit_rows=logit_rows,
        )
        extra = {} if clock is None else {"clock": clock}
        ops = ReferenceOps() if ops is None else ops
        engine = Engine(self.spec, self.base, self.weights, ops, sizes, settings, self._open, slab=slab, **extra)
        for info in adapters:
            engine.register(info)
        return engine

    def _open(self, path: Path, *, wait: bool = True) -> CompiledAdapter:
        return self.adapters[str(path)]

    def dense_logits(
        self, tokens: list[int], adapter: str | None = None, acts_from: int = 0, places: list[int] | None = None
    ) -> torch.Tensor:
        """Logits [T, V] without cache or batch; the adapter acts on tokens from `acts_from` on, or at `places`."""
        slab, segments = None, None
        if adapter is not None:
            slab = self._slab(adapter)
            rows = torch.arange(acts_from, len(tokens)) if places is None else torch.tensor(places, dtype=torch.int64)
            segments = Segments(rows, [0, len(rows)], [0], places is None)
        count = len(tokens)
        batch = Batch(
            tokens=torch.tensor(tokens),
            positions=torch.arange(count),
            query_start=torch.tensor([0, count], dtype=torch.int32),
            kv_len=torch.tensor([count], dtype=torch.int32),
            max_query=count,
            max_kv=count,
            token_segments=segments,
            scaled=True,
            overridden=True,
        )
        with torch.inference_mode():
            return forward(self.spec, self.weights, batch, ReferenceOps(), slab)

    def _slab(self, digest: str) -> Slab:
        nbytes = self.adapters[digest].header.nbytes
        residency = Residency(nbytes)
        residency.register(self.adapters[digest].header.info(Path(digest)))
        residency.ensure(digest)
        slab = AdapterSlab(nbytes, self.spec, torch.float32, self._open)
        assert slab.carry_out(residency.instructions()) == {}
        return slab.slab

    def greedy(self, prompt: list[int], count: int, adapter: str | None = None, acts_from: int = 0,
               places: list[int] | None = None) -> list[int]:  # fmt: skip
        """Greedy tokens by the dense oracle, up to and with EOS."""
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            tokens.append(int(self.dense_logits(tokens, adapter, acts_from, places)[-1].argmax()))
            if tokens[-1] == EOS:
                break
        return tokens[len(prompt) :]

    def run(self, engine: Engine, requests: Iterable[Request], steps: int = 5000) -> dict[str, Answer]:
        """Add all requests and step to the end."""
        answers: dict[str, Answer] = {}
        for request in requests:
            engine.add(request)
        for _ in range(steps):
            if not engine.has_work():
                return answers
            self.collect(answers, engine.step())
        raise AssertionError(f"still at work after {steps} steps: {engine.stats()}")

    @staticmethod
    def collect(answers: dict[str, Answer], events: Iterable[Event]) -> None:
        """Sort events by request; nothing may follow a final one."""
        for event in events:
            answer = answers.setdefault(event.request_id, Answer())
            assert answer.finish is None, f"an event after the final one: {event}"
            answer.tokens += event.tokens
            answer.finish = event.finish
            answer.events.append(event)

    @staticmethod
    def prompt(seed: int, length: int) -> list[int]:
        return np.random.default_rng(seed).integers(1, 61, length).tolist()

    @staticmethod
    def request(name: str, prompt: list[int], adapter: str | None = None, **sampling: object) -> Request:
        """Greedy unless told otherwise."""
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **sampling})  # type: ignore[arg-type]
        return Request(request_id=name, tokens=prompt, adapter=adapter, sampling=params)


@pytest.fixture(scope="session")
def world() -> World:
    spec = ModelSpec(
        family="qwen3", vocab_size=61, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=6,
        num_kv_heads=2, head_dim=8, max_context=256, tie_embeddings=True, qk_norm=True, windows=(None, 24),
        eos_ids=(EOS,),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale + shift

    def linear(d_out: int, d_in: int) -> DenseWeight:
        return DenseWeight(tensor(d_out, d_in, scale=1.5 * d_in**-0.5), tensor(d_out, scale=0.2))

    h, m = spec.hidden_size, spec.intermediate_size
    layers = [
        LayerWeights(
            attn_norm=tensor(h, scale=0.1, shift=1),
            qkv=linear(spec.q_size + 2 * spec.kv_size, h),
            o=linear(h, spec.q_size),
            mlp_norm=tensor(h, scale=0.1, shift=1),
            gate_up=linear(2 * m, h),
            down=linear(h, m),
            q_norm=tensor(spec.head_dim, scale=0.1, shift=1),
            k_norm=tensor(spec.head_dim, scale=0.1, shift=1),
        )
        for _ in range(spec.num_layers)
    ]
    embed = DenseWeight(tensor(spec.vocab_size, h))
    head = DenseWeight(tensor(spec.vocab_size, h, scale=3 * h**-0.5))
    weights = DecoderWeights(embed, layers, tensor(h, scale=0.1, shift=1), head, *rope_tables(spec))
    base = BaseIdentity(name="tiny", sha256="b" * 64, tokenizer_sha256="t" * 64, stop_ids=(EOS,))
    return World(spec, weights, base)
