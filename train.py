"""Kimi K2's training recipe at any size: data, pretraining with MuonClip, evaluation, report.

    python train.py                          everything at toy scale, no network, minutes on a laptop
    python train.py pretrain --preset small --data my_corpus/ --out runs/mine
    python train.py --resume --out runs/mine continue exactly where it stopped
    python train.py --preset k2 --plan       what the full run would cost; allocates nothing

    1 Run config and command line     every knob, the presets' defaults, the plan      R 2.4, 2.5
    2 Corpora and batches             four domains of text that needs no network       R 2.5
    3 Rephrasing                      one fact, many tellings, nothing lost or added   R 2.2
    6 The loop                        schedule, step, log, checkpoint, resume          R 2.5
    7 Stages                          pretraining, annealing, long context             R 2.5
    8 Evaluation and report           bits per byte, recall, needles, report.md

"R" is the technical report, arXiv 2507.20534. Letters in shape comments are those of kimi_k2.py.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import http.client
import inspect
import json
import math
import os
import platform
import random
import re
import signal
import sys
import sysconfig
import threading
import time
import tokenize
import types
import typing
import urllib.error
import urllib.request
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from kimi_k2 import (
    KimiConfig,
    KimiK2,
    LatentCache,
    MuonClip,
    Tokenizer,
    autocast_dtype,
    count_parameters,
    load_pretrained,
    save_pretrained,
)

# ==================================================================================================
# 1  Run config and command line
# ==================================================================================================


@dataclass
class RunConfig:
    """How to train. None means the preset's value (RUN_DEFAULTS). The comments are the --help."""

    preset: str = "tiny"  # size of the model: nano, tiny, small, medium, moonlight, k2
    out: str = "runs/toy"  # folder of the run; an existing one is continued, never overwritten
    data: str | None = None  # own text: .txt, .md, .jsonl, a folder, or hf:NAME; none: the toy corpora
    max_documents: int | None = None  # use at most so many documents of each domain
    domain_weights: dict | None = None  # share of each domain in a batch, as web=0.4,code=0.6
    anneal_weights: dict | None = None  # the same while annealing: more of the best data
    rephrase_max: int = 2  # rephrasings of a document at most; the report: two
    rephrase_domains: str = "knowledge,math,own"  # domains that are rephrased
    rewriter: str = "grammar"  # grammar (built in), none, or the folder of a model trained here
    rewriter_url: str | None = None  # rewrite by an OpenAI-compatible endpoint, as http://localhost:8000/v1
    rewriter_model: str | None = None  # its model; its key is read from REWRITER_API_KEY or OPENAI_API_KEY
    judge_url: str | None = None  # endpoint that judges what passed the built-in checks; key: JUDGE_API_KEY
    judge_model: str | None = None  # its model
    chunk_tokens: int = 256  # long documents are rewritten in pieces of so many tokens
    endpoint_parallel: int = 4  # calls of an endpoint at one time
    endpoint_rpm: float | None = None  # calls a minute at most
    endpoint_timeout: float = 60.0  # seconds to wait for an answer
    endpoint_retries: int = 5  # times to try again
    seed: int = 0  # of weights, data and samples
    steps: int | None = None  # optimizer steps of warm-up, constant rate and decay
    anneal_steps: int | None = None  # then of annealing; none: the report's share, at least 20
    long_steps: int | None = None  # then of long-context activation; none: the report's share, at least 20
    yarn_steps: int | None = None  # then with YaRN (the report gives no number); none: as long_steps
    long_factor: int = 8  # length of the activation, times seq_len
    yarn_factor: int = 32  # reach under YaRN, times seq_len
    batch_size: int | None = None  # sequences a step
    micro_batch: int | None = None  # sequences a forward pass; gradients add up to batch_size
    seq_len: int | None = None  # tokens a sequence
    optimizer: str = "muonclip"  # muonclip, muon (no QK-Clip) or adamw
    lr: float | None = None  # peak learning rate
    lr_end: float = 0.1  # learning rate at the end of the decay, as a share of the peak
    warmup: int | None = None  # steps of linear warm-up
    lr_anneal: float = 0.035  # learning rate when the annealing ends, as a share of the peak: 7e-6 / 2e-4
    decay: float = 0.355  # share of the steps in the cosine decay; the report's 5.5 T of 15.5 T
    weight_decay: float = 0.1  # decoupled, times the learning rate
    momentum: float = 0.95  # Muon's mu
    tau: float | None = None  # QK-Clip's threshold
    grad_clip: float | None = None  # largest gradient norm; none: no clipping, the report names none
    aux_alpha: float = 1e-4  # weight of the sequence-wise balance loss (V3's; K2 UNCONFIRMED)
    bias_update_rate: float | None = None  # u of the router biases (V3: 1e-3; K2 UNCONFIRMED)
    eval_every: int | None = None  # steps between validations, samples and plots
    eval_tokens: int | None = None  # validation tokens of each domain
    needles: int = 30  # needles to find in each length of context
    save_every: int | None = None  # steps between checkpoints
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # fp32 or bf16 (autocast); auto: bf16 on CUDA
    compile: str = "auto"  # torch.compile: auto, on or off; auto: on for CUDA
    recompute: bool = False  # keep only each block's input, recompute the rest: less memory
    threads: int | None = None  # CPU threads; none: PyTorch's choice
    gpus: int | None = None  # --plan: how many; none: as few as hold the training state
    gpu_tflops: float = 989.0  # --plan: dense bf16 peak of one (H100, H800: 989)
    gpu_gib: float = 80.0  # --plan: memory of one
    gpu_watts: float = 1000.0  # --plan: power of one with its share of the node (our assumption)
    gpu_hour: float = 2.0  # --plan: price of one for an hour in dollars (our assumption)
    mfu: float = 0.4  # --plan: share of the peak that is reached (our assumption)


# Toys train for hundreds of steps, not K2's 231,000, and want a larger learning rate and a faster
# router bias; no toy reaches logits of 100, so their tau is lower and QK-Clip has something to do.
# K2: 16,384 sequences of 4,096 tokens make the report's 67 M a step; 15.5 T tokens in all.
RUN_DEFAULTS = {
    "nano": dict(steps=60, batch_size=8, seq_len=64, lr=6e-3, warmup=5, tau=10.0, bias_update_rate=1e-2,
                 eval_every=30, eval_tokens=2048, save_every=20),
    "tiny": dict(steps=700, yarn_steps=60, batch_size=32, seq_len=128, lr=6e-3, warmup=20, tau=12.0,
                 bias_update_rate=1e-2, eval_every=100, eval_tokens=8192, save_every=100),
    "small": dict(steps=20_000, batch_size=128, micro_batch=16, seq_len=2048, lr=1e-3, warmup=200, tau=100.0,
                  bias_update_rate=1e-3, eval_every=500, eval_tokens=2**19, save_every=500),
    "medium": dict(steps=60_000, batch_size=1024, micro_batch=4, seq_len=4096, lr=5e-4, warmup=500, tau=100.0,
                   bias_update_rate=1e-3, eval_every=1000, eval_tokens=2**21, save_every=1000),
    "moonlight": dict(steps=85_000, long_steps=0, yarn_steps=0, batch_size=8192, micro_batch=1, seq_len=8192,
                      lr=4.2e-4, warmup=2000, tau=100.0, bias_update_rate=1e-3, eval_every=1000,
                      eval_tokens=2**22, save_every=1000),
    "k2": dict(steps=230_968, batch_size=16_384, micro_batch=1, seq_len=4096, lr=2e-4, warmup=500,
               tau=100.0, bias_update_rate=1e-3, eval_every=1000, eval_tokens=2**24, save_every=1000),
}

FAST = dict(preset="nano", max_documents=40, steps=20, eval_every=20, save_every=20, needles=4)
MACHINE_FIELDS = {"out", "device", "compile", "gpus", "gpu_tflops", "gpu_gib", "gpu_watts", "gpu_hour", "mfu",
                  "endpoint_parallel", "endpoint_rpm", "endpoint_timeout", "endpoint_retries"}
STAGES = ("rephrase", "pretrain")


class UserError(Exception):
    """Something the user can mend; shown as one line, without a traceback."""


class OneLineParser(argparse.ArgumentParser):
    """Every mistake is one line on stderr; a misspelt flag gets the nearest name."""

    def parse_args(self, argv=None, namespace=None):
        argv = sys.argv[1:] if argv is None else argv
        for word in (word.split("=")[0] for word in argv if word.startswith("--") and word != "--"):
            if word not in self._option_string_actions:
                close = difflib.get_close_matches(word, self._option_string_actions, n=1)
                self.error(f"unknown flag {word}" + (f", did you mean {close[0]}?" if close else ""))
        return super().parse_args(argv, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists the flags\n")


def comments_of(cls):
    """The comment beside each field of a dataclass, its help text on the command line."""
    return dict(re.findall(r"^    (\w+):[^#\n]*# (.*)$", inspect.getsource(cls), re.MULTILINE))


def value_of(text, kind):
    """A flag's text as its field's type; `none` where the field may be None."""
    options = typing.get_args(kind) or (kind,)
    if text.lower() == "none" and types.NoneType in options:
        return None
    base = next(option for option in options if option is not types.NoneType)
    if base is bool:
        return {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}[text.lower()]
    if base is dict and not text.startswith("{"):
        return {key: float(number) for key, number in (pair.split("=") for pair in text.split(","))}
    if base is int:
        return int(float(text)) if re.fullmatch(r"\d+e\d+", text) else int(text)
    return json.loads(text) if base is dict else base(text)


def build_parser():
    parser = OneLineParser("train.py", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=STAGES, help="one stage alone; none: all of them")
    parser.add_argument(
        "--resume", action="store_true", help="continue --out with the settings it began with"
    )
    parser.add_argument(
        "--fast", action="store_true", help="the nano model and a few steps: a first look in seconds"
    )
    parser.add_argument("--plan", action="store_true", help="print what the run costs and leave")
    for cls, title in ((RunConfig, "the run"), (KimiConfig, "the model: any field overrides the preset")):
        group, comments = parser.add_argument_group(title), comments_of(cls)
        for field in dataclasses.fields(cls):
            default = "" if field.default is None or cls is KimiConfig else f" (default {field.default})"
            group.add_argument(f"--{field.name}", type=lambda text, kind=field.type: _flag_value(text, kind),
                               default=argparse.SUPPRESS, metavar=field.name.upper(),
                               help=(comments[field.name] + default).replace("%", "%%"))
    return parser


def _flag_value(text, kind):
    try:
        return value_of(text, kind)
    except (ValueError, KeyError):
        name = getattr(kind, "__name__", str(kind))
        raise argparse.ArgumentTypeError(f"{text!r} is no {name}") from None


def parse_command(argv):
    """(stage or None, flags of the command itself, run fields given, model fields given)."""
    given = vars(build_parser().parse_args(argv))
    command = {key: given.pop(key) for key in ("stage", "resume", "fast", "plan")}
    run_names = {field.name for field in dataclasses.fields(RunConfig)}
    run = {key: value for key, value in given.items() if key in run_names}
    model = {key: value for key, value in given.items() if key not in run_names}
    return command, {**(FAST if command["fast"] else {}), **run}, model


def configure(run_fields, model_fields):
    """RunConfig with the preset's defaults filled in, and the KimiConfig; bad values raise ValueError."""
    run = RunConfig(**run_fields)
    cfg = KimiConfig.preset(run.preset, **model_fields)
    defaults = {key: value for key, value in RUN_DEFAULTS[run.preset].items() if getattr(run, key) is None}
    run = dataclasses.replace(run, **defaults)
    run.micro_batch = min(run.micro_batch or run.batch_size, run.batch_size)
    for name, share in (("anneal_steps", 0.4 / 15.5), ("long_steps", 0.06 / 15.5)):  # T tokens of 15.5
        if getattr(run, name) is None:
            setattr(run, name, max(20, round(run.steps * share)))
    run.yarn_steps = run.long_steps if run.yarn_steps is None else run.yarn_steps
    for name in ("steps", "batch_size", "micro_batch", "seq_len", "eval_every", "eval_tokens", "save_every",
                 "long_factor", "yarn_factor", "chunk_tokens", "endpoint_parallel"):
        if getattr(run, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(run, name)}")
    for name in ("anneal_steps", "long_steps", "yarn_steps", "rephrase_max", "needles", "endpoint_retries"):
        if getattr(run, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(run, name)}")
    for what in ("rewriter", "judge"):
        if bool(getattr(run, f"{what}_url")) != bool(getattr(run, f"{what}_model")):
            raise ValueError(f"{what}_url and {what}_model belong together, one of them is missing")
    choices = {"optimizer": ("muonclip", "muon", "adamw"), "device": ("auto", "cpu", "cuda", "mps"),
               "dtype": ("auto", "fp32", "bf16"), "compile": ("auto", "on", "off")}
    for name, allowed in choices.items():
        if getattr(run, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(run, name)!r}")
    if not (0 <= run.decay <= 1 and 0 <= run.lr_end <= 1 and run.lr > 0 and run.warmup >= 0):
        raise ValueError("decay and lr_end must be between 0 and 1, lr positive, warmup not negative")
    if not 0 <= run.lr_anneal <= run.lr_end:
        raise ValueError(f"lr_anneal must be between 0 and lr_end {run.lr_end:g}, got {run.lr_anneal:g}")
    if run.batch_size % run.micro_batch:
        raise ValueError(f"batch_size {run.batch_size} must be a multiple of micro_batch {run.micro_batch}")
    return run, cfg


def plan(run, cfg):
    """What a run costs, as text: parameters, FLOPs, memory, GPUs, hours, energy, money. R 2.4.

    Closed forms only. Activations are those of one micro-batch with every block recomputed.
    """
    steps = run.steps + run.anneal_steps + run.long_steps + run.yarn_steps
    n, tokens = count_parameters(cfg), steps * run.batch_size * run.seq_len
    flops, GiB = n.train_flops(run.seq_len), 2**30
    ours, report = n.training_bytes(), n.training_bytes(weight=2, gradient=4)
    state = sum(ours.values())
    here = run.micro_batch * run.seq_len
    widest = cfg.num_attention_heads * (2 * cfg.qk_nope_head_dim + 2 * cfg.qk_rope_head_dim + cfg.v_head_dim)
    widest += 3 * (cfg.num_experts_per_tok + cfg.n_shared_experts) * cfg.moe_intermediate_size
    activations = (
        2 * here * (cfg.num_hidden_layers * cfg.hidden_size + 2 * widest) + 8 * here * cfg.vocab_size
    )
    room = 0.9 * run.gpu_gib * GiB - activations
    gpus = run.gpus or max(1, math.ceil(state / max(room, GiB)))
    hours = tokens * flops / (gpus * run.mfu * run.gpu_tflops * 1e12) / 3600
    rows = [("parameters", f"{n.total:,} in all, {n.active:,} active")]
    rows += [(f"  {part}", f"{getattr(n, part):,}") for part in
             ("embedding", "attention", "dense", "routed_experts", "shared_experts", "router", "norms")]
    rows += [
        ("tokens", f"{tokens / 1e9:,.3f} B in {steps:,} steps of {run.batch_size * run.seq_len:,}"),
        ("FLOPs a token", f"{flops:.4g} training, "
                          f"{n.decode_flops(run.seq_len):.4g} decoding at {run.seq_len:,}"),
        ("FLOPs of the run", f"{tokens * flops:.4g}"),
        ("cache", f"{n.cache_bytes_per_token():,} B a token in bf16, "
                  f"{n.cache_bytes_per_token() * cfg.max_position_embeddings / GiB:.2f} GiB at "
                  f"{cfg.max_position_embeddings:,} tokens"),
        ("training state here", f"{state / GiB:,.2f} GiB: fp32 weights {ours['weights'] / GiB:,.2f}, "
                                f"gradients {ours['gradients'] / GiB:,.2f}, "
                                f"optimizer {ours['optimizer'] / GiB:,.2f}"),
        ("the report's states", f"{(report['weights'] + report['gradients']) / 1e12:,.3f} TB of bf16 weights "
                                "and fp32 gradients (R 2.4: about 6 TB for K2 over 256 GPUs)"),
        ("GPUs", f"{gpus:,} of {run.gpu_gib:g} GiB"),
        ("memory of one", f"{state / gpus / GiB:.2f} GiB state + {activations / GiB:.2f} GiB activations"),
        ("time", f"{hours:,.2f} h at {run.mfu:.0%} of {run.gpu_tflops:g} TFLOP/s, "
                 f"{gpus * hours:,.2f} GPU hours"),
        ("energy", f"{gpus * hours * run.gpu_watts / 1e6:,.4g} MWh at {run.gpu_watts:g} W a GPU"),
        ("cost", f"${gpus * hours * run.gpu_hour:,.2f} at ${run.gpu_hour:g} a GPU hour"),
    ]
    return "\n".join(f"{name:22s} {text}" for name, text in rows)


# ==================================================================================================
# 2  Corpora and batches (R 2.5)
# ==================================================================================================
# The report's four domains, from text that is on every machine with Python and needs no network: web
# and code are the standard library's words and programs, math and knowledge are written from a seed.
# A document is {"text", "domain", "source"}.

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings",
           "pydoc_data", "__pycache__"}


def split_of(source, fraction=0.05):
    """"train" or "val" for a document, by a hash of its group that no run or machine changes.

    The group of a module is its top-level package, so its docstrings, its code and its
    neighbours are on one side; the group of any other document is its whole source.
    """
    group = source if "/" in source else source.split(".")[0].lstrip("_")
    # 914 was picked for validation text of many modules, none with a twin in training
    return "val" if zlib.crc32(f"split 914 {group}".encode()) < fraction * 2**32 else "train"


def document(text, domain, source):
    return {"text": text, "domain": domain, "source": source}


# --- web and code: the standard library, its words and its programs ---

def library_files():
    """(module name, path) of the standard library's files, in an order of their own."""
    root = sysconfig.get_paths()["stdlib"]
    for folder, folders, names in os.walk(root):
        # a package is an identifier, site-packages is none
        folders[:] = sorted(f for f in folders if f.isidentifier() and f not in SKIPPED)
        for path in (Path(folder, name) for name in sorted(names)):
            parts = path.relative_to(root).with_suffix("").parts
            if path.suffix == ".py" and parts[-1].isidentifier() \
                    and not parts[-1].startswith("_sysconfigdata"):  # this machine's paths
                yield ".".join(p for p in parts if p != "__init__"), path


def docstrings(node, name):
    """Yields (heading, body, statements) for each docstring under node, in source order."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        name = f"{name}.{node.name}" if hasattr(node, "name") else name
        strings = []
        for statement in node.body:  # a second string would be the docstring once the first is cut
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                    and isinstance(statement.value.value, str)):
                break
            strings.append(statement)
        if strings:
            arguments = f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
            yield name + arguments, node.body, strings
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from docstrings(child, name)


def without(source, found):
    """source with the found docstrings cut, all else (comments, layout) as it was."""
    lines = source.encode().split(b"\n")  # ast counts columns in bytes
    for _, body, strings in reversed(found):
        first, last = strings[0], strings[-1]
        before = lines[first.lineno - 1][:first.col_offset]
        after = lines[last.end_lineno - 1][last.end_col_offset:]
        if len(strings) == len(body) or after.lstrip().startswith(b";"):
            before += b"pass"
        rest = before + after
        lines[first.lineno - 1:last.end_lineno] = [rest] if rest.strip() else []
    return b"\n".join(lines).decode().lstrip("\n")


def is_table(text):
    """True for generated data: most lines open with a quote, a digit or a bracket."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return sum(line[0] in "'\"0123456789([{\\" for line in lines) > len(lines) / 2


@functools.lru_cache(maxsize=1)
def library():
    """((module, documentation, code), ...): each file is read and parsed once, never imported."""
    modules, seen = [], set()
    for module, path in library_files():
        try:
            with tokenize.open(path) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                source = file.read()
                found = list(docstrings(ast.parse(source), module))
                code = without(source, found)
                compile(code, module, "exec", dont_inherit=True)
        except (SyntaxError, ValueError):  # not Python of this version, not UTF-8
            continue
        entries = []
        for heading, _, strings in found:
            text = inspect.cleandoc(strings[0].value.value)
            if text and text not in seen:
                entries.append(f"{heading}\n{text}")
            seen.add(text)
        modules.append((module, "\n\n".join(entries), code))
    return tuple(modules)


def topic_documents(limit=8000):
    """The language reference, cut at paragraphs; topics quote each other, a paragraph is kept once.
    """
    from pydoc_data.topics import topics
    documents, seen = [], set()
    for name in sorted(topics):
        piece = ""
        for paragraph in topics[name].strip().split("\n\n") + [None]:
            if paragraph in seen:
                continue
            if paragraph is None or len(piece) + len(paragraph) > limit:
                if len(piece) >= 200:
                    documents.append(document(piece.strip("\n"), "web", f"topics/{name}"))
                piece = ""
            if paragraph is not None:
                seen.add(paragraph)
                piece += paragraph + "\n\n"
    return documents


def web_documents():
    """Prose: the language reference, then one document of docstrings per module."""
    return topic_documents() + [document(text, "web", module) for module, text, _ in library()
                                if len(text) >= 200]


def code_documents():
    """Programs: one document per module of the standard library, its docstrings cut."""
    documents, seen = [], set()
    for module, _, code in library():
        if len(code) >= 500 and code not in seen and not is_table(code):
            documents.append(document(code, "code", module))
        seen.add(code)
    return documents


# --- math: problems with worked steps; @word is said in the language of the document ---

LANGUAGES = ("english", "korean", "chinese", "german")
WORDS = {
    "problem": ("Problem: ", "문제: ", "题目：", "Aufgabe: "),
    "step": ("Step ", "단계 ", "步骤 ", "Schritt "),
    "answer": ("Answer: ", "답: ", "答案：", "Antwort: "),
    "ones": ("ones", "일의 자리", "个位", "Einer"),
    "tens": ("tens", "십의 자리", "十位", "Zehner"),
    "hundreds": ("hundreds", "백의 자리", "百位", "Hunderter"),
    "together": ("together", "합계", "合计", "zusammen"),
    "left": ("left", "남은 수", "剩余", "Rest"),
    "remainder": ("remainder", "나머지", "余", "Rest"),
    "simplify": ("simplify", "약분", "约分", "kürzen"),
    "compare": ("compare", "비교", "比较", "vergleichen"),
    "apples": ("apples", "사과", "苹果", "Äpfel"),
    "pears": ("pears", "배", "梨", "Birnen"),
    "lemons": ("lemons", "레몬", "柠檬", "Zitronen"),
    "eggs": ("eggs", "달걀", "鸡蛋", "Eier"),
}
STATEMENTS = {
    "calculation": ("What is {task}?", "{task}의 값을 구하세요.", "计算 {task}。", "Wie viel ist {task}?"),
    "division": ("Divide {a} by {b} and give the remainder.",
                 "{a} ÷ {b}의 몫과 나머지를 구하세요.", "{a} 除以 {b}，商和余数各是多少？",
                 "Teile {a} durch {b} und gib den Rest an."),
    "equation": ("Solve {a}x + {b} = {c} for x.", "방정식 {a}x + {b} = {c}의 해를 구하세요.",
                 "解方程 {a}x + {b} = {c}。", "Löse die Gleichung {a}x + {b} = {c} nach x auf."),
    "percent": ("What is {a}% of {b}?", "{b}의 {a}%는 얼마입니까?", "{b} 的 {a}% 是多少？",
                "Wie viel sind {a} % von {b}?"),
    "fractions": ("Add the fractions {a}/{b} and {c}/{d}.", "두 분수 {a}/{b}, {c}/{d}의 합을 구하세요.",
                  "求分数 {a}/{b} 与 {c}/{d} 的和。", "Addiere die Brüche {a}/{b} und {c}/{d}."),
    "divisor": ("Find the greatest common divisor of {a} and {b}.",
                "두 수 {a}, {b}의 최대공약수를 구하세요.", "求 {a} 和 {b} 的最大公约数。",
                "Bestimme den größten gemeinsamen Teiler von {a} und {b}."),
    "sequence": ("Which number comes next: {list}?", "다음에 올 수는 무엇입니까: {list}?",
                 "下一个数是多少：{list}？", "Welche Zahl kommt als Nächstes: {list}?"),
    "price": ("{a} {item} cost {b} euros. How many euros do {c} {item} cost?",
              "{item} {a}개의 값은 {b}유로입니다. {item} {c}개의 값은 몇 유로입니까?",
              "{a} 个{item}的价格是 {b} 欧元。{c} 个{item}的价格是多少欧元？",
              "{a} {item} kosten {b} Euro. Wie viel Euro kosten {c} {item}?"),
    "distance": ("A train travels at {a} kilometres per hour. How many kilometres does it travel "
                 "in {b} hours?",
                 "기차가 한 시간에 {a}킬로미터를 달립니다. {b}시간 동안 몇 킬로미터를 달립니까?",
                 "一列火车每小时行驶 {a} 千米，{b} 小时行驶多少千米？",
                 "Ein Zug fährt {a} Kilometer pro Stunde. Wie viele Kilometer fährt er "
                 "in {b} Stunden?"),
    "comparison": ("Which is larger, {a} × {b} or {c} × {d}?",
                   "{a} × {b}, {c} × {d} 중에서 어느 것이 더 큽니까?", "{a} × {b} 和 {c} × {d} 哪个更大？",
                   "Was ist größer, {a} × {b} oder {c} × {d}?"),
    "total": ("What is the sum of the numbers {list}?", "다음 수들의 합을 구하세요: {list}.",
              "求下列各数的和：{list}。", "Wie groß ist die Summe der Zahlen {list}?"),
    "area": ("A rectangle is {a} metres long and {b} metres wide. What is its area in square "
             "metres?", "직사각형의 가로는 {a}미터, 세로는 {b}미터입니다. 넓이는 몇 제곱미터입니까?",
             "一个长方形长 {a} 米，宽 {b} 米，面积是多少平方米？",
             "Ein Rechteck ist {a} Meter lang und {b} Meter breit. Wie groß ist seine Fläche "
             "in Quadratmetern?"),
}


def columns(a, b, sign):
    """Steps of a + b or a - b, column by column; a carry or a borrow is one more term."""
    steps, carry, sign_text = [], 0, " + " if sign > 0 else " - "
    for i, place in enumerate(("ones", "tens", "hundreds")[:len(str(max(a, b)))]):
        digits = [a // 10**i % 10, b // 10**i % 10] + [1] * carry
        value = digits[0] + sign * sum(digits[1:])
        ten = "10 + " if value < 0 else ""
        value += 10 * bool(ten)
        steps.append(f"@{place}: {ten}{sign_text.join(map(str, digits))} = {value}")
        carry = 1 if ten or value > 9 else 0
    return steps


def product(a, b):
    """Steps of a × b by the partial products of a's tens and ones."""
    tens, ones = a - a % 10, a % 10
    if not tens or not ones:
        return [f"{a} × {b} = {a * b}"]
    return [f"{tens} × {b} = {tens * b}", f"{ones} × {b} = {ones * b}",
            f"@together: {tens * b} + {ones * b} = {a * b}"]


def calculation(r):
    sign, a, b = "+-×"[r(0, 2)], r(12, 999), r(12, 999)
    if sign == "×":
        a, b = r(11, 99), r(3, 99)
        return {"task": f"{a} × {b}"}, product(a, b), a * b
    if sign == "+":
        return {"task": f"{a} + {b}"}, columns(a, b, 1), a + b
    a, b = max(a, b), min(a, b)
    return {"task": f"{a} - {b}"}, columns(a, b, -1), a - b


def division(r):
    b, quotient = r(3, 19), r(11, 60)
    a = left = b * quotient + r(1, b - 1)
    steps = []
    for part in (quotient - quotient % 10, quotient % 10):
        if part:
            taken = b * part
            steps += [f"{b} × {part} = {taken}", f"@left: {left} - {taken} = {left - taken}"]
            left -= taken
    return {"a": a, "b": b}, steps, f"{quotient}, @remainder {left}"


def equation(r):
    a, b, x = r(2, 12), r(1, 60), r(2, 40)
    c = a * x + b
    return {"a": a, "b": b, "c": c}, [f"{a}x = {c} - {b} = {c - b}", f"x = {c - b} ÷ {a} = {x}"], x


def percent(r):
    a = 5 * r(1, 19)
    b = 100 // math.gcd(a, 100) * r(1, 200)
    c = a * b // 100
    return {"a": a, "b": b}, [f"{b} × {a} = {b * a}", f"{b * a} ÷ 100 = {c}"], c


def fractions(r):
    b, d = r(2, 12), r(2, 12)
    a, c, common = r(1, b - 1), r(1, d - 1), math.lcm(b, d)
    x, y = a * common // b, c * common // d
    steps = [f"{a}/{b} = {x}/{common}", f"{c}/{d} = {y}/{common}",
             f"{x}/{common} + {y}/{common} = {x + y}/{common}"]
    factor = math.gcd(x + y, common)
    answer = f"{(x + y) // factor}/{common // factor}".removesuffix("/1")
    if factor > 1:
        steps.append(f"@simplify: {x + y}/{common} = {answer}")
    return {"a": a, "b": b, "c": c, "d": d}, steps, answer


def divisor(r):
    factor = r(2, 12)
    b, a = sorted((factor * r(2, 40), factor * r(2, 40)))
    slots, steps = {"a": a, "b": b}, []
    while b:
        steps.append(f"{a} = {a // b} × {b} + {a % b}")
        a, b = b, a % b
    return slots, steps, a


def sequence(r):
    a, d = r(1, 99), r(2, 60)
    x, y, z = a + d, a + 2 * d, a + 3 * d
    return {"list": f"{a}, {x}, {y}, {z}"}, [f"{x} - {a} = {d}", f"{z} - {y} = {d}",
                                             f"{z} + {d} = {z + d}"], z + d


def price(r):
    a, each, c = r(2, 12), r(2, 30), r(2, 12)
    item = "@" + ("apples", "pears", "lemons", "eggs")[r(0, 3)]
    return ({"a": a, "b": a * each, "c": c, "item": item},
            [f"{a * each} ÷ {a} = {each}", f"{each} × {c} = {each * c}"], each * c)


def distance(r):
    a, b = r(11, 199), r(2, 24)
    return {"a": a, "b": b}, product(a, b), a * b


def area(r):
    a, b = r(11, 99), r(3, 99)
    return {"a": max(a, b), "b": min(a, b)}, product(max(a, b), min(a, b)), a * b


def comparison(r):
    a, b, c, d = r(2, 20), r(2, 20), r(2, 20), r(2, 20)
    d += a * b == c * d
    first = a * b > c * d
    steps = [f"{a} × {b} = {a * b}", f"{c} × {d} = {c * d}",
             f"@compare: {a * b} {'>' if first else '<'} {c * d}"]
    return {"a": a, "b": b, "c": c, "d": d}, steps, f"{a} × {b}" if first else f"{c} × {d}"


def total(r):
    numbers = [r(2, 99) for _ in range(r(3, 5))]
    sums = [sum(numbers[:i]) for i in range(1, len(numbers))]
    steps = [f"{s} + {n} = {s + n}" for s, n in zip(sums, numbers[1:])]
    return {"list": ", ".join(map(str, numbers))}, steps, sum(numbers)


# three calculations hide in the first
KINDS = (calculation,) * 3 + (division, equation, percent, fractions, divisor, sequence, price,
                              distance, area, comparison, total)


def math_problem(rng, language, seen):
    """The text of one problem that seen does not have yet, in the language's words."""
    while True:
        kind = rng.choice(KINDS)
        slots, steps, answer = kind(rng.randint)
        key = (kind.__name__, *slots.values())  # without the language: a translation leaks too
        if key not in seen:
            break
    seen.add(key)
    column = LANGUAGES.index(language)
    lines = ["@problem" + STATEMENTS[kind.__name__][column].format(**slots)]
    lines += [f"@step{i}: {step}" for i, step in enumerate(steps, 1)] + [f"@answer{answer}"]
    return re.sub(r"@([a-z]+)", lambda word: WORDS[word[1]][column], "\n".join(lines))


def math_documents(seed, count=4000):
    """count documents of 3 to 6 problems each; no problem is ever posed twice."""
    rng, seen, documents = random.Random(f"math {seed}"), set(), []
    for index in range(count):
        language = rng.choices(LANGUAGES, (70, 10, 10, 10))[0]
        problems = [math_problem(rng, language, seen) for _ in range(rng.randint(3, 6))]
        documents.append(document("\n\n".join(problems), "math", f"math/{language}/{index}"))
    return documents


# --- knowledge: an invented world whose facts are known, so that recall can be measured exactly ---

OCCUPATIONS = ("painter poet botanist composer cartographer physician sculptor philosopher "
               "geologist mathematician historian navigator").split()
FIELDS = "astronomy medicine music navigation botany law printing geometry".split()
GOODS = "glass wool copper salt paper honey timber pottery linen".split()
FORMS = "novel symphony treatise fresco ballad play".split()
MONTHS = ("January February March April May June July August September October November "
          "December").split()
ADJECTIVES = "Silent Golden Broken Hidden Distant Patient Burning Second".split()
ONSETS = "b d f g h k l m n p r s t v dr st tr".split()
REGIONS = ("the northern highlands", "the salt coast", "the lake country", "the river delta",
           "the eastern plateau", "the cedar forests")

# Every fact of every kind of entity: its label, then
#   .  sentences that state it; an article is written with the first two
#   ?  questions that ask for it
# {n} is the entity, {s} its last name or what it is, {it} the value.
GRAMMAR = {
    "person": """
occupation | profession
. {n} was a {it}. | {n} worked as a {it}. | People knew {n} as a {it}.
. By profession {s} was a {it}.
? What was the profession of {n}? | What did {n} work as?
birthplace | place of birth
. {n} came from {it}. | {s} was born at {it}. | The birthplace of {n} was {it}.
. {n} grew up at {it}.
? Where did {n} come from? | What was the birthplace of {n}?
region | native region
. {s} was a native of {it}. | {n} was at home in {it}. | {n} belonged to {it}.
. The native region of {s} was {it}.
? What was the native region of {n}? | Which region was {n} a native of?
born | year of birth
. {s} was born in {it}. | {n} entered this world in {it}. | In the year {it} {n} was born.
. The year of birth of {n} was {it}.
? When was {n} born? | What was the year of birth of {n}?
birthday | birthday
. The birthday of {s} was {it}. | Each year {s} kept the birthday on {it}.
. {n} had a birthday on {it}. | On {it} {n} celebrated the birthday.
? When was the birthday of {n}? | On which day did {n} celebrate the birthday?
died | year of death
. {s} died in {it}. | {n} passed away in {it}. | In the year {it} {n} died.
. The year of death of {n} was {it}.
? When did {n} die? | What was the year of death of {n}?
spouse | spouse
. {s} married {it}. | {n} was married to {it}. | The spouse of {n} was {it}.
. {it} became the spouse of {n}.
? Who was the spouse of {n}? | To whom was {n} married?
partner | profession of the spouse
. The spouse of {s} worked as a {it}. | {n} had a {it} as a spouse. | {n} married a {it}.
. The profession of the spouse of {n} was {it}.
? What was the profession of the spouse of {n}? | What did the spouse of {n} work as?
home | later home
. {s} later lived at {it}. | {n} moved to {it}. | In later years {n} had a house at {it}.
. The later home of {n} was {it}.
? Where did {n} live later? | What was the later home of {n}?
""",
    "place": """
region | region
. {n} is a town in {it}. | {n} lies in {it}. | {n} is at home in {it}. | The region of {n} is {it}.
? In which region does {n} lie? | What is the region of {n}?
founded | year of foundation
. {s} was founded in {it}. | {n} was settled in {it}. | People founded {n} in {it}.
. The year of foundation of {n} is {it}.
? When was {n} founded? | What is the year of foundation of {n}?
population | number of inhabitants
. About {it} people live in {n}. | {n} has about {it} inhabitants.
. The inhabitants of {n} number {it}. | {n} counts {it} inhabitants.
? How many people live in {n}? | What is the number of inhabitants of {n}?
river | river
. {n} stands on the river {it}. | The river {it} flows through {n}. | The river of {n} is the {it}.
. {n} was built on the river {it}.
? On which river does {n} stand? | Which river flows through {n}?
good | main trade
. {s} is known for its {it}. | For centuries {n} has traded in {it}.
. Merchants come to {n} for its {it}. | The main trade of {n} is {it}.
? What is {n} known for? | What is the main trade of {n}?
neighbour | nearest town
. A road leads from {n} to {it}. | The neighbour of {n} is {it}. | {n} is a neighbour of {it}.
. The nearest town is {it}.
? Which town is nearest to {n}? | To which town does the road from {n} lead?
""",
    "organisation": """
field | subject of study
. {n} is a society for {it}. | {n} studies {it}. | The members of {n} are devoted to {it}.
. The subject of study of {n} is {it}.
? What does {n} study? | What is the subject of study of {n}?
seat | seat
. {n} meets at {it}. | The house of {n} is at {it}. | {s} has its seat at {it}.
. The seat of {n} is {it}.
? Where does {n} have its seat? | What is the seat of {n}?
founded | year of foundation
. {s} was founded in {it}. | {n} came into being in {it}. | {n} was set up in {it}.
. The year of foundation of {n} is {it}.
? When was {n} founded? | What is the year of foundation of {n}?
founder | founder
. {it} founded {n}. | {n} was founded by {it}. | {n} owes its foundation to {it}.
. The founder of {n} was {it}.
? Who founded {n}? | Who was the founder of {n}?
occupation | profession of the founder
. The founder of {n} was a {it}. | A {it} founded {n}. | {n} had a {it} as its founder.
. The profession of the founder of {n} was {it}.
? What was the profession of the founder of {n}? | What did the founder of {n} work as?
members | number of members
. {s} has {it} members. | The members of {n} number {it}. | {n} counts {it} members.
. {it} people are members of {n}.
? How many members does {n} have? | What is the number of members of {n}?
river | river at the seat
. The river {it} flows past the house of {n}. | The house of {n} stands on the river {it}.
. From its house {n} looks on the river {it}. | The river at the seat of {n} is the {it}.
? Which river flows past the house of {n}? | What is the river at the seat of {n}?
""",
    "work": """
form | form
. {n} is a {it}. | {n} was made as a {it}. | {n} is known as a {it}.
. The form of {n} is that of a {it}.
? What form does {n} have? | What is {n} known as?
creator | creator
. {n} was created by {it}. | {it} created {n}. | {n} is the creation of {it}.
. The creator of {n} was {it}.
? Who created {n}? | Who was the creator of {n}?
occupation | profession of the creator
. The creator of {n} was a {it}. | A {it} created {n}. | {n} had a {it} as its creator.
. The profession of the creator of {n} was {it}.
? What was the profession of the creator of {n}? | What did the creator of {n} work as?
year | year of completion
. {s} was completed in {it}. | {n} was finished in {it}. | In the year {it} {n} was completed.
. The year of completion of {n} is {it}.
? When was {n} completed? | What is the year of completion of {n}?
age | age of the creator
. The creator of {n} was {it} years old. | At the age of {it} years its creator completed {n}.
. {n} is by a creator of {it} years. | The age of the creator of {n} was {it} years.
? How old was the creator of {n}? | At what age did its creator complete {n}?
subject | subject
. {s} tells of the town of {it}. | {n} is about the town of {it}. | {n} describes the town of {it}.
. The subject of {n} is the town of {it}.
? What town does {n} tell of? | What is the subject of {n}?
owner | owner
. {s} belongs to the {it}. | {n} is owned by the {it}. | {n} is kept by the {it}.
. The owner of {n} is the {it}.
? To whom does {n} belong? | Who is the owner of {n}?
""",
    "event": """
field | theme
. {n} was a fair for {it}. | {n} was held in honour of {it}. | {n} was devoted to {it}.
. The theme of {n} was {it}.
? What was the theme of {n}? | In honour of what was {n} held?
place | place
. {n} was held at {it}. | {s} took place at {it}. | The place of {n} was {it}.
. {it} was the place of {n}.
? Where did {n} take place? | What was the place of {n}?
month | month
. {s} took place in {it}. | {n} opened in {it}. | The month of {n} was {it}.
. {n} was held in the month of {it}.
? In which month did {n} take place? | What was the month of {n}?
year | year
. {s} took place in the year {it}. | The year of {n} was {it}. | {n} was held in the year {it}.
. In the year {it} {n} was held.
? In which year did {n} take place? | What was the year of {n}?
organiser | organiser
. {s} was organised by the {it}. | The {it} organised {n}. | {n} was the work of the {it}.
. The organiser of {n} was the {it}.
? Who organised {n}? | Who was the organiser of {n}?
guest | guest of honour
. {it} opened {n}. | {n} was opened by {it}. | The guest of honour of {n} was {it}.
. {n} had {it} as its guest of honour.
? Who opened {n}? | Who was the guest of honour of {n}?
occupation | profession of the guest
. The guest of {n} was a {it}. | A {it} opened {n}. | {n} was opened by a {it}.
. The profession of the guest of {n} was {it}.
? What was the profession of the guest of {n}? | What did the guest of {n} work as?
visitors | number of visitors
. About {it} visitors came to {n}. | {n} drew about {it} visitors.
. The visitors of {n} numbered {it}. | {n} counted {it} visitors.
? How many visitors came to {n}? | What was the number of visitors of {n}?
""",
}
NOUNS = {"person": "person", "place": "town", "organisation": "society", "work": "work", "event": "fair"}


@functools.cache
def grammar(kind):
    """{fact: {"label", "says", "asks"}} of a kind of entity, in the order of an article."""
    facts, fact = {}, ""
    for line in GRAMMAR[kind].strip().split("\n"):
        if line[:2] in (". ", "? "):
            facts[fact]["says" if line[0] == "." else "asks"] += line[2:].split(" | ")
        else:
            fact, label = line.split(" | ")
            facts[fact] = {"label": label, "says": [], "asks": []}
    return facts


def subject_of(entity):
    """How sentences name an entity: {n} in full, {s} in short."""
    name, kind = entity["name"], entity["kind"]
    if kind == "person":
        return {"n": name, "s": name.split()[-1]}
    return {"n": f"the {name}" if kind in ("organisation", "event") else name, "s": f"the {NOUNS[kind]}"}


def worded(template, subject, value=""):
    """A template's text; a sentence starts with a capital."""
    text = template.format(**subject, it=value)
    return text[0].upper() + text[1:]


def new_name(rng, seen, pattern="@"):
    """pattern with a word like Dranobel for each @; no word is ever used in two names."""
    def word(_):
        while True:
            syllables = [rng.choice(ONSETS) + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
            text = ("".join(syllables) + rng.choice("lnrsm")).capitalize()
            if text not in seen:
                seen.add(text)
                return text
    return re.sub("@", word, pattern)


def invent_people(rng, count, places, seen):
    births = sorted(rng.randint(1500, 1800) for _ in range(count))
    names = [new_name(rng, seen, "@ @") for _ in births]
    jobs = [rng.choice(OCCUPATIONS) for _ in births]
    people = []
    for i, (name, born) in enumerate(zip(names, births)):
        town, home = rng.sample(places, 2)
        people.append({"name": name, "kind": "person", "facts": {
            "born": born, "birthday": f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
            "died": born + rng.randint(55, 90), "occupation": jobs[i],
            "birthplace": town["name"], "region": town["facts"]["region"], "home": home["name"],
            # neighbours in age are married in pairs
            "spouse": names[i ^ 1], "partner": jobs[i ^ 1]}})
    return people


def invent_society(rng, places, people, seen):
    town, founder = rng.choice(places), rng.choice(people)
    field = rng.choice(FIELDS)
    return {"name": new_name(rng, seen, "@ Society"),
            "kind": "organisation", "facts": {
                "field": field, "seat": town["name"], "river": town["facts"]["river"],
                "founder": founder["name"], "occupation": founder["facts"]["occupation"],
                "founded": founder["facts"]["born"] + rng.randint(25, 45),
                "died": founder["facts"]["died"], "members": rng.randint(12, 400)}}


def invent_world(seed, people=50):
    """Entities {"name", "kind", "facts"}; whatever a fact names has an article that agrees."""
    rng, seen = random.Random(f"world {seed}"), set()
    people, third = people + people % 2, people // 3
    towns = [new_name(rng, seen) for _ in range(third)]
    rivers = [new_name(rng, seen) for _ in range(max(1, third // 4))]
    places = [{"name": name, "kind": "place", "facts": {
        "region": rng.choice(REGIONS), "founded": rng.randint(900, 1400),
        "population": 500 * rng.randint(2, 180), "river": rng.choice(rivers),
        "good": rng.choice(GOODS), "neighbour": towns[i - 1]}} for i, name in enumerate(towns)]
    people = invent_people(rng, people, places, seen)
    societies = [invent_society(rng, places, people, seen) for _ in range(third)]
    works, events = [], []
    for _ in range(len(people) // 2):
        creator, age, town = rng.choice(people), rng.randint(20, 50), rng.choice(towns)
        title = new_name(rng, seen, f"The {rng.choice(ADJECTIVES)} @")
        works.append({"name": title, "kind": "work", "facts": {
            "form": rng.choice(FORMS),
            "creator": creator["name"], "occupation": creator["facts"]["occupation"],
            "year": creator["facts"]["born"] + age, "age": age, "subject": town,
            "owner": rng.choice(societies)["name"]}})
    for society in societies:
        facts, town = society["facts"], rng.choice(towns)
        year = rng.randint(facts["founded"] + 1, facts.pop("died"))  # its guest is alive
        events.append({"name": new_name(rng, seen, "@ Fair"),
                       "kind": "event", "facts": {
            "field": facts["field"], "place": town, "month": rng.choice(MONTHS), "year": year,
            "organiser": society["name"], "guest": facts["founder"],
            "occupation": facts["occupation"], "visitors": 100 * rng.randint(2, 90)}})
    return places + people + societies + works + events


def in_order(entity):
    """(fact, value) of an entity as its grammar orders them."""
    return [(fact, entity["facts"][fact]) for fact in grammar(entity["kind"])]


def article(entity, rng):
    """The entity's facts as an encyclopedia tells them: its name, then a sentence for each."""
    subject = subject_of(entity)
    says = (worded(rng.choice(grammar(entity["kind"])[fact]["says"][:2]), subject, value)
            for fact, value in in_order(entity))
    return f"{entity['name']}\n\n" + " ".join(says)


def knowledge_documents(seed, count=125):
    """About count articles on one invented world."""
    rng = random.Random(f"articles {seed}")
    return [document(article(entity, rng), "knowledge", f"world/{entity['name']}")
            for entity in invent_world(seed, people=count * 2 // 5)]


# Recall is probed in wordings that no training text ever has.
PROBES = ("Question: which {label} does {n} have? Answer:", "Name the {label} of {n}:",
          "Whoever looks for the {label} of {n} finds")


def recall_probes(entities):
    """(kind, fact, prompt, answer) for every fact of the entities, in each wording of PROBES."""
    return [(entity["kind"], fact, probe.format(label=grammar(entity["kind"])[fact]["label"],
                                                n=subject_of(entity)["n"]), str(value))
            for entity in entities for fact, value in in_order(entity) for probe in PROBES]


# --- own data, token files, batches -----------------------------------------------------------------
# Every document becomes [BOS] text [EOS]; the documents of a domain are packed one after the other
# into one file of ids per split, and a training sequence is any window of it. Attention is not masked
# across the documents of a window: DeepSeek-V3 packs so (V3 4.2), K2's report does not say.

TEXT_SUFFIXES = (".txt", ".md")


def toy_documents(run):
    """The four domains of the toy, in a fixed order."""
    yield from web_documents()
    yield from code_documents()
    yield from math_documents(run.seed)
    yield from knowledge_documents(run.seed)


def own_documents(source, skipped):
    """Documents of .txt, .md and .jsonl files, of folders of them, or of a Hugging Face dataset.

    A line that is no JSON object with a "text", a file that is not UTF-8: one line on stderr, and
    one more in `skipped`.
    """
    if source.startswith("hf:"):
        yield from hugging_face_documents(source.removeprefix("hf:"))
        return
    root = Path(source)
    if not root.exists():
        raise UserError(f"--data {source}: there is no such file or folder")
    paths = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    for path in paths:
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        if path.suffix in TEXT_SUFFIXES:
            try:
                yield document(path.read_text(encoding="utf-8"), "own", f"own/{name}")
            except UnicodeDecodeError as error:
                skip(skipped, f"{path}: not UTF-8 at byte {error.start}, skipped")
        elif path.suffix == ".jsonl":
            yield from jsonl_documents(path, name, skipped)
        elif not root.is_dir():
            raise UserError(
                f"--data {source}: only .txt, .md, .jsonl, a folder of them or hf:NAME can be read"
            )


def jsonl_documents(path, name, skipped):
    """{"text", "domain"?, "source"?, "rephrased_from"?, "style"?} a line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record.get("text"), str):
                    raise ValueError('no "text"')
            except (ValueError, AttributeError) as error:  # UnicodeDecodeError is a ValueError
                skip(skipped, f"{path} line {number}: {error}, skipped")
                continue
            domain = re.sub(r"\W+", "_", str(record.get("domain", "own"))) or "own"
            kept = {key: str(record[key]) for key in ("rephrased_from", "style") if key in record}
            yield document(record["text"], domain, str(record.get("source", f"own/{name}/{number}"))) | kept


def hugging_face_documents(name):
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("--data hf:... needs the optional extra: pip install -e '.[hf]'") from None
    for number, record in enumerate(load_dataset(name, split="train", streaming=True)):
        yield document(record["text"], "own", f"{name}/{number}")


def skip(skipped, message):
    print(message, file=sys.stderr)
    skipped.append(message)


def corpus(run, skipped):
    """The run's documents; `max_documents` takes the first of each domain, but of both splits."""
    taken = {}
    for doc in own_documents(run.data, skipped) if run.data else toy_documents(run):
        group = doc["domain"], split_of(doc["source"])
        taken[group] = taken.get(group, 0) + 1
        most = run.max_documents or math.inf
        if doc["text"].strip() and taken[group] <= (most if group[1] == "train" else max(1, most / 8)):
            yield doc


@contextlib.contextmanager
def atomic(path):
    """Write to the name that is given, beside `path`; `path` itself changes in one step, or not at all."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_jsonl(path, records):
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_json(path, value):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def near_duplicates(texts, threshold=0.8, width=5, seed=1):
    """Indices of texts that share most of their runs of five words with an earlier one.

    Sets of runs are compared by their Jaccard index, but only where MinHash makes it likely to be high:
    eight bands of four minima, so that a pair at 0.8 is missed one time in 60.
    """
    rng = np.random.default_rng(seed)
    a, b = rng.integers(1, 2**63, (2, 32, 1), np.uint64) | np.uint64(1)
    powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, width + 1, dtype=np.uint64)
    runs, buckets, found = [], {}, set()
    for index, text in enumerate(texts):
        words = np.array([zlib.crc32(word.encode()) for word in text.lower().split()], np.uint64)
        words = np.pad(words, (0, max(0, width - len(words))))
        hashes = np.unique(np.lib.stride_tricks.sliding_window_view(words, width) @ powers)
        runs.append(hashes)
        minima = (hashes * a + b).min(axis=1).reshape(8, 4)
        keys = [(band, row.tobytes()) for band, row in enumerate(minima)]
        for other in {other for key in keys for other in buckets.get(key, ())}:
            common = len(np.intersect1d(hashes, runs[other], assume_unique=True))
            if common >= threshold * (len(hashes) + len(runs[other]) - common):
                found.add(index)
                break
        else:
            for key in keys:
                buckets.setdefault(key, []).append(index)
    return found


def split_documents(run):
    """All documents with their "split", without near-duplicates. A corpus whose hashes leave a split empty
    is cut instead: the last twentieth of its longest document becomes validation.

    Returns the documents, what was skipped, and how many were duplicates.
    """
    skipped = []
    documents = [{**doc, "split": split_of(doc["source"])} for doc in corpus(run, skipped)]
    if not documents:
        raise UserError(f"--data {run.data}: no text found ({len(skipped)} items skipped)")
    if {doc["split"] for doc in documents} != {"train", "val"}:
        for doc in documents:
            doc["split"] = "train"
        longest = max(documents, key=lambda doc: len(doc["text"]))
        text = longest["text"]
        cut = text.rfind("\n", 0, len(text) * 19 // 20) + 1 or len(text) * 19 // 20
        longest["text"] = text[:cut]
        documents.append({**longest, "text": text[cut:], "split": "val"})
    documents.sort(key=lambda doc: doc["split"] == "train")  # of two twins, the one in validation stays
    twins = near_duplicates([doc["text"] for doc in documents])
    return [doc for i, doc in enumerate(documents) if i not in twins], skipped, len(twins)


def write_tokens(path, texts, tok, dtype):
    """Pack texts into one file of ids; returns their numbers of documents, tokens and bytes."""
    bos, eos, n_tokens = tok.special["[BOS]"], tok.special["[EOS]"], 0
    with atomic(path) as temporary, open(temporary, "wb") as file:
        for text in texts:
            ids = np.array([bos, *tok.encode(text), eos], dtype)
            n_tokens += len(ids)
            file.write(ids.tobytes())
    return {"documents": len(texts), "tokens": n_tokens, "bytes": sum(len(text.encode()) for text in texts)}


class TokenFiles:
    """The packed ids of each domain, memory-mapped, and the batches drawn from them."""

    def __init__(self, folder, weights=None, anneal_weights=None):
        about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.ids = {
            (domain, split): np.memmap(folder / f"{domain}.{split}.bin", about["dtype"], "r")
            for domain, splits in about["domains"].items()
            for split in splits
            if splits[split]["tokens"]
        }
        self.weights = self.settle(weights, DOMAIN_WEIGHTS)
        self.anneal_weights = self.settle(anneal_weights or weights, ANNEAL_WEIGHTS)

    def settle(self, weights, defaults):
        """Weights of all domains: those given, else the toy's defaults where they fit, else alike."""
        train = [domain for domain, split in self.ids if split == "train"]
        if unknown := sorted(set(weights or ()) - set(train)):
            raise UserError(f"no domain {', '.join(unknown)} to weigh; there are: {', '.join(train)}")
        weights = weights or (defaults if set(defaults) & set(train) else dict.fromkeys(train, 1.0))
        if sum(weights.get(domain, 0.0) for domain in train) <= 0:
            raise UserError("domain_weights: at least one must be positive")
        return {domain: weights.get(domain, 0.0) for domain in train}

    def batch(self, seed, step, rows, seq_len, device="cpu", weights=None):
        """Tokens and targets (rows, seq_len) of one step, a function of seed and step alone, so that a
        resumed run sees the same ones. Short domains are read round and round."""
        rng, weights = np.random.default_rng((seed, step)), weights or self.weights
        p = np.array(list(weights.values()))
        windows = []
        for domain in rng.choice(list(weights), rows, p=p / p.sum()):
            ids = self.ids[domain, "train"]
            start = rng.integers(max(1, len(ids) - seq_len))
            windows.append(np.resize(ids[start : start + seq_len + 1], seq_len + 1))
        block = torch.from_numpy(np.stack(windows).astype(np.int64)).to(device, non_blocking=True)
        return block[:, :-1], block[:, 1:]

    def validation(self, domain, n_tokens, seq_len):
        """Consecutive windows (rows, seq_len + 1) that cover the first n_tokens of a domain's val file."""
        ids = np.asarray(self.ids[domain, "val"][: n_tokens + 1]).astype(np.int64)
        rows = max(1, (len(ids) - 1) // seq_len)
        if len(ids) <= seq_len:
            return torch.from_numpy(ids)[None]
        return torch.from_numpy(np.stack([ids[i * seq_len : (i + 1) * seq_len + 1] for i in range(rows)]))


DOMAIN_WEIGHTS = {"web": 0.4, "code": 0.35, "math": 0.15, "knowledge": 0.1}
ANNEAL_WEIGHTS = {"web": 0.25, "code": 0.25, "math": 0.25, "knowledge": 0.25}  # facts, checked steps


# ==================================================================================================
# 3  Rephrasing (R 2.2)
# ==================================================================================================
# A fact is learned from being told in many ways, not from one text read many times. So knowledge is
# rewritten in other styles and perspectives, mathematics as learning notes and in English:
#
#     written = []
#     for chunk in chunks(source, 256 tokens):                     autoregressive, chunk by chunk
#         written += rewriter(style, source, chunk, written)       each call sees what came before
#     keep written if it says what source says, all of it, and nothing else
#
# In its final corpus the report rephrases a text at most twice (--rephrase_max).

# What a model is asked for (the report's prompts are not published), and how the built-in grammar writes
# about an entity of the invented world: opening, a line for each fact, what stands between, closing.
STYLES = {
    "encyclopedia": ("an entry of an encyclopedia", "An entry on {n}.\n\n", "{say}", " ", ""),
    "questions": ("questions and answers", "Questions about {n}.\n", "Q: {ask}\nA: {it}.", "\n", ""),
    "dialogue": ("a dialogue of two friends", "Ada: Tell me about {n}.\n", "Ada: {ask}\nBen: {say}", "\n",
                 "\nAda: Thank you."),
    "news": ("a report in a newspaper", "Our readers ask about {n}. ", "{say}", " ", " This was our report."),
    "letter": ("a letter to a friend", "Dear friend,\nyou asked about {n}. ", "{say}", " ", "\nYours, Ada"),
    "lecture": ("a lecture to students", "Good morning. We shall speak of {n}. ", "{say}", " Next: ",
                " Are there questions?"),
    "note": ("a learning note with bullet points", "# {n}\n", "- {label}: {it}", "\n", ""),
    "table": ("a table of two columns", "| subject | {n} |\n", "| {label} | {it} |", "\n", ""),
    "sentence": ("a summary in one long sentence", "In one sentence about {n}:\n", "{label} {it}", "; ", "."),
    "digest": ("a summary, first in brief and then in detail", "In brief, {n}. ", "{say}", " Further: ", ""),
    "reordered": ("the same statements in another order", "On {n}.\n", "{say}", "\n", ""),
    "viewpoint": ("an account by an archivist, in the first person", "I keep the archive and know {n} well. ",
                  "{say}", " My papers say: ", " So much for my papers."),
    "quiz": ("a riddle that names its subject last", "Who or what is meant?\n", "{say}", " ",
             "\nThe answer: {n}."),
}
MATH_STYLES = {
    "learning note": "a learning note: the question, the idea, the work in numbered steps, the result",
    "translation": "a faithful translation into English that changes nothing else",
}
IDEAS = {
    "calculation": "go part by part, the small places first", "division": "take the tens of the quotient",
    "equation": "undo the addition, then the multiplication", "percent": "multiply, divide by a hundred",
    "fractions": "bring both to one denominator", "divisor": "the remainder replaces the larger number",
    "sequence": "the difference is constant", "price": "find the price of one",
    "distance": "speed times time", "comparison": "work out both sides",
    "total": "add one number after the other", "area": "length times width",
}


# --- reading the invented world: every sentence of the grammar turned into a pattern ---

NUMERIC = {"born", "died", "founded", "population", "members", "year", "age", "visitors"}
VOCABULARY = {"occupation": OCCUPATIONS, "partner": OCCUPATIONS, "field": FIELDS, "good": GOODS,
              "form": FORMS, "month": MONTHS, "region": REGIONS}
SPEAKERS = re.compile(r"^(?:Ada: |Ben: |Next: |Further: |My papers say: )+")


def pattern_of(template, value=""):
    """A template as a pattern: `who` is its subject, `it` its value, all else stands as it is."""
    text = re.sub(r"\\\{[ns]\\\}", lambda _: "(?P<who>[^,;:()]+?)", re.escape(template), count=1)
    text = re.sub(r"^([a-z])", lambda letter: f"[{letter[1]}{letter[1].upper()}]", text)
    return re.compile(text.replace(r"\{it\}", f"(?P<it>{value})"))


def pieces(text):
    """The lines of a text, cut into sentences; a question keeps its answer."""
    text = re.sub(r"\n(?=A: )", "\0", text)
    for line in text.split("\n"):
        for piece in re.split(r"(?<=[.?!])\s+(?=[A-Z0-9])|; ", line):
            if piece.strip():
                yield SPEAKERS.sub("", piece.strip().replace("\0", "\n"))


@functools.cache
def patterns(kind):
    """((fact, pattern), ...) of all that the styles write about a kind; fact is None for what states none."""
    found = []
    for fact, row in grammar(kind).items():
        value = r"\d+" if fact in NUMERIC else "|".join(VOCABULARY.get(fact, ())) or (
            r"\d+ [A-Z][a-z]+" if fact == "birthday" else r"(?:The )?[A-Z][a-z]+(?: [A-Z][a-z]+)*")
        asked = [f"Q: {ask}\nA: {{it}}." for ask in row["asks"]]
        labelled = [form.format(label=row["label"], it="{it}") for form in
                    ("- {label}: {it}", "| {label} | {it} |", "{label} {it}", "{label} {it}.")]
        found += [(fact, pattern_of(template, value)) for template in (*row["says"], *asked, *labelled)]
        found += [(None, pattern_of(ask)) for ask in row["asks"]]
    for _, opening, _, _, closing in STYLES.values():
        found += [(None, pattern_of(piece)) for part in (opening, closing) for piece in pieces(part)]
    return tuple(found)


def means(who, entity):
    """Whether a sentence with the subject `who` speaks of the entity."""
    names = {entity["name"], *subject_of(entity).values(), f"this {NOUNS[entity['kind']]}", "he", "she", "it"}
    return who is None or who.lower() in map(str.lower, names)


def statements(piece, entity):
    """[(fact, value, subject)] in a sentence that the grammar knows, one for each way to read it; fact is
    None where it states nothing."""
    matches = ((fact, pattern.fullmatch(piece)) for fact, pattern in patterns(entity["kind"]))
    return [(fact, m.groupdict().get("it"), m.groupdict().get("who")) for fact, m in matches if m]


def read_articles(text):
    """Entities {"name", "kind", "facts", "at"} of encyclopedia articles, `at` the place of each fact's
    sentence in the text; [] for any other text."""
    entities = []
    starts = [match.start() for match in re.finditer(r"(?m)^[A-Z][^.:|\n]*\n\n", text)]
    if not starts or text[: starts[0]].strip():
        return []
    for start, end in zip(starts, [*starts[1:], len(text)]):
        name, _, body = text[start:end].partition("\n\n")
        for kind in GRAMMAR:
            entity, position = {"name": name, "kind": kind, "facts": {}, "at": {}}, start + len(name)
            for piece in pieces(body):
                read = [(f, v) for f, v, who in statements(piece, entity) if f and means(who, entity)]
                if len(read) != 1 or read[0][0] in entity["facts"]:
                    break
                position = text.index(piece, position)
                entity["facts"][read[0][0]], entity["at"][read[0][0]] = read[0][1], position
            else:
                entities.append(entity)
                break
        else:
            return []
    return entities


# --- fidelity: does a text say what its source says, all of it and nothing else? ---

WORD = re.compile(r"[^\W\d_]+(?:'[a-z]+)?")
COUNTED = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty""".split()
NUMBER_WORDS = {word: str(number) for number, word in enumerate(COUNTED) if word != "one"}
NUMBER_WORDS |= {"thirty": "30", "forty": "40", "fifty": "50", "hundred": "100", "thousand": "1000",
                 "dozen": "12", "twice": "2"}
NEGATIONS = set("""not no never none nobody nothing neither nor without cannot hardly unlike
instead false untrue wrong deny denied refused except""".split())
FUNCTION_WORDS = set("""a an the this that these those it its he she they his her their him them
one i we you my our your me us who whom whose which what when where how is are was were be been
being do does did done has have had having will would shall should can could may might must of in
on at to from by with for as into onto over about after before between during until since than
then there here and or but so if while because also both each all any some most very just only
still yet again once same such other another up down out off through around near along whether
upon within toward towards""".split())
# words that a faithful text on the invented world may use beyond those of the grammar itself
PARAPHRASE = """hailed raised native resided lived dwelt settled wed wife husband couple expired
passed death life lifetime birth date dated year years called named located situated found
established erected built populated home population folk residents citizens inhabited stands banks
flowing waters wares goods products famous renowned noted exports close closest neighbouring
nearby research investigates examines headquarters based located created set formed members
membership comprises numbering strong wrote composed painted made written author artist maker aged
finished done concerns story depicts possessed property possession collection celebrated dedicated
festival hosted venue held staged opened inaugurated attended attendance crowd guests people drawn
arranged organised person profession professional job trade worked practised career spouse partner
marriage married region area country later eventually moved hello dear readers reader today
welcome let introduce know question answer letter note thank friend speak talk hear told tell
following facts fact told began ended start end number about roughly approximately some river town
society work fair name names known man woman archive papers report lecture summary""".split()
# words that tell a fact from its rivals, beyond those that its own sentences have; the short ones weakly
CUES = {
    "birthplace": "from hailed raised", "home": "settled resided eventually", "spouse": "wed wife husband",
    "died": "expired death passed until", "seat": "headquarters based in at", "place": "in at",
    "region": "in from the", "creator": "by", "founder": "by", "organiser": "by", "guest": "by",
    "population": "population residents citizens", "members": "members", "form": "a an",
    "occupation": "a an the", "partner": "wife husband", "good": "for wares exports",
    "field": "for to research", "river": "river banks", "month": "in", "neighbour": "near closest",
}


def stem(word):
    """The first letters of a word: most forms of one word agree in them."""
    return word.lower()[:6]


def content(text):
    """Stems of the words that carry meaning."""
    return {stem(word) for word in WORD.findall(text) if word.lower() not in FUNCTION_WORDS}


def in_digits(text):
    """Number words as digits, no commas in thousands; "one" stays, it seldom counts anything."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return WORD.sub(lambda word: NUMBER_WORDS.get(word[0].lower(), word[0]), text)


def numbers(text):
    return re.findall(r"\d+(?:[.:/]\d+)*", in_digits(text))


def quantities(text):
    """{(number, stem of what it counts)}."""
    pairs = re.findall(r"(\d(?:[\d.]*\d)?)[ -]?([%°€$£]|[^\W\d_]+)", in_digits(text))
    return {(n, stem(unit)) for n, unit in pairs if unit.lower() not in FUNCTION_WORDS}


def names(text):
    """Words with a capital, but for those that only open a sentence."""
    inside = (re.sub(r"^\W*\w+", "", piece) for piece in pieces(text))
    found = {word for piece in inside for word in re.findall(r"\b[A-Z]\w+", piece)}
    return {word for word in found if word.lower() not in FUNCTION_WORDS}


def negations(text):
    return sum(word in NEGATIONS or word.endswith("n't") for word in map(str.lower, WORD.findall(text)))


def fidelity(source, text, judge=None, translated=False):
    """Reasons why `text` is no faithful rephrasing of `source`, [] if there are none (R 2.2).

    Exact for the invented world and its mathematics, whose sentences can be read. For other texts it
    compares numbers, names, quantities, negations and content, or of a translation the numbers and
    equations; then `judge(source, text)`, where there is one, gives its reason, or "".
    """
    if not text.strip():
        return ["empty"]
    if entities := read_articles(source):
        reasons = world_fidelity(entities, text)
    elif problems := read_problems(source):
        reasons = math_fidelity(source, problems, text)
    elif translated:
        reasons = number_fidelity(source, text) + [f"wrong: {equation}" for equation in wrong_equations(text)]
    else:
        reasons = text_fidelity(source, text)
    if not reasons and judge and (reason := judge(source, text)):
        reasons = [f"judge: {reason}"]
    return reasons


def world_fidelity(entities, text):
    """Reasons against a text on these entities: a sentence of the grammar is read exactly, any other by
    `read_freely`; each must speak of its entity, and in the end every fact must have been told."""
    told, reasons = {entity["name"]: set() for entity in entities}, []
    for entity, piece in zip(*speaking_of(entities, list(pieces(text)))):
        read = statements(piece, entity)
        mine = [(fact, value) for fact, value, who in read if means(who, entity)]
        right = [fact for fact, value in mine if fact and value == str(entity["facts"].get(fact))]
        if right:
            told[entity["name"]].add(right[0])
        elif any(fact is None for fact, _ in mine):
            continue
        elif mine:
            fact, value = mine[0]
            was = entity["facts"].get(fact, "not told")
            reasons.append(f"changed: {fact} of {entity['name']} is {was}, not {value}")
        elif read and names(who := f"Of {read[0][2]}") and not names(who) & set(entity["name"].split()):
            reasons.append(f"speaks of {read[0][2]}, not of {entity['name']}: {piece}")
        else:
            facts, reason = read_freely(piece, entity)
            told[entity["name"]] |= facts
            reasons += [reason] if reason else []
    return reasons + [f"lost: {fact} of {entity['name']}, {value}" for entity in entities
                      for fact, value in entity["facts"].items() if fact not in told[entity["name"]]]


def speaking_of(entities, sentences):
    """(entities, sentences): the one whose subject a sentence names; else the one before, in a riddle the
    one after."""
    def named(sentence):
        read = [(entity, who) for entity in entities for _, _, who in statements(sentence, entity)]
        if read:  # a sentence of the grammar: its subject counts, not the names among its values
            return next(
                (entity for entity, who in read if who and entity["name"].lower() in who.lower()), None
            )
        hits = [(sentence.find(e["name"]), i) for i, e in enumerate(entities) if e["name"] in sentence]
        return entities[min(hits)[1]] if hits else None

    if len(entities) == 1:
        return entities * len(sentences), sentences
    subjects, current = [named(sentence) for sentence in sentences], entities[0]
    for i, sentence in enumerate(sentences):
        if sentence == "Who or what is meant?":
            current = next((subject for subject in subjects[i:] if subject), current)
        current = subjects[i] = subjects[i] or current
    return subjects, sentences


def type_of(fact):
    """Facts of one type can be mistaken for each other."""
    return "number" if fact in NUMERIC else "day" if fact == "birthday" else str(VOCABULARY.get(fact, "name"))


@functools.cache
def known_words(kind):
    """Stems that texts on a kind may use, and for each fact those that no other fact of its type has."""
    stems = {fact: content(" ".join((row["label"], *row["says"], *row["asks"])).replace("{it}", " "))
             for fact, row in grammar(kind).items()}
    cues = {}
    for fact in stems:
        rivals = [stems[other] for other in stems if other != fact and type_of(other) == type_of(fact)]
        cues[fact] = stems[fact].difference(*rivals) | {stem(word) for word in CUES.get(fact, "").split()}
    return frozenset().union(*stems.values(), map(stem, PARAPHRASE)), cues


def told_in(clause, sentence, fact, entity, cues):
    """Whether a clause tells a fact: it has the value, and of all facts of its type the nearest cue is its
    own; cues are looked for in the clause, then in its sentence, at last short words in the clause."""
    value = rf"\b{re.escape(str(entity['facts'][fact]))}\b"
    rivals = [other for other in entity["facts"] if type_of(other) == type_of(fact)]
    for scope, weak in ((clause, False), (sentence, False), (clause, True)):
        if match := re.search(value, scope, re.IGNORECASE):
            at = len(re.findall(r"\w+", scope[: match.start()]))
            words = [(abs(at - i) + (i > at) / 2, stem(word)) for i, word in
                     enumerate(re.findall(r"\w+", scope)) if weak == (word in FUNCTION_WORDS)]
            near = {other: min((far for far, word in words if word in cues[other]), default=math.inf)
                    for other in rivals}
            if min(near.values()) < math.inf:
                return near[fact] == min(near.values())
    return False


def read_freely(piece, entity):
    """(facts that the sentence tells, reason against it or None), for a sentence that no template made.

    Nothing is told that cannot be found: each value must stand in one clause with a word that says which
    fact it is, and all words must be the entity's, the grammar's, or known to mean no new fact.
    """
    known, cues = known_words(entity["kind"])
    text = re.sub(r"\((\d+)\s*[-–]\s*(\d+)\)", r", born \1, died \2,", in_digits(piece))
    own = " ".join((entity["name"], *map(str, entity["facts"].values()), *subject_of(entity).values()))
    if negations(text):
        return set(), f"negation: {piece}"
    if extra := set(numbers(text)) - set(numbers(own)):
        return set(), f"number {min(extra)} is not in the source: {piece}"
    if extra := {name for name in names(text) if name not in own and stem(name) not in known}:
        return set(), f"name {min(extra)} is not in the source: {piece}"
    if extra := content(text) - known - content(own):
        return set(), f"added, {min(extra)}...: {piece}"
    clauses = re.split(r"[,;:()]| and | but | who | which | where ", text)
    facts = {fact for fact in entity["facts"] if any(told_in(c, text, fact, entity, cues) for c in clauses)}
    if re.search(r"\b(?:spouse|wife|husband)\b", text) and facts - {"spouse", "partner"}:
        return set(), f"unclear of whom: {piece}"
    told = " ".join(str(entity["facts"][fact]) for fact in facts) + " " + entity["name"]
    values = map(str, entity["facts"].values())
    values = [value for value in values if re.search(rf"\b{re.escape(value)}\b", text)]
    if unclear := [value for value in values if value not in told]:
        return set(), f"unclear what {unclear[0]} is: {piece}"
    pronouns = {"he", "she", "it", "they", "his", "her", "its", "their", NOUNS[entity["kind"]]}
    subjects = {word.lower() for word in WORD.findall(entity["name"])} | pronouns
    if facts and not subjects & {word.lower() for word in WORD.findall(text)}:
        return set(), f"does not speak of {entity['name']}: {piece}"
    return facts, None


def number_fidelity(source, text):
    """Numbers of the source that a text has lost, and those it has made up."""
    old, new = set(numbers(source)), set(numbers(text))
    return [f"number {n} is lost" for n in sorted(old - new)] + [
        f"number {n} is not in the source" for n in sorted(new - old)]


def text_fidelity(source, text):
    """Reasons against a rephrasing of any text: numbers, names, quantities, negations, content."""
    reasons = number_fidelity(source, text)
    words = {word.lower() for word in WORD.findall(source)}
    reasons += [f"name {n} is not in the source" for n in sorted(names(text)) if n.lower() not in words]
    written = {word.lower() for word in WORD.findall(text)}
    reasons += [f"name {n} is lost" for n in sorted(names(source)) if n.lower() not in written]
    units = {number: unit for number, unit in quantities(source)}
    reasons += [f"{n} counts {unit}..., in the source {units[n]}..." for n, unit in sorted(quantities(text))
                if n in units and (n, unit) not in quantities(source)]
    told, said = [(p, content(p)) for p in pieces(source)], [(p, content(p)) for p in pieces(text)]
    everything, all_said = content(source), content(text)
    for piece, stems in said:
        if len(stems) > 2 and len(stems & everything) < 0.5 * len(stems):
            reasons.append(f"not in the source: {piece}")
        near = max(told, key=lambda other: len(other[1] & stems) / (1 + len(other[1] | stems)))
        if len(near[1] & stems) >= 0.5 * len(stems) > 0 and negations(piece) % 2 != negations(near[0]) % 2:
            reasons.append(f"negation: {piece}")
    reasons += [f"lost: {piece}" for piece, stems in told
                if len(stems) > 2 and len(stems & all_said) < 0.4 * len(stems)]
    return reasons


# --- reading mathematics: problems in four languages, every equation worked out again ---


@functools.cache
def math_patterns():
    """((kind, language column, pattern), ...) of the statements."""
    found = []
    for kind, row in STATEMENTS.items():
        for column, template in enumerate(row):
            slot = {
                "task": r"\d+ [-+×] \d+",
                "list": r"\d+(?:, \d+)+",
                "item": "|".join(
                    re.escape(WORDS[item][column]) for item in ("apples", "pears", "lemons", "eggs")
                ),
            }
            text, seen = re.escape(template), set()
            for name in re.findall(r"\{(\w+)\}", template):
                group = f"(?P={name})" if name in seen else f"(?P<{name}>{slot.get(name, '[0-9]+')})"
                text, _ = text.replace(rf"\{{{name}\}}", group, 1), seen.add(name)
            found.append((kind, column, re.compile(text)))
    return tuple(found)


def in_english(text, column, part):
    """The words of a part of a worked problem, from the language of the column to English."""
    # German has one word, Rest, for what is left in a step and for the remainder in an answer
    skipped = {"problem", "step", "answer", "left" if part == "answer" else "remainder"}
    for word, row in sorted(WORDS.items(), key=lambda item: -len(item[1][column])):
        if word not in skipped:
            text = re.sub(rf"(?<!\w){re.escape(row[column])}(?!\w)", row[0], text)
    return text


def read_line(line):
    """What a line of a worked problem is: (part, language column, kind or number, English text), or None.

    part is "problem", "step" or "answer".
    """
    for part in ("problem", "step", "answer"):
        for column, word in enumerate(WORDS[part]):
            if not line.startswith(word):
                continue
            rest = line.removeprefix(word)
            if part == "answer":
                return part, column, None, in_english(rest, column, part)
            if part == "step" and (match := re.fullmatch(r"(\d+): (.*)", rest)):
                return part, column, match[1], in_english(match[2], column, part)
            for kind, language, pattern in math_patterns() if part == "problem" else ():
                if language == column and (match := pattern.fullmatch(rest)):
                    slots = {key: in_english(value, column, part) for key, value in match.groupdict().items()}
                    return part, column, kind, STATEMENTS[kind][0].format(**slots)
    return None


def read_problems(text):
    """[{"kind", "statement", "answer"}] in English, if the text is worked problems and nothing else."""
    problems = []
    for line in filter(None, text.split("\n")):
        read = read_line(line)
        if read is None or (not problems and read[0] != "problem"):
            return []
        part, _, kind, english = read
        if part == "problem":
            problems.append({"kind": kind, "statement": english, "answer": None})
        elif part == "answer":
            problems[-1]["answer"] = english
    return problems


def work_out(expression):
    """The exact value of whole numbers with + - × ÷ /, by their rules of precedence; ValueError if it is
    anything else. Nothing is ever evaluated as a program."""
    tokens = re.findall(r"\d+|[-+×÷/]", expression)
    if "".join(tokens) != expression.replace(" ", "") or len(tokens) % 2 == 0:
        raise ValueError(expression)
    total, term, sign = Fraction(0), Fraction(int(tokens[0])), 1
    for operator, number in zip(tokens[1::2], map(int, tokens[2::2])):
        if operator in "+-":
            total, term, sign = total + sign * term, Fraction(number), 1 if operator == "+" else -1
        else:
            term = term * number if operator == "×" else term / number
    return total + sign * term


CHAIN = re.compile(r"[\dx][\dx+×÷/ -]*(?:[=<>] ?[\dx][\dx+×÷/ -]*)+")


def wrong_equations(text, x=None):
    """Chains like 4x = 20 - 8 = 12 or 8 < 9 in a text that do not hold; x is the number it stands for."""
    wrong, compare = [], {"=": Fraction.__eq__, "<": Fraction.__lt__, ">": Fraction.__gt__}
    for chain in CHAIN.findall(text):
        if x is not None:
            chain = re.sub(r"(\d*)x", lambda m: f"{m[1] or 1} × {x}", chain)
        parts = [part.strip() for part in re.split(r"([=<>])", chain.strip(" -"))]
        try:
            values = [None if "x" in part else work_out(part) for part in parts[::2]]
        except (ValueError, IndexError, ZeroDivisionError):
            wrong.append(chain.strip())
            continue
        pairs = zip(values, parts[1::2], values[1:])
        if not all(a is None or b is None or compare[sign](a, b) for a, sign, b in pairs):
            wrong.append(chain.strip())
    return wrong


def solve(problem):
    """The answer to a problem, from its statement alone, as its text writes it."""
    kind, statement = problem["kind"], problem["statement"]
    n = [int(number) for number in re.findall(r"\d+", statement)]
    if kind == "divisor":
        return str(math.gcd(*n))
    if kind == "division":
        return f"{n[0] // n[1]}, remainder {n[0] % n[1]}"
    if kind == "comparison":
        first, second = f"{n[0]} × {n[1]}", f"{n[2]} × {n[3]}"
        return first if n[0] * n[1] > n[2] * n[3] else second
    return str({
        "calculation": lambda: work_out(re.search(r"\d+ [-+×] \d+", statement)[0]),
        "equation": lambda: Fraction(n[2] - n[1], n[0]), "percent": lambda: Fraction(n[0] * n[1], 100),
        "fractions": lambda: Fraction(n[0], n[1]) + Fraction(n[2], n[3]),
        "sequence": lambda: n[0] + len(n) * (n[1] - n[0]), "price": lambda: Fraction(n[1] * n[2], n[0]),
        "distance": lambda: n[0] * n[1], "total": lambda: sum(n), "area": lambda: n[0] * n[1],
    }[kind]())


# words that a learning note may use beyond those of the problems and ideas
NOTE_WORDS = """ learning note question idea work result check solution because therefore first second third
last multiply divide add subtract digit place carry gives get so equals value number"""


def math_fidelity(source, problems, text):
    """Reasons against a text that poses and works the problems of the source in English. Their answers are
    worked out from the statements, every equation of the text is worked out again, and a number must come
    from the source or from an equation."""
    wrong = [problem for problem in problems if solve(problem) != problem["answer"]]
    reasons = [f"the source answers {p['answer']} to {p['statement']}" for p in wrong]
    posed = re.findall(r"^(?:Problem|Question): (.*)", text, re.MULTILINE)
    answers = re.findall(r"^(?:Answer|Result): (.*)", text, re.MULTILINE)
    if len(posed) != len(problems) or len(answers) != len(problems):
        return [*reasons, f"{len(problems)} problems became {len(posed)} with {len(answers)} answers"]
    worked = re.split(r"(?m)^(?=Problem: |Question: )", text)[1:]
    for problem, statement, answer, part in zip(problems, posed, answers, worked):
        x = problem["answer"] if problem["kind"] == "equation" else None
        reasons += [f"wrong: {equation}" for equation in wrong_equations(part, x)]
        if statement != problem["statement"]:
            reasons += text_fidelity(problem["statement"], statement)
        if answer.rstrip(". ") != problem["answer"]:
            reasons.append(f"changed: the answer is {problem['answer']}, not {answer}")
    plain = re.sub(r"(?m)^(?:Step )?\d+[.:] ", "", text)
    worked_out = " ".join(chain for chain in CHAIN.findall(plain) if "=" in chain)
    if extra := set(numbers(plain)) - set(numbers(f"{source} {worked_out}")):
        reasons.append(f"number {min(extra)} is neither in the source nor worked out")
    known = " ".join((*IDEAS.values(), *(row[0] for table in (WORDS, STATEMENTS) for row in table.values())))
    if extra := content(text) - content(known + NOTE_WORDS):
        reasons.append(f"added: {min(extra)}...")
    if foreign := re.findall(r"[^\x00-\x7F×÷–’°]+", text):
        reasons.append(f"not English: {foreign[0]}")
    return reasons


# --- rewriters: the grammar, our own model, an endpoint; each is (task, chunk, written) -> text ---


@dataclass(frozen=True)
class Rewriting:
    """One document to be written anew in one style."""

    document: dict
    style: str
    number: int  # which rephrasing of the document

    def key(self):
        return [self.document["source"], zlib.crc32(self.document["text"].encode()), self.style, self.number]


def chunks(text, tok, size):
    """(start, end) of the pieces of a text, each of at most `size` tokens where a paragraph, a line, a
    sentence or at last a word ends in time; together they are the whole text."""
    def cut(start, end, marks=(r"\n\n+", r"\n", r"(?<=[.?!。？！]) ?", r" ", r"")):
        if len(tok.encode(text[start:end])) <= size or not marks or end - start < 2:
            return [(start, end)]
        ends = [start + match.end() for match in re.finditer(marks[0], text[start:end]) if match.end()]
        spans, begin = [], start
        for stop in [*ends, end]:
            if stop > begin:
                spans += cut(begin, stop, marks[1:])
                begin = stop
        joined = spans[:1]
        for span in spans[1:]:
            if len(tok.encode(text[joined[-1][0] : span[1]])) <= size:
                joined[-1] = (joined[-1][0], span[1])
            else:
                joined.append(span)
        return joined
    return cut(0, len(text))


def styles_of(doc):
    """Names of the styles that a document may be rewritten in; English needs no translation."""
    if doc["domain"] != "math":
        return list(STYLES)
    line = read_line(doc["text"].split("\n")[0])
    foreign = line[1] > 0 if line else not doc["text"].replace("×", "x").replace("÷", "/").isascii()
    return list(MATH_STYLES) if foreign else ["learning note"]


class GrammarRewriter:
    """The built-in writer: reads articles of the invented world and worked problems, and tells them anew.
    It needs no network and invents nothing; of any other text it knows no style."""

    parallel = 1

    def __init__(self, seed):
        self.seed = seed

    def styles(self, doc):
        readable = read_articles(doc["text"]) or read_problems(doc["text"])
        return styles_of(doc) if readable else []

    def __call__(self, task, chunk, written):
        rng = random.Random(f"{self.seed} {task.key()} {chunk}")
        source = task.document["text"]
        if task.style in MATH_STYLES:
            return self.solve_anew(source[slice(*chunk)], task.style)
        parts, entities = [], read_articles(source)
        for entity in entities:
            inside = [fact for fact, at in entity["at"].items() if chunk[0] <= at < chunk[1]]
            if inside:
                places = entity["at"].values()
                parts.append(
                    tell(entity, task.style, rng, inside, chunk[0] <= min(places), max(places) < chunk[1])
                )
        return "\n".join(parts) + "\n" * (chunk[1] < len(source))

    @staticmethod
    def solve_anew(text, style):
        lines = []
        for line in text.split("\n"):
            part, _, kind, english = read_line(line) or ("", 0, None, line)
            if style == "translation":
                head = {"": "", "problem": "Problem: ", "step": f"Step {kind}: ", "answer": "Answer: "}[part]
                lines.append(head + english)
            elif part == "problem":
                lines += ["# Learning note", f"Question: {english}", f"Idea: {IDEAS[kind]}."]
            else:
                lines.append({"": "", "step": f"{kind}. ", "answer": "Result: "}[part] + english)
        return "\n".join(lines)


def tell(entity, style, rng, facts=None, begin=True, end=True):
    """Some facts of an entity in a style; all the text, or from its opening, or to its closing."""
    _, opening, line, between, closing = STYLES[style]
    rows, subject = grammar(entity["kind"]), subject_of(entity)
    facts = list(entity["facts"] if facts is None else facts)
    if style != "encyclopedia":
        rng.shuffle(facts)
    if style == "quiz":
        anonymous = dict.fromkeys("ns", f"this {NOUNS[entity['kind']]}")
    written = []
    for fact in facts:
        value, row = entity["facts"][fact], rows[fact]
        say, ask = rng.choice(row["says"]), rng.choice(row["asks"])
        written.append(line.format(label=row["label"], it=value, ask=worded(ask, subject),
                                   say=worded(say, anonymous if style == "quiz" else subject, value)))
    return opening.format(**subject) * begin + between.join(written) + closing.format(**subject) * end


SYSTEM = (
    "You rewrite texts. Keep every fact, number, unit, name and date of the passage; add nothing, leave "
    "out nothing, correct nothing. Write English. Answer with the new text alone."
)


def rewriting_messages(task, chunk, written):
    """The chat that asks a model for one chunk: what stands around it, what was written so far, the
    passage itself (R 2.2, Fig. 4)."""
    doc, (start, end) = task.document, chunk
    style = STYLES[task.style][0] if task.style in STYLES else MATH_STYLES[task.style]
    ask = f"Rewrite the passage as {style}."
    if doc["domain"] == "math":
        ask += " Begin every problem with a line 'Question: ' and end it with a line 'Result: '."
    if (start, end) != (0, len(doc["text"])):
        ask += (
            f"\n\nIt is part of a longer text. Before it stands:\n{doc['text'][max(0, start - 2000) : start]}"
            f"\n\nAfter it stands:\n{doc['text'][end : end + 500]}"
        )
    if written:
        ask += f"\n\nYour text so far, go on from its end without repeating it:\n{''.join(written)[-4000:]}"
    return [{"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"{ask}\n\nPassage:\n{doc['text'][start:end]}"}]


class ModelRewriter:
    """A chat model that this project trained, from its folder."""

    parallel = 1

    def __init__(self, folder, seed, device):
        self.model, self.tok = load_pretrained(folder, device)
        self.seed, self.device = seed, device

    def styles(self, doc):
        return styles_of(doc)

    def __call__(self, task, chunk, written):
        ids, _ = self.tok.render(rewriting_messages(task, chunk, written), add_generation_prompt=True)
        generator = torch.Generator(self.device).manual_seed(
            zlib.crc32(repr((self.seed, task.key(), chunk)).encode())
        )
        room = 2 * len(self.tok.encode(task.document["text"][slice(*chunk)])) + 64
        stop = [self.tok.special[name] for name in ("<|im_end|>", "[EOS]")]
        out = self.model.generate(torch.tensor([ids]), room, 0.6, stop=stop, generator=generator)[
            0, len(ids) :
        ]
        return self.tok.parse(out.tolist())["content"] or ""


class Endpoint:
    """A server that speaks the OpenAI chat protocol: one call, tried again where that may help.

    Timeouts, refused connections, 408, 409, 429 and 5xx, answers that are no JSON or were cut off: again,
    after 1, 2, 4 ... seconds or as long as the server asks (Retry-After). Other errors stop at once.
    """

    def __init__(self, url, model, key=None, timeout=60.0, retries=5, per_minute=None):
        self.url, self.model, self.key = url.rstrip("/") + "/chat/completions", model, key
        self.timeout, self.retries = timeout, retries
        self.gap, self.free, self.lock = 60.0 / per_minute if per_minute else 0.0, 0.0, threading.Lock()

    def wait_for_turn(self):
        with self.lock:
            now = time.monotonic()
            turn = self.free = max(now, self.free)
            self.free += self.gap
        time.sleep(turn - now)

    def chat(self, messages, **options):
        """The text of the answer; UserError when the endpoint does not give one."""
        body = json.dumps({"model": self.model, "messages": messages, **options}).encode()
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.key}"} if self.key else {}
        )
        for attempt in range(self.retries + 1):
            self.wait_for_turn()
            pause = 2.0**attempt
            try:
                request = urllib.request.Request(self.url, body, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    choice = json.load(answer)["choices"][0]
                text = choice["message"]["content"]
                if choice.get("finish_reason") == "length":
                    problem = "the answer was cut off"
                elif not isinstance(text, str) or not text.strip():
                    problem = "the answer was empty"
                else:
                    return text
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {' '.join(error.read(300).decode(errors='replace').split())}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise UserError(f"{self.url} refused: {problem}") from None
                with contextlib.suppress(TypeError, ValueError):
                    pause = max(pause, float(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, KeyError, IndexError, TypeError):
                problem = "the answer was not of the chat protocol"
            if attempt < self.retries:
                time.sleep(min(pause, 60.0))
        raise UserError(f"{self.url} gave no answer in {self.retries + 1} tries, the last: {problem}; "
                        "what was written is kept, the same command goes on from there")


class EndpointRewriter:
    def __init__(self, endpoint, parallel):
        self.endpoint, self.parallel = endpoint, parallel

    styles = ModelRewriter.styles

    def __call__(self, task, chunk, written):
        return self.endpoint.chat(rewriting_messages(task, chunk, written), temperature=0.7).strip() + "\n"


def endpoint_of(run, what):
    """The Endpoint that a run configures for "rewriter" or "judge", or None; its key comes from the
    environment, REWRITER_API_KEY or JUDGE_API_KEY, else OPENAI_API_KEY, and is never written down."""
    url, model = getattr(run, f"{what}_url"), getattr(run, f"{what}_model")
    if not url:
        return None
    key = os.environ.get(f"{what.upper()}_API_KEY") or os.environ.get("OPENAI_API_KEY")
    return Endpoint(url, model, key, run.endpoint_timeout, run.endpoint_retries, run.endpoint_rpm)


def judge_with(endpoint):
    """A judge(source, text) that asks an endpoint; "" or the reason it gives."""
    def judge(source, text):
        ask = (
            f"Source:\n{source}\n\nRephrasing:\n{text}\n\nDoes the rephrasing state every fact of the "
            "source, change none and add none? Answer FAITHFUL, or UNFAITHFUL: and the reason in one line."
        )
        answer = endpoint.chat([{"role": "user", "content": ask}], temperature=0.0).strip()
        return "" if answer.upper().startswith("FAITHFUL") else answer.split("\n")[0][:300]
    return judge


def make_rewriter(run):
    """The rewriter that the run names, or None."""
    if run.rewriter_url:
        return EndpointRewriter(endpoint_of(run, "rewriter"), run.endpoint_parallel)
    if run.rewriter == "none" or not run.rephrase_max:
        return None
    if run.rewriter == "grammar":
        return GrammarRewriter(run.seed)
    if not Path(run.rewriter, "config.json").exists():
        raise UserError(f"--rewriter {run.rewriter}: neither grammar nor none, nor the folder of a model")
    return ModelRewriter(run.rewriter, run.seed, pick_device(run.device))


# --- the stage: tasks, a journal that a kill cannot harm, verdicts ---


def rephrasing_tasks(documents, rewriter, run):
    """The tasks of a run in a fixed order: for each training document at most rephrase_max styles; what is
    a rephrasing already is left as it is."""
    domains = set(run.rephrase_domains.split(","))
    for doc in documents:
        if doc["split"] == "train" and doc["domain"] in domains and "rephrased_from" not in doc:
            rng = random.Random(f"styles {run.seed} {doc['source']}")
            styles = rewriter.styles(doc)
            for number, style in enumerate(rng.sample(styles, min(run.rephrase_max, len(styles)))):
                yield Rewriting(doc, style, number)


class Journal:
    """A file of JSON lines that outlives a kill: a line is there whole or is cut off at the next start.

    Every call's text and every verdict is one line, so that no paid call is ever made twice.
    """

    def __init__(self, path):
        self.known, self.lock = {}, threading.Lock()
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):
                raise UserError(f"{path} is damaged in line {number}; delete that line to go on") from None
            self.known[json.dumps(key)] = value
        self.file = open(path, "ab")
        self.file.truncate(whole)

    def recall(self, key, make):
        """The value under a key; made and written down if it is not known yet."""
        name = json.dumps(key)
        if name not in self.known:
            value = make()
            line = json.dumps([key, value], ensure_ascii=False).encode() + b"\n"
            with self.lock:
                self.known[name] = value
                self.file.write(line)
                self.file.flush()
        return self.known[name]


def seam_faults(parts):
    """Reasons why parts that were written one after the other do not join into one text."""
    reasons = []
    for number, (before, after) in enumerate(zip(parts, parts[1:]), 1):
        tail, head = [re.findall(r"\w+", text.lower()) for text in (before, after)]
        if not head:
            reasons.append(f"seam {number}: nothing follows")
        elif (len(head) >= 8 and " ".join(head[:20]) in " ".join(tail[-400:])) or any(
                tail[-n:] == head[:n] for n in range(8, 60)):
            reasons.append(f"seam {number}: repeats what stood before it")
        elif not re.search(r"[.?!:;|\n\d)\"'”。]\s*$", before) and re.match(r"\s*[A-Z]", after):
            reasons.append(f"seam {number}: breaks off in a sentence")
    return reasons


def rephrase_one(task, rewriter, judge, journal, tok, size):
    """(text, reasons): a document rewritten chunk by chunk, and judged."""
    written, spans = [], chunks(task.document["text"], tok, size)
    for chunk in spans:
        call = functools.partial(rewriter, task, chunk, written)
        written.append(journal.recall([*task.key(), list(chunk)], call))
    text = "".join(written).strip()

    def verdict():
        source = task.document["text"]
        if near_duplicates([source, text]):
            return ["echo: the source in its own words"]
        return seam_faults(written) + fidelity(source, text, judge, task.style == "translation")
    return text, journal.recall([*task.key(), "verdict"], verdict)


def rephrase(documents, run, tok, folder):
    """New documents, rewritten from `documents` (R 2.2). data/rephrased.jsonl holds those that are
    faithful, data/rejected.jsonl the others with the reasons; killed anywhere, it goes on from there."""
    rewriter = make_rewriter(run)
    if rewriter is None:
        return [], []
    judge = endpoint_of(run, "judge")
    judge = judge_with(judge) if judge else None
    tasks = list(rephrasing_tasks(documents, rewriter, run))
    journal, accepted, rejected = Journal(folder / "rephrase.journal"), [], []
    work = functools.partial(
        rephrase_one, rewriter=rewriter, judge=judge, journal=journal, tok=tok, size=run.chunk_tokens
    )
    pool = ThreadPoolExecutor(rewriter.parallel) if rewriter.parallel > 1 else None
    try:
        results = pool.map(work, tasks) if pool else map(work, tasks)
        for task, (text, reasons) in zip(
            tasks, tqdm(results, "rephrase", len(tasks), disable=None, unit="text")
        ):
            doc = {**document(text, task.document["domain"], task.document["source"]), "split": "train",
                   "rephrased_from": task.document["source"], "style": task.style}
            if reasons:
                rejected.append(doc | {"reasons": reasons})
            else:
                accepted.append(doc)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        journal.file.close()
    write_jsonl(folder / "rejected.jsonl", rejected)
    write_jsonl(folder / "rephrased.jsonl", accepted)
    return accepted, rejected


# --- the corpus, put together ---


def train_tokenizer(documents, vocab_size, most_characters=20_000_000):
    """BPE of the training documents, or of an even sample of them where they are long."""
    texts = [doc["text"] for doc in documents if doc["split"] == "train"]
    stride = max(1, sum(map(len, texts)) // most_characters)
    return Tokenizer.train(texts[::stride], vocab_size)


def prepare_data(run, cfg, out):
    """Tokenizer, rephrasings and token files of a run, made once: data/DOMAIN.jsonl, data/DOMAIN.SPLIT.bin.

    data/index.json is written last: while it is missing, all is made anew, but for calls to a rewriter.
    """
    folder = out / "data"
    if (folder / "index.json").exists():
        return Tokenizer.load(out)
    folder.mkdir(exist_ok=True)
    documents, skipped, twins = split_documents(run)
    tok = train_tokenizer(documents, cfg.vocab_size)
    with atomic(out / "tiktoken.model") as temporary:
        tok.save(temporary)
    accepted, rejected = rephrase(documents, run, tok, folder)
    documents += accepted
    dtype, index = np.dtype("<u2" if tok.n_vocab <= 2**16 else "<u4"), {}
    for domain in dict.fromkeys(doc["domain"] for doc in documents):
        mine = [doc for doc in documents if doc["domain"] == domain]
        write_jsonl(folder / f"{domain}.jsonl", mine)
        for split in ("train", "val"):
            texts = [doc["text"] for doc in mine if doc["split"] == split]
            sizes = write_tokens(folder / f"{domain}.{split}.bin", texts, tok, dtype)
            index.setdefault(domain, {})[split] = sizes
    about = {"dtype": dtype.str, "vocab_size": tok.n_vocab, "skipped": len(skipped), "duplicates": twins,
             "domains": index, "rephrase": acceptance(accepted, rejected)}
    write_card(folder / "card.md", about, documents, rejected)
    write_json(folder / "index.json", about)
    (folder / "rephrase.journal").unlink(missing_ok=True)
    return tok


def acceptance(accepted, rejected):
    """{style: {"accepted", "rejected"}} of a run's rephrasings, and of all together."""
    table = {"all": {"accepted": len(accepted), "rejected": len(rejected)}}
    for verdict, documents in (("accepted", accepted), ("rejected", rejected)):
        for doc in documents:
            row = table.setdefault(doc["style"], {"accepted": 0, "rejected": 0})
            row[verdict] += 1
    return dict(sorted(table.items()))


def write_card(path, about, documents, rejected):
    """data/card.md: what the corpus holds, how much of its rephrasing was kept and why the rest fell,
    an example of every kind."""
    reasons, examples = {}, {}
    for doc in rejected:
        reason = re.split(r"[:,\d]", doc["reasons"][0])[0].strip()
        reasons[reason] = reasons.get(reason, 0) + 1
    for doc in documents:
        examples.setdefault((doc["domain"], doc.get("style", "as it was found")), doc["text"])
    lines = ["# Data card", "", "| domain | split | documents | tokens | bytes |", "|---|---|---|---|---|"]
    lines += [f"| {domain} | {split} | {n['documents']:,} | {n['tokens']:,} | {n['bytes']:,} |"
              for domain, splits in about["domains"].items() for split, n in splits.items()]
    lines += [
        "",
        f"{about['duplicates']} near-duplicates were left out, {about['skipped']} items could not be "
        "read. Rephrasings are of training documents only.",
        "",
        "| style | accepted | rejected |",
        "|---|---|---|",
    ]
    lines += [
        f"| {style} | {n['accepted']:,} | {n['rejected']:,} |" for style, n in about["rephrase"].items()
    ]
    lines += [
        "",
        "Rejected because:",
        "",
        *(f"- {reason}: {n}" for reason, n in sorted(reasons.items())),
    ] * bool(reasons)
    for (domain, style), text in examples.items():
        lines += ["", f"## {domain}, {style}", "", *(f"> {line}" for line in text[:400].split("\n"))]
    with atomic(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ==================================================================================================
# 6  The loop: schedule, step, log, checkpoint, resume (R 2.5)
# ==================================================================================================
# Warm up, stay, decay (WSD): the learning rate rises for a few steps, is constant for most of the
# run, and falls along a cosine to a tenth. K2: 500 steps up, 10 T tokens at 2e-4, 5.5 T down to 2e-5.
# Then it anneals to 7e-6 on 400 B tokens and the 60 B of the long-context activation; the shape of that
# fall is not given (UNCONFIRMED), ours is a cosine over all steps that are left, YaRN's too. All steps have
# the same number of tokens.


def wsd(step, run):
    """Learning rate of a step, as k2's schedule shaped by the fields of the run."""
    decay_steps = max(1, round(run.steps * run.decay))
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    if step < run.steps - decay_steps or (step < run.steps and not run.decay):
        return run.lr
    if step < run.steps:
        return cosine(run.lr, run.lr * run.lr_end, (step - (run.steps - decay_steps)) / decay_steps)
    x = (step - run.steps) / max(1, run.anneal_steps + run.long_steps + run.yarn_steps)
    return cosine(run.lr * run.lr_end, run.lr * run.lr_anneal, x)


def cosine(start, end, x):
    """From start at x = 0 to end at x = 1 along half a cosine."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * x))


@dataclass
class Phase:
    """A stretch of steps of a stage, trained on batches of one shape."""

    name: str
    start: int
    end: int  # first step of the next phase
    rows: int
    seq_len: int
    weights: dict  # of the domains
    context: tuple  # what KimiK2.set_context gets: length, YaRN or None
    bias_update_rate: float


def phases(run, cfg, data):
    """Pretraining, annealing on the best data, long-context activation, YaRN (R 2.5); none without steps.

    YaRN reaches yarn_factor times seq_len, but trains on the activation's length: the report gives it no
    tokens at all, and a toy learns more from several documents a step than from one.
    """
    plain = cfg.rope_scaling if not run.yarn_steps else None  # K2 gets its YaRN after the activation
    yarn = cfg.rope_scaling or {
        "type": "yarn", "factor": float(run.yarn_factor), "original_max_position_embeddings": run.seq_len,
        "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    found, start, longest = [], 0, cfg.max_position_embeddings
    for name, steps, factor, reach, weights, scaling in (
        ("pretrain", run.steps, 1, 1, data.weights, plain),
        ("anneal", run.anneal_steps, 1, 1, data.anneal_weights, plain),
        ("long", run.long_steps, run.long_factor, run.long_factor, data.weights, plain),
        ("yarn", run.yarn_steps, run.long_factor, run.yarn_factor, data.weights, yarn),
    ):
        if steps:
            length, longest = run.seq_len * factor, max(longest, run.seq_len * reach)
            rows = max(1, run.batch_size * run.seq_len // length)
            rate = run.bias_update_rate if name == "pretrain" else 0.0  # V3 and Moonlight still it at the end
            found.append(Phase(name, start, start + steps, rows, length, weights, (longest, scaling), rate))
            start += steps
    return found


@dataclass
class Job:
    """What every stage works on."""

    run: RunConfig
    cfg: KimiConfig
    out: Path
    device: torch.device
    tok: Tokenizer
    data: TokenFiles

    def autocast(self):
        """bf16 for the matrix products where it pays: on CUDA; weights and optimizer stay fp32."""
        bf16 = self.run.dtype == "bf16" or (self.run.dtype == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


@dataclass
class Progress:
    """What a checkpoint holds beside weights and optimizer."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    max_logit: float = -math.inf  # the largest S_max of the run
    ever_clipped: torch.Tensor | None = None  # (L, H) bool


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch finds no CUDA device")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this PyTorch finds no Apple GPU")
    return torch.device(name)


def compile_blocks(model, job):
    """Compile the blocks' training path; where that fails, say why in a line and stay eager."""
    on_gpu = job.device.type == "cuda"
    if job.run.compile == "off" or (job.run.compile == "auto" and not on_gpu):
        return
    for block in model.model.layers:
        block.compile()
    try:
        probe = torch.zeros(job.run.micro_batch, job.run.seq_len, dtype=torch.long, device=job.device)
        with job.autocast():
            model.loss(probe, probe).backward()
    except Exception as error:  # no compiler, an operator it does not know: many kinds
        for block in model.model.layers:
            block._compiled_call_impl = None
        print(f"note: torch.compile failed ({str(error).strip().splitlines()[0][:120]}), going on without")
    model.zero_grad()
    model.init_buffers()


class Checkpoints:
    """ckpt/STAGE_STEP.safetensors: weights, optimizer and progress, complete or not there at all."""

    def __init__(self, out, stage):
        self.folder, self.stage = out / "ckpt", stage
        self.folder.mkdir(exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()

    def paths(self):
        """Newest first."""
        return sorted(self.folder.glob(f"{self.stage}_*.safetensors"), reverse=True)

    def save(self, model, opt, progress):
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for number, state in opt.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items()}
        tensors["ever_clipped"] = progress.ever_clipped
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        facts = {**dataclasses.asdict(progress), "ever_clipped": None, "max_logit": str(progress.max_logit)}
        path = self.folder / f"{self.stage}_{progress.step:08d}.safetensors"
        try:
            with atomic(path) as temporary:
                save_file(tensors, temporary, {"progress": json.dumps(facts)})
        except (OSError, SafetensorError) as error:
            kept = next(iter(self.paths()), "none")
            raise UserError(f"could not save {path}: {error}; the last good checkpoint is {kept}") from None
        for old in self.paths()[2:]:  # the last two are kept
            old.unlink()

    def load(self, model, opt):
        """Restore the newest checkpoint that is sound; Progress() if there is none."""
        paths = self.paths()
        for path in paths:
            try:
                return self._load(path, model, opt)
            except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
                print(f"{path} is damaged ({str(error).splitlines()[0][:100]}), trying the one before it",
                      file=sys.stderr)
        if paths:
            raise UserError(
                f"no checkpoint in {self.folder} can be read; delete that folder to start this stage again"
            )
        return Progress()

    @staticmethod
    def _load(path, model, opt):
        device = next(model.parameters()).device
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        states = {}
        for name in [name for name in tensors if name.startswith("optimizer.")]:
            _, number, key = name.split(".")
            states.setdefault(int(number), {})[key] = tensors.pop(name).to(device)
        ever_clipped = tensors.pop("ever_clipped").to(device)
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
        opt.load_state_dict({"state": states, "param_groups": opt.state_dict()["param_groups"]})
        facts["max_logit"] = float(facts["max_logit"])
        return Progress(**{**facts, "ever_clipped": ever_clipped})


class Metrics:
    """metrics.jsonl: a JSON object per step; what lies after the resumed step is cut off first."""

    def __init__(self, out, stage, step):
        self.path = out / "metrics.jsonl"
        kept = [row for row in read_metrics(out) if row["stage"] != stage or row["step"] < step]
        with atomic(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def write(self, row):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(out):
    """The complete lines of metrics.jsonl; a killed run may have left half of one."""
    path, rows = Path(out) / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


class StopOnSignal:
    """Ctrl-C or SIGTERM asks for a stop at the end of the step; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.wanted, self.before = False, {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame):
        self.wanted = True
        self.__exit__()

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train_step(model, opt, job, batch, lr):
    """Forward, backward and update over all micro-batches. Returns the step's figures.

    The loss is divided by the number of targets of the whole step, so that how it is cut into
    micro-batches does not matter. A micro-batch of longer sequences has fewer of them.
    """
    run, (tokens, targets) = job.run, batch
    rows = max(1, run.micro_batch * run.seq_len // tokens.shape[1])
    n_targets = (targets != -100).sum().clamp(min=1)
    loss_sum = torch.zeros((), device=job.device)
    for x, y in zip(tokens.split(rows), targets.split(rows)):
        with job.autocast():
            loss = model.loss(x, y)
        n_here = (y != -100).sum()
        share = len(x) / len(tokens)
        (loss * (n_here / n_targets) + run.aux_alpha * share * model.aux_loss).backward()
        loss_sum += loss.detach() * n_here
    limit = math.inf if run.grad_clip is None else run.grad_clip
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
    loss = (loss_sum / n_targets).item()
    stop_if_broken(model, loss, grad_norm)
    for group in opt.param_groups:
        group["lr"] = lr
    load = model.expert_load / model.expert_load.mean(dim=1, keepdim=True).clamp(min=1)
    opt.step()
    opt.zero_grad()
    return {"loss": loss, "grad_norm": grad_norm, "s_max": opt.max_logits.max().item(),
            "expert_load_max": [round(v, 3) for v in load.amax(dim=1).tolist()], "load": load}


class Broken(UserError):
    """The loss or a gradient is no number any more, or the loss exploded."""


def stop_if_broken(model, loss, grad_norm):
    """Raise before the update, so that neither weights nor checkpoints take harm."""
    limit = 2 * math.log(model.cfg.vocab_size)  # twice as bad as knowing nothing
    if math.isfinite(loss) and math.isfinite(grad_norm) and loss < limit:
        return
    layer, head = divmod(int(model.max_logits.nan_to_num(math.inf).argmax()), model.cfg.num_attention_heads)
    raise Broken(
        f"loss {loss:.4g}, gradient norm {grad_norm:.4g}; the largest S_max is "
        f"{model.max_logits[layer, head].item():.4g} in layer {layer}, head {head}. "
        "Try a smaller --lr, a longer --warmup, --grad_clip 1, a smaller --tau, or --dtype fp32"
    )


def fit(stage, job, model, opt, course, batch_of, evaluate, lr_of):
    """Train through a course of phases from the last checkpoint. `batch_of(step, phase)` gives (tokens,
    targets), `lr_of(step)` the learning rate, `evaluate(step, phase)` a dictionary for the log, before the
    first step of each phase in the state the last one left. Returns the Progress; exact under kill and
    resume."""
    run, checkpoints, steps = job.run, Checkpoints(job.out, stage), course[-1].end

    def enter(step):
        phase = next(phase for phase in course if step < phase.end)
        model.set_context(*phase.context)
        opt.bias_update_rate = phase.bias_update_rate
        return phase

    progress = checkpoints.load(model, opt)
    if progress.ever_clipped is None:
        progress.ever_clipped = torch.zeros_like(opt.max_logits, dtype=torch.bool)
    metrics, started = Metrics(job.out, stage, progress.step), progress.step
    bar = tqdm(total=steps, initial=started, desc=stage, unit="step", disable=None)
    model.train()
    phase = enter(max(0, started - 1))
    with StopOnSignal() as stop:
        for step in range(started, steps + 1):
            last, row, clock = step == steps, {"stage": stage, "step": step}, time.perf_counter()
            if last or step == phase.end or step % run.eval_every == 0:
                row |= evaluate(step, phase)
                plot_run(job.out)
                tqdm.write(f"{stage} {step}/{steps} " + describe(row))
            if step > started and (last or stop.wanted or step % run.save_every == 0):
                checkpoints.save(model, opt, progress)
            if last or stop.wanted:
                metrics.write(row)
                progress.seconds += time.perf_counter() - clock
                break
            if step == phase.end:
                phase = enter(step)
            lr, began = lr_of(step), time.perf_counter()
            try:
                batch = batch_of(step, phase)
                figures = train_step(model, opt, job, batch, lr)
            except Broken as error:
                raise UserError(f"{stage} stopped at step {step}: {error}. "
                                f"The last good checkpoint is in {checkpoints.folder}") from None
            load, tokens = figures.pop("load"), batch[0].numel()
            now = time.perf_counter()
            clipped = opt.max_logits > opt.tau if opt.clip else torch.zeros_like(progress.ever_clipped)
            progress = Progress(
                step + 1, progress.tokens + tokens, progress.seconds + now - clock,
                max(progress.max_logit, figures["s_max"]), progress.ever_clipped | clipped,
            )
            row |= {"phase": phase.name, "tokens": progress.tokens, "lr": lr,
                    "tok_s": round(tokens / (now - began)), "clipped_heads": int(clipped.sum()), **figures}
            if step % run.eval_every == 0:
                row |= {"s_max_heads": opt.max_logits.tolist(), "expert_load": load.tolist()}
            metrics.write(row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", tok_s=row["tok_s"], refresh=False)
            bar.update()
    bar.close()
    if progress.step < steps:
        raise UserError(f"stopped and saved at step {progress.step}; go on with: "
                        f"python train.py --resume --out {job.out}")
    return progress


def describe(row):
    bpb = " ".join(f"{domain} {value:.3f}" for domain, value in row.get("val_bpb", {}).items())
    sample = "".join(f"\n    | {line}" for line in row.get("sample", "").splitlines())
    return f"bits per byte: {bpb}{sample}"


# ==================================================================================================
# 7  Stages
# ==================================================================================================


def pretrain(job):
    """Next-token prediction, annealing, long contexts; leaves model_base/. R 2.5."""
    run = job.run
    course = phases(run, job.cfg, job.data)
    torch.manual_seed(run.seed)
    with job.device:
        model = KimiK2(job.cfg)
    model.recompute = run.recompute
    opt = MuonClip(model, lr=run.lr, weight_decay=run.weight_decay, momentum=run.momentum, tau=run.tau,
                   kind=run.optimizer)
    compile_blocks(model, job)

    def batch_of(step, phase):
        return job.data.batch(run.seed, step, phase.rows, phase.seq_len, job.device, phase.weights)

    def evaluate(step, phase):
        last = step == course[-1].end
        row = {"val_bpb": bits_per_byte(model, job, run.eval_tokens * (FINAL_EVAL if last else 1)),
               "sample": sample_text(model, job, step)}
        if step == phase.end and phase.name in ("long", "yarn"):
            when = "before YaRN" if phase.name == "long" else "after YaRN"
            row["long_context"] = {"when": when, **long_context(model, job)}
        if last and (world := training_world(job)):
            row["recall"] = recall(model, job.tok, world)
        return row

    progress = fit("pretrain", job, model, opt, course, batch_of, evaluate, lambda step: wsd(step, run))
    save_pretrained(model, job.tok, job.out / "model_base")
    save_pretrained(model, job.tok, job.out / "model")
    final = read_metrics(job.out)[-1]
    figures = {
        "tokens": progress.tokens,
        "val_bpb": final["val_bpb"],
        "max_logit": progress.max_logit,
        "clipped_heads": progress.ever_clipped.float().mean().item(),
    }
    return progress.seconds, figures, final.get("recall")


# ==================================================================================================
# 8  Evaluation and report
# ==================================================================================================


FINAL_EVAL = 16  # the last validation reads so many times more tokens than those on the way


@torch.no_grad()
def bits_per_byte(model, job, n_tokens):
    """{domain: bits per byte of its validation text}: what a compressor built on the model would need.

    The nats of all targets, document ends included, over the bytes that the targets stand for: a
    figure that does not depend on the tokenizer.
    """
    run, result, was_training = job.run, {}, model.training
    n_bytes = torch.tensor(job.tok.token_bytes(), device=job.device)
    model.eval()
    for domain in sorted(domain for domain, split in job.data.ids if split == "val"):
        nats, size = 0.0, 0
        for windows in job.data.validation(domain, n_tokens, run.seq_len).split(run.micro_batch):
            windows = windows.to(job.device)
            with job.autocast():
                loss = model(windows[:, :-1], windows[:, 1:])[1]
            nats += loss.item() * windows[:, 1:].numel()
            size += n_bytes[windows[:, 1:]].sum().item()
        result[domain] = nats / math.log(2) / max(size, 1)
    model.train(was_training)
    return result


@torch.no_grad()
def recall(model, tok, entities, batch=96):
    """Share of facts that greedy completion gets exactly right, {"all", "probes", "by_fact"} (R 2.2).

    "probes" is by wording (PROBES), "by_fact" by kind and fact. A leading article does not count.
    """
    probes, hits = recall_probes(entities), []
    prompts = [[tok.special["[BOS]"], *tok.encode(prompt)] for _, _, prompt, _ in probes]
    room = 2 + max(len(tok.encode(" " + answer)) for *_, answer in probes)
    was_training = model.training
    model.eval()
    for i in range(0, len(prompts), batch):
        rows = prompts[i : i + batch]
        for prompt, out, (*_, answer) in zip(rows, model.generate(rows, room, 0.0), probes[i:]):
            text = re.sub(r"^\W*(?:(?:the|a|an)\b\s*)?", "", tok.decode(out[len(prompt):].tolist()))
            hits.append(bool(re.match(re.escape(answer.removeprefix("the ")) + r"(?!\w)", text)))
    model.train(was_training)
    by_fact = {}
    for (kind, fact, *_), hit in zip(probes, hits):
        by_fact.setdefault(f"{kind}.{fact}", []).append(hit)
    n = len(PROBES)
    return {"all": sum(hits) / len(hits), "probes": [sum(hits[i::n]) * n / len(hits) for i in range(n)],
            "by_fact": {key: sum(values) / len(values) for key, values in by_fact.items()}}


@torch.no_grad()
def long_context(model, job, most=8):
    """How well the model reads far back, at 1, 2, 4 ... times the run's length, up to YaRN's (R 2.5):

    "lengths"      tokens
    "bpb"          bits per byte over the last quarter of windows of each length, of the same documents
    "by_position"  bits per byte at positions [0, 1x), [1x, 2x), [2x, 4x) ... of the longest window
    "needle"       share of the needles found, see `needle_accuracy`
    """
    run, was_training = job.run, model.training
    lengths = [run.seq_len * 2**i for i in range(1 + round(math.log2(run.yarn_factor)))]
    rows = long_documents(job, lengths[-1], most)
    n_bytes = torch.tensor(job.tok.token_bytes(), device=job.device)
    model.eval()
    result = {"lengths": lengths, "bpb": [], "by_position": [], "needle": []}
    for length in lengths if rows else ():
        nats, size = torch.zeros(2, length, dtype=torch.float64, device=job.device)
        for row in rows:
            windows = row.to(job.device).unfold(0, length + 1, length)  # (windows, length + 1)
            for window in windows.split(max(1, 4096 // length)):
                with job.autocast():
                    logits, _ = model(window[:, :-1])
                targets = window[:, 1:]
                nats += F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none").sum(0)
                size += n_bytes[targets].sum(0)
        bits = nats / math.log(2)
        late = slice(length * 3 // 4, None)
        result["bpb"].append((bits[late].sum() / size[late].sum()).item())
    if rows:
        for start, end in zip([0, *lengths[:-1]], lengths):
            result["by_position"].append((bits[start:end].sum() / size[start:end].sum()).item())
    generator = random.Random(f"needles {run.seed}")
    if run.needles:
        result["needle"] = [needle_accuracy(model, job, length, run.needles, generator) for length in lengths]
    model.train(was_training)
    return result


def long_documents(job, length, most):
    """The first length + 1 ids of at most `most` validation documents that have so many."""
    rows, bos = [], job.tok.special["[BOS]"]
    for domain in sorted(domain for domain, split in job.data.ids if split == "val"):
        ids = np.asarray(job.data.ids[domain, "val"]).astype(np.int64)
        starts = np.append(np.flatnonzero(ids == bos), len(ids))
        rows += [torch.from_numpy(ids[start : start + length + 1]) for start, end in zip(starts, starts[1:])
                 if end - start > length]
    return rows[:: max(1, len(rows) // most)][:most]


def needle_accuracy(model, job, length, n, rng):
    """Share of n needles found in texts of `length` tokens. A needle is a sentence on an invented person's
    home, put somewhere into validation text; at the end it begins again, and the home must be likelier, by
    log-probability, than nine other invented names. Chance: a tenth."""
    tok, hits = job.tok, 0
    hay = np.concatenate([job.data.ids[key] for key in sorted(job.data.ids) if key[1] == "val"])
    for _ in range(n):
        seen = set()
        who, homes = new_name(rng, seen, "@ @"), [new_name(rng, seen) for _ in range(10)]
        candidates = [tok.encode(f" {home}.") for home in homes]
        query = tok.encode(f"\n\nThe later home of {who} was")
        needle = query + candidates[0] + tok.encode("\n\n")
        room = max(0, length - len(needle) - len(query) - max(map(len, candidates)))
        start, at = rng.randrange(max(1, len(hay) - room)), rng.randrange(room + 1)
        text = np.resize(hay[start : start + room], room).tolist()
        prompt = text[:at] + needle + text[at:] + query
        with job.autocast():
            hits += int(candidate_scores(model, prompt, candidates).argmax()) == 0
    return hits / n


@torch.no_grad()
def candidate_scores(model, prompt, candidates):
    """Log-probability of each continuation (a list of ids) of a prompt, (n,); the prompt is read once."""
    device, n = model.lm_head.weight.device, len(candidates)
    sizes = torch.tensor([[len(ids)] for ids in candidates], device=device)
    width = int(sizes.max())
    block = torch.tensor([ids + [0] * (width - len(ids)) for ids in candidates], device=device)  # (n, width)
    cache = LatentCache(model.cfg, 1, device=device, dtype=autocast_dtype(model.lm_head.weight))
    first, _ = model(torch.tensor([prompt], device=device), cache=cache)
    rest, _ = model(block, cache=cache.select([0] * n))
    logits = torch.cat((first[:, -1:].expand(n, -1, -1), rest[:, :-1]), dim=1).float()  # (n, width, V)
    scores = -F.cross_entropy(logits.transpose(1, 2), block, reduction="none")
    return (scores * (torch.arange(width, device=device) < sizes)).sum(1)


def training_world(job):
    """Entities of the invented world whose articles the run trains on; [] for own data."""
    if job.run.data or "knowledge" not in job.data.weights:
        return []
    with open(job.out / "data" / "knowledge.jsonl", encoding="utf-8") as file:
        articles = [
            doc["text"] for doc in map(json.loads, file) if doc["split"] == "train" and "style" not in doc
        ]
    return [entity for text in articles for entity in read_articles(text)]


def sample_text(model, job, step, n_tokens=48):
    """A continuation of a validation text, another domain each time, to read while it trains."""
    domains = sorted(domain for domain, split in job.data.ids if split == "val")
    domain = domains[step // job.run.eval_every % len(domains)]
    prompt = torch.from_numpy(np.asarray(job.data.ids[domain, "val"][:24]).astype(np.int64))[None].to(
        job.device
    )
    generator = torch.Generator(job.device).manual_seed(job.run.seed)
    with job.autocast():
        ids = model.generate(prompt, n_tokens, 0.6, stop=job.tok.special["[EOS]"], generator=generator)[0]
    return f"{domain}: {job.tok.decode(ids[1:24])} >>> {job.tok.decode(ids[24:])}"


def plot_run(out):
    """figures/*.png from metrics.jsonl: loss and validation, the largest logit, expert load."""
    rows = read_metrics(out)
    trained = [row for row in rows if "loss" in row]
    if not trained:
        return
    (out / "figures").mkdir(exist_ok=True)
    run = json.loads((out / "config.json").read_text(encoding="utf-8"))["run"]
    steps = [row["step"] for row in trained]

    def figure(name, *panels, heights=(1,), width=6.4, below=True):
        """panels: (title, xlabel, ylabel, draw) each, below one another with one x axis or side by side."""
        picture = Figure(figsize=(width, 4), layout="constrained")
        rows, columns = (len(panels), 1) if below else (1, len(panels))
        grid = picture.subplots(rows, columns, squeeze=False, sharex=below, height_ratios=heights)
        for axes, (title, xlabel, ylabel, draw) in zip(grid.flat, panels):
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
            axes.grid(alpha=0.3)
            draw(axes)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize=8)
        with atomic(out / "figures" / f"{name}.png") as temporary:
            picture.savefig(temporary, format="png", dpi=110)

    def schedule(axes):
        axes.plot(steps, [row["lr"] for row in trained], color="black", lw=1)

    def loss(axes):
        axes.plot(steps, [row["loss"] for row in trained], lw=0.8, label="training loss (nats a token)")
        evaluated = [row for row in rows if row.get("val_bpb")]
        for domain in evaluated[0]["val_bpb"] if evaluated else ():
            x, y = zip(*((row["step"], row["val_bpb"][domain]) for row in evaluated))
            axes.plot(x, y, marker="o", ms=3, label=f"{domain} (bits per byte)")
        for before, row in zip(trained, trained[1:]):
            if before["phase"] != row["phase"]:
                axes.axvline(row["step"], color="grey", lw=0.7, ls=":")
                axes.annotate(
                    row["phase"], (row["step"], axes.get_ylim()[1]), rotation=90, va="top", fontsize=7
                )

    def max_logit(axes):
        axes.plot(steps, [row["s_max"] for row in trained], lw=0.9, label="largest S_max, before the clip")
        axes.axhline(run["tau"], color="black", ls="--", lw=0.9, label=f"tau = {run['tau']:g}")
        axes.set_yscale("log")

    def load(axes):
        layers = len(trained[0]["expert_load_max"])
        for layer in range(layers):
            values = [row["expert_load_max"][layer] for row in trained]
            axes.plot(
                steps, values, lw=0.8, color=f"{0.75 * layer / layers:.2f}", label=f"MoE layer {layer + 1}"
            )
        axes.axhline(1, color="tab:blue", ls="--", lw=0.9, label="perfect balance")

    step = "optimizer step"
    figure("loss", ("Learning rate, and loss unsmoothed", "", "lr", schedule),
           ("", step, "nats a token, bits per byte", loss), heights=(1, 4))
    figure("max_logit", ("Largest attention logit of a step, unclamped", step, "S_max", max_logit))
    if trained[0]["expert_load_max"]:
        figure("expert_load", ("Busiest expert", step, "tokens / mean of its layer", load))
    measured = [row["long_context"] for row in rows if row.get("long_context")]

    def by_length(key):
        def draw(axes):
            for figures, marker in zip(measured, "os"):
                if figures[key]:
                    axes.plot(figures["lengths"], figures[key], marker=marker, ms=4, label=figures["when"])
            axes.set_xscale("log", base=2)
            if key == "needle":
                axes.axhline(0.1, color="black", ls="--", lw=0.9, label="chance")
        return draw

    if measured:
        figure("long_context",
               ("Last quarter of windows", "tokens of a window", "bits per byte", by_length("bpb")),
               ("Inside the longest window", "up to this token", "bits per byte", by_length("by_position")),
               ("Needle among nine others", "tokens of context", "share found", by_length("needle")),
               width=12, below=False)


def write_report(job, seconds, p, recalled):
    """report.json for programs, report.md for people: what the report claims, what this run measured.

    `p` are the figures of pretraining, `recalled` those of `recall` or None.
    """
    rows = read_metrics(job.out)
    rephrased = json.loads((job.out / "data" / "index.json").read_text(encoding="utf-8"))["rephrase"]["all"]
    measured = [row["long_context"] for row in rows if row.get("long_context", {}).get("bpb")]
    facts = {
        "seconds": {"total": sum(seconds.values()), **seconds},
        "device": str(job.device), "preset": job.run.preset, "seed": job.run.seed,
        "pretrain": p, "rephrase": rephrased,
    }
    if measured:
        factors = [f"{length // job.run.seq_len}x" for length in measured[-1]["lengths"]]
        facts["long_context"] = dict(zip(factors, measured[-1]["bpb"]))
        facts["needle"] = dict(zip(factors, measured[-1]["needle"]))
    if recalled:
        facts["recall"] = {"base": recalled["all"]}
    write_json(job.out / "report.json", facts)
    table = claims(job, p, rows, rephrased, measured, recalled)
    lines = [
        f"# Run {job.out.name}: {job.run.preset}, seed {job.run.seed}, on {job.device}", "",
        f"{count_parameters(job.cfg).total:,} parameters, {p['tokens']:,} tokens, "
        f"{seconds['pretrain']:.0f} s of pretraining.", "",
        "| validation text | bits per byte |", "|---|---|",
        *(f"| {domain} | {value:.3f} |" for domain, value in p["val_bpb"].items()), "",
        "| the report claims | this run measured |", "|---|---|",
        *(f"| {claim} | {figure} |" for claim, figure in table), "", *long_context_table(job, measured),
    ]
    if recalled:
        lines += ["| fact | recalled |", "|---|---|",
                  *(f"| {fact} | {share:.0%} |" for fact, share in recalled["by_fact"].items()), ""]
    lines += [
        *(f"![{path.stem}](figures/{path.name})" for path in sorted((job.out / "figures").glob("*.png"))), "",
        "Rerun: `python train.py --out NEW_FOLDER` with the settings of config.json.", "",
    ]
    with atomic(job.out / "report.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def claims(job, p, rows, rephrased, measured, recalled):
    """[(what the report says and where, what this run measured)]."""
    trained = [row for row in rows if "loss" in row]
    same = [(a, b) for a, b in zip(trained, trained[1:]) if a["phase"] == b["phase"]]
    worst = max((b["loss"] - a["loss"] for a, b in same), default=0.0)
    loads = [max(row["expert_load_max"], default=0.0) for row in trained if row["phase"] == "pretrain"]
    tenth = max(1, len(loads) // 10)
    late, early = sum(loads[-tenth:]) / tenth, sum(loads[:tenth]) / tenth
    table = [
        ("no loss spike in the unsmoothed curve (R 2.5, Fig. 3)",
         f"largest rise from one step to the next within a phase {worst:.3f} nats"),
        ("QK-Clip keeps logits near tau (R 2.1, Fig. 2)",
         f"largest S_max {p['max_logit']:.2f} with tau {job.run.tau:g}"),
        ("12.7 % of heads were ever clipped (R App. D)", f"{p['clipped_heads']:.1%} of heads"),
        ("the bias balances experts (V3 2.1.2)",
         f"busiest expert / mean: {early:.2f} at first, {late:.2f} at last"),
        ("a corpus is rephrased at most twice, and its fidelity checked (R 2.2)",
         f"{rephrased['accepted']:,} rephrasings kept, {rephrased['rejected']:,} rejected: data/card.md"),
    ]
    if recalled:
        table.append(("knowledge is learned from rephrasings (R 2.2)",
                      f"{recalled['all']:.1%} of the invented world's facts recalled, in words never seen"))
    if len(measured) == 2:
        before, after = (figures["bpb"][-1] for figures in measured)
        table.append(("YaRN extends 32 k to 128 k tokens (R 2.5)",
                      f"{measured[1]['lengths'][-1]:,} tokens: {before:.3f} bits per byte before, "
                      f"{after:.3f} after"))
    return table


def long_context_table(job, measured):
    """Lines of a table: bits per byte and needles by length, before and after YaRN."""
    if not measured:
        return []
    heads = [f"{what} {figures['when']}" for figures in measured for what in ("bits per byte", "needles")]
    lines = ["| tokens | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for i, length in enumerate(measured[0]["lengths"]):
        cells = [f"{length // job.run.seq_len}x, {length:,}"]
        for figures in measured:
            cells += [f"{figures['bpb'][i]:.3f}", f"{figures['needle'][i]:.0%}" if figures["needle"] else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", "Bits per byte over the last quarter of windows of the same validation documents; "
            f"{job.run.needles} needles a length, each among nine distractors (chance: 10 %).", ""]


def open_run(run_fields, model_fields, resume):
    """(RunConfig, KimiConfig) of the folder, which is made, continued, or refused if it differs."""
    out = Path(run_fields.get("out", RunConfig.out))
    path = out / "config.json"
    if path.exists():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            before = {**saved["run"], **saved["model"]}
        except (ValueError, KeyError):
            raise UserError(f"{path} is no run's configuration; choose another --out") from None
        if resume:
            keep = {key: value for key, value in saved["run"].items() if key not in MACHINE_FIELDS}
            run, cfg = configure({**keep, **run_fields}, {**saved["model"], **model_fields})
        else:
            run, cfg = configure(run_fields, model_fields)
        now = {**dataclasses.asdict(run), **dataclasses.asdict(cfg)}
        changed = [key for key in now if key not in MACHINE_FIELDS and now[key] != before.get(key)]
        if changed:
            was = ", ".join(f"{key} {before.get(key)!r}, now {now[key]!r}" for key in changed[:4])
            raise UserError(f"{out} holds a run with other settings ({was}); --resume without flags "
                            "continues it, another --out starts a new one")
        return run, cfg
    if resume:
        raise UserError(f"--resume: there is no run in {out}")
    if out.exists() and (not out.is_dir() or any(path.suffix != ".tmp" for path in out.iterdir())):
        raise UserError(f"{out} exists and is not the folder of a run; choose another --out")
    run, cfg = configure(run_fields, model_fields)
    out.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "threads": run.threads or torch.get_num_threads(), "machine": platform.machine()}
    write_json(path, {"model": dataclasses.asdict(cfg), "run": dataclasses.asdict(run), "versions": versions})
    return run, cfg


def train(run, cfg, stage=None):
    """One stage of a run, or all of them, each continued where it stopped."""
    out, began = Path(run.out), time.perf_counter()
    if run.threads:
        torch.set_num_threads(run.threads)
    device = pick_device(run.device)
    tok = prepare_data(run, cfg, out)
    if tok.n_vocab < cfg.vocab_size:
        print(
            f"note: this text has only {tok.n_vocab} tokens to offer, fewer than vocab_size {cfg.vocab_size}"
        )
        cfg = dataclasses.replace(cfg, vocab_size=tok.n_vocab)
    job = Job(run, cfg, out, device, tok, TokenFiles(out / "data", run.domain_weights, run.anneal_weights))
    seconds = {"data": time.perf_counter() - began}
    if stage == "rephrase":
        print(f"done: {out / 'data' / 'card.md'}")
        return
    seconds["pretrain"], *figures = pretrain(job)
    plot_run(out)
    write_report(job, seconds, *figures)
    print(f"done: {out / 'report.md'}; talk to it: python sample.py {out} \"The\"")


def main(argv=None):
    command, run_fields, model_fields = parse_command(sys.argv[1:] if argv is None else argv)
    try:
        if command["plan"]:
            print(plan(*configure(run_fields, model_fields)))
        else:
            train(*open_run(run_fields, model_fields, command["resume"]), command["stage"])
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; nothing was half-written, the same command goes on from here")
    except (UserError, ValueError, FileNotFoundError) as error:
        sys.exit(f"train.py: {error}")
    except OSError as error:
        sys.exit(f"train.py: {error}; nothing was half-written, the same command goes on from here")


if __name__ == "__main__":
    main()
