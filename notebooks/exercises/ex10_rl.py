"""Exercise 10: from rewards to advantages."""


def advantages(rewards, truncated, penalty):
    """The advantage of each answer of a group, a list: its reward, less `penalty` where the answer was cut
    off at its budget (`truncated`, a list of booleans), less the mean of the group, penalties included.
    """
    raise NotImplementedError
