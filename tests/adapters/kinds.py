"""Adapters of every kind that is served: random values for everything that is trained, in files that peft wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.fixtures import make_adapter, next_logprobs, oracle, sample_tokens

from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import WEIGHTS

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INVOCATION = (7, 8, 9)
LORA = {"r": 4, "lora_alpha": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def config_of(kind: str) -> Any:
    from peft import IA3Config, LoraConfig, VeraConfig

    def lora(**options: Any) -> Any:
        return LoraConfig(**{**LORA, "target_modules": ALL, **options})

    return {
        "dora": lambda: lora(use_dora=True),
        "dora, rslora": lambda: lora(use_dora=True, use_rslora=True, target_modules=["q_proj", "down_proj"]),
        "lora_bias": lambda: lora(lora_bias=True),
        "bias all": lambda: lora(bias="all", target_modules=["q_proj", "down_proj"]),
        "bias lora_only": lambda: lora(bias="lora_only", target_modules=["q_proj", "k_proj"]),
        "dora, bias all": lambda: lora(use_dora=True, bias="all", target_modules=["v_proj", "up_proj"]),
        "ia3": lambda: IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"],
                                 feedforward_modules=["down_proj"]),
        "ia3, up and down": lambda: IA3Config(task_type="CAUSAL_LM", target_modules=["o_proj", "up_proj", "down_proj"],
                                              feedforward_modules=["down_proj"]),
        "ia3, head saved": lambda: IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"],
                                             feedforward_modules=["down_proj"], modules_to_save=["lm_head"]),
        "ia3, all saved": lambda: IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"],
                                            feedforward_modules=[],
                                            modules_to_save=["lm_head", "embed_tokens"]),
        "vera, embedding saved": lambda: VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj"],
                                                    modules_to_save=["embed_tokens", "input_layernorm"]),
        "vera": lambda: VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "down_proj", "k_proj"]),
        "modules_to_save": lambda: lora(target_modules=["q_proj"],
                                        modules_to_save=["lm_head", "embed_tokens", "input_layernorm", "model.norm"]),
        "head saved": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "embedding saved": lambda: lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        "embedding": lambda: lora(target_modules=["v_proj", "embed_tokens"]),
        "head": lambda: lora(target_modules=["v_proj", "lm_head"]),
        "dora on the head": lambda: lora(target_modules=["v_proj", "lm_head"], use_dora=True),
        "both tied": lambda: lora(target_modules=["v_proj", "embed_tokens"], ensure_weight_tying=True),
        "saved and tied": lambda: lora(target_modules=["v_proj"], modules_to_save=["embed_tokens"],
                                       ensure_weight_tying=True),
        "token rows": lambda: lora(target_modules=["q_proj"], trainable_token_indices=[7, 9, 200]),
        "rows of both": lambda: lora(target_modules=["q_proj"],
                                     trainable_token_indices={"embed_tokens": [7, 300], "lm_head": [8, 9, 11]}),
        "alora": lambda: lora(alora_invocation_tokens=list(INVOCATION)),
        "rslora": lambda: lora(use_rslora=True, r=3, lora_alpha=3),
        "rank_pattern": lambda: lora(r=8, rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5}),
        "alpha_pattern": lambda: lora(alpha_pattern={"v_proj": 12, "layers.2.mlp.down_proj": 2}),
        "layers_to_transform": lambda: lora(layers_to_transform=[0, 2]),
        "lora": lora,
    }[kind]()  # fmt: skip


def make(kind: str, base: Path, folder: Path, seed: int) -> Path:
    """Random values for everything that is trained; the logprobs move by 0.1 or more."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = sample_tokens(2, 32, seed)
    tokens[:, 4:7] = torch.tensor(INVOCATION)
    torch.manual_seed(seed)
    with torch.no_grad():
        before = next_logprobs(model(tokens).logits, tokens)
        adapted = get_peft_model(model, config_of(kind))
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            if "magnitude" in name or "ia3" in name:
                parameter.mul_(1 + 0.4 * torch.randn_like(parameter))
            else:
                table = "embed" in name or "lm_head" in name
                if table and "lora" in name:  # peft draws them as large as one
                    parameter.mul_(0.2)
                parameter.add_((0.05 if table else 0.2) * torch.randn_like(parameter))
        moved = (next_logprobs(adapted(tokens).logits, tokens) - before).abs().mean()
        assert moved >= 0.1, f"the adapter moves the mean logprob by {moved:.3f} only"
    adapted.save_pretrained(str(folder))
    return folder


def write_loreft(
    folder: Path, hidden: int, layers: list[int], seed: int, first: int = 2, last: int = 3
) -> dict[str, torch.Tensor]:
    """Random interventions with orthonormal rotations, in the layout that is documented in docs/adapters.md."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        rotate, _ = torch.linalg.qr(torch.randn(hidden, 4, generator=generator))
        tensors[f"reft.layers.{layer}.rotate"] = rotate.contiguous()
        tensors[f"reft.layers.{layer}.weight"] = torch.randn(4, hidden, generator=generator) * hidden**-0.5
        tensors[f"reft.layers.{layer}.bias"] = torch.randn(4, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LOREFT", "r": 4, "layers": layers, "first_positions": first, "last_positions": last}
    (folder / CONFIG).write_text(json.dumps(config))
    return tensors


def make_converted(kind: str, base: Path, folder: Path, seed: int) -> Any:
    """PiSSA, OLoRA or LoftQ, trained, and saved as plain LoRA by PEFT's conversion: the trained model itself, whose
    base is not the one that was loaded."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    more = {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}} if kind == "loftq" else {}
    adapted = get_peft_model(model, LoraConfig(**{**LORA, "target_modules": ALL, "init_lora_weights": kind, **more}))
    start = folder.parent / f"{folder.name}-start"
    config = adapted.peft_config["default"]
    config.init_lora_weights = True
    adapted.save_pretrained(str(start))
    config.init_lora_weights = kind
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.15 * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(start))
    return adapted.eval()


def quantised(weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int) -> tuple[torch.Tensor, ...]:
    """peft's `loftq_init` where there is no GPU: a rounded weight, and the pair that comes closest to the rest."""
    step = weight.abs().amax(1, keepdim=True) / (2 ** (num_bits - 1) - 1)
    rounded = (weight / step).round() * step
    u, s, v = torch.linalg.svd(weight - rounded, full_matrices=False)
    root = s[:reduced_rank].sqrt()
    return rounded, root[:, None] * v[:reduced_rank], u[:, :reduced_rank] * root


def hooked(base: Path, tensors: dict[str, torch.Tensor], places: Callable[[int], Sequence[int]]) -> Any:
    """The transformers model of `base` with LoReFT's interventions at `places(tokens)` of the residual stream."""
    model = oracle(base)

    def hook(rotate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        def change(module: Any, inputs: Any, output: Any) -> Any:
            stream = output if isinstance(output, torch.Tensor) else output[0]
            chosen = list(places(stream.shape[1]))
            at = stream[:, chosen]
            stream[:, chosen] = at + (at @ weight.T + bias - at @ rotate) @ rotate.T
            return output

        return change

    for layer in sorted({int(name.split(".")[2]) for name in tensors}):
        parts = [tensors[f"reft.layers.{layer}.{part}"] for part in ("rotate", "weight", "bias")]
        model.model.layers[layer].register_forward_hook(hook(*parts))
    return model


def make_fused(base: Path, folder: Path, seed: int = 0) -> Path:
    """A trainer's `qkv_proj` and `gate_up_proj`: one A, and a B whose rows are those of the parts. The same adapter in
    PEFT's names is what is returned."""
    plain = make_adapter(base, folder.parent / f"{folder.name}-parts", seed=seed)
    tensors = load_file(plain / WEIGHTS)
    fused: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if name.endswith("q_proj.lora_A.weight")]:
        layer = name.partition(".self_attn.")[0]
        for place, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            module = f"{layer}.{place.split('.')[0]}"
            a = tensors[f"{module}.{parts[0]}_proj.lora_A.weight"]
            for part in parts:  # the parts of a fused layer share their A
                tensors[f"{module}.{part}_proj.lora_A.weight"] = a
            fused[f"{layer}.{place}.lora_A.weight"] = a
            fused[f"{layer}.{place}.lora_B.weight"] = torch.cat(
                [tensors[f"{module}.{part}_proj.lora_B.weight"] for part in parts]
            )
    fused |= {name: value for name, value in tensors.items() if "o_proj" in name or "down_proj" in name}
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, plain / WEIGHTS)
    folder.mkdir()
    save_file({key: value.clone().contiguous() for key, value in fused.items()}, folder / WEIGHTS)
    config = json.loads((plain / CONFIG).read_text())
    config["target_modules"] = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    (folder / CONFIG).write_text(json.dumps(config))
    return plain
