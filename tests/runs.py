"""Runs of train.py for the tests: processes of their own, without what every start of the program costs.

A server (multiprocessing's) has imported the program once and forks; its children are killed, signalled and
limited like any process. test_train.py compares such a run with one of `python train.py`, byte by byte.
"""

import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import train

FORKS = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if FORKS else "spawn")
CONTEXT.set_forkserver_preload(["warm"])

# every stage, every phase of pretraining, 60 steps of it; checkpoints where the context changes, at 50 and 55
SMALL = """--preset nano --threads 1 --device cpu --max_documents 8 --steps 45 --anneal_steps 5 --long_steps 5
--yarn_steps 5 --yarn_factor 16 --eval_every 60 --save_every 5 --needles 2 --tools 200 --trajectories 40
--tool_tasks 1 --sft_steps 12 --rl_steps 5 --rl_pool 3 --rl_tasks 3 --rl_segment 8""".split()


def program(arguments, streams, largest_file):
    """The child: `train.py arguments`, its output and errors in files."""
    for number, path in zip((1, 2), streams):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    if largest_file:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    train.main(arguments)


class Run:
    """A run that was started, with what it said and returned."""

    def __init__(self, *arguments, largest_file=None):
        self.folder = tempfile.TemporaryDirectory()
        self.streams = [Path(self.folder.name, name) for name in ("out", "err")]
        self.process = CONTEXT.Process(target=program,
                                       args=([*map(str, arguments)], self.streams, largest_file))
        self.process.start()

    def wait_until(self, moment):
        """Wait for `moment()`; False if the run is over before."""
        while self.process.is_alive():
            if moment():
                return True
            time.sleep(0.002)
        return False

    def kill(self):
        self.process.kill()
        self.process.join()

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self):
        self.process.join()
        return self

    @property
    def returncode(self):
        return self.process.exitcode

    @property
    def stdout(self):
        return self.streams[0].read_text(encoding="utf-8")

    @property
    def stderr(self):
        return self.streams[1].read_text(encoding="utf-8")


def run(*arguments, **more):
    """A run from its start to its end."""
    return Run(*arguments, **more).wait()


def kill_when(moment, *arguments):
    """Start a run and kill -9 it at a moment; whether it was still alive then."""
    started = Run(*arguments)
    alive = started.wait_until(moment)
    started.kill()
    return alive


def after(seconds):
    """The moment so many seconds from now."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end
