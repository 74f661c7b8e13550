"""What we are compared with: transformers + peft in a process of its own, and any OpenAI-compatible server."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from load import Clients, Json, Trace, summarise
from ours import HERE, Setup, lists
from worker import Worker, answer, resident

BASE = "__base__"  # peft's own name for rows without an adapter


class PeftSide:
    """transformers + peft: each round of the clients is one `generate` of equal lengths."""

    name = "peft"

    def __init__(self, setup: Setup) -> None:
        self._names = [folder.name for folder in setup.adapters]
        self._worker = Worker(HERE / "peers.py")
        settings = {key: setup.settings[key] for key in ("dtype", "threads") if key in setup.settings}
        self._worker.ask("start", base=str(setup.fixture.base), adapters=list(map(str, setup.adapters)), **settings)

    def run(self, clients: Clients, new: int) -> Json:
        return self._worker.ask("run", clients=lists(clients, self._names, BASE), new=new)

    def cold(self, folder: Path, prompt: list[int]) -> float:
        return float(self._worker.ask("cold", folder=str(folder), prompt=prompt)["seconds"])

    def memory(self) -> Json:
        return resident(self._worker.pid)

    def close(self) -> None:
        self._worker.close()


class UrlSide:
    """A server that somebody else has started on the same base and adapters.

    `base` and `adapter` say what a body holds to reach them: a model's name, or a JSON object that is put into the
    body; `{i}` in them is the adapter's number. Without `base` it is the first model that the server lists.
    """

    def __init__(self, url: str, base: str | None, adapter: str) -> None:
        self.name = urlsplit(url).netloc
        self._port = urlsplit(url).port
        self._worker = Worker(HERE / "http_load.py", url.rstrip("/"))
        models = self._worker.ask("models")
        if "error" in models:
            self._worker.close()
            raise SystemExit(f"--peer {url}: {models['error']}; expected an OpenAI-compatible server at this address")
        self._base = fields(base or models["names"][0])
        self._adapter = adapter

    def run(self, clients: Clients, new: int) -> Json:
        count = 1 + max((one.adapter for asks in clients for one in asks if one.adapter is not None), default=-1)
        bodies = [self._base | fields(self._adapter.replace("{i}", str(i))) for i in range(count)]
        return self._worker.ask("run", clients=lists(clients, bodies, self._base), new=new)

    def cold(self, folder: Path, prompt: list[int]) -> None:
        """There is no common way to give a server an adapter."""

    def memory(self) -> Json | None:
        """Of the process that listens and its children together; None where it cannot be found."""
        try:
            owner = next(
                c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr[1] == self._port
            )
            family = [psutil.Process(owner), *psutil.Process(owner).children(recursive=True)]
        except (StopIteration, TypeError, psutil.Error):
            return None
        parts = [resident(process.pid) for process in family]
        return {"rss": sum(part["rss"] for part in parts), "anonymous": None}

    def close(self) -> None:
        self._worker.close()


def fields(text: str) -> Json:
    """`name` -> {"model": "name"}; a JSON object stays what it is."""
    if not text.startswith("{"):
        return {"model": text}
    try:
        found: Json = json.loads(text)
    except json.JSONDecodeError as error:
        raise SystemExit(f"--peer-base, --peer-adapter: found {text!r}, which is no JSON object: {error}") from None
    return found


# --- the process of transformers + peft ---------------------------------------------------------------------------


class Peft:
    """Adapters stay in the dtype of their files: peft's default, fp32, is slower."""

    def start(self, base: str, adapters: list[str], dtype: str = "auto", threads: int | None = None) -> Json:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from lorikeet.kernels.precision import choose_dtype

        logging.set_verbosity_error()
        if threads is not None:
            torch.set_num_threads(threads)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=choose_dtype(dtype))
        self.model: Any = plain
        for folder in adapters:
            self._load(folder, PeftModel)
        self.model.eval()
        config = self.model.generation_config
        config.eos_token_id, config.pad_token_id, config.do_sample = None, 0, False
        return {}

    def _load(self, folder: str, peft_model: Any = None) -> None:
        name = Path(folder).name
        if hasattr(self.model, "load_adapter") and hasattr(self.model, "peft_config"):
            self.model.load_adapter(folder, name, autocast_adapter_dtype=False)
        else:
            self.model = peft_model.from_pretrained(self.model, folder, name, autocast_adapter_dtype=False)

    def run(self, clients: list[list[list[Any]]], new: int) -> Json:
        waves = [self._wave(wave, new) for wave in zip(*clients, strict=True)]
        return summarise([list(traces) for traces in zip(*waves, strict=True)], len(clients[0][0][0]))

    def _wave(self, wave: tuple[list[Any], ...], new: int) -> list[Trace]:
        import torch

        began = time.perf_counter()
        times: list[float] = []

        def clock(tokens: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool)

        prompts = torch.tensor([prompt for prompt, _ in wave])
        names = [name for _, name in wave]
        call = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "max_new_tokens": new}
        with torch.inference_mode():
            if set(names) == {BASE}:
                with self.model.disable_adapter():
                    self.model.generate(**call, stopping_criteria=[clock])
            elif len(set(names)) == 1:
                self.model.set_adapter(names[0])
                self.model.generate(**call, stopping_criteria=[clock])
            else:
                self.model.generate(**call, stopping_criteria=[clock], adapter_names=names)
        return [Trace(began, list(times), len(times)) for _ in wave]

    def cold(self, folder: str, prompt: list[int]) -> Json:
        began = time.perf_counter()
        self._load(folder)
        self._wave(([prompt, Path(folder).name],), 1)
        seconds = time.perf_counter() - began
        self.model.set_adapter(next(iter(self.model.peft_config)))  # the active one is not to be deleted
        self.model.delete_adapter(Path(folder).name)
        return {"seconds": seconds}


if __name__ == "__main__":
    peft = Peft()
    answer(start=peft.start, run=peft.run, cold=peft.cold)
