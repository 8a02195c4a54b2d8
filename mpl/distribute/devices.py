"""What devices there are: setting up the GPUs, and a table of all that was found."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterator

import keras
import tensorflow as tf
from absl import logging

from mpl.errors import ConfigError

_CPUINFO = pathlib.Path("/proc/cpuinfo")
_DRIVER_GPUS = pathlib.Path("/proc/driver/nvidia/gpus")
_CPU_FEATURES = {
    "avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16", "amx_bf16": "AMX-BF16",
}  # fmt: skip
# The oldest driver for each CUDA, by the release notes of NVIDIA's CUDA Toolkit.
_OLDEST_DRIVER = {"11": "450.80.02", "12": "525.60.13", "13": "580.65.06"}
_INSTALL = "Run pip install 'tensorflow[and-cuda]'"


def configure(visible_devices: str | None, gpu_memory_limit_mb: int | None) -> None:
    """Sets up the GPUs; nothing may have used TensorFlow's devices before.

    Memory is taken as it is needed; a limited amount at once.

    Args:
        visible_devices: numbers of GPUs among those that CUDA_VISIBLE_DEVICES leaves,
            as `0,2`; `cpu`: none; None: as they are, which is all unless set before.
        gpu_memory_limit_mb: memory to take of each GPU; None: no limit, unless set
            before.

    Raises:
        ConfigError: wrong or unknown numbers; no GPU, though one is asked for or the
            machine has some; devices already initialised in another way.
    """
    numbers = _parse(visible_devices)
    settings = {"visible_devices": visible_devices,
                "gpu_memory_limit_mb": gpu_memory_limit_mb}  # fmt: skip
    given = [f"`{name}` ({value})" for name, value in settings.items()
             if value is not None]  # fmt: skip
    gpus = tf.config.list_physical_devices("GPU")
    if numbers == [] and gpu_memory_limit_mb is not None:
        raise ConfigError(f"{' and '.join(given)} contradict each other.",
                          "Leave one of them out.")  # fmt: skip
    if numbers != [] and not gpus:
        if given:
            raise _no_gpu(f"{given[0]} asks for a GPU")
        if not _is_hiding(_mask()) and (any(_DRIVER_GPUS.glob("*")) or nvidia_smi()):
            raise _no_gpu("The machine has NVIDIA GPUs")
    if numbers and numbers[-1] >= len(gpus):
        raise ConfigError(
            f"{given[0]} has the number {numbers[-1]}, and the GPUs that TensorFlow "
            f"sees are {len(gpus)}, counted from 0.",
            f"Use numbers below {len(gpus)}, or look at CUDA_VISIBLE_DEVICES.")
    try:
        if numbers is not None:
            tf.config.set_visible_devices([gpus[number] for number in numbers], "GPU")
        visible = tf.config.get_visible_devices("GPU")
        if gpu_memory_limit_mb is not None:
            limit = tf.config.LogicalDeviceConfiguration(gpu_memory_limit_mb)
            for gpu in visible:
                tf.config.set_logical_device_configuration(gpu, [limit])
    except RuntimeError as error:
        raise ConfigError(
            f"{' and '.join(given)} differs from how TensorFlow's devices are set up; "
            "they are already initialised.",
            "Start before any tensor is made, or restart the notebook's kernel."
        ) from error
    try:
        for gpu in visible:
            if tf.config.get_logical_device_configuration(gpu) is None:
                tf.config.experimental.set_memory_growth(gpu, True)
    except RuntimeError:  # a default that nobody asked for is no reason to end
        logging.warning("TensorFlow had set up its GPUs before: it takes all their "
                        "memory.")  # fmt: skip


def _parse(visible_devices: str | None) -> list[int] | None:
    """Returns the numbers in TensorFlow's order, which ascends whatever is given."""
    if visible_devices is None:
        return None
    if visible_devices == "cpu":
        return []
    words = [word.strip() for word in visible_devices.split(",")]
    numbers = {int(word) for word in words if re.fullmatch("[0-9]+", word)}
    if len(numbers) == len(words):
        return sorted(numbers)
    raise ConfigError(
        f"`visible_devices` ({visible_devices}) must be different numbers of GPUs with "
        "commas between them, or cpu.",
        "Write for example --visible_devices=0,2.")


def _no_gpu(subject: str) -> ConfigError:
    """Returns the error that says why TensorFlow sees no GPU, and what helps."""
    gpus, mask = nvidia_smi(), _mask()
    first = (mask or "").split(",")[0].strip()
    remedy = _INSTALL
    if _is_hiding(mask) or first.isdecimal() and int(first) >= len(gpus) > 0:
        cause = f"CUDA_VISIBLE_DEVICES ({mask}) leaves it none"
        remedy = "Unset or correct CUDA_VISIBLE_DEVICES"
    elif not tf.sysconfig.get_build_info().get("is_cuda_build"):
        cause = "it is built without CUDA"
    elif not gpus:
        cause = "nvidia-smi lists none, so the driver is missing or does not work"
        remedy = "Install NVIDIA's driver, or start the container with --gpus=all"
    elif wrong := mismatches(gpus[0][2]):
        cause, remedy = wrong[0]
    elif not all(found for found, _ in libraries().values()):
        cause = "the CUDA libraries that it opens are not installed by pip"
    else:
        cause = "its log tells more"
        remedy = "Look there, with TF_CPP_MIN_LOG_LEVEL=0, for what cannot be opened"
    return ConfigError(
        f"{subject}, and TensorFlow sees none: {cause}.",
        f"{remedy}, or use the CPU on purpose: --visible_devices=cpu.")


def _mask() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def _is_hiding(mask: str | None) -> bool:
    """Whether CUDA_VISIBLE_DEVICES is meant to hide all GPUs: -1, or nothing."""
    return mask is not None and not re.match("[0-9]|GPU-|MIG-", mask.strip())


def nvidia_smi() -> list[tuple[str, ...]]:
    """Returns name, memory in MB and driver of each GPU; nothing where it fails."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version",
               "--format=csv,noheader,nounits"]  # fmt: skip
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [tuple(line.rsplit(", ", 2)) for line in output.splitlines()]
    return [row for row in rows if len(row) == 3]


def libraries() -> dict[str, tuple[str | None, str | None]]:
    """Returns the versions that pip has installed, and TensorFlow is built for."""
    build = tf.sysconfig.get_build_info()
    cuda, cudnn = build.get("cuda_version"), build.get("cudnn_version")
    # Of cuDNN the build tells the major version alone, the package what it requires.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("tensorflow") or ():
            if match := re.match(r"nvidia-cudnn-cu\d.*>=(\d+\.\d+)", line):
                cudnn = match[1]
    own = f"-cu{(cuda or '').partition('.')[0]}"
    return {"CUDA": (_installed("nvidia-cuda-runtime", own), cuda),
            "cuDNN": (_installed("nvidia-cudnn", own), cudnn)}  # fmt: skip


def _installed(package: str, own: str) -> str | None:
    for suffix in (own, "-cu12", "-cu13", ""):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package + suffix)
            if not version.startswith("0."):  # empty: it says what the new name is
                return version
    return None


def mismatches(driver: str) -> list[tuple[str, str]]:
    """Returns cause and remedy of each version that does not fit TensorFlow's."""
    found_built, wrong = libraries(), []
    cuda = (found_built["CUDA"][1] or "").partition(".")[0]
    oldest = _OLDEST_DRIVER.get(cuda, "")
    if _version(driver) < _version(oldest):
        cause = f"the driver {driver} is too old for CUDA {cuda}"
        wrong.append((cause, f"Update the driver to {oldest} or later"))
    for name, (found, built) in found_built.items():
        if found and built:
            has, needs = _version(found), _version(built)[:2]
            if has[0] != needs[0] or has < needs:
                cause = f"{name} {found} is installed, and TensorFlow needs "
                newer = ".".join(map(str, needs))
                wrong.append((f"{cause}{newer} or a later {needs[0]}.x", _INSTALL))
    return wrong


def _version(text: str) -> list[int]:
    return [int(number) for number in re.findall("[0-9]+", text)]


def report(strategy: tf.distribute.Strategy, why: str) -> str:
    """Returns a table of the devices found, the versions, and what was chosen.

    Args:
        strategy: what was chosen.
        why: the reason, in a few words.
    """
    names, count = strategy.extended.worker_devices, strategy.num_replicas_in_sync
    devices = [tf.DeviceSpec.from_string(name) for name in names]
    replicas = f"{count} replica{'s' * (count > 1)}{', here' * (count != len(devices))}"
    rows = list(_gpu_rows())
    if devices[0].device_type == "TPU":
        hosts = len({device.task for device in devices})
        rows.append(("TPU", f"{len(devices)} cores, {len(devices) // hosts} a host"))
    rows += [
        ("CPU", describe_cpu()),
        ("Versions", f"TensorFlow {tf.__version__}, Keras {keras.__version__}, Python "
                     f"{platform.python_version()}"),
        ("Strategy", f"{_name(strategy)}, {replicas} on {_places(devices)}: {why}"),
    ]  # fmt: skip
    return "\n".join(f"{label:10}{text}" for label, text in rows)


def _gpu_rows() -> Iterator[tuple[str, str]]:
    listed, seen = nvidia_smi(), tf.config.list_physical_devices("GPU")
    memory_mb = {name: memory for name, memory, _ in listed}
    table = []
    for gpu in seen:
        details = tf.config.experimental.get_device_details(gpu)
        name = details.get("device_name", "unknown")
        capability = ".".join(map(str, details.get("compute_capability", "?")))
        table.append((name, f"{memory_mb.get(name, '?'):>6} MB",
                      f"compute capability {capability}", _use(gpu)))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*table)]
    for number, cells in enumerate(table):
        padded = [cell.ljust(width) for cell, width in zip(cells, widths)]
        yield f"GPU {number}", "  ".join(padded).rstrip()
    if listed and not seen:
        yield "GPU", (f"{len(listed)} by nvidia-smi, none seen by TensorFlow; "
                      f"CUDA_VISIBLE_DEVICES: {_mask()}")  # fmt: skip
    if listed or seen:
        driver = listed[0][2] if listed else "unknown"
        versions = [f"{name} {found or 'unknown'} (built for {built})"
                    for name, (found, built) in libraries().items()]  # fmt: skip
        yield "CUDA", ", ".join([f"driver {driver}", *versions])
        for cause, remedy in mismatches(listed[0][2]) if listed else ():
            yield "Mismatch", f"{cause}. {remedy}."


def _use(gpu: tf.config.PhysicalDevice) -> str:
    """Says what is taken of a GPU."""
    if gpu not in tf.config.get_visible_devices("GPU"):
        return "not visible"
    if limits := tf.config.get_logical_device_configuration(gpu):
        return f"limit {limits[0].memory_limit} MB"
    grows = tf.config.experimental.get_memory_growth(gpu)
    return "memory as needed" if grows else "all memory"


def describe_cpu() -> str:
    """Returns the processor's name, its cores and what it has for 16-bit types."""
    cpuinfo = _CPUINFO.read_text(encoding="utf-8") if _CPUINFO.exists() else ""
    fields = dict(re.findall(r"^(model name|flags)\s*: (.*)$", cpuinfo, re.M))
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags, cores = fields.get("flags", "").split(), os.cpu_count() or 1
    has = [shown for flag, shown in _CPU_FEATURES.items() if flag in flags]
    return ", ".join([name.strip(), f"{cores} core{'s' * (cores > 1)}", *has])


def _name(strategy: tf.distribute.Strategy) -> str:
    """Returns a strategy's public name; some classes have another of their own."""
    public = (name for name in dir(tf.distribute)
              if getattr(tf.distribute, name) is type(strategy))  # fmt: skip
    return next(public, type(strategy).__name__)


def _places(devices: list[tf.DeviceSpec]) -> str:
    """Returns `GPU 0, 2`, by the numbers of the table; of many how many there are."""
    kind, numbers = devices[0].device_type, [device.device_index for device in devices]
    if kind == "GPU":  # strategies count the visible ones alone
        gpus = enumerate(tf.config.list_physical_devices("GPU"))
        visible = tf.config.get_visible_devices("GPU")
        own = [number for number, gpu in gpus if gpu in visible]
        numbers = own[:len(numbers)] or numbers  # a chief without has its workers'
    if len(numbers) > 8:
        return f"{len(numbers)} {kind}s"
    return f"{kind} {', '.join(map(str, numbers))}"
