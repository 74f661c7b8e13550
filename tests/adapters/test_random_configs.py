"""Random configs of peft: what it writes is loaded and gives the same logprobs, or is refused by name."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fixtures import make_batch, make_slab, sample_tokens

from lorikeet.adapters.compiled import compile_adapter
from lorikeet.errors import AdapterError
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.model.decoder import forward
from lorikeet.model.sources import checkpoint_files, identify
from lorikeet.model.weights import load

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TABLES = ("embed_tokens", "lm_head")
PATTERNS = st.sampled_from((*LINEAR, r"layers\.1\.mlp.*"))
WHOLE = st.sampled_from((*TABLES, "model.norm", "input_layernorm"))
NAMES = st.lists(st.sampled_from((*LINEAR, *LINEAR, *TABLES)), min_size=1, max_size=4, unique=True)
TARGETS = st.one_of(
    NAMES, st.just("all-linear"), st.sampled_from([r".*layers\.[02]\..*(q|up)_proj", r".*(v_proj|lm_head)"])
)


BESIDE = st.fixed_dictionaries(
    {},
    optional={
        "modules_to_save": st.lists(WHOLE, min_size=1, max_size=3, unique=True),
        "exclude_modules": st.lists(st.sampled_from(LINEAR), max_size=2, unique=True),
    },
)


@st.composite
def lora(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a LoraConfig, most of them as they are by default."""
    targets = draw(TARGETS)
    fields: dict[str, Any] = {
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.integers(1, 8)),
        "target_modules": targets,
    }
    options = {
        "use_rslora": st.just(True),
        "use_dora": st.just(True),
        "lora_bias": st.just(True),
        "bias": st.sampled_from(("all", "lora_only")),
        "rank_pattern": st.dictionaries(st.sampled_from(LINEAR), st.integers(1, 9), max_size=2),
        "alpha_pattern": st.dictionaries(PATTERNS, st.integers(1, 9), max_size=2),
        "exclude_modules": st.lists(st.sampled_from(LINEAR), max_size=2, unique=True),
        "modules_to_save": st.lists(WHOLE, max_size=2, unique=True),
        "trainable_token_indices": st.lists(st.integers(6, 319), min_size=1, max_size=4, unique=True),
        "layers_to_transform": st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True),
        "init_lora_weights": st.sampled_from(("pissa", "olora")),
    }  # fmt: skip
    for name in draw(st.lists(st.sampled_from(sorted(options)), max_size=3, unique=True)):
        fields[name] = draw(options[name])
    return fields


@st.composite
def ia3(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of an IA3Config; inputs are multiplied where PEFT does it by default, and now and then elsewhere."""
    targets = draw(st.one_of(st.lists(st.sampled_from((*LINEAR, "lm_head")), min_size=1, max_size=4, unique=True),
                             st.sampled_from([r".*layers\.[02]\..*(k|down)_proj"])))  # fmt: skip
    inputs = draw(st.sampled_from((["down_proj"], ["down_proj"], ["down_proj"], ["q_proj"])))
    kept = [name for name in inputs if name in targets] if isinstance(targets, list) else r".*down_proj"
    return {"target_modules": targets, "feedforward_modules": kept, **draw(BESIDE)}


@st.composite
def vera(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a VeraConfig, without its projections now and then."""
    fields = {"r": draw(st.integers(1, 9)), "target_modules": draw(st.lists(st.sampled_from(LINEAR), min_size=1,
                                                                           max_size=4, unique=True))}  # fmt: skip
    if draw(st.integers(0, 5)) == 0:
        fields["save_projection"] = False
    return {**fields, **draw(BESIDE)}


KINDS = {"lora": (lora(), 60, 20), "ia3": (ia3(), 25, 8), "vera": (vera(), 25, 8)}


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_writes_is_the_same_here_or_refused(
    kind: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model

    strategy, examples, least = KINDS[kind]
    config = {"lora": partial(LoraConfig, init_lora_weights=False), "ia3": IA3Config, "vera": VeraConfig}[kind]
    from transformers import AutoModelForCausalLM

    base = checkpoint("qwen2")
    spec, weights = load(base, torch.float64)
    row = sample_tokens(1, 24, 5)[0]
    outcomes = {"same": 0, "refused": 0}

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy, st.integers(0, 99))
    def check(fields: dict[str, Any], seed: int) -> None:
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                adapted = get_peft_model(model, config(**fields)).eval()
                adapted(row.unsqueeze(0))
            except (ValueError, KeyError, TypeError, NotImplementedError):  # peft does not take it either
                return
            for name, parameter in adapted.named_parameters():
                if "lora_embedding" in name or ("lm_head" in name and "lora" in name):
                    parameter.mul_(0.1)
                elif "lora_B" in name:  # as drawn, some magnify the fp32 of transformers' norms by a thousand
                    parameter.mul_(0.2)
                elif parameter.requires_grad:
                    parameter.add_(0.03 * torch.randn_like(parameter))
            adapted.double()
            expected = adapted(row.unsqueeze(0)).logits[0].log_softmax(-1)
            adapted.float().save_pretrained(str(folder))
        try:
            info = compile_adapter(
                folder, spec, identify(base), "float32", tmp_path / "cache", checkpoint=checkpoint_files(base)
            )
        except AdapterError as error:
            assert error.status == 422 and any(name in error.message for name in fields), error.message
            outcomes["refused"] += 1
            return
        with torch.no_grad():
            logits = forward(spec, weights, make_batch([row], [0]), ReferenceOps(), make_slab([Path(info.path)], spec))
        torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-4, rtol=0)
        outcomes["same"] += 1

    check()
    assert outcomes["same"] >= least, outcomes
