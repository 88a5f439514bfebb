import torch

import train
from kimi_k2 import Tokenizer

DIALOG = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."},
          {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bo, too."}]


def test_by_hand(answer):
    tokens, targets = answer.tokens_and_targets([5, 6, 7, 8, 9], [0, 0, 1, 1, 0])
    assert list(tokens) == [5, 6, 7, 8], "the model reads all ids but the last"
    assert list(targets) == [-100, 7, 8, -100], "after 6 comes 7, which the assistant wrote: that is learned"


def test_as_in_fine_tuning(answer):
    tok = Tokenizer.train("", 512)
    tokens, targets = answer.tokens_and_targets(*tok.render(DIALOG))
    ours = train.padded([{"messages": DIALOG}], tok, "cpu")
    assert torch.equal(torch.tensor([tokens]), ours[0]), "other tokens than train.padded gives"
    assert torch.equal(torch.tensor([targets]), ours[1]), "other targets than train.padded gives"
