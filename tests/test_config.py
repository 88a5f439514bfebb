"""KimiConfig: presets, config files of K2, transformers and others, refused values, costs."""

import dataclasses
import json

import pytest
import torch

from kimi_k2 import KimiConfig, KimiK2, count_parameters, gate_factor, rope_frequencies

# the table of the presets, written down a second time: a slip in one of the two shows
COLUMNS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts",
    "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size", "intermediate_size",
    "max_position_embeddings",
)
TABLE = {
    "nano": (512, 64, 2, 2, 32, 16, 16, 8, 16, 8, 2, 1, 32, 96, 64),
    "tiny": (4096, 128, 4, 4, 64, 32, 32, 16, 32, 16, 2, 1, 64, 192, 256),
    "mini": (8192, 384, 8, 8, 192, 64, 32, 16, 32, 32, 4, 1, 128, 640, 512),
    "small": (32768, 768, 12, 12, 384, 128, 64, 32, 64, 64, 8, 1, 256, 2304, 2048),
    "medium": (65536, 2048, 24, 16, 512, 256, 128, 64, 128, 128, 8, 1, 768, 6912, 4096),
    "moonlight": (163840, 2048, 27, 16, None, 512, 128, 64, 128, 64, 6, 2, 1408, 11264, 8192),
    "k2": (163840, 7168, 61, 64, 1536, 512, 128, 64, 128, 384, 8, 1, 2048, 18432, 131072),
}
# total and active, in units of 10^6 or 10^9, with the number of decimals the table shows
COSTS = {
    "nano": (1e6, "0.2", "0.1"),
    "tiny": (1e6, "2.6", "1.6"),
    "mini": (1e6, "43.7", "14.8"),
    "small": (1e9, "0.5", "0.13"),
    "medium": (1e9, "14.5", "1.5"),
    "moonlight": (1e9, "16", "2.9"),
    "k2": (1e9, "1026", "32.9"),
}

K2_FILE = {  # the published config.json, the fields we do not use included
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
        "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "ep_size": 1,
    "pretraining_tp": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    },
}

SIZES = [name for name in COLUMNS if name != "q_lora_rank"] + ["first_k_dense_replace"]
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def write(folder, **changes):
    """A config.json as K2's with fields changed; the value ... removes one. Returns its path."""
    fields = {key: value for key, value in (K2_FILE | changes).items() if value is not ...}
    path = folder / "config.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path


def transformers_config(fields):
    from transformers import DeepseekV3Config

    named_by_class = ("architectures", "model_type")
    return DeepseekV3Config(**{k: v for k, v in fields.items() if k not in named_by_class})


# presets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_preset_has_the_fields_of_the_table(name):
    cfg = KimiConfig.preset(name)
    assert tuple(getattr(cfg, column) for column in COLUMNS) == TABLE[name]
    assert cfg.first_k_dense_replace == 1
    # only the published K2 reaches beyond the length it was trained at
    assert (cfg.rope_scaling is not None) == (name == "k2")


@pytest.mark.parametrize("name", COSTS)
def test_totals_and_actives_round_to_the_table(name):
    unit, *shown = COSTS[name]
    counts = count_parameters(KimiConfig.preset(name))
    for count, text in zip((counts.total, counts.active), shown, strict=True):
        decimals = len(text.partition(".")[2])
        assert f"{count / unit:.{decimals}f}" == text


@pytest.mark.parametrize("name", TABLE)
def test_total_is_the_number_of_elements_of_the_state_dict(name):
    with torch.device("meta"):
        state = KimiK2(KimiConfig.preset(name)).state_dict()
    assert count_parameters(KimiConfig.preset(name)).total == sum(t.numel() for t in state.values())


def test_exact_counts_of_the_two_published_models():
    assert count_parameters(KimiConfig.preset("k2")).total == 1_026_408_232_448
    assert count_parameters(KimiConfig.preset("moonlight")).total == 15_960_110_208


def test_active_counts_k_experts_of_each_layer():
    """All experts minus those a token does not meet, 60 layers x (384 - 8) x 3 x 7168 x 2048."""
    counts = count_parameters(KimiConfig.preset("k2"))
    assert counts.total - counts.active == 60 * 376 * 3 * 7168 * 2048


def test_defaults_are_k2_without_its_context_extension():
    published = KimiConfig.preset("k2", rope_scaling=None)
    assert dataclasses.replace(KimiConfig(), routed_scaling_factor=2.827) == published


def test_an_override_changes_that_field_only():
    base, wide = KimiConfig.preset("tiny"), KimiConfig.preset("tiny", hidden_size=256)
    assert wide.hidden_size == 256
    assert dataclasses.replace(wide, hidden_size=base.hidden_size) == base


@pytest.mark.parametrize(("wrong", "right"), [("tinny", "tiny"), ("k22", "k2"), ("smal", "small")])
def test_unknown_preset_names_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=rf"'{wrong}', did you mean {right}\?"):
        KimiConfig.preset(wrong)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("n_routed_expert", "n_routed_experts"), ("hiden_size", "hidden_size")],
)
def test_unknown_override_names_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=rf"'{wrong}', did you mean {right}\?"):
        KimiConfig.preset("tiny", **{wrong: 4})


def test_a_name_that_resembles_nothing_lists_the_presets():
    with pytest.raises(ValueError, match="xyzzy") as error:
        KimiConfig.preset("xyzzy")
    assert "did you mean" not in str(error.value)
    assert all(name in str(error.value) for name in TABLE)


# the gate's factor --------------------------------------------------------------------------------


def monte_carlo_factor(n, k):
    """Mean of 1 / |p|_2 over the top k of n sigmoids of gaussians, with another generator."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(20_000, n, generator=generator, dtype=torch.float64).sigmoid()
    p = scores.topk(k).values
    p = p / p.sum(1, keepdim=True)
    return (1 / p.norm(dim=1)).mean().item()


@pytest.mark.parametrize(("n", "k"), [(8, 2), (16, 2), (64, 6), (64, 8), (384, 8)])
def test_gate_factor_is_the_expectation_it_claims(n, k):
    assert gate_factor(n, k) == pytest.approx(monte_carlo_factor(n, k), rel=2e-3)


def test_gate_factor_gives_the_published_values():
    assert gate_factor(64, 6) == pytest.approx(2.446, abs=1e-3)
    assert gate_factor(384, 8) == pytest.approx(2.827, abs=1.5e-3)


@pytest.mark.parametrize("changes", [{"n_routed_experts": 64}, {"num_experts_per_tok": 6}])
def test_overriding_the_experts_recomputes_the_factor(changes):
    cfg = KimiConfig.preset("tiny", **changes)
    expected = monte_carlo_factor(cfg.n_routed_experts, cfg.num_experts_per_tok)
    assert cfg.routed_scaling_factor == pytest.approx(expected, rel=2e-3)
    assert cfg.routed_scaling_factor != KimiConfig.preset("tiny").routed_scaling_factor


def test_a_given_factor_is_kept():
    cfg = KimiConfig.preset("tiny", n_routed_experts=64, routed_scaling_factor=1.5)
    assert cfg.routed_scaling_factor == 1.5


# config files -------------------------------------------------------------------------------------


def test_k2s_published_file_is_the_preset(tmp_path):
    assert KimiConfig.from_json(write(tmp_path)) == KimiConfig.preset("k2")


@pytest.mark.parametrize("name", TABLE)
def test_each_preset_survives_a_file(tmp_path, name):
    cfg = KimiConfig.preset(name)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(cfg.to_json()), encoding="utf-8")
    assert KimiConfig.from_json(path) == cfg
    assert KimiConfig.from_json(str(path)) == cfg


def test_a_file_without_q_lora_rank_has_a_full_query_projection(tmp_path):
    assert KimiConfig.from_json(write(tmp_path, q_lora_rank=...)).q_lora_rank is None
    assert KimiConfig.from_json(write(tmp_path, q_lora_rank=None)).q_lora_rank is None


def test_full_query_projection_counts_its_one_matrix():
    """q_lora_rank None: C * H * D elements instead of two factors and a norm."""
    low, full = (KimiConfig.preset("nano", q_lora_rank=q) for q in (32, None))
    difference = count_parameters(full).total - count_parameters(low).total
    width = 2 * (16 + 8)
    assert difference == 2 * (64 * width - (64 * 32 + 32 * width + 32))


def test_token_ids_in_the_file_are_those_of_k2():
    fields = KimiConfig.preset("k2").to_json()
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (163584, 163585)
    assert fields["pad_token_id"] == 163839


@pytest.mark.parametrize("yarn", [None, YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}])
@pytest.mark.parametrize("name", ["nano", "moonlight"])
def test_transformers_5_reads_our_file_and_we_read_its_own(tmp_path, name, yarn):
    """Through transformers' config class, which moves theta and YaRN into rope_parameters."""
    cfg = KimiConfig.preset(name, rope_scaling=yarn, rope_theta=12345.0)
    transformers_config(cfg.to_json()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_parameters"]["rope_theta"] == 12345.0 and "rope_theta" not in saved
    assert KimiConfig.from_json(tmp_path / "config.json") == cfg


def test_yarn_keys_left_out_mean_the_same_as_in_transformers(tmp_path):
    """Rotary frequencies and factor from a file with the two compulsory keys only."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    yarn = {"factor": 16.0, "original_max_position_embeddings": 4096}
    fields = KimiConfig.preset("moonlight", max_position_embeddings=65536).to_json()
    theirs = transformers_config(fields | {"rope_scaling": yarn | {"rope_type": "yarn"}})
    theirs.save_pretrained(tmp_path)
    w, factor = rope_frequencies(KimiConfig.from_json(tmp_path / "config.json"))
    rotary = DeepseekV3RotaryEmbedding(theirs)
    torch.testing.assert_close(w, rotary.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(rotary.attention_scaling)


def test_a_llama_config_is_refused_by_the_sizes_it_lacks(tmp_path):
    llama = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
        "intermediate_size": 11008, "num_attention_heads": 32, "max_position_embeddings": 4096,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(llama))
    with pytest.raises(ValueError, match="kv_lora_rank.*missing") as error:
        KimiConfig.from_json(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["kv_lora_rank", "n_routed_experts", "hidden_size"])
def test_a_size_that_is_missing_is_named_and_not_guessed(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} missing"):
        KimiConfig.from_json(write(tmp_path, **{name: ...}))


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "[1, 2]", '"k2"', "\x00", "{'a': 1}"])
def test_broken_json_names_the_file(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="JSON") as error:
        KimiConfig.from_json(path)
    assert str(path) in str(error.value)


def test_bytes_that_are_no_text_name_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'{"hidden_size": "\xff\xfe"}')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        KimiConfig.from_json(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        KimiConfig.from_json(tmp_path / "nowhere.json")


# refused values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_group", 8), ("topk_group", 4), ("attention_bias", True), ("scoring_func", "softmax"),
        ("tie_word_embeddings", True), ("norm_topk_prob", False), ("hidden_act", "gelu"),
        ("topk_method", "greedy"), ("moe_layer_freq", 2), ("num_nextn_predict_layers", 1),
    ],
)
def test_another_architecture_is_refused(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*{value!r}") as error:
        KimiConfig.from_json(write(tmp_path, **{field: value}))
    assert "config.json" in str(error.value)


def test_grouped_key_value_heads_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_key_value_heads"):
        KimiConfig.from_json(write(tmp_path, num_key_value_heads=8))


def test_rotary_halves_instead_of_pairs_are_refused(tmp_path):
    """With rope_interleave false the rows of q and k stand in another order: other logits."""
    with pytest.raises(ValueError, match="rope_interleave"):
        KimiConfig.from_json(write(tmp_path, rope_interleave=False))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "longrope"])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_other_rope_scalings_are_refused(tmp_path, kind, place, key):
    rope = {key: kind, "factor": 4.0, "rope_theta": 50000.0}
    with pytest.raises(ValueError, match=f"rope_scaling.*'{kind}'"):
        KimiConfig.from_json(write(tmp_path, **{place: rope}))


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"type": "yarn"}, "factor"),
        ({"type": "yarn", "factor": 4.0}, "original_max_position_embeddings"),
        (YARN | {"factor": "4"}, "factor"),
        (YARN | {"factor": 0.5}, "factor"),
        (YARN | {"factor": float("nan")}, "factor"),
        (YARN | {"beta_fast": -1}, "beta_fast"),
        (YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ("yarn", "rope_scaling"),
        ([4.0], "rope_scaling"),
    ],
)
def test_an_incomplete_yarn_names_what_is_wrong(rope, named):
    with pytest.raises(ValueError, match=named):
        KimiConfig.preset("nano", rope_scaling=rope)


def test_rope_parameters_that_are_no_object_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rope"):
        KimiConfig.from_json(write(tmp_path, rope_parameters="yarn"))


@pytest.mark.parametrize("name", SIZES + ["q_lora_rank"])
@pytest.mark.parametrize("value", [-1, 2.0, True, "64", float("nan"), [64]])
def test_a_size_must_be_a_whole_number(name, value):
    with pytest.raises(ValueError) as error:
        KimiConfig.preset("nano", **{name: value})
    assert name in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize("name", SIZES)
def test_only_dense_layers_and_shared_experts_may_be_none_at_all(name):
    if name in ("first_k_dense_replace", "n_shared_experts"):
        assert getattr(KimiConfig.preset("nano", **{name: 0}), name) == 0
    else:
        with pytest.raises(ValueError, match=rf"{name} .*got 0"):
            KimiConfig.preset("nano", **{name: 0})


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_null_in_the_file_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} .*None"):
        KimiConfig.from_json(write(tmp_path, num_key_value_heads=..., **{name: None}))


@pytest.mark.parametrize(
    "name", ["rope_theta", "rms_norm_eps", "initializer_range", "routed_scaling_factor"]
)
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1e4"])
def test_a_scale_must_be_a_positive_number(name, value):
    with pytest.raises(ValueError) as error:
        KimiConfig.preset("nano", **{name: value})
    assert name in str(error.value) and repr(value) in str(error.value)


def test_an_odd_rotary_width_cannot_form_pairs():
    with pytest.raises(ValueError, match="qk_rope_head_dim .*got 7"):
        KimiConfig.preset("nano", qk_rope_head_dim=7)


def test_more_experts_a_token_than_there_are():
    with pytest.raises(ValueError, match=r"num_experts_per_tok \(9\).*n_routed_experts \(8\)"):
        KimiConfig.preset("nano", num_experts_per_tok=9)
    assert KimiConfig.preset("nano", num_experts_per_tok=8).num_experts_per_tok == 8


def test_more_dense_layers_than_layers():
    with pytest.raises(ValueError, match=r"first_k_dense_replace \(3\).*num_hidden_layers \(2\)"):
        KimiConfig.preset("nano", first_k_dense_replace=3)
    assert KimiConfig.preset("nano", first_k_dense_replace=2).first_k_dense_replace == 2


def test_a_config_cannot_be_changed_behind_a_model():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KimiConfig.preset("nano").hidden_size = 128


# costs --------------------------------------------------------------------------------------------


def test_weights_and_gradients_take_the_reports_6_terabytes():
    """bf16 weights and fp32 gradients of 1.026e12 parameters: 6.16e12 bytes."""
    bytes_of = count_parameters(KimiConfig.preset("k2")).training_bytes(weight=2, gradient=4)
    assert bytes_of["weights"] == 2 * 1_026_408_232_448
    assert bytes_of["weights"] + bytes_of["gradients"] == pytest.approx(6.16e12, rel=1e-3)


@pytest.mark.parametrize("name", ["nano", "moonlight", "k2"])
def test_muon_keeps_one_state_and_adamw_two(name):
    """Momentum for every element, a second moment for both embeddings and the norms."""
    cfg = KimiConfig.preset(name)
    with torch.device("meta"):
        parameters = dict(KimiK2(cfg).named_parameters())
    adamw = [p for n, p in parameters.items() if "embed" in n or "lm_head" in n or "norm" in n]
    n_adamw = sum(p.numel() for p in adamw)
    n_bias = (cfg.num_hidden_layers - cfg.first_k_dense_replace) * cfg.n_routed_experts
    states = count_parameters(cfg).training_bytes(state=2)["optimizer"] / 2
    n_states = sum(p.numel() for p in parameters.values()) + n_adamw
    # the router biases have no state; counting them is a rounding error of the plan
    assert n_states <= states <= n_states + n_bias


def test_cache_of_k2_is_70_kilobytes_a_token():
    counts = count_parameters(KimiConfig.preset("k2"))
    assert counts.cache_bytes_per_token() == 70_272
    assert counts.cache_bytes_per_token() * 131072 / 2**30 == pytest.approx(8.58, abs=0.005)
