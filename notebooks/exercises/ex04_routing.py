"""Exercise 04: the router's choice, and the bias that keeps experts busy."""


def choose(logits, bias, k, factor):
    """Experts (N, k) and their weights (N, k) of tokens with router logits (N, E).

    Scores are sigmoids of the logits. The k experts with the largest score plus bias (E,) are chosen; their
    weights are proportional to the scores alone and add up to `factor`.
    """
    raise NotImplementedError


def moved(bias, load, u):
    """The biases (E,) after a step in which the experts read `load` (E,) tokens: those that read more than
    the mean lose u, those that read less gain u."""
    raise NotImplementedError
