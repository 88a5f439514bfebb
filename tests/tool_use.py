"""Held-out tasks with tools, by class and by what training knew of the tools, before and after fine-tuning.

    python tests/tool_use.py runs/a runs/b runs/c        mean and spread over runs, 500 tasks a cell

A run is a folder of train.py, best with another --seed each. A task is done if its rubric is met: the state
that the calls left, what the answer says, the calls that were needed.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from kimi_k2 import load_pretrained  # noqa: E402

SPLITS = {"seen": "seen tool", "new": "new tool of a seen domain", "new_domain": "tool of a new domain"}


def measure(out, name, n):
    """{(kind, split): share done} of a model of a run."""
    saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
    run, cfg = train.configure(saved["run"], saved["model"])
    model, tok = load_pretrained(out / name)
    job = train.Job(run, cfg, out, torch.device("cpu"), tok, None)
    cells = [(kind, split) for kind in train.KINDS for split in SPLITS]
    return train.tool_success(model, job, n, cells)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--n", type=int, default=500, help="tasks a cell (default 500)")
    parser.add_argument("--models", default="model_base,model_sft", help="folders of each run to measure")
    args = parser.parse_args()
    print("| task | " + " | ".join(f"{title}, {name}" for name in args.models.split(",")
                                  for title in SPLITS.values()) + " |")
    measured = {name: [measure(out, name, args.n) for out in args.runs] for name in args.models.split(",")}
    print("|---" * (1 + len(SPLITS) * len(measured)) + "|")
    for kind in train.KINDS:
        cells = []
        for found in measured.values():
            for split in SPLITS:
                shares = [shares[kind, split] for shares in found]
                spread = f" ({min(shares):.0%} - {max(shares):.0%})" if len(shares) > 1 else ""
                cells.append(f"{statistics.mean(shares):.1%}{spread}")
        print(f"| {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
