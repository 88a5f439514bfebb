def tokens_and_targets(ids, mask):
    return ids[:-1], [i if said else -100 for i, said in zip(ids[1:], mask[1:])]


MISTAKES = {  # what the checks have to catch: name: (part of the solution, what stands there instead)
    "mask not shifted": ("mask[1:]", "mask[:-1]"),
    "targets not shifted": ("ids[1:]", "ids[:-1]"),
    "everything is learned": ("if said else -100", ""),
    "last token read": ("return ids[:-1]", "return ids"),
}
