"""The base's own tensors, for adapter kinds whose normal form depends on them (DoRA, trained biases). No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from lorikeet.adapters.files import Array
from lorikeet.adapters.safefile import SafeFile
from lorikeet.adapters.stored import Tensor, open_tensors
from lorikeet.errors import AdapterError, ModelError

_MAX_HEADER = 100 * 2**20  # what safetensors itself allows


class BaseTensors:
    """Tensors of a checkpoint by published name, dequantised where they are stored so: those of its safetensors files,
    which are mapped when the first one is needed, or open ones."""

    def __init__(self, files: Sequence[Path], tensors: Mapping[str, Tensor] | None = None) -> None:
        self._paths = files
        self._tensors = tensors

    def weight(self, module: str) -> Array:
        """[d_out, d_in] fp32. Raises AdapterError where the base has none."""
        found = self._tensor(f"{module}.weight")
        if found is None:
            raise AdapterError(f"{module}: the base has no such weight, which this kind of adapter needs", param=module)
        return found

    def bias(self, module: str) -> Array | None:
        """[d_out] fp32, None where the layer has none."""
        return self._tensor(f"{module}.bias")

    def _tensor(self, name: str) -> Array | None:
        if self._tensors is None:
            with ExitStack() as stack:
                opened = (SafeFile(path, error=ModelError, max_header=_MAX_HEADER) for path in self._paths)
                self._tensors = open_tensors([stack.enter_context(file) for file in opened])
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        return tensor.rows(0, tensor.shape[0]).reshape(tensor.shape).astype(np.float32, copy=False)
