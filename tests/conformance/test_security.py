"""SECURITY.md is true: nothing runs what it loads, and only what it names listens."""

import ast
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
SOURCES = [path for folder in ("mpl", "experiments")
           for path in sorted((ROOT / folder).rglob("*.py"))]

# What runs code from a file or a text, by the end of the dotted name.
_RUNS = ("eval", "exec", "compile", "__import__")
_LOADS = (
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal",
    "shelve", "jsonpickle", "yaml", "runpy", "code", "codeop", "tarfile", "zipfile",
    "lzma", "xmlrpc", "ftplib", "telnetlib", "urllib.request", "requests",
)
_CALLS = (
    "extractall", "unpack_archive", "enable_unsafe_deserialization", "os.system",
    "os.popen", "read_pickle", "to_pickle", "load_module", "spec_from_file_location",
)
_SETTINGS = {"allow_pickle": "False", "safe_mode": "True", "shell": "False"}
_LISTENS = re.compile(r"(^|\.)(create_server|listen|Server|HTTPServer|TCPServer|"
                      r"start_server|experimental\.server\.start)$")


def faults(source):
    """The lines of a program that run what they load, as "2 eval"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [(node.lineno, name) for name in names
                  if any(f"{name}.".startswith(f"{each}.") for each in _LOADS)]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.removeprefix("builtins.") in _RUNS or any(
                    f".{called}".endswith(f".{each}") for each in _CALLS):
                found.append((node.lineno, called))
            found += [(node.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}")
                      for keyword in node.keywords
                      if ast.unparse(keyword.value) != _SETTINGS.get(
                          keyword.arg, ast.unparse(keyword.value))]
    return [f"{line} {what}" for line, what in sorted(found)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_runs_what_it_loads(path):
    assert faults(path.read_text(encoding="utf-8")) == []


def test_faults_are_found():
    lines = [
        "import pickle as p, json", "from urllib import request", "eval('1')",
        "exec('x = 1')", "np.load(file, allow_pickle=True)", "np.load(file)",
        "np.load(file, allow_pickle=False)", "keras.saving.load_model(x, safe_mode=y)",
        "tar.extractall(path)", "subprocess.run(x, shell=True)", "re.compile('x')",
        "import tarfile", "os.system('ls')", "compile('1', '', 'eval')",
        "tf.keras.config.enable_unsafe_deserialization()", "model.eval()",
        "from zipfile import ZipFile",
    ]
    assert faults("\n".join(lines)) == [
        "1 pickle", "2 urllib.request", "3 eval", "4 exec", "5 allow_pickle=True",
        "8 safe_mode=y", "9 tar.extractall", "10 shell=True", "12 tarfile",
        "13 os.system", "14 compile",
        "15 tf.keras.config.enable_unsafe_deserialization", "17 zipfile.ZipFile"]


def test_what_listens_is_what_the_page_says():
    listening = {
        str(path.relative_to(ROOT)): ast.unparse(node.func)
        for path in SOURCES for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and _LISTENS.search(ast.unparse(node.func))}
    assert listening == {
        "mpl/distribute/peers.py": "socket.create_server",
        "mpl/distribute/parameter_server.py": "tf.distribute.Server"}
    peers = (ROOT / "mpl" / "distribute" / "peers.py").read_text(encoding="utf-8")
    assert 'is_local = host in ("localhost", "127.0.0.1")' in peers
    assert 'create_server((host if is_local else "", port))' in peers


_SERVE = """
import sys
import tensorflow as tf
port = int(sys.argv[1])
cluster = tf.train.ClusterSpec({"worker": [f"127.0.0.1:{port}"]})
server = tf.distribute.Server(cluster, "worker", 0, protocol="grpc")
print(*[
    line.split()[1] for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}")
    if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensorflow_listens_on_all_interfaces():
    """If it no longer does, the page can promise more."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    done = subprocess.run([sys.executable, "-c", _SERVE, str(port)], timeout=120,
                          capture_output=True, text=True)
    (address,) = done.stdout.split()
    assert set(address.partition(":")[0]) == {"0"}, done.stderr
    assert "on all interfaces of its host, whatever the address" in " ".join(
        PAGE.replace("*", "").split())


def _can_unshare():
    tried = shutil.which("unshare") and shutil.which("ip") and subprocess.run(
        ["unshare", "--net", "--map-root-user", "true"], capture_output=True,
        timeout=20)
    return bool(tried) and tried.returncode == 0


@pytest.mark.skipif(not _can_unshare(), reason="needs user namespaces and iproute2")
def test_a_cluster_without_a_network(tmp_path):
    """The command of the page, with a program that says what it is told and sees."""
    (command,) = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\nip -brief address\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euc", command], capture_output=True, text=True, timeout=20,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    told, *interfaces = done.stdout.splitlines()
    assert told == ("-m mpl.launch.local --workers=2 -- python -m experiments.digits "
                    "--workdir=runs/alone"), done.stderr
    (name, _, address, *_), = map(str.split, interfaces)
    assert (name, address) == ("lo", "127.0.0.1/8")
