"""Our own sides of a comparison: `lorikeet.LLM` in a process of its own, and `lorikeet serve` behind HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from load import Clients, Json, Trace, summarise
from lorikeet.config import EngineConfig
from lorikeet.kernels.precision import choose_dtype
from roofline import QUANTISED, Itemsizes
from shapes import Fixture
from worker import Worker, answer, resident

HERE = Path(__file__).parent
CONTEXT = 1024


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a side is made for. `settings` are fields of `EngineConfig`, those that a user chose on the command line."""

    fixture: Fixture
    adapters: Sequence[Path]
    spare: Path  # a folder for adapters that are made during the run, served like the others
    folder: Path  # of this run, deleted after it
    clients: int  # at most
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return choose_dtype(self.settings.get("dtype", "auto"))

    @property
    def itemsizes(self) -> Itemsizes:
        itemsize = self.dtype.itemsize
        return Itemsizes(QUANTISED.get(self.settings.get("quantize", "none"), itemsize), itemsize)

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of a token."""
        spec = self.fixture.spec
        return 2 * spec.num_layers * spec.kv_size * self.dtype.itemsize

    def adapter_bytes(self) -> list[int]:
        """What each takes in the engine: the files hold bf16."""
        stored = [(folder / "adapter_model.safetensors").stat().st_size for folder in self.adapters]
        return [size * self.dtype.itemsize // 2 for size in stored]

    def engine_settings(self) -> dict[str, Any]:
        """Room for all clients at 512 tokens and 8 long prompts, for all adapters and a few spare ones."""
        adapters = self.adapter_bytes()
        return {
            "kv_memory": (self.clients * 512 + 8 * CONTEXT) * self.token_bytes,
            "adapter_memory": (sum(adapters) + 4 * max(adapters)) * 9 // 8 + 2**20,
            "max_context": CONTEXT,
            **self.settings,
        }

    def environment(self) -> dict[str, str]:
        """Compiled adapters go into the run's own folder, compiled kernels where they always are."""
        usual = Path(os.environ.get("LORIKEET_CACHE", "~/.cache/lorikeet")).expanduser()
        kernels = os.environ.get("NUMBA_CACHE_DIR", str(usual / "numba"))
        return {"LORIKEET_CACHE": str(self.folder / "cache"), "NUMBA_CACHE_DIR": kernels}


def lists(clients: Clients, names: Sequence[Any], base: Any = None) -> list[list[list[Any]]]:
    """Clients as JSON: [prompt, what `names` has for the adapter] of each request."""
    return [[[one.prompt, base if one.adapter is None else names[one.adapter]] for one in c] for c in clients]


class OfflineSide:
    """`lorikeet.LLM`: each round of the clients is one call of `generate`."""

    name = "offline"

    def __init__(self, setup: Setup) -> None:
        self._names = [str(folder) for folder in setup.adapters]
        self._worker = Worker(HERE / "ours.py", environment=setup.environment())
        settings = setup.engine_settings()
        self.started = self._worker.ask("start", model=setup.fixture.model, settings=settings)

    def run(self, clients: Clients, new: int) -> Json:
        return self._worker.ask("run", clients=lists(clients, self._names), new=new)

    def cold(self, folder: Path, prompt: list[int]) -> float:
        """Seconds from the call to the first token of an adapter that it has never seen."""
        return float(self._worker.ask("run", clients=[[[prompt, str(folder)]]], new=1)["call_seconds"])

    def memory(self) -> Json:
        return resident(self._worker.pid)

    def close(self) -> None:
        self._worker.close()


class ServerSide:
    """`lorikeet serve` and, in a third process, the clients."""

    name = "http"

    def __init__(self, setup: Setup) -> None:
        self._root = setup.spare
        self.names = [f"served-{i}" for i in range(len(setup.adapters))]
        for name, folder in zip(self.names, setup.adapters, strict=True):
            if not (link := self._root / name).exists():
                link.symlink_to(folder.absolute(), target_is_directory=True)
        self.url = f"http://127.0.0.1:{_free_port()}"
        self._log = (self._root.parent / "server.log").open("w+")
        options = [_flag(name.replace("_", "-"), value) for name, value in setup.engine_settings().items()]
        self._server = subprocess.Popen(
            [sys.executable, "-m", "lorikeet", "serve", "--model", setup.fixture.model, "--adapters", str(self._root),
             "--port", self.url.rsplit(":", 1)[1], *options],
            stderr=self._log, env=os.environ | setup.environment(),
        )  # fmt: skip
        self._wait()
        self.clients = Worker(HERE / "http_load.py", self.url)

    def run(self, clients: Clients, new: int) -> Json:
        bodies = [{"model": name} for name in self.names]
        return self.clients.ask("run", clients=lists(clients, bodies, {}), new=new)

    def cold(self, folder: Path, prompt: list[int]) -> float:
        time.sleep(1.1)  # the server looks for new names once a second
        return float(self.clients.ask("run", clients=[[[prompt, {"model": folder.name}]]], new=1)["ttft_p50"])

    def memory(self) -> Json:
        """Of the engine process."""
        engines = [p for p in psutil.Process(self._server.pid).children() if "lorikeet.engine.process" in p.cmdline()]
        return resident(engines[0].pid)

    def close(self) -> None:
        self.clients.close()
        self._server.terminate()
        try:
            self._server.wait(15)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._log.close()

    def _wait(self, seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._server.poll() is None:
            try:
                if httpx.get(f"{self.url}/health/ready").is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        self._server.kill()
        self._log.seek(0)
        raise SystemExit(f"the server did not get ready:\n{self._log.read()[-3000:]}")


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def setting(text: str) -> tuple[str, Any]:
    """`step_tokens=256` -> ("step_tokens", 256)."""
    name, _, value = text.partition("=")
    if not value or name not in EngineConfig.__struct_fields__:
        known = ", ".join(EngineConfig.__struct_fields__)
        raise SystemExit(f"--set: found {text!r}; expected NAME=VALUE with a NAME of {known}")
    return name, int(value) if value.isdigit() else value


# --- the process of the offline side ------------------------------------------------------------------------------


class Offline:
    """An LLM whose steps are timed from outside: what `generate` costs its caller is what is measured."""

    def start(self, model: str, settings: Json) -> Json:
        from lorikeet import LLM, kernels

        kernels.pick("cpu")  # libraries are in memory before the model is
        libraries = resident(os.getpid())
        began = time.perf_counter()
        self.llm = LLM(model, **settings)
        seconds = time.perf_counter() - began
        self.traces: dict[str, Trace] = {}
        self._time(self.llm.engine)
        stats = self.llm.stats()
        return {
            "libraries": libraries, "loaded": resident(os.getpid()), "load_seconds": seconds,
            "kv_bytes": stats.kv_bytes, "slab_bytes": stats.slab_total,
        }  # fmt: skip

    def _time(self, engine: Any) -> None:
        add, step = engine.add, engine.step

        def timed_add(request: Any) -> None:
            self.traces[request.request_id] = Trace(time.perf_counter())
            add(request)

        def timed_step() -> Any:
            events = step()
            now = time.perf_counter()
            for event in events:
                if event.tokens:
                    trace = self.traces[event.request_id]
                    trace.times.append(now)
                    trace.tokens += len(event.tokens)
            return events

        engine.add, engine.step = timed_add, timed_step

    def run(self, clients: list[list[list[Any]]], new: int) -> Json:
        """`register_seconds` is what `generate` takes before its first request is in: the files of the adapters."""
        from lorikeet.types import SamplingParams

        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        traces: list[list[Trace]] = [[] for _ in clients]
        registering = calls = 0.0
        for wave in zip(*clients, strict=True):
            self.traces.clear()
            began = time.perf_counter()
            self.llm.generate([prompt for prompt, _ in wave], [name for _, name in wave], sampling)
            calls += time.perf_counter() - began
            for trace, own in zip(self.traces.values(), traces, strict=True):
                own.append(trace)
            registering += min(trace.sent for trace in self.traces.values()) - began
        # Between rounds nothing is in flight; what registering takes is told apart, not counted.
        whole = summarise(traces, len(clients[0][0][0]))
        seconds = sum(max(t.times[-1] for t in wave) - min(t.sent for t in wave) for wave in zip(*traces, strict=True))
        return {
            **whole, "tokens_per_second": whole["tokens"] / seconds, "seconds": seconds, "call_seconds": calls,
            "register_seconds": registering,
        }  # fmt: skip


if __name__ == "__main__":
    offline = Offline()
    answer(start=offline.start, run=offline.run)
