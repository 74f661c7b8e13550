"""The scales of an fp8 key-value cache: what is held, times its head's scale, is the key or the value.

fp8 (e4m3) holds numbers up to 448, and down to 2 ** -6 all of them with the same relative error. So a scale has to keep
the largest numbers within reach, and room above them costs nothing. What lies beyond all the same is held as the
largest number there is, never as NaN (`kernels.gpu_rows.stored`).

A quantiser may have left scales in the checkpoint (`of_checkpoint`). Without them they are found when the engine
starts, by a pass over fixed tokens: 1.0 would do for most models, and cut off the keys of others. The pass is made in
either case, since it shows what no scale can help: keys that differ by less than what fp8 rounds off, as they do where
the key projection has a large bias. Such a model is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor

from lorikeet.errors import ConfigError, ModelError
from lorikeet.kernels.batch import Batch, LayerCache
from lorikeet.model.decoder import DecoderWeights, Ops, forward
from lorikeet.model.names import layer_module
from lorikeet.model.shard import Shard
from lorikeet.model.spec import ModelSpec

log = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
TOKENS = 1024  # of the pass, at most
ROW = 256  # tokens of one of its sequences
ROOM = 4.0  # times the largest number seen stay within reach: other texts, and adapters, have larger ones
MOST = 0.25  # of a head's attention may be what fp8 has changed: rounding alone makes some hundredths
_STEP = 2654435761  # a prime: its multiples, modulo the size of any vocabulary, are spread over all of it

Scales = tuple[Tensor, Tensor]  # of one layer's keys and values, [kv_heads] fp32 each, on the CPU


@torch.inference_mode()
def find_scales(
    spec: ModelSpec, weights: DecoderWeights, ops: Ops, most_tokens: int, device: torch.device | str = "cpu"
) -> list[Scales]:
    """Scales by layer: those of the checkpoint, else such that `ROOM` times the largest keys and values of the base
    stay within reach, for `TOKENS` fixed tokens (or `most_tokens`). These are powers of two, so that dividing by them
    rounds nothing, and depend on the model alone.

    Every rank of a model finds those of its own heads, and all must call this together. Raises ConfigError, on all
    of them, where attention over what fp8 holds of these tokens is not what it should be.
    """
    noting = _Noting(ops, weights.cache_scales)
    forward(spec, weights, _batch(spec, min(TOKENS, most_tokens), device), cast(Ops, noting))
    changed = torch.stack(noting.changed)
    ranks = 1 if noting.ranks is None else noting.ranks.count
    _check(ops.gather(changed, changed.shape[1] * ranks))
    return noting.scales


def _check(changed: Tensor) -> None:
    """`changed` [layers, heads]: how much of a head's attention is not what it is without fp8."""
    changed = changed.nan_to_num(nan=torch.inf)
    worst = int(changed.argmax())
    layer, head = divmod(worst, changed.shape[1])
    share = float(changed.flatten()[worst])
    if share > MOST:
        raise ConfigError(
            f"kv_cache_dtype: found fp8, which changes the attention of head {head} in layer {layer} of this model by "
            f"{share:.0%}; expected at most {MOST:.0%}",
            hint="leave --kv-cache-dtype out: keys or values are beyond the scales, or too alike for three bits",
            param="kv_cache_dtype",
        )
    log.info("fp8 keys and values change attention by %.1f%% (head %d, layer %d) at most", 100 * share, head, layer)


class _Noting:
    """Kernels that find each layer's scales, unless they are given, and note what fp8 changes with them."""

    def __init__(self, ops: Ops, given: list[Scales] | None) -> None:
        self._ops, self._given = ops, given
        self.scales: list[Scales] = []
        self.changed: list[Tensor] = []  # [heads] by layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: LayerCache | None,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        if self._given is None:
            self.scales.append((_scale(_reach(k)), _scale(v.float().abs().amax((0, 2)))))
        else:
            self.scales.append(self._given[len(self.scales)])
        q, k = self.rope(q, cos, sin), self.rope(k, cos, sin)
        plain = self.attention(q, k, v, batch, cache, window)
        held = [_rounded(rows, scale.to(rows.device)) for rows, scale in zip((k, v), self.scales[-1], strict=True)]
        off = self.attention(q, *held, batch, cache, window).float() - plain.float()
        by_head = [(part.float().unflatten(1, q.shape[1:]) ** 2).sum((0, 2)) for part in (off, plain)]
        self.changed.append((by_head[0] / by_head[1].clamp(min=1e-30)).sqrt())
        return cast(Tensor, plain)


def _rounded(rows: Tensor, scale: Tensor) -> Tensor:
    """Keys or values [T, kv_heads, head_dim] as they come out of the cache."""
    held = (rows.float() / scale[:, None]).clamp(-LARGEST, LARGEST).to(FP8)
    return (held.float() * scale[:, None]).to(rows.dtype)


def _reach(k: Tensor) -> Tensor:
    """How large a number of a key may be at any position: [T, kv_heads, head_dim] -> [kv_heads]. A position turns each
    pair of numbers, which keeps the length of the pair."""
    first, second = k.float().chunk(2, dim=-1)
    return torch.hypot(first, second).amax((0, 2))


def _scale(largest: Tensor) -> Tensor:
    """With which `ROOM` times these numbers [kv_heads] are held; 1 where nothing is known of them."""
    known = torch.isfinite(largest) & (largest > 0)
    _, exponent = torch.frexp(torch.where(known, largest * (ROOM / LARGEST), 0.5).cpu())  # below 2 ** exponent
    return torch.ldexp(torch.ones(len(exponent)), exponent)


def _batch(spec: ModelSpec, count: int, device: torch.device | str) -> Batch:
    """Sequences of `ROW` tokens and a rest, `count` tokens in all."""
    row = min(ROW, spec.max_context)
    at = torch.arange(count)
    start = torch.tensor([*range(0, count, row), count], dtype=torch.int32)
    longest = min(count, row)
    return Batch(
        tokens=(at * _STEP % spec.vocab_size).to(device),
        positions=(at % row).to(device),
        query_start=start.to(device),
        kv_len=start.diff().to(device),
        max_query=longest,
        max_kv=longest,
        logit_rows=torch.tensor([count - 1], device=device),
    )


# --- in a checkpoint ----------------------------------------------------------------------------------------------


def stored_names(spec: ModelSpec) -> list[tuple[str, str]]:
    """The tensors of a checkpoint that are scales, by layer, as llm-compressor writes and vLLM reads them."""
    modules = [layer_module(layer, "self_attn") for layer in range(spec.num_layers)]
    return [(f"{module}.k_scale", f"{module}.v_scale") for module in modules]


def of_checkpoint(names: Collection[str], read: Callable[[str], Tensor], shard: Shard) -> list[Scales] | None:
    """The scales by layer that a quantiser left in a checkpoint, those of this rank's heads; None: there are none.

    `names` are the checkpoint's tensors, `read` gives one as it lies: one number for all heads, or one for each.
    Raises ModelError where some are missing, of another shape, or not above zero.
    """
    layers = stored_names(shard.whole)
    wanted = [name for pair in layers for name in pair]
    missing = [name for name in wanted if name not in names]
    if len(missing) == len(wanted):
        return None
    if missing:
        raise ModelError(
            f"tensor {missing[0]} is missing ({len(missing)} of {len(wanted)} scales of the key-value cache)",
            hint="a checkpoint has the scales of all its layers, or none",
            param=missing[0],
        )
    return [(_read_scale(k, read(k), shard), _read_scale(v, read(v), shard)) for k, v in layers]


def _read_scale(name: str, stored: Tensor, shard: Shard) -> Tensor:
    heads = shard.whole.num_kv_heads
    scale = stored.float().flatten()
    if len(scale) not in (1, heads):
        raise ModelError(f"{name}: expected 1 number or {heads}, one for each head, found {len(scale)}", param=name)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ModelError(f"{name}: expected numbers above zero, found {scale.tolist()}", param=name)
    width = shard.whole.head_dim
    mine = shard.outputs("k")
    first, end = (mine.start or 0) // width, (heads * width if mine.stop is None else mine.stop) // width
    return scale.expand(heads)[first:end].contiguous()
