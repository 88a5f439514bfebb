import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_k2 import newton_schulz

SHAPES = ((16, 16), (12, 40), (40, 12))
G = torch.Generator().manual_seed(0)
MATRICES = {shape: torch.randn(shape, generator=G) @ torch.diag(torch.logspace(0, -1, shape[1])) * 7
            for shape in SHAPES}


class Largest(TorchDispatchMode):
    """Watches how many numbers the largest tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_singular_values(answer):
    for shape, M in MATRICES.items():
        update = answer.muon_update(M)
        assert update.shape == M.shape, f"an update of {shape} has shape {tuple(update.shape)}"
        assert update.isfinite().all(), f"{shape}: not a number; is no singular value above one at the start?"
        s = torch.linalg.svdvals(update / (0.2 * math.sqrt(max(shape))))
        assert 0.6 < s.min() and s.max() < 1.25, f"{shape}: singular values {s.min():.2f} to {s.max():.2f}"


def test_size(answer):
    for shape, M in MATRICES.items():
        rms = answer.muon_update(M).square().mean().sqrt().item()
        assert rms == pytest.approx(0.2, rel=0.25), f"{shape}: RMS {rms:.3f}, AdamW's is about 0.2"


def test_as_in_the_optimizer(answer):
    for shape, M in MATRICES.items():
        ours = newton_schulz(M) * 0.2 * math.sqrt(max(shape))
        torch.testing.assert_close(answer.muon_update(M), ours, atol=1e-4, rtol=1e-3,
                                   msg=f"{shape}: other numbers than kimi_k2.newton_schulz gives")


def test_tall_matrices_cost_no_more(answer):
    with Largest() as largest:
        answer.muon_update(MATRICES[40, 12])
    assert largest.numbers <= 40 * 12, "a tall matrix has the smaller Gram matrix when it is transposed"
