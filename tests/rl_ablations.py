"""Reinforcement learning from one fine-tuned model: its parts left out one by one, or several seeds.

    python tests/rl_ablations.py runs/toy                                    the table of ablations, one seed
    python tests/rl_ablations.py runs/toy --variants report --seeds 0,1,2    gain and spread over seeds
    python tests/rl_ablations.py runs/toy --set rl_steps=60,rl_lr=2e-4       other settings for all of them

The run must have finished fine-tuning. Every line starts from its model_sft; results are kept in --out, and
what is there is not measured again. All switches are those of train.py.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from kimi_k2 import Tokenizer  # noqa: E402

VARIANTS = {
    "report": {},
    "PTX and critic without rewards": {"rl_weights": dict.fromkeys(train.TASK_BUDGETS, 0.0)},
    "without PTX": {"ptx_weight": 0.0},
    "without budget": {"rl_penalty": 0.0, "rl_budget": 256},
    "without temperature decay": {"rl_temperature_end": 1.0},
    "without closed loop": {"critic_weight": 0.0},
    "four steps of the objective": {"rl_updates": 4},
    "four steps of REINFORCE": {"rl_updates": 4, "rl_objective": "reinforce"},
    "without partial rollouts": {"rl_segment": 0},
    "partial with caches recomputed": {"rl_recompute": True},
    "prioritized": {"rl_sampling": "prioritized"},
    "curriculum": {"rl_sampling": "curriculum"},
}


def measure(run_folder, out, changes):
    """Facts of one run of the stage `rl` with changed settings, from the log that it leaves in `out`. All
    variants of a seed have the same prompts."""
    saved = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(train.RunConfig)}
    given = {key: value for key, value in saved["run"].items() if key in known}
    run, cfg = train.configure({**given, **changes, "base": str(run_folder / "model_sft")}, saved["model"])
    (out / "data").mkdir(parents=True, exist_ok=True)
    for path in (run_folder / "data").iterdir():
        if not (out / "data" / path.name).exists() and path.name != "rl_prompts.json":
            (out / "data" / path.name).symlink_to(path.resolve())
    prompts = out.parent / f"prompts_{run.rl_seed}.json"
    if prompts.exists():
        shutil.copy(prompts, out / "data" / "rl_prompts.json")
    data = train.TokenFiles(out / "data") if (out / "data" / "index.json").exists() else None
    tok = Tokenizer.load(run_folder / "model_sft")
    job = train.Job(run, cfg, out, train.pick_device(run.device), tok, data)
    seconds, facts = train.rl(job)
    shutil.copy(out / "data" / "rl_prompts.json", prompts)
    trained = [row for row in train.read_metrics(out) if "reward" in row]
    tenth = max(1, len(trained) // 10)

    def ends(key):
        return [statistics.mean(row[key] for row in part) for part in (trained[:tenth], trained[-tenth:])]

    return {**facts["rl"], "recall": facts.get("recall"), "success": facts["success"], "seconds": seconds,
            "length": ends("length"), "truncated": ends("truncated"), "log_ratio": ends("log_ratio"),
            "idle": statistics.mean(row["idle"] for row in trained),
            "rollout_seconds": statistics.mean(row["rollout_seconds"] for row in trained)}


def line(name, found):
    """A row of the table, the mean over seeds."""
    def mean(*keys):
        values = found
        for key in keys:
            values = [facts[key] for facts in values]
        return statistics.mean(values)

    cells = []
    for gain in ("gain", "gain_drawn"):
        gains = ", ".join(f"{100 * facts[gain]['mean']:+.1f}" for facts in found)
        if len(found) == 1:
            gains = f"{100 * mean(gain, 'low'):+.1f} to {100 * mean(gain, 'high'):+.1f}"
        cells.append(f"{100 * mean(gain, 'mean'):+.1f} ({gains})")
    cells += [f"{mean(f'{key}_first'):.2f} - {mean(f'{key}_last'):.2f}"
              for key in ("reward", "critic", "critic_style")]
    cells += [f"{mean('length', 0):.1f} - {mean('length', 1):.1f}",
              f"{mean('truncated', 0):.0%} - {mean('truncated', 1):.0%}"]
    forgotten = "val_bpb_after" in found[0]
    cells += [f"{mean('val_bpb_after') - mean('val_bpb_before'):+.3f}" if forgotten else "-",
              f"{mean('idle'):.0%}", f"{mean('rollout_seconds'):.1f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of the table, separated by commas")
    parser.add_argument("--seeds", default="0", help="one or several, as 0,1,2")
    parser.add_argument("--set", default="", help="settings for all, as rl_steps=60,rl_lr=2e-4")
    parser.add_argument("--out", type=Path, help="folder of the results (default: RUN/rl_ablations)")
    args = parser.parse_args()
    out = args.out or args.run / "rl_ablations"
    kinds = {field.name: field.type for field in dataclasses.fields(train.RunConfig)}
    common = {key: train.value_of(text, kinds[key]) for key, text in
              (pair.split("=") for pair in args.set.split(",") if pair)}
    table = {}
    for name in args.variants.split(","):
        for seed in map(int, args.seeds.split(",")):
            folder = out / f"{name.replace(' ', '_')}_{seed}"
            path = folder / "facts.json"
            if not path.exists():
                facts = measure(args.run, folder, {**common, **VARIANTS[name], "rl_seed": seed})
                train.write_json(path, facts)
            table.setdefault(name, []).append(json.loads(path.read_text(encoding="utf-8")))
    print("| variant | gain in points, greedy | drawn | reward | critic, right or wrong | critic, style | "
          "length | over budget | bits per byte | idle | seconds of rollouts |\n" + "|---" * 11 + "|")
    for name, found in table.items():
        print(line(name, found))
    for name, found in table.items():
        domains = found[0]["domains"]
        print(f"\n{name}: " + ", ".join(
            f"{domain} {statistics.mean(f['domains'][domain]['sft'] for f in found):.1%} to "
            f"{statistics.mean(f['domains'][domain]['rl'] for f in found):.1%}" for domain in domains))


if __name__ == "__main__":
    main()
