"""What trainers leave in folders that hold no adapter as it must be, or not the one it seems; and what to do. No torch.

docs/adapters.md says where each of these layouts comes from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from lorikeet.errors import AdapterError

PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.ckpt", "adapter_model.pkl")
# What torch.compile, activation checkpoints and FSDP put into the names of what they wrap.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_TORCHTUNE = {"r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path", "use_dora"}


def unwrapped(name: str) -> str:
    """The name of a tensor without those of wrappers that were around its modules when it was saved."""
    return _WRAPPERS.sub("", name)


def missing_config(folder: Path, config: str) -> AdapterError:
    """`folder` has no `config`: what it is then."""
    hint = f"the folder is {folder}"
    if any(folder.glob("intkey_*.bin")):
        hint = f"this is pyreft's; make an adapter of it: lorikeet adapters import-pyreft {folder} --output OUTPUT"
    elif any(folder.glob("intervenable_model/intkey_*.bin")):
        hint = f"this is a checkpoint of pyreft's trainer: lorikeet adapters import-pyreft {folder} --output OUTPUT"
    elif (folder / "model_weights" / config).exists():
        hint = f"Ludwig keeps the adapter in a folder of its own: {folder / 'model_weights'}"
    elif any(folder.glob("adapter_*.pt")):
        hint = "this is torchtune's own format; save it with FullModelHFCheckpointer, which writes PEFT's beside"
    elif (below := _newest(folder, config)) is not None:
        hint = f"a checkpoint of it has one: {below}"
    return AdapterError(f"{folder.name}: {config} is missing", hint=hint, param=config)


def missing_weights(folder: Path, weights: str) -> AdapterError:
    """`folder` has a config and no `weights`: why that is, as far as the files beside tell."""
    shards = sorted(path.name for path in folder.glob("adapter_model*.safetensors*"))
    pickled = next((name for name in PICKLED if (folder / name).exists()), None)
    if shards:
        hint = "save it with a larger max_shard_size, as one file"
        return AdapterError(f"{shards[0]}: weights in several files are not loaded", hint=hint, param=weights)
    if pickled is not None:
        hint = "save the adapter with safe_serialization=True"
        return AdapterError(f"{pickled}: pickled weights are not loaded, they can run code", hint=hint, param=weights)
    hint = f"the folder is {folder}"
    if any(folder.glob("pytorch_model_fsdp*")):
        hint = "there are FSDP's shards only; save with the state dict type FULL_STATE_DICT (Axolotl: "
        hint += "fsdp_final_state_dict_type)"
    elif (folder / "zero_to_fp32.py").exists():
        hint = "there are DeepSpeed's shards only; train with stage3_gather_16bit_weights_on_model_save"
    elif (below := _newest(folder, weights)) is not None:
        hint = f"the training has not ended, or failed; its newest checkpoint is {below}"
    return AdapterError(f"{folder.name}: {weights} is missing", hint=hint, param=weights)


def _newest(folder: Path, name: str) -> Path | None:
    """The checkpoint of most steps below `folder` that has a file of this name."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{name}") if path.parent.name[11:].isdigit()]
    return max(found, key=lambda path: int(path.name[11:]), default=None)


def check_not_pissa(folder: Path) -> None:
    """Refuse what LLaMA-Factory saves beside a converted PiSSA adapter (AdapterError).

    The configs of both call it a plain LoRA, but they are for a base without the components that PiSSA took out.
    """
    if folder.name in ("pissa_init", "pissa_backup"):
        raise AdapterError(
            f"{folder.name}: a PiSSA adapter before its conversion does not fit the base as published",
            hint="serve pissa_converted, which lies beside it",
        )


def check_not_reordered(config: Path, tensors: Iterable[tuple[str, str]], family: str) -> None:
    """Refuse torchtune's exports whose rows of q and k are not in the order of the base (AdapterError).

    Its conversion to PEFT reorders the rows of their B as Llama's rotary embedding needs it: for Qwen, too, where
    nothing is to be reordered, and not those of DoRA's magnitudes (torchtune 0.6.1, checked against its own forward
    pass). `config` is the file that was read, `tensors` are (module, part). A folder is torchtune's where its own
    file lies beside PEFT's.
    """
    folder = config.parent
    if not (folder / "adapter_model.pt").exists() or not json.loads(config.read_bytes()).keys() <= _TORCHTUNE:
        return
    for module, part in tensors:
        if module.endswith((".q_proj", ".k_proj")) and (part == "magnitude" or (part == "B" and "qwen" in family)):
            raise AdapterError(
                f"{folder.name}: {module}: torchtune writes the rows of its {part} in another order than PEFT reads",
                hint="train without q_proj and k_proj, or serve the merged model that torchtune writes",
                param="target_modules",
            )
