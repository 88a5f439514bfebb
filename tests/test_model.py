"""The model against independent references: transformers' DeepseekV3, naive formulas, float64.

Floats are compared by `off`: max difference over max magnitude, per tensor; in fp32 unless said.
"""

import copy
import math
from functools import cache as once
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kimi_k2
from kimi_k2 import KimiConfig, KimiK2, LatentCache, count_parameters, save_pretrained

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
# a soft ramp, and a factor on cos and sin that is not 1
SOFT_YARN = {**YARN, "beta_fast": 8.0, "mscale": 2.0}
VARIANTS = {
    "plain": {},
    "yarn": {"rope_scaling": YARN},
    "yarn_soft": {"rope_scaling": SOFT_YARN, "qk_rope_head_dim": 16},
    "no_q_lora": {"q_lora_rank": None},
    "two_shared": {"n_shared_experts": 2, "rms_norm_eps": 1e-3, "v_head_dim": 24},
}
LONG = 300  # tokens: no multiple of a block
ABSORB = pytest.mark.parametrize("absorb", [True, False, None])


def nano(std=0.1, **overrides):
    """A nano model of 1 dense and 2 MoE layers. Its weights are large, gains off 1, biases off 0:
    as initialised, attention is all but uniform, and a wrong scale or rotation would not show."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 3, "max_position_embeddings": 128, **overrides}
    model = KimiK2(KimiConfig.preset("nano", **shape))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn_like(p))
        for moe in moes(model):
            moe.gate.e_score_correction_bias.normal_(0, 0.1)
    return model


def moes(model):
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def ids(B, T, seed=1):
    return torch.randint(0, 512, (B, T), generator=torch.Generator().manual_seed(seed))


def off(a, b):
    """Largest difference over the largest magnitude of the reference b."""
    a, b = a.detach().double(), b.detach().double()
    assert a.shape == b.shape and torch.isfinite(a).all() and b.abs().max() > 0
    return ((a - b).abs().max() / b.abs().max()).item()


def seen_by(module, run):
    """The first argument of each call of `module` while `run` runs."""
    calls = []
    hook = module.register_forward_pre_hook(lambda _, args: calls.append(args[0].detach()))
    run()
    hook.remove()
    return calls


class Pinned(TorchFunctionMode):
    """Answers each router's choice of K from E with indices that depend on layer and row alone.

    It catches the routers of both implementations at their `topk`; `calls` counts the catches.
    """

    def __init__(self, cfg):
        super().__init__()
        self.E, self.K, self.calls = cfg.n_routed_experts, cfg.num_experts_per_tok, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "topk" or args[0].shape[1:] != (self.E,):
            return out
        self.calls += 1
        g = torch.Generator().manual_seed(self.calls)
        chosen = torch.rand(len(args[0]), self.E, generator=g).argsort(1)[:, : self.K]
        return torch.return_types.topk((out.values, chosen.contiguous()))


def pinned(cfg, run, *args, **kwargs):
    """run(...) of a model with that config, its routing pinned."""
    with Pinned(cfg) as mode:
        out = run(*args, **kwargs)
    n_moe = cfg.num_hidden_layers - cfg.first_k_dense_replace
    assert mode.calls == n_moe, "a router no longer chooses by topk: pin it in another way"
    return out


# -- 1  transformers' DeepseekV3 -------------------------------------------------------------------


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """Our model, and the one that transformers makes of its folder."""
    from transformers import DeepseekV3ForCausalLM

    ours, folder = nano(**VARIANTS[request.param]), tmp_path_factory.mktemp("hf") / "model"
    save_pretrained(ours, None, folder)
    theirs, info = DeepseekV3ForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    return ours, theirs


def their_gradient(name, theirs):
    """What transformers, which fuses gate and up, has as the gradient of one of our parameters."""
    parameters = dict(theirs.named_parameters())
    owner, _, leaf = name.rpartition(".")
    if ".experts." not in name or leaf == "down_proj":
        return parameters[name].grad
    gate, up = parameters[owner + ".gate_up_proj"].grad.chunk(2, dim=1)
    return gate if leaf == "gate_proj" else up


@pytest.mark.parametrize("routing, T", [("own", 64), ("pinned", 64), ("own", LONG), ("own", 512)])
def test_logits_loss_and_every_gradient_equal_transformers(pair, routing, T):
    ours, theirs = pair
    x = ids(2, T).clamp(max=510)  # transformers gives the embedding of [PAD], 511, no gradient
    y = ids(2, T, seed=2)
    y[0, :9] = y[:, -1] = -100  # transformers shifts labels itself and never sees a last target
    labels = torch.cat((x[:, :1], y[:, :-1]), dim=1)
    run = partial(pinned, ours.cfg) if routing == "pinned" else lambda f, *a, **k: f(*a, **k)
    ours.zero_grad(), theirs.zero_grad()
    logits, loss = run(ours, x, y)
    reference = run(theirs.train(), x, labels=labels)
    assert off(logits, reference.logits) <= 1e-5
    assert off(loss, reference.loss) <= 1e-5
    loss.backward(), reference.loss.backward()
    wrong = {name: off(p.grad, their_gradient(name, theirs)) for name, p in ours.named_parameters()}
    assert max(wrong.values()) <= 1e-5, wrong


def test_greedy_generation_is_that_of_transformers(pair):
    ours, theirs = pair
    reference = theirs.eval().generate(
        ids(3, 7), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=511
    )
    assert torch.equal(ours.generate(ids(3, 7), 20, temperature=0), reference)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_the_loss_without_logits_equals_the_one_with_them(dtype, tolerance):
    """`loss` makes the head's gradient piece by piece, and records what `forward` records."""
    one, other = nano(), nano()
    x, y = ids(2, 40), ids(2, 40, seed=2)
    y[0, :9] = -100
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = pinned(one.cfg, one.loss, x, y), pinned(other.cfg, other, x, y)[1]
    for loss in losses:
        (3 * loss).backward()  # a micro-batch is weighted by its share of the targets
    assert off(*losses) <= tolerance
    for (name, p), q in zip(one.named_parameters(), other.parameters()):
        assert off(p.grad, q.grad) <= tolerance, name
    assert torch.equal(one.expert_load, other.expert_load)
    assert torch.equal(one.max_logits, other.max_logits)


def test_the_head_loss_over_many_pieces_equals_cross_entropy():
    g = torch.Generator().manual_seed(0)
    h, w = 0.3 * torch.randn(150, 8, generator=g), torch.randn(40_000, 8, generator=g)
    targets = torch.randint(0, 40_000, (150,), generator=g)
    h, w = h.requires_grad_(), w.requires_grad_()
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    total = kimi_k2.HeadLoss.apply(h, w, targets)
    reference = F.cross_entropy(h64 @ w64.T, targets, reduction="sum")
    total.backward(), reference.backward()
    assert off(total, reference) <= 1e-6
    assert off(h.grad, h64.grad) <= 3e-5  # sums of 40,000, in fp32
    assert off(w.grad, w64.grad) <= 1e-5


def test_loss_without_any_target_is_zero_and_harmless():
    model, targets = nano(), torch.full((1, 5), -100)
    losses = model(ids(1, 5), targets)[1], model.loss(ids(1, 5), targets)
    sum(losses).backward()
    assert losses == (0, 0) and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_rms_norm_and_its_gradient_equal_the_formula(dtype, tolerance):
    g, norm = torch.Generator().manual_seed(0), kimi_k2.RMSNorm(48, eps=1e-2)
    x = (0.1 * torch.randn(4, 5, 48, generator=g)).to(dtype).requires_grad_()
    norm.weight.data += torch.randn(48, generator=g)
    norm.to(dtype)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    y, reference = norm(x), x64 / (x64.pow(2).mean(-1, keepdim=True) + 1e-2).sqrt() * w64
    upstream = torch.randn(y.shape, generator=g).to(dtype)
    y.backward(upstream), reference.backward(upstream.double())
    assert y.dtype == dtype and off(y, reference) <= tolerance
    assert off(x.grad, x64.grad) <= tolerance and off(norm.weight.grad, w64.grad) <= tolerance


@pytest.mark.parametrize("shape", [(128, 256, 256), (3, 2, 64, 128, 128), (4096, 64, 16)], ids=str)
def test_products_of_any_library_are_fp32s(shape):
    """1 + 2^-12 needs more digits than bf16 has, and their products more than tf32 has."""
    *batch, n, k, m = shape
    a = (torch.randint(1, 9, (*batch, n, k)) + 2.0**-12).requires_grad_()
    b = (torch.randint(1, 9, (*batch, k, m)) + 2.0**-12).requires_grad_()
    by_onednn = kimi_k2.product(a, b).grad_fn.name() == "OneDNNProductBackward"
    assert by_onednn == kimi_k2.EXACT_ONEDNN
    a64, b64 = (t.detach().double().requires_grad_() for t in (a, b))
    for x, y in ((a, b), (a64, b64)):
        out = kimi_k2.product(x, y)
        out.backward(torch.ones_like(out))
        assert off(out, a64 @ b64) <= 1e-5
    assert off(a.grad, a64.grad) <= 1e-5 and off(b.grad, b64.grad) <= 1e-5


def test_the_switch_to_onednn_is_put_back():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with pytest.raises(KeyError), kimi_k2.onednn():
        assert (matmul.fp32_precision == "bf16") == kimi_k2.EXACT_ONEDNN
        raise KeyError
    assert matmul.fp32_precision == before != "bf16"


# -- 2  rotary position and YaRN -------------------------------------------------------------------


# each form turns x (B, T, H, d) for its positions (T,) by frequencies w (d / 2,)


def half_form(x, position, w):
    """Hugging Face's form: even coordinates first, then odd ones, and the halves are turned."""
    angle = (position[:, None] * w).repeat(1, 2)[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat((a, b), dim=-1) * angle.cos() + torch.cat((-b, a), dim=-1) * angle.sin()


def complex_form(x, position, w):
    """Each pair is a complex number, turned by multiplication with e^(i angle)."""
    angle = (position[:, None] * w)[:, None]
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def our_form(x, position, w):
    return kimi_k2.rotate(x, *kimi_k2.rope_table(position, w, 1.0))


def frequencies(d, theta=1e4):
    return theta ** (-torch.arange(0, d, 2).double() / d)


def rotary_scores(form, q, k, first=0):
    """q_i . k_j for all i, j, turned for positions first, first + 1, ..."""
    position = torch.arange(first, first + q.shape[1])
    turn = partial(form, position=position, w=frequencies(q.shape[-1]))
    return torch.einsum("bihd,bjhd->bhij", turn(q), turn(k))


@pytest.mark.parametrize("form", [half_form, complex_form])
def test_rotary_scores_equal_both_other_forms(form):
    q, k = torch.randn(2, 2, 20, 3, 16, generator=torch.Generator().manual_seed(0)).double()
    ours, reference = rotary_scores(our_form, q, k), rotary_scores(form, q, k)
    assert off(ours, reference) < 1e-13
    assert off(ours, torch.einsum("bihd,bjhd->bhij", q, k)) > 0.1  # the rotation does something


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).double()
    q, k = q.expand(1, 20, 1, 16), k.expand(1, 20, 1, 16)
    s = rotary_scores(our_form, q, k)
    assert off(rotary_scores(our_form, q, k, first=1000), s) < 1e-11
    assert off(s[0, 0, 1:, 1:], s[0, 0, :-1, :-1]) < 1e-13


def test_yarn_of_k2_keeps_20_pairs_and_divides_12_by_32():
    k2 = KimiConfig.preset("k2")
    w, factor = kimi_k2.rope_frequencies(k2)
    plain, _ = kimi_k2.rope_frequencies(KimiConfig.preset("k2", rope_scaling=None))
    assert torch.equal(plain, (50000 ** (-torch.arange(0, 64, 2).double() / 64)).float())
    assert torch.equal(w[:20], plain[:20]) and torch.equal(32 * w[20:], plain[20:])
    assert factor == 1 and len(w) == 32
    assert kimi_k2.softmax_scale(k2) == pytest.approx(0.130861, abs=5e-7)
    short = KimiConfig.preset("k2", rope_scaling=None)
    assert kimi_k2.softmax_scale(short) == pytest.approx(0.0721688, abs=5e-8)


# DeepSeek-V3's own ramp; one that starts before the first pair; a length that not one pair turns in
@pytest.mark.parametrize("L0, ramp", [(4096, (10, 23)), (64, (0, 9)), (5, (0, 0.001))])
def test_soft_yarn_ramp_equals_the_naive_formula(L0, ramp):
    yarn = {**YARN, "factor": 40.0, "original_max_position_embeddings": L0, "beta_fast": 32.0}
    cfg = KimiConfig.preset("k2", rope_theta=10000.0, rope_scaling={**yarn, "mscale_all_dim": 0.5})
    w, factor = kimi_k2.rope_frequencies(cfg)

    def pair_turning(times):  # the i for which L0 theta^(-2i/64) = 2 pi times
        return 32 * math.log(L0 / (2 * math.pi * times), 10000)

    low, high = max(math.floor(pair_turning(32)), 0), math.ceil(pair_turning(1))
    high += 0.001 if low == high else 0
    assert (low, high) == ramp
    for i in range(32):
        kept, stretch = 10000 ** (-i / 32), min(max((i - low) / (high - low), 0), 1)
        expected = kept * (1 - stretch) + kept / 40 * stretch
        assert w[i].item() == pytest.approx(expected, rel=1e-6)
    log = 0.1 * math.log(40)
    assert factor == pytest.approx((log + 1) / (log / 2 + 1))


# -- 3  MLA: naive, absorbed, cached ---------------------------------------------------------------


def naive_attention(model, layer, x):
    """From a layer's weights and input x (B, T, C) alone, in float64 and without YaRN: its c_kv,
    its k_rope, and the scaled softmax inputs (B, H, T, T) with -inf where the future would be."""
    cfg, x = model.cfg, x.double()
    R, nope = cfg.kv_lora_rank, cfg.qk_nope_head_dim
    attention = model.model.layers[layer].self_attn
    w = {name.removesuffix(".weight"): p.double() for name, p in attention.state_dict().items()}

    def norm(y, gain):
        return y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    rope = cfg.qk_rope_head_dim
    position, w_rope = torch.arange(x.shape[1]), frequencies(rope, cfg.rope_theta)
    turn = partial(complex_form, position=position, w=w_rope)
    if cfg.q_lora_rank is None:
        q = x @ w["q_proj"].T
    else:
        q = norm(x @ w["q_a_proj"].T, w["q_a_layernorm"]) @ w["q_b_proj"].T
    latent = x @ w["kv_a_proj_with_mqa"].T
    c_kv, k_rope = norm(latent[..., :R], w["kv_a_layernorm"]), turn(latent[..., None, R:])
    q = q.unflatten(-1, (cfg.num_attention_heads, -1))
    kv = (c_kv @ w["kv_b_proj"].T).unflatten(-1, (cfg.num_attention_heads, -1))
    s = torch.einsum("bihd,bjhd->bhij", q[..., :nope], kv[..., :nope])
    s = s + torch.einsum("bihd,bjd->bhij", turn(q[..., nope:]), k_rope[:, :, 0])
    s = s / math.sqrt(nope + rope)
    future = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)
    return c_kv, k_rope[:, :, 0], s.masked_fill(future, -math.inf)


@pytest.mark.parametrize("padding", [None, [0, 7, 35]], ids=["causal", "padded"])
@pytest.mark.parametrize("T, S", [(40, 40), (LONG, LONG), (300, 310), (5, 40), (1, 40)])
@pytest.mark.parametrize("form", [kimi_k2.attend, kimi_k2.attend_blocks, kimi_k2.attend_fused])
def test_all_forms_of_attention_equal_the_formula(form, T, S, padding):
    g, padding_B = torch.Generator().manual_seed(0), torch.tensor(padding or [0, 0, 0])
    shapes = [(3, 2, T, 24), (3, 2, S, 24), (3, 2, S, 16)]
    q, k, v = inputs = [torch.randn(shape, generator=g) for shape in shapes]
    if T == S:
        q[:, :, :-1] += k[:, :, 1:]  # what would be loudest is the next token's key
    inputs = [t.requires_grad_() for t in inputs]
    mask = kimi_k2.causal_mask(T, S, padding and padding_B, None)
    out, s_max = form(q, k, v, 0.3, mask, record=mask is None and T > 1)
    q64, k64, v64 = inputs64 = [t.detach().double().requires_grad_() for t in inputs]
    query, key = torch.arange(S - T, S)[:, None], torch.arange(S)
    real = query >= padding_B[:, None, None, None]  # (B, 1, T, 1): what other queries do is free
    seen = (key <= query) & (key >= padding_B[:, None, None, None]) | ~real
    s = (0.3 * q64 @ k64.mT).masked_fill(~seen, -math.inf)
    reference = s.softmax(-1) @ v64
    assert off(out * real, reference * real) <= 1e-6
    upstream = torch.randn(out.shape, generator=g) * real
    out.backward(upstream), reference.backward(upstream.double())
    assert all(off(t.grad, t64.grad) <= 1e-5 for t, t64 in zip(inputs, inputs64))
    if s_max is not None:
        assert off(s_max, s.amax((0, 2, 3))) <= 1e-6


@ABSORB
@pytest.mark.parametrize("chunks", [[40], [1, 3, 7, 29], [24] + [1] * 16], ids=str)
@pytest.mark.parametrize("variant", ["plain", "yarn_soft", "no_q_lora"])
@torch.no_grad()
def test_cached_forward_equals_full_forward(variant, chunks, absorb):
    model, x = nano(**VARIANTS[variant]), ids(2, 40)
    cache = LatentCache(model.cfg, 2)
    out = [model(part, cache=cache, absorb=absorb)[0] for part in x.split(chunks, dim=1)]
    assert off(torch.cat(out, dim=1), model(x)[0]) <= 1e-5


@ABSORB
@torch.no_grad()
def test_rows_of_a_left_padded_batch_equal_each_alone(absorb):
    model, more = nano(), ids(3, 6, seed=2)
    prompts = [row[:n] for row, n in zip(ids(3, 9), (4, 9, 7))]
    cache = LatentCache(model.cfg, 3, max_length=15)
    cache.padding = torch.tensor([5, 0, 2])
    batch = torch.stack([F.pad(p, (9 - len(p), 0), value=511) for p in prompts])
    all_rows = [model(part, cache=cache, absorb=absorb)[0] for part in (batch, more[:, :3])]
    # one row leaves, the others change places and go on
    some_rows = model(more[[2, 0], 3:], cache=cache.select([2, 0]), absorb=absorb)[0]
    for row, prompt in enumerate(prompts):
        out = torch.cat(all_rows, dim=1)[row, 9 - len(prompt) :]
        if row != 1:
            out = torch.cat((out, some_rows[[2, 0].index(row)]))
        text = torch.cat((prompt, more[row]))[None, : len(out)]
        assert off(out, model(text)[0][0]) <= 1e-5


def test_a_list_of_prompts_continues_as_each_alone():
    model = nano()
    prompts = [row[:n].tolist() for row, n in zip(ids(4, 9), (4, 9, 1, 7))]
    together = model.generate(prompts, 20, temperature=0)
    for prompt, row in zip(prompts, together):
        assert torch.equal(row, model.generate(torch.tensor([prompt]), 20, temperature=0)[0])


@pytest.mark.parametrize("padding", [None, [3, 0]], ids=["even", "padded"])
@pytest.mark.parametrize("copies", [1, 3])  # of both rows: few tokens take another path than many
@pytest.mark.parametrize("latent", [16, 40])  # 16: W_UK and W_UV are part of their neighbours
@pytest.mark.parametrize("variant", [*VARIANTS, "no_shared"])
@torch.no_grad()
def test_the_decoder_of_generation_equals_the_full_forward(variant, latent, copies, padding):
    variant = VARIANTS.get(variant, {"n_shared_experts": 0, "first_k_dense_replace": 0})
    model = nano(**variant, kv_lora_rank=latent)
    x, cache = ids(2, 16).repeat(copies, 1), LatentCache(model.cfg, 2 * copies)
    cache.padding = padding and torch.tensor(padding * copies)
    model(x[:, :10], cache=cache)
    decoder = kimi_k2.Decoder(model)
    out = torch.stack([decoder.step(x[:, t], cache) for t in range(10, 16)], dim=1)
    for row in range(len(x)):
        start = 0 if padding is None else cache.padding[row]
        assert off(out[row], model(x[row : row + 1, start:])[0][0, -6:]) <= 1e-5


@pytest.mark.parametrize("std", [0.1, pytest.param(0.3, marks=pytest.mark.slow)])  # slow: really compiled
@torch.no_grad()
def test_compiled_decoding_equals_the_full_forward(std, monkeypatch):
    """Few tokens take another path than many; a text is a program's argument, its room a program's size."""
    if std == 0.1:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, frames = nano(std), torch._dynamo.utils.counters["frames"]
    model.compile_decode = True
    torch._dynamo.reset()
    for copies in (1, 8):
        x = ids(1, 16).repeat(copies, 1)
        for padding in (None, torch.arange(copies) % 4):
            cache = LatentCache(model.cfg, copies, None if padding is None else 64)
            cache.padding = padding
            model(x[:, :10], cache=cache)
            for buffer in cache.buffers:
                assert buffer.shape[1] == 64 and not buffer[:, 10:].any()
            before, decoder = frames["total"], kimi_k2.Decoder(model)
            out = torch.stack([decoder.step(x[:, t], cache) for t in range(10, 16)], dim=1)
            assert frames["total"] - before == (padding is None)
            for row in range(copies):
                start = 0 if padding is None else padding[row]
                assert off(out[row], model(x[row : row + 1, start:])[0][0, -6:]) <= 1e-5
    prompts, stop = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], [*range(0, 512, 16)]
    before = frames["total"]
    found = model.generate(prompts, 40, temperature=0, stop=stop)
    assert frames["total"] - before == 1  # rows that have ended stay
    model.compile_decode = False
    expected = model.generate(prompts, 40, temperature=0, stop=stop)
    assert all(map(torch.equal, found, expected)) and len({*map(len, found)}) > 1


@torch.no_grad()
def test_selected_rows_continue_independently():
    model, x, more = nano(), ids(2, 10), ids(3, 6, seed=2)
    cache = LatentCache(model.cfg, 2, max_length=16)
    model(x, cache=cache)
    branches = cache.select([1, 0, 1])
    full = model(torch.cat((x[[1, 0, 1]], more), dim=1))[0]
    assert off(model(more, cache=branches)[0], full[:, 10:]) <= 1e-5
    assert (cache.length, branches.length) == (10, 16)
    full = model(torch.cat((x, more[1:]), dim=1))[0]  # the original never noticed
    assert off(model(more[1:], cache=cache)[0], full[:, 10:]) <= 1e-5


@torch.no_grad()
def test_growing_cache_equals_preallocated_cache():
    model, x = nano(), ids(2, 140)
    caches = LatentCache(model.cfg, 2), LatentCache(model.cfg, 2, max_length=140)
    for part in x.split([5, 60, 70, 1, 4], dim=1):
        grown, fixed = (model(part, cache=cache)[0] for cache in caches)
        assert off(grown, fixed) <= 1e-6
    assert all(off(a, b) <= 1e-6 for a, b in zip(caches[0].c_kv, caches[1].c_kv))


@torch.no_grad()
def test_more_than_max_length_is_refused_and_leaves_the_cache_usable():
    model, x = nano(), ids(1, 12)
    cache = LatentCache(model.cfg, 1, max_length=12)
    model(x[:, :10], cache=cache)
    with pytest.raises(ValueError, match="12"):
        model(ids(1, 3, seed=2), cache=cache)
    assert off(model(x[:, 10:], cache=cache)[0], model(x)[0][:, 10:]) <= 1e-5


@torch.no_grad()
def test_cache_holds_the_normed_latent_and_the_turned_rope_key_and_nothing_else():
    model, x = nano(), ids(2, 30)
    cfg, cache = model.cfg, LatentCache(model.cfg, 2, max_length=30, dtype=torch.float32)
    inputs = [seen_by(layer.self_attn, partial(model, x))[0] for layer in model.model.layers]
    model(x, cache=cache)
    for layer, x_in in enumerate(inputs):
        c_kv, k_rope, _ = naive_attention(model, layer, x_in)
        assert off(cache.c_kv[layer], c_kv) <= 1e-5 and off(cache.k_rope[layer], k_rope) <= 1e-5
    storages = [t.untyped_storage() for t in [*cache.c_kv, *cache.k_rope]]
    held = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    assert held == 4 * 2 * 30 * cfg.num_hidden_layers * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    assert held == 2 * 30 * count_parameters(cfg).cache_bytes_per_token(element=4)


@pytest.mark.parametrize("T, past", [(1, 64), (64, 0), (6, 58), (20, 44)])
@torch.no_grad()
def test_absorb_none_is_the_form_with_less_arithmetic(T, past):
    model, flops = nano(v_head_dim=24), {}  # as wide as the keys, so that no padding is counted
    for absorb in (True, False, None):
        cache = LatentCache(model.cfg, 8)
        model(ids(8, past + T)[:, :past], cache=cache) if past else None
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            with FlopCounterMode(display=False) as counter:
                model(ids(8, T), cache=cache, absorb=absorb)
        flops[absorb] = counter.get_total_flops()
    assert flops[True] != flops[False] and flops[None] == min(flops[True], flops[False])


# -- 4  causality ----------------------------------------------------------------------------------
# Routing is pinned where bits are compared: an expert that receives one row more may round the
# others differently, because the matrix product is cut up in another way.


def perturbed(x):
    other = x.clone()
    other[:, -1] = (x[:, -1] + 7) % 512
    return other


@pytest.mark.parametrize("T", [40, LONG])
def test_training_forward_is_causal_to_the_bit(T):
    model, x = nano(), ids(2, T)
    a, b = (pinned(model.cfg, model, t)[0] for t in (x, perturbed(x)))
    assert torch.equal(a[:, :-1], b[:, :-1]) and not torch.equal(a[:, -1], b[:, -1])


@ABSORB
@pytest.mark.parametrize("past, T", [(0, 24), (20, 24), (20, 2)])
@torch.no_grad()
def test_cached_prefill_and_decode_are_causal_to_the_bit(past, T, absorb):
    model, x, out = nano(), ids(2, past + T), []
    for t in (x, perturbed(x)):
        cache = LatentCache(model.cfg, 2)
        if past:
            model(t[:, :past], cache=cache, absorb=absorb)
        out.append(pinned(model.cfg, model, t[:, past:], cache=cache, absorb=absorb)[0])
    assert torch.equal(out[0][:, :-1], out[1][:, :-1])
    assert not torch.equal(out[0][:, -1], out[1][:, -1])


@ABSORB
@torch.no_grad()
def test_decode_does_not_read_what_stands_behind_its_length(absorb):
    model, x, out = nano(), ids(2, 20), []
    for future in (0, 30):
        cache = LatentCache(model.cfg, 2, max_length=64)
        model(x, cache=cache)
        if future:
            model(ids(2, future, seed=2), cache=cache)
            cache.length = 20  # rewound: 30 tokens are still in memory
        out.append(pinned(model.cfg, model, x[:, :1], cache=cache, absorb=absorb)[0])
    assert torch.equal(*out)


# -- 5  router and experts -------------------------------------------------------------------------


def naive_route(moe, x, K):
    """For each token of x (N, C) its {expert: weight}, in float64, one score at a time."""
    w, bias = moe.gate.weight.double().tolist(), moe.gate.e_score_correction_bias.tolist()
    routes = []
    for token in x.double().tolist():
        scores = [1 / (1 + math.exp(-sum(a * b for a, b in zip(row, token)))) for row in w]
        best = sorted(range(len(w)), key=lambda e: scores[e] + bias[e])[-K:]
        total = sum(scores[e] for e in best)
        routes.append({e: moe.gate.factor * scores[e] / total for e in best})
    return routes


def swiglu(x, gate, up, down):
    h = gate @ x
    return down @ (h / (1 + (-h).exp()) * (up @ x))


def naive_moe(moe, x, K):
    """Shared expert plus routed ones for x (N, C), token by token and expert by expert, float64."""
    w = {name: p.detach().double() for name, p in moe.named_parameters()}
    names = ("gate_proj", "up_proj", "down_proj")
    rows = []
    for token, route in zip(x.double(), naive_route(moe, x, K)):
        shared = [w[key] for name in names if (key := f"shared_experts.{name}.weight") in w]
        y = swiglu(token, *shared) if shared else 0
        for e, weight in route.items():
            y = y + weight * swiglu(token, *(w[f"experts.{name}"][e] for name in names))
        rows.append(y)
    return torch.stack(rows)


def moe_and_input(N=24, **overrides):
    model = nano(**overrides)
    return moes(model)[0], torch.randn(N, 64, generator=torch.Generator().manual_seed(3))


def test_router_is_a_sigmoid_with_k_distinct_experts_and_weights_that_sum_to_the_factor():
    moe, x = moe_and_input()
    chosen, weights, scores = moe.gate(x)
    expected = (x.double() @ moe.gate.weight.double().T).sigmoid()
    assert off(scores, expected) <= 1e-6
    assert all(len(set(row)) == 2 for row in chosen.tolist()) and chosen.shape == (24, 2)
    assert torch.allclose(weights.sum(1), torch.full((24,), moe.gate.factor), rtol=1e-6)
    for row, w, route in zip(chosen.tolist(), weights, naive_route(moe, x, 2)):
        assert dict(zip(row, w.tolist())) == pytest.approx(route, rel=1e-5)


def test_bias_changes_the_choice_but_not_the_weights():
    moe, x = moe_and_input()
    moe.gate.e_score_correction_bias.zero_()
    before, plain_weights, scores = moe.gate(x)
    moe.gate.e_score_correction_bias += 0.01  # the same for all: nothing may change
    assert all(torch.equal(a, b) for a, b in zip(moe.gate(x), (before, plain_weights, scores)))
    moe.gate.e_score_correction_bias[5] = 10.0
    chosen, weights, after = moe.gate(x)
    assert (chosen == 5).any(1).all() and not (before == 5).any(1).all()
    assert torch.equal(after, scores)
    raw = scores.gather(1, chosen)
    assert off(weights, moe.gate.factor * raw / raw.sum(1, keepdim=True)) <= 1e-6


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("skew", [0.0, 100.0])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("N", [3, 24])
def test_moe_equals_a_loop_over_tokens_and_experts(N, gradients, skew, shared):
    moe, x = moe_and_input(N, n_shared_experts=shared)
    moe.gate.e_score_correction_bias[[1, 6]] += skew  # 100: every token goes to experts 1 and 6
    with torch.set_grad_enabled(gradients):
        y, (load, _) = moe(x[None], record=True)
    assert off(y[0], naive_moe(moe, x, 2)) <= 1e-5
    if load is not None:  # the few-token path, without gradients, counts nothing
        assert load.sum() == 2 * N
    if load is not None and skew:
        assert load.tolist() == [0, N, 0, 0, 0, 0, N, 0]


def test_experts_without_tokens_get_zero_gradients_and_nothing_is_nan():
    model = nano()
    for moe in moes(model):
        moe.gate.e_score_correction_bias[[1, 6]] = 100.0
    model(ids(2, 20), ids(2, 20, seed=2))[1].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    for p in (p for moe in moes(model) for p in moe.experts.parameters()):
        hit = p.grad.flatten(1).abs().amax(1) > 0
        assert hit.tolist() == [e in (1, 6) for e in range(8)]


@pytest.mark.parametrize("T, width", [(1, 32), (3, 32), (3, 4096)], ids=["loop", "all", "loop of 3"])
def test_the_ways_for_few_tokens_equal_the_grouped_path(T, width):
    """With gradients on all tokens are grouped; without, these go expert by expert or all at once."""
    torch.manual_seed(0)
    cfg = KimiConfig.preset("nano", moe_intermediate_size=width)
    moe, x = kimi_k2.MoE(cfg), torch.randn(T, cfg.hidden_size)
    for p in moe.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1)
    chosen, weights, _ = moe.gate(x)
    grouped, load = moe.experts(x, chosen, weights)
    with torch.no_grad():
        few, none = moe.experts(x, chosen, weights)
    assert load.sum() == T * cfg.num_experts_per_tok and none is None
    assert off(few, grouped) <= 1e-6


@pytest.mark.parametrize("onednn", [kimi_k2.EXACT_ONEDNN, False])
def test_experts_one_after_another_equal_the_formula_and_its_gradients(onednn, monkeypatch):
    """Many rows an expert, on a CPU: other code than for few, and than for the float64 that it is held to."""
    monkeypatch.setattr(kimi_k2, "EXACT_ONEDNN", onednn)
    cfg, g, N = KimiConfig.preset("nano"), torch.Generator().manual_seed(0), 1100
    experts = kimi_k2.Experts(cfg)
    for p in experts.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1, generator=g)
    scores = torch.rand(N, 8, generator=g) + torch.tensor([0, 0, -2, 0.5, 0, 0, 0.2, 0])  # nobody wants 2
    chosen, weights = scores.topk(2).indices, torch.rand(N, 2, generator=g)
    x, upstream = torch.randn(N, 64, generator=g), torch.randn(N, 64, generator=g)
    results = []
    for module in (experts, copy.deepcopy(experts).double()):
        like = next(module.parameters()).dtype
        inputs = [t.to(like, copy=True).requires_grad_() for t in (x, weights)]
        y, load = module(inputs[0], chosen, inputs[1])
        y.backward(upstream.to(like))
        results.append((y, *(t.grad for t in (*inputs, *module.parameters()))))
        assert load.tolist() == [(chosen == e).sum() for e in range(8)] and load[2] == 0
    assert [type(y.grad_fn).__name__ for y, *_ in results] == [
        "EachExpertBackward" if onednn else "IndexAddBackward0", "IndexAddBackward0"]
    assert all(off(a, b) <= 1e-6 for a, b in zip(*results))
    assert not any(p.grad[2].any() for p in experts.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the kernel knows no float64
@pytest.mark.parametrize("C, width", [(8, 12), (7, 5)])  # and no rows of 7 * 4 bytes
def test_grouped_linear_equals_a_loop_with_and_without_the_kernel(C, width, dtype):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(30, C, generator=g), torch.randn(6, width, C, generator=g)
    ends = torch.tensor([4, 4, 11, 12, 30, 30])  # experts 1 and 5 have no rows
    x, weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    y = kimi_k2.grouped_linear(x, weight, ends)
    expert = torch.tensor([int((ends <= row).sum()) for row in range(30)])
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, weight))
    reference = torch.einsum("mfc,mc->mf", w64[expert], x64)
    assert off(y, reference) <= 1e-6
    upstream = torch.randn(30, width, generator=g)
    y.backward(upstream.to(dtype)), reference.backward(upstream.double())
    assert off(x.grad, x64.grad) <= 1e-6 and off(weight.grad, w64.grad) <= 1e-6
    assert not weight.grad[[1, 5]].any()


def test_gradcheck_through_the_experts():
    cfg = KimiConfig.preset("nano", hidden_size=3, moe_intermediate_size=2, n_routed_experts=4)
    experts, g = kimi_k2.Experts(cfg).double(), torch.Generator().manual_seed(0)
    shapes = [(5, 3), (5, 2), *(p.shape for p in experts.parameters())]
    inputs = [torch.randn(shape, generator=g).double().requires_grad_() for shape in shapes]
    chosen = torch.tensor([[0, 1], [1, 3], [3, 0], [1, 0], [0, 3]])  # nobody wants expert 2

    def run(x, weights, *matrices):
        named = dict(zip(dict(experts.named_parameters()), matrices))
        return torch.func.functional_call(experts, named, (x, chosen, weights))[0]

    assert torch.autograd.gradcheck(run, inputs)


def naive_aux_loss(chosen, scores, B):
    """V3 eq. 17-20 without alpha, for sequences of T tokens: mean over B of sum_i f_i P_i."""
    E, K, T, total = scores.shape[1], chosen.shape[1], len(scores) // B, 0.0
    for b in range(B):
        tokens = range(b * T, (b + 1) * T)
        for i in range(E):
            f = E / (K * T) * sum(i in chosen[t].tolist() for t in tokens)
            P = sum((scores[t, i] / scores[t].sum()).item() for t in tokens) / T
            total += f * P / B
    return total


def test_auxiliary_loss_equals_the_formula_of_deepseek_v3():
    model, expected = nano(), 0.0
    for moe in moes(model):
        chosen, _, scores = moe.gate(seen_by(moe.gate, partial(model, ids(3, 10)))[0])
        expected += naive_aux_loss(chosen, scores.double(), B=3)
    assert model.aux_loss.item() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(2, rel=1e-3)  # what a balanced model has: the test is sharp
    model.aux_loss.backward()
    assert all(moe.gate.weight.grad.abs().max() > 0 for moe in moes(model))


def test_auxiliary_loss_is_one_a_layer_when_balanced():
    scores = torch.rand(8, generator=torch.Generator().manual_seed(0)).repeat(8, 1)
    scores = torch.stack([row.roll(t) for t, row in enumerate(scores)])  # equal shares in the mean
    chosen = torch.tensor([[t, (t + 3) % 8] for t in range(8)])  # equal loads
    assert kimi_k2.sequence_aux_loss(chosen, scores, 1).item() == pytest.approx(1, rel=1e-6)
    model = nano()
    for moe in moes(model):
        moe.gate.weight.data.zero_()
    model(ids(2, 16))
    assert model.aux_loss.item() == pytest.approx(len(moes(model)), rel=1e-6)


@pytest.mark.parametrize("E, K, published", [(64, 6, 2.446), (384, 8, 2.828)])
def test_gate_factor_gives_the_published_ones(E, K, published):
    assert kimi_k2.gate_factor(E, K) == pytest.approx(published, abs=0.003)


# -- 6  records ------------------------------------------------------------------------------------


def naive_max_logits(model, x):
    """S_max (L, H) of one batch."""
    was_training, s_max = model.training, []
    model.eval()  # so that looking records nothing
    for layer, block in enumerate(model.model.layers):
        (x_in,) = seen_by(block.self_attn, partial(model, x))
        s_max.append(naive_attention(model, layer, x_in)[2].amax((0, 2, 3)))
    model.train(was_training)
    return torch.stack(s_max)


@pytest.mark.parametrize("variant", ["plain", "no_q_lora"])
@pytest.mark.parametrize("lengths", [(150, 37), (LONG, 280)])
def test_max_logits_are_the_naive_maxima_over_both_micro_batches(lengths, variant):
    model = nano(**VARIANTS[variant])
    batches = ids(2, lengths[0]), ids(3, lengths[1], seed=2)
    first, second = (naive_max_logits(model, x) for x in batches)
    for x in batches:
        model(x)
    assert off(model.max_logits, torch.maximum(first, second)) <= 1e-5
    assert (first > second).any() and (second > first).any()  # each micro-batch matters somewhere


@pytest.mark.parametrize("training, gradients", [(True, True), (False, True), (True, False)])
def test_records_are_made_only_while_training(training, gradients):
    model = nano().train(training)
    with torch.set_grad_enabled(gradients):
        model(ids(2, 20))
    recorded = training and gradients
    assert torch.isfinite(model.max_logits).all() == recorded
    assert (model.expert_load.sum(1) == 2 * 20 * 2).all() == recorded
    if not recorded:
        assert (model.max_logits == -math.inf).all() and not model.expert_load.any()


def trained(T, wrap=None, recompute="off"):
    """A model after two micro-batches, forward and backward."""
    model = nano()
    model.recompute = recompute
    for seed in (1, 3):
        x, y = ids(2, T, seed), ids(2, T, seed + 1)
        loss = wrap(model, x, y)[1] if wrap else model(x, y)[1]
        loss.backward()
    return model


@pytest.mark.parametrize("T", [20, 512])  # many tokens take other paths than few
@pytest.mark.parametrize("how", ["parts", "blocks", "external"])
def test_recomputation_changes_neither_gradients_nor_records(how, T):
    plain = trained(T)
    assert (plain.expert_load.sum(1) == 2 * (2 * T) * 2).all()  # micro-batches * tokens * K
    if how == "external":
        other = trained(T, wrap=partial(checkpoint, use_reentrant=False))
    else:
        other = trained(T, recompute=how)
    assert torch.equal(plain.expert_load, other.expert_load)
    assert torch.equal(plain.max_logits, other.max_logits)
    for (name, p), q in zip(plain.named_parameters(), other.parameters()):
        assert off(q.grad, p.grad) <= 1e-6, name


# -- 7  generation ---------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model, x, n):
    """n likeliest tokens, one full forward each."""
    for _ in range(n):
        x = torch.cat((x, model(x)[0][:, -1:].argmax(-1)), dim=1)
    return x


def test_greedy_generation_takes_the_likeliest_token_each_time():
    model = nano()
    assert torch.equal(model.generate(ids(3, 5), 12, temperature=0), greedy(model, ids(3, 5), 12))


def test_a_seed_repeats_a_sample_and_another_does_not():
    model = nano()
    a, b, c = (
        model.generate(ids(2, 5), 20, temperature=1.0, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def naive_distribution(logits, temperature, top_p):
    """Softmax, cut to the smallest set of likeliest tokens whose probabilities reach top_p."""
    p = [math.exp(value / temperature) for value in logits]
    p = [value / sum(p) for value in p]
    kept, mass = [0.0] * len(p), 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass >= top_p:
            break
        kept[i], mass = p[i], mass + p[i]
    return [value / mass for value in kept]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.35, 1e-6])
def test_sampling_follows_the_naive_distribution(temperature, top_p):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.7, 0.9, -0.4])
    expected, n = torch.tensor(naive_distribution(logits.tolist(), temperature, top_p)), 20_000
    g = torch.Generator().manual_seed(0)
    drawn = kimi_k2.sample_token(logits.expand(n, 6), temperature, top_p, g).bincount(minlength=6)
    assert not drawn[expected == 0].any()
    sigma = (expected * (1 - expected) / n).sqrt()
    assert ((drawn / n - expected).abs() <= 4 * sigma + 1e-9).all()


def stop_case():
    """A model, prompts, their greedy continuation, and two stops that end the rows differently."""
    model, x = nano(), ids(2, 5)
    free = greedy(model, x, 12)
    stops = [free[0, 5 + 3].item(), free[1, 5 + 6].item()]
    ends = [next(t for t in range(5, 17) if row[t].item() in stops) + 1 for row in free]
    assert ends[0] != ends[1]
    return model, x, free, stops, ends


def test_finished_rows_of_a_tensor_are_filled_with_pad():
    model, x, free, stops, ends = stop_case()
    out = model.generate(x, 12, temperature=0, stop=stops)
    assert out.shape == (2, max(ends))  # no step after the last row has ended
    for row, reference, end in zip(out, free, ends):
        assert torch.equal(row[:end], reference[:end]) and (row[end:] == 511).all()


def test_rows_of_a_list_are_cut_after_their_stop():
    model, x, free, stops, ends = stop_case()
    out = model.generate([x[0].tolist(), x[1, 2:]], 12, temperature=0, stop=stops)
    shorter = model.generate(x[1:, 2:], 12, temperature=0, stop=stops)[0]
    assert torch.equal(out[0], free[0, : ends[0]]) and torch.equal(out[1], shorter)
    assert out[1].ndim == 1


def test_rows_that_end_leave_those_that_go_on_alone():
    """Half of a batch having ended, it leaves: with prompts of different lengths, and more than once."""
    model = nano()
    prompts = [ids(1, n, seed=n)[0] for n in (4, 9, 5, 7, 3, 8, 6)]
    alone = [greedy(model, prompt[None], 24)[0] for prompt in prompts]
    stops = [row[len(prompt) + at].item() for row, prompt, at in zip(alone, prompts, (0, 1, 4, 9, 14))]
    out = model.generate(prompts, 24, temperature=0, stop=stops)
    lengths = set()
    for row, reference, prompt in zip(out, alone, prompts):
        new = reference[len(prompt):].tolist()
        end = len(prompt) + min([new.index(stop) + 1 for stop in stops if stop in new], default=24)
        lengths.add(end - len(prompt))
        assert torch.equal(row, reference[:end])
    assert len(lengths) >= 3


def test_one_stop_id_needs_no_list_and_is_ignored_inside_the_prompt():
    model, x, free, stops, _ = stop_case()
    (row,) = model.generate([[stops[0], *x[0].tolist()]], 3, temperature=0, stop=stops[0])
    reference = greedy(model, torch.tensor([[stops[0], *x[0].tolist()]]), 3)[0]
    hits = (reference[6:] == stops[0]).nonzero()
    assert torch.equal(row, reference[: 6 + hits[0, 0] + 1] if len(hits) else reference)
    out = model.generate(x[:1], 12, temperature=0, stop=stops[0])
    first = free[0, 5:].tolist().index(stops[0])
    assert torch.equal(out, free[:1, : 5 + first + 1])


@pytest.mark.parametrize("prompts", [[[]], [[1, 2], []], torch.zeros(1, 0, dtype=torch.long)])
def test_an_empty_prompt_is_refused(prompts):
    with pytest.raises(ValueError, match="at least one token"):
        nano().generate(prompts, 2)


@pytest.mark.parametrize("bad", [512, 99999, -3])
def test_a_token_outside_the_vocabulary_is_named(bad):
    model, x = nano(), torch.tensor([[1, bad]])
    for run in (model, model.generate, lambda x: model.generate([x[0], [1, 2, 3]])):
        with pytest.raises(ValueError, match=f"token id {bad} .* 512"):
            run(x)


# -- 8  bf16 autocast ------------------------------------------------------------------------------


def test_under_autocast_the_router_stays_in_fp32_and_logits_stay_near():
    model, x, outputs = nano(), ids(2, 40), []
    hook = moes(model)[0].gate.register_forward_hook(lambda *call: outputs.append(call[1:]))
    reference, loss = pinned(model.cfg, model, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        logits, half_loss = pinned(model.cfg, model, x, x)
    hook.remove()
    (x_in,), (_, weights, scores) = outputs[1]
    exact = (x_in.double() @ moes(model)[0].gate.weight.double().T).sigmoid()
    assert scores.dtype == weights.dtype == torch.float32 and off(scores, exact) <= 1e-6
    assert logits.dtype == torch.bfloat16  # so autocast was at work
    assert 1e-4 < off(logits, reference) <= 0.03
    assert half_loss.item() == pytest.approx(loss.item(), rel=0.01)


@pytest.mark.parametrize("B", [2, 6])  # few tokens take another path than many
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_generation_works_in_bf16_and_its_logits_stay_near(weights, B):
    model, x = nano(), ids(B, 24)
    exact = model(x)[0]
    model = model.to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        assert model.generate(x, 4, temperature=0).shape == (B, 28)
        cache = LatentCache(model.cfg, B, dtype=torch.bfloat16)
        logits = [model(x[:, :20], cache=cache)[0]]
        decoder = kimi_k2.Decoder(model)
        logits += [decoder.step(x[:, t], cache)[:, None] for t in range(20, 24)]
    # the median: a token whose choice of experts flips may be far off
    wrong = (torch.cat(logits, dim=1).float() - exact).abs()
    assert wrong[:, :20].median() < 0.01 * exact.abs().max() > wrong[:, 20:].median()


# -- 9  sizes of the full configuration ------------------------------------------------------------

PRESETS = list(kimi_k2.PRESETS)


@once
def meta_sizes(preset):
    """Elements of each tensor of the state dict, without memory for any."""
    with torch.device("meta"):
        model = KimiK2(KimiConfig.preset(preset))
    return {name: t.numel() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_counts_are_those_of_the_model(preset):
    cfg, sizes = KimiConfig.preset(preset), meta_sizes(preset)
    counts = count_parameters(cfg)
    part = {"embed_tokens": "embedding", ".experts.": "routed_experts", "norm": "norms",
            ".shared_experts.": "shared_experts", ".mlp.gate.": "router",
            ".self_attn.": "attention", ".mlp.": "dense"}  # the first that fits
    sums = dict.fromkeys(part.values(), 0)
    for name, size in sizes.items():
        if name != "lm_head.weight":
            sums[next(part[key] for key in part if key in name)] += size
    assert sums == {key: getattr(counts, key) for key in sums}
    assert counts.total == sum(sizes.values())
    met = sums["routed_experts"] * cfg.num_experts_per_tok // cfg.n_routed_experts
    assert counts.active == counts.total - sums["routed_experts"] + met


def test_published_sizes():
    k2, moonlight = (count_parameters(KimiConfig.preset(name)) for name in ("k2", "moonlight"))
    assert k2.total == 1_026_408_232_448 and k2.active == pytest.approx(32.86e9, abs=0.01e9)
    assert moonlight.total == 15_960_110_208
    assert moonlight.active == pytest.approx(2.91e9, abs=0.01e9)
    assert k2.cache_bytes_per_token() == 70_272


def flops_of(run, *args, **kwargs):
    """Multiplications and additions by kind of product; torch does not know grouped_mm's."""
    grouped = {torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * math.prod(a) * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter:
        run(*args, **kwargs)
    counts = counter.get_flop_counts()["Global"]
    return {str(op).removeprefix("aten."): n for op, n in counts.items()}


def test_train_flops_equal_a_count():
    cfg, T = KimiConfig.preset("tiny"), 64
    model = KimiK2(cfg).eval()  # not in training mode: S_max is no part of the model's arithmetic
    products = flops_of(lambda: model(ids(2, T), ids(2, T))[1].backward())
    linear = sum(n for op, n in products.items() if op in ("mm", "addmm", "_grouped_mm")) / (2 * T)
    keys = sum(t + 1 for t in range(T)) / T  # causal: token t looks at t + 1 keys
    width = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim
    attention = 3 * 2 * cfg.num_hidden_layers * cfg.num_attention_heads * keys * width
    assert count_parameters(cfg).train_flops(T) == pytest.approx(linear + attention, rel=1e-4)


@torch.no_grad()
def test_decode_flops_equal_a_count():
    cfg, seen = KimiConfig.preset("tiny"), {}
    model, counts = KimiK2(cfg).eval(), count_parameters(cfg)
    for context in (30, 200):
        cache = LatentCache(cfg, 32)  # 32 rows: fewer would go through Experts.few
        model(ids(32, context), cache=cache)
        products = flops_of(model, ids(32, 1), cache=cache, absorb=True)
        seen[context] = sum(products.values()) / 32
        assert counts.decode_flops(context) == pytest.approx(seen[context], rel=2e-3)
    slope = counts.decode_flops(200) - counts.decode_flops(30)
    assert slope == pytest.approx(seen[200] - seen[30], rel=1e-9)
