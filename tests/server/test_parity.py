"""Sixteen adapters of all ranks in one mixed batch over HTTP, against transformers + peft, fp32, four families."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.fixtures import VOCABULARY, next_logprobs, oracle, sample_tokens
from tests.server.hosting import hosted

from lorikeet.model.tokenizer import Tokenizer
from lorikeet.server.openai import token_name

NEW = 12  # tokens generated
TOLERANCE = 1e-4


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_mixed_batch_over_http(
    family: str, checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], own_cache_folder: None
) -> None:
    base, folders = checkpoint(family), adapters(family, 16)
    names = [base.name, *(folder.name for folder in folders)]
    prompts = [sample_tokens(1, 8 + 3 * i, seed=i)[0].tolist() for i in range(len(names))]

    async def ask() -> list[Any]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            fields = {"max_tokens": NEW, "temperature": 0, "echo": True, "logprobs": 2, "ignore_eos": True}
            bodies = [{"model": n, "prompt": p, **fields} for n, p in zip(names, prompts, strict=True)]
            replies = await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))
        assert [reply.status_code for reply in replies] == [200] * len(bodies), [reply.text for reply in replies]
        return [reply.json()["choices"][0]["logprobs"] for reply in replies]

    with hosted(base, folders[0].parent, max_context=128, step_tokens=64) as server:
        answers = asyncio.run(ask())
        stats = asyncio.run_coroutine_threadsafe(server.state.engine.stats(), server.loop).result(10)
    assert sum(adapter.hits > 0 for adapter in stats.adapters) == 16
    ids = {token_name(Tokenizer(base), token): token for token in range(VOCABULARY)}
    assert len(ids) == VOCABULARY
    for name, prompt, answer, folder in zip(names, prompts, answers, [None, *folders], strict=True):
        tokens = torch.tensor([[ids[token] for token in answer["tokens"]]])
        assert tokens[0, : len(prompt)].tolist() == prompt and tokens.shape[1] == len(prompt) + NEW
        with torch.no_grad():
            logits = oracle(base, folder)(tokens).logits
        expected = next_logprobs(logits, tokens)[0]
        found = torch.tensor(answer["token_logprobs"][1:])
        error = (found - expected).abs().max()
        assert error < TOLERANCE, f"{name}: logprobs differ by {error}"
        best = logits[0, len(prompt) - 1 : -1].log_softmax(-1).topk(2)
        clear = best.values[:, 0] - best.values[:, 1] > TOLERANCE
        assert (best.indices[:, 0] == tokens[0, len(prompt) :])[clear].all(), f"{name}: another greedy token"
