"""Whole requests through the engine on reference kernels, against a dense oracle and against themselves."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from lorikeet import kernels
from lorikeet.errors import (
    AdapterInUseError,
    AdapterLostError,
    InvalidRequestError,
    OverloadedError,
    UnsupportedFieldError,
)
from lorikeet.types import Request, SamplingParams

EOS = 0


def mixed_requests(world: Any) -> tuple[list[Any], list[Request]]:
    """Three adapters of different ranks and targets, and the base, greedy and sampled, short and long prompts."""
    targets = {1: ("q", "k", "down"), 3: ("v", "o", "gate"), 5: ("q", "up", "down")}
    infos = [world.adapter(10 + rank, rank, roles) for rank, roles in targets.items()]
    digests = [None, *(info.digest for info in infos)]
    requests = []
    for i in range(12):
        sampling: dict[str, Any] = {"max_tokens": 6 + i}
        if i % 3 == 1:
            sampling |= {"temperature": 0.9, "seed": i, "top_p": 0.95}
        if i % 3 == 2:
            sampling |= {"temperature": 1.3, "seed": i, "top_k": 20, "min_p": 0.01, "logprobs": 2}
        if i % 4 == 3:
            sampling |= {"prompt_logprobs": 1}
        requests.append(world.request(f"r{i}", world.prompt(i, 3 + 4 * i), digests[i % 4], **sampling))
    return infos, requests


@pytest.fixture(scope="module")
def alone(world: Any) -> dict[str, Any]:
    """Each of the mixed requests by itself in a fresh engine."""
    infos, requests = mixed_requests(world)
    return {r.request_id: world.run(world.engine(infos), [r])[r.request_id] for r in requests}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, answer in expected.items():
        assert found[name].tokens == answer.tokens, name
        assert found[name].finish == answer.finish
        assert found[name].logprobs == pytest.approx(answer.logprobs, abs=1e-4)
        assert found[name].prompt_logprobs == pytest.approx(answer.prompt_logprobs, abs=1e-4)


# --- right ------------------------------------------------------------------------------------------------------------


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


def test_mixed_batch_is_each_alone(world: Any, alone: dict[str, Any]) -> None:
    infos, requests = mixed_requests(world)
    engine = world.engine(infos, max_seqs=12, blocks=256)
    same(world.run(engine, requests), alone)
    assert engine.stats().preemptions == 0


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_preempted_is_not_preempted(world: Any, prefix_cache: bool) -> None:
    infos, requests = mixed_requests(world)
    longer = [
        replace(r, tokens=r.tokens[:9], sampling=replace(r.sampling, max_tokens=40, ignore_eos=True)) for r in requests
    ]
    roomy = world.engine(infos, max_seqs=12, blocks=512)
    tight = world.engine(infos, max_seqs=12, blocks=40, prefix_cache=prefix_cache)
    same(world.run(tight, longer), world.run(roomy, longer))
    assert (roomy.stats().preemptions, tight.stats().blocks_free) == (0, 40)
    assert tight.stats().preemptions > 3


def test_cpu_kernels_give_the_same(world: Any, alone: dict[str, Any]) -> None:
    infos, requests = mixed_requests(world)
    engine = world.engine(infos, max_seqs=5, step_tokens=24, blocks=60, ops=kernels.pick("cpu"))
    same(world.run(engine, requests), alone)


def test_chunked_is_whole(world: Any, alone: dict[str, Any]) -> None:
    infos, requests = mixed_requests(world)
    engine = world.engine(infos, max_seqs=4, step_tokens=7, logit_rows=6, blocks=256)
    same(world.run(engine, requests), alone)


def test_one_slab_place_for_three_adapters(world: Any, alone: dict[str, Any]) -> None:
    infos, requests = mixed_requests(world)
    engine = world.engine(infos, slab_bytes=max(info.nbytes for info in infos) + 64)
    same(world.run(engine, requests), alone)
    assert sum(adapter.resident for adapter in engine.stats().adapters) < 3


def test_cached_prefix_is_cold(world: Any) -> None:
    info = world.adapter(1)
    prompt = world.prompt(5, 30)
    for digest in (None, info.digest):
        engine = world.engine([info])
        cold = world.run(engine, [world.request("cold", prompt, digest)])["cold"]
        warm = world.run(engine, [world.request("warm", prompt, digest)])["warm"]
        assert warm.tokens == cold.tokens == world.greedy(prompt, 12, digest)
        assert (cold.events[0].cached_tokens, warm.events[0].cached_tokens) == (0, 28)
        other = None if digest else info.digest
        assert world.run(engine, [world.request("other", prompt, other)])["other"].events[0].cached_tokens == 0
        stranger = Request(request_id="s", tokens=prompt, adapter=digest, tenant="another")
        assert world.run(engine, [stranger])["s"].events[0].cached_tokens == 0


def test_a_whole_cached_prompt_still_computes_one_token(world: Any) -> None:
    engine = world.engine()
    prompt = world.prompt(5, 16)
    cold = world.run(engine, [world.request("cold", prompt)])["cold"]
    warm = world.run(engine, [world.request("warm", prompt)])["warm"]
    assert warm.tokens == cold.tokens
    assert warm.events[0].cached_tokens == 12


def test_logprobs_are_those_of_the_dense_model(world: Any) -> None:
    info = world.adapter(2)
    prompt = world.prompt(6, 19)
    engine = world.engine([info], step_tokens=8, max_seqs=4)
    world.run(engine, [world.request("warm", prompt, info.digest)])
    asked = world.request("a", prompt, info.digest, logprobs=3, prompt_logprobs=2, temperature=0.7, seed=4)
    answer = world.run(engine, [asked])["a"]
    whole = prompt + answer.tokens
    expected = world.dense_logits(whole, info.digest).log_softmax(-1)
    after = [float(expected[i, token]) for i, token in enumerate(whole[1:])]
    assert answer.prompt_logprobs[0] is None
    assert answer.prompt_logprobs[1:] + answer.logprobs == pytest.approx(after, abs=1e-4)
    tops = [entry.top for event in answer.events for entry in event.logprobs or []]
    for i, top in enumerate(tops):
        values, ids = expected[len(prompt) - 1 + i].topk(3)
        assert [token for token, _ in top] == ids.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-4)


def test_score_and_zero_tokens_give_prompt_logprobs_alone(world: Any) -> None:
    prompt = world.prompt(7, 128)  # as long as the context
    expected = world.dense_logits(prompt).log_softmax(-1)
    after = [float(expected[i, token]) for i, token in enumerate(prompt[1:])]
    engine = world.engine()
    requests = [
        Request(request_id="score", tokens=prompt, task="score"),
        world.request("zero", prompt, max_tokens=0, prompt_logprobs=0),
        world.request("nothing", prompt, max_tokens=0),
    ]
    answers = world.run(engine, requests)
    for name in ("score", "zero"):
        assert answers[name].prompt_logprobs[1:] == pytest.approx(after, abs=1e-4)
    assert all(a.finish == "length" and a.tokens == [] for a in answers.values())
    assert answers["nothing"].prompt_logprobs == []


# --- how a request ends -----------------------------------------------------------------------------------------------


def test_the_context_ends_a_request(world: Any) -> None:
    prompt = world.prompt(8, 127)
    answer = world.run(world.engine(), [world.request("a", prompt, max_tokens=50, ignore_eos=True)])["a"]
    assert (len(answer.tokens), answer.finish) == (1, "length")


def test_stop_tokens_end_a_request_unless_told_not_to(world: Any) -> None:
    prompt = world.prompt(1, 21)
    tokens = world.greedy(prompt, 12)
    requests = [
        world.request("stop", prompt, stop_token_ids=(tokens[4],)),
        world.request("on", prompt, stop_token_ids=(tokens[4],), ignore_eos=True),
    ]
    answers = world.run(world.engine(), requests)
    assert (answers["stop"].tokens, answers["stop"].finish) == (tokens[: tokens.index(tokens[4]) + 1], "stop")
    assert (answers["on"].tokens, answers["on"].finish) == (tokens, "length")


def test_choices_are_obeyed(world: Any) -> None:
    choices = ((5, 6, 7), (5, 6, 9), (5, 8), (11,), (11, 12, 13, 14))
    engine = world.engine(max_seqs=8)
    requests = [
        world.request(f"{i}", world.prompt(i, 9), choices=choices, temperature=float(i % 2), seed=i, logprobs=lp)
        for i, lp in zip(range(24), [None, 1] * 12, strict=True)
    ]
    answers = world.run(engine, requests)
    seen = set()
    for answer in answers.values():
        assert answer.finish == "stop"
        said = tuple(token for token in answer.tokens if token != EOS)
        assert said in choices
        seen.add(said)
    assert len(seen) > 2


@pytest.mark.parametrize("seed", range(5))
def test_choices_follow_the_dense_model(world: Any, seed: int) -> None:
    """Long common beginnings: what is forced there must reach the model before the next decision."""
    starts = [world.prompt(100 + seed, 4), [60, *world.prompt(200 + seed, 3)]]
    choices = [(*start, last, last + 1) for start in starts for last in range(10, 58, 3)]
    prompt = world.prompt(seed, 9)
    answers = world.run(world.engine(), [world.request("a", prompt, choices=tuple(choices))])
    tokens: list[int] = []
    while tuple(tokens) not in choices:
        allowed = sorted({c[len(tokens)] for c in choices if list(c[: len(tokens)]) == tokens})
        logits = world.dense_logits(prompt + tokens)[-1]
        tokens.append(max(allowed, key=lambda token: float(logits[token])))
    assert answers["a"].tokens == tokens


def test_a_poisoned_adapter_fails_alone(world: Any) -> None:
    good, bad = world.adapter(1), world.adapter(4)
    world.adapters[bad.digest].data[:] = float("nan")
    engine = world.engine([good, bad])
    for layer in engine._runner.cache:
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    prompt = world.prompt(3, 9)
    requests = [
        world.request(f"{i}", prompt, digest, prompt_logprobs=lp)
        for i, (digest, lp) in enumerate([(None, None), (bad.digest, None), (good.digest, 0), (bad.digest, 0)])
    ]
    answers = world.run(engine, requests)
    assert answers["0"].tokens == world.greedy(prompt, 12)
    assert answers["2"].tokens == world.greedy(prompt, 12, good.digest)
    for name in ("1", "3"):
        assert answers[name].finish == "error"
        assert answers[name].events[-1].error.code == "not_finite"
    after = world.run(engine, [world.request("after", prompt)])["after"]
    assert after.tokens == answers["0"].tokens


def test_an_unreadable_adapter_fails_its_own_requests(world: Any) -> None:
    good, bad = world.adapter(1), world.adapter(5)
    engine = world.engine([good, bad])
    broken = world.adapters.pop(bad.digest)
    world.adapters[bad.path] = world.adapters[good.digest]  # another adapter's file in its place
    answers = world.run(engine, [world.request("g", [5, 6], good.digest), world.request("b", [5, 6], bad.digest)])
    assert answers["g"].tokens == world.greedy([5, 6], 12, good.digest)
    assert answers["b"].finish == "error" and answers["b"].events[-1].error.code == "adapter_lost"
    with pytest.raises(AdapterLostError):
        engine.add(world.request("again", [5, 6], bad.digest))
    world.adapters[bad.digest] = broken
    engine.register(bad)
    assert world.run(engine, [world.request("again", [5, 6], bad.digest)])["again"].finish in ("stop", "length")


def test_cancel_frees_blocks_at_once(world: Any) -> None:
    engine = world.engine(prefix_cache=False)
    for i in range(10):  # 8 run, 2 wait
        engine.add(world.request(f"{i}", world.prompt(i, 13), max_tokens=100, ignore_eos=True))
    engine.step()
    engine.step()
    held = engine.stats().blocks_total - engine.stats().blocks_free
    engine.cancel("3")
    engine.cancel("9")
    engine.cancel("not there")
    events = engine.step()
    ended = [event.request_id for event in events if event.finish is not None]
    assert sorted(ended) == ["3", "9"]
    assert {e.finish for e in events if e.request_id in ended} == {"cancelled"}
    for i in range(10):
        engine.cancel(f"{i}")
    assert engine.stats().blocks_free == engine.stats().blocks_total > held > 0
    assert {event.finish for event in engine.step()} == {"cancelled"}
    assert not engine.has_work()


def test_deadlines(world: Any) -> None:
    now = [100.0]
    engine = world.engine(clock=lambda: now[0], max_seqs=1)
    sampling = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    for name, deadline in (("runs", 110.0), ("waits", 105.0), ("later", 1000.0)):
        engine.add(Request(request_id=name, tokens=[3, 4], sampling=sampling, deadline=deadline))
    engine.step()
    now[0] = 120.0
    answers = world.run(engine, [])
    assert [answers[name].finish for name in ("runs", "waits", "later")] == ["error", "error", "length"]
    error = answers["runs"].events[-1].error
    assert (error.status, error.code) == (504, "deadline_exceeded")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"seed": 2**64}, "seed"),
        ({"logprobs": 1000}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"stop_token_ids": (61,)}, "stop_token_ids"),
        ({"choices": ()}, "choices"),
        ({"choices": ((1,), ())}, "choices"),
        ({"choices": ((1, 99),)}, "choices"),
        ({"choices": ((1, 2, 3),), "max_tokens": 2}, "max_tokens"),
        ({"choices": (tuple([1] * 127),), "max_tokens": 200}, "choices"),
    ],
)
def test_bad_sampling_is_refused_by_name(world: Any, sampling: dict[str, Any], param: str) -> None:
    engine = world.engine()
    with pytest.raises(InvalidRequestError) as caught:
        engine.add(world.request("a", [1, 2], **sampling))
    assert caught.value.param == param
    assert not engine.has_work()


def test_bad_requests_are_refused(world: Any) -> None:
    engine = world.engine(queue=2)
    with pytest.raises(InvalidRequestError, match=r"128 tokens.* 127 .*128"):
        engine.add(world.request("a", [1] * 128))
    with pytest.raises(InvalidRequestError, match="no token"):
        engine.add(world.request("a", []))
    with pytest.raises(InvalidRequestError, match="61"):
        engine.add(world.request("a", [1, 61]))
    with pytest.raises(AdapterLostError, match="feed"):
        engine.add(world.request("a", [1], "feed"))
    with pytest.raises(UnsupportedFieldError, match="embed"):
        engine.add(Request(request_id="a", tokens=[1], task="embed"))
    engine.add(world.request("a", [1]))
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add(world.request("a", [1]))
    engine.add(world.request("b", [1]))
    with pytest.raises(OverloadedError) as caught:
        engine.add(world.request("c", [1]))
    assert caught.value.retry_after >= 1
    assert set(world.run(engine, [])) == {"a", "b"}


# --- whatever happens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_every_request_ends_exactly_once(world: Any, seed: int) -> None:
    """Random arrivals, cancellations, deadlines and broken adapters under tiny budgets."""
    chance = random.Random(seed)
    infos = [world.adapter(i, 1 + i % 5) for i in range(6)]
    now = [0.0]
    engine = world.engine(
        infos,
        blocks=chance.choice([20, 40]),
        slab_bytes=chance.choice([max(i.nbytes for i in infos), sum(i.nbytes for i in infos) // 2]),
        max_seqs=chance.choice([2, 5]),
        step_tokens=chance.choice([6, 40]),
        logit_rows=7,
        queue=30,
        max_context=64,
        clock=lambda: now[0],
        prefix_cache=chance.random() < 0.7,
    )
    accepted: set[str] = set()
    answers: dict[str, Any] = {}
    for _ in range(150):
        now[0] += 1
        for _ in range(chance.randrange(3)):
            name = f"{seed}-{len(accepted)}"
            request = Request(
                request_id=name,
                tokens=world.prompt(chance.randrange(5), chance.randint(1, 50)),
                adapter=chance.choice([None, *(info.digest for info in infos)]),
                task=chance.choice(["generate", "generate", "score"]),
                deadline=now[0] + chance.randint(0, 60) if chance.random() < 0.2 else None,
                sampling=SamplingParams(
                    max_tokens=chance.randint(0, 20),
                    prompt_logprobs=chance.choice([None, None, 1]),
                    logprobs=chance.choice([None, 0]),
                    temperature=chance.choice([0.0, 1.0]),
                ),
            )
            try:
                engine.add(request)
            except OverloadedError:
                continue
            accepted.add(name)
        if accepted and chance.random() < 0.2:
            engine.cancel(chance.choice(sorted(accepted)))
        if engine.has_work():
            world.collect(answers, engine.step())
    for _ in range(2000):
        if not engine.has_work():
            break
        now[0] += 1
        world.collect(answers, engine.step())
    assert set(answers) == accepted and len(accepted) > 40
    assert all(answer.finish is not None for answer in answers.values())
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_free) == (0, 0, stats.blocks_total)
    assert stats.finished == len(accepted)
    assert all(adapter.running == 0 for adapter in stats.adapters)


def test_the_base_and_adapters_are_computed_in_one_forward_pass(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorikeet.engine import runner

    sizes = []
    forward = runner.forward

    def counting(spec: Any, weights: Any, batch: Any, *rest: Any) -> torch.Tensor:
        sizes.append(len(batch.query_start) - 1)
        return forward(spec, weights, batch, *rest)

    monkeypatch.setattr(runner, "forward", counting)
    infos, requests = mixed_requests(world)
    engine = world.engine(infos, max_seqs=12, blocks=256, step_tokens=1024, chunk_tokens=1024)
    world.run(engine, requests)
    assert max(sizes) == 12
    assert len(sizes) <= 20


def test_loading_by_hand_leaves_what_is_waited_for(world: Any) -> None:
    """The slab has room for one: a request waits for `wanted`, so `other` is not brought in its place."""
    wanted, other = world.adapter(1), world.adapter(2)
    engine = world.engine([wanted, other], slab_bytes=max(wanted.nbytes, other.nbytes) + 64, max_seqs=1)
    engine.manage("load", wanted.digest)
    engine.step()
    engine.add(world.request("runs", world.prompt(1, 8), max_tokens=8))
    engine.step()
    engine.add(world.request("waits", world.prompt(2, 8), wanted.digest))
    with pytest.raises(AdapterInUseError, match="leave no room"):
        engine.manage("load", other.digest)
    with pytest.raises(AdapterLostError):
        engine.manage("pin", "unknown")
