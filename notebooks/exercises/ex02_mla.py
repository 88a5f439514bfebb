"""Exercise 02: attention to latents, without making keys."""


def absorbed_scores(q_nope, q_rope, w_uk, c_kv, k_rope, scale):
    """What the softmax reads, (T, H, S), before any mask.

    q_nope (T, H, nope), q_rope (T, H, rope)   the queries' parts without and with position
    w_uk (H, nope, R)                          makes head h's key from a latent: w_uk[h] @ c
    c_kv (S, R), k_rope (S, rope)              the cache: latents, and the rotary keys that all heads share

    No tensor on the way may be as large as the keys of all heads, S * H * nope numbers.
    """
    raise NotImplementedError
