"""Exercise 11: how many GPUs does it take?"""


def gpus_to_serve(cfg, users, tokens, gib=80.0):
    """The fewest GPUs of `gib` GiB that hold the weights, one byte each, and the bf16 caches of `users`
    sessions of `tokens` tokens. A tenth of each GPU is kept free. `kimi_k2.count_parameters(cfg)` has what
    you need.
    """
    raise NotImplementedError
