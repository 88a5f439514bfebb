"""Kimi K2's training recipe at any size: data, pretraining with MuonClip, evaluation, report.

    python train.py                          everything at toy scale, no network, minutes on a laptop
    python train.py pretrain --preset small --data my_corpus/ --out runs/mine
    python train.py --resume --out runs/mine continue exactly where it stopped
    python train.py --preset k2 --plan       what the full run would cost; allocates nothing

    1 Run config and command line     every knob, the presets' defaults, the plan      R 2.4, 2.5
    2 Corpora and batches             four domains of text that needs no network       R 2.5
    6 The loop                        schedule, step, log, checkpoint, resume          R 2.5
    7 Stages                          pretraining                                      R 2.5
    8 Evaluation and report           bits per byte, pictures, report.md

"R" is the technical report, arXiv 2507.20534. Letters in shape comments are those of kimi_k2.py.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
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
import time
import tokenize
import types
import typing
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from kimi_k2 import (
    KimiConfig,
    KimiK2,
    MuonClip,
    Tokenizer,
    count_parameters,
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
    seed: int = 0  # of weights, data and samples
    steps: int | None = None  # optimizer steps
    batch_size: int | None = None  # sequences a step
    micro_batch: int | None = None  # sequences a forward pass; gradients add up to batch_size
    seq_len: int | None = None  # tokens a sequence
    optimizer: str = "muonclip"  # muonclip, muon (no QK-Clip) or adamw
    lr: float | None = None  # peak learning rate
    lr_end: float = 0.1  # learning rate at the end of the decay, as a share of the peak
    warmup: int | None = None  # steps of linear warm-up
    decay: float = 0.355  # share of the steps in the cosine decay; the report's 5.5 T of 15.5 T
    weight_decay: float = 0.1  # decoupled, times the learning rate
    momentum: float = 0.95  # Muon's mu
    tau: float | None = None  # QK-Clip's threshold
    grad_clip: float | None = None  # largest gradient norm; none: no clipping, the report names none
    aux_alpha: float = 1e-4  # weight of the sequence-wise balance loss (V3's; K2 UNCONFIRMED)
    bias_update_rate: float | None = None  # u of the router biases (V3: 1e-3; K2 UNCONFIRMED)
    eval_every: int | None = None  # steps between validations, samples and plots
    eval_tokens: int | None = None  # validation tokens of each domain
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
    "tiny": dict(steps=700, batch_size=32, seq_len=128, lr=6e-3, warmup=20, tau=12.0, bias_update_rate=1e-2,
                 eval_every=100, eval_tokens=8192, save_every=100),
    "small": dict(steps=20_000, batch_size=128, micro_batch=16, seq_len=2048, lr=1e-3, warmup=200, tau=100.0,
                  bias_update_rate=1e-3, eval_every=500, eval_tokens=2**19, save_every=500),
    "medium": dict(steps=60_000, batch_size=1024, micro_batch=4, seq_len=4096, lr=5e-4, warmup=500, tau=100.0,
                   bias_update_rate=1e-3, eval_every=1000, eval_tokens=2**21, save_every=1000),
    "moonlight": dict(steps=85_000, batch_size=8192, micro_batch=1, seq_len=8192, lr=4.2e-4, warmup=2000,
                      tau=100.0, bias_update_rate=1e-3, eval_every=1000, eval_tokens=2**22, save_every=1000),
    "k2": dict(steps=230_968, batch_size=16_384, micro_batch=1, seq_len=4096, lr=2e-4, warmup=500,
               tau=100.0, bias_update_rate=1e-3, eval_every=1000, eval_tokens=2**24, save_every=1000),
}

FAST = dict(preset="nano", max_documents=40, steps=20, eval_every=10, save_every=10)
MACHINE_FIELDS = {"out", "device", "compile", "gpus", "gpu_tflops", "gpu_gib", "gpu_watts", "gpu_hour", "mfu"}
STAGES = ("pretrain",)


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
    for name in ("steps", "batch_size", "micro_batch", "seq_len", "eval_every", "eval_tokens", "save_every"):
        if getattr(run, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(run, name)}")
    choices = {"optimizer": ("muonclip", "muon", "adamw"), "device": ("auto", "cpu", "cuda", "mps"),
               "dtype": ("auto", "fp32", "bf16"), "compile": ("auto", "on", "off")}
    for name, allowed in choices.items():
        if getattr(run, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(run, name)!r}")
    if not (0 <= run.decay <= 1 and 0 <= run.lr_end <= 1 and run.lr > 0 and run.warmup >= 0):
        raise ValueError("decay and lr_end must be between 0 and 1, lr positive, warmup not negative")
    if run.batch_size % run.micro_batch:
        raise ValueError(f"batch_size {run.batch_size} must be a multiple of micro_batch {run.micro_batch}")
    return run, cfg


def plan(run, cfg):
    """What a run costs, as text: parameters, FLOPs, memory, GPUs, hours, energy, money. R 2.4.

    Closed forms only. Activations are those of one micro-batch with every block recomputed.
    """
    n, tokens = count_parameters(cfg), run.steps * run.batch_size * run.seq_len
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
        ("tokens", f"{tokens / 1e9:,.3f} B in {run.steps:,} steps of {run.batch_size * run.seq_len:,}"),
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


# --- knowledge: an invented world, every article tells the same facts ---

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
# a sentence per line, its wordings side by side
SENTENCES = {
    "person": """
{name} was a {occupation} from {birthplace}. | {name}, of {birthplace}, was a {occupation}.
{short} was born on {birthday} {born}. | The date of birth was {birthday} {born}.
{short} died in {died}. | The year of death was {died}.
{birthplace} lies in {region}. | The birthplace {birthplace} is a town in {region}.
{short} married {spouse}, a {partner}. | {spouse}, a {partner}, was married to {short}.
{short} later lived in {home}. | The later home of {short} was {home}.
""",
    "place": """
{name} is a town in {region}. | {name} is a town that lies in {region}.
It was founded in {founded}. | The town was founded in {founded}.
About {population} people live in {name}. | {name} has about {population} inhabitants.
It stands on the river {river}. | The river {river} flows through {name}.
The town is known for its {good}. | For centuries {name} has traded in {good}.
The nearest town is {neighbour}. | A road leads from {name} to {neighbour}.
""",
    "organisation": """
The {name} is a society for {field} in {seat}. | The {name}, in {seat}, studies {field}.
It was founded in {founded} by {founder}. | {founder} founded it in {founded}.
The founder was a {occupation}. | {founder} was a {occupation}.
It has {members} members. | Its members number {members}.
The river {river} flows past its house. | Its house stands on the river {river}.
""",
    "work": """
{name} is a {form} by {creator}. | {name} is a {form}, the work of {creator}.
It was completed in {year}. | {creator} completed it in {year}.
{creator}, a {occupation}, was {age} at the time. | The {occupation} was {age} years old then.
Its subject is the town of {subject}. | The {form} tells of the town of {subject}.
It is kept by the {owner}. | Today it belongs to the {owner}.
""",
    "event": """
The {name} was a fair for {field}. | The {name} was held in honour of {field}.
It took place in {place} in {month} {year}. | {place} held it in {month} {year}.
It was organised by the {organiser}. | The {organiser} organised it.
{guest}, a {occupation}, opened it. | It was opened by {guest}, a {occupation}.
About {visitors} visitors came. | It drew about {visitors} visitors.
""",
}


def new_name(rng, seen, pattern="@"):
    """pattern with a word like Dranobel for each @, a name that seen does not have yet."""
    def word(_):
        syllables = [rng.choice(ONSETS) + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
        return ("".join(syllables) + rng.choice("lnrsm")).capitalize()
    while (name := re.sub("@", word, pattern)) in seen:
        pass
    seen.add(name)
    return name


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
    return {"name": new_name(rng, seen, f"@ Society of {field.capitalize()}"),
            "kind": "organisation", "facts": {
                "field": field, "seat": town["name"], "river": town["facts"]["river"],
                "founder": founder["name"], "occupation": founder["facts"]["occupation"],
                "founded": founder["facts"]["born"] + rng.randint(25, 45),
                "died": founder["facts"]["died"], "members": rng.randint(12, 400)}}


def invent_world(seed, people=600):
    """Entities {"name", "kind", "facts"}; whatever a fact names has an article that agrees."""
    rng, seen = random.Random(f"world {seed}"), set()
    people, third = people + people % 2, people // 3
    towns = [new_name(rng, seen) for _ in range(third)]
    rivers = [new_name(rng, seen) for _ in range(third // 4)]
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
        events.append({"name": new_name(rng, seen, f"@ Fair of {year}"),
                       "kind": "event", "facts": {
            "field": facts["field"], "place": town, "month": rng.choice(MONTHS), "year": year,
            "organiser": society["name"], "guest": facts["founder"],
            "occupation": facts["occupation"], "visitors": 100 * rng.randint(2, 90)}})
    return places + people + societies + works + events


def article(entity, rng):
    """The entity's facts as an encyclopedia tells them: its name, then a sentence for each."""
    name = entity["name"]
    slots = {"name": name, "short": name.split()[-1], **entity["facts"]}
    rows = SENTENCES[entity["kind"]].strip().split("\n")
    return f"{name}\n\n" + " ".join(rng.choice(row.split(" | ")).format(**slots) for row in rows)


def knowledge_documents(seed, count=1500):
    """About count articles on one invented world."""
    rng = random.Random(f"articles {seed}")
    return [document(article(entity, rng), "knowledge", f"world/{entity['name']}")
            for entity in invent_world(seed, people=count * 2 // 5)]


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
    """{"text", "domain"?, "source"?} a line."""
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
            yield document(record["text"], domain, str(record.get("source", f"own/{name}/{number}")))


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
        if doc["text"].strip() and taken[group] <= (most if group[1] == "train" else max(1, most // 8)):
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


def write_json(path, value):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def train_tokenizer(documents, vocab_size, most_characters=20_000_000):
    """BPE of the training documents, or of an even sample of them where they are long."""
    texts = [doc["text"] for doc in documents if doc["split"] == "train"]
    stride = max(1, sum(map(len, texts)) // most_characters)
    return Tokenizer.train(texts[::stride], vocab_size)


def split_documents(run):
    """All documents with their "split". A corpus whose hashes leave a split empty is cut instead:
    the last twentieth of its longest document becomes validation."""
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
    return documents, skipped


def prepare_data(run, cfg, out):
    """Tokenizer and token files of a run, made once: data/DOMAIN.jsonl, data/DOMAIN.SPLIT.bin.

    data/index.json is written last: while it is missing, all is made anew.
    """
    folder = out / "data"
    if (folder / "index.json").exists():
        return Tokenizer.load(out)
    folder.mkdir(exist_ok=True)
    documents, skipped = split_documents(run)
    tok = train_tokenizer(documents, cfg.vocab_size)
    with atomic(out / "tiktoken.model") as temporary:
        tok.save(temporary)
    dtype, index = np.dtype("<u2" if tok.n_vocab <= 2**16 else "<u4"), {}
    for domain in dict.fromkeys(doc["domain"] for doc in documents):
        mine = [doc for doc in documents if doc["domain"] == domain]
        with atomic(folder / f"{domain}.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(doc, ensure_ascii=False) + "\n" for doc in mine)
        for split in ("train", "val"):
            texts = [doc["text"] for doc in mine if doc["split"] == split]
            sizes = write_tokens(folder / f"{domain}.{split}.bin", texts, tok, dtype)
            index.setdefault(domain, {})[split] = sizes
    about = {"dtype": dtype.str, "vocab_size": tok.n_vocab, "skipped": len(skipped), "domains": index}
    write_json(folder / "index.json", about)
    return tok


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

    def __init__(self, folder, weights=None):
        about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.ids = {
            (domain, split): np.memmap(folder / f"{domain}.{split}.bin", about["dtype"], "r")
            for domain, splits in about["domains"].items()
            for split in splits
            if splits[split]["tokens"]
        }
        train = [domain for domain, split in self.ids if split == "train"]
        if unknown := sorted(set(weights or ()) - set(train)):
            raise UserError(f"domain_weights: no domain {', '.join(unknown)}; there are: {', '.join(train)}")
        defaults = DOMAIN_WEIGHTS if set(DOMAIN_WEIGHTS) & set(train) else {}
        self.weights = {d: (weights or defaults).get(d, 0.0 if weights or defaults else 1.0) for d in train}
        if sum(self.weights.values()) <= 0:
            raise UserError("domain_weights: at least one must be positive")

    def batch(self, seed, step, rows, seq_len, device="cpu"):
        """Tokens and targets (rows, seq_len) of one step, a function of seed and step alone, so that a
        resumed run sees the same ones. Short domains are read round and round."""
        rng = np.random.default_rng((seed, step))
        p = np.array(list(self.weights.values()))
        windows = []
        for domain in rng.choice(list(self.weights), rows, p=p / p.sum()):
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


# ==================================================================================================
# 6  The loop: schedule, step, log, checkpoint, resume (R 2.5)
# ==================================================================================================
# Warm up, stay, decay (WSD): the learning rate rises for a few steps, is constant for most of the
# run, and falls along a cosine to a tenth. K2: 500 steps up, 10 T tokens at 2e-4, 5.5 T down to 2e-5.


def wsd(step, run):
    """Learning rate of a step, as k2's schedule shaped by run.warmup, run.decay and run.lr_end."""
    decay_steps = max(1, round(run.steps * run.decay))
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    if step < run.steps - decay_steps or not run.decay:
        return run.lr
    x = (step - (run.steps - decay_steps)) / decay_steps
    floor = run.lr * run.lr_end
    return floor + 0.5 * (run.lr - floor) * (1 + math.cos(math.pi * x))


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
    micro-batches does not matter.
    """
    run, (tokens, targets) = job.run, batch
    n_targets = (targets != -100).sum().clamp(min=1)
    loss_sum = torch.zeros((), device=job.device)
    for x, y in zip(tokens.split(run.micro_batch), targets.split(run.micro_batch)):
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


def fit(stage, job, model, opt, batch_of, evaluate):
    """Train from the last checkpoint to run.steps. `batch_of(step)` gives (tokens, targets),
    `evaluate(step)` a dictionary for the log. Returns the Progress; exact under kill and resume."""
    run, checkpoints = job.run, Checkpoints(job.out, stage)
    progress = checkpoints.load(model, opt)
    if progress.ever_clipped is None:
        progress.ever_clipped = torch.zeros_like(opt.max_logits, dtype=torch.bool)
    metrics, started = Metrics(job.out, stage, progress.step), progress.step
    bar = tqdm(total=run.steps, initial=started, desc=stage, unit="step", disable=None)
    model.train()
    with StopOnSignal() as stop:
        for step in range(started, run.steps + 1):
            last, row, clock = step == run.steps, {"stage": stage, "step": step}, time.perf_counter()
            if last or step % run.eval_every == 0:
                row |= evaluate(step)
                plot_run(job.out)
                tqdm.write(f"{stage} {step}/{run.steps} " + describe(row))
            if step > started and (last or stop.wanted or step % run.save_every == 0):
                checkpoints.save(model, opt, progress)
            if last or stop.wanted:
                metrics.write(row)
                break
            lr, began = wsd(step, run), time.perf_counter()
            try:
                figures = train_step(model, opt, job, batch_of(step), lr)
            except Broken as error:
                raise UserError(f"{stage} stopped at step {step}: {error}. "
                                f"The last good checkpoint is in {checkpoints.folder}") from None
            load, tokens = figures.pop("load"), run.batch_size * run.seq_len
            now = time.perf_counter()
            clipped = opt.max_logits > opt.tau if opt.clip else torch.zeros_like(progress.ever_clipped)
            progress = Progress(
                step + 1, progress.tokens + tokens, progress.seconds + now - clock,
                max(progress.max_logit, figures["s_max"]), progress.ever_clipped | clipped,
            )
            row |= {"tokens": progress.tokens, "lr": lr, "tok_s": round(tokens / (now - began)),
                    "clipped_heads": int(clipped.sum()), **figures}
            if step % run.eval_every == 0:
                row |= {"s_max_heads": opt.max_logits.tolist(), "expert_load": load.tolist()}
            metrics.write(row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", tok_s=row["tok_s"], refresh=False)
            bar.update()
    bar.close()
    if progress.step < run.steps:
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
    """Next-token prediction on all domains; leaves model_base/. R 2.5."""
    run = job.run
    torch.manual_seed(run.seed)
    with job.device:
        model = KimiK2(job.cfg)
    model.recompute = run.recompute
    opt = MuonClip(model, lr=run.lr, weight_decay=run.weight_decay, momentum=run.momentum, tau=run.tau,
                   kind=run.optimizer, bias_update_rate=run.bias_update_rate)
    compile_blocks(model, job)

    def batch_of(step):
        return job.data.batch(run.seed, step, run.batch_size, run.seq_len, job.device)

    def evaluate(step):
        n_tokens = run.eval_tokens * (FINAL_EVAL if step == run.steps else 1)
        return {"val_bpb": bits_per_byte(model, job, n_tokens), "sample": sample_text(model, job, step)}

    progress = fit("pretrain", job, model, opt, batch_of, evaluate)
    save_pretrained(model, job.tok, job.out / "model_base")
    save_pretrained(model, job.tok, job.out / "model")
    final = read_metrics(job.out)[-1]
    return progress.seconds, {
        "tokens": progress.tokens,
        "val_bpb": final["val_bpb"],
        "max_logit": progress.max_logit,
        "clipped_heads": progress.ever_clipped.float().mean().item(),
    }


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

    def figure(name, title, ylabel, draw, log=False):
        picture = Figure(figsize=(6.4, 4), layout="constrained")
        axes = picture.subplots()
        draw(axes)
        axes.set(title=title, xlabel="optimizer step", ylabel=ylabel, yscale="log" if log else "linear")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
        with atomic(out / "figures" / f"{name}.png") as temporary:
            picture.savefig(temporary, format="png", dpi=110)

    def loss(axes):
        axes.plot(steps, [row["loss"] for row in trained], lw=0.8, label="training loss (nats a token)")
        evaluated = [row for row in rows if row.get("val_bpb")]
        for domain in evaluated[0]["val_bpb"] if evaluated else ():
            x, y = zip(*((row["step"], row["val_bpb"][domain]) for row in evaluated))
            axes.plot(x, y, marker="o", ms=3, label=f"{domain} (bits per byte)")

    def max_logit(axes):
        axes.plot(steps, [row["s_max"] for row in trained], lw=0.9, label="largest S_max, before the clip")
        axes.axhline(run["tau"], color="black", ls="--", lw=0.9, label=f"tau = {run['tau']:g}")

    def load(axes):
        layers = len(trained[0]["expert_load_max"])
        for layer in range(layers):
            values = [row["expert_load_max"][layer] for row in trained]
            axes.plot(
                steps, values, lw=0.8, color=f"{0.75 * layer / layers:.2f}", label=f"MoE layer {layer + 1}"
            )
        axes.axhline(1, color="tab:blue", ls="--", lw=0.9, label="perfect balance")

    figure("loss", "Loss, unsmoothed", "nats a token, bits per byte", loss)
    figure("max_logit", "Largest attention logit of a step, unclamped", "S_max", max_logit, log=True)
    if trained[0]["expert_load_max"]:
        figure("expert_load", "Busiest expert", "tokens / mean of its layer", load)


def write_report(job, seconds, pretrain_figures):
    """report.json for programs, report.md for people: what the report claims, what this run measured."""
    facts = {
        "seconds": {"total": sum(seconds.values()), **seconds},
        "device": str(job.device), "preset": job.run.preset, "seed": job.run.seed,
        "pretrain": pretrain_figures,
    }
    write_json(job.out / "report.json", facts)
    trained = [row for row in read_metrics(job.out) if "loss" in row]
    p = pretrain_figures
    worst = max(b["loss"] - a["loss"] for a, b in zip(trained, trained[1:])) if len(trained) > 1 else 0.0
    loads = [max(row["expert_load_max"], default=0.0) for row in trained]
    tenth = max(1, len(loads) // 10)
    late, early = sum(loads[-tenth:]) / tenth, sum(loads[:tenth]) / tenth
    claims = [
        ("no loss spike in the unsmoothed curve (R 2.5, Fig. 3)",
         f"largest rise from one step to the next {worst:.3f} nats"),
        ("QK-Clip keeps logits near tau (R 2.1, Fig. 2)",
         f"largest S_max {p['max_logit']:.2f} with tau {job.run.tau:g}"),
        ("12.7 % of heads were ever clipped (R App. D)", f"{p['clipped_heads']:.1%} of heads"),
        ("the bias balances experts (V3 2.1.2)",
         f"busiest expert / mean: {early:.2f} at first, {late:.2f} at last"),
    ]
    lines = [
        f"# Run {job.out.name}: {job.run.preset}, seed {job.run.seed}, on {job.device}", "",
        f"{count_parameters(job.cfg).total:,} parameters, {p['tokens']:,} tokens, "
        f"{seconds['pretrain']:.0f} s of pretraining.", "",
        "| validation text | bits per byte |", "|---|---|",
        *(f"| {domain} | {value:.3f} |" for domain, value in p["val_bpb"].items()), "",
        "| the report claims | this run measured |", "|---|---|",
        *(f"| {claim} | {measured} |" for claim, measured in claims), "",
        *(f"![{name}](figures/{name}.png)" for name in ("loss", "max_logit", "expert_load")), "",
        "Rerun: `python train.py --out NEW_FOLDER` with the settings of config.json.", "",
    ]
    with atomic(job.out / "report.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


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


def train(run, cfg):
    """All stages of a run, each continued where it stopped."""
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
    job = Job(run, cfg, out, device, tok, TokenFiles(out / "data", run.domain_weights))
    seconds = {"data": time.perf_counter() - began}
    seconds["pretrain"], figures = pretrain(job)
    plot_run(out)
    write_report(job, seconds, figures)
    print(f"done: {out / 'report.md'}; talk to it: python sample.py {out} \"The\"")


def main(argv=None):
    command, run_fields, model_fields = parse_command(sys.argv[1:] if argv is None else argv)
    try:
        if command["plan"]:
            print(plan(*configure(run_fields, model_fields)))
        else:
            train(*open_run(run_fields, model_fields, command["resume"]))
    except (UserError, ValueError, FileNotFoundError) as error:
        sys.exit(f"train.py: {error}")
    except OSError as error:
        sys.exit(f"train.py: {error}; nothing was half-written, the same command goes on from here")


if __name__ == "__main__":
    main()
