"""The Triton attention against the reference that simulates it, and inside of a denoiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reelquant.clock import Clock
from reelquant.kernels import attention as table
from reelquant.kernels import cuda
from reelquant.kernels.attention import REFERENCE, STOCK, AttentionQuant
from reelquant.kernels.cuda import scores
from reelquant.nn import attention_facts, round_attention, start_clock
from reelquant.nn.around.attention import PROTECTED
from tests.contracts.attention_oracle import DEVICE, make
from tests.tiny.configs import TINY
from tests.tiny.pipelines import call

pytestmark = pytest.mark.skipif(cuda.available() is not None, reason=str(cuda.available()))
KERNEL = table.ROUNDED["cuda"]()


@pytest.mark.parametrize("values", ["float", "e4m3"])
@pytest.mark.parametrize("shape", [(1, 2, 45, 75, 64), (2, 1, 33, 20, 128), (1, 1, 1, 1, 64), (1, 2, 40, 77, 40)])
def test_the_reference_simulates_the_kernel(shape: Any, values: Any) -> None:
    """Codes are the same but for values between two of them; the kernel rounds weights to bfloat16 (2^-9), or both ways to e4m3 with the
    largest score so far, where the reference takes the largest of all (2^-4, uniform errors)."""
    q, k, v = make(*shape)
    numbers = AttentionQuant(values=values)
    assert KERNEL.refuses(q, k, v, numbers) is None and KERNEL.missing(numbers) is None
    found, expected = (kernel.attention(q, k, v, None, numbers, None) for kernel in (KERNEL, REFERENCE))
    assert found.shape == expected.shape and found.dtype == expected.dtype and found.stride() == expected.stride()
    assert float((found - expected).float().norm() / expected.float().norm()) < (2**-5 if values == "e4m3" else 2**-8)


@pytest.mark.parametrize("values", ["float", "e4m3"])
@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_masks_over_keys(lead: tuple[int, int], values: Any) -> None:
    """Padded texts, a bias per head, and whole tiles of masked keys, the first among them."""
    q, k, v = make(2, 3, 33, 75, 64)
    seen = torch.rand(*lead, 1, 75, device=DEVICE) > 0.3
    seen[..., :40] = False
    for mask in (seen, torch.randn(*lead, 1, 75, device=DEVICE).masked_fill(~seen, -torch.inf)):
        numbers = AttentionQuant(values=values)
        found, expected = (kernel.attention(q, k, v, None, numbers, mask).float() for kernel in (KERNEL, REFERENCE))
        exact = STOCK(q.double(), k.double(), v.double(), mask.double() if mask.is_floating_point() else mask)
        assert not found.isnan().any() and float((found - expected).norm() / expected.norm()) < (2**-5 if values == "e4m3" else 2**-7)
        assert float((found - exact).norm() / exact.norm()) < 0.06


@pytest.mark.skipif(DEVICE == "cuda", reason="the inputs of call() lie on the CPU")
def test_a_denoiser_gets_the_kernel_and_protected_steps_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.ROUNDED, DEVICE, lambda: KERNEL)
    model = TINY["WanTransformer3DModel"]().eval()
    start_clock(model, Clock((900.0, 500.0), (0,)), "timestep")
    round_attention(model, AttentionQuant())
    attentions = 2 * len(model.blocks)  # type: ignore[arg-type]
    call(model, 500.0)
    found = attention_facts(model)
    assert found is not None and found.kernel == "triton int8 attention" and not found.simulated
    assert found.calls == {"stock: float32, neither bfloat16 nor float16": attentions}
    monkeypatch.setitem(table.ROUNDED, DEVICE, lambda: in_bfloat16(KERNEL))
    round_attention(model, AttentionQuant())
    outputs = [call(model, time) for time in (900.0, 500.0)]
    found = attention_facts(model)
    assert found is not None and found.calls == {PROTECTED: attentions, KERNEL.name: attentions}
    round_attention(model, None)
    exact = [call(model, time) for time in (900.0, 500.0)]
    assert torch.equal(outputs[0], exact[0]) and not torch.equal(outputs[1], exact[1])
    torch.testing.assert_close(outputs[1], exact[1], rtol=0.05, atol=0.05)


def in_bfloat16(kernel: table.RoundedKernel) -> table.RoundedKernel:
    """The kernel on bfloat16 copies of what a float32 denoiser gives."""

    def attention(q: Any, k: Any, v: Any, scale: Any, numbers: Any, mask: Any = None) -> Any:
        return kernel.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale, numbers, mask).to(q.dtype)

    def refuses(q: Any, k: Any, v: Any, numbers: Any) -> str | None:
        return kernel.refuses(q.bfloat16(), k.bfloat16(), v.bfloat16(), numbers)

    return table.RoundedKernel(kernel.name, scores.missing, refuses, attention)
