"""Times come from blocks in turn; a worker that breaks takes its own run with it."""

import json
import pathlib
import sys
import time

import numpy as np
import pytest

from experiments.benchmarks import measure
from experiments.benchmarks.measure import Record, Run, Worker, WorkerError

FAKE = str(pathlib.Path(__file__).with_name("fake_worker.py"))
A, B, C = (Run("cnn", "float32", "none", system) for system in ("mpl", "raw", "orbit"))


@pytest.fixture
def fake(tmp_path):
    """A function that starts workers which behave as told, and all those started."""

    class Fake:
        workers: list[Worker] = []
        diary = tmp_path / "diary"

        def __init__(self):
            self.workers = []

        def worker(self, answer_secs=60.0, name="mpl", **options):
            given = {"ms": 1.0, "name": name, "diary": str(self.diary), **options}
            command = [sys.executable, FAKE, json.dumps(given)]
            log = tmp_path / f"{name}.log"
            self.workers.append(Worker(command, log, answer_secs))
            return self.workers[-1]

        def start_of(self, answer_secs=60.0, **by_system):
            return lambda run: self.worker(
                answer_secs, run.system, **by_system.get(run.system, {}))

        def diary_of(self, do):
            lines = [line.split() for line in self.diary.read_text().splitlines()]
            return [(name, int(count)) for name, what, count in lines if what == do]

        def all_ended(self):
            return all(w.process.poll() is not None for w in self.workers)

    made = Fake()
    yield made
    for worker in made.workers:
        worker.process.kill()
        worker.process.wait()


def measured(fake, start, starts=None, **settings):
    settings = {"rounds": 3, "block_secs": 0.1, "say": lambda line: None, **settings}
    records = measure.measure(starts or {A: 1, B: 1, C: 1}, start, **settings)
    assert fake.all_ended()
    return records


def test_a_ratio_is_that_of_the_medians():
    ratio = measure.ratio_of_medians([1, 2, 3, 100], [5, 4, 5, 6])
    assert ratio.ratio == pytest.approx(2.5 / 5)


def test_the_interval_of_equal_ratios_in_each_round_is_a_point():
    slow = [1.0, 8.0, 2.0, 5.0, 3.0]
    ratio = measure.ratio_of_medians([0.5 * ms for ms in slow], slow)
    assert ratio == (0.5, 0.5, 0.5)
    unpaired = measure.ratio_of_medians([0.5 * ms for ms in slow], slow, paired=False)
    assert unpaired.low < 0.3 and unpaired.high > 0.8


def test_the_interval_is_the_percentiles_of_all_resamples():
    # The median of 3 of {1, 2, 3} drawn with replacement is 1 or 3 with 7/27 each.
    ratio = measure.ratio_of_medians([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert ratio == (2.0, 1.0, 3.0)
    nine = [1.0] + [2.0] * 7 + [3.0]  # a median of 1 has a chance of 1e-4
    assert measure.ratio_of_medians(nine, [1.0] * 9) == (2.0, 2.0, 2.0)


def test_two_samples_have_no_interval():
    ratio = measure.ratio_of_medians([1.0, 1.0], [2.0, 2.0])
    assert ratio.ratio == 0.5 and np.isnan(ratio.low) and np.isnan(ratio.high)


@pytest.mark.parametrize("secs, length", [
    ([0.001], 512),  # 500, as executions of 64
    ([0.015], 32),  # 33, as executions of 16
    ([0.001, 0.002], 512),
    ([0.001, 0.006], 256),  # 1.5 s for the slowest
    ([0.01], 48),  # 50
    ([0.02, 0.03], 32),  # 25
    ([0.04], 12),  # too few for executions
    ([1.0], 2),
])
def test_blocks_are_long_enough_for_the_fastest_and_hold_whole_executions(
        secs, length):
    assert measure.block_length(secs, block_secs=0.5) == length


def test_blocks_are_taken_in_turn_and_each_system_is_first_in_turn(fake):
    records = measured(fake, fake.start_of(raw={"ms": 2.0}), rounds=4)
    blocks = [name for name, count in fake.diary_of("steps") if count == 128]
    # After the blocks that find the length: one round to warm up, then four.
    assert blocks[-15:] == [
        *("orbit", "mpl", "raw"), *("mpl", "raw", "orbit"), *("raw", "orbit", "mpl"),
        *("orbit", "mpl", "raw"), *("mpl", "raw", "orbit")]
    assert records[A].counts == {"steps": 128}
    assert records[A].ms["steps"] == pytest.approx([1.0] * 4)
    assert records[B].ms["steps"] == pytest.approx([2.0] * 4)
    assert records[A].side_by_side == records[B].side_by_side != ""


def test_each_start_is_a_fresh_process_and_the_last_is_kept(fake):
    records = measured(fake, fake.start_of(), starts={A: 3, B: 1})
    assert records[A].first_steps_s == [2.0] * 3 and records[A].rss_mb == [100.0] * 3
    assert records[A].builds_s == [1.5] * 3 and len(fake.workers) == 4
    assert fake.diary_of("steps")[0] == ("mpl", measure.LOSS_STEPS - 1)
    assert records[A].loss == 2.5
    assert records[A].checkpoint_s == [0.25] * 3 and records[A].predict_ms == [1.0] * 30


def test_runs_that_start_less_often_start_two_at_a_time_untimed(fake):
    begun = []
    start = fake.start_of()

    def noting(run):
        begun.append(run)
        return start(run)

    records = measured(fake, noting, starts={A: 1, B: 2, C: 1})
    assert begun[:2] == [B, B] and set(begun[2:]) == {A, C}
    assert records[B].first_steps_s == [2.0] * 2
    assert records[A].first_steps_s == records[C].builds_s == []
    assert all(records[run].rss_mb and records[run].ms["steps"] for run in (A, B, C))
    equal = measured(fake, fake.start_of(), starts={A: 1, B: 1})
    assert equal[A].first_steps_s == equal[B].first_steps_s == [2.0]


def test_losses_are_asked_for_after_sixteen_steps_in_all(fake):
    measured(fake, fake.start_of(), starts={A: 1})
    lines = fake.diary.read_text().splitlines()
    assert lines[:4] == ["mpl loss None", "mpl steps 15", "mpl memory None",
                         "mpl loss None"]


def test_without_rounds_only_starts_are_measured(fake):
    records = measured(fake, fake.start_of(), starts={A: 2}, rounds=0)
    assert records[A].first_steps_s == [2.0] * 2 and records[A].ms == {}


def test_updates_are_timed_where_a_system_has_them(fake):
    start = fake.start_of(mpl={"updates": 0.5})
    records = measured(fake, start, starts={A: 1, B: 1}, updates=True)
    assert records[A].ms["update"] == pytest.approx([0.5] * 3)
    assert "update" not in records[B].ms and records[B].error is None


def test_runs_that_do_not_fit_together_are_timed_by_policy(fake):
    other = A._replace(policy="mixed_bfloat16")
    starts = {A: 2, B: 2, other: 2}
    records = measured(fake, fake.start_of(), starts, available_mb=lambda _: 250.0)
    assert records[A].side_by_side == records[B].side_by_side
    assert records[A].side_by_side != records[other].side_by_side
    alone = measured(fake, fake.start_of(), starts, available_mb=lambda _: 150.0)
    assert len({record.side_by_side for record in alone.values()}) == 3


@pytest.mark.parametrize("at", ["ready", "memory", "steps", "predict"])
@pytest.mark.parametrize("fault, message", [
    ("die", "ended with code 1 before {at}: out of memory"),
    ("error", "no such layer"),
    ("garbage", "said 'Epoch 1/10' for {at}"),
])
def test_a_broken_worker_breaks_its_own_run_alone(fake, at, fault, message):
    start = fake.start_of(raw={"fault": fault, "at": at})
    records = measured(fake, start, starts={A: 1, B: 1})
    assert records[B].error == message.format(at=at)
    assert records[A].error is None and len(records[A].ms["steps"]) == 3


def test_a_worker_that_hangs_is_given_up(fake):
    start = fake.start_of(answer_secs=2.0, raw={"fault": "hang", "at": "memory"})
    records = measured(fake, start, starts={A: 1, B: 1})
    assert records[B].error == "no answer (memory) within 2 s"
    assert len(records[A].ms["steps"]) == 3


def test_no_process_is_left_when_the_benchmark_is_interrupted(fake):
    def say(line):
        if "rounds" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(fake, fake.start_of(), say=say)
    assert len(fake.workers) == 3 and fake.all_ended()


def test_a_worker_that_does_not_quit_is_killed(fake, monkeypatch):
    worker = fake.worker(fault="hang", at="steps")
    worker.ready()
    print('{"do": "steps", "count": 1}', file=worker.process.stdin, flush=True)
    wait = worker.process.wait
    monkeypatch.setattr(worker.process, "wait", lambda secs=None: wait(secs and 0.2))
    began = time.monotonic()
    worker.close()
    assert worker.process.poll() == -9 and time.monotonic() - began < 5


def test_a_worker_ends_when_its_benchmark_is_gone(fake):
    worker = fake.worker()
    worker.ready()
    worker.process.stdin.close()
    assert worker.process.wait(10) == 0


def test_an_answer_to_another_request_is_an_error(fake):
    worker = fake.worker()
    with pytest.raises(WorkerError, match="said ready for memory"):
        worker.ask("memory")


def test_the_matmul_fraction_needs_operations_rate_and_time():
    counted = Record(facts={"flops_per_step": 2e9}, ms={"steps": [10.0, 20.0]})
    timed, other = Record(ms={"steps": [5.0]}), Record(ms={"steps": [5.0]})
    records = {A: timed, B: counted, C._replace(work="gpt"): other}
    measure.add_matmul_fractions(records, {"float32": 1e12})
    assert counted.matmul_fractions == pytest.approx([0.2, 0.1])
    assert timed.matmul_fractions == pytest.approx([0.4])
    assert other.matmul_fractions == []
