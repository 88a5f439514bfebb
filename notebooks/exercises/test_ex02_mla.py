import torch
from torch.utils._python_dispatch import TorchDispatchMode

T, S, H, NOPE, ROPE, R = 2, 50, 3, 24, 4, 8
g = torch.Generator().manual_seed(0)
Q_NOPE, Q_ROPE = torch.randn(T, H, NOPE, generator=g), torch.randn(T, H, ROPE, generator=g)
W_UK = torch.randn(H, NOPE, R, generator=g)
C_KV, K_ROPE = torch.randn(S, R, generator=g), torch.randn(S, ROPE, generator=g)


class Largest(TorchDispatchMode):
    """Watches how many numbers the largest tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_same_numbers_as_with_keys(answer):
    scores = answer.absorbed_scores(Q_NOPE, Q_ROPE, W_UK, C_KV, K_ROPE, 0.2)
    for h in range(H):
        keys = torch.cat((C_KV @ W_UK[h].T, K_ROPE), dim=1)  # (S, nope + rope)
        expected = 0.2 * torch.cat((Q_NOPE[:, h], Q_ROPE[:, h]), dim=1) @ keys.T
        torch.testing.assert_close(scores[:, h], expected, msg=f"head {h}: other scores than with its keys")


def test_makes_no_keys(answer):
    with Largest() as largest:
        answer.absorbed_scores(Q_NOPE, Q_ROPE, W_UK, C_KV, K_ROPE, 0.2)
    assert largest.numbers < S * H * NOPE, (
        f"a tensor of {largest.numbers} numbers was made; the keys of all heads are {S * H * NOPE}")
