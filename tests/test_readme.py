"""README says what is there: links, the section map, commands, code; and no function is too long to read."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch

import train
from kimi_k2 import KimiConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if not kind for line in block.splitlines()
            if line.startswith(("python ", "torchrun "))]


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) < 250 and "<!--" not in README
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 5
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]


@pytest.mark.parametrize("name", ["kimi_k2.py", "train.py"])
def test_the_map_has_the_sections_of_the_files(name):
    """The same numbers, and titles that begin with the same word."""
    source = (ROOT / name).read_text(encoding="utf-8")
    headings = dict(re.findall(r"^# (\d)  (?:The )?(\w+)", source, re.MULTILINE))
    table = README[README.index(f"| `{name}` |"):].split("\n\n")[0]
    rows = dict(re.findall(r"^\| (\d) (?:The )?(\w+)", table, re.MULTILINE))
    assert headings.keys() == rows.keys() == {str(n) for n in range(1, 9)}
    assert {n: word.lower() for n, word in rows.items()} == {n: word.lower() for n, word in headings.items()}


def words_of(command):
    """A README line's program and flags, without the explanation that follows two blanks."""
    return shlex.split(re.split(r" {2,}", command)[0].replace("URL", "http://localhost:1").replace("...", ""))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_flags_that_exist(command):
    words = words_of(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, given = words[at], words[at + 1 :]
    assert (ROOT / script).exists()
    if script == "train.py":
        train.parse_command(given)
    else:
        source = (ROOT / script).read_text(encoding="utf-8")
        assert not [word for word in given if word.startswith("--") and f'"{word}"' not in source]


def test_the_code_block_runs_and_says_the_truth():
    code = next(block for kind, block in BLOCKS if kind == "python")
    here = {"tokens": torch.randint(0, 4096, (2, 16)), "targets": torch.randint(0, 4096, (2, 16))}
    exec(compile(code, "README.md", "exec"), here)
    assert here["opt"].max_logits.shape == (here["cfg"].num_hidden_layers, here["cfg"].num_attention_heads)
    last = code.strip().splitlines()[-1]
    assert eval(last, here) == int(last.rpartition("# ")[2].replace(",", ""))


def test_presets_in_the_table_are_those_of_the_code():
    table = README[README.index("| preset |"):].split("\n\n")[0]
    rows = {cells[0].strip(): cells for cells in (line.strip("|").split("|")
                                                 for line in table.splitlines()[2:])}
    for name, cells in rows.items():
        cfg = KimiConfig.preset(name)
        assert int(cells[2].replace(",", "")) == cfg.max_position_embeddings, name
    assert set(rows) == set(train.RUN_DEFAULTS)


@pytest.mark.parametrize("name", ["kimi_k2.py", "train.py", "sample.py"])
def test_no_function_is_longer_than_a_screen_or_two(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    long = [(node.name, node.end_lineno - node.lineno + 1) for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80]
    assert not long
