def choose(logits, bias, k, factor):
    scores = logits.sigmoid()
    chosen = (scores + bias).topk(k, dim=-1).indices
    weights = scores.gather(-1, chosen)
    return chosen, factor * weights / weights.sum(dim=-1, keepdim=True)


def moved(bias, load, u):
    return bias + u * (load.mean() - load).sign()


MISTAKES = {  # what the checks have to catch: name: (part of the solution, what stands there instead)
    "bias in the weights": ("scores.gather", "(scores + bias).gather"),
    "bias not used": ("(scores + bias).topk", "scores.topk"),
    "softmax": ("logits.sigmoid()", "logits.softmax(dim=-1)"),
    "bias on the logits": ("(scores + bias)", "(logits + bias)"),
    "not normalised": (" / weights.sum(dim=-1, keepdim=True)", ""),
    "wrong way": ("load.mean() - load", "load - load.mean()"),
    "step grows with the load": (".sign()", ""),
}
