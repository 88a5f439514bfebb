import math


def stretched(w, trained, factor):
    turns = w * trained / (2 * math.pi)
    return w.where(turns >= 1, w / factor)


MISTAKES = {  # what the checks have to catch: name: (part of the solution, what stands there instead)
    "radians taken for turns": (" / (2 * math.pi)", ""),
    "fast pairs slowed": ("turns >= 1", "turns < 1"),
    "all slowed (position interpolation)": ("turns >= 1", "turns < 0"),
    "sped up": ("w / factor", "w * factor"),
    "cut at the new length": ("w * trained", "w * factor * trained"),
}
