"""Supervised fine-tuning: packed rows do not leak, only the assistant's words are learned, runs are exact.

The reference for a packed row is the same dialog alone in its row; for a run, another run.
"""

import json
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from runs import SMALL, after, kill_when, run

import kimi_k2
import train
from kimi_k2 import KimiConfig, KimiK2, Tokenizer, load_pretrained


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return KimiK2(KimiConfig.preset("nano"))


def packed(lengths, seed=0):
    """Texts of random ids, and the row that holds them all with its document numbers."""
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(500, (1, n), generator=generator) for n in lengths]
    document = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], dim=1)
    return texts, torch.cat(texts, dim=1), document


@pytest.mark.parametrize("lengths", [(5, 9, 3), (1, 40), (220, 300, 30)])  # the last: the fused attention
def test_a_packed_text_is_read_as_if_it_stood_alone(model, lengths):
    texts, row, document = packed(lengths)
    together = model.hidden(row, document=document).split(lengths, dim=1)
    for text, hidden in zip(texts, together):
        torch.testing.assert_close(hidden, model.hidden(text), atol=3e-6, rtol=1e-5)
    leaking = model.hidden(row).split(lengths, dim=1)[1]
    assert (leaking - together[1]).abs().max() > 1e-3, "the mask changes nothing: the test could not fail"


def test_documents_attended_one_by_one_are_those_of_the_mask(model):
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(2, 4, 60, width, generator=generator, requires_grad=True) for width in (24, 24, 16)]
    document = torch.tensor([[0] * 25 + [1] * 35, [0] * 10 + [1] * 5 + [2] * 40 + [-1] * 5])
    out, s_max = kimi_k2.attend_documents(*inputs, 0.3, document, record=True)
    reference = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = reference
    seen = torch.tensor([[[i >= j and row[i] == row[j] for j in range(60)] for i in range(60)]
                         for row in document.tolist()]).unsqueeze(1)
    s = (0.3 * q @ k.mT).masked_fill(~seen, -torch.inf)
    expected = s.softmax(-1) @ v
    upstream = torch.randn(out.shape, generator=generator)
    out.backward(upstream), expected.backward(upstream.double())
    torch.testing.assert_close(s_max.double(), s.amax((0, 2, 3)), atol=1e-5, rtol=1e-5)
    for mine, theirs in zip((out, *(x.grad for x in inputs)), (expected, *(x.grad for x in reference))):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)
    tokens = torch.randint(500, (2, 60), generator=generator)
    both = [model.hidden(tokens, document=document, absorb=absorb) for absorb in (False, True)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-4)


YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 1.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize("yarn", [None, YARN])
def test_gradients_of_packed_texts_are_the_sum_of_their_own(yarn):
    torch.manual_seed(1)
    model = KimiK2(KimiConfig.preset("nano"))
    model.set_context(512, yarn)
    texts, row, document = packed((30, 50, 20), seed=1)

    def gradients(batches):
        model.zero_grad()
        for tokens, *numbers in batches:
            targets = tokens.roll(-1, dims=1)
            (model.loss(tokens, targets, *numbers) * targets.numel()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    alone = gradients([(text,) for text in texts])
    row_targets = torch.cat([text.roll(-1, dims=1) for text in texts], dim=1)
    model.zero_grad()
    (model.loss(row, row_targets, document) * row_targets.numel()).backward()
    for name, p in model.named_parameters():
        assert (p.grad - alone[name]).abs().max() <= 2e-5 * alone[name].abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("lengths", [(10, 20), (150, 200)])
def test_s_max_does_not_look_across_texts(lengths):
    torch.manual_seed(2)
    model = KimiK2(KimiConfig.preset("nano"))
    texts, row, document = packed(lengths, seed=2)
    model.loss(row, row, document)
    together = model.max_logits.clone()
    model.max_logits.fill_(-torch.inf)
    for text in texts:
        model.loss(text, text)
    torch.testing.assert_close(together, model.max_logits, atol=1e-5, rtol=1e-5)


def test_loss_is_the_mean_over_what_the_assistant_said(model):
    texts, row, document = packed((25, 35), seed=3)
    targets = torch.where(torch.rand(row.shape, generator=torch.Generator().manual_seed(0)) < 0.3,
                          row.roll(-1, dims=1), -100)
    logits = model.lm_head(model.hidden(row, document=document)).double()
    expected = F.cross_entropy(logits[targets != -100], targets[targets != -100])
    torch.testing.assert_close(model.loss(row, targets, document).double(), expected, atol=1e-6, rtol=1e-6)


def test_a_step_without_targets_is_no_step(model):
    row = torch.zeros(1, 8, dtype=torch.long)
    loss = model.loss(row, torch.full_like(row, -100))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
    model.zero_grad()


# -- the stage -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(recipe):
    """The recipe up to fine-tuning, uninterrupted."""
    return recipe("sft")


def sft_weights(out):
    return (out / "model_sft" / "model.safetensors").read_bytes()


def test_the_recipe_leaves_models_and_a_report(finished):
    out = finished
    report = json.loads((out / "report.json").read_text())
    classes = {"single", "multi", "parallel", "none", "missing", "failing", "new_tool", "new_domain"}
    assert set(report["success"]) == {"base", "sft"} and set(report["success"]["sft"]) == classes
    assert all(0 <= share <= 1 for shares in report["success"].values() for share in shares.values())
    assert report["tools"]["specs"] == 200 and report["tools"]["trajectories"] == 40
    assert 0 < report["tools"]["accepted"] <= 40
    assert set(report["recall"]) == {"base", "sft"}
    seconds = report["seconds"]
    assert set(seconds) == {"data", "pretrain", "tools", "sft", "total"}
    assert abs(seconds["total"] - sum(v for k, v in seconds.items() if k != "total")) < 1e-6
    base, sft, newest = (load_pretrained(out / name)[0].state_dict() for name in
                         ("model_base", "model_sft", "model"))
    assert any((base[name] != sft[name]).any() for name in base)
    assert all(torch.equal(sft[name], newest[name]) for name in sft)
    text = (out / "report.md").read_text()
    assert "Held-out" not in text and "| held-out tasks with tools | base | sft |" in text
    assert (out / "figures" / "tools.png").exists() and "> user:" in text
    rows = [row for row in train.read_metrics(out) if row["stage"] == "sft" and "loss" in row]
    assert [row["step"] for row in rows] == list(range(12)) and rows[-1]["loss"] < rows[0]["loss"]


def test_the_same_command_again_does_nothing(finished):
    out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert run("sft", *SMALL, "--out", out).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def assert_resumed_is_the_same(out, whole):
    done = run("sft", "--resume", "--out", out)
    assert done.returncode == 0, done.stderr
    assert sft_weights(out) == sft_weights(whole)


def test_killed_while_tuning_resumes_bit_identical(recipe, finished, tmp_path):
    """Killed where dialogs are made, after a checkpoint, and at the end, one after the other."""
    out = shutil.copytree(recipe("pretrain"), tmp_path / "killed")
    for made in ("data/specs.jsonl", "ckpt/sft_00000005", "ckpt/sft_00000012"):
        assert kill_when((out / made).exists, "sft", *SMALL, "--out", out), made
    assert_resumed_is_the_same(out, finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_moments(recipe, finished, tmp_path, seed):
    out, rng = shutil.copytree(recipe("pretrain"), tmp_path / "killed"), random.Random(seed)
    for _ in range(2):
        kill_when(after(rng.uniform(0, 1) * train.read_report(finished)["seconds"]["sft"]),
                  "sft", *SMALL, "--out", out)
    assert_resumed_is_the_same(out, finished)


# -- own dialogs -----------------------------------------------------------------------------------------


def own_file(path):
    """Dialogs as OpenAI's API has them, and lines that are none."""
    call = {"id": "call_x7", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    dialogs = [
        {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}]}
        for word in ("blue", "green", "red", "grey")
    ] + [{"tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
          "messages": [{"role": "user", "content": "Look up."},
                       {"role": "assistant", "content": None, "tool_calls": [call]},
                       {"role": "tool", "tool_call_id": "call_x7", "content": "a bird"},
                       {"role": "assistant", "content": "A bird."}]}]
    broken = ["{", '{"messages": "x"}', '{"messages": [{"role": "user", "content": "x"}]}',
              '{"messages": [{"role": "owl", "content": "x"}, {"role": "assistant", "content": "x"}]}', "[1]",
              '{"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}', '{"text": "a document"}']
    path.write_text("\n".join([*map(json.dumps, dialogs), *broken]) + "\n", encoding="utf-8")
    return dialogs, broken


def test_own_dialogs_are_learned_from_a_base_of_ones_own(finished, tmp_path):
    own_file(tmp_path / "own.jsonl")
    done = run("sft", *SMALL, "--base", finished / "model_base", "--data", tmp_path / "own.jsonl",
               "--sft_steps", 60, "--sft_len", 128, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    skipped = [line for line in done.stderr.splitlines() if "skipped" in line]
    assert len(skipped) == 6 and all("own.jsonl line" in line for line in skipped)
    model, tok = load_pretrained(tmp_path / "run" / "model_sft")
    ids, _ = tok.render([{"role": "user", "content": "Say green."}], add_generation_prompt=True)
    out = model.generate(torch.tensor([ids]), 8, 0.0, stop=tok.special["<|im_end|>"])[0, len(ids):]
    assert tok.parse(out.tolist())["content"].startswith("gr")  # and not "blue" or "red": it is a small model
    losses = [row["loss"] for row in train.read_metrics(tmp_path / "run") if "loss" in row]
    assert losses[-1] < 0.3 * losses[0]


def test_success_counts_what_was_done_by_two_ways_of_playing(finished):
    """A model that was shown the held-out tasks themselves does them, its base does none: and ModelAgent,
    which reads every turn anew and keeps no cache, does them too, the first one to the letter."""
    saved = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    settings, cfg = train.configure(saved["run"], saved["model"])
    model, tok = load_pretrained(finished / "model_base")
    job = train.Job(settings, cfg, finished, torch.device("cpu"), tok, None)
    toolbox, _ = train.toolbox_of(settings)
    classes, n = ("single", "none"), 3

    def episodes(name):
        kind, split = train.SUCCESS[name]
        return [train.Episode.of(toolbox.scene(f"held out {settings.seed} {name} {i}", [kind], split), 3)
                for i in range(n)]

    def by_agent(name):
        played = episodes(name)
        train.play_all(played, train.ModelAgent(model, tok, most=128))
        return played

    assert train.tool_success(model, job, n, classes)[0] == {name: 0 for name in classes}
    lessons = [episode for name in classes for episode in episodes(name)]
    train.play_all(lessons, train.Teacher())
    shown = [{"messages": episode.messages, "tools": episode.gate.declarations()} for episode in lessons]
    batch = train.padded(shown, tok, "cpu")
    opt = train.MuonClip(model, lr=1e-2, kind="muon")
    for step in range(250):
        train.train_step(model, opt, job, batch, 1e-2 * (1 - step / 250))
    success, transcript = train.tool_success(model, job, n, classes)
    assert success == {name: 1 for name in classes}
    played = [by_agent(name) for name in classes]
    assert all(train.verdict_of(episode)["success"] for group in played for episode in group)
    assert transcript == train.readable(played[0][0].messages)


def test_what_cannot_be_tuned_is_said_in_a_line(finished, tmp_path):
    (tmp_path / "none.jsonl").write_text('{"text": "a"}\n')
    for case, (arguments, needle) in enumerate((
        (("sft", *SMALL, "--base", tmp_path / "nothing"), "nothing"),
        (("sft", *SMALL, "--base", finished / "model_base", "--sft_weights", "chta=1"), "chta"),
        (("pretrain", *SMALL, "--base", finished / "model_base"), "--base"),
        (("sft", *SMALL, "--base", finished / "model_base", "--agent", "nobody"), "nobody"),
    )):
        done = run(*arguments, "--out", tmp_path / str(case))
        assert done.returncode != 0 and needle in done.stderr and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_render_refuses_a_call_that_is_none():
    tok = Tokenizer.train(["some text to learn from"], 520)
    for call in ({"id": "a"}, {"function": {}}, {"function": "x"}, "x"):
        with pytest.raises(ValueError, match="call"):
            tok.render([{"role": "assistant", "content": "", "tool_calls": [call]}])


def test_where_a_stage_starts(tmp_path):
    """--base goes before the run's own base model; RL takes the run's own fine-tuned model if it has one."""
    def mark(folder, value):
        model = KimiK2(KimiConfig.preset("nano"))
        with torch.no_grad():
            model.lm_head.weight.fill_(value)
        train.save_pretrained(model, None, folder)

    def start(stage, before):
        weights = train.model_before(job, stage, before).lm_head.weight
        return weights[0, 0].item()

    run, cfg = train.configure({"preset": "nano", "base": str(tmp_path / "other")}, {})
    job = train.Job(run, cfg, tmp_path, torch.device("cpu"), None, None)
    mark(tmp_path / "other", 1.0)
    assert start("sft", "pretrain") == start("rl", "sft") == 1
    mark(tmp_path / "model_base", 2.0)
    mark(tmp_path / "model_sft", 3.0)
    assert (start("sft", "pretrain"), start("rl", "sft")) == (1, 3)
    job.run.base = None
    assert start("sft", "pretrain") == 2
    shutil.rmtree(tmp_path / "model_base")
    with pytest.raises(train.UserError, match="run the pretrain stage first"):
        start("sft", "pretrain")


def test_later_stages_warm_up_and_end_low():
    """Ten steps up, at the peak until the half, then half a cosine down to a tenth of it."""
    run, _ = train.configure({"preset": "tiny"}, {})
    lr = train.short_schedule(run, 100, 1e-3)
    assert [lr(step) for step in range(10)] == pytest.approx([1e-4 * (step + 1) for step in range(10)])
    assert {lr(step) for step in range(10, 50)} == {1e-3}
    assert lr(75) == pytest.approx(0.55e-3) and lr(99) == pytest.approx(1e-4, rel=0.1)
