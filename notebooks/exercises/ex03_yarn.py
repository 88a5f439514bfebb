"""Exercise 03: YaRN's frequencies, with K2's hard cut."""


def stretched(w, trained, factor):
    """RoPE's angles per position w (pairs,) for a context `factor` times longer than `trained` tokens.

    Pairs that turn at least once within the trained length keep their w, the others turn `factor` times
    slower.
    """
    raise NotImplementedError
