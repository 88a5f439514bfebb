"""Kimi K2 in one readable file: the model, its optimizer MuonClip, its tokenizer and its checkpoints.

Read it from top to bottom with the technical report beside it (arXiv 2507.20534, "R" below). K2 is
DeepSeek-V3's architecture with other numbers, so the report leaves much to the DeepSeek-V3 report
("V3", arXiv 2412.19437) and to Moonlight ("ML", arXiv 2502.16982).

    1 Config and presets     what is in the 1.03 T parameters, and what they cost     R 2.3, Table 2
    2 Tokenizer              byte-level BPE, chat template, tool calls                R App. B
    3 RMSNorm, RoPE, YaRN    normalising; telling positions apart; reaching further   R 2.3, 2.5
    4 MLA                    attention whose cache is one small latent a token        R 2.3; V3 2.1.1
    5 Router and MoE         8 of 384 experts a token, kept busy without a loss        R 2.3; V3 2.1.2
    6 Block and model        loss, generation                                         R 2.3
    7 MuonClip               Muon + weight decay + RMS match + QK-Clip                R 2.1, App. D, E
    8 Checkpoints            Hugging Face's layout, both ways

Letters in shape comments and in name suffixes, the same throughout:
    B batch   T time (queries)   S time (keys, cached ones included)   N tokens = B * T   V vocabulary
    C hidden  H heads   D query/key width of a head   R latent width (kv_lora_rank)   L layers
    E experts   K experts active for a token   F width of an expert
"Our choice" marks what no primary source states for K2.
"""

import copy
import dataclasses
import difflib
import functools
import json
import math
import os
import re
import shutil
from base64 import b64decode, b64encode
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiktoken
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.adamw import adamw
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# ==================================================================================================
# 1  Config and presets (R 2.3, Table 2)
# ==================================================================================================
# The fields are those of Hugging Face's config.json, so a published file loads as it is. The defaults
# are Kimi K2 before YaRN stretched it. The comment beside a field is its help on the command line too.


@functools.lru_cache
def gate_factor(n_experts, top_k):
    """Scale that keeps the routed experts' output as large as a dense FFN's (ML App. C).

    A token's K normalised weights p mix K independent outputs, which shrinks their RMS to |p|_2.
    The factor undoes that on average: E[1 / |p|_2] with p from the sigmoids of gaussian logits.
    64 experts, top 6: 2.446 (Moonlight). 384 experts, top 8: 2.828 (K2 publishes 2.827).
    """
    rng = np.random.default_rng(0)
    scores = 1 / (1 + np.exp(-rng.standard_normal((8192, n_experts))))
    p = np.sort(scores, axis=1)[:, -top_k:]
    p /= p.sum(axis=1, keepdims=True)
    return float(np.round((1 / np.linalg.norm(p, axis=1)).mean(), 4))


FIXED = (
    "n_group", "topk_group", "moe_layer_freq", "norm_topk_prob", "scoring_func", "topk_method",
    "hidden_act", "attention_bias", "tie_word_embeddings", "num_nextn_predict_layers",
)
MAY_BE_ZERO = ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")
POSITIVE = ("rope_theta", "rms_norm_eps", "initializer_range", "routed_scaling_factor")


def nearest(name, known):
    """What a message about an unknown name ends with: the one that was probably meant, if any."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _check_rope_scaling(raw):
    """None, or a YaRN dictionary with every key present; other rope types are refused."""
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise ValueError(f"rope_scaling must be a JSON object or none, got {raw!r}")
    kind = raw.get("rope_type", raw.get("type"))
    if kind in ("default", None) and "factor" not in raw:
        return None
    if kind != "yarn":
        raise ValueError(f"rope_scaling type must be 'yarn' or none, got {kind!r}")
    yarn = {"factor": None, "original_max_position_embeddings": None,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    yarn = {"type": "yarn", **{key: raw.get(key, default) for key, default in yarn.items()}}
    for key, value in yarn.items():
        if key != "type" and not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(f"rope_scaling needs {key} as a number, got {value!r}")
    if yarn["factor"] < 1 or yarn["original_max_position_embeddings"] < 1:
        raise ValueError("rope_scaling: factor and original_max_position_embeddings must be at least 1")
    return yarn


@dataclass(frozen=True)
class KimiConfig:
    """Shape of a model, under the names of Hugging Face's config.json. Bad values raise ValueError."""

    vocab_size: int = 163840  # ids in all: BPE ranks, then 256 special ones
    hidden_size: int = 7168  # width C of the residual stream
    intermediate_size: int = 18432  # width of the dense FFN in the first layers
    moe_intermediate_size: int = 2048  # width F of one expert
    num_hidden_layers: int = 61  # layers L, dense and MoE together
    first_k_dense_replace: int = 1  # the first layers have a dense FFN instead of experts
    num_attention_heads: int = 64  # heads H (DeepSeek-V3: 128; half is cheaper at long context)
    q_lora_rank: int | None = 1536  # width of the query latent; none: one full query projection
    kv_lora_rank: int = 512  # width R of the key-value latent, the part that is cached
    qk_nope_head_dim: int = 128  # query/key dims of a head without position
    qk_rope_head_dim: int = 64  # query/key dims with rotary position; the key's is shared by all heads
    v_head_dim: int = 128  # value dims of a head
    n_routed_experts: int = 384  # experts E of a layer to choose from
    n_shared_experts: int = 1  # experts that see every token, as one FFN of that many widths
    num_experts_per_tok: int = 8  # experts K chosen for a token; sparsity is E / K = 48
    routed_scaling_factor: float | None = None  # scale of the routed sum; none: gate_factor(E, K)
    rms_norm_eps: float = 1e-6  # epsilon of the norms (the two latent norms always use 1e-6)
    rope_theta: float = 50000.0  # base of the rotary wavelengths
    rope_scaling: dict | None = None  # YaRN: {"type": "yarn", "factor": 32, ...}; none: no stretching
    max_position_embeddings: int = 131072  # longest context the model is meant for
    initializer_range: float = 0.02  # standard deviation of initial weights
    # what K2 does not vary; kept so that a published file round-trips, any other value is refused
    n_group: int = 1  # expert groups (K2 has none)
    topk_group: int = 1  # groups a token may choose from
    moe_layer_freq: int = 1  # every layer after the dense ones is MoE
    norm_topk_prob: bool = True  # the K weights of a token are normalised to sum to one
    scoring_func: str = "sigmoid"  # router score
    topk_method: str = "noaux_tc"  # selection by score plus correction bias
    hidden_act: str = "silu"  # SwiGLU
    attention_bias: bool = False  # no biases anywhere
    tie_word_embeddings: bool = False  # lm_head is its own matrix
    num_nextn_predict_layers: int = 0  # multi-token prediction layers (none are published)
    aux_loss_alpha: float = 0.001  # left over from DeepSeek's template, never read: see --aux_alpha

    def __post_init__(self):
        def check(name, fine, what):
            if not fine:
                raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int or (name == "q_lora_rank" and value is not None):
                least = 0 if name in MAY_BE_ZERO else 1
                check(name, type(value) is int and value >= least, f"a whole number of at least {least}")
            if name in POSITIVE and value is not None:
                check(name, isinstance(value, (int, float)) and 0 < value < math.inf, "a positive number")
            if name in FIXED:
                check(name, value == field.default, f"{field.default!r} as in Kimi K2")
        check("qk_rope_head_dim", self.qk_rope_head_dim % 2 == 0, "even, as it rotates pairs")
        for part, whole in (("num_experts_per_tok", "n_routed_experts"),
                            ("first_k_dense_replace", "num_hidden_layers")):
            few, many = getattr(self, part), getattr(self, whole)
            if few > many:
                raise ValueError(f"{part} ({few}) cannot exceed {whole} ({many})")
        object.__setattr__(self, "rope_scaling", _check_rope_scaling(self.rope_scaling))
        if self.routed_scaling_factor is None:
            factor = gate_factor(self.n_routed_experts, self.num_experts_per_tok)
            object.__setattr__(self, "routed_scaling_factor", factor)

    @classmethod
    def preset(cls, name, **overrides):
        """A named size (PRESETS, below) with any field overridden."""
        if name not in PRESETS:
            guess = nearest(name, PRESETS)
            raise ValueError(f"unknown preset {name!r}{guess}; there are: {', '.join(PRESETS)}")
        known = [f.name for f in dataclasses.fields(cls)]
        for field in overrides:
            if field not in known:
                raise ValueError(f"KimiConfig has no field {field!r}{nearest(field, known)}")
        fields = {**PRESETS[name], **overrides}
        if overrides.keys() & {"n_routed_experts", "num_experts_per_tok"}:
            fields["routed_scaling_factor"] = overrides.get("routed_scaling_factor")  # computed anew
        return cls(**fields)

    @classmethod
    def from_json(cls, path):
        """Read a config.json. Unknown fields are ignored; a missing size or a bad value is refused."""
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"no config.json at {path}") from None
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path} must hold a JSON object")
        if raw.get("rope_interleave", True) is not True:
            raise ValueError(f"{path}: rope_interleave must be true, K2 rotates neighbouring pairs")
        rope = raw.get("rope_parameters")  # transformers 5 keeps theta and YaRN in one place
        if rope is not None and not isinstance(rope, dict):
            raise ValueError(f"{path}: rope_parameters must be a JSON object, got {rope!r}")
        if rope:
            raw = {**raw, "rope_theta": rope.get("rope_theta", raw.get("rope_theta")), "rope_scaling": rope}
            raw = {k: v for k, v in raw.items() if v is not None}
        sizes = [f.name for f in dataclasses.fields(cls) if f.type is int and f.name not in FIXED]
        missing = [name for name in sizes if name not in raw]
        if missing:
            raise ValueError(f"{path} is no DeepSeek-V3 or Kimi K2 config: {', '.join(missing)} missing")
        if raw.get("num_key_value_heads", raw["num_attention_heads"]) != raw["num_attention_heads"]:
            raise ValueError(f"{path}: num_key_value_heads must equal num_attention_heads, MLA has no groups")
        known = {f.name for f in dataclasses.fields(cls)}
        fields = {"q_lora_rank": None, **{k: v for k, v in raw.items() if k in known}}
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self):
        """The dictionary of a config.json that `transformers` and inference engines load."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",  # "kimi_k2" would leave transformers' experts random
            **dataclasses.asdict(self),
            "num_key_value_heads": self.num_attention_heads,
            "rope_interleave": True,
            "bos_token_id": self.vocab_size - 256,
            "eos_token_id": self.vocab_size - 255,
            "pad_token_id": self.vocab_size - 1,
        }


def _preset(vocab, hidden, layers, heads, latents, head_dims, experts, widths, context, **more):
    """One row of the table below; the columns are design decisions, the names are the field's."""
    (q_lora, kv_lora), (nope, rope, v), (n, k, shared), (f, dense) = latents, head_dims, experts, widths
    return dict(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        q_lora_rank=q_lora, kv_lora_rank=kv_lora, qk_nope_head_dim=nope, qk_rope_head_dim=rope,
        v_head_dim=v, n_routed_experts=n, num_experts_per_tok=k, n_shared_experts=shared,
        moe_intermediate_size=f, intermediate_size=dense, max_position_embeddings=context, **more,
    )


K2_YARN = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
           "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}

# The toys keep K2's ratios: a dense FFN as wide as the K + 1 experts a token sees, rope = nope / 2. As in K2,
# six rotary pairs of ten turn at least once in the 128 tokens that tiny trains on: YaRN leaves them alone.
#            vocab   hidden  L   H   q / kv latent  nope, rope, v   E, K, shared  expert, dense  context
PRESETS = {
    "nano":   _preset(512,    64,  2,  2, (32, 16),    (16, 8, 16),   (8, 2, 1),   (32, 96),      64,
                      rope_theta=1e4),
    "tiny":   _preset(4096,  128,  4,  4, (64, 32),    (32, 16, 32),  (16, 2, 1),  (64, 192),    256,
                      rope_theta=150.0),
    "mini":   _preset(8192,  384,  8,  8, (192, 64),   (32, 16, 32),  (32, 4, 1),  (128, 640),   512,
                      rope_theta=600.0),
    "small":  _preset(32768, 768, 12, 12, (384, 128),  (64, 32, 64),  (64, 8, 1),  (256, 2304),  2048),
    "medium": _preset(65536, 2048, 24, 16, (512, 256), (128, 64, 128), (128, 8, 1), (768, 6912),  4096),
    "moonlight": _preset(163840, 2048, 27, 16, (None, 512), (128, 64, 128), (64, 6, 2), (1408, 11264), 8192,
                         routed_scaling_factor=2.446, rms_norm_eps=1e-5),  # eps UNCONFIRMED
    "k2":     _preset(163840, 7168, 61, 64, (1536, 512), (128, 64, 128), (384, 8, 1), (2048, 18432), 131072,
                      routed_scaling_factor=2.827, rope_scaling=K2_YARN),
}


@dataclass(frozen=True)
class Counts:
    """Parameters of a model by part, and what they cost. Numbers of elements, bytes, FLOPs."""

    embedding: int  # embed_tokens; lm_head is as large again
    attention: int
    dense: int
    routed_experts: int
    shared_experts: int
    router: int  # with its correction biases
    norms: int
    total: int
    active: int  # what one token meets: K of the E experts; both embeddings counted, as V3 does
    _cfg: KimiConfig

    def training_bytes(self, weight=4, gradient=4, state=4):
        """Bytes of weights, gradients and optimizer state: Muon keeps one number, AdamW two."""
        n = self.total
        n_state = n + 2 * self.embedding + self.norms  # the last two are AdamW's part
        return {"weights": weight * n, "gradients": gradient * n, "optimizer": state * n_state}

    def cache_bytes_per_token(self, element=2):
        """Bytes that one more token of context costs: L (R + rope) numbers (V3 2.1.1)."""
        cfg = self._cfg
        return element * cfg.num_hidden_layers * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)

    def _forward_flops(self, width, keys):
        """Of a token: 2 for each weight it meets; in each head 2 for each of `width` dims of each key."""
        cfg = self._cfg
        weights = self.active - self.embedding - self.norms
        return 2 * weights + 2 * cfg.num_hidden_layers * cfg.num_attention_heads * width * keys

    def train_flops(self, context):
        """FLOPs a token, forward and backward (3 x forward), in sequences of `context` tokens."""
        cfg = self._cfg
        width = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim
        return 3 * self._forward_flops(width, (context + 1) / 2)  # causal: half of the keys on average

    def decode_flops(self, context):
        """FLOPs to produce one token after `context` others, in the absorbed form of section 4."""
        return self._forward_flops(2 * self._cfg.kv_lora_rank + self._cfg.qk_rope_head_dim, context + 1)


def count_parameters(cfg):
    """Exact parameter counts from the config alone; nothing is allocated. Returns `Counts`.

    K2 gives 1,026,408,232,448, as its published files hold. The report's 1.04 T is one MoE layer
    more: almost surely a multi-token-prediction block that was not released (UNCONFIRMED). It gives
    32.6 B active parameters; ours are 32.86 B with both embeddings (its definition is UNCONFIRMED).
    """
    C, H, L = cfg.hidden_size, cfg.num_attention_heads, cfg.num_hidden_layers
    D, R = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, cfg.kv_lora_rank
    n_moe, expert = L - cfg.first_k_dense_replace, 3 * C * cfg.moe_intermediate_size
    q = C * H * D if cfg.q_lora_rank is None else cfg.q_lora_rank * (C + H * D)
    kv = C * (R + cfg.qk_rope_head_dim) + R * H * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    parts = dict(
        embedding=cfg.vocab_size * C,
        attention=L * (q + kv + H * cfg.v_head_dim * C),
        dense=cfg.first_k_dense_replace * 3 * C * cfg.intermediate_size,
        routed_experts=n_moe * cfg.n_routed_experts * expert,
        shared_experts=n_moe * cfg.n_shared_experts * expert,
        router=n_moe * cfg.n_routed_experts * (C + 1),
        norms=L * (2 * C + (cfg.q_lora_rank or 0) + R) + C,
    )
    total = sum(parts.values()) + parts["embedding"]
    idle = n_moe * (cfg.n_routed_experts - cfg.num_experts_per_tok) * expert
    return Counts(**parts, total=total, active=total - idle, _cfg=cfg)


# ==================================================================================================
# 2  Tokenizer and chat template (R App. B; the published tokenizer files)
# ==================================================================================================
# Byte-level BPE: text is split into words by a pattern, a word into bytes, and pairs of neighbours
# are merged in the order in which they were learned ("ranks"). The rank file is tiktoken's: a line
# holds a token in base64 and its rank. 256 special ids follow the ranks; text never produces them.

SPLIT_PATTERN = "|".join([
    r"[\p{Han}]+",  # a run of Chinese stands alone
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",  # a word: capitals, then small letters
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",  # a word all in capitals
    r"\p{N}{1,3}",  # numbers, three digits at a time
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation
    r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])

N_SPECIAL = 256
SPECIAL_NAMES = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>",
    6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>", 12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>", 15: "<|tool_call_end|>", 17: "<|im_middle|>",
    254: "[UNK]", 255: "[PAD]",
}  # offset above the ranks; the others are called <|reserved_token_{id}|>

DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."

# GPT-2's table: every byte as one printable character, which is how Hugging Face writes BPE tokens.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
BYTE_TO_CHAR = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


def _pieces(text, longest=400_000, longest_run=25_000):
    """Cut as K2's tokenizer does: slices of 400,000 characters, and inside them runs of 25,000
    characters that are all space or all not, because the pattern's regex overflows on longer ones."""
    for i in range(0, len(text), longest):
        piece, start = text[i : i + longest], 0
        for run in re.finditer(r"\s+|\S+", piece) if len(piece) > longest_run else ():
            for cut in range(run.start() + longest_run, run.end(), longest_run):
                yield piece[start:cut]
                start = cut
        yield piece[start:]


def _bpe_tokenizer(model):
    """Hugging Face's tokenizer around a BPE model: split by the pattern, then bytes as characters."""
    bpe = tokenizers.Tokenizer(model)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return bpe


# The same rendering as Tokenizer.render below, for engines that read a folder we saved.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content -%}{%- for part in content -%}{{ part['text'] }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- for m in messages -%}
  {%- if loop.first and m['role'] != 'system' -%}
<|im_system|>system<|im_middle|>DEFAULT_SYSTEM<|im_end|>
  {%- endif -%}
  {%- if m['role'] == 'user' -%}<|im_user|>
  {%- elif m['role'] == 'assistant' -%}<|im_assistant|>
  {%- else -%}<|im_system|>
  {%- endif -%}
  {{ m.get('name') or m['role'] }}<|im_middle|>
  {%- if m['role'] == 'tool' -%}{{ '## Return of ' + m['tool_call_id'] + '\\n' }}{%- endif -%}
  {{ text(m['content']) }}
  {%- if m.get('tool_calls') -%}
<|tool_calls_section_begin|>
    {%- for call in m['tool_calls'] -%}
<|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>
      {%- set arguments = call['function']['arguments'] -%}
      {%- if arguments is string -%}{{ arguments }}{%- else -%}{{ arguments | tojson }}{%- endif -%}
<|tool_call_end|>
    {%- endfor -%}
<|tool_calls_section_end|>
  {%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
""".replace("DEFAULT_SYSTEM", DEFAULT_SYSTEM)

ROLE_TOKEN = {"system": "<|im_system|>", "tool": "<|im_system|>", "user": "<|im_user|>",
              "assistant": "<|im_assistant|>"}
CALL_ID = re.compile(r"functions\.(\w{1,64}):(\d+)")


def _content(message, number):
    """The text of a message; OpenAI also allows a list of text parts, or none beside tool calls."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": "" if content is None else content}]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"message {number}: content must be text, got {type(content).__name__}")
    return "".join(texts)


def _turns(messages):
    """(role, name, text, calls as [(id, arguments)]) of each message, a system prompt first.

    Ids of calls are functions.NAME:IDX, IDX counting through the whole dialog; calls that come with
    other ids ("call_x7") are renamed so, and the tool results that answer them too.
    """
    given_system = bool(messages) and messages[0].get("role") == "system"
    default = [] if given_system else [{"role": "system", "content": DEFAULT_SYSTEM}]
    new_id, n_calls = {}, 0
    for number, message in enumerate([*default, *messages], -len(default)):
        role, calls = message.get("role"), []
        if role not in ROLE_TOKEN:
            raise ValueError(f"message {number}: role must be one of {', '.join(ROLE_TOKEN)}, got {role!r}")
        text = _content(message, number)
        if role == "tool":
            answered = message.get("tool_call_id", "")
            text = f"## Return of {new_id.get(answered, answered)}\n{text}"
        for call in message.get("tool_calls") or []:
            try:
                function, given = call["function"], call.get("id") or ""
                name = given if CALL_ID.fullmatch(given) else f"functions.{function['name']}:{n_calls}"
            except (KeyError, TypeError, AttributeError):
                raise ValueError(f"message {number}: a tool call needs a function with a name") from None
            new_id[given], n_calls = name, n_calls + 1
            arguments = function.get("arguments", "{}")
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            calls.append((name, arguments))
        yield role, message.get("name") or role, text, calls


class Tokenizer:
    """K2's tokenizer over any rank table: `ranks` maps a token's bytes to its id, 0, 1, 2 ...

    `special` maps the names of the 256 special tokens to their ids, `n_vocab` counts all ids.
    """

    def __init__(self, ranks):
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        if [*self.ranks.values()] != [*range(len(ranks))] or {bytes([b]) for b in range(256)} - ranks.keys():
            raise ValueError("ranks must be 0, 1, 2 ... without gaps and contain all 256 single bytes")
        first = len(ranks)
        names = (SPECIAL_NAMES.get(i, f"<|reserved_token_{first + i}|>") for i in range(N_SPECIAL))
        self.special = {name: first + i for i, name in enumerate(names)}
        self.n_vocab = first + N_SPECIAL
        self._bpe = tiktoken.Encoding(
            "kimi_k2", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special
        )

    @classmethod
    def train(cls, texts, vocab_size=4096):
        """Learn ranks from an iterable of strings. `vocab_size` counts all ids, special ones included.

        A text that runs out of pairs gives fewer. Hugging Face's `tokenizers` finds the merges.
        """
        least = 256 + N_SPECIAL
        if vocab_size < least:
            raise ValueError(f"vocab_size must be at least {least}: 256 bytes and {N_SPECIAL} special ids")
        texts = [texts] if isinstance(texts, str) else texts
        bpe = _bpe_tokenizer(tokenizers.models.BPE())
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - N_SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
        ranks = {bytes([b]): b for b in range(256)}
        for pair in json.loads(bpe.to_str())["model"]["merges"]:
            token = bytes(CHAR_TO_BYTE[c] for c in "".join(pair))
            ranks.setdefault(token, len(ranks))  # two merges may spell the same token
        return cls(ranks)

    @classmethod
    def load(cls, path):
        """Read a `tiktoken.model` rank file, or the one in a folder."""
        path = Path(path) / "tiktoken.model" if Path(path).is_dir() else Path(path)
        ranks = {}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(
                    f"{path} line {number}: expected '<base64 token> <rank>', got {line[:60]!r}"
                ) from None
        try:
            return cls(ranks)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path):
        """Write the rank file; a folder gets `tiktoken.model` in it."""
        path = Path(path) / "tiktoken.model" if Path(path).is_dir() else Path(path)
        path.write_bytes(b"".join(b64encode(token) + b" %d\n" % rank for token, rank in self.ranks.items()))

    def encode(self, text):
        """Ids of `text`. Text is text: the names of special tokens in it stay ordinary characters."""
        return [i for piece in _pieces(text) for i in self._bpe.encode_ordinary(piece)]

    def decode(self, ids):
        """Text of ids; bytes that are no UTF-8, and ids that do not exist, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """The bytes of ids: a token may hold a part of a character."""
        one = self._bpe.decode_single_token_bytes
        return b"".join(one(i) if 0 <= i < self.n_vocab else b"\xff" for i in map(int, ids))

    def token_bytes(self):
        """How many bytes of text each id stands for, (n_vocab,): what bits per byte divides by."""
        return [len(token) for token in self.ranks] + [0] * N_SPECIAL

    def render(self, messages, tools=None, add_generation_prompt=False):
        """A dialog in OpenAI's format as (ids, mask): K2's shipped template, not R App. B's older one.

        mask is 1 on what the assistant wrote: content, calls and the closing <|im_end|>, not the header.
        """
        ids, mask, text = [], [], self.encode

        def put(*parts, trained=0):  # names of special tokens, and ids of text, which is never special
            for part in parts:
                new = [self.special[part]] if isinstance(part, str) else part
                ids.extend(new)
                mask.extend([trained] * len(new))

        if tools:
            declared = json.dumps(tools, ensure_ascii=False, separators=(",", ":"))
            put("<|im_system|>", text("tool_declare"), "<|im_middle|>", text(declared), "<|im_end|>")
        for role, name, content, calls in _turns(messages):
            put(ROLE_TOKEN[role], text(name), "<|im_middle|>")
            body = [text(content)]
            if calls:
                body.append("<|tool_calls_section_begin|>")
                for call_id, arguments in calls:
                    body += ["<|tool_call_begin|>", text(call_id)]
                    body += ["<|tool_call_argument_begin|>", text(arguments), "<|tool_call_end|>"]
                body.append("<|tool_calls_section_end|>")
            put(*body, "<|im_end|>", trained=int(role == "assistant"))
        if add_generation_prompt:
            put("<|im_assistant|>", text("assistant"), "<|im_middle|>")
        return ids, mask

    def parse(self, ids):
        """The message in an assistant's turn, given the ids after its header. Never raises.

        {"role", "content", "tool_calls": [{"id", "type": "function", "function": {"name", "arguments"}}]}
        and, only if something is wrong, "errors": a sentence for each defect. A malformed call is
        reported there and left out of "tool_calls". Structure is read from ids, never from text, so
        nothing that text spells can forge a call.
        """
        errors, calls = [], []

        def check(fine, what, ids=None):
            if not fine:
                errors.append(what if ids is None else f"{what}: {self.decode(ids)!r}")

        turn, _ = self._cut(list(map(int, ids)), "<|im_end|>")
        turn, _ = self._cut(turn, "[EOS]")
        said, section = self._cut(turn, "<|tool_calls_section_begin|>")
        check(self._is_text(said), "special tokens inside the answer", said)
        body, after = self._cut(section or [], "<|tool_calls_section_end|>")
        check(section is None or after is not None, "the tool call section is not closed")
        check(section is None or body, "the tool call section is empty")
        check(not after, "text after the tool call section", after)
        before, rest = self._cut(body, "<|tool_call_begin|>")
        check(not before, "text between tool calls", before)
        while rest is not None:
            one, rest = self._cut(rest, "<|tool_call_begin|>")
            call, between = self._cut(one, "<|tool_call_end|>")
            check(between is not None, "a tool call is not closed", call)
            if between is not None:
                parsed = self._parse_call(call)
                (errors if isinstance(parsed, str) else calls).append(parsed)
            check(not between, "text between tool calls", between)
        message = {"role": "assistant", "content": self.decode(said), "tool_calls": calls}
        return {**message, "errors": errors} if errors else message

    def _cut(self, ids, name):
        """What stands before the first such token, and what stands after it (None if there is none)."""
        token = self.special[name]
        i = ids.index(token) if token in ids else len(ids)
        return ids[:i], ids[i + 1 :] if i < len(ids) else None

    def _is_text(self, ids):
        return all(0 <= i < len(self.ranks) for i in ids)

    def _parse_call(self, ids):
        """One call as OpenAI writes it, or a sentence that says what is wrong."""
        head, arguments = self._cut(ids, "<|tool_call_argument_begin|>")
        call_id, match = self.decode(head), CALL_ID.fullmatch(self.decode(head))
        if not match:
            return f"a tool call's id must look like functions.name:0, got {call_id!r}"
        if arguments is None:
            return f"{call_id}: no arguments"
        text = self.decode(arguments)
        if not self._is_text(arguments):
            return f"{call_id}: special tokens inside the arguments: {text!r}"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"{call_id}: the arguments are not valid JSON ({error}): {text!r}"
        if not isinstance(value, dict):
            return f"{call_id}: the arguments must be a JSON object, got {text!r}"
        return {"id": call_id, "type": "function", "function": {"name": match[1], "arguments": text}}

    def to_tokenizer_json(self):
        """The same tokenizer as the tokenizer.json that `transformers` and other engines read.

        tiktoken merges any two neighbours whose union has a rank, so every split is listed.
        """
        chars = {token: "".join(BYTE_TO_CHAR[b] for b in token) for token in self.ranks}
        merges = [
            (chars[token[:i]], chars[token[i:]])
            for token in self.ranks for i in range(1, len(token))
            if token[:i] in chars and token[i:] in chars
        ]
        vocab = {chars[token]: rank for token, rank in self.ranks.items()}
        bpe = _bpe_tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
        bpe.add_special_tokens(
            [tokenizers.AddedToken(name, special=True, normalized=False) for name in self.special]
        )
        return bpe.to_str()


# ==================================================================================================
# 3  RMSNorm, RoPE, YaRN (R 2.3, 2.5; YaRN: arXiv 2309.00071)
# ==================================================================================================
# RMSNorm gives every token's vector the same size, up to a learned gain: y = w x / rms(x), where
# rms(x) = sqrt(mean(x^2) + eps). Unlike LayerNorm it subtracts no mean.


class NormFunction(torch.autograd.Function):
    """y = n w with n = x / rms(x), and its gradient (g w - n mean(g w n)) / rms(x) in a few passes:
    on a CPU autograd's own takes five times as long, a tenth of a toy's training step."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rrms = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        n = x * rrms
        ctx.save_for_backward(n, rrms, weight)
        return n * weight

    @staticmethod
    def backward(ctx, g):
        n, rrms, weight = ctx.saved_tensors
        gw = g * weight
        along = torch.linalg.vecdot(gw, n).div_(n.shape[-1]).unsqueeze(-1)
        return gw.addcmul_(n, along, value=-1).mul_(rrms), (g * n).flatten(0, -2).sum(dim=0), None


class RMSNorm(nn.Module):
    """w x / rms(x), computed in fp32 whatever x is."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_grad_enabled():
            return NormFunction.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


# RoPE turns each pair (x_2i, x_2i+1) of a query or key by the angle position * w_i, with
# w_i = theta^(-2i/d): the product of two turned vectors depends on their distance alone.
#
# YaRN stretches a trained context F-fold: pairs that turn more than beta_fast times within the
# original length keep w_i, those that turn less than beta_slow times get w_i / F, between the two a
# ramp mixes. K2 has beta_fast = beta_slow = 1, a hard cut: of its 32 pairs the first 20 are kept.


def yarn_mscale(factor, mscale):
    """0.1 * mscale * ln(factor) + 1: longer contexts need sharper softmaxes."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def rope_frequencies(cfg):
    """Angle per position of each rotary pair, (rope / 2,) fp32, and the factor on cos and sin."""
    d, base, yarn = cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling
    w = base ** (-torch.arange(0, d, 2, dtype=torch.float64, device="cpu") / d)
    if yarn is None:
        return w.float(), 1.0

    def pair_that_turns(times):  # the pair index i whose wavelength fits `times` into L0
        turns = yarn["original_max_position_embeddings"] / (2 * math.pi * times)
        return d * math.log(turns) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_that_turns(yarn["beta_slow"])), d - 1)
    pair = torch.arange(d // 2, dtype=torch.float64, device="cpu")
    ramp = ((pair - low) / (high - low if high != low else 0.001)).clamp(0, 1)  # 0 keep, 1 stretch
    factor = yarn["factor"]
    w = w * (1 - ramp) + w / factor * ramp
    return w.float(), yarn_mscale(factor, yarn["mscale"]) / yarn_mscale(factor, yarn["mscale_all_dim"])


def rope_table(position, w, factor):
    """cos and sin for `rotate`: positions (T,) or (B, T) -> (T, 1, rope) or (B, T, 1, rope).

    Both entries of a pair stand side by side, the sine's first one negated.
    """
    angle = (position.unsqueeze(-1) * w).unsqueeze(-2)  # (..., T, 1, rope / 2)
    cos, sin = angle.cos() * factor, angle.sin() * factor
    return torch.stack((cos, cos), dim=-1).flatten(-2), torch.stack((-sin, sin), dim=-1).flatten(-2)


def rotate(x, cos, sin):
    """Turn the pairs of x (B, T, H, rope): (a, b) -> (a cos - b sin, b cos + a sin)."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # a, b -> b, a
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def softmax_scale(cfg):
    """D^-0.5, times m^2 under YaRN: 0.13086 in every published K2, 0.07217 before its extension."""
    scale = (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5
    if cfg.rope_scaling is None:
        return scale
    return scale * yarn_mscale(cfg.rope_scaling["factor"], cfg.rope_scaling["mscale_all_dim"]) ** 2


# Most of the time goes into products of matrices. On a CPU PyTorch leaves those in fp32 to MKL, which on an
# AMD EPYC reached half of what oneDNN did. PyTorch's one switch to oneDNN is called "bf16", but without AMX
# oneDNN goes on in fp32 (seen on that EPYC; a test asks each machine). It spends a millisecond on making
# code for each new shape: it pays for shapes that come back.


def autocast_dtype(x):
    """What autocast would compute in where x lives, or None when it is off."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


ABLE = torch.cpu.get_capabilities()
EXACT_ONEDNN = ABLE.get("avx512_f", False) and not ABLE.get("amx_tile", True)


@contextmanager
def onednn():
    """Products of fp32 matrices on a CPU go to oneDNN here, if that changes nothing but their time."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if EXACT_ONEDNN:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class OneDNNProduct(torch.autograd.Function):
    """a @ b and its gradients; a, b (..., n, k), (..., k, m) with the same dimensions in front."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        with onednn():
            return a @ b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        with onednn():
            return g @ b.mT, a.mT @ g


def may_use_onednn(x):
    """Is x computed with in fp32 on such a CPU, operation by operation?"""
    on_cpu = EXACT_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and not autocast_dtype(x) and not torch.compiler.is_compiling()


def product(a, b):
    """a @ b, in oneDNN if it is large and has a number of rows that batches have, not any number."""
    large = a.shape[-2] % 64 == 0 and a.numel() * b.shape[-1] >= 2**22
    return OneDNNProduct.apply(a, b) if large and may_use_onednn(a) else a @ b


class Linear(nn.Linear):
    """W x, without a bias."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        return product(x.flatten(0, -2), self.weight.T).view(*x.shape[:-1], -1)


# ==================================================================================================
# 4  Multi-head latent attention and its cache (R 2.3; V3 2.1.1)
# ==================================================================================================
# Keys and values of all heads are made from one latent of R numbers a token:
#
#     c_kv = norm(W_a x)      k_h = [W_UK_h c_kv ; k_rope]      v_h = W_UV_h c_kv
#     a_h = softmax(s q_h . k_h)      o = W_o concat_h(a_h v_h)
#
# k_rope, the only part that knows positions, is one vector shared by all heads. So a cache needs
# R + rope = 576 numbers a token and layer in K2, where full keys and values would be 20,480.
# The two forms below give the same numbers. Naive: make k_h and v_h, attend. Absorbed: since
# q . (W_UK c) = (W_UK^T q) . c, move W_UK to the query and W_UV behind the softmax, and attend to
# the latents themselves, as one key of width 576 for all heads: less work when queries are few.


class LatentCache:
    """What past tokens leave behind: c_kv and k_rope of each layer, and nothing else.

    c_kv[l] is (B, length, R), after its norm; k_rope[l] is (B, length, rope), after rotation. With
    `max_length` the memory is taken at once and never exceeded, without it the cache doubles when full.
    `padding` (B,) says how many places at the left of each row hold no token.
    """

    def __init__(self, cfg, batch_size, max_length=None, device=None, dtype=None):
        self.latent, self.width = cfg.kv_lora_rank, cfg.kv_lora_rank + cfg.qk_rope_head_dim
        self.max_length, self.length, self.padding = max_length, 0, None
        shape = (cfg.num_hidden_layers, batch_size, max_length or 0, self.width)
        self.buffers = list(torch.zeros(shape, device=device, dtype=dtype or torch.float32))

    @property
    def c_kv(self):
        """The latents of each layer, (B, length, R)."""
        return [buffer[:, : self.length, : self.latent] for buffer in self.buffers]

    @property
    def k_rope(self):
        """The rotary keys of each layer, (B, length, rope)."""
        return [buffer[:, : self.length, self.latent :] for buffer in self.buffers]

    def update(self, layer, new):
        """Write a layer's new (B, T, R + rope) after the old ones; returns all (B, S, R + rope).

        The model moves `length` on when the last layer has written.
        """
        end = self.length + new.shape[1]
        if end > self.buffers[layer].shape[1]:
            self.reserve(end)
        self.buffers[layer][:, self.length : end] = new
        return self.buffers[layer][:, :end]

    def reserve(self, length):
        """Make room for `length` tokens, or the next power of two: then shapes seldom change. What is not
        written yet is zero, for those who read whole buffers and weigh it with zero."""
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {length} do not fit")
        room = max(64, 1 << (length - 1).bit_length()) - self.buffers[0].shape[1]
        if room > 0 and self.max_length is None:
            self.buffers = [F.pad(buffer, (0, 0, 0, room)) for buffer in self.buffers]

    def select(self, rows):
        """A new cache with these rows (a list or tensor of indices): several continuations of one
        prompt are `cache.select([0, 0, 0, 0])`, finished rows are dropped by leaving them out."""
        rows = torch.as_tensor(rows, device=self.buffers[0].device)
        other = copy.copy(self)
        other.buffers = [buffer.index_select(0, rows) for buffer in self.buffers]
        other.padding = None if self.padding is None else self.padding.index_select(0, rows)
        return other


def causal_mask(T, S, padding, device):
    """True where query t may look: (T, S), or (B, 1, T, S) with left padding; None if causal alone.

    A padded query sees itself, so that no softmax is empty; what it computes is never looked at.
    """
    if padding is None and (T == S or T == 1):
        return None
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)
    if padding is None:
        return key <= query
    real = key >= padding[:, None, None, None]
    return (key <= query) & (real | (key == query))


def document_mask(document):
    """True where a query sees the documents (B, T) of a packed row apart, each for itself: (B, 1, T, T)."""
    return (document[:, :, None] == document[:, None]).tril().unsqueeze(1)


def attend(q, k, v, scale, mask=None, record=False):
    """softmax(scale q k^T + mask) v, written out; q, k (B, H, T|S, D), v (B, H, S, v) -> (B, H, T, v).

    With `record` also S_max (H,): each head's largest softmax input (R Algorithm 1).
    """
    if mask is None:
        T, S = q.shape[2], k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    s = product(scale * q, k.mT).add_(bias)  # (B, H, T, S)
    return product(s.softmax(dim=-1), v), s.detach().amax(dim=(0, 2, 3)) if record else None


@torch.no_grad()
def max_logits(q, k, scale, mask=None, block=128):
    """S_max of each head (H,) by itself, from q, k (B, H, T, D); a mask (B, 1, T, T) as `attend` has it.

    Blocks of queries are made and thrown away: memory stays B * H * block * T.
    """
    T, best = q.shape[2], []
    for t in range(0, T, block):
        s = q[:, :, t : t + block] @ k[:, :, : t + block].mT  # (B, H, block, S)
        if mask is not None:
            s = s.masked_fill_(~mask[:, :, t : t + block, : t + block], -math.inf)
        s = s.amax(dim=0)  # over the batch first: what is left to mask is small
        future = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(t + 1)
        best.append(s.masked_fill_(future, -math.inf).amax(dim=(1, 2)))
    return torch.stack(best).amax(dim=0).float() * scale


def attend_blocks(q, k, v, scale, mask=None, record=False, block=128):
    """`attend`, a block of queries at a time: keys after it cost nothing, and s stays in a CPU's caches."""
    T, past, parts = q.shape[2], k.shape[2] - q.shape[2], []
    for t in range(0, T, block):
        end = past + min(t + block, T)
        seen = mask if mask is None else mask[..., t : t + block, :end]
        parts.append(attend(q[:, :, t : t + block], k[:, :, :end], v[:, :, :end], scale, seen, record))
    out, s_max = zip(*parts)
    return torch.cat(out, dim=2), torch.stack(s_max).amax(dim=0) if record else None


def attend_documents(q, k, v, scale, document, record=False):
    """`attend` with the mask of `document_mask`: each document by itself, so that the others cost nothing."""
    B, H, T, _ = q.shape
    sizes = [n for row in document for n in row.unique_consecutive(return_counts=True)[1].tolist()]
    parts = (x.transpose(0, 1).reshape(1, H, B * T, -1).split(sizes, dim=2) for x in (q, k, v))
    out, s_max = zip(*(attend(*part, scale, None, record) for part in zip(*parts)))
    out = torch.cat(out, dim=2).view(H, B, T, -1).transpose(0, 1)
    return out, torch.stack(s_max).amax(dim=0) if record else None


def attend_fused(q, k, v, scale, mask=None, record=False):
    """`attend` by PyTorch's fused kernel, which never holds all of s: for long sequences and GPUs."""
    pad = q.shape[-1] - v.shape[-1] if q.device.type == "cpu" else 0  # the CPU's wants equal widths
    wide_v, causal = F.pad(v, (0, pad)) if pad > 0 else v, mask is None and q.shape[2] > 1
    out = F.scaled_dot_product_attention(q, k, wide_v, mask, is_causal=causal, scale=scale)
    return out[..., : v.shape[-1]], max_logits(q, k, scale, mask) if record else None


def attend_absorbed(q_nope, q_rope, latent, w_uk, w_uv, scale, mask=None):
    """Attend to the latents (B, S, R + rope), one key and value for all heads: (B T, H * v).

    q_nope, q_rope (B T, H, nope | rope), w_uk (H, nope, R), w_uv (H, R, v). Without them, where both are
    part of the projections around: q_nope is W_UK^T q already, (B T, H, R), and (B T, H * R) is returned.
    """
    (B, S, width), (_, H, rope), T = latent.shape, q_rope.shape, len(q_rope) // len(latent)
    R = width - rope
    if w_uk is not None:
        q_nope = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)  # W_UK^T q: (B T, H, R)
    q = torch.cat((q_nope, q_rope), dim=-1).view(B, T * H, -1)
    s = torch.bmm(q, latent.mT).float() * scale  # (B, T H, S)
    if mask is None and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=s.device).tril()
    if mask is not None:  # (T, S) or (B, 1, T, S): the same for all heads of a query
        s.view(B, T, H, S).masked_fill_(~mask.view(-1, T, 1, S), -math.inf)
    context = torch.bmm(s.softmax(dim=-1).to(latent.dtype), latent[..., :R])  # (B, T H, R)
    context = context.view(B * T, H, R)
    if w_uv is not None:
        context = torch.bmm(context.transpose(0, 1), w_uv).transpose(0, 1)  # W_UV context: (B T, H, v)
    return context.flatten(1)


class MLA(nn.Module):
    """Multi-head latent attention; parameter names are the published checkpoint's."""

    def __init__(self, cfg):
        super().__init__()
        C, H, R = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank
        self.H, self.R, self.rope = H, R, cfg.qk_rope_head_dim
        self.nope, self.v = cfg.qk_nope_head_dim, cfg.v_head_dim
        D = self.nope + self.rope
        if cfg.q_lora_rank is None:
            self.q_proj = Linear(C, H * D)
        else:
            self.q_a_proj = Linear(C, cfg.q_lora_rank)
            self.q_a_layernorm = RMSNorm(cfg.q_lora_rank, 1e-6)
            self.q_b_proj = Linear(cfg.q_lora_rank, H * D)
        self.kv_a_proj_with_mqa = Linear(C, R + self.rope)
        self.kv_a_layernorm = RMSNorm(R, 1e-6)
        self.kv_b_proj = Linear(R, H * (self.nope + self.v))
        self.o_proj = Linear(H * self.v, C)
        self.scale = softmax_scale(cfg)

    def forward(self, x, rotary, mask=None, cache=None, layer=0, absorb=None, record=False):
        """x (B, T, C) -> output (B, T, C), and S_max (H,) if `record`.

        The mask is what `causal_mask` gives, or, for packed rows, the numbers (B, T) of their documents.
        """
        q = self.q_proj(x) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(*x.shape[:2], self.H, -1)  # (B, T, H, D)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        q_rope = rotate(q_rope, *rotary)
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split([self.R, self.rope], dim=-1)
        c_kv, k_rope = self.kv_a_layernorm(c_kv), rotate(k_rope.unsqueeze(2), *rotary).squeeze(2)
        latent = torch.cat((c_kv, k_rope), dim=-1)
        if cache is not None:
            latent = cache.update(layer, latent).to(x.dtype)  # (B, S, R + rope)
        if absorb is None:
            absorb = cache is not None and self.absorbed_is_cheaper(x.shape[1], latent.shape[1])
        if absorb:
            w_uk, w_uv = self.absorbed_weights(latent.dtype)
            q_nope, q_rope = q_nope.flatten(0, 1), q_rope.flatten(0, 1)  # (B T, H, nope | rope)
            out = attend_absorbed(q_nope, q_rope, latent, w_uk, w_uv, self.scale, mask)
            return self.o_proj(out.view(*x.shape[:2], -1)), None
        out, s_max = self.naive(q_nope, q_rope, latent, mask, record)
        return self.o_proj(out), s_max

    def absorbed_is_cheaper(self, T, S):
        """Compare multiplications a head: expanding S latents, or taking T queries to the latents."""
        expand = self.R * (self.nope + self.v)
        naive = S * expand + T * S * (self.nope + self.rope + self.v)
        return T * expand + T * S * (2 * self.R + self.rope) < naive

    def naive(self, q_nope, q_rope, latent, mask, record):
        """Make every head's keys and values, then attend: (B, T, H * v), S_max (H,) or None."""
        c_kv, k_rope = latent.split([self.R, self.rope], dim=-1)
        k_nope, v = self.kv_b_proj(c_kv).unflatten(-1, (self.H, -1)).split([self.nope, self.v], dim=-1)
        q = torch.cat((q_nope.transpose(1, 2), q_rope.transpose(1, 2)), dim=-1)  # (B, H, T, D)
        k_rope = k_rope.unsqueeze(1).expand(-1, self.H, -1, -1)
        k = torch.cat((k_nope.transpose(1, 2), k_rope), dim=-1)  # (B, H, S, D)
        # written out is faster for short sequences on a CPU, and S_max comes with it
        short = q.device.type == "cpu" and k.shape[2] <= 512 and q.dtype == torch.float32
        by = attend_blocks if short and not autocast_dtype(q) else attend_fused
        if mask is not None and mask.dtype != torch.bool:  # numbers of documents
            if by is attend_blocks and not torch.compiler.is_compiling():  # its sizes change with the batch
                by = attend_documents
            else:
                mask = document_mask(mask)
        out, s_max = by(q, k, v.transpose(1, 2), self.scale, mask, record)
        return out.transpose(1, 2).flatten(2), s_max

    def absorbed_weights(self, dtype):
        """W_UK (H, nope, R) and W_UV, transposed, (H, R, v): a head's keys and values from latents."""
        w = self.kv_b_proj.weight.to(dtype).view(self.H, -1, self.R)
        return w[:, : self.nope], w[:, self.nope :].mT


# ==================================================================================================
# 5  Router and mixture of experts (R 2.3; V3 2.1.2; balancing is "similar to DeepSeek-V3")
# ==================================================================================================
# A token's affinity to expert i is s_i = sigmoid(w_i . x). It goes to the K experts with the largest
# s_i + b_i, but is weighted by s_i alone:
#
#     g_i = factor * s_i / sum_{chosen j} s_j        y = SharedExpert(x) + sum_{chosen i} g_i Expert_i(x)
#
# The bias b only steers the choice. It has no gradient: once a step, experts that saw more tokens
# than the mean lose u, the others gain u (MuonClip, section 7). No token is ever dropped.


class DenseFFN(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). The first layer's FFN, and the shared experts."""

    def __init__(self, C, width):
        super().__init__()
        self.gate_proj = Linear(C, width)
        self.up_proj = Linear(C, width)
        self.down_proj = Linear(width, C)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Chooses K of E experts for each token; scores in fp32, also under autocast."""

    def __init__(self, cfg):
        super().__init__()
        self.K, self.factor = cfg.num_experts_per_tok, cfg.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(cfg.n_routed_experts))

    def forward(self, x_NC):
        """Chosen experts (N, K), their weights (N, K), all scores (N, E)."""
        in_fp32 = torch.autocast(x_NC.device.type, enabled=False) if autocast_dtype(x_NC) else nullcontext()
        with in_fp32:
            scores = F.linear(x_NC.float(), self.weight.float()).sigmoid()
        return *self.choose(scores), scores

    def choose(self, scores):
        """The K experts with the largest s + b, and their weights, from s alone."""
        chosen = (scores + self.e_score_correction_bias).topk(self.K, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        return chosen, weights * (self.factor / (weights.sum(dim=-1, keepdim=True) + 1e-20))


def sequence_aux_loss(chosen_NK, scores_NE, B):
    """sum_i f_i P_i, mean over the B sequences (V3 eq. 17-20, without alpha); 1 when balanced.

    f_i = E / (K T) * #{t that chose i}; P_i = mean_t of expert i's share in the token's scores.
    """
    (N, E), K = scores_NE.shape, chosen_NK.shape[1]
    counts = torch.zeros(B, E, device=scores_NE.device)
    counts.scatter_add_(1, chosen_NK.view(B, -1), torch.ones(B, N // B * K, device=counts.device))
    f = counts * (E * B / (K * N))
    share = scores_NE / scores_NE.sum(dim=-1, keepdim=True)
    return (f * share.view(B, -1, E).mean(dim=1)).sum(dim=-1).mean()


def grouped_linear(x, weight, ends):
    """x (M, in) holds the rows of expert 0, 1, ... up to ends[e]; weight (E, out, in) -> (M, out)."""
    aligned = all(d * x.element_size() % 16 == 0 for d in weight.shape[1:])
    kernel = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and x.device.type == "cpu")
    if aligned and kernel:
        call = F.grouped_mm
        if x.dtype != torch.bfloat16 and torch.compiler.is_compiling():
            call = torch.compiler.disable(call)  # torch.compile knows it in bf16 only
        return call(x, weight.transpose(-2, -1), offs=ends.int())
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(sizes), weight.unbind(0))])


class EachExpert(torch.autograd.Function):
    """One expert after another, so that what it makes stays in a CPU's caches, and their gradients by hand.

    x (N, C), gate_up (E, 2F, C), down (E, C, F), weights (N, K). M visits lie sorted by expert: number m is
    token[m]'s, expert e has sizes[e] of them, those of token n are numbers place[n] (K). A visit that is in
    nobody's place only fills up an expert's number.
    """

    @staticmethod
    @onednn()
    def forward(ctx, x, gate_up, down, weights, token, place, sizes):
        M, C = len(token), x.shape[1]
        hidden, y = x.new_empty(M, gate_up.shape[1]), x.new_empty(M, C)
        visits = zip(token.split(sizes), hidden.split(sizes), y.split(sizes))
        for e, (token_e, hidden_e, y_e) in enumerate(visits):
            gate, up = torch.mm(x.index_select(0, token_e), gate_up[e].T, out=hidden_e).chunk(2, dim=1)
            torch.mm(F.silu(gate) * up, down[e].T, out=y_e)
        ctx.sizes = sizes
        ctx.save_for_backward(x, gate_up, down, weights, token, place, hidden)
        return F.embedding_bag(place, y, per_sample_weights=weights, mode="sum")  # sum_k w_k y[place_k]

    @staticmethod
    @onednn()
    def backward(ctx, g):
        x, gate_up, down, weights, token, place, hidden = ctx.saved_tensors
        M, C = len(token), x.shape[1]
        dx, d_gate_up, d_down = x.new_empty(M, C), torch.empty_like(gate_up), torch.empty_like(down)
        weight = weights.new_zeros(M).scatter_(0, place.flatten(), weights.flatten())
        d_weight = torch.empty_like(weight)
        visits = zip(*(v.split(ctx.sizes) for v in (token, hidden, weight, d_weight, dx)))
        for e, (token_e, hidden_e, w, d_w, dx_e) in enumerate(visits):
            (gate, up), w = hidden_e.chunk(2, dim=1), w.unsqueeze(1)
            x_e, g_e = x.index_select(0, token_e), g.index_select(0, token_e)
            silu = F.silu(gate)
            h, dh = silu * up, g_e @ down[e]  # y = w down h
            torch.linalg.vecdot(dh, h, out=d_w)
            torch.mm(g_e.T, h.mul_(w), out=d_down[e])
            dh *= w
            d_gate = torch.ops.aten.silu_backward(dh * up, gate)
            d_hidden = torch.cat((d_gate, dh.mul_(silu)), dim=1)
            torch.mm(d_hidden.T, x_e, out=d_gate_up[e])
            torch.mm(d_hidden, gate_up[e], out=dx_e)
        dx = F.embedding_bag(place, dx, mode="sum")
        return dx, d_gate_up, d_down, d_weight[place], None, None, None


class Experts(nn.Module):
    """E SwiGLU experts as three stacked tensors: gate_proj, up_proj (E, F, C), down_proj (E, C, F)."""

    def __init__(self, cfg):
        super().__init__()
        E, width, C = cfg.n_routed_experts, cfg.moe_intermediate_size, cfg.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(E, width, C))
        self.up_proj = nn.Parameter(torch.empty(E, width, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, width))

    def forward(self, x_NC, chosen_NK, weights_NK):
        """sum_k weights[:, k] * Expert_{chosen[:, k]}(x): sort the N * K visits by expert, multiply
        each expert's rows with its matrices, add the results back up. Returns (N, C), load (E,)."""
        if x_NC.device.type == "cpu" and not torch.is_grad_enabled():
            if (y := self.few(x_NC, chosen_NK, weights_NK)) is not None:
                return y, None
        (N, C), K, E = x_NC.shape, chosen_NK.shape[1], len(self.gate_proj)
        expert, visit = chosen_NK.flatten().sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(E, device=expert.device), right=True)  # (E,)
        load, token = ends.diff(prepend=ends.new_zeros(1)), visit // K
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if N * K >= 256 * E and may_use_onednn(x_NC) and torch.is_grad_enabled():
            room = (load + 63) // 64 * 64  # sizes that come back
            number = torch.arange(N * K) + (room.cumsum(0) - room - ends + load)[expert]
            token = token.new_zeros(room.sum()).scatter_(0, number, token)
            place = torch.empty_like(visit).scatter_(0, visit, number).view(N, K)
            gate_up = torch.cat((gate, up), dim=1)
            return EachExpert.apply(x_NC, gate_up, down, weights_NK, token, place, room.tolist()), load
        if dtype := autocast_dtype(x_NC):  # grouped_mm does not know autocast
            x_NC, gate, up, down = x_NC.to(dtype), gate.to(dtype), up.to(dtype), down.to(dtype)
        rows = x_NC.index_select(0, token)  # (N * K, C)
        if torch.is_grad_enabled():  # one product in place of two; copying weights pays when training
            gate, up = grouped_linear(rows, torch.cat((gate, up), dim=1), ends).chunk(2, dim=1)
        else:
            gate, up = grouped_linear(rows, gate, ends), grouped_linear(rows, up, ends)
        h = F.silu(gate) * up
        h = grouped_linear(h * weights_NK.flatten()[visit].unsqueeze(1).to(h.dtype), down, ends)
        out = torch.zeros(N, C, dtype=h.dtype, device=h.device).index_add(0, token, h)
        return out, load

    def few(self, x_NC, chosen_NK, weights_NK):
        """The same where calls cost more than arithmetic; None if there are too many tokens for that."""
        N, E = len(x_NC), len(self.gate_proj)
        if N > 1 and N * self.gate_proj.numel() <= 2**21:  # all experts on all tokens, most weighted 0
            h = F.silu(x_NC @ self.gate_proj.mT) * (x_NC @ self.up_proj.mT)  # (E, N, F)
            weights_NE = torch.zeros(N, E, dtype=h.dtype).scatter_(1, chosen_NK, weights_NK.to(h.dtype))
            return torch.bmm(h * weights_NE.T.unsqueeze(-1), self.down_proj.mT).sum(dim=0)
        if N > 4:
            return None
        if torch.compiler.is_compiling():  # Python cannot see yet which experts they are
            gate, up, down = (w[chosen_NK] for w in (self.gate_proj, self.up_proj, self.down_proj))
            h = F.silu((gate * x_NC[:, None, None]).sum(dim=-1)) * (up * x_NC[:, None, None]).sum(dim=-1)
            return ((down * h[:, :, None]).sum(dim=-1) * weights_NK[:, :, None]).sum(dim=1)
        out = torch.zeros_like(x_NC)
        for x, y, experts, weights in zip(x_NC, out, chosen_NK.tolist(), weights_NK.tolist()):
            for e, weight in zip(experts, weights):
                h = F.silu(torch.mv(self.gate_proj[e], x)) * torch.mv(self.up_proj[e], x)
                y.addmv_(self.down_proj[e], h, alpha=weight)
        return out


class MoE(nn.Module):
    """Shared expert plus the routed ones."""

    def __init__(self, cfg):
        super().__init__()
        self.gate = Router(cfg)
        self.experts = Experts(cfg)
        if cfg.n_shared_experts:
            self.shared_experts = DenseFFN(cfg.hidden_size, cfg.n_shared_experts * cfg.moe_intermediate_size)

    def forward(self, x, record=False):
        """x (B, T, C) -> (B, T, C), and if `record` how many tokens each expert saw (E,) and the
        sequence auxiliary loss."""
        x_NC = x.flatten(0, 1)
        chosen_NK, weights_NK, scores_NE = self.gate(x_NC)
        y, load = self.experts(x_NC, chosen_NK, weights_NK)
        if hasattr(self, "shared_experts"):
            y = y + self.shared_experts(x_NC)
        return y.view_as(x), (load, sequence_aux_loss(chosen_NK, scores_NE, len(x))) if record else None


# ==================================================================================================
# 6  Block and model (R 2.3)
# ==================================================================================================
# L blocks add to a residual stream x, which starts as the tokens' embeddings:
#
#     h = x + MLA(norm(x))      x = h + FFN(norm(h))      logits = W_head norm(x)
#     loss = mean over targets of -log softmax(logits)[target]
#
# The FFN is dense in the first layer and a mixture of experts in all others. To generate is to draw a
# token from softmax(logits / temperature) and to feed it back, the past being read from the cache.


class Block(nn.Module):
    """One layer, under the names of the published checkpoint."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = MLA(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        dense = layer < cfg.first_k_dense_replace
        self.mlp = DenseFFN(cfg.hidden_size, cfg.intermediate_size) if dense else MoE(cfg)

    def forward(self, x, rotary, mask=None, cache=None, absorb=None, record=False):
        """x (B, T, C) -> (B, T, C), S_max (H,) or None, (load (E,), aux loss) or None."""
        h, s_max = self.self_attn(self.input_layernorm(x), rotary, mask, cache, self.layer, absorb, record)
        x = x + h
        h = self.post_attention_layernorm(x)
        h, routing = (self.mlp(h), None) if isinstance(self.mlp, DenseFFN) else self.mlp(h, record)
        return x + h, s_max, routing


def keep_products(cfg):
    """For `checkpoint`: what a block keeps for its backward pass when parts of it are recomputed (R 2.4.3).

    Kept is what matrix products and fused attention made, but for three products with large results: MLA's
    two up-projections and the experts' down_proj. These, norms, SwiGLU and all that is cheap are made again.
    """
    H, nope, rope, v = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    again = {(cfg.q_lora_rank, H * (nope + rope)), (cfg.kv_lora_rank, H * (nope + v)),
             (cfg.moe_intermediate_size, cfg.hidden_size)}  # (in, out) of their weights
    products = {"aten::mm", "aten::_grouped_mm"}

    def policy(context, op, *args, **kwargs):
        name = op.name()  # not mm.out, which EachExpert has: it fills a buffer, what is kept would not
        kept = name in products and tuple(args[1].shape[-2:]) not in again
        keep = kept or name.startswith("aten::_scaled_dot_product")
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


class HeadLoss(torch.autograd.Function):
    """Sum over targets of the cross-entropy -log softmax(W h)[target], without ever holding all
    logits: a few rows at a time are made, turned into their gradient p - onehot and used up.

    h (N, C), weights (V, C), targets (N,), all of them ids. For K2 the logits of 4,096 tokens would be
    2.7 GB, and autograd keeps three such tensors.
    """

    @staticmethod
    @onednn()
    def forward(ctx, h_NC, w_VC, targets_N):
        rows = max(64, (2**21 if h_NC.device.type == "cpu" else 2**26) // len(w_VC))
        total = torch.zeros((), device=h_NC.device)
        dh, dw = torch.empty_like(h_NC), torch.zeros_like(w_VC, dtype=torch.float32)
        buffer = h_NC.new_empty(min(rows, len(h_NC)), len(w_VC))
        for h, target, dh_part in zip(h_NC.split(rows), targets_N.split(rows), dh.split(rows)):
            s, target = torch.mm(h, w_VC.T, out=buffer[: len(h)]).float(), target[:, None]
            s -= s.amax(dim=-1, keepdim=True)
            right = s.gather(1, target)
            p = s.exp_()
            z = p.sum(dim=-1, keepdim=True)
            total += (z.log() - right).sum()
            p *= 1 / z
            p.scatter_add_(1, target, -torch.ones_like(right))
            p = p.to(h.dtype)
            torch.mm(p, w_VC, out=dh_part)
            dw = dw.addmm_(p.T, h) if p.dtype == dw.dtype else dw.add_(p.T @ h)
        ctx.save_for_backward(dh, dw.to(w_VC.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        return dh * grad, dw * grad, None


def sample_token(logits, temperature, top_p, generator=None):
    """Logits (B, V) -> ids (B,). top_p keeps the fewest tokens whose probabilities reach it."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = (logits.float() / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, index = p.sort(dim=-1, descending=True)
        ordered = ordered * (ordered.cumsum(dim=-1) - ordered < top_p)
        p = torch.zeros_like(p).scatter_(1, index, ordered)
    return torch.multinomial(p, 1, generator=generator).squeeze(1)


def left_pad(prompts, pad, device):
    """Prompts of different lengths as (B, T), and how many places at the left are padding (B,)."""
    prompts = [torch.as_tensor(p, dtype=torch.long, device=device) for p in prompts]
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("there must be a prompt, and at least one token in each; [BOS] starts a new text")
    longest = max(map(len, prompts))
    rows = [F.pad(p, (longest - len(p), 0), value=pad) for p in prompts]
    return torch.stack(rows), torch.tensor([longest - len(p) for p in prompts], device=device)


def _cut_after(row, start, stop):
    """A row up to and with its first stop token at or after `start`."""
    hits = torch.isin(row[start:], stop).nonzero()
    return row[: start + hits[0, 0] + 1] if len(hits) else row


class Decoder:
    """`KimiK2.forward` for one new token a row, with all that does not change taken out of the loop.

    Small models wait for Python and for kernel launches, not for arithmetic. So weights that read the
    same input are joined, dtypes are settled once (autocast would cast every weight again at every
    token), and no modules are called. Build a new one when weights have changed. `static` is for
    `model.compile_decode`, the rest runs as it stands.
    """

    @torch.no_grad()
    def __init__(self, model):
        cfg, weight = model.cfg, model.lm_head.weight
        self.compiled = torch.compile(self.static, dynamic=False) if model.compile_decode else None
        self.dtype = autocast_dtype(weight) or weight.dtype
        self.embed, self.lm_head = model.model.embed_tokens.weight, self.cast(model.lm_head.weight)
        self.norm, self.rope = self.norm_of(model.model.norm, self.embed), (model.rope_w, model.rope_factor)
        self.cos = self.sin = torch.empty(0)
        self.scale, self.H, self.rope_dim = softmax_scale(cfg), cfg.num_attention_heads, cfg.qk_rope_head_dim
        self.layers = [self.prepare(layer) for layer in model.model.layers]

    def cast(self, *weights):
        """One weight, or several on top of each other, in the dtype that products are computed in."""
        return (torch.cat(weights) if len(weights) > 1 else weights[0]).to(self.dtype)

    def norm_of(self, module, like):
        """RMSNorm as a function, for inputs with the dtype of `like`."""
        shape, weight, eps = module.weight.shape, module.weight.to(like.dtype), module.eps
        if like.device.type != "cpu" or like.dtype != torch.float32:
            return lambda x: F.rms_norm(x, shape, weight, eps)
        # x / sqrt(|x|^2 + eps C) * sqrt(C) w: half the time of the CPU's rms_norm
        floor, gain = torch.tensor(math.sqrt(eps * len(weight))), weight * math.sqrt(len(weight))
        return lambda x: x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor) * gain

    def prepare(self, layer):
        """A layer's tensors, under the names of the modules they come from."""
        m, mlp, p = layer.self_attn, layer.mlp, SimpleNamespace()
        p.input_norm = self.norm_of(layer.input_layernorm, self.embed)
        p.post_norm = self.norm_of(layer.post_attention_layernorm, self.embed)
        p.low_rank = hasattr(m, "q_a_proj")
        q, o = (m.q_b_proj if p.low_rank else m.q_proj).weight, m.o_proj.weight
        if m.R <= min(m.nope, m.v):  # W_UK and W_UV become part of projections that do not grow by it
            w_uk, w_uv = m.absorbed_weights(q.dtype)
            q_nope, q_rope = q.view(m.H, m.nope + m.rope, -1).split([m.nope, m.rope], dim=1)
            q = torch.cat((w_uk.mT @ q_nope, q_rope), dim=1).flatten(0, 1)  # (H * (R + rope), q_lora | C)
            o = (o.view(-1, m.H, m.v).transpose(0, 1) @ w_uv.mT).transpose(0, 1).flatten(1)  # (C, H * R)
            p.w_uk = p.w_uv = None
        else:
            p.w_uk, p.w_uv = m.absorbed_weights(self.dtype)
        p.w_in = self.cast(m.q_a_proj.weight if p.low_rank else q, m.kv_a_proj_with_mqa.weight)
        p.widths = [len(p.w_in) - m.R - m.rope, m.R, m.rope]
        if p.low_rank:
            p.q_norm, p.q_b = self.norm_of(m.q_a_layernorm, p.w_in), self.cast(q)
        p.kv_norm, p.o = self.norm_of(m.kv_a_layernorm, p.w_in), self.cast(o)
        p.dense, p.router = mlp, None
        if isinstance(mlp, MoE):
            p.dense, p.router = getattr(mlp, "shared_experts", None), mlp.gate
            p.scores = mlp.gate.weight.float()
            p.experts = copy.copy(mlp.experts)  # the same code over weights of our dtype
            p.experts._parameters = {name: self.cast(w) for name, w in mlp.experts.named_parameters()}
        if p.dense is not None:
            p.gate_up = self.cast(p.dense.gate_proj.weight, p.dense.up_proj.weight)
            p.down = self.cast(p.dense.down_proj.weight)
        return p

    @torch.inference_mode()
    def step(self, token, cache):
        """Ids (B,) -> logits (B, V); the cache grows by one."""
        n, padding, seen = cache.length, cache.padding, None
        if self.compiled:
            cache.reserve(n + 1)
            padding = token.new_zeros(len(token)) + (0 if padding is None else padding)  # always alike
            logits = self.compiled(token, torch.tensor([n], device=token.device), padding, cache.buffers)
        else:
            if n >= len(self.cos):
                self.cos, self.sin = rope_table(torch.arange(2 * n + 64, device=token.device), *self.rope)
            cos, sin = self.cos[n], self.sin[n]  # (1, rope)
            if padding is not None:
                cos, sin = self.cos[n - padding], self.sin[n - padding]  # (B, 1, rope)
                seen = torch.arange(n + 1, device=token.device) >= padding[:, None]  # (B, S)
            logits = self.logits(token, cos, sin, seen, cache.update)
        cache.length += 1
        return logits

    def static(self, token, n, padding, buffers):
        """A step for torch.compile, in shapes that stay as they are: n (1,) is a tensor, attention reads the
        cache's whole buffers, and what is not written yet is masked."""
        place = torch.arange(buffers[0].shape[1], device=n.device)
        seen = (place <= n) & (place >= padding[:, None])  # (B, S)
        rotary = rope_table(n - padding, *self.rope)  # (B, 1, rope)
        return self.logits(token, *rotary, seen, lambda layer, new: buffers[layer].index_copy_(1, n, new))

    def logits(self, token, cos, sin, seen, update):
        """The model itself; update(layer, new (B, 1, R + rope)) gives all latents of a layer."""
        x = F.embedding(token, self.embed)  # (B, C)
        with torch.autocast(x.device.type, enabled=False) if autocast_dtype(x) else nullcontext():
            for number, p in enumerate(self.layers):
                h = p.input_norm(x).to(self.dtype)
                x = x + self.attention(h, p, cos, sin, seen, update, number)
                x = x + self.ffn(p.post_norm(x).to(self.dtype), p)
            return product(self.norm(x).to(self.dtype), self.lm_head.T)

    def attention(self, h, p, cos, sin, seen, update, number):
        """MLA.forward for a single query, (B, C) -> (B, C)."""
        B, H = len(h), self.H
        q, c_kv, k_rope = F.linear(h, p.w_in).split(p.widths, dim=1)
        if p.low_rank:
            q = F.linear(p.q_norm(q), p.q_b)
        q_nope, q_rope = q.view(B, H, -1).tensor_split([-self.rope_dim], dim=2)
        rope = torch.cat((q_rope, k_rope.unsqueeze(1)), dim=1)  # of all queries and the key
        rope = rotate(rope, cos, sin)  # (B, H + 1, rope)
        new = torch.cat((p.kv_norm(c_kv), rope[:, H]), dim=1)
        latent = update(number, new.unsqueeze(1)).to(h.dtype)  # (B, S, R + rope)
        return F.linear(attend_absorbed(q_nope, rope[:, :H], latent, p.w_uk, p.w_uv, self.scale, seen), p.o)

    def ffn(self, h, p):
        """Dense FFN, or experts and shared expert, (B, C) -> (B, C)."""
        y = 0
        if p.dense is not None:
            gate, up = F.linear(h, p.gate_up).chunk(2, dim=1)
            y = F.linear(F.silu(gate) * up, p.down)
        if p.router is None:
            return y
        chosen_weights = p.router.choose(F.linear(h.float(), p.scores).sigmoid())
        return y + p.experts(h, *chosen_weights)[0]


class KimiK2(nn.Module):
    """The whole model. State-dict names are the published checkpoint's, experts stacked.

    While training (training mode and gradients on), a forward pass leaves behind
      max_logits (L, H)        largest softmax input of each head since the last optimizer step
      expert_load (L_moe, E)   tokens that each expert saw since then
      aux_loss                 sum over layers of V3's sequence-wise balance loss, to be weighted
    MuonClip reads and clears the first two.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.aux_loss = cfg, 0.0
        self.recompute = "off"  # "blocks": of each only its input is kept; "parts": see keep_products
        self.compile_decode = False  # generate by compiled code: a wait at first, and for each new size
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(cfg.vocab_size, cfg.hidden_size),
            "layers": nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_hidden_layers)),
            "norm": RMSNorm(cfg.hidden_size, cfg.rms_norm_eps),
        })
        self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size)
        L, n_moe = cfg.num_hidden_layers, cfg.num_hidden_layers - cfg.first_k_dense_replace
        self.register_buffer("max_logits", torch.empty(L, cfg.num_attention_heads), persistent=False)
        self.register_buffer("expert_load", torch.empty(n_moe, cfg.n_routed_experts), persistent=False)
        self.register_buffer("rope_w", torch.empty(cfg.qk_rope_head_dim // 2), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, normal=torch.Tensor.normal_):
        """Embedding, every matrix: N(0, initializer_range). Norm gains: 1. Router biases: 0."""
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            else:
                for weight in module.parameters(recurse=False):
                    normal(weight, 0.0, self.cfg.initializer_range)
            if isinstance(module, Router):
                module.e_score_correction_bias.zero_()
        self.init_buffers()

    def init_buffers(self):
        """What no checkpoint holds: the rotary frequencies and the records of the current step."""
        w, self.rope_factor = rope_frequencies(self.cfg)
        self.rope_w.copy_(w)
        self.max_logits.fill_(-math.inf)
        self.expert_load.zero_()

    def set_context(self, length, rope_scaling):
        """Mean the model for contexts of `length` tokens, with YaRN's dictionary or None for plain RoPE.

        No weight changes: only the frequencies of RoPE and the softmax scale do (R 2.5).
        """
        self.cfg = dataclasses.replace(self.cfg, max_position_embeddings=length, rope_scaling=rope_scaling)
        w, self.rope_factor = rope_frequencies(self.cfg)
        self.rope_w.copy_(w)
        for layer in self.model.layers:
            layer.self_attn.scale = softmax_scale(self.cfg)

    def hidden(self, tokens, cache=None, absorb=None, document=None, position=None):
        """Ids (B, T) -> normalised hidden states (B, T, C), those that lm_head reads.

        `document` (B, T) numbers the texts of a row, one after another: none sees another. RoPE knows only
        distances, so each is read as if it stood alone. With `position` (B, T) they go on from one
        beginning, document 0, which all of them see: many answers to a prompt for the price of one prompt.
        """
        try:
            x = self.model.embed_tokens(tokens)
        except IndexError:
            bad = tokens[(tokens < 0) | (tokens >= self.cfg.vocab_size)][0].item()
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.cfg.vocab_size}") from None
        past, padding = (cache.length, cache.padding) if cache is not None else (0, None)
        T, branches = tokens.shape[1], position is not None
        if not branches:
            position = torch.arange(past, past + T, device=x.device)
        if padding is not None:
            position = (position - padding[:, None]).clamp_(min=0)  # (B, T)
        rotary = rope_table(position, self.rope_w, self.rope_factor)
        if document is None:
            mask = causal_mask(T, past + T, padding, x.device)
        elif branches:
            mask = (document_mask(document) | (document == 0)[:, None, None]).tril()
        else:
            mask = document_mask(document) if absorb else document
        record = self.training and torch.is_grad_enabled() and cache is None
        kept = {"context_fn": keep_products(self.cfg)} if self.recompute == "parts" else {}
        s_max, routing = [], []
        for layer in self.model.layers:
            arguments = (x, rotary, mask, cache, absorb, record)
            if cache is not None:  # a compiled block is for training: here every length would compile anew
                x, s, r = layer.forward(*arguments)
            elif self.recompute == "off" or not torch.is_grad_enabled():
                x, s, r = layer(*arguments)
            else:
                x, s, r = checkpoint(layer, *arguments, use_reentrant=False, **kept)
            s_max.append(s)
            routing.append(r)
        if cache is not None:
            cache.length += T
        if record and torch._C._current_graph_task_id() == -1:  # inside backward it is a recomputation
            if s_max[0] is not None:
                torch.maximum(self.max_logits, torch.stack(s_max), out=self.max_logits)
            if routing := [r for r in routing if r is not None]:
                load, aux = zip(*routing)
                self.expert_load += torch.stack(load)
                self.aux_loss = torch.stack(aux).sum()
        return self.model.norm(x)

    def forward(self, tokens, targets=None, cache=None, absorb=None):
        """Logits (B, T, V), and the mean cross-entropy in nats, or None without targets.

        targets[:, t] is the token after tokens[:, t]; -100 is ignored. `absorb` picks the form of
        attention: True, False, or None for whichever needs less arithmetic.
        """
        logits = self.lm_head(self.hidden(tokens, cache, absorb))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        return logits, loss / (targets != -100).sum().clamp(min=1)

    def loss(self, tokens, targets, document=None):
        """The same mean cross-entropy as `self(tokens, targets)`, with less memory and time: for training."""
        asked = (targets != -100).flatten().nonzero()[:, 0]  # most of a chat has no target, so no logits
        h = self.hidden(tokens, document=document).flatten(0, 1).index_select(0, asked)
        dtype = autocast_dtype(h) or h.dtype
        total = HeadLoss.apply(h.to(dtype), self.lm_head.weight.to(dtype), targets.flatten()[asked])
        return total / max(1, len(h))

    @torch.inference_mode()
    def stream(self, tokens, cache, temperature=0.6, top_p=1.0, generator=None):
        """Endless continuation: yields the next token of each row, (B,), and feeds it back.

        Send it the numbers of rows, and only those go on.
        """
        logits = self.lm_head(self.hidden(tokens, cache)[:, -1])
        decoder = Decoder(self)
        while True:
            token = sample_token(logits, temperature, top_p, generator)
            rows = yield token
            if rows is not None:
                token, cache = token[rows], cache.select(rows)
            logits = decoder.step(token, cache)

    def generate(self, tokens, max_new_tokens=64, temperature=0.6, top_p=1.0, stop=(), generator=None):
        """Continue prompts until `max_new_tokens` or a token of `stop` (an id or several).

        A (B, T) tensor gives (B, T + new), finished rows filled up with [PAD], the last id. A list of
        prompts of different lengths gives a list of 1-D tensors, each cut after its stop token.
        Temperature 0 takes the likeliest token; `generator` seeds the draws.
        """
        device, pad = self.lm_head.weight.device, self.cfg.vocab_size - 1
        if not 0 < top_p <= 1 or temperature < 0:
            raise ValueError(f"top_p must be in (0, 1], temperature not negative, got {top_p}, {temperature}")
        ragged = not isinstance(tokens, torch.Tensor)
        tokens, padding = left_pad(tokens, pad, device) if ragged else (tokens.to(device), None)
        (B, T), dtype = tokens.shape, autocast_dtype(self.lm_head.weight) or self.lm_head.weight.dtype
        if T == 0:
            raise ValueError("a prompt must hold at least one token; [BOS] starts a new text")
        exact = None if self.compile_decode else T + max_new_tokens  # compiled code is for few sizes
        cache = LatentCache(self.cfg, B, exact, device, dtype)
        cache.reserve(T + max_new_tokens)
        cache.padding = padding if ragged and padding.any() else None
        stop = torch.tensor([stop] if isinstance(stop, int) else list(stop), dtype=torch.long, device=device)
        new = tokens.new_full((B, max_new_tokens), pad)
        row, done, going, used = torch.arange(B, device=device), tokens.new_zeros(B).bool(), None, 0
        continuation = self.stream(tokens, cache, temperature, top_p, generator)
        while used < max_new_tokens and len(row):
            token = continuation.send(going)
            new[row, used] = token.masked_fill(done, pad)
            going, used = None, used + 1
            if len(stop):
                done = done | torch.isin(token, stop)
                if done.sum() >= len(done) / (1 if self.compile_decode else 2):
                    # the half that goes on need not carry the other, unless compiled code wants its shape
                    going = (~done).nonzero()[:, 0]
                    row, done = row[going], done[going]
        out = torch.cat((tokens, new[:, :used]), dim=1)
        if not ragged:
            return out
        return [_cut_after(row[skip:], T - skip, stop) for row, skip in zip(out, padding.tolist())]


# ==================================================================================================
# 7  MuonClip (R 2.1, Algorithm 1, App. D, E; ML)
# ==================================================================================================
# Muon replaces a matrix's momentum by the nearest orthogonal matrix, so that every direction gets an
# update of the same size:
#
#     M = mu M + G     O = NewtonSchulz(M) * 0.2 sqrt(max(n, m))     W = W - lr (O + lambda W)
#
# 0.2 sqrt(max(n, m)) gives the update AdamW's usual RMS, so AdamW's learning rate and decay carry
# over. Embedding, head and norm gains, which are no maps from one space to another, stay with AdamW.
#
# Muon lets attention logits grow without bound. QK-Clip stops that: after the update, each head whose
# largest softmax input S_max exceeded tau has its query and key weights scaled down, so that its
# logits shrink by gamma = tau / S_max:   q_nope, k_nope by sqrt(gamma);   q_rope by gamma, because its
# partner k_rope is shared by all heads and must not move.


@onednn()
def newton_schulz(G, steps=5, dtype=None):
    """Nearest (semi-)orthogonal matrices of G (..., n, m), all singular values near 1 (0.7 to 1.2).

    Each step maps every singular value s to a s + b s^3 + c s^5; the coefficients are ML's, tuned
    for speed, not for landing on exactly 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(dtype or G.dtype).reshape(-1, *G.shape[-2:])
    tall = X.shape[-2] > X.shape[-1]  # the smaller Gram matrix is cheaper
    X = X.mT if tall else X
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # now no singular value exceeds 1
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).reshape(G.shape).to(G.dtype)


ADAMW_PARAMETERS = re.compile(
    r"model\.embed_tokens\.weight|lm_head\.weight|(.*\.)?norm\.weight|.*layernorm\.weight"
)
MUON_PARAMETERS = re.compile(r".*_proj(_with_mqa)?(\.weight)?|.*\.gate\.weight")  # the router too: our choice


class MuonClip(torch.optim.Optimizer):
    """K2's optimizer for a `KimiK2`; kind "muon" leaves out QK-Clip, "adamw" is AdamW throughout.

    Matrices of one shape, experts included, are orthogonalised as one batch. The momentum is kept as
    buffer = mu buffer + (1 - mu) G, torch.optim.Muon's form: Newton-Schulz removes the factor.
    Nesterov's look-ahead is ML's practice (K2: UNCONFIRMED). `bias_update_rate` is V3's u (K2:
    UNCONFIRMED). Newton-Schulz runs in `ns_dtype`, by default bf16 on CUDA and fp32 elsewhere.
    step() updates, clips, moves the router biases, then clears the model's records; `max_logits`
    (L, H) keeps the step's S_max as it was before the clip, `expert_load` (L_moe, E) its loads.
    """

    portion = 2**27  # elements that are orthogonalised at one time, where a parameter has no more

    def __init__(self, model, lr=2e-4, weight_decay=0.1, momentum=0.95, tau=100.0, kind="muonclip", *,
                 betas=(0.9, 0.95), eps=1e-8, nesterov=True, ns_steps=5, ns_dtype=None,
                 bias_update_rate=1e-3):
        if kind not in ("muonclip", "muon", "adamw"):
            raise ValueError(f"kind must be 'muonclip', 'muon' or 'adamw', got {kind!r}")
        if not (lr >= 0 and weight_decay >= 0 and 0 <= momentum < 1 and tau > 0):
            given = f"lr {lr}, weight_decay {weight_decay}, momentum {momentum}, tau {tau}"
            raise ValueError(f"impossible settings: {given}")
        by_muon, by_adamw = [], []
        for name, p in self.named_parameters(model):
            muon, adamw_too = MUON_PARAMETERS.fullmatch(name), ADAMW_PARAMETERS.fullmatch(name)
            if bool(muon) == bool(adamw_too):
                raise ValueError(f"no rule says whether Muon or AdamW updates {name} {tuple(p.shape)}")
            (by_muon if muon and kind != "adamw" else by_adamw).append(p)
        groups = [
            dict(params=by_muon, rule="muon", momentum=momentum, nesterov=nesterov, ns_steps=ns_steps),
            dict(params=by_adamw, rule="adamw", betas=betas, eps=eps),
        ]
        common = dict(lr=lr, weight_decay=weight_decay)
        super().__init__([group for group in groups if group["params"]], common)
        self.model, self.tau, self.clip = model, tau, kind == "muonclip"
        self.ns_dtype, self.bias_update_rate = ns_dtype, bias_update_rate
        self.max_logits = torch.full_like(model.max_logits, -math.inf)
        self.expert_load = torch.zeros_like(model.expert_load)

    def named_parameters(self, model):
        """What is updated, by name."""
        return model.named_parameters()

    def parameter_of(self, p):
        """The model's parameter of which p holds some rows, or is all."""
        return p

    @torch.no_grad()
    def step(self, closure=None):
        """One update of everything. Returns what `closure`, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["rule"] == "muon":
                self._muon(params, group)
            elif params:
                self._adamw(params, group)
        self._read_records()
        if self.clip:
            self._qk_clip()
        self._balance()
        self.model.max_logits.fill_(-math.inf)
        self.model.expert_load.zero_()
        return loss

    def _muon(self, params, group):
        mu = group["momentum"]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers, grads = [self.state[p]["momentum_buffer"] for p in params], [p.grad for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - mu)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        self._add_updates(params, group)

    def _updates(self, params, group):
        """What becomes orthogonal: the momentum, or how it will be after one more such gradient."""
        grads, buffers = zip(*((p.grad, self.state[p]["momentum_buffer"]) for p in params))
        return torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers

    def _add_updates(self, params, group):
        """Portion by portion, or the temporary copies would take as much memory as the parameters."""
        portions, size = [], math.inf
        for p in sorted(params, key=lambda p: p.shape[-2:]):
            size += p.numel()
            if size > self.portion:
                portions.append([])
                size = p.numel()
            portions[-1].append(p)
        for some in portions:
            self._add_orthogonal(some, self._updates(some, group), group)

    def _add_orthogonal(self, params, updates, group):
        """W -= lr 0.2 sqrt(max(n, m)) NewtonSchulz(update), for lists of both."""
        lr, same_shape = group["lr"], {}
        for p, update in zip(params, updates):
            same_shape.setdefault(p.shape[-2:], []).append((p, update))
        dtype = self.ns_dtype or (torch.bfloat16 if params[0].is_cuda else torch.float32)
        for (n, m), pairs in same_shape.items():
            batch = torch.cat([update.reshape(-1, n, m) for _, update in pairs])
            orthogonal = newton_schulz(batch, group["ns_steps"], dtype)
            parts = orthogonal.split([update.numel() // (n * m) for _, update in pairs])
            parts = [part.view_as(p) for part, (p, _) in zip(parts, pairs)]
            torch._foreach_add_([p for p, _ in pairs], parts, alpha=-lr * 0.2 * math.sqrt(max(n, m)))

    def _adamw(self, params, group):
        for p in params:
            if not self.state[p]:
                step, m, v = torch.zeros((), device=p.device), torch.zeros_like(p), torch.zeros_like(p)
                self.state[p].update(step=step, exp_avg=m, exp_avg_sq=v)
        m, v, steps = ([self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adamw(
            params, [p.grad for p in params], m, v, [], steps, amsgrad=False, maximize=False,
            fused=params[0].device.type in ("cpu", "cuda", "mps"), beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"],
        )

    def _read_records(self):
        """S_max and loads of the step, over all micro-batches and all data-parallel ranks."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.model.max_logits, dist.ReduceOp.MAX)
            dist.all_reduce(self.model.expert_load, dist.ReduceOp.SUM)
        self.max_logits, self.expert_load = self.model.max_logits.clone(), self.model.expert_load.clone()

    def _qk_clip(self):
        too_large = (self.max_logits > self.tau) & self.max_logits.isfinite()
        gamma = (self.tau / self.max_logits).where(too_large, 1.0)  # (L, H)
        if not bool((gamma < 1).any()):
            return
        for layer, gamma_H in zip(self.model.model.layers, gamma):
            if bool((gamma_H < 1).any()):
                m, root = layer.self_attn, gamma_H.sqrt()[:, None]
                q = m.q_b_proj if hasattr(m, "q_b_proj") else m.q_proj
                q_rows = torch.cat((root.expand(-1, m.nope), gamma_H[:, None].expand(-1, m.rope)), dim=1)
                kv_rows = torch.cat((root.expand(-1, m.nope), torch.ones_like(root).expand(-1, m.v)), dim=1)
                self._scale_rows(q.weight, q_rows.flatten())  # (H * (nope + rope),)
                self._scale_rows(m.kv_b_proj.weight, kv_rows.flatten())  # (H * (nope + v),)

    def _scale_rows(self, weight, factors):
        weight *= factors[:, None]

    def _balance(self):
        """V3 2.1.2: b_i += u * sign(mean load - load_i), layer by layer."""
        routers = [layer.mlp.gate for layer in self.model.model.layers if isinstance(layer.mlp, MoE)]
        for router, load in zip(routers, self.model.expert_load):
            router.e_score_correction_bias += self.bias_update_rate * (load.mean() - load).sign()


# ==================================================================================================
# 8  Checkpoints in Hugging Face's layout
# ==================================================================================================
# A folder with config.json, weights in *.safetensors (one tensor per expert, an index when there are
# several files), the tokenizer and the chat template: what `transformers`, vLLM and SGLang read, and
# what Moonshot publishes. Published K2 weights are fp8 in blocks of 128 x 128 with a scale each.


def _hf_names(state):
    """(Hugging Face name, our name, expert or None) for each tensor of a checkpoint."""
    for name, tensor in state.items():
        if ".mlp.experts." in name:
            for e in range(tensor.shape[0]):
                yield name.replace(".experts.", f".experts.{e}.") + ".weight", name, e
        else:
            yield name, name, None


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(tok, folder, context):
    tok.save(folder)
    (folder / "tokenizer.json").write_text(tok.to_tokenizer_json(), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    names = {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, **names}
    _write_json(folder / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": False})


def whole_of(tensor):
    """A tensor, or all of the one of which this process has a shard: then every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _write_weights(state, folder, max_shard_bytes):
    shards, size = [[]], 0
    for hf, name, e in _hf_names(state):
        n_bytes = state[name].nbytes // (1 if e is None else len(state[name]))
        if size + n_bytes > max_shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((hf, name, e))
        size += n_bytes
    where, total, whole = {}, 0, functools.lru_cache(1)(lambda name: whole_of(state[name]))
    for number, entries in enumerate(shards, 1):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {hf: (whole(n) if e is None else whole(n)[e]).cpu().contiguous() for hf, n, e in entries}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, above all
            raise OSError(str(error)) from None
        where.update(dict.fromkeys(tensors, file))
        total += sum(t.nbytes for t in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def save_pretrained(model, tok, folder, max_shard_bytes=5 * 10**9, state=None):
    """Write model and tokenizer (or None) to `folder`. It appears complete or not at all: an older
    one there is replaced only once the new one is on disk. `state` stands in for the model's state dict;
    DTensors in it are gathered one at a time, in its order."""
    vocab_size = model.cfg.vocab_size
    if tok is not None and tok.n_vocab != vocab_size:
        raise ValueError(f"the tokenizer has {tok.n_vocab} ids, the model's vocab_size is {vocab_size}")
    folder = Path(folder).resolve()  # through a symbolic link
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds other files; a model is saved to a folder of its own")
    if old.exists() and not folder.exists():  # killed between the two renames below
        os.replace(old, folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        _write_weights(state or model.state_dict(), new, max_shard_bytes)
        dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
        _write_json(new / "config.json", {**model.cfg.to_json(), "torch_dtype": dtype})
        _write_json(new / "generation_config.json", {"eos_token_id": vocab_size - 254})  # <|im_end|>
        if tok is not None:
            _write_tokenizer(tok, new, model.cfg.max_position_embeddings)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"could not save {folder}: {error}; what was there before is untouched") from None
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _open_weights(folder):
    """The open file that holds each tensor: {name: file}."""
    files, paths = {}, sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no *.safetensors files in {folder}")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is no index of safetensors files ({error!r})") from None
        if lost := sorted(named - {path.name for path in paths}):
            raise FileNotFoundError(f"{index} names files that are not there: {', '.join(lost)}")
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or cut short ({error}); fetch or save it again") from None
        files.update(dict.fromkeys(file.keys(), file))
    return files


def _read_tensor(files, name, folder):
    """One tensor, fp8 blocks multiplied out to bf16 (V3's weight_scale_inv, one per 128 x 128)."""
    tensor, scale_name = files[name].get_tensor(name), name + "_scale_inv"
    if tensor.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return tensor
    blocks = tuple(math.ceil(d / 128) for d in tensor.shape)
    scale = files[scale_name].get_tensor(scale_name).float() if scale_name in files else None
    if scale is None or scale.shape != blocks:
        got = "there is none" if scale is None else f"it is {tuple(scale.shape)}"
        raise ValueError(f"{folder}: the fp8 tensor {name} needs {scale_name} of shape {blocks}, {got}")
    scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (tensor.float() * scale[: tensor.shape[0], : tensor.shape[1]]).bfloat16()


def load_pretrained(folder, device="cpu", dtype=None, shard=None):
    """(model, tokenizer) from a folder in Hugging Face's layout; the tokenizer is None without a rank
    file. Weights stream into place, so no second copy is held; `dtype` None keeps the files' own.
    `shard(model)` may leave this process only some rows of some tensors, and returns {name: first row}.
    A missing, unknown or damaged tensor raises ValueError; nothing is ever unpickled."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder at {folder}")
    cfg = KimiConfig.from_json(folder / "config.json")
    with torch.device("meta"):
        model = KimiK2(cfg)
    files = _open_weights(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    targets = {hf: (name, e) for hf, name, e in _hf_names(model.state_dict())}
    missing, unknown = sorted(targets.keys() - files.keys()), sorted(files.keys() - targets.keys())
    unknown = [name for name in unknown if not name.endswith((".weight_scale_inv", ".rotary_emb.inv_freq"))]
    if missing or unknown:
        lost, more = f"{len(missing)} tensors missing {missing[:3]}", f"{len(unknown)} unknown {unknown[:3]}"
        raise ValueError(f"{folder} does not hold this model: {lost}, {more}")
    dtype = dtype or _read_tensor(files, "model.embed_tokens.weight", folder).dtype
    for p in model.parameters():  # router biases and records stay fp32
        p.data = p.data.to(dtype)
    first_rows = shard(model) if shard else {}
    model.to_empty(device=device)
    model.init_buffers()
    state = {name: t.to_local() if hasattr(t, "to_local") else t for name, t in model.state_dict().items()}
    with torch.no_grad():
        for hf, (name, e) in targets.items():
            target, first, shape = state[name], first_rows.get(name, 0), shapes[name]
            if e is not None:
                if not first <= e < first + len(target):
                    continue
                target, first, shape = target[e - first], 0, shape[1:]
            tensor = _read_tensor(files, hf, folder)
            if tensor.shape != shape:
                raise ValueError(f"{folder}: {hf} is {tuple(tensor.shape)}, not {tuple(shape)}")
            target.copy_(tensor[first : first + len(target)])
    return model.eval(), Tokenizer.load(folder) if (folder / "tiktoken.model").exists() else None
