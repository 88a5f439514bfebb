"""Exercise 05: Muon's update of one matrix."""


def muon_update(M):
    """What Muon subtracts from W for each unit of learning rate, given the momentum M (n, m), without decay.

    Divide M by its Frobenius norm; then five times, with A = X X^T:  X <- a X + (b A + c A A) X,
    (a, b, c) = (3.4445, -4.7750, 2.0315); then the factor 0.2 sqrt(max(n, m)). For a tall matrix work on the
    transpose, so that A is the smaller of the two Gram matrices.
    """
    raise NotImplementedError
