"""The engine as its process offers it: what a ready one says of itself, and what its loader compiles for."""

from __future__ import annotations

from lorikeet.engine.engine import Engine
from lorikeet.engine.wire import EngineInfo, LoaderSettings
from lorikeet.model.sources import cache_folder, checkpoint_files, find_model
from lorikeet.model.spec import ModelSpec


class HostedEngine(Engine):
    """An `Engine` that introduces itself over the wire."""

    def info(self) -> EngineInfo:
        return EngineInfo(
            family=self.spec.family,
            dtype=_name(self.sizes.dtype),
            device=self.sizes.device,
            max_context=self.max_context,
            vocab_size=self.spec.vocab_size,
            base=self.base,
            parameters=parameter_count(self.spec),
            kv_bytes=self.sizes.kv_bytes,
            kv_tokens=self.sizes.blocks * self.config.block_size,
            slab_bytes=self.sizes.slab_bytes,
            adapter_dtype=_name(self.sizes.adapter_dtype),
        )

    def loader_settings(self) -> LoaderSettings:
        return LoaderSettings(
            spec=self.spec,
            base=self.base,
            dtype=self.sizes.adapter_dtype_name,
            cache=str(cache_folder() / "compiled"),
            allow_lock_mismatch=self.config.allow_lock_mismatch,
            model=str(find_model(self.config.model)),
            checkpoint=tuple(map(str, checkpoint_files(find_model(self.config.model)))),
            disk=self.config.adapter_disk,
            ranks=self.config.tensor_parallel,
        )


def parameter_count(spec: ModelSpec) -> int:
    """Numbers in the checkpoint: all linear layers and norms; a tied head counts once."""
    linear = sum(site.d_in * site.d_out for site in spec.sites)
    if spec.tie_embeddings:
        linear -= spec.vocab_size * spec.hidden_size
    norms = (2 * spec.num_layers + 1) * spec.hidden_size
    if spec.qk_norm:
        norms += 2 * spec.num_layers * spec.head_dim
    biases = spec.num_layers * (
        spec.qkv_bias * (spec.q_size + 2 * spec.kv_size)
        + spec.o_bias * spec.hidden_size
        + spec.mlp_bias * (2 * spec.intermediate_size + spec.hidden_size)
    )
    return linear + norms + biases


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
