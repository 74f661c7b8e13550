"""Bases as bitsandbytes stores them, and what transformers and peft make of those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.fixtures import make_checkpoint

STORED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def quantise(family: str, root: Path, kind: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Write `root/plain` and in a form of bitsandbytes `root/base`; what bitsandbytes itself reads out of that.

    Rows are whole blocks, because its CPU kernel takes others wrongly.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = AutoModelForCausalLM.from_pretrained(
        make_checkpoint(family, root / "plain", dtype, intermediate_size=128),
        quantization_config=BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **STORED[kind]),
        dtype=dtype,
        device_map="cpu",
    )
    quantised.save_pretrained(root / "base")
    for path in (root / "plain").glob("tokenizer*"):
        (root / "base" / path.name).write_bytes(path.read_bytes())
    expected: dict[str, torch.Tensor] = quantised.dequantize().state_dict()
    return expected


def quantised_oracle(base: Path, adapter: Path | None = None) -> Any:
    """The model as transformers loads the quantised `base`, products in fp32, with `adapter` put on by peft.

    In training mode, where bitsandbytes does not turn to its bf16 kernel of a CPU; there is no dropout. Its product in
    8 bits rounds the activations too: there the weights that it dequantises are the oracle.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map="cpu")
    if getattr(model, "is_loaded_in_8bit", False):
        model = model.dequantize()
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).train()
