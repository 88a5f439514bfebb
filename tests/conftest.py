"""What all tests share: one thread, one way to start train.py, and one small run of the whole recipe."""

import os
from pathlib import Path

TESTS = Path(__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: models this small only lose time to a second thread
os.environ["PYTHONPATH"] = os.pathsep.join(  # for what tests start
    [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])

import functools  # noqa: E402
import shutil  # noqa: E402

import pytest  # noqa: E402
from runs import SMALL, run  # noqa: E402


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """recipe(stage): the folder of the small run up to that stage, uninterrupted. Copy it to change it."""
    folder = tmp_path_factory.mktemp("recipe")

    @functools.cache
    def upto(stage):
        before = {"pretrain": None, "sft": "pretrain", "rl": "sft"}[stage]
        if before:
            shutil.copytree(upto(before), folder / stage)
        # the last stage as most people start it, with none named: those before it are done already
        done = run(*([] if stage == "rl" else [stage]), *SMALL, "--out", folder / stage)
        assert done.returncode == 0, done.stderr
        return folder / stage

    return upto
