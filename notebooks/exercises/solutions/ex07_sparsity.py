import dataclasses


def finer(cfg, m):
    return dataclasses.replace(
        cfg,
        n_routed_experts=m * cfg.n_routed_experts,
        num_experts_per_tok=m * cfg.num_experts_per_tok,
        moe_intermediate_size=cfg.moe_intermediate_size // m,
        n_shared_experts=m * cfg.n_shared_experts,  # it is as wide as so many routed ones
        routed_scaling_factor=None,
    )


MISTAKES = {  # what the checks have to catch: name: (part of the solution, what stands there instead)
    "as few chosen": ("num_experts_per_tok=m * cfg", "num_experts_per_tok=cfg"),
    "as wide": ("cfg.moe_intermediate_size // m", "cfg.moe_intermediate_size"),
    "shared expert shrinks": ("n_shared_experts=m * cfg", "n_shared_experts=cfg"),
    "old scale": ("        routed_scaling_factor=None,\n", ""),
}
