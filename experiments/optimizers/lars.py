"""Layer-wise adaptive rates, for batches of many thousand examples."""

import keras
from keras import ops


class Lars(keras.optimizers.Optimizer):
    """Momentum, with a step on each kernel in proportion to the kernel itself:

        trust = coefficient ‖w‖ / (‖g‖ + l2 ‖w‖)      1 where ‖w‖ or ‖g‖ is 0
        v = momentum v + rate trust (g + l2 w)
        w = w − v

    Biases, and the gains of normalisation, have trust 1 and no l2: they are the
    variables with fewer than two dimensions. Its name in flags is `lars`.

    Args:
        learning_rate: a float or a schedule; best with a warm-up, see the source.
        momentum: share of the last step that goes on.
        l2: factor of the weights that is added to their gradient.
        coefficient: how large a step is beside the weights, at rate 1.
        **kwargs: those of every Keras optimizer.

    Source: You, Gitman and Ginsburg 2017, Large Batch Training of Convolutional
    Networks, algorithm 1, https://arxiv.org/abs/1708.03888
    """

    def __init__(
        self, learning_rate: float = 0.01, momentum: float = 0.9, l2: float = 0.0,
        coefficient: float = 0.001, **kwargs,
    ):
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.momentum, self.l2, self.coefficient = momentum, l2, coefficient

    def build(self, variables):
        """Makes the velocities."""
        if not self.built:
            super().build(variables)
            self.velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable and its velocity."""
        velocity = self.velocities[self._get_variable_index(variable)]
        gradient = ops.cast(gradient, variable.dtype)
        if len(variable.shape) > 1:
            size, slope = _norm(variable), _norm(gradient)
            trust = self.coefficient * size / (slope + self.l2 * size)
            trust = ops.where(ops.logical_and(size > 0, slope > 0), trust, 1.0)
            gradient = trust * (gradient + self.l2 * variable)
        rate = ops.cast(learning_rate, variable.dtype)
        self.assign(velocity, self.momentum * velocity + rate * gradient)
        self.assign_sub(variable, velocity)

    def get_config(self):
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "momentum": self.momentum, "l2": self.l2,
                "coefficient": self.coefficient}


def _norm(x):
    return ops.sqrt(ops.sum(ops.square(x)))


keras.saving.get_custom_objects()["lars"] = Lars
