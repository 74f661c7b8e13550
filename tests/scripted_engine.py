"""An engine that does as told, for tests of what stands around it. Run as a process it takes the socket's address.

A request's next token is its last one plus one (mod 240). The last prompt token may be an order:
"""

from __future__ import annotations

import os
import signal
import sys
import time

from lorikeet.config import EngineConfig
from lorikeet.engine.process import run
from lorikeet.engine.wire import EngineInfo, LoaderSettings
from lorikeet.errors import InvalidRequestError, ModelError, NotFoundError, OverloadedError
from lorikeet.model.spec import ModelSpec
from lorikeet.types import AdapterInfo, AdapterStats, BaseIdentity, EngineStats, Event, Request, TokenLogprob

RAISE_IN_STEP = 246  # after two tokens
DIE = 247  # after two tokens, as by kill -9
WAIT = 248  # never a token
REFUSE = 249  # add() raises
FINAL_TWICE = 250
SLOW = 251  # 20 ms a step
EOS = 1

BASE = BaseIdentity(name="scripted", sha256="0" * 64, tokenizer_sha256="1" * 64, stop_ids=(0,))


class ScriptedEngine:
    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.adapters: dict[str, AdapterInfo] = {}
        self.events: list[Event] = []
        self.pinned: set[str] = set()

    @classmethod
    def build(cls, config: EngineConfig) -> ScriptedEngine:
        if config.model == "broken":
            raise ModelError("broken: no config.json", hint="name a model folder")
        return cls(config)

    def info(self) -> EngineInfo:
        return EngineInfo(family="llama", dtype="float32", device="cpu", max_context=256, vocab_size=256, base=BASE)

    def loader_settings(self) -> LoaderSettings:
        spec = ModelSpec(
            family="llama", vocab_size=256, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1,
            num_kv_heads=1, head_dim=8, max_context=256,
        )  # fmt: skip
        return LoaderSettings(spec=spec, base=BASE, dtype="float32", cache="", allow_lock_mismatch=False)

    def register(self, info: AdapterInfo) -> None:
        self.adapters[info.digest] = info

    def manage(self, action: str, digest: str) -> None:
        if digest not in self.adapters:
            raise NotFoundError(f"unknown adapter {digest}")
        (self.pinned.add if action == "pin" else self.pinned.discard)(digest)

    def add(self, request: Request) -> None:
        if request.tokens[-1] == REFUSE:
            raise InvalidRequestError("refused as told", param="prompt")
        if len(self.requests) >= self.config.queue:
            raise OverloadedError(f"the queue is full ({self.config.queue})", retry_after=2.0)
        if request.adapter is not None and request.adapter not in self.adapters:
            raise RuntimeError(f"unknown adapter {request.adapter}")
        self.requests[request.request_id] = request
        self.tokens[request.request_id] = []

    def cancel(self, request_id: str) -> None:
        if self.requests.pop(request_id, None) is not None:
            self.events.append(Event(request_id=request_id, finish="cancelled"))

    def has_work(self) -> bool:
        return bool(self.events) or any(r.tokens[-1] != WAIT for r in self.requests.values())

    def step(self) -> list[Event]:
        events, self.events = self.events, []
        time.sleep(0.02 if any(r.tokens[-1] == SLOW for r in self.requests.values()) else 0.001)
        for request in list(self.requests.values()):
            if request.tokens[-1] != WAIT:
                events += self.advance(request)
        return events

    def advance(self, request: Request) -> list[Event]:
        key, sampling, done = request.request_id, request.sampling, self.tokens[request.request_id]
        if len(done) == 2 and request.tokens[-1] == RAISE_IN_STEP:
            raise RuntimeError("as told")
        if len(done) == 2 and request.tokens[-1] == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        first = not done
        if len(done) < sampling.max_tokens:
            done.append(((done or request.tokens)[-1] + 1) % 240)
        stopped = bool(done) and not sampling.ignore_eos and done[-1] in (EOS, *sampling.stop_token_ids)
        finish = "stop" if stopped else "length" if len(done) >= sampling.max_tokens else None
        logprobs = prompt_logprobs = None
        if sampling.logprobs is not None:
            logprobs = [self.logprob(token, sampling.logprobs) for token in done[-1:]]
        if first and sampling.prompt_logprobs is not None:
            prompt_logprobs = [None, *(self.logprob(token, sampling.prompt_logprobs) for token in request.tokens[1:])]
        if finish is not None:
            del self.requests[key]
        event = Event(
            request_id=key, tokens=done[-1:] if sampling.max_tokens else [], logprobs=logprobs,
            prompt_logprobs=prompt_logprobs, finish=finish,
        )  # fmt: skip
        return [event, event] if finish and request.tokens[-1] == FINAL_TWICE else [event]

    def logprob(self, token: int, count: int) -> TokenLogprob:
        return TokenLogprob(token, -0.5, [((token + i) % 256, -0.5 - i) for i in range(count)])

    def stats(self) -> EngineStats:
        zeros = dict.fromkeys(EngineStats.__struct_fields__[:-1], 0)
        blank = {"resident": True, "bytes": 0, "hits": 0, "last_used": 0, "max_rank": 1, "running": 0}
        adapters = [AdapterStats(digest=one, pinned=one in self.pinned, **blank) for one in self.adapters]
        return EngineStats(**(zeros | {"running": len(self.requests)}), adapters=adapters)


if __name__ == "__main__":
    run(ScriptedEngine.build, [sys.executable, __file__.replace("scripted_engine", "scripted_loader")])
