"""Exercise 06: QK-Clip for the weights of one attention layer."""


def qk_clip(q, kv, s_max, tau, nope):
    """New (q, kv): each head whose s_max (H,) exceeds tau is scaled down, the others stay as they are.

    q (H, nope + rope, in)   a head's query weights: first the rows without position, then the rotary ones
    kv (H, nope + v, R)      a head's key weights without position, then its value weights

    The logits of a clipped head must shrink by tau / s_max, all parts of them alike. The rotary key is shared
    by all heads and is not among the arguments. s_max may be negative; then nothing is to be done.
    """
    raise NotImplementedError
