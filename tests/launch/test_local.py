"""Local clusters, of tiny programs."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from mpl.errors import ConfigError
from mpl.launch import local

pytestmark = pytest.mark.slow  # real processes and time-outs

ROOT = pathlib.Path(__file__).parents[2]
START = """
import json, os, signal, sys, time
config = json.loads(os.environ["TF_CONFIG"])
job, index = config["task"]["type"], config["task"]["index"]
me = f"{job} {index}"
folder = sys.argv[1]
def touch(name):
    open(os.path.join(folder, name), "a").write(f"{os.getpid()}\\n")
def wait(*names):
    while not all(os.path.exists(os.path.join(folder, name)) for name in names):
        time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def limit():
    """No test may hang: the alarm ends it, and with it its processes."""

    def stop(signum, frame):
        raise TimeoutError("A local cluster did not end.")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.fixture
def program(tmp_path):
    """A function that makes a command of a few lines of Python."""

    def command(lines):
        path = tmp_path / "program.py"
        path.write_text(START + lines)
        return [sys.executable, "-S", str(path), str(tmp_path)]

    return command


@pytest.fixture
def started(program, capfd, tmp_path):
    """A function that runs a cluster of such lines: its code and lines of output."""

    def run(lines, *args, **kwargs):
        code = local.run(program(lines), *args, **kwargs)
        assert none_left(tmp_path)
        return code, capfd.readouterr().out.splitlines()

    return run


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A function that puts on PATH one that lists n GPUs; None: none, -1: it fails."""

    def put(count):
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir()
        if count is not None:
            gpu = "echo NVIDIA H200, 143771, 580.159.03\n"
            path.write_text("#!/bin/sh\n" + gpu * abs(count) + f"exit {int(count < 0)}")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return put


def alive(folder):
    """The processes whose command holds the folder's name."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in path.read_text() and int(path.parts[2]) != os.getpid():
                found.append(path.parts[2])
        except OSError:
            pass
    return found


def none_left(folder):
    """Whether none is alive; what was killed may take a moment to be gone."""
    deadline = time.monotonic() + 5.0
    while alive(folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(folder)


def signal_when(path, number):
    """Sends this process a signal once a file is there."""

    def send():
        while not path.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


# What processes are given


def test_workers_find_their_places_in_tf_config(started):
    code, lines = started("print(json.dumps(config))", 3)
    configs = {}
    for line in lines:
        name, _, text = line.partition("] ")
        configs[name] = json.loads(text)
    cluster = configs["[worker 0"]["cluster"]
    assert code == 0 and list(cluster) == ["worker"]
    assert len(set(cluster["worker"])) == 3
    assert configs == {
        f"[worker {i}": {"cluster": cluster, "task": {"type": "worker", "index": i}}
        for i in range(3)}
    for address in cluster["worker"]:
        host, _, port = address.partition(":")
        assert host == "127.0.0.1" and 20000 <= int(port) < 32000


def test_servers_bring_a_chief(started):
    code, lines = started("""
print(json.dumps(config), flush=True)
touch(me)
if job == "chief":
    wait("worker 0", "worker 1", "ps 0")
else:
    time.sleep(60)
""", 2, 1)
    found = [(line[:line.index("]")], json.loads(line.partition("] ")[2]))
             for line in lines]
    cluster = found[0][1]["cluster"]
    assert code == 0
    assert {job: len(addresses) for job, addresses in cluster.items()} == {
        "chief": 1, "worker": 2, "ps": 1}
    assert len(set(sum(cluster.values(), []))) == 4
    assert sorted((name, config["task"]["type"], config["task"]["index"])
                  for name, config in found) == [
        ("[chief 0", "chief", 0), ("[ps 0", "ps", 0),
        ("[worker 0", "worker", 0), ("[worker 1", "worker", 1)]
    assert all(config["cluster"] == cluster for _, config in found)


@pytest.mark.parametrize("visible, shares", [
    ("0,1", ["0", "1"]), ("4,5,6,7", ["4,5", "6,7"]), ("0,1,2", ["0", "1"]),
    ("GPU-a,GPU-b", ["GPU-a", "GPU-b"]),
    ("-1", ["-1", "-1"]), ("", ["", ""]), (None, ["0,1", "2,3"]),
])
def test_workers_share_the_gpus(visible, shares, started, nvidia_smi, monkeypatch):
    nvidia_smi(5)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    _, lines = started("print(os.environ.get('CUDA_VISIBLE_DEVICES'))", 2)
    assert sorted(lines) == [f"[worker {i}] {share}" for i, share in enumerate(shares)]


@pytest.mark.parametrize("count", [0, None, -1])
def test_where_nvidia_smi_lists_none_there_are_none(count, started, nvidia_smi):
    """It lists none, does not exist, fails."""
    nvidia_smi(count)
    _, lines = started("print(os.environ.get('CUDA_VISIBLE_DEVICES'))", 2)
    assert sorted(lines) == ["[worker 0] None", "[worker 1] None"]


@pytest.mark.parametrize("visible", ["GPU-a", None])
def test_fewer_gpus_than_workers_are_an_error(
    visible, program, nvidia_smi, monkeypatch, tmp_path
):
    nvidia_smi(1)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError) as error:
        local.run(program("touch(me)"), 2)
    assert str(error.value) == (
        "`workers` (2) must be at most the number of GPUs (1).\n"
        "Start fewer, or hide the GPUs from all: CUDA_VISIBLE_DEVICES=-1.")
    assert not list(tmp_path.glob("worker *"))


@pytest.mark.parametrize("visible", ["0,1", None])
def test_chief_and_servers_have_no_gpu(visible, started, nvidia_smi, monkeypatch):
    nvidia_smi(2)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    _, lines = started("""
print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)
touch(me)
if job == "chief":
    wait("worker 0", "ps 0")
else:
    time.sleep(60)
""", 1, 1)
    assert sorted(lines) == ["[chief 0] -1", "[ps 0] -1", "[worker 0] 0,1"]


def test_free_ports_are_distinct_and_free():
    ports = local.free_ports(200)
    assert len(set(ports)) == 200
    assert all(20000 <= port < 32000 for port in ports)


def test_a_port_in_use_is_not_taken(monkeypatch):
    taken, free = local.free_ports(2)
    monkeypatch.setattr(local, "_PORTS", [taken, free])
    with socket.create_server(("127.0.0.1", taken)):
        assert local.free_ports(1) == [free]
        with pytest.raises(ConfigError, match="Fewer than 2 ports of .* are free"):
            local.free_ports(2)
    assert sorted(local.free_ports(2)) == sorted([taken, free])


# What they print


def test_both_streams_in_order_and_a_partial_last_line(started):
    code, lines = started("""
for i in range(3):
    print("out", i)
    print("err", i, file=sys.stderr)
print("é" * 3)
print()
sys.stdout.write("no end of line")
""", 1)
    assert code == 0
    assert lines == [f"[worker 0] {text}" for text in (
        "out 0", "err 0", "out 1", "err 1", "out 2", "err 2", "ééé", "",
        "no end of line")]


def test_lines_of_several_processes_are_not_mixed(started):
    _, lines = started("""
for i in range(300):
    for part in (f"{me}: ", f"line {i}", "\\n"):
        os.write(1, part.encode())
""", 2)
    for i in range(2):
        own = [line for line in lines if line.startswith(f"[worker {i}] ")]
        assert own == [f"[worker {i}] worker {i}: line {j}" for j in range(300)]
    assert len(lines) == 600


def test_more_output_than_a_pipe_holds_right_before_the_end(started):
    _, lines = started("sys.stdout.write('x\\n' * 100_000)", 1)
    assert lines == ["[worker 0] x"] * 100_000


def test_progress_lines_and_broken_text(started):
    _, lines = started("""
for text in (b"1 %\\r", b"2 %\\r", b"\\ndone\\r\\n", b"\\xff\\xc3", b"\\xa9\\n"):
    os.write(1, text)
    time.sleep(0.05)
""", 1)
    assert lines == [
        f"[worker 0] {text}" for text in ("1 %", "2 %", "done", "\ufffdé")]


def test_processes_see_no_terminal_and_lead_their_groups(started):
    former, (reader, writer) = os.dup(0), os.openpty()
    os.dup2(reader, 0)
    try:
        _, lines = started("""
print([os.isatty(i) for i in range(3)], repr(sys.stdin.read()))
print(os.getpgrp() == os.getsid(0) == os.getpid())
""", 1)
    finally:
        os.dup2(former, 0)
        for number in (former, reader, writer):
            os.close(number)
    assert lines == ["[worker 0] [False, False, False] ''", "[worker 0] True"]


# How it ends


def test_all_that_exit_with_0(started):
    code, lines = started("time.sleep(0.3 * index)", 3)
    assert (code, lines) == (0, [])


def test_the_first_failure_is_the_result_and_others_may_end(started):
    code, lines = started("""
if index == 1:
    sys.exit(7)
time.sleep(1)
print("saved")
sys.exit(3)
""", 2, grace_secs=20)
    assert code == 7
    assert lines == [
        "[local] worker 1 failed first: exit code 7; the others have 20 s to end.",
        "[worker 0] saved",
        "[local] worker 1 failed first: exit code 7."]


def test_after_the_grace_comes_sigterm(started):
    before = time.monotonic()
    code, lines = started("""
if index == 1:
    wait("ready")
    os.kill(os.getpid(), signal.SIGSEGV)
def stop(*_):
    print("terminated")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
touch("ready")
time.sleep(60)
""", 2, grace_secs=0.5)
    assert 0.5 < time.monotonic() - before < 20
    assert code == 128 + signal.SIGSEGV
    assert lines == [
        "[local] worker 1 failed first: killed by signal 11 (Segmentation fault); the "
        "others have 0.5 s to end.", "[worker 0] terminated",
        "[local] worker 1 failed first: killed by signal 11 (Segmentation fault)."]


def test_who_ignores_sigterm_is_killed_with_what_it_started(started, monkeypatch):
    monkeypatch.setattr(local, "_KILL_SECS", 0.5)
    code, lines = started("""
if index == 1:
    wait("ready")
    sys.exit(2)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    touch("ready")
time.sleep(60)
""", 2, grace_secs=0)
    assert code == 2
    assert lines[-1] == "[local] worker 1 failed first: exit code 2."


def test_what_a_process_leaves_behind_ends_with_it(started):
    code, lines = started("""
if not os.fork():
    print("child", flush=True)
    touch("ready")
    time.sleep(60)
wait("ready")
print("parent")
""", 1)
    assert (code, lines) == (0, ["[worker 0] child", "[worker 0] parent"])


def test_a_closed_output_is_no_end(started):
    code, _ = started("os.close(1); os.close(2); time.sleep(0.5); os._exit(4)", 1)
    assert code == 4


def test_an_exception_here_leaves_nothing(program, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(local, "_print", broken)
    with pytest.raises(BrokenPipeError):
        local.run(program("print(1, flush=True); time.sleep(60)"), 2)
    assert none_left(tmp_path)


# Signals


@pytest.mark.parametrize("number", [
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_passed_on(number, started, tmp_path):
    former = signal.getsignal(number)
    thread = signal_when(tmp_path / "worker 1", number)
    code, lines = started(f"""
def stop(number, _):
    print("got", signal.Signals(number).name)
    sys.exit(130)
signal.signal({int(number)}, stop)
if index == 1:
    wait("worker 0")
touch(me)
time.sleep(60)
""", 2)
    thread.join()
    name = number.name
    assert code == 130 and signal.getsignal(number) is former
    assert lines[0] == f"[local] {name} is passed on; a second SIGINT kills."
    assert {f"[worker 0] got {name}", f"[worker 1] got {name}"} < set(lines)
    assert lines[-1] in [
        f"[local] worker {i} failed first: exit code 130." for i in range(2)]


def test_a_second_ctrl_c_kills(started, tmp_path):
    threads = [signal_when(tmp_path / name, signal.SIGINT) for name in ("one", "two")]
    code, lines = started("""
signal.signal(signal.SIGINT, lambda *_: touch("two"))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
touch("one")
while True:
    time.sleep(1)
""", 1)
    for thread in threads:
        thread.join()
    assert code == 128 + signal.SIGKILL
    assert lines[1:] == ["[local] SIGINT is passed on; a second SIGINT kills.",
                         "[local] worker 0 failed first: killed by signal 9 (Killed)."]


def test_an_ignored_signal_stays_ignored(started):
    """As under nohup."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _, lines = started("""
os.kill(os.getppid(), signal.SIGHUP)
time.sleep(0.5)
print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)
""", 1)
    finally:
        signal.signal(signal.SIGHUP, former)
    assert lines == ["[worker 0] True"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_a_launcher_that_is_killed_leaves_nothing(program, tmp_path):
    launcher = subprocess.Popen(
        [sys.executable, "-m", "mpl.launch.local", "--workers=2", "--",
         *program("touch(me); time.sleep(600)")],
        cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not all((tmp_path / f"worker {i}").exists() for i in range(2)):
            assert launcher.poll() is None
            time.sleep(0.05)
        pids = [(tmp_path / f"worker {i}").read_text().strip() for i in range(2)]
        assert set(pids) < set(alive(tmp_path))
    finally:
        launcher.kill()
        launcher.wait()
    assert none_left(tmp_path)
    assert launcher.returncode == -signal.SIGKILL


# Parameter servers

SERVE = """
if job != "chief":
    touch(me)
    time.sleep(60)
"""


def test_all_end_when_the_chief_is_done(started):
    before = time.monotonic()
    code, lines = started(SERVE + "wait('worker 0', 'ps 0'); print('done')", 2, 1)
    assert (code, lines) == (0, ["[chief 0] done"])
    assert time.monotonic() - before < 20  # no grace


def test_a_killed_worker_is_started_again(started):
    code, lines = started("""
if me == "worker 1":
    first = not os.path.exists(os.path.join(folder, me))
    touch(me)
    print(config["cluster"]["worker"][1], flush=True)
    if first:
        os.kill(os.getpid(), signal.SIGKILL)
    touch("again")
if job == "chief":
    wait("again")
else:
    time.sleep(60)
""", 2, 1)
    assert code == 0
    address = lines[0]
    assert address.startswith("[worker 1] 127.0.0.1:")
    again = "[local] worker 1: killed by signal 9 (Killed); it is started again."
    assert lines == [address, again, address]


def test_restarts_come_to_an_end(started, monkeypatch):
    monkeypatch.setattr(local, "_RESTARTS", 2)
    code, lines = started("""
if me == "worker 0":
    touch(me)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
""", 1, 1, grace_secs=0)
    assert code == 128 + signal.SIGKILL
    again = "[local] worker 0: killed by signal 9 (Killed); it is started again."
    how = "[local] worker 0 failed first: killed by signal 9 (Killed)"
    assert lines == [again, again, f"{how}; the others have 0 s to end.", f"{how}."]


@pytest.mark.parametrize("failing, code, how", [
    ("chief 0", 5, "exit code 5"), ("ps 0", 6, "exit code 6"),
    ("worker 0", 1, "exit code 1"), ("ps 0", -9, "killed by signal 9 (Killed)"),
    ("chief 0", -9, "killed by signal 9 (Killed)"),
])
def test_other_failures_end_a_cluster_with_servers(failing, code, how, started):
    end = f"sys.exit({code})" if code > 0 else f"os.kill(os.getpid(), {-code})"
    got, lines = started(f"if me == {failing!r}: {end}\ntime.sleep(60)", 1, 1,
                         grace_secs=0.2)
    assert got == (code if code > 0 else 128 - code)
    assert lines[-1] == f"[local] {failing} failed first: {how}."


def test_without_servers_a_killed_worker_is_a_failure(started):
    code, lines = started("os.kill(os.getpid(), signal.SIGKILL)", 1)
    assert (code, lines) == (
        137, ["[local] worker 0 failed first: killed by signal 9 (Killed)."])


def test_after_a_signal_no_worker_is_started_again(started, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_KILL_SECS", 0.2)
    thread = signal_when(tmp_path / "worker 0", signal.SIGTERM)
    code, lines = started("""
if job == "worker":
    wait("chief 0", "ps 0")
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
touch(me)
time.sleep(60)
""", 1, 1, grace_secs=0)
    thread.join()
    assert code == 128 + signal.SIGTERM
    how = "[local] worker 0 failed first: killed by signal 15 (Terminated)"
    assert lines == ["[local] SIGTERM is passed on; a second SIGINT kills.",
                     f"{how}; the others have 0 s to end.", f"{how}."]


# Usage


@pytest.mark.parametrize("words, cause, remedy", [
    ("-- true", "the following arguments are required: --workers.",
     "See python -m mpl.launch.local --help."),
    ("--workers=two -- true", "argument --workers: invalid int value: 'two'.", "See p"),
    ("--workers=0 -- true", "`workers` (0) must be at least 1.",
     "Write --workers=1, or more."),
    ("--workers=1 --ps=-1 -- true", "`ps` (-1) must be at least 0.", "Write --ps=1"),
    ("--workers=1 --grace_secs=-1 -- true", "`grace_secs` (-1.0) must be at least 0.",
     "Write --grace_secs=1"),
    ("--workers=1 --work=2 -- true", "unrecognized arguments: --work=2.", "See python"),
    ("--workers=1 true", "unrecognized arguments: true.", "See python"),
    ("--workers=1", "There is no command after `--`.", "Write python -m mpl.launch"),
    ("--workers=1 --", "There is no command after `--`.", "Write python -m mpl.launch"),
    ("--workers=1 -- no-such-program x", "`no-such-program` is no program that can be "
     "run.", "Correct the command after --."),
])
def test_wrong_usage(words, cause, remedy, capsys):
    assert local.main(words.split()) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert (out, first) == ("", cause) and second.startswith(remedy)


def test_help(capsys):
    with pytest.raises(SystemExit) as info:
        local.main(["--help"])
    text = capsys.readouterr().out
    assert info.value.code == 0
    for flag in ("--workers", "--ps", "--grace_secs"):
        assert flag in text


def test_main_runs_the_command_as_it_stands(capfd):
    code = local.main(["--workers=1", "--", "printf", "%s|", "--workers=3", "--", "a"])
    assert (code, capfd.readouterr().out) == (0, "[worker 0] --workers=3|--|a|\n")
