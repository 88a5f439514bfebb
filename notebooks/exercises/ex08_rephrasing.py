"""Exercise 08: the smallest fidelity check, numbers alone."""


def lost_and_added(source, text):
    """Two sets of numbers, as strings: those that `source` has and `text` lacks, and those that `text` has
    and `source` lacks. "twelve" is the number 12, and "1,200" is 1200: `train.in_digits(text)` writes both in
    digits. A point between digits belongs to the number (2.5), at its end it does not.
    """
    raise NotImplementedError
