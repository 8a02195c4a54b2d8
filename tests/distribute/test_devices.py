"""Setting up GPUs that are not there, and the table of them; NVIDIA's side is faked."""

import importlib.metadata
import subprocess
import sys
import types

import pytest
import tensorflow as tf

from mpl.distribute import devices
from mpl.distribute.devices import configure, describe_cpu, report
from mpl.errors import ConfigError

SAPPHIRE = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu avx avx2 avx512f avx512bw avx512_bf16 amx_bf16 avx512_fp16 amx_tile
bugs\t\t: spectre_v1

processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu avx avx2 avx512f avx512bw avx512_bf16 amx_bf16 avx512_fp16 amx_tile
"""
H200, T4 = "NVIDIA H200, 143771, 580.159.03", "Tesla T4, 15360, 580.159.03"
DETAILS = {
    "NVIDIA H200": {"device_name": "NVIDIA H200", "compute_capability": (9, 0)},
    "Tesla T4": {"device_name": "Tesla T4", "compute_capability": (7, 5)},
}
PACKAGES = {"nvidia-cuda-runtime-cu12": "12.5.82", "nvidia-cudnn-cu12": "9.3.0.75"}
BUILD = {"is_cuda_build": True, "cuda_version": "12.5.1", "cudnn_version": "9"}
REQUIRES = ["numpy>=1.26", "nvidia-cudnn-cu12<10.0,>=9.3.0.75; extra == 'and-cuda'"]
CPU_ON_PURPOSE = ", or use the CPU on purpose: --visible_devices=cpu."


class FakeConfig:
    """tf.config for GPUs, with TensorFlow's own rules of what may be set when."""

    LogicalDeviceConfiguration = tf.config.LogicalDeviceConfiguration

    def __init__(self, names):
        self.names = names
        self.gpus = [
            tf.config.PhysicalDevice(f"/physical_device:GPU:{number}", "GPU")
            for number in range(len(names))
        ]
        self.visible, self.initialised = list(self.gpus), False
        self.growth, self.logical = {gpu: None for gpu in self.gpus}, {}
        self.experimental = self

    def list_physical_devices(self, kind):
        assert kind == "GPU"
        return list(self.gpus)

    def get_visible_devices(self, kind):
        assert kind == "GPU"
        return list(self.visible)

    def set_visible_devices(self, gpus, kind):
        assert kind == "GPU" and all(gpu in self.gpus for gpu in gpus)
        self._may_change(self.visible == gpus)
        self.visible = gpus

    def get_logical_device_configuration(self, gpu):
        return self.logical.get(gpu)

    def set_logical_device_configuration(self, gpu, parts):
        assert all(part.memory_limit is not None for part in parts)
        self._may_change(self.logical.get(gpu) == parts)
        self.logical[gpu] = parts

    def get_memory_growth(self, gpu):
        return self.growth[gpu]

    def set_memory_growth(self, gpu, grows):
        if gpu in self.logical:
            raise ValueError("Cannot set memory growth on device when virtual devices")
        self._may_change(self.growth[gpu] == grows)
        self.growth[gpu] = grows

    def get_device_details(self, gpu):
        return DETAILS[self.names[self.gpus.index(gpu)]]

    def _may_change(self, same):
        if self.initialised and not same:
            raise RuntimeError("cannot be modified after being initialized")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes TensorFlow, the driver and pip say what it is told."""

    def make(
        names=(), *, listed=(), build=BUILD, packages=PACKAGES, requires=REQUIRES,
        smi_error=None, in_proc=False, mask=None,
    ):  # fmt: skip
        def nvidia_smi(command, *, timeout, **kwargs):
            assert command == ["nvidia-smi",
                               "--query-gpu=name,memory.total,driver_version",
                               "--format=csv,noheader,nounits"]  # fmt: skip
            assert 0 < timeout < 60
            if smi_error is not None:
                raise smi_error
            return types.SimpleNamespace(stdout="\n".join([*listed, ""]))

        def version(package):
            if package not in packages:
                raise importlib.metadata.PackageNotFoundError(package)
            return packages[package]

        def required(package):
            assert package == "tensorflow"
            if requires is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return requires

        config = FakeConfig(names)
        fake = types.SimpleNamespace(
            config=config, distribute=tf.distribute, DeviceSpec=tf.DeviceSpec,
            __version__="2.21.0",
            sysconfig=types.SimpleNamespace(get_build_info=lambda: build),
        )  # fmt: skip
        monkeypatch.setattr(devices, "tf", fake)
        monkeypatch.setattr(devices.subprocess, "run", nvidia_smi)
        monkeypatch.setattr(devices.importlib.metadata, "version", version)
        monkeypatch.setattr(devices.importlib.metadata, "requires", required)
        monkeypatch.setattr(devices, "_DRIVER_GPUS", tmp_path / "gpus")
        if in_proc:
            (tmp_path / "gpus" / "0000:3d:00.0").mkdir(parents=True)
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(SAPPHIRE)
        monkeypatch.setattr(devices, "_CPUINFO", cpuinfo)
        monkeypatch.setattr(devices.os, "cpu_count", lambda: 2)
        monkeypatch.setattr(devices.platform, "python_version", lambda: "3.12.1")
        monkeypatch.setattr(devices, "keras", types.SimpleNamespace(__version__="3.15"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if mask is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
        return config

    return make


def _strategy(*places, replicas=None, kind="MirroredStrategy"):
    extended = types.SimpleNamespace(worker_devices=places)
    number = replicas or len(places)
    return type(kind, (), {"extended": extended, "num_replicas_in_sync": number})()


GPU = "/job:localhost/replica:0/task:0/device:GPU:{}".format


def test_by_default_all_gpus_are_visible_and_memory_grows_on_each(machine):
    config = machine(["NVIDIA H200", "Tesla T4"])
    configure(None, None)
    assert config.visible == config.gpus
    assert list(config.growth.values()) == [True, True]
    assert config.logical == {}


def test_a_limit_is_a_logical_device_of_that_size(machine):
    config = machine(["NVIDIA H200", "Tesla T4"])
    configure(None, 4096)
    assert [len(parts) for parts in config.logical.values()] == [1, 1]
    assert {parts[0].memory_limit for parts in config.logical.values()} == {4096}
    assert list(config.growth.values()) == [None, None]


@pytest.mark.parametrize("text", ["0,2", "2,0", " 2 , 0"])
def test_a_subset_is_visible_in_tensorflows_order(machine, text):
    config = machine(["Tesla T4"] * 3)
    configure(text, None)
    assert config.visible == [config.gpus[0], config.gpus[2]]
    assert list(config.growth.values()) == [True, None, True]


def test_a_limit_goes_to_the_visible_gpus_alone(machine):
    config = machine(["Tesla T4"] * 3)
    configure("1", 1000)
    assert list(config.logical) == [config.gpus[1]]


def test_cpu_hides_all_gpus(machine):
    config = machine(["Tesla T4"] * 2)
    configure("cpu", None)
    assert config.visible == []
    assert list(config.growth.values()) == [None, None]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"smi_error": FileNotFoundError("nvidia-smi")},
        {"smi_error": subprocess.TimeoutExpired("nvidia-smi", 20)},
        {"smi_error": subprocess.CalledProcessError(9, "nvidia-smi")},
        {"listed": ["No devices were found"]},
        {"listed": [T4], "in_proc": True, "mask": "-1"},
        {"listed": [T4], "in_proc": True, "mask": ""},
        {"listed": [T4], "in_proc": True, "mask": "NoDevFiles"},
    ],
)
def test_a_machine_without_gpus_or_with_hidden_ones_is_no_error(machine, kwargs):
    config = machine(**kwargs)
    configure(None, None)
    assert config.visible == []


def test_cpu_on_purpose_is_no_error_where_tensorflow_does_not_see_the_gpus(machine):
    config = machine(listed=[T4], in_proc=True)
    configure("cpu", None)
    assert config.visible == []


@pytest.mark.parametrize("text", ["", "0;2", "0,", "-1", "gpu", "0,0", "00,0", "CPU"])
def test_malformed_numbers_are_errors(machine, text):
    machine(["Tesla T4"] * 3)
    with pytest.raises(ConfigError) as caught:
        configure(text, None)
    assert caught.value.cause == (
        f"`visible_devices` ({text}) must be different numbers of GPUs with commas "
        "between them, or cpu.")  # fmt: skip
    assert caught.value.remedy == "Write for example --visible_devices=0,2."


def test_an_unknown_number_says_how_many_there_are(machine):
    config = machine(["Tesla T4"] * 2)
    with pytest.raises(ConfigError) as caught:
        configure("0,2", None)
    assert str(caught.value) == (
        "`visible_devices` (0,2) has the number 2, and the GPUs that TensorFlow sees "
        "are 2, counted from 0.\nUse numbers below 2, or look at CUDA_VISIBLE_DEVICES.")
    assert config.visible == config.gpus


def test_a_limit_without_gpus_contradicts_itself(machine):
    machine(["Tesla T4"])
    with pytest.raises(ConfigError) as caught:
        configure("cpu", 4096)
    assert str(caught.value) == (
        "`visible_devices` (cpu) and `gpu_memory_limit_mb` (4096) contradict each "
        "other.\nLeave one of them out.")  # fmt: skip


@pytest.mark.parametrize(
    ("kwargs", "cause", "remedy"),
    [
        ({"listed": [T4], "mask": "-1"}, "CUDA_VISIBLE_DEVICES (-1) leaves it none",
         "Unset or correct CUDA_VISIBLE_DEVICES"),
        ({"listed": [T4], "mask": "1,0"}, "CUDA_VISIBLE_DEVICES (1,0) leaves it none",
         "Unset or correct CUDA_VISIBLE_DEVICES"),
        ({"listed": [T4], "build": {"is_cuda_build": False}},
         "it is built without CUDA", "Run pip install 'tensorflow[and-cuda]'"),
        ({"smi_error": FileNotFoundError()},
         "nvidia-smi lists none, so the driver is missing or does not work",
         "Install NVIDIA's driver, or start the container with --gpus=all"),
        ({"listed": ["Tesla T4, 15360, 525.60.11"]},
         "the driver 525.60.11 is too old for CUDA 12",
         "Update the driver to 525.60.13 or later"),
        ({"listed": [T4], "packages": {**PACKAGES, "nvidia-cudnn-cu12": "8.9.7"}},
         "cuDNN 8.9.7 is installed, and TensorFlow needs 9.3 or a later 9.x",
         "Run pip install 'tensorflow[and-cuda]'"),
        ({"listed": [T4], "packages": {"nvidia-cudnn-cu12": "9.3.0.75"}},
         "the CUDA libraries that it opens are not installed by pip",
         "Run pip install 'tensorflow[and-cuda]'"),
        ({"listed": [T4], "mask": "GPU-9b3f"}, "its log tells more",
         "Look there, with TF_CPP_MIN_LOG_LEVEL=0, for what cannot be opened"),
    ],
)  # fmt: skip
def test_no_gpu_where_one_is_asked_for_names_cause_and_remedy(
    machine, kwargs, cause, remedy
):
    machine(**kwargs)
    for arguments, name in (
        (("0", None), "`visible_devices` (0)"),
        ((None, 4096), "`gpu_memory_limit_mb` (4096)"),
    ):
        with pytest.raises(ConfigError) as caught:
            configure(*arguments)
        assert caught.value.cause == (
            f"{name} asks for a GPU, and TensorFlow sees none: {cause}.")
        assert caught.value.remedy == remedy + CPU_ON_PURPOSE


@pytest.mark.parametrize(
    ("kwargs", "cause"),
    [
        ({"listed": [T4], "packages": {}},
         "the CUDA libraries that it opens are not installed by pip"),
        ({"listed": [T4], "mask": "1"}, "CUDA_VISIBLE_DEVICES (1) leaves it none"),
        ({"in_proc": True},
         "nvidia-smi lists none, so the driver is missing or does not work"),
    ],
)  # fmt: skip
def test_a_machine_with_gpus_does_not_fall_back_to_the_cpu(machine, kwargs, cause):
    machine(**kwargs)
    with pytest.raises(ConfigError) as caught:
        configure(None, None)
    assert caught.value.cause == (
        f"The machine has NVIDIA GPUs, and TensorFlow sees none: {cause}.")
    assert caught.value.remedy.endswith(CPU_ON_PURPOSE)


@pytest.mark.parametrize(
    "arguments", [(None, None), ("0", None), ("cpu", None), (None, 512), ("1", 512)]
)
def test_the_same_again_is_harmless(machine, arguments):
    config = machine(["Tesla T4"] * 2)
    configure(*arguments)
    before = config.visible, dict(config.growth), dict(config.logical)
    config.initialised = True
    configure(*arguments)
    configure(None, None)  # asks for nothing
    assert before == (config.visible, config.growth, config.logical)


@pytest.mark.parametrize(
    ("first", "then", "names"),
    [
        (("0", None), ("1", None), "`visible_devices` (1)"),
        (("0", None), ("0", 512),
         "`visible_devices` (0) and `gpu_memory_limit_mb` (512)"),
        ((None, None), ("cpu", None), "`visible_devices` (cpu)"),
        ((None, 512), (None, 513), "`gpu_memory_limit_mb` (513)"),
    ],
)  # fmt: skip
def test_another_setting_after_tensorflow_has_started_is_an_error(
    machine, first, then, names
):
    config = machine(["Tesla T4"] * 2)
    configure(*first)
    config.initialised = True
    with pytest.raises(ConfigError) as caught:
        configure(*then)
    assert str(caught.value) == (
        f"{names} differs from how TensorFlow's devices are set up; they are already "
        "initialised.\nStart before any tensor is made, or restart the notebook's "
        "kernel.")  # fmt: skip


def test_growth_that_comes_too_late_is_a_warning(machine, monkeypatch):
    config, said = machine(["Tesla T4"]), []
    config.initialised = True
    monkeypatch.setattr(devices.logging, "warning", said.append)
    configure(None, None)
    configure("0", None)
    warning = "TensorFlow had set up its GPUs before: it takes all their memory."
    assert said == [warning, warning]


def test_the_table_of_two_gpus(machine):
    machine(
        ["NVIDIA H200", "Tesla T4"], listed=[T4, H200],
        packages={**PACKAGES, "nvidia-cudnn-cu12": "9.1.0.70"})  # fmt: skip
    configure(None, None)
    strategy = _strategy(GPU(0), GPU(1))
    assert report(strategy, "all visible GPUs") == """\
GPU 0     NVIDIA H200  143771 MB  compute capability 9.0  memory as needed
GPU 1     Tesla T4      15360 MB  compute capability 7.5  memory as needed
CUDA      driver 580.159.03, CUDA 12.5.82 (built for 12.5.1), cuDNN 9.1.0.70 (built for 9.3)
Mismatch  cuDNN 9.1.0.70 is installed, and TensorFlow needs 9.3 or a later 9.x. Run pip install 'tensorflow[and-cuda]'.
CPU       Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, 2 cores, AVX2, AVX512, AVX512-BF16, AVX512-FP16, AMX-BF16
Versions  TensorFlow 2.21.0, Keras 3.15, Python 3.12.1
Strategy  MirroredStrategy, 2 replicas on GPU 0, 1: all visible GPUs"""  # noqa: E501


def test_the_table_shows_what_is_not_visible_and_the_limit(machine):
    machine(["Tesla T4"] * 3, listed=[T4] * 3)
    configure("0,2", 4096)
    lines = report(_strategy(GPU(0), GPU(1)), "as asked").splitlines()
    assert [line.split("  ")[-1] for line in lines[:3]] == [
        "limit 4096 MB", "not visible", "limit 4096 MB"]  # fmt: skip
    assert lines[-1] == "Strategy  MirroredStrategy, 2 replicas on GPU 0, 2: as asked"
    assert not any(line.startswith("Mismatch") for line in lines)


def test_what_nobody_tells_is_unknown(machine):
    config = machine(["Tesla T4"], packages={}, requires=None)
    config.initialised = True
    lines = report(_strategy(GPU(0)), "the only one").splitlines()
    assert lines[:2] == [
        "GPU 0     Tesla T4       ? MB  compute capability 7.5  all memory",
        "CUDA      driver unknown, CUDA unknown (built for 12.5.1), cuDNN unknown "
        "(built for 9)"]  # fmt: skip
    assert len(lines) == 5


def test_gpus_that_are_hidden_are_in_the_table(machine):
    machine(listed=[T4, T4], mask="-1")
    lines = report(_strategy("/device:CPU:0"), "no GPU is seen").splitlines()
    assert lines[0] == (
        "GPU       2 by nvidia-smi, none seen by TensorFlow; CUDA_VISIBLE_DEVICES: -1")
    assert lines[1].startswith("CUDA      driver 580.159.03, CUDA 12.5.82")


@pytest.mark.parametrize(
    ("driver", "packages", "named"),
    [
        ("525.60.13", PACKAGES, []),
        ("525.60", PACKAGES, ["the driver 525.60 is too old for CUDA 12"]),
        ("580.65.06", {**PACKAGES, "nvidia-cuda-runtime-cu12": "12.4.127"},
         ["CUDA 12.4.127 is installed, and TensorFlow needs 12.5 or a later 12.x"]),
        ("580.65.06", {**PACKAGES, "nvidia-cuda-runtime-cu12": "12.9.79"}, []),
        ("580.65.06", {"nvidia-cuda-runtime-cu13": "0.0.1",
                       "nvidia-cuda-runtime": "13.0.96", "nvidia-cudnn-cu13": "9.13.0"},
         ["CUDA 13.0.96 is installed, and TensorFlow needs 12.5 or a later 12.x"]),
        ("450.80.02", {"nvidia-cudnn-cu12": "10.1.0"},
         ["the driver 450.80.02 is too old for CUDA 12",
          "cuDNN 10.1.0 is installed, and TensorFlow needs 9.3 or a later 9.x"]),
    ],
)  # fmt: skip
def test_mismatches_are_named(machine, driver, packages, named):
    machine(["Tesla T4"], packages=packages)
    assert [cause for cause, _ in devices.mismatches(driver)] == named


def test_the_package_for_tensorflows_own_cuda_counts(machine):
    machine(build={**BUILD, "cuda_version": "13.0.1"}, requires=None,
            packages={**PACKAGES, "nvidia-cudnn-cu13": "9.13.0"})  # fmt: skip
    assert devices.libraries() == {
        "CUDA": ("12.5.82", "13.0.1"), "cuDNN": ("9.13.0", "9")}  # fmt: skip
    assert devices.mismatches("575.51.03") == [
        ("the driver 575.51.03 is too old for CUDA 13",
         "Update the driver to 580.65.06 or later"),
        ("CUDA 12.5.82 is installed, and TensorFlow needs 13.0 or a later 13.x",
         "Run pip install 'tensorflow[and-cuda]'"),
    ]  # fmt: skip


def test_the_topology_of_a_tpu(machine):
    machine()
    places = [f"/job:worker/replica:0/task:{host}/device:TPU:{core}"
              for host in range(4) for core in range(8)]  # fmt: skip
    lines = report(_strategy(*places, kind="TPUStrategyV2"), "--tpu=pod").splitlines()
    assert lines[0] == "TPU       32 cores, 8 a host"
    assert lines[-1] == "Strategy  TPUStrategyV2, 32 replicas on 32 TPUs: --tpu=pod"


def test_a_chief_without_gpus_tells_those_of_its_workers(machine):
    machine()
    strategy = _strategy("/device:GPU:0", kind="ParameterServerStrategyV2")
    assert report(strategy, "tried").splitlines()[-1] == (
        "Strategy  ParameterServerStrategyV2, 1 replica on GPU 0: tried")


def test_a_strategy_of_several_processes_tells_its_own_devices(machine):
    machine(["Tesla T4"] * 2)
    strategy = object.__new__(tf.distribute.MultiWorkerMirroredStrategy)
    strategy._extended = types.SimpleNamespace(
        worker_devices=("/job:worker/replica:0/task:1/device:GPU:0",
                        "/job:worker/replica:0/task:1/device:GPU:1"),
        _num_replicas_in_sync=4)  # fmt: skip
    assert report(strategy, "tried").splitlines()[-1] == (
        "Strategy  MultiWorkerMirroredStrategy, 4 replicas, here on GPU 0, 1: tried")


@pytest.mark.parametrize(
    ("text", "cores", "shown"),
    [
        (SAPPHIRE, 96, "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, 96 cores, AVX2, "
                       "AVX512, AVX512-BF16, AVX512-FP16, AMX-BF16"),
        ("model name\t: AMD EPYC 7B12\nflags\t\t: avx avx2 fma\n", 1,
         "AMD EPYC 7B12, 1 core, AVX2"),
        ("model name\t: Old\nflags\t\t: avx512_bf16x amx_bf16x\n", 2, "Old, 2 cores"),
    ],
)  # fmt: skip
def test_the_cpu_and_what_it_has_for_16_bits(text, cores, shown, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(devices, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(devices.os, "cpu_count", lambda: cores)
    assert describe_cpu() == shown


def test_a_cpu_without_cpuinfo_has_the_platforms_name(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(devices.platform, "processor", lambda: "")
    monkeypatch.setattr(devices.platform, "machine", lambda: "arm64")
    assert describe_cpu() == "arm64, 8 cores"


def test_on_this_machine_without_gpus_the_table_has_three_lines(
    strategy_of, monkeypatch
):
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    configure(None, None)
    configure("cpu", None)
    one, two = (report(strategy_of(n), "to try").splitlines() for n in (1, 2))
    assert [line[:10] for line in one] == ["CPU       ", "Versions  ", "Strategy  "]
    assert all(line[10] != " " and len(line) < 120 for line in one)
    assert one[1] == two[1] == (
        f"Versions  TensorFlow {tf.__version__}, Keras {tf.keras.__version__}, "
        f"Python {sys.version.split()[0]}")
    assert one[2] == "Strategy  OneDeviceStrategy, 1 replica on CPU 0: to try"
    assert two[2] == "Strategy  MirroredStrategy, 2 replicas on CPU 0, 1: to try"
    with pytest.raises(ConfigError) as caught:
        configure("0", None)
    assert caught.value.cause == (
        "`visible_devices` (0) asks for a GPU, and TensorFlow sees none: "
        "CUDA_VISIBLE_DEVICES (-1) leaves it none.")


def test_the_installed_tensorflow_tells_what_it_is_built_for():
    build = tf.sysconfig.get_build_info()
    if not build.get("is_cuda_build"):
        pytest.skip("this TensorFlow is built without CUDA")
    (_, cuda), (_, cudnn) = devices.libraries().values()
    assert cuda == build["cuda_version"]
    assert cudnn.split(".")[0] == build["cudnn_version"] and "." in cudnn
