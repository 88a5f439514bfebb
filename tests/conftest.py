"""What all tests share: one thread, one way to start train.py, and one small run of the whole recipe."""

import os
from pathlib import Path

TESTS = Path(__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: models this small only lose time to a second thread
os.environ["PYTHONPATH"] = os.pathsep.join(  # for what tests start
    [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])

import functools  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402

import pytest  # noqa: E402
from runs import SMALL  # noqa: E402


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """recipe(stage): the folder of the small run up to that stage, uninterrupted. Copy it to change it.

    It is started as people start it; the forked runs that are compared with it hash strings otherwise."""
    folder = tmp_path_factory.mktemp("recipe")

    @functools.cache
    def upto(stage):
        out = folder / stage
        if stage != "pretrain":
            shutil.copytree(upto({"sft": "pretrain", "rl": "sft"}[stage]), out)
        named = [] if stage == "rl" else [stage]  # none: all that is left
        done = subprocess.run([sys.executable, TESTS.parent / "train.py", *named, *SMALL, "--out", out],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return out

    return upto
