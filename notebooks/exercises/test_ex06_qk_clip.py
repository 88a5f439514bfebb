import torch

from kimi_k2 import MLA, KimiConfig, rope_frequencies, rope_table

CFG = KimiConfig.preset("nano", num_attention_heads=4)
TAU = 5.0


def layer_and_input():
    torch.manual_seed(0)
    layer = MLA(CFG).requires_grad_(False)
    for linear in (layer.q_b_proj, layer.kv_b_proj):  # heads of different size
        heads = linear.weight.view(CFG.num_attention_heads, -1, linear.in_features)
        heads *= torch.tensor([1.0, 4.0, 6.0, 8.0])[:, None, None]
    return layer, torch.randn(2, 20, CFG.hidden_size)


def maxima(layer, x):
    rotary = rope_table(torch.arange(x.shape[1]), *rope_frequencies(CFG))
    return layer(x, rotary, record=True)[1]  # (H,)


def heads_of(layer):
    H = CFG.num_attention_heads
    return (layer.q_b_proj.weight.view(H, -1, layer.q_b_proj.in_features),
            layer.kv_b_proj.weight.view(H, -1, CFG.kv_lora_rank))


def test_clipped_heads_end_at_tau(answer):
    layer, x = layer_and_input()
    before, (q, kv) = maxima(layer, x), heads_of(layer)
    assert before[0] < TAU < before[1:].min(), "the check itself is broken"
    new_q, new_kv = answer.qk_clip(q.clone(), kv.clone(), before, TAU, CFG.qk_nope_head_dim)
    unchanged = torch.equal(new_q[0], q[0]) and torch.equal(new_kv[0], kv[0])
    assert unchanged, "head 0 is below tau and must not change"
    values = slice(CFG.qk_nope_head_dim, None)
    assert torch.equal(new_kv[:, values], kv[:, values]), "values are no part of the logits"
    q.copy_(new_q)
    kv.copy_(new_kv)
    after = maxima(layer, x)
    torch.testing.assert_close(after[1:], torch.full((3,), TAU), rtol=1e-4, atol=1e-4,
                               msg=f"the same input gives {after[1:].tolist()}, it should give tau = {TAU}")


def test_negative_maximum_is_left_alone(answer):
    q, kv = torch.ones(2, 6, 3), torch.ones(2, 7, 3)
    new_q, new_kv = answer.qk_clip(q.clone(), kv.clone(), torch.tensor([-0.5, 2 * TAU]), TAU, 4)
    unchanged = torch.equal(new_q[0], q[0]) and torch.equal(new_kv[0], kv[0])
    assert unchanged, "a head with s_max -0.5 must not change"
    assert new_q[1].max() < 1
