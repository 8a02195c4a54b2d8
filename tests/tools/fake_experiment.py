"""Stands for an experiment: takes its flags, and leaves what a short run leaves.

    python fake_experiment.py [--fails=POLICY] [--hangs=POLICY] --policy=P --seed=S ...

By its own account it trains for 10 s in float32, and less in others. `starts` in the
folder has a line for each start; a file `mended` there ends the trouble.
"""

import json
import os
import pathlib
import sys
import time

flags = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
folder, policy, seed = pathlib.Path(flags["workdir"]), flags["policy"], flags["seed"]
folder.mkdir(parents=True, exist_ok=True)
trouble = not (folder / "mended").exists()
with (folder / "starts").open("a") as file:
    file.write(f"{os.getpid()} {flags['mode']}\n")
print(f"training {policy}", flush=True)
if trouble and flags.get("fails") == policy:
    sys.exit("it does not work")
if trouble and flags.get("hangs") == policy:
    try:
        (folder / "hangs").touch()
        time.sleep(100)
    except KeyboardInterrupt:
        (folder / "interrupted").touch()
        sys.exit(130)
speed = {"float32": 10.0, "mixed_bfloat16": 20.0, "mixed_float16": 12.5}[policy]
lines = []
for step in (50, 100):
    skips = step // 50 if policy == "mixed_float16" else 0
    lines += [
        {"step": step, "split": "train", "loss": 1 / step, "accuracy": 0.5,
         "loss_scale": 2.0 ** (15 - skips), "skipped_steps": skips,
         "learning_rate": 0.1, "steps_per_sec": speed, "examples_per_sec": 8 * speed},
        {"step": step, "split": "validation", "loss": 1 / step,
         "accuracy": step / 128 + int(seed) / 64, "steps_per_sec": None},
    ]
lines.append({"step": 100, "split": "test", "loss": 0.01,
              "accuracy": 0.75 + int(seed) / 8 - 0.25 * (policy == "mixed_float16")})
(folder / "flagfile.txt").write_text(f"--policy={policy}\n--seed={seed}\n--width=8\n")
(folder / "metrics.jsonl").write_text("".join(json.dumps(n) + "\n" for n in lines))
