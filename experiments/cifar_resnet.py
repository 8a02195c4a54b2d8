"""ResNets on CIFAR-10 and CIFAR-100, as in the paper.

    python -m experiments.cifar_resnet --data_dir=cifar --train_steps=64000 \\
      --holdout=false

with the archive's folder cifar-10-batches-bin below `cifar`; on a GPU. The paper has
test accuracies of 0.9125, and with --depth=56 of 0.9303 (not run here: CIFAR-10 was
not). With --dataset=cifar100 the folder is cifar-100-binary. Without --data_dir:

    python -m experiments.cifar_resnet

learns the embedded digits, enlarged: a minute on 2 CPU cores, expected test accuracy
0.93 to 0.99, by seed. In mixed_float16, for which CPUs lack fast convolutions, several
minutes.
Source: He, Zhang, Ren and Sun 2015, section 4.2, https://arxiv.org/abs/1512.03385. As
there: 128 images a step, rate 0.1, a tenth of it after half and after three quarters of
the steps, momentum 0.9, weight decay 1e-4, crops and mirror images, shortcuts without
weights. Unlike there pixels lose one mean, not one each, and kernels alone decay.
"""

import dataclasses
import functools

import keras
import tensorflow as tf

import mpl
from experiments.datasets import cifar
from experiments.datasets.crops import crop_and_mirror
from experiments.models.resnet import resnet
from experiments.optimizers.momentum import set_momentum

MEAN, STDDEV = 120, 64  # of CIFAR's pixels, 0 to 255, about


@dataclasses.dataclass(frozen=True)
class Config(mpl.RunConfig):
    """Flags of this experiment, and its own defaults."""

    train_epochs = 10
    global_batch_size = 128
    optimizer = "sgd"
    learning_rate = 0.1
    lr_schedule = "step"
    dataset: str = mpl.option("cifar10", "Which set.", choices=tuple(cifar.SETS))
    holdout: bool = mpl.option(
        True, "Hold out the last tenth of the training images for validation.")
    depth: int = mpl.option(20, "Layers with weights: 6n + 2.", minimum=8)
    shortcut: str = mpl.option(
        "identity", "What leads around a block with more filters than the one before.",
        choices=("identity", "projection"))
    momentum: float = mpl.option(
        0.9, "Momentum of --optimizer=sgd.", minimum=0, below=1)
    kernel_decay: float = mpl.option(
        1e-4, "Weight decay of kernels, as a part of the gradient.", minimum=0)

    def validate(self) -> None:
        super().validate()
        if (self.depth - 2) % 6:
            raise mpl.ConfigError(
                f"`depth` ({self.depth}) must be 6n + 2.", "Use 20, 32, 44 or 56.")


class CifarResnet(mpl.Experiment):
    """32×32 colour images."""

    Config = Config

    def build_data(self, split, context):
        config, folder = self.config, context.data_dir
        examples = cifar.load(split, folder, config.dataset, config.holdout)
        if split != "train" or examples is None:
            return examples
        # A digit's mirror image is none, and around it it is black.
        own = {"mirrors": False} if folder is None else {"grey": MEAN}
        return mpl.ArraySource(examples, functools.partial(crop_and_mirror, **own))

    def build_model(self):
        config = self.config
        return resnet(
            config.depth, cifar.SETS[config.dataset].num_classes,
            keras.layers.Rescaling(1 / STDDEV, -MEAN / STDDEV, dtype="float32"),
            projection=config.shortcut == "projection", momentum=0.9,
            kernel_initializer="he_normal",
            kernel_regularizer=keras.regularizers.L2(config.kernel_decay / 2))

    def build_optimizer(self, config):
        optimizer = super().build_optimizer(config)
        set_momentum(optimizer, config, keras.optimizers.SGD)
        return optimizer

    def loss(self, batch, training):
        logits = self.model(batch["image"], training=training)
        losses = keras.losses.sparse_categorical_crossentropy(
            batch["label"], logits, from_logits=True)
        return mpl.LossOutput(losses, batch["weight"], (batch["label"], logits))

    def metrics(self):
        return {"accuracy": keras.metrics.SparseCategoricalAccuracy()}

    def predict(self, batch):
        return tf.nn.softmax(self.model(batch["image"], training=False))

    def read_input(self, path):  # a file of the set
        if path.endswith(".bin"):
            images, _ = cifar.read(path, self.config.dataset)
            return [{"image": images}]


if __name__ == "__main__":
    mpl.run(CifarResnet)
