import torch


def absorbed_scores(q_nope, q_rope, w_uk, c_kv, k_rope, scale):
    q_latent = torch.einsum("thn,hnr->thr", q_nope, w_uk)  # W_UK^T q
    return (q_latent @ c_kv.T + q_rope @ k_rope.T) * scale


MISTAKES = {  # what the checks have to catch: name: (part of the solution, what stands there instead)
    "keys are made": (
        'q_latent @ c_kv.T', 'torch.einsum("thn,shn->ths", q_nope, torch.einsum("hnr,sr->shn", w_uk, c_kv))'
    ),
    "position left out": ("+ q_rope @ k_rope.T", ""),
    "position not scaled": ("(q_latent @ c_kv.T + q_rope @ k_rope.T) * scale",
                            "q_latent @ c_kv.T * scale + q_rope @ k_rope.T"),
    "one head's matrix for all": ("w_uk)", "w_uk[:1].expand_as(w_uk))"),
}
