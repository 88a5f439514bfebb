import torch

from kimi_k2 import KimiConfig, Router

G = torch.Generator().manual_seed(0)
LOGITS, BIAS = 3 * torch.randn(40, 8, generator=G), torch.randn(8, generator=G) / 5


def by_expert(chosen, weights):
    return torch.zeros(len(chosen), 8).scatter_(1, chosen, weights)


def test_by_hand(answer):
    logits = torch.tensor([[0.0, 1.0, 2.0]])  # scores 0.50, 0.73, 0.88
    chosen, weights = answer.choose(logits, torch.tensor([0.5, 0.0, 0.0]), 2, 3.0)
    assert set(chosen[0].tolist()) == {0, 2}, "0.50 + 0.5 and 0.88 are the largest scores plus bias"
    torch.testing.assert_close(weights.sum(), torch.tensor(3.0), msg="the weights must add up to the factor")
    assert abs(by_expert(torch.cat((chosen, chosen)), torch.cat((weights, weights)))[0, 0] - 1.0863) < 1e-3, (
        "expert 0 weighs 3 * 0.50 / (0.50 + 0.88): from the scores alone")


def test_as_in_the_model(answer):
    router = Router(KimiConfig.preset("nano"))
    router.e_score_correction_bias.copy_(BIAS)
    ours = by_expert(*router.choose(LOGITS.sigmoid()))
    given = by_expert(*answer.choose(LOGITS, BIAS, 2, router.factor))
    torch.testing.assert_close(given, ours, msg="other experts or weights than kimi_k2.Router gives")


def test_bias_moves(answer):
    bias = answer.moved(torch.zeros(4), torch.tensor([40.0, 10.0, 25.0, 25.0]), 0.01)
    assert bias[0] < 0 < bias[1], "who read more than the mean must become less likely"
    expected = torch.tensor([-0.01, 0.01, 0.0, 0.0])
    torch.testing.assert_close(bias, expected, msg="a step has the size u, or none")
