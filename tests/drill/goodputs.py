"""How much of the time makes steps that are kept, with a kill now and then."""

import dataclasses
import json
import random
import time

from tests.drill.drill import Drill, Row
from tests.drill.run import until

_STEP_SECS = 0.1  # they sleep: the machine's own speed does not matter
_INTERVALS, _KILLS = 20, 2
WANTED = 0.9


def row(drill: Drill) -> Row:
    """Kills a run in every 20th interval between checkpoints.

    An interval is twice as long as a start takes; in practice it is far longer.
    """
    drill.reference()
    every = max(20, round(2 * drill.startup_secs["one_device"] / _STEP_SECS))
    steps = (_KILLS + 1) * _INTERVALS * every
    run = dataclasses.replace(drill.run(
        "goodput", "one_device", "--mode=train", f"--train_steps={steps}",
        f"--step_secs={_STEP_SECS}", f"--steps_per_loop={every // 4}",
        f"--log_every_steps={every // 4}", f"--checkpoint_every_steps={every}",
        "--early_stop=none", "--eval_every_steps=none"), limit_secs=3600.0)
    chance, start, said = random.Random(drill.seed), time.monotonic(), ""
    for _ in range(_KILLS):
        first = max(run.committed(), default=0)
        with run.started() as process:
            until(process, lambda first=first: max(
                run.committed(), default=0) >= first + (_INTERVALS - 1) * every)
            until(process, secs=chance.random() * every * _STEP_SECS)
    end = run.finish()
    outside = steps * _STEP_SECS / (time.monotonic() - start)
    faults = [f"exit code {end.code}: {end.text[-500:]}"] if end.code else []
    last = {}
    if not end.code:
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        said = next(
            line for line in end.text.splitlines() if line.startswith("Goodput"))
    figures = {"by_mpl": last.get("goodput", 0.0), "from_outside": round(outside, 4),
               "restarts": last.get("restarts"), "lost_steps": last.get("lost_steps"),
               "interval_secs": every * _STEP_SECS,
               "startup_secs": drill.startup_secs["one_device"]}
    if min(figures["by_mpl"], outside) < WANTED:
        faults.append(f"less than {WANTED}")
    if figures["restarts"] != _KILLS:
        faults.append(f"{figures['restarts']} restarts, not {_KILLS}")
    return Row(
        "goodput", f"a kill every {_INTERVALS} intervals, each {every * _STEP_SECS:.0f}"
        f" s; a start takes {figures['startup_secs']:.1f} s", not faults,
        f"{figures['by_mpl']:.3f} by goodput.json, {outside:.3f} from outside. {said}",
        {**figures, "faults": faults})
