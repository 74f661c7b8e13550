"""A base model in training: fp32 masters by published name, their bf16 working copy, and kernels with a fused loss.

The forward pass is `model.decoder.forward`, the one that serves; only the kernels differ. Everything here can be
traced by `torch.compile` as one graph, and runs without it where there is no compiler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorikeet.kernels.batch import Batch, LayerCache
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.kernels.weight import DenseWeight, Weight
from lorikeet.model.decoder import DecoderWeights, LayerWeights, forward
from lorikeet.model.spec import ModelSpec
from lorikeet.model.weights import rope_tables

EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
ATTENTION_CHUNK = 128  # queries at a time: what lies right of the diagonal is mostly never computed
LOSS_CHUNK = 1024  # rows of logits alive at a time


def layer_name(layer: int, part: str) -> str:
    return f"model.layers.{layer}.{part}.weight"


def initial_masters(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Fresh fp32 weights (on the CPU) by their Hugging Face Llama name; residual projections start at zero."""
    generator = torch.Generator().manual_seed(seed)
    h, m, q, kv = spec.hidden_size, spec.intermediate_size, spec.q_size, spec.kv_size

    def normal(rows: int, columns: int, std: float) -> Tensor:
        return torch.empty(rows, columns).normal_(std=std, generator=generator)

    masters = {EMBED: normal(spec.vocab_size, h, 0.02)}
    for i in range(spec.num_layers):
        masters |= {
            layer_name(i, "input_layernorm"): torch.ones(h),
            layer_name(i, "self_attn.q_proj"): normal(q, h, h**-0.5),
            layer_name(i, "self_attn.k_proj"): normal(kv, h, h**-0.5),
            layer_name(i, "self_attn.v_proj"): normal(kv, h, h**-0.5),
            layer_name(i, "self_attn.o_proj"): torch.zeros(h, q),
            layer_name(i, "post_attention_layernorm"): torch.ones(h),
            layer_name(i, "mlp.gate_proj"): normal(m, h, h**-0.5),
            layer_name(i, "mlp.up_proj"): normal(m, h, h**-0.5),
            layer_name(i, "mlp.down_proj"): torch.zeros(h, m),
        }
    return masters | {NORM: torch.ones(h)}


@dataclass(slots=True)
class Part:
    """A leaf tensor of the working copy and the masters that lie in it, row block after row block."""

    leaf: Tensor
    masters: list[tuple[str, Tensor]]


class WorkingCopy:
    """The weights that the forward pass reads, in `dtype`, fused as the decoder wants them, and their gradients.

    They lie on the masters' device.
    """

    def __init__(self, spec: ModelSpec, masters: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.parts: list[Part] = []
        device = masters[EMBED].device

        def leaf(*names: str) -> Tensor:
            chosen = [(name, masters[name]) for name in names]
            shape = (sum(p.shape[0] for _, p in chosen), *chosen[0][1].shape[1:])
            self.parts.append(Part(torch.empty(shape, dtype=dtype, device=device, requires_grad=True), chosen))
            return self.parts[-1].leaf

        def layer(i: int) -> LayerWeights:
            return LayerWeights(
                attn_norm=leaf(layer_name(i, "input_layernorm")),
                qkv=DenseWeight(leaf(*(layer_name(i, f"self_attn.{x}_proj") for x in "qkv"))),
                o=DenseWeight(leaf(layer_name(i, "self_attn.o_proj"))),
                mlp_norm=leaf(layer_name(i, "post_attention_layernorm")),
                gate_up=DenseWeight(leaf(layer_name(i, "mlp.gate_proj"), layer_name(i, "mlp.up_proj"))),
                down=DenseWeight(leaf(layer_name(i, "mlp.down_proj"))),
            )

        table = DenseWeight(leaf(EMBED))
        cos, sin = rope_tables(spec, device=device)
        layers = [layer(i) for i in range(spec.num_layers)]
        self.weights = DecoderWeights(table, layers, leaf(NORM), table, cos, sin)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the working copy and forget the gradients."""
        for part in self.parts:
            row = 0
            for _, master in part.masters:
                part.leaf[row : row + master.shape[0]].copy_(master)
                row += master.shape[0]
            part.leaf.grad = None

    def grads(self) -> dict[str, Tensor]:
        """The gradient of each master: views into the fused gradients."""
        found = {}
        for part in self.parts:
            grad = part.leaf.grad
            assert grad is not None, f"no gradient reached {part.masters[0][0]}"
            row = 0
            for name, master in part.masters:
                found[name] = grad[row : row + master.shape[0]]
                row += master.shape[0]
        return found


class _FusedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of `x W^T`, [T, hidden] and [vocabulary, hidden]; gradients are made on the way forward.

    Only LOSS_CHUNK rows of logits exist at a time (the idea of Liger Kernel, Hsu et al., 2024).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        wide = torch.promote_types(weight.dtype, torch.float32)
        dweight = torch.zeros(weight.shape, dtype=wide, device=x.device)
        dx = []
        for rows, wanted in zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            logits = (rows @ weight.T).to(dweight.dtype)
            logprobs = logits.log_softmax(-1)
            total = total - logprobs.gather(1, wanted[:, None]).sum()
            columns = torch.arange(weight.shape[0], device=x.device)
            dlogits = ((logprobs.exp() - (columns == wanted[:, None]).to(logprobs.dtype)) / len(targets)).to(x.dtype)
            dx.append(dlogits @ weight)
            dweight += dlogits.T @ rows
        ctx.save_for_backward(torch.cat(dx), dweight.to(weight.dtype))
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dweight = ctx.saved_tensors
        return dx * grads[0].to(dx.dtype), dweight * grads[0].to(dweight.dtype), None


class PretrainOps(ReferenceOps):
    """Kernels for equal rows of `length` tokens, whole and causal; `logits` gives the loss against `targets` [T].

    Without targets `logits` gives logits, as everywhere else.
    """

    inplace = False

    def __init__(self, length: int, targets: Tensor | None = None) -> None:
        self.length = length
        self.targets = targets

    def logits(self, weight: Weight, x: Tensor) -> Tensor:
        if self.targets is None:
            return super().logits(weight, x)
        loss: Tensor = _FusedCrossEntropy.apply(x, weight.dequantised(), self.targets)  # type: ignore[no-untyped-call]
        return loss

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, cache: LayerCache | None, window: int | None
    ) -> Tensor:
        """Causal attention; on a CPU ATTENTION_CHUNK queries at a time, so that a compiler can fuse the softmax."""
        assert cache is None and window is None
        q, k, v = (x.unflatten(0, (-1, self.length)).transpose(1, 2) for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if q.is_cuda:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1).flatten(1)
        wide = torch.promote_types(q.dtype, torch.float32)
        chunks = []
        for start in range(0, self.length, ATTENTION_CHUNK):
            stop = min(start + ATTENTION_CHUNK, self.length)
            scores = (q[:, :, start:stop] @ k[:, :, :stop].mT).to(wide) / math.sqrt(q.shape[-1])
            unseen = torch.arange(stop)[None, :] > torch.arange(start, stop)[:, None]
            chunks.append(scores.masked_fill(unseen, float("-inf")).softmax(-1).to(v.dtype) @ v[:, :, :stop])
        return torch.cat(chunks, 2).transpose(1, 2).flatten(0, 1).flatten(1)


def causal_batch(rows: Tensor) -> Batch:
    """All but the last token of rows [B, length + 1] as one flat batch."""
    count, length, device = rows.shape[0], rows.shape[1] - 1, rows.device
    return Batch(
        tokens=rows[:, :-1].flatten(),
        positions=torch.arange(length, device=device).repeat(count),
        query_start=torch.arange(count + 1, dtype=torch.int32, device=device) * length,
        kv_len=torch.full((count,), length, dtype=torch.int32, device=device),
        max_query=length,
        max_kv=length,
    )


def causal_loss(spec: ModelSpec, weights: DecoderWeights, rows: Tensor) -> Tensor:
    """Mean cross entropy (nats a token) of rows [B, length + 1]: each token from those before it in its row."""
    return forward(spec, weights, causal_batch(rows), PretrainOps(rows.shape[1] - 1, rows[:, 1:].flatten()))
