r"""ResNet-50 v1.5 on ImageNet, with label smoothing and large batches.

    python -m experiments.imagenet_resnet --data_dir=/data/imagenet \
      --policy=mixed_bfloat16 --global_batch_size=2048 --learning_rate=2.048 \
      --warmup_steps=5008 --train_epochs=90

on 8 GPUs that hold 256 images each; on fewer with --accumulate_steps. Expected: 76.9 %
top-1, as NVIDIA reports for the same settings. Not run here.

    python -m experiments.imagenet_resnet --data_dir=/data/imagenet \
      --policy=mixed_bfloat16 --optimizer=lars --momentum=0.9 --l2=2e-4 \
      --global_batch_size=8192 --learning_rate=17 --warmup_steps=785 --train_epochs=90

with layer-wise rates, for many GPUs. MLCommons reports 75.9 % after 41 to 44 epochs,
with a quadratic decay of the rate that ends there; of this cosine over 90 no figure is
known. Not run here.

    python -m experiments.imagenet_resnet --synthetic --train_steps=200 --mode=train

for speed alone, on random pixels; `python -m experiments.benchmarks.imagenet_input`
tells whether reading and decoding hold training up.
Data: experiments/datasets/imagenet.py says how to get them. Labels are 0 to 999, one
less than in the files.

Source: He et al. 2015, https://arxiv.org/abs/1512.03385; NVIDIA, ResNet-50 v1.5 for
TensorFlow, DGXA100_RN50_AMP_90E.sh (76.93 %; 77.01 % without mixed precision),
https://github.com/NVIDIA/DeepLearningExamples; MLCommons, reference convergence points,
training_1.0.0/rcps_resnet.json, resnet_ref_8192, https://github.com/mlcommons/logging
"""

import dataclasses

import keras
import tensorflow as tf

import mpl
from experiments.datasets import imagenet
from experiments.models import bottleneck
from experiments.optimizers import lars
from experiments.optimizers.momentum import set_momentum


@dataclasses.dataclass(frozen=True)
class Config(mpl.RunConfig):
    """Flags of this experiment, and its own defaults."""

    global_batch_size = 256
    train_epochs = 90
    optimizer = "sgd"
    learning_rate = 0.256
    lr_schedule = "cosine"
    momentum: float = mpl.option(0.875, "Of sgd and lars.", minimum=0, below=1)
    l2: float = mpl.option(
        2**-15, "Factor of kernels that is added to their gradient.", minimum=0)
    label_smoothing: float = mpl.option(
        0.1, "Share of the label that is spread over all classes.", minimum=0, below=1)
    depth: str = mpl.option("50", "Layers.", choices=tuple(bottleneck.BLOCKS))
    width: int = mpl.option(64, "Filters of the first convolution.", minimum=1)
    image_size: int = mpl.option(224, "Height and width in pixels.", minimum=32)
    synthetic: bool = mpl.option(
        False, "Random pixels instead of images, to measure speed.")

    def validate(self) -> None:
        super().validate()
        if self.synthetic and self.data_dir is not None:
            raise mpl.ConfigError(
                f"`data_dir` ({self.data_dir}) is not read with `synthetic`.",
                "Leave one of the two out.")


class ImagenetResnet(mpl.Experiment):
    """Photographs of 1,000 kinds of things."""

    Config = Config

    def build_data(self, split, context):
        config = self.config
        if not config.synthetic:
            return imagenet.load(
                split, context.data_dir, config.image_size, context.max_bad_records)
        print(f"synthetic {split}: random pixels and labels, for speed alone; there is "
              "nothing to learn", flush=True)
        batches = {"train": 2, "validation": 1}.get(split, 0)
        return imagenet.synthetic(
            batches * config.global_batch_size, config.image_size) if batches else None

    def build_model(self):
        config = self.config
        return bottleneck.resnet(
            config.depth, imagenet.NUM_CLASSES, config.image_size, width=config.width,
            mean=imagenet.MEAN, stddev=imagenet.STDDEV,
            l2=0.0 if config.optimizer == "lars" else config.l2)

    def build_optimizer(self, config):
        optimizer = super().build_optimizer(config)
        if config.optimizer == "lars":  # its rates depend on what is added
            optimizer.l2 = config.l2
        set_momentum(optimizer, config, keras.optimizers.SGD, lars.Lars)
        return optimizer

    def loss(self, batch, training):
        logits = self.model(batch["image"], training=training)
        spread = self.config.label_smoothing if training else 0.0
        each = spread / imagenet.NUM_CLASSES
        wanted = tf.one_hot(
            batch["label"], imagenet.NUM_CLASSES, 1 - spread + each, each)
        losses = tf.nn.softmax_cross_entropy_with_logits(wanted, logits)
        return mpl.LossOutput(losses, batch["weight"], (batch["label"], logits))

    def metrics(self):
        prefix = "synthetic_" if self.config.synthetic else ""
        return {f"{prefix}top_1": keras.metrics.SparseCategoricalAccuracy(),
                f"{prefix}top_5": keras.metrics.SparseTopKCategoricalAccuracy(5)}

    def predict(self, batch):
        return tf.nn.softmax(self.model(batch["image"], training=False))


if __name__ == "__main__":
    mpl.run(ImagenetResnet)
