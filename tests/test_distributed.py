"""Many processes give what one gives: real ones, started by torchrun, gloo on CPU.

This file is also what they run: `torchrun tests/test_distributed.py FOLDER`.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from kimi_k2 import KimiConfig, load_pretrained

ROOT = Path(__file__).parents[1]
CFG = KimiConfig.preset("nano", n_routed_experts=8)
STEPS = 20


class Sentences:
    """A token file's batches without a file: rows that can be learned, each step its own."""

    def batch(self, step, rows, length, mine):
        start = torch.randint(0, 500, (rows, 1), generator=torch.Generator().manual_seed(step))
        ids = (start + torch.arange(length + 1) * (1 + start % 3)) % 500
        ids = ids[mine.start : mine.stop]
        targets = ids[:, 1:].clone()
        targets[:, : length // 4] = torch.where(ids[:, :1] % 2 > 0, -100, targets[:, : length // 4])
        return ids[:, :-1], targets


def run_of(**more):
    return train.configure({"preset": "nano", "batch_size": 8, "micro_batch": 2, "tau": 0.06, **more}, {})[0]


def train_some(ranks, run, rows=8, steps=STEPS, start=0, resume=None):
    """(job, model, optimizer, rows of the log) of a few steps."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    job = train.Job(run, CFG, None, torch.device("cpu"), None, None, ranks)
    model = ranks.build(CFG)
    opt = ranks.optimizer(model, lr=6e-3, tau=run.tau, bias_update_rate=1e-2)
    if resume:
        resume(model, opt)
    log = []
    for step in range(start, steps):
        batch = Sentences().batch(step, rows, 64, ranks.rows(rows))
        log.append(train.train_step(model, opt, job, batch, 6e-3))
        if step == 0:
            first = {name: train.whole_of(tensor).clone() for name, tensor in ranks.state(model).items()}
            log[0]["first"] = first
    return job, model, opt, log
