"""Checkpoints: what is written, what others read, what we read of others, and what goes wrong.

References: the published names and shapes, safetensors files opened by hand, transformers'
DeepseekV3, and a dequantisation in loops.
"""

import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_k2 import KimiConfig, KimiK2, Tokenizer, load_pretrained, save_pretrained

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk
TOKENS = torch.arange(40).view(2, 20) * 7 % 512
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0}
SHAPES = {  # overrides of nano that reach every branch of the checkpoint's layout
    "nano": {},
    "yarn": {"rope_scaling": YARN},
    "moonlight": {"q_lora_rank": None, "n_shared_experts": 2},
    "all MoE": {"first_k_dense_replace": 0},
    "all dense": {"first_k_dense_replace": 2},
}


def new_model(seed=0, **overrides):
    """A nano with weights large enough to matter, router biases and norm gains included."""
    torch.manual_seed(seed)
    model = KimiK2(KimiConfig.preset("nano", initializer_range=0.1, **overrides)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name or "e_score" in name:
                tensor += 0.1 * torch.randn_like(tensor)
    return model


def bytes_tokenizer():
    return Tokenizer({bytes([b]): b for b in range(256)})


@pytest.fixture
def folder(tmp_path):
    """A saved nano with its tokenizer, in one weight file."""
    save_pretrained(new_model(), bytes_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    save_pretrained(new_model(), None, tmp_path / "sharded", max_shard_bytes=150_000)
    return tmp_path / "sharded"


@torch.no_grad()
def logits_of(model):
    output = model(TOKENS)
    return output[0] if isinstance(output, tuple) else output.logits


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def assert_same_logits(model, reference):
    expected = logits_of(reference)
    assert expected.abs().max() > 0.1  # zeros would agree with anything
    assert (logits_of(model) - expected).abs().max() <= 1e-5 * expected.abs().max()


def header_of(path):
    """{tensor: (dtype, shape)} of a safetensors file, by its specification: length, JSON, bytes."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def headers_of(folder):
    return {
        name: entry
        for path in folder.glob("*.safetensors")
        for name, entry in header_of(path).items()
    }


def published_layout(cfg):
    """Names and shapes of K2's published files, for any config with a query latent."""
    C, H, F = cfg.hidden_size, cfg.num_attention_heads, cfg.moe_intermediate_size
    q, kv, rope = cfg.q_lora_rank, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    nope, v, V = cfg.qk_nope_head_dim, cfg.v_head_dim, cfg.vocab_size
    shapes = {
        "model.embed_tokens.weight": (V, C),
        "model.norm.weight": (C,),
        "lm_head.weight": (V, C),
    }

    def ffn(prefix, width):
        shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (width, C)
        shapes[f"{prefix}.down_proj.weight"] = (C, width)

    for n in range(cfg.num_hidden_layers):
        layer = f"model.layers.{n}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (C,),
            f"{layer}.post_attention_layernorm.weight": (C,),
            f"{layer}.self_attn.q_a_proj.weight": (q, C),
            f"{layer}.self_attn.q_a_layernorm.weight": (q,),
            f"{layer}.self_attn.q_b_proj.weight": (H * (nope + rope), q),
            f"{layer}.self_attn.kv_a_proj_with_mqa.weight": (kv + rope, C),
            f"{layer}.self_attn.kv_a_layernorm.weight": (kv,),
            f"{layer}.self_attn.kv_b_proj.weight": (H * (nope + v), kv),
            f"{layer}.self_attn.o_proj.weight": (C, H * v),
        }
        if n < cfg.first_k_dense_replace:
            ffn(f"{layer}.mlp", cfg.intermediate_size)
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (cfg.n_routed_experts, C)
        shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = (cfg.n_routed_experts,)
        ffn(f"{layer}.mlp.shared_experts", F * cfg.n_shared_experts)
        for e in range(cfg.n_routed_experts):
            ffn(f"{layer}.mlp.experts.{e}", F)
    return shapes


# what is written ----------------------------------------------------------------------------------


def test_files_of_a_folder(folder):
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tiktoken.model",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }


def test_names_and_shapes_are_the_published_ones(folder):
    """One tensor per expert, [out, in], nothing else in the file."""
    expected = published_layout(KimiConfig.preset("nano"))
    assert {name: shape for name, (_, shape) in headers_of(folder).items()} == expected


def test_each_expert_is_written_under_its_own_number(folder):
    model, files = new_model(), load_file(folder / "model.safetensors")
    stacked = model.state_dict()
    for part in ("gate_proj", "up_proj", "down_proj"):
        for e in range(8):
            single = files[f"model.layers.1.mlp.experts.{e}.{part}.weight"]
            assert torch.equal(single, stacked[f"model.layers.1.mlp.experts.{part}"][e])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), ("nano", torch.bfloat16)],
)
def test_saved_and_loaded_is_bit_equal(tmp_path, shape, dtype):
    """Also in bf16, where the router's correction biases stay fp32 in the model and in the file."""
    save_pretrained(new_model(**SHAPES[shape]), bytes_tokenizer(), tmp_path / "a")
    model, tok = load_pretrained(tmp_path / "a", dtype=dtype)
    save_pretrained(model, tok, tmp_path / "b")
    again, tok_again = load_pretrained(tmp_path / "b")
    assert_same_weights(model, again)
    assert again.cfg == model.cfg and tok_again.ranks == bytes_tokenizer().ranks
    assert torch.equal(logits_of(model), logits_of(again))
    kinds = {name: kind for name, (kind, _) in headers_of(tmp_path / "b").items()}
    assert all(kind == "F32" for name, kind in kinds.items() if "e_score" in name)
    usual = "F32" if dtype == torch.float32 else "BF16"
    assert {kind for name, kind in kinds.items() if "e_score" not in name} == {usual}


def test_loading_in_fp32_gives_the_saved_model(folder):
    model, _ = load_pretrained(folder)
    assert_same_weights(model, new_model())
    assert torch.equal(logits_of(model), logits_of(new_model()))
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_asked_for_holds_for_all_but_the_router_biases(folder, dtype):
    model, _ = load_pretrained(folder, dtype=dtype)
    for name, tensor in model.state_dict().items():
        saved = new_model().state_dict()[name]
        expected = saved if "e_score" in name else saved.to(dtype)
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name


def test_without_a_tokenizer_none_is_written_or_returned(tmp_path):
    save_pretrained(new_model(), None, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert load_pretrained(tmp_path / "model")[1] is None


def test_missing_parent_folders_are_made_and_a_string_is_a_path(tmp_path):
    save_pretrained(new_model(), None, str(tmp_path / "a/b/c"))
    assert_same_weights(load_pretrained(str(tmp_path / "a/b/c"))[0], new_model())


def test_the_config_file_names_dtype_class_and_token_ids(folder):
    fields = json.loads((folder / "config.json").read_text())
    assert (
        fields["architectures"] == ["DeepseekV3ForCausalLM"]
        and fields["model_type"] == "deepseek_v3"
    )
    assert fields["torch_dtype"] == "float32"
    special = bytes_tokenizer().special
    assert [fields[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [
        special["[BOS]"], special["[EOS]"], special["[PAD]"]]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == special["<|im_end|>"]


def test_a_tokenizer_that_does_not_fit_the_model_is_not_saved_silently(tmp_path):
    """A text may run out of pairs: then ids of the config and of the tokenizer must not differ."""
    model, tok = new_model(vocab_size=1024), bytes_tokenizer()  # 512 ids
    try:
        save_pretrained(model, tok, tmp_path / "model")
    except ValueError as error:
        assert "512" in str(error) and "1024" in str(error)
        return
    generation = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert generation["eos_token_id"] == tok.special["<|im_end|>"]


# shards -------------------------------------------------------------------------------------------


def test_shards_respect_their_size_and_the_index_tells_where_each_tensor_is(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    paths = sorted(sharded.glob("*.safetensors"))
    assert len(paths) > 3 and not (sharded / "model.safetensors").exists()
    names = [f"model-{i:05d}-of-{len(paths):05d}.safetensors" for i in range(1, len(paths) + 1)]
    assert [path.name for path in paths] == names
    where = {name: path.name for path in paths for name in header_of(path)}
    assert index["weight_map"] == where
    assert where.keys() == published_layout(KimiConfig.preset("nano")).keys()
    sizes = [4 * sum(math.prod(shape) for _, shape in header_of(path).values()) for path in paths]
    assert max(sizes) <= 150_000 and index["metadata"]["total_size"] == sum(sizes)


def test_shards_load_as_one_file_does(sharded):
    assert_same_weights(load_pretrained(sharded)[0], new_model())


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    save_pretrained(new_model(), None, tmp_path / "model", max_shard_bytes=1)
    paths = list((tmp_path / "model").glob("*.safetensors"))
    assert all(len(header_of(path)) == 1 for path in paths)
    assert_same_weights(load_pretrained(tmp_path / "model")[0], new_model())


# transformers -------------------------------------------------------------------------------------


def transformers_model(seed=1, **overrides):
    """DeepSeek-V3 of transformers with random weights and the shape of a nano."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    fields = KimiConfig.preset("nano", initializer_range=0.1, **overrides).to_json()
    by_class = ("architectures", "model_type")
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(**{k: v for k, v in fields.items() if k not in by_class})
    )
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name or "e_score" in name:
                tensor += 0.1 * torch.randn_like(tensor)
    return model.eval()


@pytest.mark.parametrize(
    ("shape", "max_shard_bytes"), [*((shape, 10**9) for shape in SHAPES), ("nano", 150_000)]
)
def test_transformers_loads_our_folder_with_nothing_missing(tmp_path, shape, max_shard_bytes):
    from transformers import AutoModelForCausalLM

    ours = new_model(**SHAPES[shape])
    save_pretrained(ours, bytes_tokenizer(), tmp_path / "model", max_shard_bytes)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(ours, theirs.eval())
    assert theirs.generation_config.eos_token_id == bytes_tokenizer().special["<|im_end|>"]


@pytest.mark.parametrize(
    ("shape", "size"), [*((shape, "10GB") for shape in SHAPES), ("nano", "100KB")]
)
def test_we_load_a_folder_that_transformers_saved(tmp_path, shape, size):
    theirs = transformers_model(**SHAPES[shape])
    assert theirs.config.n_group == theirs.config.topk_group == 1 and theirs.config.norm_topk_prob
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "100KB")
    ours, tok = load_pretrained(tmp_path)
    assert tok is None
    assert_same_logits(ours, theirs)


def test_old_rotary_buffers_in_a_file_are_ignored(folder):
    """Early DeepSeek files hold them; they follow from the config."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    assert_same_weights(load_pretrained(folder)[0], new_model())


# fp8 ----------------------------------------------------------------------------------------------

ODD = dict(hidden_size=200, q_lora_rank=130, kv_lora_rank=70, v_head_dim=20, n_routed_experts=4,
           moe_intermediate_size=150, intermediate_size=260)


def is_quantised(name):
    """As published: every matrix of a layer but the router's; norms, embedding and head stay."""
    return "_proj" in name and name.endswith(".weight")


def quantise(weight):
    """(fp8 weight, one scale per 128 x 128 block)."""
    rows, columns = (-(-n // 128) for n in weight.shape)
    quantised, scale = (
        torch.empty_like(weight, dtype=torch.float8_e4m3fn),
        torch.empty(rows, columns),
    )
    for i in range(rows):
        for j in range(columns):
            at = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scale[i, j] = weight[at].abs().max() / 448
            quantised[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
    return quantised, scale


def dequantise(quantised, scale):
    """Element by block: weight * weight_scale_inv, rounded to bf16."""
    weight = torch.empty(quantised.shape, dtype=torch.bfloat16)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            weight[at] = (quantised[at].float() * scale[i, j]).bfloat16()
    return weight


@pytest.fixture
def fp8_folder(tmp_path):
    """(folder, {name: expected weight}) in the layout that Moonshot publishes."""
    model = new_model(**ODD)
    save_pretrained(model, None, tmp_path / "fp8")
    file = tmp_path / "fp8/model.safetensors"
    tensors, expected = {}, {}
    for name, weight in load_file(file).items():
        if is_quantised(name):
            tensors[name], tensors[name + "_scale_inv"] = quantise(weight)
            expected[name] = dequantise(tensors[name], tensors[name + "_scale_inv"])
            assert (expected[name] - weight).abs().max() < 0.05 * weight.abs().max()
        else:
            tensors[name] = expected[name] = weight if "e_score" in name else weight.bfloat16()
    save_file(tensors, file)
    return tmp_path / "fp8", expected


def test_fp8_blocks_are_multiplied_out(fp8_folder):
    folder, expected = fp8_folder
    model, _ = load_pretrained(folder)
    save_pretrained(model, None, folder.with_name("bf16"))
    files = load_file(folder.with_name("bf16") / "model.safetensors")
    assert files.keys() == expected.keys()
    for name, weight in expected.items():
        assert files[name].dtype == weight.dtype and torch.equal(files[name], weight), name


def test_an_fp8_weight_without_its_scales_is_refused(fp8_folder):
    """Its numbers alone are some hundred times too large."""
    folder, _ = fp8_folder
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"o_proj\.weight") as error:
        load_pretrained(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (4,)])
def test_scales_of_another_shape_are_refused(fp8_folder, shape):
    folder, _ = fp8_folder
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight_scale_inv"
    assert tensors[name].shape == (3, 2)
    tensors[name] = torch.ones(shape)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="gate_proj"):
        load_pretrained(folder)


# what goes wrong ----------------------------------------------------------------------------------


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def cut_short(folder):
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def cut_in_the_header(folder):
    os.truncate(folder / "model.safetensors", 500)


def emptied(folder):
    os.truncate(folder / "model.safetensors", 0)


def overwritten(folder):
    (folder / "model.safetensors").write_bytes(b"<html>404</html>" * 1000)


def tensor_lost(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))


def tensor_unknown(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.7.mlp.bias": torch.ones(3)}))


def tensor_of_another_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))


def tensor_that_broadcasts(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(1)}))


def expert_transposed(folder):
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))


def config_lost(folder):
    (folder / "config.json").unlink()


def config_broken(folder):
    (folder / "config.json").write_text("{")


def config_of_more_layers(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 3}))


def weights_lost(folder):
    (folder / "model.safetensors").unlink()


def index_of_a_lost_file(folder):
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_broken(folder):
    (folder / "model.safetensors.index.json").write_text("{")


def index_without_a_map(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def ranks_cut_short(folder):
    os.truncate(folder / "tiktoken.model", 1000)


def folder_lost(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (cut_short, ValueError, "model.safetensors is damaged or cut short"),
        (cut_in_the_header, ValueError, "model.safetensors is damaged"),
        (emptied, ValueError, "model.safetensors is damaged"),
        (overwritten, ValueError, "model.safetensors is damaged"),
        (
            tensor_lost,
            ValueError,
            "1 tensors missing ['model.layers.1.mlp.experts.3.up_proj.weight']",
        ),
        (tensor_unknown, ValueError, "1 unknown ['model.layers.7.mlp.bias']"),
        (tensor_of_another_shape, ValueError, "model.norm.weight is (65,), not (64,)"),
        (tensor_that_broadcasts, ValueError, "model.norm.weight is (1,), not (64,)"),
        (expert_transposed, ValueError, "experts.0.up_proj.weight is (64, 32), not (32, 64)"),
        (config_lost, FileNotFoundError, "config.json"),
        (config_broken, ValueError, "config.json is not valid JSON"),
        (config_of_more_layers, ValueError, "tensors missing ['model.layers.2."),
        (weights_lost, FileNotFoundError, "no *.safetensors files"),
        (index_of_a_lost_file, FileNotFoundError, "model-00002-of-00002.safetensors"),
        (index_broken, ValueError, "model.safetensors.index.json"),
        (index_without_a_map, ValueError, "model.safetensors.index.json"),
        (ranks_cut_short, ValueError, "tiktoken.model"),
        (folder_lost, FileNotFoundError, "no model folder"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_is_named_with_its_file(folder, damage, kind, words):
    damage(folder)
    with pytest.raises(kind) as error:
        load_pretrained(folder)
    assert words in str(error.value) and str(folder) in str(error.value)


def test_a_missing_shard_is_named(sharded):
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_pretrained(sharded)
    assert lost.name in str(error.value) and str(sharded) in str(error.value)


def test_a_missing_shard_is_noticed_without_an_index_too(sharded):
    lost = sorted(sharded.glob("*.safetensors"))[1]
    n_lost = len(header_of(lost))
    lost.unlink()
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=f"{n_lost} tensors missing") as error:
        load_pretrained(sharded)
    assert str(sharded) in str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_never_opened(folder, name):
    """Under its own name it is not looked at; under a safetensors name it is damaged."""
    touched = folder / "executed"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Touch(str(touched))))
    with pytest.raises((FileNotFoundError, ValueError), match="safetensors"):
        load_pretrained(folder)
    assert not touched.exists()
    pickle.loads((folder / name).read_bytes())  # the trap does work
    assert touched.exists()


class Touch:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


# replacing a folder -------------------------------------------------------------------------------


def test_a_second_save_replaces_the_folder_completely(sharded):
    (sharded / "stale.safetensors").write_bytes(b"old")
    (sharded / "notes").mkdir()
    save_pretrained(new_model(seed=2), bytes_tokenizer(), sharded)
    assert_same_weights(load_pretrained(sharded)[0], new_model(seed=2))
    assert not list(sharded.glob("model-*")) and not list(sharded.glob("*index*"))
    assert not (sharded / "stale.safetensors").exists() and not (sharded / "notes").exists()
    assert os.listdir(sharded.parent) == [sharded.name]


def test_a_folder_that_is_no_model_is_never_replaced(tmp_path):
    """A slip such as save_pretrained(model, tok, ".") must not cost the files that are there."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises((OSError, ValueError), match="home"):
        save_pretrained(new_model(), None, home)
    assert (home / "thesis.txt").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["home"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "model").mkdir()
    save_pretrained(new_model(), None, tmp_path / "model")
    assert_same_weights(load_pretrained(tmp_path / "model")[0], new_model())


def test_leftovers_of_a_killed_save_do_no_harm(folder):
    for suffix in (".new", ".old"):
        shutil.copytree(folder, folder.with_name(folder.name + suffix))
        (folder.with_name(folder.name + suffix) / "half.safetensors").write_bytes(b"half")
    save_pretrained(new_model(seed=2), None, folder)
    assert_same_weights(load_pretrained(folder)[0], new_model(seed=2))
    assert os.listdir(folder.parent) == [folder.name]


def test_saving_twice_through_a_symbolic_link(folder):
    """A disk for weights linked into the run's folder is common."""
    link = folder.with_name("link")
    link.symlink_to(folder, target_is_directory=True)
    for seed in (2, 3):
        save_pretrained(new_model(seed), None, link)
        assert_same_weights(load_pretrained(link)[0], new_model(seed))
    assert set(os.listdir(folder.parent)) <= {folder.name, link.name}


def run_python(script, *arguments):
    """Output of a script in a fresh interpreter, as JSON."""
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


FULL_DISK = """
import json, os, resource, signal, sys
from kimi_k2 import KimiConfig, KimiK2, Tokenizer, save_pretrained
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails with EFBIG instead
tok = Tokenizer.train((f"word{i} {i * i}" for i in range(3000)), vocab_size=1024)
n_json = len(tok.to_tokenizer_json())
results, folders = [], sys.argv[1:]
for limit, tokenizer, widths in (
    (1_000, None, dict(vocab_size=512)),  # not even the first weight file fits
    (40_000, None, dict(vocab_size=512, intermediate_size=2000)),  # a later one does not
    (n_json - 1, tok, dict(vocab_size=tok.n_vocab, hidden_size=8)),  # only the tokenizer does not
):
    model = KimiK2(KimiConfig.preset("nano", **{"hidden_size": 16, **widths}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for folder in folders:
        try:
            save_pretrained(model, tokenizer, folder, max_shard_bytes=n_json // 2)
            result = "saved"
        except OSError as error:
            result = f"OSError: {error}"
        results.append([folder, result, os.listdir(os.path.dirname(folder))])
print(json.dumps(results))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(folder, tmp_path_factory):
    """A limit on file size stands for a full disk: hit at once, in the middle, at the very end. After a kill
    between the two renames only the old model's other name is left: it must not be lost either."""
    killed = tmp_path_factory.mktemp("killed") / "model"
    shutil.copytree(folder, killed.with_name("model.old"))
    results = run_python(FULL_DISK, folder, killed)
    assert len(results) == 2 * 3
    for where, message, names in results:
        assert message.startswith(f"OSError: could not save {where}") and "too large" in message.lower()
        assert len(names) == 1
    for survivor in (folder, *killed.parent.iterdir()):
        model, tok = load_pretrained(survivor)
        assert_same_weights(model, new_model())
        assert tok.ranks == bytes_tokenizer().ranks


MEMORY = """
import json, sys, threading, time
from safetensors.torch import load_file
from kimi_k2 import load_pretrained

def held():  # bytes of our own: pages of a mapped file count as cache, the system takes them back
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) * 1024

def watch():
    while not done:
        seen.append(held())
        time.sleep(0.001)

def peak_of(work):
    global done, seen
    done, seen, before = False, [], held()
    thread = threading.Thread(target=watch)
    thread.start()
    result = work()
    done = True
    thread.join()
    return max(seen) - before

def twice():  # the other way: the files first, then a model beside them
    files = {k: v.clone() for k, v in load_file(wide + "/model.safetensors").items()}
    return files, load_pretrained(wide)

nano, wide = sys.argv[1:]
load_pretrained(nano)  # imports and thread pools are paid before
print(json.dumps([peak_of(lambda: load_pretrained(wide)), peak_of(twice)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
def test_loading_needs_no_second_copy_of_the_weights(folder, tmp_path):
    """100 MB of weights peak below 1.3 times their size; the control, a second copy, near twice."""
    wide = new_model(hidden_size=256, moe_intermediate_size=1024, n_routed_experts=32)
    size = sum(p.nbytes for p in wide.parameters())
    assert size > 100e6
    save_pretrained(wide, None, tmp_path / "wide")
    del wide
    ours, control = run_python(MEMORY, folder, tmp_path / "wide")
    assert 0.8 * size < ours < 1.3 * size
    assert control > 1.8 * size
