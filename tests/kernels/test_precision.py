"""Which dtype is chosen, and products with bf16 factors."""

import pytest
import torch

from lorikeet.kernels import precision
from lorikeet.kernels.precision import bf16_products, choose_dtype


def test_bf16_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, dtype in (({"avx2"}, torch.float32), ({"avx512_bf16"}, torch.bfloat16), ({"bf16"}, torch.bfloat16)):
        monkeypatch.setattr(precision, "_cpu_flags", lambda flags=flags: flags)
        assert choose_dtype("auto") == dtype
        assert choose_dtype("bfloat16") == torch.bfloat16


def test_products_of_bf16_values_are_exact_and_the_setting_is_taken_back() -> None:
    a, b = (torch.randn(64, 48, generator=torch.Generator().manual_seed(i)).bfloat16().float() for i in range(2))
    with bf16_products():
        product = a @ b.T
    assert torch.allclose(product, (a.double() @ b.double().T).float(), rtol=1e-5, atol=1e-5)
    wide = a + 1e-4
    assert torch.allclose(wide @ b.T, (wide.double() @ b.double().T).float(), rtol=1e-5, atol=1e-5)
