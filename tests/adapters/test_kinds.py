"""Every kind of adapter against transformers + peft: checkpoints that peft wrote, alone and mixed in one batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fixtures import make_adapter, make_batch, make_slab, next_logprobs, oracle, sample_tokens

from lorikeet.adapters.compiled import compile_adapter
from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import WEIGHTS
from lorikeet.engine.engine import _where
from lorikeet.errors import AdapterError
from lorikeet.kernels.batch import Segments
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.model.decoder import forward
from lorikeet.model.sources import checkpoint_files, identify
from lorikeet.model.weights import load

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


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
        "lora": lora,
    }[kind]()  # fmt: skip


KINDS = [
    "dora", "dora, rslora", "lora_bias", "bias all", "bias lora_only", "dora, bias all", "ia3",
    "ia3, up and down", "vera", "lora",
]  # fmt: skip


def make(kind: str, base: Path, folder: Path, seed: int) -> Path:
    """Random values for everything that is trained; the logprobs move by 0.1 or more."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = sample_tokens(2, 32, seed)
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


UNTIED = [
    "modules_to_save",
    "head saved",
    "embedding",
    "head",
    "dora on the head",
    "token rows",
    "rows of both",
    "lora",
]
TIED = ["embedding saved", "head saved", "embedding", "head", "both tied", "saved and tied", "token rows", "lora"]


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # of merging, which is not done here
@pytest.mark.filterwarnings("ignore:Adapter .default.. .* have invalid shape")  # peft of its own biases of B
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_kinds_in_a_mixed_batch_are_pefts(
    family: str, checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    kinds = KINDS if family == "qwen2" else ["dora", "lora_bias", "ia3", "vera", "lora"]
    check(kinds, checkpoint(family), tmp_path, cache)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's: of what it saves, and of tied weights
@pytest.mark.parametrize(("family", "kinds"), [("llama", UNTIED), ("qwen2", UNTIED), ("llama-tied", TIED)])
def test_embedding_head_and_norms_in_a_mixed_batch_are_pefts(
    family: str, kinds: list[str], checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    check(kinds, checkpoint(family), tmp_path, cache)


def check(kinds: list[str], base: Path, tmp_path: Path, cache: Path) -> None:
    folders = [make(kind, base, tmp_path / str(i), i) for i, kind in enumerate(kinds)]
    chosen: list[int | None] = [*range(len(folders)), None, 0]
    rows = [sample_tokens(1, 20 + i, 100 + i)[0] for i in range(len(chosen))]
    spec, weights = load(base, torch.float32)
    files = checkpoint_files(base)
    infos = [compile_adapter(folder, spec, identify(base), "float32", cache, checkpoint=files) for folder in folders]
    slab = make_slab([Path(info.path) for info in infos], spec)
    with torch.no_grad():
        mixed = forward(spec, weights, make_batch(rows, chosen), ReferenceOps(), slab).log_softmax(-1)
        for row, handle, ours in zip(rows, chosen, mixed.split([len(row) for row in rows]), strict=True):
            theirs = oracle(base, None if handle is None else folders[handle])(row.unsqueeze(0)).logits[0]
            name = "base" if handle is None else kinds[handle]
            torch.testing.assert_close(
                ours, theirs.log_softmax(-1), atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_fused_names_are_their_parts(checkpoint: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    """A trainer's `qkv_proj` and `gate_up_proj`: one A, and a B whose rows are those of the parts."""
    base = checkpoint("llama")
    spec, _ = load(base, torch.float32)
    plain = make_adapter(base, tmp_path / "plain")
    tensors = load_file(plain / WEIGHTS)
    fused: dict[str, torch.Tensor] = {}
    for layer in range(spec.num_layers):
        for name, parts in (("self_attn.qkv_proj", ("q", "k", "v")), ("mlp.gate_up_proj", ("gate", "up"))):
            module = f"base_model.model.model.layers.{layer}.{name.split('.')[0]}"
            a = tensors[f"{module}.{parts[0]}_proj.lora_A.weight"]
            for part in parts:  # the parts of a fused layer share their A
                tensors[f"{module}.{part}_proj.lora_A.weight"] = a
            place = f"base_model.model.model.layers.{layer}.{name}"
            fused[f"{place}.lora_A.weight"] = a
            fused[f"{place}.lora_B.weight"] = torch.cat([tensors[f"{module}.{p}_proj.lora_B.weight"] for p in parts])
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            for side in "AB":
                key = f"base_model.model.model.layers.{layer}.{name}.lora_{side}.weight"
                fused[key] = tensors[key]
    save_file({key: value.clone() for key, value in tensors.items()}, plain / WEIGHTS)
    logits = []
    for form, held in (("plain", tensors), ("fused", fused)):
        folder = tmp_path / form
        folder.mkdir(exist_ok=True)
        save_file({key: value.clone().contiguous() for key, value in held.items()}, folder / WEIGHTS)
        if form == "fused":
            text = (plain / CONFIG).read_text()
            for name in ("k_proj", "v_proj", "gate_proj"):
                text = text.replace(f'    "{name}",\n', "").replace(f',\n    "{name}"\n', "\n")
            text = text.replace('"q_proj"', '"qkv_proj"').replace('"up_proj"', '"gate_up_proj"')
            (folder / CONFIG).write_text(text)
        info = compile_adapter(folder, spec, identify(base), "float32", cache)
        slab = make_slab([Path(info.path)], spec)
        row = sample_tokens(1, 30, 7)[0]
        with torch.no_grad():
            logits.append(forward(spec, load(base, torch.float32)[1], make_batch([row], [0]), ReferenceOps(), slab))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type: expected 'LORA' or 'IA3' or 'VERA' or 'LOREFT', found 'LOHA'"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type: .* found 'PREFIX_TUNING'"),
        ({"bias": "some"}, "bias: expected 'none', 'all' or 'lora_only', found 'some'"),
        ({"alora_invocation_tokens": ["a"]}, "alora_invocation_tokens: expected a list of token ids"),
        ({"modules_to_save": [3]}, "modules_to_save: expected a list of module names"),
        ({"trainable_token_indices": [3, 3]}, "trainable_token_indices: expected each token id once"),
    ],
)
def test_what_has_no_normal_form_is_refused_by_name(
    change: dict[str, Any], message: str, adapters: Callable[..., list[Path]], tmp_path: Path
) -> None:
    import shutil

    from lorikeet.adapters.configs import read_config

    folder = Path(shutil.copytree(adapters("llama", 1)[0], tmp_path / "adapter"))
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        read_config(folder)


def test_an_input_vector_elsewhere_than_on_down_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    from peft import IA3Config, get_peft_model

    base = checkpoint("llama")
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=["q_proj"])
    get_peft_model(oracle(base), config).save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(AdapterError, match="feedforward_modules names model.layers.0.self_attn.q_proj"):
        compile_adapter(tmp_path / "ia3", load(base, torch.float32)[0], identify(base), "float32", cache)


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("qwen2", {"use_rslora": True, "r": 3})])
def test_activated_lora_is_pefts(
    family: str, options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    """peft's own forward pass with its own offsets: rows of one batch with invocations at different places."""
    from peft import LoraConfig, get_peft_model

    base, invocation = checkpoint(family), [7, 8, 9]
    settings = {**LORA, "target_modules": ALL, "alora_invocation_tokens": invocation, **options}
    adapted = get_peft_model(oracle(base), LoraConfig(**settings))
    adapted.save_pretrained(str(tmp_path / "alora"))
    spec, weights = load(base, torch.float32)
    info = compile_adapter(tmp_path / "alora", spec, identify(base), "float32", cache)
    assert (info.kind, info.invocation) == ("alora", tuple(invocation))
    rows = sample_tokens(6, 24, 5)
    rows[rows == invocation[0]] = 10  # no invocation by chance
    places = [(0,), (5,), (3, 17), (21,), (20, 2), (11, 12)]  # the last one of each row counts; 21 is the very end
    for row, starts in zip(rows, places, strict=True):
        for start in starts:
            row[start : start + 3] = torch.tensor(invocation)
    rows[5, 11:15] = torch.tensor([7, 7, 8, 9])  # one that breaks off where the next begins
    acting = [_where(row.tolist(), info)[0] for row in rows]
    assert [begin for begin, _ in acting] == [0, 5, 17, 21, 20, 12]
    batch = make_batch(list(rows), [0] * 6)
    active = torch.cat([24 * i + torch.arange(begin, 24) for i, (begin, _) in enumerate(acting)])
    batch.token_segments = Segments(active, [0, len(active)], [0], False)
    with torch.no_grad():
        ours = forward(spec, weights, batch, ReferenceOps(), make_slab([Path(info.path)], spec)).log_softmax(-1)
        theirs = oracle(base, tmp_path / "alora")(input_ids=rows).logits.log_softmax(-1)
        plain = oracle(base)(rows).logits.log_softmax(-1)
    assert (theirs - plain).abs().amax(-1).bool().sum() == len(active)  # and the base's before them
    assert (theirs - plain)[0].abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs.flatten(0, 1), atol=1e-4, rtol=0)


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


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_loreft_is_a_hook_on_the_stream(
    layers: list[int], checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    base = checkpoint("llama")
    spec, weights = load(base, torch.float32)
    tensors = write_loreft(tmp_path / "reft", spec.hidden_size, layers, 3)
    info = compile_adapter(tmp_path / "reft", spec, identify(base), "float32", cache)
    assert (info.kind, info.positions, info.max_rank) == ("loreft", (2, 3, 0), 4)
    row = sample_tokens(1, 20, 8)[0]
    model = oracle(base)
    places = [0, 1, 17, 18, 19]

    def hook(rotate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        def change(module: Any, inputs: Any, output: Any) -> Any:
            stream = output if isinstance(output, torch.Tensor) else output[0]
            at = stream[:, places]
            stream[:, places] = at + (at @ weight.T + bias - at @ rotate) @ rotate.T
            return output

        return change

    for layer in layers:
        parts = [tensors[f"reft.layers.{layer}.{part}"] for part in ("rotate", "weight", "bias")]
        model.model.layers[layer].register_forward_hook(hook(*parts))
    with torch.no_grad():
        plain = oracle(base)(row.unsqueeze(0)).logits[0].log_softmax(-1)
        theirs = model(row.unsqueeze(0)).logits[0].log_softmax(-1)
        batch = make_batch([row], [0])
        batch.token_segments = Segments(torch.tensor(places), [0, len(places)], [0], False)
        ours = forward(spec, weights, batch, ReferenceOps(), make_slab([Path(info.path)], spec)).log_softmax(-1)
    assert (theirs - plain).abs().mean() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [7]}, "layers: expected numbers below 3, found 7"),
        ({"layers": [1]}, r"reft\.layers\.0\.\w+: adapter_config\.json says nothing of it"),
        ({"first_positions": 0, "last_positions": 0}, "first_positions: expected a position to act on"),
        ({"r": 5}, r"reft\.layers\.0\.rotate: expected \[64, 5\], found \[64, 4\]"),
        ({"component": "mlp_activation"}, "component: expected no such field, found 'mlp_activation'"),
    ],
)
def test_interventions_that_do_not_fit_are_named(
    change: dict[str, Any], message: str, checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    base = checkpoint("llama")
    write_loreft(tmp_path / "reft", 64, [0, 2], 3)
    path = tmp_path / "reft" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        compile_adapter(tmp_path / "reft", load(base, torch.float32)[0], identify(base), "float32", cache)
