"""The normal form against transformers + peft: four families, mixed batches of adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.fixtures import make_batch, make_slab, oracle, sample_tokens

from lorikeet.adapters.checkpoint import BaseTensors
from lorikeet.adapters.compiled import compile_adapter
from lorikeet.adapters.configs import LoraConfig
from lorikeet.adapters.files import AdapterFile
from lorikeet.adapters.normal import check_adapter, compile_entries
from lorikeet.errors import AdapterError
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.model.decoder import forward
from lorikeet.model.families import load_spec
from lorikeet.model.names import module_of
from lorikeet.model.sources import identify
from lorikeet.model.weights import load

COUNTS = {"llama": 16, "llama-tied": 8, "mistral": 8, "qwen2": 8, "qwen3": 8}


def mixed_logprobs(
    base: Path, folders: list[Path], rows: list[torch.Tensor], chosen: list[int | None], dtype: torch.dtype, cache: Path
) -> list[torch.Tensor]:
    """Logprobs [T, V] of each row, all rows in one packed batch."""
    spec, weights = load(base, dtype)
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    infos = [compile_adapter(folder, spec, identify(base), name, cache) for folder in folders]
    slab = make_slab([Path(info.path) for info in infos], spec)
    with torch.no_grad():
        logits = forward(spec, weights, make_batch(rows, chosen), ReferenceOps(), slab)
    return list(logits.log_softmax(-1).split([len(row) for row in rows]))


def oracle_logprobs(base: Path, folder: Path | None, row: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = oracle(base, folder, dtype)(row.unsqueeze(0)).logits[0]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("family", COUNTS)
def test_mixed_batch_is_peft(
    family: str, checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], cache: Path
) -> None:
    base, folders = checkpoint(family), adapters(family, COUNTS[family])
    # every adapter, the base, and one adapter again on a row that is not its neighbour
    chosen: list[int | None] = [*range(len(folders)), None, 0]
    rows = [sample_tokens(1, 24 + i, 100 + i)[0] for i in range(len(chosen))]
    ours = mixed_logprobs(base, folders, rows, chosen, torch.float32, cache)
    for row, handle, mine in zip(rows, chosen, ours, strict=True):
        theirs = oracle_logprobs(base, None if handle is None else folders[handle], row, torch.float32)
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_bfloat16_error_is_at_most_that_of_peft(
    family: str, checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], cache: Path
) -> None:
    base, folders = checkpoint(family, torch.bfloat16), adapters(family, 4, torch.bfloat16)
    chosen: list[int | None] = [0, 1, 2, 3, None]
    rows = [sample_tokens(1, 64, 200 + i)[0] for i in range(len(chosen))]
    ours = mixed_logprobs(base, folders, rows, chosen, torch.bfloat16, cache)
    our_error, their_error = 0.0, 0.0
    for row, handle, mine in zip(rows, chosen, ours, strict=True):
        folder = None if handle is None else folders[handle]
        exact = oracle_logprobs(base, folder, row, torch.float32)
        our_error += (mine - exact).abs().mean().item()
        their_error += (oracle_logprobs(base, folder, row, torch.bfloat16) - exact).abs().mean().item()
    assert 0 < our_error <= 1.25 * their_error


def test_entries_are_unfolded_and_in_site_order(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]]
) -> None:
    spec = load_spec(checkpoint("llama"))
    with AdapterFile(adapters("llama", 4)[3]) as file:
        tensors, _ = file.load()
        entries = compile_entries(file.config, tensors, spec, BaseTensors(()))
    assert [entry.site.index for entry in entries] == list(range(7 * spec.num_layers))
    for entry in entries:
        assert entry.a.shape == (5, entry.site.d_in) and entry.b.shape == (5, entry.site.d_out)
        assert entry.scale == 8 / 5**0.5
        np.testing.assert_array_equal(entry.b.T, tensors[module_of(entry.site), "B"])


LORA = LoraConfig(r=2, alpha=4, target_modules=("q_proj", "down_proj"))


def shapes_of(config: LoraConfig, base: Path) -> dict[tuple[str, str], tuple[int, ...]]:
    spec = load_spec(base)
    modules = {module_of(site): site for site in spec.sites if config.targets(module_of(site))}
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for module, site in modules.items():
        rank = config.rank_of(module)
        shapes |= {(module, "A"): (rank, site.d_in), (module, "B"): (site.d_out, rank)}
    return shapes


Q1 = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({(Q1, "A"): (2, 63)}, r"q_proj\.lora_A\.weight: expected \[2, 64\], found \[2, 63\]"),
        ({(Q1, "B"): (64, 3)}, r"q_proj\.lora_B\.weight: expected \[64, 2\], found \[64, 3\]"),
        ({(Q1, "B"): None}, r"q_proj\.lora_B\.weight is missing"),
        ({(Q1, "A"): None, (Q1, "B"): None}, r"layers\.1\.self_attn\.q_proj\.lora_A\.weight is missing"),
        ({("model.layers.1.self_attn.k_proj", "A"): (2, 64)}, r"k_proj: not among the modules"),
        ({(Q1, "magnitude"): (64,)}, r"q_proj\.lora_magnitude_vector: adapter_config\.json says nothing of it"),
        ({(Q1, "B.bias"): (64,)}, r"q_proj\.lora_B\.bias: adapter_config\.json says nothing of it"),
        ({(Q1, "bias"): (64,)}, r"q_proj\.bias: adapter_config\.json says nothing of it"),
        ({("", "shared_A"): (2, 64)}, r"base_model\.vera_A: adapter_config\.json says nothing of it"),
        ({("model.layers.9.self_attn.q_proj", "A"): (2, 64)}, r"layers\.9\.self_attn\.q_proj: this base .* 3 layers"),
        ({("model.layers.1.mlp.router", "A"): (2, 64)}, r"router: this base .* has no such module"),
        ({("lm_head", "A"): (2, 64)}, r"lm_head: not among the modules"),
        ({("model.embed_tokens", "embedding_A"): (2, 320)}, r"model\.embed_tokens: not among the modules"),
        ({("lm_head", "weight"): (328, 64)}, r"embed_tokens: expected rows for 328 tokens, the base has 320"),
        ({("lm_head", "rows"): (3, 64)}, r"lm_head\.token_adapter\.trainable_tokens_delta: .* says nothing of it"),
        ({(Q1, "weight"): (64, 64)}, r"q_proj\.weight: only embed_tokens, lm_head and the norms"),
        ({(f"{Q1}.lora_A.other", "weight"): (2, 64)}, r"lora_A\.other\.weight: only embed_tokens"),
        ({("model.norm", "weight"): (64,)}, r"model\.norm\.weight: only embed_tokens"),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[tuple[str, str], tuple[int, ...] | None], message: str, checkpoint: Callable[..., Path]
) -> None:
    base = checkpoint("llama")
    shapes = {k: v for k, v in {**shapes_of(LORA, base), **change}.items() if v is not None}
    with pytest.raises(AdapterError, match=message):
        check_adapter(LORA, shapes, load_spec(base))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "W_pack"), "'W_pack' matches no module"),
        (r".*\.nothing", "matches no module"),
    ],
)
def test_targets_that_cannot_be(targets: str | tuple[str, ...], message: str, checkpoint: Callable[..., Path]) -> None:
    base = checkpoint("llama")
    config = replace(LORA, target_modules=targets)
    with pytest.raises(AdapterError, match=message):
        check_adapter(config, shapes_of(config, base), load_spec(base))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": r".*\.layers\.[01]\..*_proj"},
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1, 2]},
        {"target_modules": ["down_proj", "o_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.2\..*"},
        {"target_modules": ["v_proj", "k_proj"], "exclude_modules": ["model.layers.0.self_attn.v_proj"]},
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"],
            "rank_pattern": {".*up_proj": 11, "k_proj": 3, r"layers\.[12]\..*": 5, "v_proj": 7},
            "alpha_pattern": {r".*\.1\.self_attn\.\w_proj": 5, "model.layers.0.self_attn.q_proj": 6, "up_proj": 9},
            "use_rslora": True,
        },
    ],
)
def test_matching_is_pefts(options: dict[str, object], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Which modules have an adapter, of which rank and scale, as peft itself decides.

    Patterns stand in alphabetical order, because peft writes them so and the first that matches counts.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    base = checkpoint("llama")
    adapted = get_peft_model(oracle(base), PeftLoraConfig(r=2, lora_alpha=3, **options))  # type: ignore[arg-type]
    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }
    adapted.save_pretrained(str(tmp_path))
    with AdapterFile(tmp_path) as file:
        config = file.config
        found = check_adapter(config, file.shapes, load_spec(base))
    assert {name: (config.rank_of(name), config.scale_of(name)) for name in found} == expected


def test_a_pattern_that_matches_nothing_is_refused(checkpoint: Callable[..., Path]) -> None:
    base = checkpoint("llama")
    config = replace(LORA, alpha_pattern={"v_proj": 3.0})
    with pytest.raises(AdapterError, match="alpha_pattern: 'v_proj' matches no targeted module"):
        check_adapter(config, shapes_of(config, base), load_spec(base))  # type: ignore[arg-type]
