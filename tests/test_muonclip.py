"""MuonClip against torch.optim.Muon and AdamW, naive float64 formulas and the naive S_max."""

import copy
import math
import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
from runs import CONTEXT
from test_model import VARIANTS, ids, moes, naive_attention, naive_max_logits, nano, off, seen_by

from kimi_k2 import KimiConfig, KimiK2, MuonClip, count_parameters, newton_schulz

# the rule of Moonlight, written a second time: these go to AdamW, all others to Muon
BY_ADAMW = r"model\.embed_tokens\.weight|lm_head\.weight|.*norm\.weight"


def is_muon(name):
    return not re.fullmatch(BY_ADAMW, name)


def matrices(t):
    """A matrix as a stack of one, a layer's experts as a stack of E."""
    return t.detach().reshape(-1, *t.shape[-2:])


def set_random_gradients(model, seed):
    """Gradients of sizes from 1e-4 to 1: Muon's update must not depend on them."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        size = 10 ** (-4 * torch.rand(1, generator=g).item())
        p.grad = size * torch.randn(p.shape, generator=g).to(p.dtype)


def learn(model, x, y=None):
    """Gradients and records of one micro-batch."""
    model(x, x.roll(-1, 1) if y is None else y)[1].backward()


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same_state(model, expected):
    for name, t in model.state_dict().items():
        assert torch.equal(t, expected[name]), name


# -- 1  the update against torch.optim and the report's formula ------------------------------------


def torch_optimizers(model, lr):
    """torch.optim.Muon for each single matrix and AdamW for the rest, on copies {name: [...]}."""
    copies = {}
    for name, p in model.named_parameters():
        parts = matrices(p) if is_muon(name) else [p.detach()]
        copies[name] = [torch.nn.Parameter(part.clone()) for part in parts]
    muon = [part for name, parts in copies.items() if is_muon(name) for part in parts]
    adamw = [part for name, parts in copies.items() if not is_muon(name) for part in parts]
    common = {"lr": lr, "weight_decay": 0.1}
    return copies, [
        torch.optim.Muon(muon, nesterov=True, ns_steps=5, adjust_lr_fn="match_rms_adamw", **common),
        torch.optim.AdamW(adamw, betas=(0.9, 0.95), eps=1e-8, **common),
    ]


def test_each_matrix_moves_as_with_torch_muon_and_the_rest_as_with_adamw():
    """torch's Newton-Schulz runs in bf16, so here ours does too. Where this was written the two are
    equal to the bit. But another kernel may add in another order, and a permuted order moved random
    matrices of these shapes by up to 1 %: a change may be off by twice that."""
    model, lr = nano(std=1.0), 0.02  # large weights: their decay is a visible part of the change
    opt = MuonClip(model, lr=lr, kind="muon", ns_dtype=torch.bfloat16)
    copies, references = torch_optimizers(model, lr)
    for seed in range(4):
        set_random_gradients(model, seed)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        was = {name: [part.detach().clone() for part in parts] for name, parts in copies.items()}
        for name, p in model.named_parameters():
            for part, grad in zip(copies[name], matrices(p.grad) if is_muon(name) else [p.grad]):
                part.grad = grad.clone()
        for optimizer in (opt, *references):
            optimizer.step()
        for name, p in model.named_parameters():
            if not is_muon(name):
                assert off(p, copies[name][0]) <= 1e-7, (seed, name)
                continue
            ours = matrices(p - before[name])
            for change, after, start in zip(ours, copies[name], was[name]):
                assert off(change, after - start) <= 0.02, (seed, name)


def naive_muon(W, M, G, lr, nesterov):
    """Algorithm 1 of the report for one matrix in float64, Nesterov's look-ahead optional."""
    M = 0.95 * M + G
    X = 0.95 * M + G if nesterov else M
    tall = X.shape[0] > X.shape[1]
    X = (X.T if tall else X) / X.pow(2).sum().sqrt()
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
    O = (X.T if tall else X) * 0.2 * math.sqrt(max(W.shape))  # noqa: E741
    return W - lr * (O + 0.1 * W), M


@pytest.mark.parametrize("nesterov", [True, False])
def test_each_matrix_moves_as_algorithm_1_says_in_float64(nesterov):
    model, lr = nano().double(), 0.02
    opt = MuonClip(model, lr=lr, kind="muon", nesterov=nesterov, ns_dtype=torch.float64)
    muon = {name: p for name, p in model.named_parameters() if is_muon(name)}
    W = {(name, e): w.clone() for name, p in muon.items() for e, w in enumerate(matrices(p))}
    M = dict.fromkeys(W, 0.0)
    for seed in range(3):
        set_random_gradients(model, seed)
        opt.step()
        for (name, e), w in W.items():
            grad = matrices(muon[name].grad)[e]
            W[name, e], M[name, e] = naive_muon(w, M[name, e], grad, lr, nesterov)
            assert off(matrices(muon[name])[e], W[name, e]) <= 1e-11, (seed, name, e)


def test_by_default_newton_schulz_runs_in_fp32_on_cpu():
    after = {}
    for dtype in (None, torch.float32, torch.bfloat16):
        model = nano()
        set_random_gradients(model, 0)
        MuonClip(model, ns_dtype=dtype).step()
        after[dtype] = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(after[None], after[torch.float32])
    assert not torch.equal(after[None], after[torch.bfloat16])


def test_kind_adamw_is_adamw_throughout():
    model, twin = nano(), nano()
    opt = MuonClip(model, lr=0.01, kind="adamw")
    reference = torch.optim.AdamW(twin.parameters(), 0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for seed in range(3):
        for m, optimizer in ((model, opt), (twin, reference)):
            set_random_gradients(m, seed)
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert off(p, q) <= 1e-6, name


# -- 2  Newton-Schulz ------------------------------------------------------------------------------

SHAPES = [(32, 32), (24, 60), (60, 24), (1, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_keeps_the_singular_vectors_and_sets_the_values_near_one(shape):
    g, r = torch.Generator().manual_seed(0), min(shape)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=g).double(), full_matrices=False)
    G = U @ torch.diag(torch.logspace(0, -1.5, r).double() * 7) @ Vh  # known values, 30 : 1
    core = U.T @ newton_schulz(G) @ Vh.T
    values = core.diagonal()
    assert ((0.6 < values) & (values < 1.3)).all()
    assert off(core, torch.diag(values)) < 1e-12  # diagonal: the same singular vectors
    outside = newton_schulz(G) - U @ core @ Vh
    assert outside.abs().max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_equals_one_by_one(shape):
    G = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0)).double()
    G *= torch.tensor([1e-4, 1.0, 1e3]).view(3, 1, 1)  # each matrix has its own norm
    together = newton_schulz(G)
    for i in range(2):
        for j in range(3):
            assert off(together[i, j], newton_schulz(G[i, j])) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 16), (3, 8, 20)])
def test_a_zero_gradient_gives_a_zero_update(shape, dtype):
    out = newton_schulz(torch.zeros(shape), 5, dtype)
    assert out.dtype == torch.float32 and not out.any()


def test_an_expert_without_tokens_only_decays():
    model = nano()
    for moe in moes(model):
        moe.gate.e_score_correction_bias[[1, 6]] = 100.0
    before = state(model)
    opt = MuonClip(model, lr=0.01, weight_decay=0.1)
    learn(model, ids(2, 20))
    opt.step()
    for name, p in model.named_parameters():
        if ".experts." in name:
            assert off(p[0], before[name][0] * (1 - 0.01 * 0.1)) <= 1e-7
            assert off(p[1], before[name][1] * (1 - 0.01 * 0.1)) > 1e-3


def test_the_rms_of_every_update_is_that_of_adamw():
    model = nano()
    before = state(model)
    set_random_gradients(model, 0)
    MuonClip(model, lr=1e-2, weight_decay=0.0, kind="muon").step()
    for name, p in model.named_parameters():
        if is_muon(name):
            rms = matrices(p - before[name]).pow(2).mean((1, 2)).sqrt() / 1e-2
            assert ((0.15 < rms) & (rms < 0.25)).all(), (name, rms)


# -- 3  groups and state ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "no_q_lora"])
@pytest.mark.parametrize("kind", ["muonclip", "muon", "adamw"])
def test_every_parameter_has_one_rule_and_the_right_one(kind, variant):
    model = nano(**VARIANTS[variant])
    groups = MuonClip(model, kind=kind).param_groups
    rules = [(id(p), group["rule"]) for group in groups for p in group["params"]]
    assert len(rules) == len(dict(rules)) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        muon = is_muon(name) and kind != "adamw"
        assert dict(rules)[id(p)] == ("muon" if muon else "adamw"), name


def test_an_unknown_parameter_a_bad_kind_and_impossible_settings_are_refused():
    model = nano()
    bad = {"kind": "sgd", "lr": -1.0, "tau": 0.0, "momentum": 1.0, "weight_decay": -0.1}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            MuonClip(model, **{name: value})
    model.model.layers[0].extra = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="model.layers.0.extra"):
        MuonClip(model)


def test_one_momentum_for_muon_and_two_for_adamw():
    model = nano()
    opt = MuonClip(model)
    learn(model, ids(2, 20))
    opt.step()
    held = sum(t.numel() for s in opt.state.values() for key, t in s.items() if key != "step")
    planned = count_parameters(model.cfg).training_bytes(state=1)["optimizer"]
    biases = sum(moe.gate.e_score_correction_bias.numel() for moe in moes(model))
    assert planned - biases <= held <= planned  # these are counted, but have no state


@pytest.mark.parametrize("kind", ["muonclip", "adamw"])
def test_a_restored_optimizer_takes_the_same_next_steps(kind):
    model = nano()
    opt = MuonClip(model, lr=0.01, tau=1.0, kind=kind)
    for seed in range(3):
        opt.zero_grad()
        learn(model, ids(2, 20, seed))
        opt.step()
    twin = KimiK2(model.cfg)
    twin.load_state_dict(model.state_dict())
    other = MuonClip(twin, lr=0.5, tau=1.0, kind=kind)  # the learning rate is part of the state
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    start = state(model)
    for seed in range(3, 5):
        for m, optimizer in ((model, opt), (twin, other)):
            optimizer.zero_grad()
            learn(m, ids(2, 20, seed))
            optimizer.step()
    assert_same_state(twin, state(model))
    assert not any(torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_step_returns_the_loss_of_its_closure():
    model = nano()
    opt = MuonClip(model, lr=0.01)

    def closure():
        loss = model(ids(2, 20), ids(2, 20))[1]
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(5)]
    assert losses[0] == pytest.approx(nano()(ids(2, 20), ids(2, 20))[1].item())
    assert losses[-1] < losses[0]


# -- 4  QK-Clip ------------------------------------------------------------------------------------

LOUD, TAU = [0, 2], 10.0  # the heads of layer 1 that are made to exceed tau


def loud_model(variant="plain"):
    """Four heads; in layer 1 two of them have queries and keys that are five times too large."""
    model = nano(num_attention_heads=4, **VARIANTS[variant])
    q, kv = query_and_key_rows(model, 1)
    with torch.no_grad():
        for head in LOUD:
            q[head] *= 5
            kv[head, : model.cfg.qk_nope_head_dim] *= 5
    return model


def query_and_key_rows(model, layer):
    """Views of each head's rows: queries (H, nope + rope, in), keys and values (H, nope + v, R)."""
    attention, H = model.model.layers[layer].self_attn, model.cfg.num_attention_heads
    q = attention.q_proj if model.cfg.q_lora_rank is None else attention.q_b_proj
    kv = attention.kv_b_proj
    return q.weight.data.unflatten(0, (H, -1)), kv.weight.data.unflatten(0, (H, -1))


def still(model):
    """An optimizer that moves nothing but what it clips."""
    return MuonClip(model, lr=0.0, weight_decay=0.0, tau=TAU, bias_update_rate=0.0)


@pytest.mark.parametrize("variant", ["plain", "no_q_lora"])
def test_a_clipped_head_meets_tau_on_the_same_input(variant):
    model, x = loud_model(variant), ids(2, 40)
    opt = still(model)
    (x_in,) = seen_by(model.model.layers[1].self_attn, partial(learn, model, x))
    before = naive_attention(model, 1, x_in)[2].amax((0, 2, 3))
    assert (before > TAU).tolist() == [h in LOUD for h in range(4)]
    opt.step()
    after = naive_attention(model, 1, x_in)[2].amax((0, 2, 3))
    assert after[LOUD].tolist() == pytest.approx([TAU, TAU], rel=1e-5)
    assert torch.equal(after[[1, 3]], before[[1, 3]])


@pytest.mark.parametrize("variant", ["plain", "no_q_lora"])
def test_the_clip_scales_exactly_the_query_and_key_rows_of_the_loud_heads(variant):
    model, x = loud_model(variant), ids(2, 40)
    opt, expected, nope = still(model), state(model), model.cfg.qk_nope_head_dim
    gamma = TAU / naive_max_logits(model, x)[1].float()
    q, kv = (rows.clone() for rows in query_and_key_rows(model, 1))
    learn(model, x)
    opt.step()
    q_after, kv_after = query_and_key_rows(model, 1)
    for h in LOUD:
        root = gamma[h].sqrt()
        assert off(q_after[h, :nope], q[h, :nope] * root) <= 1e-6
        assert off(q_after[h, nope:], q[h, nope:] * gamma[h]) <= 1e-6
        assert off(kv_after[h, :nope], kv[h, :nope] * root) <= 1e-6
        # with these rows put back, the whole model must be what it was, to the bit
        q_after[h], kv_after[h, :nope] = q[h], kv[h, :nope]
    assert_same_state(model, expected)


def test_s_max_is_kept_unclipped_over_micro_batches_and_the_records_are_cleared():
    model = loud_model()
    opt, batches = still(model), [ids(2, 40), ids(3, 25, seed=5)]
    expected = [naive_max_logits(model, x) for x in batches]
    assert (expected[0] > expected[1]).any() and (expected[1] > expected[0]).any()
    for x in batches:
        learn(model, x)
    opt.step()
    assert opt.max_logits.shape == (3, 4)
    assert off(opt.max_logits, torch.maximum(*expected)) <= 1e-5
    assert (model.max_logits == -math.inf).all() and not model.expert_load.any()
    kept = opt.max_logits.clone()
    learn(model, ids(1, 5))
    assert torch.equal(opt.max_logits, kept)  # the next forward does not touch the figures


@pytest.mark.parametrize("tau, clips", [(1.001, False), (0.999, True)])
def test_below_tau_a_step_is_that_of_muon_to_the_bit(tau, clips):
    model, x = nano(), ids(2, 40)
    twin = copy.deepcopy(model)
    tau *= naive_max_logits(model, x).max().item()
    for m, kind in ((model, "muonclip"), (twin, "muon")):
        opt = MuonClip(m, lr=0.01, tau=tau, kind=kind)
        learn(m, x)
        opt.step()
    if not clips:
        assert_same_state(model, state(twin))
    else:
        other = state(twin)
        changed = [name for name, t in state(model).items() if not torch.equal(t, other[name])]
        assert {name.split(".")[4] for name in changed} == {"q_b_proj", "kv_b_proj"}


def test_the_clip_comes_after_the_update_and_leaves_the_momentum_alone():
    model, x = loud_model(), ids(2, 40)
    twin, nope = copy.deepcopy(model), model.cfg.qk_nope_head_dim
    opts = MuonClip(model, lr=0.05, tau=TAU), MuonClip(twin, lr=0.05, kind="muon")
    for m, opt in zip((model, twin), opts):
        learn(m, x)
        opt.step()
    gamma = (TAU / opts[1].max_logits[1]).clamp(max=1)[:, None, None]
    (q, kv), (q_muon, kv_muon) = (query_and_key_rows(m, 1) for m in (model, twin))
    assert off(q[:, :nope], q_muon[:, :nope] * gamma.sqrt()) <= 1e-6
    assert off(q[:, nope:], q_muon[:, nope:] * gamma) <= 1e-6
    assert off(kv[:, :nope], kv_muon[:, :nope] * gamma.sqrt()) <= 1e-6
    for p, p_muon in zip(model.parameters(), twin.parameters()):
        for key, value in opts[0].state[p].items():
            assert torch.equal(value, opts[1].state[p_muon][key])


# -- 5  the router's bias --------------------------------------------------------------------------


@torch.no_grad()
def routed(model, batches):
    """Tokens that each expert of each MoE layer gets from these batches, (L_moe, E)."""
    loads = []
    for moe in moes(model):
        inputs = torch.cat(seen_by(moe.gate, lambda: [model(x) for x in batches]))
        loads.append(moe.gate(inputs)[0].flatten().bincount(minlength=8))
    return torch.stack(loads).float()


@pytest.mark.parametrize("kind", ["muonclip", "muon", "adamw"])
def test_the_bias_moves_once_a_step_against_the_load_of_all_micro_batches(kind):
    model = nano()
    batches = [ids(2, 20, seed) for seed in (1, 2, 3)]
    biases = [moe.gate.e_score_correction_bias for moe in moes(model)]
    loads, before = routed(model, batches), torch.stack(biases)
    opt = MuonClip(model, kind=kind, bias_update_rate=0.25)
    for x in batches:
        learn(model, x)
        assert torch.equal(torch.stack(biases), before)
    opt.step()
    assert (loads > 30).any() and (loads < 30).any()  # the mean is 3 * 40 * 2 / 8 = 30
    for layer in range(2):
        for e in range(8):
            move = -0.25 if loads[layer, e] > 30 else 0.25 if loads[layer, e] < 30 else 0.0
            assert biases[layer][e] == before[layer, e] + move


def share_of_the_busiest(model, batches):
    """Load of the busiest expert over the mean load, the worst layer's."""
    loads = routed(model, batches)
    return (loads.amax(1) / loads.mean(1)).max().item()


def run_from_a_skewed_router(bias_update_rate, steps=60):
    """The share of the busiest expert at the start and at the end of a run."""
    model = nano(std=0.02)
    common = torch.randn(64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # all tokens have a part in common, and two experts like it
        model.model.embed_tokens.weight += 0.05 * common
        for moe in moes(model):
            moe.gate.e_score_correction_bias.zero_()
            moe.gate.weight[:2] += 0.05 * common
    opt = MuonClip(model, lr=1e-3, bias_update_rate=bias_update_rate)
    unseen = [ids(8, 32, seed=1000)]
    start = share_of_the_busiest(model, unseen)
    for step in range(steps):
        opt.zero_grad()
        learn(model, ids(8, 32, seed=step))
        opt.step()
    return start, share_of_the_busiest(model, unseen)


def test_the_bias_evens_out_a_skewed_router():
    start, without = run_from_a_skewed_router(bias_update_rate=0.0)
    _, with_bias = run_from_a_skewed_router(bias_update_rate=0.01)
    assert start == without == 4  # two of eight experts get every token
    assert with_bias < 2


# -- 6  data parallel ------------------------------------------------------------------------------


def one_rank(rank, folder):
    """Its own data, one step; leaves what it saw and what became of the model."""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = loud_model()
    opt = MuonClip(model, tau=TAU, bias_update_rate=0.25)
    model(ids(2, 8, seed=40 + rank))  # no backward: the step clips and balances, and that is all
    seen = {"s_max": model.max_logits.clone(), "load": model.expert_load.clone()}
    opt.step()
    torch.save({**seen, "kept": opt.max_logits, "state": model.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_s_max_is_the_maximum_and_the_load_the_sum_over_ranks(tmp_path):
    ranks = [CONTEXT.Process(target=one_rank, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert (a["s_max"] > b["s_max"]).any() and (a["s_max"] < b["s_max"]).any()
    assert torch.equal(a["kept"], torch.maximum(a["s_max"], b["s_max"]))
    assert torch.equal(a["kept"], b["kept"]) and (a["kept"] > TAU).any()
    # the data were picked so that neither rank's load nor the larger one would move the same biases
    loads = a["load"] + b["load"], a["load"], b["load"], torch.maximum(a["load"], b["load"])
    move, *others = [(load.mean(1, keepdim=True) - load).sign() for load in loads]
    assert not any(torch.equal(move, other) for other in others)
    start = state(loud_model())
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        assert torch.equal(a["state"][name], start[name] + 0.25 * move[layer - 1])
    for name, t in a["state"].items():  # so that the ranks' models stay one model
        assert torch.equal(t, b["state"][name])


# -- 7  a provoked run -----------------------------------------------------------------------------


def bigrams(step, B=16, T=32):
    """Text of 64 words, each followed by one of two: the best loss is ln 2."""
    follower = torch.randint(0, 64, (64, 2), generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(step)
    text = [torch.randint(0, 64, (B,), generator=g)]
    for _ in range(T):
        text.append(follower[text[-1], torch.randint(0, 2, (B,), generator=g)])
    text = torch.stack(text, dim=1)
    return text[:, :-1], text[:, 1:]


def provoked_run(kind, tau, steps=60):
    """Inflated query and key weights and a high learning rate: S_max and loss of each step."""
    torch.manual_seed(0)
    model = KimiK2(KimiConfig.preset("nano"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_b_proj.weight *= 10
            layer.self_attn.kv_b_proj.weight *= 10
    opt, s_max, losses = MuonClip(model, lr=0.02, tau=tau, kind=kind), [], []
    for step in range(steps):
        opt.zero_grad()
        loss = model(*bigrams(step))[1]
        loss.backward()
        opt.step()
        s_max.append(opt.max_logits.max().item())
        losses.append(loss.item())
    return s_max, losses


def test_muon_lets_logits_grow_and_muonclip_holds_them_at_tau_for_the_same_loss():
    tau = 2.0
    (grown, loss), (held, clipped_loss) = (provoked_run(kind, tau) for kind in ("muon", "muonclip"))
    assert grown[0] > tau and max(grown) > 2.5 * tau  # without the clip: provoked, and growing
    # S_max is measured before the clip, so it shows what one update adds to tau
    assert max(held[10:]) <= 1.25 * tau
    final, clipped_final = sum(loss[-10:]) / 10, sum(clipped_loss[-10:]) / 10
    assert clipped_final <= final + 0.03 and clipped_final < 1 < loss[0] / 5
