r"""BERT: masked words first, then the tasks of GLUE.

    python -m experiments.bert --workdir=runs/words
    python -m experiments.bert --task=glue --init_from=runs/words --train_epochs=6
    python -m experiments.bert --mode=predict --workdir=runs/words --input=lines.txt

A small one learns masked words of the running Python's documentation. Of topics that it
has not seen it names 22 % of them after 45 seconds on two cores of a CPU; the most
frequent word is 9 % of them at most, and what most often follows the word before 19 %.
Then it tells lines of Python from lines of prose: 98 % of the validation's, and 91 % of
the 68 of the test; without --init_from 96 % and 93 %. `--task=glue` runs 30 s.

The third command names the word at each [MASK] of a text file: `token` counts lines of
the vocabulary from 0; `python -m experiments.datasets.wordpiece vocab.txt` writes it.
--saved_model asks for it: --vocab=vocab.txt. Another vocabulary of the same size is not
noticed, neither there nor by --init_from: give that of the pre-training.

BERT-base, of train*.tfrecord*, validation*.tfrecord* and vocab.txt in a folder; or of
text, train*.txt and validation*.txt, whose masks are drawn anew in each epoch. Not run:

    python -m experiments.bert --data_dir=<folder> --workdir=<run> \
        --layers=12 --hidden=768 --heads=12 --length=128 --positions=512 --masked=20 \
        --dropout=0.1 --global_batch_size=256 --train_steps=1000000 \
        --learning_rate=1e-4 --warmup_steps=10000
    python -m experiments.bert --task=glue --glue_task=sst2 --data_dir=<GLUE> \
        --layers=12 --hidden=768 --heads=12 --length=128 --positions=512 --dropout=0.1 \
        --vocab=<vocab.txt> --init_from=<run> --train_epochs=3 --learning_rate=2e-5

Sources: Devlin et al. 2018, https://arxiv.org/abs/1810.04805. --optimizer=lamb is made
for large batches, You et al. 2019, https://arxiv.org/abs/1904.00962; weights decay
outside of the trust ratio in Keras's.
"""

import dataclasses
import functools
import os

import keras
import tensorflow as tf

import mpl
from experiments.datasets import bert_records, documentation, glue, masked_text
from experiments.datasets import text, wordpiece
from experiments.models import bert as bert_model


@dataclasses.dataclass(frozen=True)
class Config(mpl.RunConfig):
    """Flags of this experiment, and its own defaults."""

    global_batch_size = 32
    train_epochs = 12
    optimizer = "adamw"
    learning_rate = 2e-3
    lr_schedule = "linear"
    warmup_steps = 100
    weight_decay = 0.01
    clip_norm = 1.0
    task: str = mpl.option(
        "mlm", "mlm: pre-training on masked words, and on next sentences where records "
        "have them; glue: a task of GLUE.", choices=("mlm", "glue"))
    glue_task: str = mpl.option(
        "python", "For --task=glue; python: is a line of Python's documentation "
        "Python? The others read --data_dir.", choices=tuple(glue.TASKS))
    vocab: str | None = mpl.option(
        None, "File of word pieces, one a line. none: vocab.txt in --data_dir; without "
        "that, one made of Python's documentation.")
    lower_case: bool = mpl.option(
        True, "Read text without capitals and accents, as uncased vocabularies do.")
    length: int = mpl.option(64, "Word pieces in a sequence.", minimum=4)
    positions: int | None = mpl.option(
        None, "Longest sequence that the weights are for. none: --length.", minimum=4)
    masked: int = mpl.option(
        10, "Masked words in a sequence, at most; in records, exactly.", minimum=1)
    layers: int = mpl.option(2, "Blocks of the encoder.", minimum=1)
    hidden: int = mpl.option(128, "Width of the encoder.", minimum=1)
    heads: int = mpl.option(2, "Heads of the attention.", minimum=1)
    dropout: float = mpl.option(
        0.0, "Share of activations left out in training; 0.1 in BERT's own.", minimum=0,
        below=1)

    def validate(self):
        super().validate()
        longest, other = self.positions or self.length, type(self)
        named = self.vocab or self.data_dir or str(self.input).endswith(".npz")
        for broken, cause, remedy in (
            (self.hidden % self.heads, f"`hidden` ({self.hidden}) must be divisible by "
             f"`heads` ({self.heads}).", "Give each head 64, as BERT does."),
            (self.length > longest, f"`positions` ({longest}) must be at least "
             f"`length` ({self.length}).", "Use --positions=512, as BERT does."),
            (self.task == "mlm" and self.masked > self.length,
             f"`masked` ({self.masked}) must be at most `length` ({self.length}).",
             "Use 15 % of --length, or a little more."),
            (self.task == "mlm" and self.glue_task != other.glue_task,
             f"`glue_task` ({self.glue_task}) has no effect on `task` (mlm).",
             "Use --task=glue, or leave --glue_task out."),
            (self.task == "glue" and self.masked != other.masked,
             f"`masked` ({self.masked}) has no effect on `task` (glue).",
             "Leave --masked out."),
            (self.saved_model and not named,
             f"`saved_model` ({self.saved_model}) needs the vocabulary that it was "
             f"trained with, to read `input` ({self.input}).",
             "Give it, --vocab=<vocab.txt>, and --lower_case as in training; that of "
             "runs without files python -m experiments.datasets.wordpiece writes."),
        ):
            if broken:
                raise mpl.ConfigError(cause, remedy)


class Bert(mpl.Experiment):
    """An encoder of text that looks in both directions."""

    Config = Config
    has_pairs: bool | None = None  # whether training asks which sentence is the next
    words = 0.0  # masked words in a sequence of records, on average

    # Data

    @functools.cached_property
    def vocabulary(self):
        path, lower_case = self.config.vocab, self.config.lower_case
        if path is None and self.config.data_dir is not None:
            path = os.path.join(self.config.data_dir, "vocab.txt")
        if path is not None:
            return wordpiece.read(path, lower_case)
        pieces = wordpiece.make(documentation.load("train"), lower_case=lower_case)
        return wordpiece.WordPieces(pieces, lower_case)

    def build_data(self, split, context):
        folder, config = context.data_dir, self.config
        if split == "train":
            print(f"Data: {folder or documentation.describe()}; "
                  f"{len(self.vocabulary)} word pieces")
        if config.task == "glue":
            if (examples := glue.load(folder, config.glue_task, split)) is None:
                return None
            texts, labels = examples
            return {**self.vocabulary.encoded(texts, config.length), "label": labels}
        sizes = {"length": config.length, "masked": config.masked}
        if folder is None:
            return masked_text.load(documentation.load(split), self.vocabulary, **sizes)
        if files := _files(folder, split, "tfrecord"):
            source, self.has_pairs, words = bert_records.load(
                files, has_pairs=self.has_pairs, **sizes,
                max_bad_records=context.max_bad_records)
            self.words = self.words or words  # that of training
            self.ranges = bert_records.ranges(
                len(self.vocabulary), config.length, self.has_pairs)
            return source
        if files := _files(folder, split, "txt"):
            documents = map(text.read, files)
            return masked_text.load(documents, self.vocabulary, **sizes)
        if split == "train":
            raise mpl.ConfigError(
                f"`data_dir` ({folder}) has neither train*.tfrecord* nor train*.txt.",
                "Name the files so; validation and test files likewise.")
        return None

    # Model, loss, metrics

    def build_model(self):
        config = self.config
        judges = {"next_sentence": 2} if self.has_pairs else {}
        model = bert_model.Bert(
            masked_words=config.task == "mlm",
            classes={"label": 2} if config.task == "glue" else judges,
            vocabulary=len(self.vocabulary), depth=config.layers,
            positions=config.positions or config.length, hidden=config.hidden,
            heads=config.heads, dropout=config.dropout)
        model.build()
        return model

    def build_weights(self, model):
        # The table of words is read as a whole by the head of masked words.
        return mpl.MasterWeights(
            model, self.policy, sparse=None, no_decay=["(bias|gamma|beta)$"],
            bucket_mb=self.config.bucket_mb)

    def logits(self, batch, training):
        places = {} if self.config.task == "glue" else {
            "positions": batch["masked_lm_positions"]}
        return self.model(batch["input_ids"], batch["input_mask"], batch["segment_ids"],
                          training=training, **places)

    def loss(self, batch, training):
        logits = self.logits(batch, training)
        if self.config.task == "glue":
            pair = batch["label"], logits["label"]
            return mpl.LossOutput(_crossentropy(*pair), batch["weight"], pair)
        words, counts = batch["masked_lm_ids"], batch["masked_lm_weights"]
        losses = _mean(_crossentropy(words, logits["words"]), counts)
        outputs = {"accuracy": [_mean(_is_right(words, logits["words"]), counts)]}
        if self.has_pairs:
            pair = batch["next_sentence_labels"], logits["next_sentence"]
            # So that each pair counts alike, and all as much as all words.
            losses += _crossentropy(*pair) * tf.math.divide_no_nan(
                self.words, tf.reduce_sum(counts, 1))
            outputs["next_sentence"] = [_is_right(*pair), batch["weight"]]
        # So that each masked word of a batch counts alike, not each sequence.
        weights = batch["weight"] * tf.reduce_mean(counts, 1)
        return mpl.LossOutput(losses, weights, outputs)

    def metrics(self):
        if self.config.task == "glue":
            return glue.metrics(self.config.glue_task)
        pairs = {"next_sentence": OwnMean()} if self.has_pairs else {}
        return {"accuracy": keras.metrics.Mean(), **pairs}

    # Predictions

    def predict(self, batch):
        logits = self.logits(batch, training=False)
        if self.config.task == "glue":
            return tf.nn.softmax(logits["label"])
        places = batch["masked_lm_positions"]
        is_masked = tf.gather(
            batch["input_ids"], places, batch_dims=1) == self.vocabulary.mask
        words = tf.nn.softmax(logits["words"])
        return {"token": tf.where(is_masked, tf.argmax(words, -1, tf.int32), -1),
                "probability": tf.where(is_masked, tf.reduce_max(words, -1), 0.0)}

    def read_input(self, path):
        if path.endswith(".npz"):
            return None
        config = self.config
        if config.task == "glue":
            texts = glue.read_texts(path, config.glue_task)
            return [self.vocabulary.encoded(texts, config.length)]
        return [masked_text.questions(
            path, self.vocabulary, length=config.length, masked=config.masked)]


class OwnMean(keras.metrics.Mean):
    """The mean by weights of its own, and not by those of the loss."""

    def update_state(self, values, weights, sample_weight=None):
        super().update_state(values, weights)


def _files(folder, split, ending):
    return sorted(tf.io.gfile.glob(os.path.join(folder, f"{split}*.{ending}*")))


def _crossentropy(labels, logits):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def _is_right(labels, logits):
    return tf.cast(tf.argmax(logits, -1, tf.int32) == labels, tf.float32)


def _mean(values, weights):
    """The weighted mean of each row."""
    total = tf.reduce_sum(values * weights, 1)
    return tf.math.divide_no_nan(total, tf.reduce_sum(weights, 1))


if __name__ == "__main__":
    mpl.run(Bert)
