"""Annealing, long-context activation and YaRN: the schedule, the switch, resume at it, and its figures."""

import dataclasses
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from kimi_k2 import KimiConfig, KimiK2, Tokenizer, load_pretrained

DATA = SimpleNamespace(weights={"web": 1.0}, anneal_weights={"math": 1.0})


def plan(preset, **fields):
    run, cfg = train.configure({"preset": preset, **fields}, {})
    return run, train.phases(run, cfg, DATA)


def test_schedule_of_all_phases():
    run, phases = plan("tiny")
    rates = [train.wsd(step, run) for step in range(phases[-1].end)]
    end = run.lr * run.lr_end
    assert rates[run.steps] == pytest.approx(end)  # the annealing starts where the decay ended
    last = phases[-1].end
    assert all(a > b for a, b in zip(rates[run.steps : last], rates[run.steps + 1 : last]))
    assert train.wsd(last, run) == pytest.approx(run.lr * 7e-6 / 2e-4)
    assert max(abs(a - b) for a, b in zip(rates[run.warmup :], rates[run.warmup + 1 :])) < 0.02 * run.lr


def test_drills_come_first_and_the_other_domains_come_in_evenly():
    """Drills alone; then their share falls to its own over as many steps again."""
    data = SimpleNamespace(weights={"web": 0.8, "drills": 0.2}, anneal_weights={"web": 1.0, "drills": 0.0})
    run, cfg = train.configure({"preset": "tiny", "steps": 100, "drill_steps": 20}, {})
    drill, pretrain, *later = train.phases(run, cfg, data)
    assert (drill.name, drill.start, drill.end, drill.rows) == ("drill", 0, 20, run.batch_size)
    assert (pretrain.start, pretrain.end, pretrain.rows) == (20, 100, run.batch_size)
    assert drill.weights_at(10) == {"web": 0.0, "drills": 1.0}
    shares = [pretrain.weights_at(step)["drills"] for step in (20, 30, 40, 99)]
    assert shares == pytest.approx([1, 0.6, 0.2, 0.2])
    assert all(sum(pretrain.weights_at(step).values()) == pytest.approx(1) for step in range(20, 100))
    assert later[0].weights_at(100) == data.anneal_weights


def test_shares_of_the_report_and_at_least_twenty_steps():
    run, phases = plan("tiny")
    assert [phase.name for phase in phases] == ["pretrain", "anneal", "long", "yarn"]
    assert all(phase.end - phase.start >= 20 for phase in phases)
    assert [phase.seq_len for phase in phases] == [128, 128, 8 * 128, 8 * 128]
    assert phases[3].context[0] == 32 * 128
    assert len({phase.rows * phase.seq_len for phase in phases}) == 1  # as many tokens a step
    assert phases[1].weights == DATA.anneal_weights and phases[1].bias_update_rate == 0
    run, phases = plan("k2")
    tokens = [(phase.end - phase.start) * phase.rows * phase.seq_len for phase in phases]
    assert tokens[0] == pytest.approx(15.5e12, rel=1e-3) and tokens[1] == pytest.approx(400e9, rel=1e-3)
    assert (
        tokens[2] == pytest.approx(60e9, rel=2e-3)
        and phases[2].seq_len == 32_768
        and phases[3].seq_len == 32_768
    )


def test_k2_gets_its_yarn_after_the_activation():
    """Until then the softmax scale is 192^-0.5 and every frequency unstretched (R 2.5)."""
    _, phases = plan("k2")
    published = KimiConfig.preset("k2").rope_scaling
    assert [phase.context[1] for phase in phases] == [None, None, None, published]
    assert phases[3].context[0] == 131_072
    _, phases = plan("k2", yarn_steps=0)  # no such phase: the config is taken as it is
    assert [phase.context[1] for phase in phases] == [published] * 3
    run, phases = plan("tiny")
    yarn = phases[3].context[1]
    assert yarn["factor"] == 32 and yarn["original_max_position_embeddings"] == run.seq_len
    _, phases = plan("nano", anneal_steps=0, long_steps=0, yarn_steps=0)
    assert len(phases) == 1


@pytest.mark.parametrize("preset, length", [("tiny", 128), ("k2", 4096)])
def test_rope_theta_suits_the_training_length(preset, length):
    """YaRN leaves alone what turns within the training length: 60 % of the pairs of K2, and of tiny."""
    cfg = KimiConfig.preset(preset)
    d = cfg.qk_rope_head_dim
    turning = sum(2 * math.pi * cfg.rope_theta ** (2 * i / d) <= length for i in range(d // 2))
    assert turning / (d / 2) == pytest.approx(0.62, abs=0.14)


def test_set_context_is_the_model_of_that_config():
    torch.manual_seed(0)
    cfg = KimiConfig.preset("nano")
    model = KimiK2(cfg).eval()
    yarn = {
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(cfg.vocab_size, (2, 200))
    plain = model(tokens)[0]
    model.set_context(256, yarn)
    other = KimiK2(dataclasses.replace(cfg, rope_scaling=yarn, max_position_embeddings=256)).eval()
    other.load_state_dict(before)
    assert torch.equal(model(tokens)[0], other(tokens)[0]) and not torch.allclose(model(tokens)[0], plain)
    assert torch.equal(model.generate(tokens, 8, 0.0), other.generate(tokens, 8, 0.0))
    assert model.cfg == other.cfg and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.set_context(cfg.max_position_embeddings, None)
    assert torch.equal(model(tokens)[0], plain)


@pytest.fixture(scope="module")
def whole(recipe):
    """A run with all phases; test_train.py kills it where the context changes."""
    return recipe("pretrain")


def test_the_saved_model_has_yarn_and_the_log_its_phases(whole):
    model, _ = load_pretrained(whole / "model_base")
    assert model.cfg.rope_scaling["factor"] == 16 and model.cfg.max_position_embeddings == 16 * 64
    rows = train.read_metrics(whole)
    phases = [row["phase"] for row in rows if "loss" in row]
    assert phases == ["drill"] * 10 + ["pretrain"] * 35 + ["anneal"] * 5 + ["long"] * 5 + ["yarn"] * 5
    measured = [row["step"] for row in rows if "long_context" in row]
    assert measured == [55, 60]  # before YaRN, and after
    report = json.loads((whole / "report.json").read_text())
    assert set(report["long_context"]) == {"1x", "2x", "4x", "8x", "16x"}
    assert report["recall"]["base"] >= 0 and report["rephrase"]["rejected"] == 0
    assert (
        "before YaRN" in (whole / "report.md").read_text() and (whole / "figures/long_context.png").exists()
    )


def job_of(out):
    saved = json.loads((out / "config.json").read_text())
    run, cfg = train.configure(saved["run"], saved["model"])
    data = train.TokenFiles(out / "data")
    return train.Job(run, cfg, out, torch.device("cpu"), Tokenizer.load(out), data)


def test_bits_per_byte_by_position_against_a_naive_sum(whole):
    job = job_of(whole)
    model, _ = load_pretrained(whole / "model_base")
    figures = train.long_context(model.eval(), job)
    rows = train.long_documents(job, 1024, 8)
    assert rows and figures["lengths"] == [64, 128, 256, 512, 1024]
    assert all(row[0] == job.tok.special["[BOS]"] and len(row) == 1025 for row in rows)
    assert all((row[1:] != job.tok.special["[BOS]"]).all() for row in rows)  # one document each
    sizes = torch.tensor(job.tok.token_bytes())
    nats, late_nats = torch.zeros(1024), 0.0
    for row in rows:
        logp = F.log_softmax(model(row[None, :-1])[0][0], dim=-1)
        nats += -logp[torch.arange(1024), row[1:]].detach()
        for begin in range(0, 1024, 256):  # windows of 256
            logp = F.log_softmax(model(row[None, begin : begin + 256])[0][0], dim=-1)
            late_nats += -logp[torch.arange(192, 256), row[begin + 193 : begin + 257]].sum().item()
    n_bytes = torch.stack([sizes[row[1:]] for row in rows]).sum(0)
    assert figures["bpb"][-1] == pytest.approx(
        (nats[768:].sum() / n_bytes[768:].sum()).item() / math.log(2), rel=1e-4
    )
    assert figures["by_position"][1] == pytest.approx(
        (nats[64:128].sum() / n_bytes[64:128].sum()).item() / math.log(2), rel=1e-4
    )
    late = sum(n_bytes[begin + 192 : begin + 256].sum() for begin in range(0, 1024, 256))
    assert figures["bpb"][2] == pytest.approx(late_nats / late.item() / math.log(2), rel=1e-4)


def test_candidate_scores_against_whole_texts(whole):
    model, _ = load_pretrained(whole / "model_base")
    model.eval()
    prompt, candidates = list(range(40, 90)), [[5], [7, 8, 9], [300, 2]]
    scores = train.candidate_scores(model, prompt, candidates)
    for ids, score in zip(candidates, scores):
        logp = F.log_softmax(model(torch.tensor([prompt + ids]))[0][0], dim=-1)
        naive = sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(ids))
        assert score.item() == pytest.approx(naive.item(), abs=1e-4)


def test_an_untrained_model_finds_needles_by_chance_alone(whole):
    job = job_of(whole)
    torch.manual_seed(1)
    model = KimiK2(dataclasses.replace(job.cfg, vocab_size=job.tok.n_vocab)).eval()
    share = train.needle_accuracy(model, job, 128, 200, random.Random(0))
    assert abs(share - 0.1) < 3.5 * math.sqrt(0.09 / 200)


def test_weights_of_the_annealing_are_honoured(whole):
    data = train.TokenFiles(whole / "data", None, {"math": 1.0})
    assert {domain: share for domain, share in data.anneal_weights.items() if share} == {"math": 1.0}
    maths = set(data.ids["math", "train"].tolist())
    tokens, _ = data.batch(0, 3, 8, 64, weights=data.anneal_weights)
    assert set(tokens.flatten().tolist()) <= maths
    with pytest.raises(train.UserError, match="anneal_weights: no maths"):
        train.TokenFiles(whole / "data", None, {"maths": 1.0})
