"""What named trainers write, rewritten from peft's checkpoints, against transformers + peft of the original.

docs/adapters.md says where the layouts come from. That of torchtune was checked against torchtune 0.6.1 itself.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.test_kinds import make
from tests.fixtures import AdapterShape, make_adapter, make_batch, make_slab, oracle, sample_tokens

from lorikeet.adapters.compiled import compile_adapter
from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import WEIGHTS, AdapterFile
from lorikeet.adapters.foreign import unwrapped
from lorikeet.errors import AdapterError
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.model.decoder import forward
from lorikeet.model.sources import checkpoint_files, identify
from lorikeet.model.weights import load
from lorikeet.server.catalogue import adapter_folders

UNSLOTH_NAMES = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
UNSLOTH_PARTS = "self_attn|attention|attn|mlp|feed_forward|ffn|dense"


def rewrite(
    folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], names: Callable[[str], str] = str
) -> None:
    """Another config, other names of the tensors."""
    (folder / CONFIG).write_text(json.dumps(change(json.loads((folder / CONFIG).read_text()))))
    tensors = {names(name): value.contiguous() for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def leave(folder: Path, *names: str) -> None:
    """Files beside an adapter that are none of its own."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"something else")


def axolotl(peft: Path, out: Path) -> Path:
    """`output_dir` with checkpoints below; the base's config and the tokenizer are saved beside before training."""
    empty = {"fan_in_fan_out": None, "target_parameters": [], "exclude_modules": None, "ensure_weight_tying": False}
    for folder in (out, out / "checkpoint-20"):
        shutil.copytree(peft, folder, dirs_exist_ok=True)
        rewrite(folder, lambda config: config | empty)
        leave(folder, "config.json", "README.md", "tokenizer.model", "debug.log")
    leave(out / "checkpoint-20", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
          "training_args.bin", "scaler.pt", "global_step20/mp_rank_00_model_states.pt")  # fmt: skip
    return out / "checkpoint-20"


def axolotl_wrapped(peft: Path, out: Path) -> Path:
    """Saved from modules inside activation checkpointing, or inside torch.compile."""
    shutil.copytree(peft, out)
    rewrite(out, dict, lambda name: "_orig_mod." + name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."))
    return out


def llama_factory(peft: Path, out: Path) -> Path:
    shutil.copytree(peft, out)
    rewrite(out, lambda config: config | {"inference_mode": False, "modules_to_save": config["modules_to_save"] or []})
    leave(out, "training_args.yaml", "trainer_log.jsonl", "all_results.json", "training_loss.png", "training_args.bin",
          "value_head.safetensors", "special_tokens_map.json", "added_tokens.json")  # fmt: skip
    return out


def unsloth(peft: Path, out: Path) -> Path:
    """`FastModel`: a pattern over whole names, no task, and a mark of its own in auto_mapping."""
    shutil.copytree(peft, out)
    pattern = (
        rf"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:{UNSLOTH_PARTS}).*?(?:{UNSLOTH_NAMES}).*?)"
        rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{UNSLOTH_PARTS})\.(?:(?:{UNSLOTH_NAMES})))"
    )
    library = "transformers.models.llama.modeling_llama"
    changes = {
        "target_modules": pattern,
        "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": library, "unsloth_fixed": True},
        "task_type": None,
        "loftq_config": None,
        "revision": "unsloth",
        "peft_version": "0.18.0",
    }
    rewrite(out, lambda config: config | changes)
    return out


def torchtune(peft: Path, out: Path) -> Path:
    """`FullModelHFCheckpointer`: five fields of a config, its own pickled file and the tokenizer beside."""
    folder = out / "epoch_0"
    shutil.copytree(peft, folder)
    fields = ("r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path")
    rewrite(folder, lambda config: {name: config[name] for name in fields if name in config})
    leave(folder, "adapter_model.pt", "config.json", "generation_config.json", "original_repo_id.json")
    return folder


def ludwig(peft: Path, out: Path) -> Path:
    """`results/experiment_run/model`, whose `model_weights` is what PEFT saves."""
    folder = out / "results" / "experiment_run" / "model" / "model_weights"
    shutil.copytree(peft, folder)
    rewrite(folder, lambda config: config | {"inference_mode": True})
    leave(folder, "README.md")
    leave(folder.parent, "model_hyperparameters.json", "training_set_metadata.json", "training_progress.json",
          "training_checkpoints/latest.ckpt", "logs/training/events.out")  # fmt: skip
    return folder


TRAINERS = [axolotl, axolotl_wrapped, llama_factory, unsloth, torchtune, ludwig]
KINDS = {axolotl: "modules_to_save", llama_factory: "dora, rslora", unsloth: "lora", ludwig: "ia3"}


def check(folders: list[Path], originals: list[Path], base: Path, cache: Path) -> None:
    """All in one batch, each as transformers + peft of what it was made from."""
    spec, weights = load(base, torch.float32)
    files = checkpoint_files(base)
    infos = [compile_adapter(folder, spec, identify(base), "float32", cache, checkpoint=files) for folder in folders]
    rows = [sample_tokens(1, 20 + i, 100 + i)[0] for i in range(len(folders))]
    slab = make_slab([Path(info.path) for info in infos], spec)
    with torch.no_grad():
        batch = make_batch(rows, list(range(len(folders))))
        ours = forward(spec, weights, batch, ReferenceOps(), slab).log_softmax(-1).split([len(row) for row in rows])
        for row, original, mine in zip(rows, originals, ours, strict=True):
            theirs = oracle(base, original)(row.unsqueeze(0)).logits[0].log_softmax(-1)
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0, msg=lambda m, o=original: f"{o.name}: {m}")


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, of the tables that it saves
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_exports_of_trainers_are_pefts(
    family: str, checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    base = checkpoint(family)
    folders, originals = [], []
    for seed, trainer in enumerate(TRAINERS):
        original = tmp_path / "peft" / trainer.__name__
        if trainer in KINDS and family == "llama":
            make(KINDS[trainer], base, original, seed)
        else:  # torchtune's rows of q and k are refused where nothing is to be reordered
            targets = ("v_proj", "o_proj", "down_proj") if trainer is torchtune and family == "qwen3" else ()
            make_adapter(base, original, AdapterShape(targets=targets) if targets else None, seed)
        originals.append(original)
        folders.append(trainer(original, tmp_path / "out" / trainer.__name__))
    check(folders, originals, base, cache)


def test_folders_of_trainers_are_found_by_name(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base = checkpoint("llama")
    peft = make_adapter(base, tmp_path / "peft", AdapterShape(targets=("q_proj",)))
    for trainer in (axolotl, torchtune, ludwig):
        trainer(peft, tmp_path / "served" / trainer.__name__)
    found = {folder.name for folder in adapter_folders(tmp_path / "served")}
    assert found == {"axolotl", "checkpoint-20", "epoch_0", "model_weights"}


@pytest.fixture
def plain(adapters: Callable[..., list[Path]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapters("llama", 1)[0], tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        (["adapter_model.bin"], r"adapter_model\.bin: pickled", "safe_serialization=True"),
        (["adapter_model-00001-of-00002.safetensors", "adapter_model.safetensors.index.json"],
         r"adapter_model-00001-of-00002\.safetensors: weights in several files", "max_shard_size"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "adapter_model.safetensors is missing", "FULL_STATE_DICT"),
        (["zero_to_fp32.py", "global_step8/x.pt"], "adapter_model.safetensors is missing", "stage3_gather"),
        (["checkpoint-9/adapter_model.safetensors", "checkpoint-10/adapter_model.safetensors"],
         "adapter_model.safetensors is missing", r"newest checkpoint is .*checkpoint-10$"),
        ([], "adapter_model.safetensors is missing", "the folder is"),
    ],
)  # fmt: skip
def test_weights_that_are_elsewhere_are_named(files: list[str], message: str, hint: str, plain: Path) -> None:
    (plain / WEIGHTS).unlink()
    leave(plain, *files)
    with pytest.raises(AdapterError, match=message) as caught:
        AdapterFile(plain)
    assert re.search(hint, caught.value.hint or "")


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (["model_weights/adapter_config.json", "model_hyperparameters.json"], "Ludwig keeps .*model_weights"),
        (["adapter_model.pt"], "torchtune's own format; save it with FullModelHFCheckpointer"),
        (["adapter_0.pt"], "torchtune's own format"),
        (["intkey_layer_3_comp_block_output_unit_pos_nunit_1#0.bin", "config.json"], "import-pyreft"),
        (["intervenable_model/intkey_layer_3_comp_block_output_unit_pos_nunit_1#0.bin"], "import-pyreft"),
        (["checkpoint-5/adapter_config.json", "config.json"], "a checkpoint of it has one: .*checkpoint-5"),
        (["config.json"], "the folder is"),
    ],
)
def test_folders_that_are_no_adapter_say_what_they_are(files: list[str], hint: str, tmp_path: Path) -> None:
    leave(tmp_path, *files)
    with pytest.raises(AdapterError, match="adapter_config.json is missing") as caught:
        AdapterFile(tmp_path)
    assert re.search(hint, caught.value.hint or "")


@pytest.mark.parametrize("name", ["pissa_init", "pissa_backup"])
def test_pissa_before_its_conversion_is_refused(name: str, plain: Path) -> None:
    with pytest.raises(AdapterError, match=f"{name}: a PiSSA adapter before its conversion"):
        AdapterFile(plain.rename(plain.parent / name))
    plain = (plain.parent / name).rename(plain.parent / "pissa_converted")
    AdapterFile(plain).__exit__(None, None, None)


def test_what_torchtune_reorders_is_refused(checkpoint: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    """Rows of q and k: of B on Qwen, and of DoRA's magnitudes everywhere."""
    for family, kind, change, message in (
        ("qwen2", "lora", {}, r"epoch_0: .*\.(q|k)_proj: torchtune writes the rows of its B in another order"),
        ("llama", "dora, rslora", {}, r"_proj\.lora_magnitude_vector: adapter_config\.json says nothing of it"),
        ("llama", "dora, rslora", {"use_dora": True}, r"q_proj: torchtune writes the rows of its magnitude"),
    ):
        base = checkpoint(family)
        name = f"{family}-{len(change)}-{kind}"
        folder = torchtune(make(kind, base, tmp_path / "peft" / name, 0), tmp_path / name)
        rewrite(folder, lambda config, change=change: config | change)
        spec = load(base, torch.float32)[0]
        with pytest.raises(AdapterError, match=message) as caught:
            compile_adapter(folder, spec, identify(base), "float32", cache, checkpoint=checkpoint_files(base))
        assert "use_dora" in (caught.value.hint or "") or "merged model" in (caught.value.hint or "")
        (folder / "adapter_model.pt").unlink()  # then nothing says that it is torchtune's
        if change or kind == "lora":
            compile_adapter(folder, spec, identify(base), "float32", cache, checkpoint=checkpoint_files(base))


def test_only_whole_parts_of_a_name_are_wrappers() -> None:
    assert unwrapped("_orig_mod.base_model.model._fsdp_wrapped_module.lm_head.weight") == (
        "base_model.model.lm_head.weight"
    )
    assert unwrapped("model.my_orig_mod.x._orig_mod_.weight") == "model.my_orig_mod.x._orig_mod_.weight"
