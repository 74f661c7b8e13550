"""Adapters merged in a request, over the real engine; the oracle is peft's merge of the same adapters."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fixtures import AdapterShape, make_adapter, next_logprobs, oracle
from tests.server.hosting import Hosted

from lorikeet.adapters.files import Lock, LockedBase, LockedTemplate, write_lock

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lorax

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")
PROMPT = "the quick brown fox jumps over the lazy dog"


def ask(live: Hosted, **merged: Any) -> Any:
    body = {"inputs": PROMPT, "parameters": {"merged_adapters": merged, "max_new_tokens": 4, "details": True,
                                             "decoder_input_details": True}}  # fmt: skip
    return live.post("/generate", body)


@pytest.fixture(scope="module")
def pair(live: Hosted, checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two served adapters of one rank, `merge-a` and `merge-b`."""
    made, root = tmp_path_factory.mktemp("pair"), live.state.models.catalogue.root
    assert root is not None
    folders = []
    for name, targets in (("merge-a", ("q_proj", "down_proj")), ("merge-b", ("q_proj", "v_proj"))):
        shape = AdapterShape(rank=3, targets=targets)
        folders.append(make_adapter(checkpoint("llama"), made / name, shape, seed=len(folders)))
        shutil.copytree(folders[-1], root / f".{name}")
        (root / f".{name}").rename(root / name)
    return folders


@pytest.mark.parametrize(
    ("strategy", "density", "sign"),
    [("linear", 0.0, None), ("ties", 0.5, "frequency"), ("ties", 0.5, None), ("dare_linear", 0.5, None),
     ("dare_ties", 0.7, "total")],
)  # fmt: skip
def test_merged_in_a_request_is_merged_by_peft(
    strategy: str, density: float, sign: str | None, live: Hosted, pair: list[Path], checkpoint: Callable[..., Path]
) -> None:
    merged = {"ids": ["merge-a", "merge-b"], "weights": [0.7, 0.6], "density": density}
    reply = ask(live, **merged, merge_strategy=strategy, majority_sign_method=sign)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-adapter-id"] == "merge-a+merge-b"
    prefill = reply.json()["details"]["prefill"]
    tokens = torch.tensor([[token["id"] for token in prefill]])
    found = torch.tensor([token["logprob"] for token in prefill[1:]])
    model = oracle(checkpoint("llama"), pair[0])
    model.load_adapter(str(pair[1]), adapter_name="b")
    inject = model.base_model.inject_adapter

    def seeded(*arguments: Any, **named: Any) -> None:
        inject(*arguments, **named)
        torch.manual_seed(0)

    model.base_model.inject_adapter = seeded
    model.base_model.add_weighted_adapter(
        ["default", "b"], [0.7, 0.6], "merged", strategy, density=density, majority_sign_method=sign or "total"
    )
    model.set_adapter("merged")
    with torch.no_grad():
        expected = next_logprobs(model(tokens).logits, tokens)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    again = ask(live, **merged, merge_strategy=strategy, majority_sign_method=sign)
    assert again.json()["details"]["prefill"] == prefill


def test_the_published_client_merges_what_has_different_ranks(live: Hosted) -> None:
    client = lorax.Client(live.url, timeout=60)
    both = lorax.MergedAdapters(ids=["adapter-00", "adapter-03"], weights=[1.0, 0.0], density=0.0)
    merged = client.generate(PROMPT, merged_adapters=both, max_new_tokens=6)
    alone = client.generate(PROMPT, adapter_id="adapter-00", max_new_tokens=6)
    assert merged.generated_text == alone.generated_text
    client.session.close()
    page = live.http.get("/metrics").text
    assert 'adapter="(merged)"' in page and "adapter-00+adapter-03" not in page


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"ids": ["merge-a", "nobody"]}, 404, "no model or adapter is called 'nobody'"),
        ({"ids": ["merge-a", "llama"]}, 400, "'llama' is the base, and only adapters can be merged"),
        ({"ids": []}, 422, "'parameters.merged_adapters.ids'"),
        ({"weights": [1.0]}, 422, "'parameters.merged_adapters.weights': expected one for each of 2 ids, found 1"),
        ({"merge_strategy": "average"}, 422, "'parameters.merged_adapters.merge_strategy'"),
        ({"merge_strategy": "ties", "density": 0.0}, 422, "merged_adapters.density': expected a number above 0 with"),
        ({"merge_strategy": "ties", "density": 1.5}, 422, "'parameters.merged_adapters.density'"),
        ({"majority_sign_method": "total"}, 422, "merged_adapters.majority_sign_method': expected null with linear"),
        ({"sum": True}, 422, "unknown field 'parameters.merged_adapters.sum'"),
    ],
)
def test_what_cannot_be_merged_is_named(
    change: dict[str, Any], status: int, message: str, live: Hosted, pair: list[Path]
) -> None:
    reply = ask(live, **{"ids": ["merge-a", "merge-b"], "weights": [1.0, 1.0], **change})
    assert reply.status_code == status and message in reply.json()["error"]


def test_one_adapter_or_a_merge(live: Hosted) -> None:
    parameters = {"adapter_id": "adapter-00", "merged_adapters": {"ids": ["adapter-01"], "weights": [1.0]}}
    reply = live.post("/generate", {"inputs": PROMPT, "parameters": parameters})
    assert reply.status_code == 422 and "'parameters.adapter_id': expected null with merged" in reply.json()["error"]


def test_a_shared_template_stays(live: Hosted, pair: list[Path]) -> None:
    root, base = live.state.models.catalogue.root, live.state.info.base
    assert root is not None
    for name, text in (("told-a", "Q: {text}"), ("told-b", "Q: {text}"), ("told-c", "A: {text}")):
        shutil.copytree(pair[0], root / f".{name}")
        write_lock(root / f".{name}", Lock(base=LockedBase(base.name, base.sha256), stop_ids=base.stop_ids,
                                           tokenizer_sha256=base.tokenizer_sha256,
                                           template=LockedTemplate.of("prompt", text)))  # fmt: skip
        (root / f".{name}").rename(root / name)

    def columns(*ids: str) -> Any:
        merged = {"ids": list(ids), "weights": [1.0] * len(ids)}
        return live.post("/generate", {"inputs": {"text": "x"}, "parameters": {"merged_adapters": merged}})

    assert columns("told-a", "told-b").status_code == 200
    refused = columns("told-a", "told-c")
    assert refused.status_code == 400 and "'told-a+told-c' has no prompt template" in refused.json()["error"]
    for name in ("told-a", "told-b", "told-c"):
        shutil.rmtree(root / name)
