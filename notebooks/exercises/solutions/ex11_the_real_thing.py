import math

from kimi_k2 import count_parameters


def gpus_to_serve(cfg, users, tokens, gib=80.0):
    n = count_parameters(cfg)
    needed = n.total + users * tokens * n.cache_bytes_per_token()
    return math.ceil(needed / (0.9 * gib * 2**30))


MISTAKES = {  # what the checks have to catch: name: (part of the solution, what stands there instead)
    "active parameters alone": ("n.total", "n.active"),
    "weights in bf16": ("n.total", "2 * n.total"),
    "one user": ("users * tokens", "tokens"),
    "GB for GiB": ("2**30", "10**9"),
    "rounded down": ("math.ceil", "math.floor"),
    "nothing kept free": ("0.9 * gib", "gib"),
}
