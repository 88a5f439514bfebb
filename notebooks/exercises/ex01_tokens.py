"""Exercise 01: from a rendered dialog to what a step of fine-tuning gets."""


def tokens_and_targets(ids, mask):
    """Two lists, one shorter than `ids`: what the model reads, and what it should say after each of them.

    `ids` and `mask` are those of `Tokenizer.render`: mask is 1 where the assistant wrote the id. A target is
    the id that follows, or -100 (nothing is learned) where the assistant did not write that id.
    """
    raise NotImplementedError
