"""Adapters that act on a part of a request: the same tokens as a dense pass, whatever else runs beside them."""

from __future__ import annotations

import pytest

from lorikeet.errors import InvalidRequestError
from lorikeet.kernels.cpu import CpuOps
from lorikeet.kernels.reference import ReferenceOps

INVOCATION = (7, 8)


def with_invocation(world, seed: int, length: int, at: int) -> list[int]:  # type: ignore[no-untyped-def]
    """A prompt whose last invocation is at `at`, and an earlier one that does not count."""
    prompt = [token if token not in INVOCATION else 9 for token in world.prompt(seed, length)]
    prompt[:2] = INVOCATION
    prompt[at : at + 2] = INVOCATION
    return prompt


@pytest.mark.parametrize("ops", [ReferenceOps, CpuOps])
@pytest.mark.parametrize("settings", [{}, {"step_tokens": 8, "chunk_tokens": 3}, {"prefix_cache": False}])
def test_an_activated_adapter_acts_from_its_last_invocation_on(world, ops, settings) -> None:  # type: ignore[no-untyped-def]
    activated, other = world.adapter(1, invocation=INVOCATION), world.adapter(2)
    engine = world.engine([activated, other], ops=ops(), **settings)
    places = {"a": (3, 20), "b": (4, 9), "c": (5, 27)}
    prompts = {name: with_invocation(world, seed, 30, at) for name, (seed, at) in places.items()}
    requests = [world.request(name, prompt, activated.digest, max_tokens=6) for name, prompt in prompts.items()]
    requests += [
        world.request("base", prompts["a"], max_tokens=6),
        world.request("other", prompts["b"], other.digest, max_tokens=6),
    ]
    answers = world.run(engine, requests)
    for name, (_, at) in places.items():
        assert answers[name].tokens == world.greedy(prompts[name], 6, activated.digest, at)
    assert answers["base"].tokens == world.greedy(prompts["a"], 6)
    assert answers["other"].tokens == world.greedy(prompts["b"], 6, other.digest)
    assert answers["a"].tokens != world.greedy(prompts["a"], 6, activated.digest)


def test_what_stands_before_the_invocation_is_shared_with_the_base(world) -> None:  # type: ignore[no-untyped-def]
    activated, again = world.adapter(1, invocation=INVOCATION), world.adapter(2, invocation=INVOCATION)
    engine = world.engine([activated, again])
    prompt = with_invocation(world, 3, 30, 20)
    first = world.run(engine, [world.request("base", prompt)])["base"]
    assert first.events[-1].cached_tokens == 0
    for name, info in (("one", activated), ("two", again)):
        answer = world.run(engine, [world.request(name, prompt, info.digest, max_tokens=6)])[name]
        assert answer.events[-1].cached_tokens == 20  # blocks of 4, up to the invocation
        assert answer.tokens == world.greedy(prompt, 6, info.digest, 20)


def test_prompt_scores_before_the_invocation_are_the_bases(world) -> None:  # type: ignore[no-untyped-def]
    activated = world.adapter(1, invocation=INVOCATION)
    prompt = with_invocation(world, 3, 30, 20)
    asked = {"prompt_logprobs": 0, "max_tokens": 1}
    scores = {}
    for name, digest in (("base", None), ("activated", activated.digest)):
        engine = world.engine([activated], logit_rows=12)
        scores[name] = world.run(engine, [world.request(name, prompt, digest, **asked)])[name].prompt_logprobs
    assert scores["base"][1:21] == pytest.approx(scores["activated"][1:21], abs=1e-5)
    dense = world.dense_logits(prompt, activated.digest, 20).log_softmax(-1)
    expected = [float(dense[i, token]) for i, token in enumerate(prompt[1:])]
    assert scores["activated"][1:] == pytest.approx(expected, abs=1e-4)


def test_a_prompt_without_the_invocation_is_refused(world) -> None:  # type: ignore[no-untyped-def]
    activated = world.adapter(1, invocation=INVOCATION)
    engine = world.engine([activated])
    with pytest.raises(InvalidRequestError, match=r"prompt: .* found none of \[7, 8\]") as caught:
        engine.add(world.request("a", [1, 2, 3, 7], activated.digest))
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("ops", [ReferenceOps, CpuOps])
def test_gains_and_shifts_beside_plain_pairs(world, ops) -> None:  # type: ignore[no-untyped-def]
    """And through evictions and compaction: their places move with the pairs'."""
    infos = [world.adapter(seed, rank=2 + seed % 3, scaled=seed % 2 == 0) for seed in range(6)]
    engine = world.engine(infos, ops=ops(), slab_bytes=3 * max(info.nbytes for info in infos))
    prompts = {f"{i}-{round_}": world.prompt(10 + i + round_, 12) for round_ in range(2) for i in range(6)}
    requests = [world.request(name, p, infos[int(name[0])].digest, max_tokens=5) for name, p in prompts.items()]
    answers = world.run(engine, [*requests, world.request("base", world.prompt(1, 12))])
    for name, prompt in prompts.items():
        assert answers[name].tokens == world.greedy(prompt, 5, infos[int(name[0])].digest), name


@pytest.mark.parametrize("ops", [ReferenceOps, CpuOps])
def test_tables_and_norms_of_their_own_move_with_the_adapter(world, ops) -> None:  # type: ignore[no-untyped-def]
    """Adapters with parts in place of the base's, through evictions and compaction, beside plain ones."""
    infos = [world.adapter(seed, rank=2 + seed % 3, overrides=seed % 2 == 0) for seed in range(6)]
    engine = world.engine(infos, ops=ops(), slab_bytes=3 * max(info.nbytes for info in infos))
    prompts = {f"{i}-{turn}": world.prompt(10 + i + turn, 12) for turn in range(2) for i in range(6)}
    requests = [world.request(name, p, infos[int(name[0])].digest, max_tokens=5) for name, p in prompts.items()]
    answers = world.run(engine, [*requests, world.request("base", world.prompt(1, 12), max_tokens=5)])
    for name, prompt in prompts.items():
        assert answers[name].tokens == world.greedy(prompt, 5, infos[int(name[0])].digest), name
    assert answers["base"].tokens == world.greedy(world.prompt(1, 12), 5)


@pytest.mark.parametrize("ops", [ReferenceOps, CpuOps])
@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("settings", [{}, {"step_tokens": 8, "chunk_tokens": 3}])
def test_interventions_on_the_stream_at_first_and_last_tokens(world, ops, settings, left_out) -> None:  # type: ignore[no-untyped-def]
    """Of the prompt, not of what is generated; of a short one at most half at either end."""
    reft = world.adapter(1, roles=("residual",), positions=(3, 4, left_out))
    plain = world.adapter(2)
    engine = world.engine([reft, plain], ops=ops(), **settings)
    lengths = {"long": 19, "exact": 7, "short": 5, "one": 1}
    prompts = {name: world.prompt(30 + length, length) for name, length in lengths.items()}
    requests = [
        world.request(name, prompt, reft.digest, max_tokens=5, prompt_logprobs=0) for name, prompt in prompts.items()
    ]
    requests += [world.request("plain", prompts["long"], plain.digest, max_tokens=5)]
    answers = world.run(engine, [*requests, world.request("base", prompts["long"], max_tokens=5)])
    for name, prompt in prompts.items():
        end = len(prompt) - left_out
        places = [*range(min(3, end // 2)), *range(end - min(4, end // 2), end)]
        assert answers[name].tokens == world.greedy(prompt, 5, reft.digest, places=places), name
        dense = world.dense_logits(prompt, reft.digest, places=places).log_softmax(-1)
        expected = [float(dense[i, token]) for i, token in enumerate(prompt[1:])]
        assert answers[name].prompt_logprobs[1:] == pytest.approx(expected, abs=1e-4), name
    assert answers["plain"].tokens == world.greedy(prompts["long"], 5, plain.digest)
    assert answers["base"].tokens == world.greedy(prompts["long"], 5)
    assert left_out or answers["long"].tokens != answers["base"].tokens
