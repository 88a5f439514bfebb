"""How fast is it? Every answer is a ratio of two things measured in turn, in one run.

    python tests/bench.py                                   the table, about a minute on 2 cores
    python tests/bench.py --rows train,decode --repeats 3 --json bench.json
    python tests/bench.py --rows "" --profile               where our time goes
    python tests/bench.py --rows experts --figure assets/experts.png

Seconds depend on the machine and on what else it does; the ratio of neighbours in time hardly does.
So the contestants run A B A B ... with the same threads, after a warm-up. A figure is a ratio of
medians; the brackets hold the middle half of the single rounds. A missed goal is no error.
"""

import argparse
import gc
import inspect
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run without an install, too
import kimi_k2  # noqa: E402
from kimi_k2 import KimiConfig, KimiK2, MuonClip, count_parameters, save_pretrained  # noqa: E402

BATCH = {"nano": (32, 64), "tiny": (32, 128), "small": (16, 2048), "medium": (4, 4096)}
RATES = dict(lr=2e-4, weight_decay=0.1)
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense, from the data sheets
synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
EXPERTS = (8, 16, 32, 64, 128, 256, 384)
ROUND = 0.1  # seconds: what is faster is repeated until a round is this long

# ---------------------------------------------------------------------------------- measuring


def interleaved(contestants, repeats):
    """{name: callable} -> {name: seconds of each round}; the contestants take turns."""

    def seconds(run, times):
        synchronize()
        start = time.perf_counter()
        for _ in range(times):
            run()
        synchronize()
        return (time.perf_counter() - start) / times

    for run in contestants.values():
        run()  # first calls allocate, choose kernels, compile
    slowest = max(seconds(run, 1) for run in contestants.values())
    times, rounds = max(1, math.ceil(ROUND / slowest)), {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            rounds[name].append(seconds(run, times))
    return rounds


def row(what, rounds, formula, goal=None, at_most=False, unit="x", note=""):
    """Print `formula` of the contestants' medians, and its quartiles over single rounds."""
    value = formula(**{name: statistics.median(times) for name, times in rounds.items()})
    single = [formula(**dict(zip(rounds, times))) for times in zip(*rounds.values())]
    low, _, high = statistics.quantiles(single * 2, n=4)  # twice: one round alone has no quartiles
    reached = None if goal is None else value <= goal if at_most else value >= goal

    def show(x):
        return f"{100 * x:.1f} %" if unit == "%" else f"{x:.2f}x"

    if goal is not None and high - low > 0.3 * abs(value):
        note = f"NOISY, run it alone on the machine; {note}"
    aim = "" if goal is None else f"{'<=' if at_most else '>='} {show(goal)}"
    verdict = {True: "yes", False: "NO", None: "-"}[reached]
    figure = f"{show(value)} ({show(low)} - {show(high)})"
    print(f"{what:<43} {figure:<25} {aim:<10} {verdict:<7} {note}", flush=True)
    return dict(what=what, value=value, low=low, high=high, unit=unit, goal=goal, at_most=at_most,
                reached=reached, note=note, seconds=rounds)


# ---------------------------------------------------------------------------------- contestants


def setup(args, preset=None, **overrides):
    """Preset, its config and random (tokens, targets): what a step costs hardly depends on them."""
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.empty_cache()  # what the last row leaves behind
    preset = preset or args.preset or ("small" if args.device.type == "cuda" else "tiny")
    cfg = KimiConfig.preset(preset, **overrides)
    B, T = BATCH.get(preset, (1, cfg.max_position_embeddings))
    ids = torch.randint(cfg.vocab_size - 256, (B, T + 1), device=args.device)
    return preset, cfg, (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def autocast(x):
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)


def forward_backward(model, tokens, targets):
    with autocast(tokens):
        loss = model.loss(tokens, targets)
    (loss + 1e-4 * model.aux_loss).backward()


def passes(cfg, data):
    """Forward and backward without an optimizer."""
    model = KimiK2(cfg).to(data[0].device)
    return lambda: (model.zero_grad(set_to_none=True), forward_backward(model, *data))


def our_step(cfg, data, compiled=False):
    """The whole step: S_max, loads and auxiliary loss are recorded, as in real training."""
    model = KimiK2(cfg).to(data[0].device)
    optimizer = MuonClip(model, **RATES)
    if compiled:
        model.compile()

    def step():
        forward_backward(model, *data)
        optimizer.step()
        optimizer.zero_grad()

    return step


class TheirOptimizer:
    """torch.optim.Muon for matrices, fused AdamW for embedding, head and norms.

    Muon takes 2-D parameters only: each expert's matrix becomes one that views the stacked tensor,
    as its gradient views the stack's. Gate and up stay one matrix, as transformers stores them:
    fewer products, which is in their favour.
    """

    def __init__(self, model):
        matrices, others, self.stacks, self.model = [], [], [], model
        for name, p in model.named_parameters():
            if p.ndim == 3:
                views = [torch.nn.Parameter(view) for view in p.data.unbind(0)]
                self.stacks.append((p, views))
                matrices += views
            else:
                muon = p.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
                (matrices if muon else others).append(p)
        self.muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **RATES)
        self.adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), fused=True, **RATES)

    def step(self):
        for stack, views in self.stacks:
            for view, gradient in zip(views, stack.grad.unbind(0)):
                view.grad = gradient
        self.muon.step()
        self.adamw.step()
        self.model.zero_grad(set_to_none=True)


def their_settings(model, tokens):
    """(attention, experts) pairs worth a trial.

    batched_mm copies weights for every token: gigabytes, and 12 times the time where it was tried
    on a training step of tiny. It stays in where it is small, as in decoding.
    """
    cfg, layers = model.config, model.config.num_hidden_layers if model.training else 1
    visits = tokens.numel() * cfg.num_experts_per_tok * layers  # training keeps all the copies
    copies = 4 * visits * 3 * cfg.moe_intermediate_size * cfg.hidden_size
    fits = 2 * copies < (torch.cuda.mem_get_info()[0] if tokens.is_cuda else 4e9)
    pairs = [("sdpa", "eager"), ("sdpa", "grouped_mm")] + [("sdpa", "batched_mm")] * fits
    # on CPU, sdpa has no fast kernel for values narrower than keys, so plain attention may win
    return pairs + [("eager", "grouped_mm")] * (not tokens.is_cuda)


def best_of(candidates):
    """Try [(model, (attention, experts), run)] shortly. The best run, its model set, and a note."""

    def choose(model, pair):
        model.set_attn_implementation(pair[0])
        model.set_experts_implementation(pair[1])

    trials, named = {}, {}
    for model, pair, run in candidates:
        label = " + ".join(pair) + " in bf16" * (model.dtype == torch.bfloat16)
        trial = lambda m=model, p=pair, r=run: (choose(m, p), r())  # noqa: E731
        try:
            trial()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"    theirs, {label}: does not run here: {str(error).splitlines()[0][:70]}")
        else:
            trials[label], named[label] = trial, (model, pair, run)
    seconds = {label: min(times) for label, times in interleaved(trials, 2).items()}
    best = min(seconds, key=seconds.get)
    others = (f"{label} {t / seconds[best]:.2f}" for label, t in seconds.items() if label != best)
    model, pair, run = named[best]
    choose(model, pair)
    return run, f"theirs: {best} (1.00; {', '.join(others)})"


def their_step(cfg, data, compiled=False):
    """Their training step at its best settings, and what else was tried.

    transformers does not cast experts under autocast: with fp32 weights their products stay fp32.
    So on a GPU a model with bf16 weights competes too, though it trains less exactly than ours.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    tokens, targets = data
    candidates = []
    for dtype in [torch.float32] + [torch.bfloat16] * tokens.is_cuda:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**cfg.to_json())).to(tokens.device, dtype)
        optimizer = TheirOptimizer(model.train())
        if compiled:
            model.compile()

        def step(model=model, optimizer=optimizer):
            with autocast(tokens):
                out = model(tokens, labels=tokens, shift_labels=targets, use_cache=False)
            out.loss.backward()
            optimizer.step()

        candidates += [(model, pair, step) for pair in their_settings(model, tokens)]
    return best_of(candidates)


# ---------------------------------------------------------------------------------- rows


def bench_train(args):
    preset, cfg, data = setup(args)
    theirs, note = their_step(cfg, data, args.compile)
    ours = our_step(cfg, data, args.compile)
    rounds = interleaved({"ours": ours, "theirs": theirs}, args.repeats)
    note = f"{data[0].numel() / statistics.median(rounds['ours']):,.0f} tok/s; {note}"
    goal = 2.0 if args.device.type == "cuda" else 1.5
    what = f"train step, {preset}: theirs / ours"
    return [row(what, rounds, lambda theirs, ours: theirs / ours, goal, note=note)]


def dense_twin(cfg):
    """The same model with every MoE layer replaced by a dense FFN of equal active FLOPs."""
    width = (cfg.num_experts_per_tok + cfg.n_shared_experts) * cfg.moe_intermediate_size
    return replace(cfg, first_k_dense_replace=cfg.num_hidden_layers, intermediate_size=width)


def layer_run(cfg, shape, device):
    """Forward and backward of the last layer's FFN: router, experts and records, or dense."""
    layer = KimiK2(cfg).model.layers[-1].mlp.to(device)
    x = torch.randn(*shape, cfg.hidden_size, device=device, requires_grad=True)
    gradient = torch.randn_like(x)

    def run():
        layer.zero_grad(set_to_none=True)
        x.grad, moe = None, isinstance(layer, kimi_k2.MoE)
        with autocast(x):
            y, (_, aux) = layer(x, True) if moe else (layer(x), (None, 0.0))
        loss = [1e-4 * aux] if moe else []
        torch.autograd.backward([y, *loss], [gradient.to(y.dtype), *map(torch.ones_like, loss)])

    return run


def bench_moe(args):
    preset, cfg, data = setup(args)
    wide = KimiConfig.preset("tiny", hidden_size=256, n_routed_experts=32, num_experts_per_tok=4,
                             moe_intermediate_size=128)
    lines = []
    for c in (cfg, wide):
        shapes = {"moe": c, "dense": dense_twin(c)}
        runs = {k: layer_run(shape, data[0].shape, args.device) for k, shape in shapes.items()}
        size = f"C {c.hidden_size}, {c.n_routed_experts} top {c.num_experts_per_tok}"
        rounds = interleaved(runs, args.repeats)
        lines.append(row(f"MoE / dense, layer, {size}", rounds, lambda moe, dense: moe / dense))

    rounds = interleaved({"moe": passes(cfg, data), "dense": passes(dense_twin(cfg), data)}, args.repeats)
    what = f"MoE / dense, whole model, {preset}"
    return [*lines, row(what, rounds, lambda moe, dense: moe / dense, 1.25, at_most=True)]


def bench_optimizer(args):
    preset, cfg, data = setup(args)
    model, still = KimiK2(cfg).to(args.device), KimiK2(cfg).to(args.device)
    forward_backward(still, *data)  # its gradients stay, for the optimizers alone
    muonclip = MuonClip(still, **RATES)
    adamw = torch.optim.AdamW(still.parameters(), fused=True, **RATES)

    def both():
        model.zero_grad(set_to_none=True)
        forward_backward(model, *data)

    attention = kimi_k2.MLA.forward
    names = inspect.signature(attention)

    def silent(*values, **named):
        call = names.bind(*values, **named)
        call.arguments["record"] = False
        return attention(*call.args, **call.kwargs)[0], torch.zeros(values[0].H, device=args.device)

    def no_s_max():  # our model as it would be if nobody wanted to know S_max
        with mock.patch.object(kimi_k2.MLA, "forward", silent):
            both()

    runs = dict(step=our_step(cfg, data), both=both, no_s_max=no_s_max, muonclip=muonclip.step,
                adamw=adamw.step)
    rounds, goal = interleaved(runs, args.repeats), 0.08 if args.device.type == "cuda" else 0.20
    shares = (
        (f"MuonClip + S_max, share of the step, {preset}", goal,
         lambda step, both, no_s_max, muonclip, **_: (muonclip + both - no_s_max) / step),
        ("  MuonClip.step alone", None, lambda step, muonclip, **_: muonclip / step),
        ("  S_max alone", None, lambda step, both, no_s_max, **_: (both - no_s_max) / step),
        ("  fused AdamW instead, to compare", None, lambda step, adamw, **_: adamw / step),
    )
    return [row(what, rounds, share, goal, True, unit="%") for what, goal, share in shares]


def bench_decode(args, new=128, prompt=32):
    """Greedy, fp32, the same weights: `save_pretrained` writes them, transformers reads them."""
    from transformers import AutoModelForCausalLM as Auto

    # wider weights than a fresh model's: clear winners, so that rounding cannot pick the token
    preset, cfg, _ = setup(args, args.preset or "tiny", initializer_range=0.1)
    model = KimiK2(cfg).to(args.device).eval()
    model.compile_decode = args.compile
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, None, f"{folder}/model")
        theirs = Auto.from_pretrained(f"{folder}/model", dtype=torch.float32).to(args.device).eval()
    theirs.generation_config.eos_token_id = None  # nobody stops early
    settings = dict(do_sample=False, use_cache=True, pad_token_id=cfg.vocab_size - 1)

    def compare(B):
        ids = torch.randint(cfg.vocab_size - 256, (B, prompt), device=args.device)
        mask = torch.ones_like(ids)

        def generate(n=new):
            return theirs.generate(ids, attention_mask=mask, max_new_tokens=n, **settings)

        pairs = their_settings(theirs, ids)
        _, tried = best_of([(theirs, pair, lambda: generate(new // 4)) for pair in pairs])
        runs = {"ours": lambda: model.generate(ids, new, temperature=0), "theirs": generate}
        same = (runs["ours"]() == runs["theirs"]()).all(dim=1).sum().item()
        rounds = interleaved(runs, args.repeats)
        speed = f"{B * new / statistics.median(rounds['ours']):,.0f} tok/s"
        note = f"{speed}; {same} of {B} rows have identical tokens; {tried}"
        what = f"decode, {preset}, batch {B}: theirs / ours{', compiled' * args.compile}"
        return row(what, rounds, lambda theirs, ours: theirs / ours, 3.0, note=note)

    return [compare(B) for B in (1, 64 if args.device.type == "cuda" else 16)]


def bench_mfu(args):
    """Model FLOPs (recomputation not counted) over the data sheet's peak; CUDA only."""
    card, lines = torch.cuda.get_device_name(), []
    peak = next((peak for name, peak in BF16_PEAK.items() if name in card), None)
    if peak is None:
        print(f"the peak of {card} is unknown: no MFU")
        return []
    for preset, goal in (("small", None), ("medium", 0.40)):
        for layers in range(KimiConfig.preset(preset).num_hidden_layers, 1, -1):
            _, cfg, data = setup(args, preset, num_hidden_layers=layers)
            n = count_parameters(cfg)
            if 2 * sum(n.training_bytes().values()) < torch.cuda.mem_get_info()[0]:
                break  # weights, gradients and optimizer may take half, activations the rest
        torch.cuda.reset_peak_memory_stats()
        rounds = interleaved({"step": our_step(cfg, data, args.compile)}, args.repeats)
        best = n.train_flops(data[0].shape[1]) * data[0].numel() / peak  # seconds at peak
        note = f"{torch.cuda.max_memory_allocated() / 2**30:.0f} GiB at most; {card}"
        what, share = f"MFU, {preset}, {layers} layers", lambda step, best=best: best / step
        lines.append(row(what, rounds, share, goal, unit="%", note=note))
    return lines


def bench_experts(args):
    """A step with 8 experts active for a token, out of more and more: the arithmetic stays the same, the
    weights that the optimizer reads do not."""
    lines = []
    for what, make in (("forward and backward", passes), ("train step", our_step)):
        runs = {}
        for experts in EXPERTS:
            preset, cfg, data = setup(args, n_routed_experts=experts, num_experts_per_tok=8)
            runs[str(experts)] = make(cfg, data)
        rounds = interleaved(runs, args.repeats)
        for experts in EXPERTS:
            goal = 1.15 if (experts, args.device.type) == (384, "cuda") else None
            lines.append(row(f"{what}, {experts} / 32 experts", rounds,
                             lambda experts=experts, **seconds: seconds[str(experts)] / seconds["32"],
                             goal, at_most=True))
    if args.figure:
        draw_experts(lines, args)
    return lines


def draw_experts(lines, args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for what, style in (("forward and backward", "o-"), ("train step", "s--")):
        ratios = [line["value"] for line in lines if line["what"].startswith(what)]
        axes.plot(EXPERTS, ratios, style, label=what)
    axes.axhline(1.15, color="gray", lw=0.8, ls=":", label="+15 %")
    axes.set_xscale("log", base=2)
    axes.set_xticks(EXPERTS, EXPERTS)
    axes.set(xlabel="experts, 8 of them active for a token", ylabel="time, 32 experts = 1", ylim=(0, None),
             title=f"Step time against number of experts ({args.device.type})")
    axes.legend(frameon=False)
    figure.savefig(args.figure, dpi=150)


def show_profile(args):
    """The 15 operations that cost most, in a train step and in decoding."""
    preset, cfg, data = setup(args)
    model, ids = KimiK2(cfg).to(args.device).eval(), data[0][:, :32]
    runs = {"train step": our_step(cfg, data),
            "decode, batch 1": lambda: model.generate(ids[:1], 32, temperature=0),
            "decode, batch 16": lambda: model.generate(ids[:16], 32, temperature=0)}
    for what, run in runs.items():
        run()
        with torch.profiler.profile() as recorded:
            run()
            synchronize()
        print(f"\n{what}, {preset}")
        order = f"self_{args.device.type}_time_total"
        print(recorded.key_averages().table(order, row_limit=15, max_name_column_width=40))


ROWS = dict(train=bench_train, moe=bench_moe, optimizer=bench_optimizer, decode=bench_decode,
            mfu=bench_mfu, experts=bench_experts)


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(kimi_k2.PRESETS), help="default: tiny; CUDA: small, not to decode")
    add("--rows", help=f"some of {','.join(ROWS)}; default: all but experts, mfu on CUDA only")
    add("--repeats", type=int, default=7, help="rounds after the warm-up")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--threads", type=int, help="CPU threads, for everybody; default: torch's choice")
    add("--compile", action="store_true", help="torch.compile both sides of train, ours of decode, and mfu")
    add("--profile", action="store_true", help="also print where our time goes")
    add("--figure", type=Path, help="where experts draws its curve")
    add("--json", type=Path, help="write the table, with every round's seconds, to this file")
    args = parser.parse_args(argv)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = torch.device(auto if args.device == "auto" else args.device)
    here = [name for name in ROWS if name != "mfu" or args.device.type == "cuda"]
    usual = [name for name in here if name != "experts"]
    args.rows = usual if args.rows is None else [name for name in args.rows.split(",") if name]
    if unknown := [name for name in args.rows if name not in here]:
        parser.error(f"no row {unknown[0]!r} here; there are: {', '.join(here)}")
    return args


def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    chip = torch.cuda.get_device_name() if args.device.type == "cuda" else platform.machine()
    machine = dict(torch=torch.__version__, device=chip, threads=torch.get_num_threads())
    print(*(f"{k} {v}" for k, v in machine.items()), f"{args.repeats} rounds", sep=", ")
    print(f"{'what':<43} {'ratio (quartiles)':<25} {'goal':<10} {'reached':<7} note")
    lines = []
    for name in args.rows:
        torch.manual_seed(0)
        try:
            lines += ROWS[name](args)
        except ImportError as error:
            print(f"row {name} left out: {error}; pip install -e .[test]")
    missed = [line["what"] for line in lines if line["reached"] is False]
    print("goals missed: " + "; ".join(missed) if missed else "no goal missed")
    if args.json:
        args.json.write_text(json.dumps(dict(machine=machine, rows=lines), indent=1) + "\n")
    if args.profile:
        show_profile(args)


if __name__ == "__main__":
    main()
