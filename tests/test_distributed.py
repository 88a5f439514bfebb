"""Many processes give what one gives: real ones, started by torchrun, gloo on CPU.

This file is also what they run: see `worker` at the end.
"""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from kimi_k2 import KimiConfig, load_pretrained, whole_of

ROOT = Path(__file__).parents[1]
CPU, STEPS, CFG = torch.device("cpu"), 20, KimiConfig.preset("nano")


def torchrun(n, *arguments, **how):
    """Arguments of subprocess for n processes of one job."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return dict(args=list(map(str, (*command, *arguments))), text=True, env=environment, **how)


def rows_of_text(step, rows, mine, length=32):
    """A batch that can be learned, with other numbers of targets in other rows; rows `mine` of it."""
    start = torch.randint(0, 500, (rows, 1), generator=torch.Generator().manual_seed(step))
    ids = ((start + torch.arange(length + 1) * (1 + start % 3)) % 500)[mine.start : mine.stop]
    targets = ids[:, 1:].clone()
    targets[:, : length // 2] = targets[:, : length // 2].masked_fill(ids[:, :1] % 2 > 0, -100)
    return ids[:, :-1], targets


class Training:
    """A few steps of nano, on one process or many. tau is so low that QK-Clip acts in every step."""

    def __init__(self, ranks):
        run, _ = train.configure({"preset": "nano", "micro_batch": 2, "seq_len": 32, "aux_alpha": 1e-2,
                                  "grad_clip": 0.5}, {})
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.ranks, self.step, self.log = ranks, 0, []
        self.job = train.Job(run, CFG, None, CPU, None, None, ranks)
        self.model = ranks.build(CFG)
        # AdamW's first step is g / (|g| + eps): with 1e-8 it would show the last digits of the smallest g
        self.opt = ranks.optimizer(self.model, tau=0.02, bias_update_rate=1e-2, eps=1e-5)

    def go(self, until, rows=8, recompute="off"):
        self.model.recompute = recompute
        while self.step < until:
            batch = rows_of_text(self.step, rows, self.ranks.rows(rows))
            row = train.train_step(self.model, self.opt, self.job, batch, 6e-3)
            self.log.append({key: row[key] for key in ("loss", "grad_norm", "s_max", "expert_load_max")})
            self.step += 1
        return self

    def weights(self):
        return {name: whole_of(tensor).clone() for name, tensor in self.ranks.state(self.model).items()}

    def save(self, out):
        clipped = self.opt.max_logits > self.opt.tau
        out.mkdir(exist_ok=True)
        progress = train.Progress(self.step, 10 * self.step, 1.5, 0.25, clipped)
        train.Checkpoints(out, "pretrain", self.ranks).save(self.model, self.opt, progress)

    def load(self, out):
        progress = train.Checkpoints(out, "pretrain", self.ranks).load(self.model, self.opt)
        assert (progress.tokens, progress.seconds, progress.max_logit) == (10 * progress.step, 1.5, 0.25)
        assert progress.ever_clipped.all()
        self.step = progress.step
        return self


def far(a, b):
    """The largest difference of two state dicts, each tensor's over its largest value, and where."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().max().item() / max(1e-9, b[name].abs().max().item()), name)
               for name in b)


def assert_same_log(log, expected, limit=1e-4):
    assert len(log) == len(expected)
    for row, other in zip(log, expected):
        for key in ("loss", "grad_norm", "s_max"):
            assert math.isclose(row[key], other[key], rel_tol=limit), (key, row, other)
        assert row["expert_load_max"] == pytest.approx(other["expert_load_max"], abs=0.05)


def results_of(n, folder, *layouts):
    """What `worker` left of n processes, by layout."""
    folder.mkdir(exist_ok=True)
    subprocess.run(**torchrun(n, __file__, folder, *layouts), check=True)
    return {ep: (json.loads((folder / f"log{ep}.json").read_text()),
                 load_file(folder / f"first{ep}.safetensors"),
                 load_file(folder / f"last{ep}.safetensors")) for ep in layouts}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: (log of 20 steps and of one with a single row; weights after the first, after the 20th;
    a checkpoint of the 10th)."""
    training = Training(train.Ranks())
    first, out = training.go(1).weights(), tmp_path_factory.mktemp("alone") / "run"
    training.go(10).save(out)
    last = training.go(STEPS).weights()
    return training.go(STEPS + 1, rows=1, recompute="blocks").log, first, last, out


def check(results, alone, folder):
    log, first, last, _ = alone
    for found, first_found, last_found in results.values():
        assert_same_log(found, log)
        assert far(first_found, first)[0] < 1e-5, far(first_found, first)
        assert far(last_found, last)[0] < 1e-3, far(last_found, last)
    for ep in results:  # exported from shards, and a checkpoint of many that one reads
        exported = load_pretrained(folder / f"model{ep}")[0].state_dict()
        assert far(exported, results[ep][2])[0] == 0
        resumed = Training(train.Ranks()).load(folder / f"run{ep}")
        assert resumed.step == 10
        assert_same_log(resumed.go(STEPS).log, log[10:STEPS])


def test_two_processes_train_as_one(alone, tmp_path):
    """dp 2 and ep 2; one row for two ranks; a checkpoint of one process goes on on two, and of two on one."""
    shutil.copytree(alone[3], tmp_path / "run_of_another")
    check(results_of(2, tmp_path, 1, 2), alone, tmp_path)


@pytest.mark.slow
def test_four_processes_train_as_one(alone, tmp_path):
    """dp 4, dp 2 x ep 2, ep 4; checkpoints of four resumed on one and on two."""
    check(results_of(4, tmp_path / "four", 1, 2, 4), alone, tmp_path / "four")
    shutil.copytree(tmp_path / "four" / "run2", tmp_path / "two" / "run_of_another")
    check(results_of(2, tmp_path / "two", 2), alone, tmp_path / "two")


@pytest.mark.slow
def test_three_processes_have_unequal_shares(alone, tmp_path):
    """No dimension of nano divides by three."""
    check(results_of(3, tmp_path, 1), alone, tmp_path)


def test_every_matrix_has_one_owner_and_none_has_much_more():
    ranks = train.Ranks()
    ranks.size, ranks.rank, ranks.ep = 3, 0, 1
    model = train.KimiK2(KimiConfig.preset("tiny"))
    for p in model.parameters():
        p.to_local = p.detach
    opt = train.ShardedMuonClip(model, ranks)
    by_muon = next(group["params"] for group in opt.param_groups if group["rule"] == "muon")
    assert set(opt.owner) == {p for p in by_muon if p.ndim == 2} and set(opt.owner.values()) == {0, 1, 2}
    work = [0, 0, 0]
    for p, owner in opt.owner.items():
        work[owner] += p.numel() * min(p.shape)
    assert max(work) < 1.1 * min(work)


@pytest.mark.parametrize("flags, message", [(["--ep", "2"], "--ep 2 needs processes"),
                                            (["--ep", "0"], "ep must be at least 1")])
def test_ep_without_processes_is_one_line(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        train.main(["pretrain", "--fast", "--out", str(tmp_path / "run"), *flags])


# -- the command -----------------------------------------------------------------------------------------

FAST = ["--fast", "--max_documents", "4", "--threads", "1", "--needles", "0", "--anneal_steps", "0"]
FAST += ["--long_steps", "0", "--yarn_steps", "0", "--drill_steps", "0"]
STAGES = ["--trajectories", "40", "--tools", "100", "--tool_tasks", "2", "--steps", "20", "--sft_steps", "20"]
STAGES += ["--rl_steps", "1", "--rl_pool", "3", "--rl_tasks", "3"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The whole recipe by one process."""
    out = tmp_path_factory.mktemp("recipe") / "one"
    subprocess.run([sys.executable, str(ROOT / "train.py"), *FAST, *STAGES, "--out", str(out)], check=True)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("ep", [1, 2])
def test_the_recipe_on_two_processes(recipe, tmp_path, ep):
    """Pretraining, fine-tuning and an iteration of RL: the same losses, and the same words were said."""
    out = tmp_path / "two"
    subprocess.run(**torchrun(2, ROOT / "train.py", *FAST, *STAGES, "--out", out, "--ep", ep), check=True)
    rows, expected = ([row for row in train.read_metrics(folder)] for folder in (out, recipe))
    assert [(row["stage"], row["step"]) for row in rows] == [(row["stage"], row["step"]) for row in expected]
    for row, other in zip(rows, expected):
        assert row.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-3)
        for key in ("tokens", "rollout_tokens"):
            assert row.get(key) == other.get(key)
        assert row.get("val_bpb", {}) == pytest.approx(other.get("val_bpb", {}), rel=1e-3)
    assert any(row.get("gather_seconds", 0) > 0 for row in rows)
    for name in ("model_base", "model_sft", "model_rl"):
        a, b = (load_file(folder / name / "model.safetensors") for folder in (out, recipe))
        by_muon = [key for key in a if "norm" not in key and "embed" not in key and "lm_head" not in key]
        assert far({key: a[key] for key in by_muon}, {key: b[key] for key in by_muon})[0] < 1e-3
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("*.new"))


def start(out):
    """A run of 30 steps on two processes."""
    arguments = ["pretrain", *FAST, "--steps", "30", "--save_every", "4", "--out", out]
    return torchrun(2, ROOT / "train.py", *arguments)


def workers(process):
    """Ids of the processes that torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return [int(number) for number in found.split()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on two processes that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(**start(out), check=True)
    return out


def begun(whole, out):
    """The same run, its data made."""
    made_later = ("ckpt", "model*", "metrics*", "report*", "figures")
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns(*made_later))
    return subprocess.Popen(**start(out), stderr=subprocess.PIPE)


def wait_for(process, out, n):
    """Until the log has n lines."""
    while len(train.read_metrics(out)) < n:
        assert process.poll() is None
        time.sleep(0.01)


def assert_ends_like(whole, out):
    """Started again, a run ends with the bytes of the one that was not interrupted."""
    subprocess.run(**start(out), check=True)
    name = "model_base/model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert [row["step"] for row in train.read_metrics(out)] == list(range(31))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("pgrep"), reason="needs pgrep")
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_rank_ends_the_job_and_it_goes_on(whole, tmp_path, seed):
    """kill -9 of a rank at a random moment: the job ends and says so, and goes on, once on one process."""
    rng, out = random.Random(seed), tmp_path / "killed"
    process = begun(whole, out)
    wait_for(process, out, rng.randrange(1, 29))
    time.sleep(rng.random() * 0.3)
    os.kill(rng.choice(workers(process)), signal.SIGKILL)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode != 0 and "exitcode  : -9" in errors
    assert "lost another" in errors and "goes on from the last checkpoint" in errors
    if seed == 2:
        shutil.copytree(out, tmp_path / "one")
        train.main(["pretrain", "--resume", "--out", str(tmp_path / "one")])
        models = [load_file(folder / "model_base/model.safetensors") for folder in (tmp_path / "one", whole)]
        assert far(*models)[0] < 1e-3
    assert_ends_like(whole, out)


@pytest.mark.slow
def test_sigterm_saves(whole, tmp_path):
    """torchrun passes it on; the ranks stop at one step, save, and go on later."""
    process = begun(whole, tmp_path / "stopped")
    wait_for(process, tmp_path / "stopped", 6)
    process.terminate()
    assert "stopped and saved at step" in process.communicate(timeout=300)[1]
    assert_ends_like(whole, tmp_path / "stopped")


def worker(folder, *layouts):
    """Train on the layouts, leave log and weights; go on from another job's checkpoint, if there is one."""
    for ep in map(int, layouts):
        ranks = train.Ranks(CPU, ep)
        training = Training(ranks)
        first = training.go(1).weights()
        training.go(10).save(folder / f"run{ep}")
        last = training.go(STEPS).weights()
        ranks.save_pretrained(training.model, None, folder / f"model{ep}")
        log = training.go(STEPS + 1, rows=1, recompute="blocks").log
        again, _ = load_pretrained(folder / f"model{ep}", CPU, shard=ranks.shard)
        assert far({name: whole_of(tensor) for name, tensor in ranks.state(again).items()}, last)[0] == 0
        if (folder / "run_of_another").exists():
            resumed = Training(ranks).load(folder / "run_of_another")
            assert_same_log(resumed.go(STEPS).log, log[10:STEPS])
        if ranks.first:
            save_file(first, folder / f"first{ep}.safetensors")
            save_file(last, folder / f"last{ep}.safetensors")
            (folder / f"log{ep}.json").write_text(json.dumps(log))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    worker(Path(sys.argv[1]), *sys.argv[2:])
