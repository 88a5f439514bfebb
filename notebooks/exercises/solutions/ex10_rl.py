def advantages(rewards, truncated, penalty):
    paid = [reward - penalty * cut for reward, cut in zip(rewards, truncated)]
    return [value - sum(paid) / len(paid) for value in paid]


MISTAKES = {  # what the checks have to catch: name: (part of the solution, what stands there instead)
    "penalty is a reward": ("reward - penalty", "reward + penalty"),
    "mean without penalties": ("sum(paid) / len(paid)", "sum(rewards) / len(rewards)"),
    "no baseline": ("value - sum(paid) / len(paid)", "value"),
    "divided by the deviation": ("value - sum(paid) / len(paid)",
                                 "(value - sum(paid) / len(paid)) / (max(paid) - min(paid) + 1e-9)"),
}
