import dataclasses
import math

import torch

from kimi_k2 import KimiConfig, rope_frequencies


def test_by_hand(answer):
    once = 2 * math.pi / 100  # a full turn in 100 tokens
    w = torch.tensor([10 * once, 1.5 * once, 0.5 * once, 0.01 * once])
    given = answer.stretched(w, 100, 4.0)
    torch.testing.assert_close(given[:2], w[:2], msg="pairs that turn 10 and 1.5 times keep their speed")
    torch.testing.assert_close(given[2:], w[2:] / 4, msg="pairs that turn less than once go 4 times slower")


def test_as_published(answer):
    k2 = KimiConfig.preset("k2")
    plain, _ = rope_frequencies(dataclasses.replace(k2, rope_scaling=None))
    yarn, _ = rope_frequencies(k2)
    given = answer.stretched(plain, 4096, 32.0)
    kept = int((given == plain).sum())
    assert kept == 20, f"K2 keeps 20 of its 32 pairs, here are {kept}"
    torch.testing.assert_close(given, yarn, msg="other frequencies than kimi_k2.rope_frequencies gives")
