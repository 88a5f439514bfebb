import random

import pytest
import torch

import train


def test_by_hand(answer):
    found = answer.advantages([1.0, 0.0, 0.0, 1.0], [False] * 4, 0.5)
    assert found == pytest.approx([0.5, -0.5, -0.5, 0.5])
    found = answer.advantages([1.0, 0.0, 0.0], [False, False, True], 0.5)
    assert found == pytest.approx([5 / 6, -1 / 6, -4 / 6]), "the penalty lowers the group's mean too"
    assert answer.advantages([1.0, 1.0], [False, False], 0.5) == [0, 0], "nothing to learn from equal answers"


def test_a_group_pulls_nowhere_on_the_whole(answer):
    rng = random.Random(0)
    for _ in range(20):
        rewards = [rng.random() for _ in range(8)]
        found = answer.advantages(rewards, [rng.random() < 0.3 for _ in rewards], 0.5)
        assert sum(found) == pytest.approx(0, abs=1e-9)


def test_in_the_objective(answer):
    """At pi = pi_old the loss falls fastest where the better answers become likelier."""
    found = torch.tensor(answer.advantages([0.9, 0.1, 0.4], [False, False, False], 0.5))
    logp = torch.zeros(3, requires_grad=True)
    train.policy_loss(logp, torch.zeros(3), found, tau=1.0).backward()
    assert torch.allclose(-logp.grad / 2, torch.tensor([1.3, -1.1, -0.2]) / 3, atol=1e-6)
