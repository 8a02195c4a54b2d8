"""The process that runs one system on one work, and answers on standard output.

    python -m experiments.benchmarks.worker --system=mpl --work=cnn --policy=float32

It runs one training step, says `ready`, and then answers requests, one JSON object a
line: `{"do": "steps", "count": 100}`. What else is printed goes to standard error.
"""

import argparse
import json
import os
import sys
import time
from typing import Any

_answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints goes to standard error


def _answer(**values: Any) -> None:
    print(json.dumps(values), file=_answers)


def main() -> None:
    """Runs the system that the command line names until it is told to quit."""
    parser = argparse.ArgumentParser()
    for name in ("system", "work", "policy"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--scaling", choices=("none", "dynamic"), default="none")
    parser.add_argument("--jit_compile", choices=("auto", "true", "false"))
    parser.add_argument("--started", type=float, default=time.time(), help="Unix time")
    arguments = parser.parse_args()
    # Absent: the system's own default.
    jit = {"auto": "auto", "true": True, "false": False}.get(arguments.jit_compile)
    try:
        from experiments.benchmarks import systems

        imported = time.time()
        system = systems.SYSTEMS[arguments.system](
            arguments.work, arguments.policy, arguments.scaling == "dynamic", jit)
        system.run(1)
        first_step = time.time()
    except Exception as error:
        _answer(event="error", message=f"{type(error).__name__}: {error}")
        raise
    _answer(event="ready", first_step_s=first_step - arguments.started,
            import_s=imported - arguments.started, **system.facts())
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            return
        _answer(event=request["do"], **_reply(system, **request))


def _reply(
    system: Any, do: str, count: int = 1, settle: bool = False
) -> dict[str, Any]:
    if do == "prepare":
        system.prepare(count)
        return {}
    if settle:
        system.settle(count)
    if do == "steps":
        began = time.perf_counter()
        system.run(count)
        secs = time.perf_counter() - began
        return {"count": count, "secs": secs, "steps_per_call": system.steps_per_call}
    if do == "loss":
        return {"loss": system.loss(), "steps": system.steps}
    if do == "memory":
        return system.memory()
    if do == "checkpoint":
        return {"secs": system.time_checkpoints(count)}
    if do == "predict":
        return {"ms": system.time_predictions(count), "batch_size": 1}
    if do == "flops":
        return {"flops_per_step": system.flops()}
    if do == "update":
        return {"count": count, "secs": system.time_updates(count)}
    raise ValueError(f"unknown request {do!r}")


if __name__ == "__main__":
    main()
