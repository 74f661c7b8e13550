"""Fusing an adapter into its base. The oracle is peft's `merge_and_unload`, and the logits of transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.kinds import make, write_loreft
from tests.adapters.resized import make_resized, save_tokenizer
from tests.adapters.test_kinds import KINDS, UNTIED
from tests.fixtures import AdapterShape, make_adapter, oracle, sample_tokens
from tests.quantised import STORED, quantise

from lorikeet.adapters import fuse as module
from lorikeet.adapters import stored
from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import Lock, LockedBase, LockedTemplate, write_lock
from lorikeet.adapters.fuse import BaseModel, fuse
from lorikeet.adapters.safefile import TensorEntry
from lorikeet.adapters.stored import Tensor
from lorikeet.errors import AdapterError, ConfigError, LockMismatchError, ModelError
from lorikeet.model.families import load_spec, read_json
from lorikeet.model.sources import checkpoint_files
from lorikeet.model.tokenizer import Tokenizer
from lorikeet.types import BaseIdentity

IDENTITY = BaseIdentity(name="tiny", sha256="b" * 64, tokenizer_sha256="c" * 64, stop_ids=(1,))
LOCKED = Lock(base=LockedBase("tiny", "b" * 64), tokenizer_sha256="c" * 64, stop_ids=(1,))


def model(folder: Path) -> BaseModel:
    return BaseModel(
        folder=folder,
        files=checkpoint_files(folder),
        config=read_json(folder / "config.json"),
        spec=load_spec(folder),
        identity=lambda: IDENTITY,
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in checkpoint_files(folder) for name, value in load_file(path).items()}


def assert_close(found: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, atol=atol * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("block", [300, 2**22])
@pytest.mark.parametrize("family", ["llama", "qwen2", "llama-tied"])
def test_weights_and_logits_are_pefts(
    family: str,
    block: int,
    checkpoint: Callable[..., Path],
    adapters: Callable[..., list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    base, adapter = checkpoint(family), adapters(family, 4)[3]
    fuse(model(base), adapter, tmp_path / "fused")
    with torch.no_grad():
        merged = oracle(base, adapter).merge_and_unload()
    expected, found, before = merged.state_dict(), tensors(tmp_path / "fused"), tensors(base)
    assert found.keys() == before.keys()
    changed = 0
    for name, value in found.items():
        assert_close(value, expected[name], 1e-6)
        changed += not torch.equal(value, before[name])
    assert changed == 21
    tokens = sample_tokens(2, 24)
    with torch.no_grad():
        assert_close(oracle(tmp_path / "fused")(tokens).logits, merged(tokens).logits, 1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's: of what it saves, and of tied weights
@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen2", kind) for kind in (*KINDS, *UNTIED) if kind != "lora_bias"]
    + [("llama", "dora"), ("llama", "modules_to_save"), ("qwen3", "dora")]
    + [("llama-tied", kind) for kind in ("both tied", "saved and tied", "token rows", "dora, bias all")],
)
@pytest.mark.parametrize("block", [300, 2**22])
def test_every_kind_that_weights_can_hold(
    family: str,
    kind: str,
    block: int,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    base = checkpoint(family)
    adapter = make(kind, base, tmp_path / "adapter", seed=1)
    fuse(model(base), adapter, tmp_path / "fused")
    tokens = sample_tokens(2, 24)
    with torch.no_grad():
        adapted, plain, fused = (
            oracle(*folders)(tokens).logits for folders in ((base, adapter), (base,), (tmp_path / "fused",))
        )
    assert (adapted - plain).abs().mean() > 0.05
    assert_close(fused, adapted, 1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["embedding saved", "head saved", "embedding", "head"])
def test_a_tied_table_cannot_be_two(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make(kind, checkpoint("llama-tied"), tmp_path / "adapter", seed=1)
    with pytest.raises(AdapterError, match="embedding and head change differently, and this base holds them as one"):
        fuse(model(checkpoint("llama-tied")), adapter, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_bf16_is_rounded_once(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], tmp_path: Path
) -> None:
    base, adapter = checkpoint("qwen2", torch.bfloat16), adapters("qwen2", 1, torch.bfloat16)[0]
    fuse(model(base), adapter, tmp_path / "fused")
    expected = oracle(base, adapter).merge_and_unload().state_dict()  # computed in fp32
    for name, value in tensors(tmp_path / "fused").items():
        assert value.dtype == torch.bfloat16
        wide = expected[name].float()
        differs = value != wide.bfloat16()
        assert differs.float().mean() < 1e-3  # fp32 sums in another order may fall on the other side of a tie
        assert_close(value.float(), wide, 2**-8)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_dtype(
    dtype: str, checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], tmp_path: Path
) -> None:
    base, adapter = checkpoint("llama", torch.bfloat16), adapters("llama", 1, torch.bfloat16)[0]
    fuse(model(base), adapter, tmp_path / "fused", dtype=dtype)  # type: ignore[arg-type]
    wanted = getattr(torch, dtype)
    expected = oracle(base, adapter).merge_and_unload().state_dict()
    for name, value in tensors(tmp_path / "fused").items():
        assert value.dtype == wanted
        assert_close(value.float(), expected[name].float(), 2**-8 if dtype == "bfloat16" else 1e-3)
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["torch_dtype"] == dtype and "dtype" not in config
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype="auto").dtype == wanted


@pytest.fixture
def sharded(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A base of several files, with other forms of the weights and a licence beside them."""
    folder = tmp_path / "sharded"
    shutil.copytree(checkpoint("llama"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    oracle(checkpoint("llama")).save_pretrained(folder, max_shard_size="150KB")
    assert len(checkpoint_files(folder)) > 2
    (folder / "LICENSE").write_text("as you like")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "pytorch_model.bin.index.json", ".gitattributes"):
        (folder / name).write_bytes(b"{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    return folder


def test_shards_keep_their_names_and_the_rest_is_copied(
    sharded: Path, adapters: Callable[..., list[Path]], tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    fuse(model(sharded), adapters("llama", 1)[0], tmp_path / "fused", report=lambda *at: seen.append(at))
    fused = tmp_path / "fused"
    names = {path.name for path in checkpoint_files(fused)}
    assert names == {path.name for path in checkpoint_files(sharded)}
    index = "model.safetensors.index.json"
    ours, theirs = (json.loads((folder / index).read_text()) for folder in (fused, sharded))
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"] == seen[-1][0] == seen[-1][1]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (fused / name).read_bytes() == (sharded / name).read_bytes()
    assert (fused / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    left = {path.name for path in sharded.iterdir()} - {path.name for path in fused.iterdir()}
    assert left == {"pytorch_model.bin", "consolidated.safetensors", "pytorch_model.bin.index.json", ".gitattributes"}
    oracle(fused)


def test_a_chat_template_comes_along(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(adapters("llama", 1)[0], tmp_path / "adapter"))
    write_lock(adapter, msgspec.structs.replace(LOCKED, template=LockedTemplate.of("chat", "{{ messages }}!")))
    lock = fuse(model(checkpoint("llama")), adapter, tmp_path / "fused")
    assert lock is not None
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "fused").chat_template == "{{ messages }}!"


def test_a_tokenizer_comes_along(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", Path(shutil.copytree(adapters("llama", 1)[0], tmp_path / "adapter"))
    shutil.copytree(checkpoint("llama"), base)
    (base / "chat_template.jinja").write_text("the base's")
    save_tokenizer(base, adapter, ["<tool>"])
    (adapter / "chat_template.jinja").unlink()
    config = json.loads((adapter / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages }}!"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(config))
    (adapter / "generation_config.json").write_text('{"eos_token_id": 7}')
    fuse(model(base), adapter, tmp_path / "fused")
    served, fused = Tokenizer(adapter, Tokenizer(base)), Tokenizer(tmp_path / "fused")
    assert fused.encode("<tool>") == [320] and fused.same_as(served) and 7 in fused.stop_ids


def test_an_adapter_of_another_vocabulary_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make_resized(checkpoint("llama"), tmp_path / "adapter", 323, modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(AdapterError, match="adapter: its embedding and head have not as many rows as the base's, 320"):
        fuse(model(checkpoint("llama")), adapter, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_an_adapter_of_another_base_is_refused(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], tmp_path: Path
) -> None:
    base, adapter = model(checkpoint("llama")), Path(shutil.copytree(adapters("llama", 1)[0], tmp_path / "adapter"))
    write_lock(adapter, msgspec.structs.replace(LOCKED, base=LockedBase("other", "0" * 64)))
    with pytest.raises(LockMismatchError, match="trained for another base"):
        fuse(base, adapter, tmp_path / "fused")
    fuse(base, adapter, tmp_path / "fused", allow_lock_mismatch=True)
    with pytest.raises(AdapterError, match="expected"):
        fuse(model(checkpoint("qwen3")), adapters("llama", 1)[0], tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_nothing_behind(
    there: bool, checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], tmp_path: Path
) -> None:
    base, adapter = model(checkpoint("llama")), adapters("llama", 1)[0]
    if there:
        fuse(base, adapter, tmp_path / "fused")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def full(done: int, total: int) -> None:
        if done > total // 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fuse(base, adapter, tmp_path / "fused", force=True, report=full)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_what_is_there_is_not_overwritten(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], tmp_path: Path
) -> None:
    folder, adapter = Path(shutil.copytree(checkpoint("llama"), tmp_path / "base")), adapters("llama", 2)[0]
    base, fused = model(folder), tmp_path / "fused"
    fuse(base, adapter, fused)
    with pytest.raises(ConfigError, match="fused exists.*--force replaces it"):
        fuse(base, adapter, fused)
    first = tensors(fused)
    fuse(base, adapters("llama", 2)[1], fused, force=True)
    assert any(not torch.equal(value, first[name]) for name, value in tensors(fused).items())
    for output in (folder, tmp_path):
        with pytest.raises(ConfigError, match="holds the base or the adapter"):
            fuse(base, adapter, output, force=True)
    (tmp_path / "home").mkdir()
    with pytest.raises(ConfigError, match="home exists and is not a model's folder"):
        fuse(base, adapter, tmp_path / "home", force=True)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'")
def test_what_a_checkpoint_cannot_hold_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base = checkpoint("llama")
    adapter = make("lora_bias", base, tmp_path / "bias", seed=1)
    with pytest.raises(AdapterError, match=r"q_proj\.bias: the adapter has one, this llama base has no place for it"):
        fuse(model(base), adapter, tmp_path / "fused")
    plain = make_adapter(base, tmp_path / "alora", AdapterShape(rank=2, targets=("q_proj",)))
    config = json.loads((plain / CONFIG).read_text())
    (plain / CONFIG).write_text(json.dumps(config | {"alora_invocation_tokens": [7, 8]}))
    with pytest.raises(AdapterError, match="alora_invocation_tokens: an activated LoRA acts from its invocation on"):
        fuse(model(base), plain, tmp_path / "fused")
    write_loreft(tmp_path / "reft", 64, [1], 3)
    with pytest.raises(AdapterError, match="peft_type: 'LOREFT' changes what layers give at some tokens"):
        fuse(model(base), tmp_path / "reft", tmp_path / "fused")


def rewrite(folder: Path, **change: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    content = {**load_file(path), **{name.replace("__", "."): value for name, value in change.items()}}
    save_file({name: value for name, value in content.items() if value is not None}, path)


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        (None, None, r"model\.norm\.weight is missing"),
        (torch.ones(63), None, r"model\.norm\.weight: expected \[64\], found \[63\]"),
        (torch.ones(64, dtype=torch.int8), None, r"model\.norm\.weight: expected F32 or .*, found I8"),
        (torch.full((64,), 7e4), "float16", r"model\.norm\.weight: a value is too large for F16"),
        (torch.full((64,), 3.4e38), "bfloat16", r"model\.norm\.weight: a value is too large for BF16"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(
    change: torch.Tensor | None,
    dtype: Any,
    message: str,
    checkpoint: Callable[..., Path],
    adapters: Callable[..., list[Path]],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "base"))
    rewrite(folder, model__norm__weight=change)
    with pytest.raises(ModelError, match=message):
        fuse(model(folder), adapters("llama", 1)[0], tmp_path / "fused", dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def lorikeet(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorikeet", "adapters", "fuse", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], cache: Path, tmp_path: Path
) -> None:
    base, adapter = checkpoint("llama"), adapters("llama", 1)[0]
    result = lorikeet(str(base), str(adapter), "--output", str(tmp_path / "fused"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith(f"fused: llama with {adapter.name}")
    fuse(model(base), adapter, tmp_path / "again")
    again = tensors(tmp_path / "again")
    assert all(torch.equal(value, again[name]) for name, value in tensors(tmp_path / "fused").items())
    result = lorikeet(str(base), str(adapter), "--output", str(tmp_path / "other"), "--dtype", "int4")
    assert result.returncode == 2
    assert "--dtype: found 'int4'; expected auto | float32 | bfloat16 | float16" in result.stderr
    result = lorikeet("--help")
    assert "Examples" in result.stdout and "lorikeet adapters fuse" in result.stdout


# --- a quantised base ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORED)
def test_a_quantised_base_is_dequantised(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 300)
    expected = quantise("qwen2", tmp_path, kind)
    adapter = make_adapter(tmp_path / "plain", tmp_path / "adapter", AdapterShape(rank=1))
    fuse(model(tmp_path / "base"), adapter, tmp_path / "fused", dtype="float32")
    found, plain = tensors(tmp_path / "fused"), tensors(tmp_path / "plain")
    assert found.keys() == plain.keys()
    assert "quantization_config" not in json.loads((tmp_path / "fused" / "config.json").read_text())
    pairs = load_file(adapter / "adapter_model.safetensors")
    for name, value in found.items():
        wanted = expected[name].float()
        stem = f"base_model.model.{name.removesuffix('weight')}"
        if f"{stem}lora_A.weight" in pairs:
            wanted = wanted + 8 * (pairs[f"{stem}lora_B.weight"] @ pairs[f"{stem}lora_A.weight"])
            assert not torch.equal(expected[name].float(), plain[name])
        assert_close(value, wanted, 1e-6)
    oracle(tmp_path / "fused")


@pytest.mark.parametrize("columns", [96, 63])
def test_rows_need_not_be_whole_blocks(columns: int) -> None:
    """The values are blocks in row-major order: read by rows they are what all of them are at once."""
    import bitsandbytes.functional as bnb

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, columns, generator=generator)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    saved = {"w": packed, **{f"w.{name}": value for name, value in state.as_dict(packed=True).items()}}
    whole, mapped = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset, state.code
    nibbles = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1)[: weight.numel()].long()
    expected = (mapped[nibbles] * whole.repeat_interleave(64)[: weight.numel()]).reshape(weight.shape)
    tensor = read_quantised(saved)
    for start, stop in ((0, 10), (0, 1), (3, 4), (5, 9), (9, 10)):
        torch.testing.assert_close(torch.from_numpy(tensor.rows(start, stop).copy()), expected[start:stop])
    assert (expected - weight).abs().max() < 0.5


def read_quantised(saved: dict[str, torch.Tensor]) -> Tensor:
    parts = {}
    for name, value in saved.items():
        kind = {torch.uint8: "U8", torch.float32: "F32"}[value.dtype]
        parts[name] = ("file", TensorEntry(kind, tuple(value.shape), 0, 0), memoryview(value.numpy().tobytes()))
    return stored._four_bits("w", next(name for name in saved if "quant_state" in name), parts, "F32")


def test_a_quantised_base_that_is_not_whole(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    quantise("llama", tmp_path, "nf4-double")
    adapter = make_adapter(tmp_path / "plain", tmp_path / "adapter", AdapterShape(rank=1))
    q = "model.layers.0.self_attn.q_proj.weight"
    whole = load_file(folder / "model.safetensors")

    def refused(change: dict[str, torch.Tensor | None], message: str) -> None:
        content = {name: value for name, value in {**whole, **change}.items() if value is not None}
        save_file(content, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=message):
            fuse(model(folder), adapter, tmp_path / "fused")

    refused({f"{q}.absmax": None}, r"q_proj\.weight: cannot be dequantised: .*absmax is missing")
    refused({f"{q}.absmax": whole[f"{q}.absmax"][1:]}, r"absmax: expected U8 of 64 values, found U8 \[63\]")
    refused({f"{q}.quant_map": torch.ones(15)}, r"quant_map: expected F32 of 16 values")
    refused({q: whole[q][2:]}, r"expected sizes that fit 2046 bytes")
    state = f"{q}.quant_state.bitsandbytes__nf4"
    refused({state: whole[state][:-1]}, "is not a quantisation state")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (folder / "config.json").write_text(json.dumps(config))
    refused({}, r"quantization_config\.quant_method: expected 'bitsandbytes', found 'gptq'")
