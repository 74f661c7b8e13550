"""The base's own tensors, for adapter kinds whose normal form depends on them (DoRA, trained biases). No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorikeet.adapters.files import Array, decode
from lorikeet.adapters.safefile import SafeFile, TensorEntry
from lorikeet.errors import AdapterError, ModelError


class BaseTensors:
    """Tensors of a checkpoint's safetensors files by published name; a file is mapped when it is first needed."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._paths = files
        self._places: dict[str, tuple[TensorEntry, memoryview]] | None = None

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
        if self._places is None:
            self._places = {}
            for path in self._paths:
                with SafeFile(path, error=ModelError, max_header=100 * 2**20) as file:
                    data = file.map()
                self._places |= {key: (entry, data) for key, entry in file.entries.items()}
        if name not in self._places:
            return None
        entry, mapped = self._places[name]
        return np.asarray(decode(entry, mapped[entry.start : entry.stop]), np.float32)
