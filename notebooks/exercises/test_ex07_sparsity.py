from kimi_k2 import KimiConfig, count_parameters, gate_factor


def test_same_work_same_size(answer):
    for before in map(KimiConfig.preset, ("tiny", "k2")):
        for m in (1, 2, 4):
            after = answer.finer(before, m)
            assert after.n_routed_experts == m * before.n_routed_experts, "m times as many experts"
            old, new = count_parameters(before), count_parameters(after)
            assert new.routed_experts == old.routed_experts, "as many parameters in routed experts"
            assert new.shared_experts == old.shared_experts, "the shared expert is as wide as before"
            assert new.active - new.router == old.active - old.router, "a token meets as many parameters"


def test_scale_is_computed_anew(answer):
    after = answer.finer(KimiConfig.preset("tiny"), 4)
    assert after.routed_scaling_factor == gate_factor(64, 8), "the scale of the old number of experts"
