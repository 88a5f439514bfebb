"""--plan against arithmetic of its own, --dry_run against --plan and against what a step must send."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

import train
from kimi_k2 import KimiK2

GiB = 2**30
EXPERT, OTHERS = 3 * 7168 * 2048, 1_026_408_232_448 - 60 * 384 * 3 * 7168 * 2048  # elements of K2


def configured(preset="k2", model=(), **fields):
    return train.configure({"preset": preset, **fields}, dict(model))


def planned(capsys, *flags):
    """What --plan prints, as {first words of a line: its other columns}."""
    train.main(["--preset", "k2", "--plan", *flags])
    text = capsys.readouterr().out
    return {line[:24].strip(): re.split(r"\s{2,}", line[24:].strip()) for line in text.splitlines()}


# --plan -------------------------------------------------------------------------------------------


def test_phases_hours_energy_and_money_follow_from_the_tokens(capsys):
    lines = planned(capsys, "--world", "1024", "--ep", "64")
    assert lines["pretrain"][:3] == ["4,096", "230,968", "15,500.000 B"]
    assert lines["anneal"][2] == "399.969 B" and lines["long"][2] == "59.995 B"  # R 2.5: 400 B and 60 B
    # 2 FLOPs for each weight that multiplies; attention sees half of the keys, in 64 heads of 192 + 128
    weights = 32_861_500_928 - 163_840 * 7168 - 1_006_592
    flops = 3 * (2 * weights + 2 * 61 * 64 * (192 + 128) * 4097 / 2)
    assert float(lines["pretrain"][3]) == pytest.approx(flops, rel=1e-3)
    total = float(lines["FLOPs of the run"][0])
    hours = total / (1024 * 0.4 * 989e12) / 3600
    assert float(lines["time"][0].split()[0].replace(",", "")) == pytest.approx(hours, rel=1e-3)
    megawatt_hours = float(lines["energy"][0].split()[0].replace(",", ""))
    assert megawatt_hours == pytest.approx(1024 * hours / 1000, rel=1e-3)
    assert float(re.match(r"\$([\d,.]+)", lines["cost"][0])[1].replace(",", "")) == pytest.approx(
        2 * 1024 * hours, rel=1e-3)


@pytest.mark.parametrize(("world", "ep"), [(256, 64), (384, 384), (256, 8)])
def test_states_of_the_fullest_rank(world, ep):
    """Experts are held whole, ceil(384 / ep / dp) of a layer; the rest in even shares of its rows."""
    parts = train.gpu_memory(*configured(), world, ep, 4096)
    held = 60 * math.ceil(384 // ep / (world // ep)) * EXPERT + OTHERS / world
    assert parts["weights"] == parts["gradients"] == pytest.approx(4 * held, rel=1e-6)
    seconds = (2 * 163_840 * 7168 + 1_006_592) / world  # of AdamW: both embeddings and the norms
    assert parts["optimizer"] == pytest.approx(4 * (held + seconds), rel=1e-6)


def test_the_reports_layout(capsys):
    """R 2.4: about 6 TB of bf16 weights and fp32 gradients on 256 GPUs, about 30 GB a GPU with all states."""
    lines = planned(capsys, "--world", "4096", "--ep", "64")
    gib = [float(lines[part][-1]) for part in ("weights", "gradients", "optimizer")]
    assert gib[0] + gib[1] == pytest.approx(6 * 1_026_408_232_448 / 256 / GiB, rel=1e-3)
    assert 24e9 < sum(gib) * GiB < 30e9
    alone = planned(capsys, "--world", "256", "--ep", "64")  # one replica: part of it is offloaded
    assert float(alone["optimizer"][-1]) == pytest.approx(16 * gib[2], rel=1e-2)


def test_long_rows_need_memory_in_proportion():
    run, cfg = configured()
    short, long = (train.gpu_memory(run, cfg, 256, 64, n)["activations"] for n in (32_768, 131_072))
    assert 3.9 < long / short <= 4
    kept = 61 * 7168 * 4 * 98_304  # what each block reads, in fp32, for the tokens more
    assert kept < long - short < 2 * kept


def test_the_fewest_gpus_hold_a_step_and_fewer_do_not():
    run, cfg = configured()
    world, ep = train.smallest_world(run, cfg)
    fits = [sum(train.gpu_memory(run, cfg, n, e, 4096).values()) < 0.9 * 80 * GiB
            for n in (world, world - 8) for e in range(1, 385) if 384 % e == 0 == n % e]
    assert world % ep == 0 and any(fits)
    assert not any(fits[-sum(384 % e == 0 == (world - 8) % e for e in range(1, 385)):])
    assert train.smallest_world(*configured("tiny")) == (1, 1)


def test_users_of_a_serving_unit(capsys):
    """On H200 the published fp8 weights and full contexts need 16 GPUs, as Moonshot's own guide says."""
    lines = planned(capsys, "--gpu_gib", "141", "--gpu_tbps", "4.8")
    assert lines["serving"][0].startswith("16 GPUs, 1 B a weight")
    weights, cache = OTHERS + 60 * 384 * EXPERT / 16, 61 * (512 + 64) * 2 * 131_072
    users = int((0.9 * 141 * GiB - weights) // cache)
    size, everyone, each, together, price = lines["131,072"]
    assert (float(size), int(everyone)) == (8.578, 16 * users)
    seconds = (weights + users * cache) / 4.8e12  # memory is the limit here, not arithmetic
    assert float(each) == pytest.approx(1 / seconds, rel=1e-2)
    assert float(together.replace(",", "")) == pytest.approx(16 * users / seconds, rel=1e-2)
    assert float(price) == pytest.approx(16 * 2 / 3600 / (16 * users / seconds) * 1e6, rel=1e-2)


def test_a_model_without_experts_has_a_plan(capsys):
    train.main(["--preset", "tiny", "--first_k_dense_replace", "4", "--plan"])
    assert "serving                 8 GPUs" in capsys.readouterr().out


def test_owning_against_renting(capsys):
    flags = ["--serve_gpus", "32", "--gpu_price", "35040", "--gpu_years", "2", "--gpu_hour", "4.1"]
    lines = planned(capsys, *flags)
    assert lines["owning"][0].startswith("$67.20 an hour: $1,121,280")  # 32 x (2 + 0.1)
    assert lines["renting"][0].startswith("$131.20") and "50% of the hours" in lines["renting"][0]
    assert "never dearer" in planned(capsys, "--gpu_hour", "0.05")["renting"][0]


@pytest.mark.parametrize("flags", [["--plan", "--world", "100", "--ep", "64"], ["--dry_run"],
                                   ["--dry_run", "--world", "6", "--ep", "4"],
                                   ["--dry_run", "--world", "8", "--dtype", "fp32"],
                                   ["--plan", "--gpu_gib", "20"]])
def test_a_mesh_that_cannot_be_is_refused_in_a_line(flags):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--preset", "k2", *flags])
    assert str(stopped.value).startswith("train.py: ") and "\n" not in str(stopped.value)


# --dry_run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step():
    """Three layers of K2's widths, one dense, on 256 ranks: 4 x 64."""
    run, cfg = configured(model={"num_hidden_layers": 3, "vocab_size": 65_536}, world=256, ep=64)
    ledger, held, model, passes = train.dry_step(run, cfg)
    return SimpleNamespace(run=run, cfg=cfg, ledger=ledger, held=held, model=model, passes=passes)


def test_memory_of_a_dry_step_is_what_the_plan_says(step):
    parts = train.gpu_memory(step.run, step.cfg, 256, 64, 4096)
    for part, size in step.held.items():
        assert size == pytest.approx(parts[part], rel=0.01), part
    assert max(step.ledger.peaks.values()) == pytest.approx(sum(parts.values()), rel=0.05)


def test_what_is_not_recomputed_takes_memory_as_planned():
    """Less is held the more is made again; in between the plan counts the products that R 2.4.3 keeps."""
    peaks = {}
    for recompute in ("off", "parts", "blocks"):
        run, cfg = configured("medium", {"num_hidden_layers": 4}, world=8, ep=4, recompute=recompute)
        peaks[recompute] = max(train.dry_step(run, cfg)[0].peaks.values())
        planned = sum(train.gpu_memory(run, cfg, 8, 4, run.seq_len).values())
        assert peaks[recompute] == pytest.approx(planned, rel=0.05), recompute
    assert peaks["blocks"] < 0.9 * peaks["parts"] < 0.6 * peaks["off"]


def test_traffic_of_a_dry_step_is_what_the_plan_says(step):
    sent = {kind: sum(size for (stage, k, _), (_, size) in step.ledger.sent.items()
                      if k == kind and stage in ("forward", "backward")) / step.passes
            for kind in ("all-gather", "reduce-scatter", "all-to-all")}
    parts = train.gpu_traffic(step.run, step.cfg, 256, 64)
    assert sent["all-gather"] == pytest.approx(parts["weights"], rel=0.01)
    assert sent["reduce-scatter"] == pytest.approx(parts["gradients"], rel=0.01)
    assert sent["all-to-all"] == pytest.approx(parts["tokens"], rel=0.01)


def test_every_collective_has_its_dimension_of_the_mesh(step):
    """Each pass gathers 5 groups of all ranks (embedding, three layers, head) and 2 layers' experts of dp;
    tokens go to their experts and back, after the counts: 3 messages, and 2 more for the gradients."""
    counts = {key: count / step.passes for key, (count, _) in step.ledger.sent.items()}
    assert counts["forward", "all-gather", "all 256"] == 5 and counts["forward", "all-gather", "dp 4"] == 2
    assert counts["backward", "all-gather", "all 256"] == 4  # not the head again
    assert counts["backward", "reduce-scatter", "all 256"] == 5
    assert counts["forward", "all-to-all", "ep 64"] == 2 * 3
    assert counts["backward", "all-to-all", "ep 64"] == 2 * 5
    assert step.ledger.sent["update", "all-to-all", "all 256"][0] == 2  # Muon: to the owners and back


def test_shapes_that_a_rank_holds(step):
    shapes = {name: (tuple(p.shape), tuple(p.to_local().shape)) for name, p in step.model.named_parameters()}
    assert shapes["model.layers.1.mlp.experts.gate_proj"] == ((6, 2048, 7168), (2, 2048, 7168))
    assert shapes["model.layers.2.self_attn.q_b_proj.weight"] == ((12_288, 1536), (48, 1536))
    with torch.device("meta"):
        assert shapes.keys() == dict(KimiK2(step.cfg).named_parameters()).keys()


def test_dry_run_of_a_toy_prints_its_tables(capsys):
    train.main(["--preset", "nano", "--dry_run", "--world", "8", "--ep", "2"])
    text = capsys.readouterr().out
    assert re.search(r"layers\.N\.mlp\.experts\.up_proj +1 +\(4, 32, 64\) +\(1, 32, 64\)", text)
    for row in (r"forward +all 8 +all-gather", r"backward +dp 4 +reduce-scatter",
                r"backward +ep 2 +all-to-all", r"  all( +[\d.]+){2} +[+-]"):
        assert re.search(row, text), row


@pytest.mark.slow
def test_dry_run_of_the_full_model():
    run, cfg = configured(world=256, ep=64)
    ledger, *_ = train.dry_step(run, cfg)
    planned = sum(train.gpu_memory(run, cfg, 256, 64, 4096).values())
    assert max(ledger.peaks.values()) == pytest.approx(planned, rel=0.05)
