"""The machine: what it is, its fastest matrix products, the time of an import."""

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
_PACKAGES = ("tensorflow", "keras", "numpy", "tf-models-official", "tf_keras")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")


def describe() -> dict[str, Any]:
    """Returns what the machine is and what is installed."""
    text = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)", text, re.M)
    flags = re.search(r"^flags\s*: (.*)", text, re.M)
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "cpu_flags": [f for f in _CPU_FLAGS if flags and f in flags[1].split()],
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6,
        "load_average": os.getloadavg(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def available_memory_mb() -> float:
    """Returns the memory that processes can still take, in MB of 10⁶ bytes."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.M)
    return int(found[1]) * 1.024e-3 if found else float("inf")


def gpu_memory_mb() -> float:
    """Returns the memory of the first GPU, in MB of 10⁶ bytes; without one infinity."""
    if not shutil.which("nvidia-smi"):
        return float("inf")
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return float(said[0]) * 1.048576 if said else float("inf")


def measure_devices(dtypes: Sequence[str]) -> dict[str, Any]:
    """Measures matrix products in a process of their own.

    Returns:
        `gpus`, their names, and `matmul_flops_per_sec` by dtype: the median.
    """
    said = _python("-m", "experiments.benchmarks.machine", *dtypes)
    return json.loads(said.splitlines()[-1])


def import_secs(count: int) -> dict[str, list[float]]:
    """Imports tensorflow and mpl in turn, `count` fresh processes each."""
    secs: dict[str, list[float]] = {"tensorflow": [], "mpl": []}
    for number in range(-1, count):  # the first fills the file cache
        for name, samples in secs.items():
            said = _python("-c", "import time; began = time.perf_counter(); "
                                 f"import {name}; print(time.perf_counter() - began)")
            if number >= 0:
                samples.append(float(said.split()[-1]))
    return secs


def _python(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, check=True, text=True, timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ).stdout  # fmt: skip


def _main(dtypes: Sequence[str]) -> None:
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    rates = {d: _flops_per_sec(d, bool(gpus)) for d in dtypes}
    print(json.dumps({
        "gpus": [detail.get("device_name", "GPU") for detail in details],
        "matmul_flops_per_sec": {d: rate for d, rate in rates.items() if rate},
    }))


def _flops_per_sec(dtype: str, has_gpu: bool) -> float | None:
    """Returns the median rate of large square products; None: not worth its time."""
    import tensorflow as tf

    if dtype == "float16" and not has_gpu:
        return None
    size, repeats = (8192, 10) if has_gpu else (2048, 1)
    a, b = (tf.cast(tf.random.normal([size, size]), dtype) for _ in range(2))
    rates = []
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(repeats):
            product = tf.matmul(a, b)
        product[0, 0].numpy()  # waits for the device
        rates.append(2 * size**3 * repeats / (time.perf_counter() - began))
    return statistics.median(rates[1:])


if __name__ == "__main__":
    _main(sys.argv[1:])
