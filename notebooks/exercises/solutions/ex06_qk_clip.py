import torch


def qk_clip(q, kv, s_max, tau, nope):
    gamma = torch.where(s_max > tau, tau / s_max, 1.0)[:, None, None]
    root, same = gamma.sqrt(), torch.ones_like(gamma)
    q = torch.cat((q[:, :nope] * root, q[:, nope:] * gamma), dim=1)
    return q, torch.cat((kv[:, :nope] * root, kv[:, nope:] * same), dim=1)


MISTAKES = {  # what the checks have to catch: name: (part of the solution, what stands there instead)
    "one scale for all heads": ("[:, None, None]", ".amin().expand_as(s_max)[:, None, None]"),
    "rotary part by the root": ("q[:, nope:] * gamma", "q[:, nope:] * root"),
    "rotary part forgotten": ("q[:, nope:] * gamma", "q[:, nope:]"),
    "values scaled": ("* same", "* root"),
    "keys forgotten": ("kv[:, :nope] * root", "kv[:, :nope]"),
    "all of it on both sides": ("gamma.sqrt()", "gamma"),
    "small heads raised to tau": ("torch.where(s_max > tau, tau / s_max, 1.0)", "(tau / s_max.abs())"),
    "negative maximum": ("torch.where(s_max > tau, tau / s_max, 1.0)", "(tau / s_max).clamp(max=1.0)"),
}
