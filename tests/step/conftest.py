"""What the tests of the step share besides small_models."""

import pytest
import tensorflow as tf


@pytest.fixture
def no_grappler():
    """Graphs run as written: rewriting fuses operations, and so rounds, differently."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})
