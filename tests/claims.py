"""What the report claims of pretraining, measured on text with `tiny`: runs of `train.pretrain` side by side.

    python tests/claims.py runs/toy                              all claims, three seeds
    python tests/claims.py runs/toy --claims muon --steps 400    one of them, longer runs

Text and vocabulary are those of a run of train.py. Results are kept in --out; what is there is not measured
again.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from kimi_k2 import KimiConfig, Tokenizer, count_parameters  # noqa: E402

TEXT = {"web": 0.4, "code": 0.3, "math": 0.15, "knowledge": 0.15}
ADAMW = [(lr, decay) for decay in (0.1, 0.01) for lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)]
MUONCLIP = (3e-3, 6e-3, 1e-2, 2e-2)
EXPERTS = (2, 4, 8, 16, 48, 96)  # of which two are active: sparsity 1 to 48


class Lab:
    """Pretraining runs on the text of `run`; each leaves its figures in `out`."""

    def __init__(self, run, out, steps, seeds):
        self.run, self.out, self.steps, self.seeds = run, out, steps, seeds

    def pretrained(self, seed, share=1.0, experts=16, **changes):
        """{"bpb", "max_logit", "clipped", "seconds"} of a run with `share` of the steps."""
        steps = round(share * self.steps)
        given = {"preset": "tiny", "seed": seed, "steps": steps, "drill_steps": 0, "anneal_steps": 0,
                 "long_steps": 0, "yarn_steps": 0, "eval_every": steps, "save_every": steps, "threads": 1,
                 "device": "cpu", **changes}
        name = "_".join([str(experts), *(f"{key}={given[key]}" for key in ("seed", "steps", *changes))])
        folder = self.out / name
        path = self.out / f"{name}.json"
        if not path.exists():
            shutil.rmtree(folder, ignore_errors=True)
            tok, data = Tokenizer.load(self.run / "tiktoken.model"), train.TokenFiles(self.run / "data", TEXT)
            model = {"n_routed_experts": experts, "vocab_size": tok.n_vocab}
            run, cfg = train.open_run({**given, "out": str(folder)}, model, False)
            torch.set_num_threads(1)
            began = time.perf_counter()
            with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
                _, facts = train.pretrain(train.Job(run, cfg, folder, torch.device("cpu"), tok, data))
            facts = facts["pretrain"]
            train.write_json(path, {
                "bpb": statistics.mean(facts["val_bpb"][domain] for domain in TEXT),
                "max_logit": facts["max_logit"], "clipped": facts["clipped_heads"],
                "seconds": time.perf_counter() - began})
            shutil.rmtree(folder)
        return json.loads(path.read_text(encoding="utf-8"))

    def over_seeds(self, **settings):
        return [self.pretrained(seed, **settings) for seed in self.seeds]


def spread(found, key="bpb", digits=3):
    """Mean, and the least and largest over seeds."""
    values = [facts[key] for facts in found]
    around = f" ({min(values):.{digits}f} - {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{around}"


def muon(lab):
    """AdamW at its best rate and decay, against MuonClip at its best rate with 0.6 of its tokens."""
    def best(candidates, **settings):
        return min(candidates, key=lambda given: lab.pretrained(lab.seeds[0], **settings, **given)["bpb"])

    adamw = best([{"optimizer": "adamw", "lr": lr, "weight_decay": decay} for lr, decay in ADAMW])
    clip = best([{"lr": lr} for lr in MUONCLIP], share=0.6)
    yield f"AdamW, lr {adamw['lr']:g}, decay {adamw['weight_decay']:g}", spread(lab.over_seeds(**adamw))
    yield f"MuonClip, lr {clip['lr']:g}, 0.6 of the tokens", spread(lab.over_seeds(share=0.6, **clip))
    yield f"MuonClip, lr {clip['lr']:g}, as many tokens", spread(lab.over_seeds(**clip))


def qk_clip(lab):
    """Largest logit and loss, without the clip and with it."""
    for name, kind in (("Muon", "muon"), ("MuonClip, tau 12", "muonclip")):
        found = lab.over_seeds(optimizer=kind)
        yield name, f"largest logit {spread(found, 'max_logit', 1)}, {spread(found)}"


def sparsity(lab):
    """More experts, two of them active: equal arithmetic for a token."""
    for experts in EXPERTS:
        found = lab.over_seeds(experts=experts)
        yield f"sparsity {experts // 2}", f"{spread(found)}, {spread(found, 'seconds', 0)} s"


def latent_cache(lab):
    """Bytes of the cache for a token in bf16, against keys and values of all heads."""
    for name in ("tiny", "k2"):
        cfg = KimiConfig.preset(name)
        latent = count_parameters(cfg).cache_bytes_per_token()
        whole = 2 * cfg.num_hidden_layers * cfg.num_attention_heads * (
            cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim)
        yield name, f"{latent:,} B, {whole / latent:.1f} times less than {whole:,} B"


CLAIMS = {"muon": muon, "qk_clip": qk_clip, "sparsity": sparsity, "latent_cache": latent_cache}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--claims", default=",".join(CLAIMS), help="some of them, separated by commas")
    parser.add_argument("--steps", type=int, default=300, help="of a run of 2,048 tokens each (default 300)")
    parser.add_argument("--seeds", default="0,1,2", help="one or several")
    parser.add_argument("--out", type=Path, help="folder of the results (default: RUN/claims)")
    args = parser.parse_args()
    lab = Lab(args.run, args.out or args.run / "claims", args.steps, [*map(int, args.seeds.split(","))])
    for name in args.claims.split(","):
        print(f"\n{name}: {CLAIMS[name].__doc__}\n\n| what | bits per byte of text |\n|---|---|")
        for cells in CLAIMS[name](lab):
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
