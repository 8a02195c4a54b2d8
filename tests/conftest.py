"""Set-up of every test process: signals, four CPU devices, quiet logs, seeds."""

import os
import signal

# What a shell starts in the background ignores Ctrl-C, and what nohup starts SIGHUP;
# the tests send both.
for number, handler in ((signal.SIGINT, signal.default_int_handler),
                        (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# Before TensorFlow is imported; tests that start a subprocess pass these on to it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # the same devices everywhere
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: one thread each inside an operation.
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import keras  # noqa: E402
import pytest  # noqa: E402
import tensorflow as tf  # noqa: E402

NUM_DEVICES = 4

# Their thread may hold up the end of an iterator, whenever garbage is collected, by as
# long as it lived.
_without_autotune = tf.data.Options()
_without_autotune.autotune.enabled = False
_iterator_of = tf.data.Dataset.__iter__
tf.data.Dataset.__iter__ = lambda dataset: _iterator_of(
    dataset.with_options(_without_autotune))

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * NUM_DEVICES,
)


def _strategy_of(replicas: int) -> tf.distribute.Strategy:
    if replicas == 0:
        return tf.distribute.get_strategy()
    if replicas == 1:
        return tf.distribute.OneDeviceStrategy("CPU:0")
    # TensorFlow's collectives keep one group size for the life of a process.
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


@pytest.fixture
def strategy_of():
    """A function of the number of replicas: 0 default, 1 one device, n mirrored."""
    return _strategy_of


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same seeds and leaves Keras's policy as it was."""
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)
