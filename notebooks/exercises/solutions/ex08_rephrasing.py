import re

import train


def lost_and_added(source, text):
    old, new = (set(re.findall(r"\d+(?:\.\d+)*", train.in_digits(part))) for part in (source, text))
    return old - new, new - old


MISTAKES = {  # what the checks have to catch: name: (part of the solution, what stands there instead)
    "words are no numbers": ("train.in_digits(part)", "part"),
    "points cut numbers": (r"(?:\.\d+)*", ""),
    "the end of a sentence is a part": (r"(?:\.\d+)*", r"[.\d]*"),
    "wrong way round": ("return old - new, new - old", "return new - old, old - new"),
    "what was added is not seen": ("new - old\n", "set()\n"),
}
