"""Whole requests through the engine on reference kernels, against a dense oracle and against themselves."""

from __future__ import annotations

from typing import Any

import pytest


def test_paged_is_dense(world: Any) -> None:
    prompt = world.prompt(1, 21)
    answer = world.run(world.engine(), [world.request("a", prompt, max_tokens=30)])["a"]
    assert answer.tokens == world.greedy(prompt, 30)
    assert len(set(answer.tokens)) > 3


def test_adapters_change_the_answer_and_match_the_dense_one(world: Any) -> None:
    info = world.adapter(1)
    prompt = world.prompt(2, 17)
    answer = world.run(world.engine([info]), [world.request("a", prompt, info.digest, max_tokens=20)])["a"]
    assert answer.tokens == world.greedy(prompt, 20, info.digest)
    assert answer.tokens != world.greedy(prompt, 20)
