"""Finds illness in images, volumes and measurements.

    python -m experiments.medical
    python -m experiments.medical --dataset=synthetic_3d --train_epochs=20
    python -m experiments.medical --data_dir=medmnist --dataset=pathmnist --filters=32
    python -m experiments.medical --dataset=breast_cancer --train_epochs=100 \\
        --global_batch_size=32
    python -m experiments.medical --mode=predict --input=scans    # a folder of images

--data_dir holds MedMNIST's .npz files, of images or of volumes; whether a set asks for
one answer of two, one of several, or several of yes and no is found from its labels.
Without it the data are synthetic: images of lesions whose risk is known, and their
figures are named so. The table of tumours comes with scikit-learn, in the extra
`medical`. `sensitivity` is that of label 1, whatever it means: here illness, but in
BreastMNIST 1 is benign.
Expected, on the test data: synthetic_auc 0.884 to 0.892, where the known risk has
0.896, after 10 seconds of training on 2 CPU cores (in float16, which they imitate, 23
seconds); of volumes 0.911 after 40 seconds; of the table auc 1.0 and accuracy
0.991 to 1.0 (114 tumours, three seeds and policies).
Hardware: any. MedMNIST: not run here.
Source: Yang et al. 2023, https://doi.org/10.1038/s41597-022-01721-8
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

import mpl
from experiments.datasets import breast_cancer, diagnosis, lesions, medmnist
from experiments.models import medical as models
from experiments.models import ranking

OWN = {
    "synthetic": lesions.load,
    "synthetic_3d": lambda split: lesions.load(split, rank=3),
    "breast_cancer": breast_cancer.load,
}


@dataclasses.dataclass(frozen=True)
class Config(mpl.RunConfig):
    """Flags of this experiment, and its own defaults."""

    train_epochs = 4
    global_batch_size = 64
    learning_rate = 3e-3
    lr_schedule = "cosine"
    dataset: str | None = mpl.option(
        None, "synthetic, synthetic_3d, breast_cancer, or the name of an .npz file in "
        "--data_dir. none: the only one there; without --data_dir, synthetic.")
    task: str = mpl.option(
        "auto", "What the labels ask for. auto: as they look.",
        choices=("auto", *diagnosis.TASKS))
    class_weights: str = mpl.option(
        "balanced", "balanced: all classes count the same in the loss, however rare; "
        "none: all examples.", choices=("balanced", "none"))
    specificity: float = mpl.option(
        0.9, "Share of the examples without label 1 that must be told as such, at "
        "which the metric `sensitivity` is the share of those with it that are found.",
        above=0, below=1, math=False)
    filters: int = mpl.option(
        8, "Filters of the first convolution; the table has none.", minimum=1)

    def validate(self):
        super().validate()
        if self.dataset in OWN and self.data_dir is not None:
            raise mpl.ConfigError(
                f"`dataset` ({self.dataset}) is not read from `data_dir` "
                f"({self.data_dir}).", "Leave one of the two out.")
        if self.dataset == "breast_cancer" and self.filters != type(self).filters:
            raise mpl.ConfigError(
                f"`filters` ({self.filters}) has no effect on `dataset` "
                "(breast_cancer), a table.", "Leave one of the two out.")


class Medical(mpl.Experiment):
    """Images, volumes or tables, with labels of any of three kinds."""

    Config = Config
    prefix = ""  # of the metrics' names, in every line of the log and every report

    def build_data(self, split, context):
        name = self.config.dataset
        if name is None and context.data_dir is None:
            name = "synthetic"
        if name not in OWN:
            where = medmnist.find(context.data_dir, name)
            examples = medmnist.load(where, split)
        else:
            where, examples = name, OWN[name](split)
            self.prefix = "synthetic_" if name.startswith("synthetic") else ""
        label = examples["label"]
        if split == "train":  # the first
            self.task, self.num_logits = diagnosis.task_of(
                label, self.config.task, where)
        label = diagnosis.encoded(label, self.task, self.num_logits, where)
        if split == "train":
            self.inspect(examples, label)
            shape = "×".join(map(str, next(iter(examples.values())).shape[1:]))
            print(f"Data: {where}: {len(label):,} training examples of {shape}, "
                  f"task {self.task}, {self.num_logits} logits", flush=True)
        return {**examples, "label": label}

    def inspect(self, examples, label):
        """Takes from the training data what the model and the loss must know."""
        self.class_weights = diagnosis.balanced_weights(label, self.task)
        if self.config.class_weights == "none":
            self.class_weights = np.ones_like(self.class_weights)
        self.feature = "image" if "image" in examples else "features"
        values = examples[self.feature]
        self.shape = values.shape[1:]
        if self.feature == "features":
            self.mean = values.mean(0, dtype=np.float64).astype(np.float32)
            self.deviation = values.std(0, dtype=np.float64).astype(np.float32)

    def build_model(self):
        if self.feature == "image":
            return models.cnn(self.shape, self.num_logits, self.config.filters)
        return models.mlp(self.shape[0], self.num_logits, units=32)

    def logits(self, batch, training):
        inputs = batch[self.feature]
        if self.feature == "features":
            # In float32: an area of 1,001 is 1,000 in bfloat16.
            inputs = (inputs - self.mean) / self.deviation
        return self.model(inputs, training=training)

    def probability(self, logits):
        one_of_all = self.task == "multi_class"
        return tf.nn.softmax(logits) if one_of_all else tf.sigmoid(logits)

    def loss(self, batch, training):
        logits = self.logits(batch, training)
        label = tf.cast(batch["label"], tf.float32)
        without, with_label = self.class_weights
        # Not in the weights of the loss, which are the metrics' too.
        if self.task == "multi_class":
            losses = tf.nn.softmax_cross_entropy_with_logits(label, logits)
            losses *= tf.reduce_sum(label * with_label, -1)
        else:
            losses = tf.nn.sigmoid_cross_entropy_with_logits(label, logits)
            losses *= tf.where(label > 0, with_label, without)
            losses = tf.reduce_mean(losses, -1)
        outputs = label, self.probability(logits)
        return mpl.LossOutput(losses, batch["weight"], outputs)

    def metrics(self):
        accuracy = keras.metrics.BinaryAccuracy
        if self.task == "multi_class":
            accuracy = keras.metrics.CategoricalAccuracy
        specificity = self.config.specificity
        named = {
            "auc": ranking.AUC(self.num_logits),
            "sensitivity": ranking.SensitivityAtSpecificity(
                self.num_logits, specificity),
            "accuracy": accuracy(),
        }
        return {self.prefix + name: metric for name, metric in named.items()}

    def predict(self, batch):
        return {"probability": self.probability(self.logits(batch, training=False))}

    def read_input(self, path):  # of the table; mpl reads images and .npz files
        is_table = path.endswith(".csv")
        return [breast_cancer.read_features(path)] if is_table else None


if __name__ == "__main__":
    mpl.run(Medical)
