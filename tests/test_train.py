"""The training loop: exact resume, data, schedule, logs, and what bad input gets."""

import contextlib
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SMALL, Run, after, kill_when, run
from safetensors.torch import load_file

import train
from kimi_k2 import KimiConfig, KimiK2, MuonClip, Tokenizer, load_pretrained

ROOT = Path(__file__).parents[1]
ONE_PHASE = """pretrain --fast --threads 1 --tools 20 --needles 0 --drill_steps 0 --anneal_steps 0
--long_steps 0 --yarn_steps 0 --data""".split()


def weights_of(out):
    return (out / "model_base" / "model.safetensors").read_bytes()


def losses_of(out):
    return [row["loss"] for row in train.read_metrics(out) if "loss" in row]


@pytest.fixture(scope="module")
def finished(recipe):
    """An uninterrupted nano run of 60 steps, by `python train.py`."""
    return recipe("pretrain")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of one's own to train on; the toy's corpora take longer to read."""
    path = tmp_path_factory.mktemp("text") / "own.txt"
    sources = (Path(module.__file__).read_text(encoding="utf-8") for module in (json, random, re))
    path.write_text("".join(sources), encoding="utf-8")
    return path


def assert_same_run(a, b):
    def figures(out):
        return [{key: row[key] for key in row if key != "tok_s"} for row in train.read_metrics(out)]

    assert weights_of(a) == weights_of(b)
    assert figures(a) == figures(b) and [row["step"] for row in figures(b)] == list(range(61))
    reports = [json.loads((out / "report.json").read_text()) for out in (a, b)]
    assert reports[0]["pretrain"] == reports[1]["pretrain"]
    assert reports[0]["long_context"] == reports[1]["long_context"]
    assert not list(b.rglob("*.tmp"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals and file-size limits")
def test_interrupted_in_every_way_ends_bit_identical(finished, tmp_path):
    """One run is killed, stopped and out of disk space, each time somewhere else, and goes on each time."""
    out = tmp_path / "run"
    ckpt = out / "ckpt"

    def checkpoints():
        return sorted(ckpt.glob("pretrain_*[0-9]"))

    # kill -9 while data is prepared
    assert kill_when((out / "tiktoken.model").exists, "pretrain", *SMALL, "--out", out)
    assert not (out / "data" / "index.json").exists()

    # Ctrl-C in the middle: a clear line, and a checkpoint; a start with the same settings continues as well
    started = Run("pretrain", *SMALL, "--out", out)
    assert started.wait_until(lambda: len(train.read_metrics(out)) > 12), started.stderr
    started.send_signal(signal.SIGINT)
    assert started.wait().returncode != 0 and "Traceback" not in started.stderr
    stopped = int(started.stderr.split("stopped and saved at step ")[1].split(";")[0])
    assert int(checkpoints()[-1].stem.split("_")[1]) == stopped > 12

    # kill -9 in a step
    assert kill_when(lambda: len(train.read_metrics(out)) > stopped + 7, "pretrain", "--resume", "--out", out)
    good = checkpoints()
    assert len(good) == 2 and not (out / "model_base").exists()

    # a full disk: one line, and the older checkpoint stays
    limited = run("pretrain", "--resume", "--out", out, largest_file=500_000)
    assert limited.returncode != 0 and "could not save" in limited.stderr
    assert "Traceback" not in limited.stderr and checkpoints() == good

    # kill -9 after the checkpoint at the switch to long contexts: the next start makes the switch
    assert kill_when((ckpt / "pretrain_00000050").exists, "pretrain", "--resume", "--out", out)
    for path in checkpoints():
        assert path.stem != "pretrain_00000060"
        if path.stem > "pretrain_00000050":
            shutil.rmtree(path)

    # kill -9 after the last checkpoint, while the model is exported and reported
    assert kill_when((ckpt / "pretrain_00000060").exists, "pretrain", "--resume", "--out", out)

    done = run("pretrain", "--resume", "--out", out)
    assert done.returncode == 0, done.stderr
    assert_same_run(finished, out)
    for path in sorted((finished / "data").iterdir()):
        assert path.read_bytes() == (out / "data" / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_twenty_moments(finished, tmp_path, seed):
    out, rng = tmp_path / "killed", random.Random(seed)
    for _ in range(1 + seed % 2):
        seconds = train.read_report(finished)["seconds"]["total"]
        kill_when(after(rng.uniform(0, 1) * seconds), "pretrain", *SMALL, "--out", out)
    done = run("pretrain", *SMALL, "--out", out)
    assert done.returncode == 0, done.stderr
    assert_same_run(finished, out)


def test_damaged_newest_checkpoint_falls_back(finished, tmp_path):
    """Half of the newest file is gone: the one before it is used, and said so. It is that of the step where
    YaRN begins: the switch is made again."""
    out = shutil.copytree(finished, tmp_path / "damaged")
    before, newest = sorted((out / "ckpt").glob("pretrain_*[0-9]"))
    assert before.name == "pretrain_00000055"
    newest /= "all.safetensors"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    shutil.rmtree(out / "model_base")  # as if killed before the stage was finished
    (out / "report.json").unlink()  # and its figures lost: they are found again
    done = run("pretrain", "--resume", "--out", out)
    assert done.returncode == 0 and "is damaged" in done.stderr
    assert_same_run(finished, out)
    for path in (out / "ckpt").glob("*/*.safetensors"):
        path.write_bytes(b"garbage")
    shutil.rmtree(out / "model_base")
    done = run("pretrain", "--resume", "--out", out)
    assert done.returncode != 0 and "no checkpoint in" in done.stderr and "can be read" in done.stderr


def test_report_and_files_of_a_run(finished):
    out = finished
    report = json.loads((out / "report.json").read_text())
    assert set(report["pretrain"]["val_bpb"]) - {"tools", "drills"} == {"web", "code", "math", "knowledge"}
    assert report["pretrain"]["tokens"] == (50 + 10) * 8 * 64 and report["preset"] == "nano"
    assert {p.name for p in (out / "figures").iterdir()} == {
        "loss.png",
        "max_logit.png",
        "expert_load.png",
        "long_context.png",
    }
    first, last = train.read_metrics(out)[0], train.read_metrics(out)[-1]
    assert sum(last["val_bpb"].values()) < 0.7 * sum(first["val_bpb"].values())
    model, tok = load_pretrained(out / "model")
    assert model.cfg.vocab_size == tok.n_vocab == 512
    state = load_file(sorted((out / "ckpt").glob("*/*.safetensors"))[-1])
    assert torch.equal(state["model.lm_head.weight"], model.lm_head.weight)
    # every optimizer state of every parameter is in the checkpoint
    n_params = len(list(model.parameters()))
    assert {int(k.split(".")[1]) for k in state if k.startswith("optimizer.")} == set(
        range(n_params)
    )


def test_logged_bits_per_byte_against_a_naive_sum(finished):
    """The last line's validation, recomputed token by token in float64 from the exported model."""
    out = finished
    model, tok = load_pretrained(out / "model_base")
    run, cfg = train.configure(json.loads((out / "config.json").read_text())["run"], {})
    data, logged = train.TokenFiles(out / "data"), train.read_metrics(out)[-1]["val_bpb"]
    rows = data.validation("math", train.FINAL_EVAL * run.eval_tokens, run.seq_len)
    nats = n_bytes = 0.0
    with torch.no_grad():
        for tokens, targets in zip(*rows):
            log_p = model(tokens[None])[0][0].double().log_softmax(-1)
            nats -= log_p[torch.arange(len(tokens)), targets].sum().item()
            n_bytes += sum(len(tok.decode_bytes([i])) for i in targets.tolist() if i < len(tok.ranks))
    assert nats / math.log(2) / n_bytes == pytest.approx(logged["math"], rel=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 512])
def test_nats_of_targets_with_few_logits_at_a_time(rows):
    model = KimiK2(KimiConfig.preset("nano")).eval()
    tokens, targets = torch.randint(0, 512, (2, 3, 7))
    targets[0, 2] = targets[2, 6] = -100
    job = train.Job(*[None] * 6)
    job.autocast = contextlib.nullcontext
    with torch.no_grad():
        found = train.nats_of(model, job, tokens, targets, rows)
        log_p = model(tokens)[0].double().log_softmax(dim=-1)
    naive = -log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    torch.testing.assert_close(found.double(), naive, rtol=1e-5, atol=1e-6)


def test_schedule_is_the_reports():
    """Warm-up to the peak, constant for 64.5 %, cosine to a tenth: at K2's own numbers."""
    run, _ = train.configure({"preset": "k2"}, {})
    lr = [train.wsd(step, run) for step in (0, 249, 499, 500, 148_000)]
    assert lr == pytest.approx([2e-4 / 500, 1e-4, 2e-4, 2e-4, 2e-4])
    tokens = 16_384 * 4096
    assert run.steps * tokens == pytest.approx(15.5e12, rel=1e-5)
    start = 10e12 / tokens
    for x in (0.25, 0.5, 1.0):
        expected = 2e-5 + 0.5 * (2e-4 - 2e-5) * (1 + math.cos(math.pi * x))
        assert train.wsd(round(start + x * 5.5e12 / tokens), run) == pytest.approx(
            expected, rel=1e-3
        )


def tiny_job(**over):
    run, cfg = train.configure({"preset": "nano", **over}, {})
    torch.manual_seed(0)
    model = KimiK2(cfg)
    return (
        train.Job(run, cfg, None, torch.device("cpu"), None, None),
        model,
        MuonClip(model, lr=run.lr),
    )


def test_micro_batches_do_not_change_the_step():
    """8 sequences at once or 2 at a time, with unequal numbers of targets: the same gradients."""
    tokens = torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, 1).clone()
    targets[:3, 5:] = -100
    gradients = []
    for micro in (8, 2):
        job, model, opt = tiny_job(micro_batch=micro)
        kept = {}
        opt.register_step_pre_hook(
            lambda o, *_, kept=kept, model=model: kept.update(
                {n: p.grad.clone() for n, p in model.named_parameters()}
            )
        )
        row = train.train_step(model, opt, job, (tokens, targets), 1e-3)
        gradients.append((row["loss"], kept))
    (loss_a, a), (loss_b, b) = gradients
    assert loss_a == pytest.approx(loss_b, rel=1e-6)
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 1e-5 * a[name].abs().max(), name


def test_nan_stops_before_the_update():
    """The message names step, S_max, layer and head; weights and optimizer are as before."""
    job, model, opt = tiny_job()
    batch = (torch.zeros(8, 64, dtype=torch.long), torch.zeros(8, 64, dtype=torch.long))
    model.model.layers[1].self_attn.q_b_proj.weight.data[:30] = math.inf
    before = model.lm_head.weight.clone()
    with pytest.raises(train.Broken, match=r"loss nan.*S_max.*layer 1, head 0.*--lr"):
        train.train_step(model, opt, job, batch, 1e-3)
    assert torch.equal(before, model.lm_head.weight) and not opt.state


def test_exploding_run_names_the_step_and_keeps_the_checkpoint(text, tmp_path):
    out = tmp_path / "hot"
    with pytest.raises(SystemExit, match=r"stopped at step \d+: loss .* Try a smaller --lr"):
        train.main([*ONE_PHASE, str(text), "--out", str(out), "--lr", "50", "--warmup", "30",
                    "--save_every", "1"])
    assert list((out / "ckpt").glob("pretrain_*[0-9]"))


# --- data -------------------------------------------------------------------------------------------


def own_run(tmp_path, **files):
    """A data folder with these files, and the run configuration that reads it."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return train.configure({"preset": "nano", "data": str(folder)}, {})


def test_packing_keeps_every_document_between_its_marks(finished):
    """The token file is exactly [BOS] text [EOS] of the split's documents, in order."""
    out, tok = finished, Tokenizer.load(finished)
    bos, eos = tok.special["[BOS]"], tok.special["[EOS]"]
    for domain in ("web", "code", "math", "knowledge"):
        rows = [
            json.loads(line) for line in open(out / "data" / f"{domain}.jsonl", encoding="utf-8")
        ]
        for split in ("train", "val"):
            ids = np.fromfile(out / "data" / f"{domain}.{split}.bin", "<u2").tolist()
            texts = [row["text"] for row in rows if row["split"] == split]
            assert ids == [i for text in texts for i in (bos, *tok.encode(text), eos)]


def test_attention_crosses_documents_in_a_window():
    """Decided as DeepSeek-V3 packs: the document before is visible, so changing it changes logits."""
    _, model, _ = tiny_job()
    window = torch.randint(0, 200, (1, 20), generator=torch.Generator().manual_seed(0))
    window[0, 10] = 512 - 255  # [EOS] between two documents
    other = window.clone()
    other[0, 3] += 1
    with torch.no_grad():
        assert not torch.equal(model(window)[0][0, 12:], model(other)[0][0, 12:])


def test_batches_follow_weights_and_depend_on_seed_and_step_alone(finished):
    data = train.TokenFiles(finished / "data", {"math": 1.0})
    a, b = data.batch(0, 7, 8, 64), data.batch(0, 7, 8, 64)
    assert torch.equal(a[0], b[0]) and torch.equal(a[0][:, 1:], a[1][:, :-1])
    assert not torch.equal(a[0], data.batch(0, 8, 8, 64)[0])
    assert not torch.equal(a[0], data.batch(1, 7, 8, 64)[0])
    math_ids = np.asarray(data.ids["math", "train"]).tolist()
    row = a[0][0].tolist()
    assert any(math_ids[i : i + 64] == row for i in range(len(math_ids)))
    with pytest.raises(train.UserError, match="domain_weights: no sports"):
        train.TokenFiles(finished / "data", {"sports": 1.0})


@pytest.mark.parametrize("most", [None, 16])
def test_no_document_is_left_out_unless_it_is_asked_for(most):
    """Validation is every document whose hash says so, a few hundred kilobytes, not one of each domain."""
    run, _ = train.configure({"preset": "nano", "max_documents": most}, {})
    documents, _, _ = train.split_documents(run)
    counts = {}
    for doc in documents:
        counts[doc["domain"], doc["split"]] = counts.get((doc["domain"], doc["split"]), 0) + 1
    if most:
        assert max(counts.values()) == 16 and set(counts.values()) == {16, 2}
    else:
        size = sum(len(doc["text"]) for doc in documents if doc["split"] == "val")
        assert counts["math", "train"] + counts["math", "val"] == 4000 and size > 500_000
        assert counts["web", "val"] > 20 and counts["code", "val"] > 15


def test_own_files_train_and_bad_ones_are_reported(tmp_path, capsys):
    """.txt, .md and .jsonl are read; a broken line, a wrong encoding are named, skipped, counted."""
    words = " ".join(str(n) for n in range(3000)).encode()
    run, cfg = own_run(tmp_path, a__txt=words, b__md=b"# Title\n\ntext " * 200, latin__txt=b"caf\xe9 " * 50,
                       c__jsonl=b'{"text": "fine one"}\n{"text": broken\n\n[1]\n'
                                b'{"no": "text"}\n{"text": "last"}\n3\n',
                       ignored__png=b"\x00\x01")
    out = tmp_path / "run"
    out.mkdir()
    tok = train.prepare_data(run, cfg, out)
    errors = capsys.readouterr().err
    assert "latin.txt: not UTF-8 at byte 3" in errors
    for number in (2, 4, 5, 7):
        assert f"c.jsonl line {number}:" in errors
    index = json.loads((out / "data" / "index.json").read_text())
    splits = index["domains"]["own"]
    assert index["skipped"] == 5 and splits["val"]["tokens"] > 0 and splits["train"]["tokens"] > 0
    kept = (out / "data" / "own.jsonl").read_text()
    assert "fine one" in kept and "last" in kept and tok.n_vocab == 512


def test_own_files_of_other_systems_and_programs(tmp_path, capsys):
    """Suffixes in capitals, fields that are null, half characters as JSON can spell them."""
    lines = [{"text": f"number {n} " * 30, "domain": None, "source": None} for n in range(30)]
    lines += [{"text": "half \ud83d"}, {"text": "whole " * 30, "domain": "b\ud83d", "source": "s\ud83d"}]
    run, cfg = own_run(tmp_path, NOTES__TXT=b"words " * 500,
                       b__JSONL="\n".join(map(json.dumps, lines)).encode())
    out = tmp_path / "run"
    out.mkdir()
    train.prepare_data(run, cfg, out)
    assert "b.JSONL line 31: 'utf-8' codec can't encode" in capsys.readouterr().err
    index = json.loads((out / "data" / "index.json").read_text())
    assert set(index["domains"]) == {"own", "b_"} and index["skipped"] == 1
    assert "words words" in (out / "data" / "own.jsonl").read_text(encoding="utf-8")


def test_a_byte_order_mark_is_no_text(tmp_path):
    run, _ = own_run(tmp_path, a__txt=b"\xef\xbb\xbfwords ", b__jsonl=b'\xef\xbb\xbf{"text": "lines"}\n')
    assert [doc["text"] for doc in train.corpus(run, [])] == ["words ", "lines"]


def test_one_file_is_cut_into_train_and_validation(tmp_path):
    lines = "".join(f"line {n}\n" for n in range(1000))
    run, _ = own_run(tmp_path, only__txt=lines.encode())
    documents, _, _ = train.split_documents(run)
    parts = {doc["split"]: doc["text"] for doc in documents}
    assert parts["train"] + parts["val"] == lines
    assert 0.03 < len(parts["val"]) / len(lines) < 0.07


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lrr", "3"], r"unknown flag --lrr, did you mean --lr\?"),
        (["--preset", "tinny"], r"unknown preset 'tinny', did you mean tiny\?"),
        (["--steps", "many"], r"--steps: 'many' is no 64-bit int"),
        (["--steps", "0"], r"steps must be at least 1, got 0"),
        (["--steps", "1e400"], r"--steps: '1e400' is no 64-bit int"),
        (["--steps", "2.5e0"], r"--steps: '2.5e0' is no 64-bit int"),
        (["--steps", "9" * 5000], r"--steps: '9{40}' is no 64-bit int"),
        (["--hidden_size", "1e300"], r"--hidden_size: '1e300' is no 64-bit int"),
        (["--lr", "9" * 5000], r"lr must be positive and finite, got inf"),
        (["--domain_weights", '{"web": ' + "9" * 400 + "}"], r"domain_weights must hold finite numbers"),
        (["--threads", "-1"], r"threads must be at least 1, got -1"),
        (["--seed", "-1"], r"seed must be at least 0 and below 2\*\*63, got -1"),
        (["--rl_seed", "9223372036854775808"], r"--rl_seed: '9223372036854775808' is no 64-bit int"),
        (["--momentum", "1"], r"momentum must be at least 0 and below 1, got 1.0"),
        (["--weight_decay", "-1"], r"weight_decay must not be negative or infinite, got -1.0"),
        (["--aux_alpha", "nan"], r"aux_alpha must not be negative or infinite, got nan"),
        (["--bias_update_rate", "-1"], r"bias_update_rate must not be negative or infinite, got -1.0"),
        (["--tau", "0"], r"tau must be positive and finite, got 0.0"),
        (["--micro_batch", "0"], r"micro_batch must be at least 1, got 0"),
        (["--domain_weights", "web=-1,code=2"], r"domain_weights must hold finite numbers, none neg"),
        (["--sft_weights", "tools=nan"], r"sft_weights must hold finite numbers, none negative"),
        (["--rl_weights", '{"math": "1"}'], r"rl_weights must hold finite numbers, none negative, got"),
        (["--anneal_weights", "web=0"], r"anneal_weights must hold .* one at least positive, got"),
        (["--domain_weights", "wbe=1"], r"domain_weights: no wbe, did you mean web\? \(there are: web, code"),
        (["--sft_weights", "tols=1"], r"sft_weights: no tols, did you mean tools\?"),
        (["--rl_weights", "maths=1"], r"rl_weights: no maths, did you mean math\?"),
        (["--rephrase_domains", "knowlege"], r"rephrase_domains: no knowlege, did you mean knowledge\?"),
        (["--data", str(ROOT / "README.md"), "--domain_weights", "web=1"], r"no web \(there are: own\)"),
        (["--device", "gpu"], r"--device gpu: PyTorch finds no such device here"),
        (["--lr", "inf"], r"lr must be positive and finite, got inf"),
        (["--grad_clip", "-1"], r"grad_clip must be positive and finite"),
        (["--plan", "--mfu", "0"], r"mfu must be positive and finite, got 0"),
        (["--plan", "--gpu_years", "nan"], r"gpu_years must be positive and finite, got nan"),
        (["--plan", "--world", "-4"], r"world must be at least 1, got -4"),
        (["--plan", "--serve_gpus", "-1"], r"serve_gpus must be at least 1, got -1"),
        (["--hidden_size", "-3"], r"hidden_size must be a whole number of at least 1, got -3"),
        (["--num_experts_per_tok", "99"], r"num_experts_per_tok \(99\) cannot exceed"),
        (["--optimizer", "sgd"], r"optimizer must be one of muonclip, muon, adamw"),
        (["--batch_size", "8", "--micro_batch", "3"], r"must be a multiple of micro_batch"),
        (["--data", "no/such/folder"], r"--data no/such/folder: there is no such file"),
        (["dance"], r"invalid choice: 'dance'"),
        (["--resume"], r"--resume: there is no run in"),
    ],
)
def test_bad_flags_get_one_line(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        train.main(["--out", str(tmp_path / "new"), *flags])
    said = (
        str(exit.value.code) if isinstance(exit.value.code, str) else ""
    ) + capsys.readouterr().err
    assert re.search(message, said), said
    assert exit.value.code not in (0, None) and len(said.strip().splitlines()) == 1
    assert {path.name for path in (tmp_path / "new").glob("*")} <= {"config.json"}  # nothing was made


def test_a_start_that_was_refused_can_be_repeated_with_other_flags(text, tmp_path):
    out = str(tmp_path / "new")
    with pytest.raises(SystemExit, match="there is no such file"):
        train.main([*ONE_PHASE, "no/such/file", "--out", out, "--seed", "1"])
    train.main([*ONE_PHASE, str(text), "--steps", "2", "--out", out, "--seed", "2"])
    assert len(losses_of(out)) == 2
    with pytest.raises(SystemExit, match=r"other settings \(seed 2, now 1\)"):
        train.main([*ONE_PHASE, str(text), "--steps", "2", "--out", out, "--seed", "1"])


def test_resume_goes_on_with_the_stage_last_asked_for(finished, tmp_path, capsys):
    out = str(tmp_path / "run")
    train.main(["tools", *SMALL, "--base", str(finished / "model_base"), "--out", out])
    train.main(["--resume", "--out", out])
    assert capsys.readouterr().out.count("tools_card.md") == 2


@pytest.mark.parametrize("content", [b"", b"   \n\n", b"\xff\xfe\xfa"])
def test_empty_or_unreadable_data_is_refused(tmp_path, content):
    run, cfg = own_run(tmp_path, only__txt=content)
    with pytest.raises(train.UserError, match="no text found"):
        train.split_documents(run)


def test_other_settings_are_refused_and_foreign_folders_too(finished, tmp_path):
    before = weights_of(finished)
    with pytest.raises(SystemExit, match=r"other settings \(steps 45, now 61\)"):
        train.main(["pretrain", *SMALL, "--out", str(finished), "--steps", "61"])
    with pytest.raises(SystemExit, match=r"other settings \(seed 0, now 5\)"):
        train.main(["pretrain", "--resume", "--out", str(finished), "--seed", "5"])
    assert weights_of(finished) == before
    for saved, message in (([1], "no run's configuration"),
                           ({"run": {"old_knob": 1}, "model": {}}, "other settings \\(old_knob\\)"),
                           ({"run": {"lr": "fast"}, "model": {}}, "lr must be of type float, got 'fast'"),
                           ({"run": {"preset": 7}, "model": {}}, "preset must be of type str, got 7")):
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old" / "config.json").write_text(json.dumps(saved))
        with pytest.raises(SystemExit, match=message):
            train.main(["--resume", "--out", str(tmp_path / "old")])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    with pytest.raises(SystemExit, match="is not the folder of a run"):
        train.main(["--out", str(tmp_path / "photos")])


def test_every_field_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    for cls in (train.RunConfig, KimiConfig):
        comments = train.comments_of(cls)
        for field in dataclasses.fields(cls):
            assert f"--{field.name} " in text and comments[field.name].split()[0] in text


def test_flags_reach_the_run_and_the_model(tmp_path):
    _, run_fields, model_fields = train.parse_command(
        [
            "--lr",
            "1e-3",
            "--grad_clip",
            "none",
            "--recompute",
            "parts",
            "--domain_weights",
            "web=0.5,code=2",
            "--num_hidden_layers",
            "3",
            "--q_lora_rank",
            "none",
            "--out",
            str(tmp_path),
        ]
    )
    run, cfg = train.configure(run_fields, model_fields)
    assert (run.lr, run.grad_clip, run.recompute) == (1e-3, None, "parts")
    assert run.domain_weights == {"web": 0.5, "code": 2.0}
    assert (cfg.num_hidden_layers, cfg.q_lora_rank) == (3, None)


def test_plan_of_the_full_model(capsys):
    """Parameters, the report's 6 TB, and FLOPs that agree with 6 x active parameters x tokens."""
    train.main(["--preset", "k2", "--plan"])
    text = capsys.readouterr().out
    assert "1,026,408,232,448 in all" in text and "6.158 TB" in text and "70,272 B a token" in text
    flops = float(text.split("FLOPs of the run")[1].split()[0])
    assert flops == pytest.approx(6 * 31.7e9 * 16.02e12, rel=0.1)  # attention adds about 8 %


def test_transformers_says_what_a_trained_run_says(finished):
    """Trained through YaRN, exported, loaded there with its tokenizer: the same greedy text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished / "model_base"
    ours, tok = load_pretrained(folder)
    theirs, theirs_tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.cfg.rope_scaling["type"] == "yarn"
    for prompt in ("The", "Problem: What is", "def "):
        ids = theirs_tok(prompt, return_tensors="pt", add_special_tokens=False)
        assert ids["input_ids"].tolist() == [tok.encode(prompt)]
        said = theirs.generate(**ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected = ours.generate(torch.tensor([tok.encode(prompt)]), max_new_tokens=24, temperature=0)
        assert theirs_tok.decode(said[0]) == tok.decode(expected[0].tolist())


@pytest.mark.parametrize("flags", ["--optimizer muon --recompute parts", "--dtype bf16",
                                   "--optimizer adamw --micro_batch 2 --recompute blocks"])
def test_switches_train(text, tmp_path, flags):
    out = tmp_path / "run"
    train.main([*ONE_PHASE, str(text), "--steps", "6", "--out", str(out), *flags.split()])
    losses = losses_of(out)
    assert len(losses) == 6 and losses[-1] < losses[0] and all(map(math.isfinite, losses))


def losses_with_compile(text, out, **environment):
    """(losses of three steps, what was said), in a process of its own: it compiles, or tries."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *ONE_PHASE, str(text), "--steps", "3", "--compile", "on",
         "--out", str(out / "on")], check=True, capture_output=True, text=True,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(out / "cache"), **environment})
    return losses_of(out / "on"), done.stdout


def losses_without(text, out):
    train.main([*ONE_PHASE, str(text), "--steps", "3", "--compile", "off", "--out", str(out / "off")])
    return losses_of(out / "off")


def test_compile_falls_back_with_a_note(text, tmp_path):
    """Without a compiler --compile on says so and trains eagerly: the same losses to the bit."""
    losses, said = losses_with_compile(text, tmp_path, CXX="/no/such/compiler")
    assert "note: torch.compile failed" in said
    assert losses == losses_without(text, tmp_path)


@pytest.mark.slow
def test_compiled_training_has_the_same_losses(text, tmp_path):
    losses, said = losses_with_compile(text, tmp_path)
    assert "note" not in said
    assert losses == pytest.approx(losses_without(text, tmp_path), rel=1e-5)
