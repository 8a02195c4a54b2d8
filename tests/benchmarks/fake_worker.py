"""A worker that trains nothing: it says what the tests want to hear.

Standard library only, so that it starts fast. Options, as JSON: `ms` a step, `fault`
(die, hang, error or garbage) at the request `at`, `diary` a file of the requests.
"""

import json
import sys
import time

options = json.loads(sys.argv[1])


def answer(event, **values):
    if options.get("at") == event:
        match options["fault"]:
            case "die":
                sys.exit("out of memory")
            case "hang":
                time.sleep(600)
            case "error":
                print(json.dumps({"event": "error", "message": "no such layer"}))
                sys.exit(1)
            case "garbage":
                print("Epoch 1/10", flush=True)
                return
    print(json.dumps({"event": event, **values}), flush=True)


ms, steps = options["ms"], 1
answer("ready", first_step_s=2.0 * ms, batch_size=32, variables=4, parameters=1000,
       bytes_per_step=128, import_s=0.5)
for line in sys.stdin:
    request = json.loads(line)
    do, count = request["do"], request.get("count")
    if options.get("diary"):
        with open(options["diary"], "a") as file:
            print(options["name"], do, count, file=file)
    match do:
        case "quit":
            break
        case "steps":
            steps += count
            answer("steps", count=count, secs=1e-3 * ms * count)
        case "prepare":
            answer("prepare")
        case "update":
            updates = options.get("updates")
            answer("update", count=count, secs=updates and 1e-3 * updates * count)
        case "loss":
            answer("loss", loss=options.get("loss", 2.5), steps=steps)
        case "memory":
            answer("memory", peak_rss_mb=100.0 * ms, allocator_peak_mb=None)
        case "flops":
            answer("flops", flops_per_step=1e6)
        case "checkpoint":
            answer("checkpoint", secs=[0.25] * count)
        case "predict":
            answer("predict", ms=[1.0] * count, batch_size=1)
