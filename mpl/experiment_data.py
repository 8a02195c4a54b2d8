"""The examples of an experiment, split by split, as pipelines."""

from typing import Any

from mpl import data, errors

SPLITS = ("train", "validation", "test")


def build_pipelines(experiment: Any) -> dict[str, data.Pipeline]:
    """Returns a pipeline for each split that `build_data` has examples of.

    Args:
        experiment: with its `config` and `policy`.

    Raises:
        ConfigError: examples cannot be used, by split; there are none to train with; or
            `max_bad_records` reaches no source.
    """
    config, pipelines = experiment.config, dict[str, data.Pipeline]()
    context = data.DataContext(
        data_dir=config.data_dir, global_batch_size=config.global_batch_size,
        seed=config.seed, compute_dtype=experiment.policy.compute_dtype,
        max_bad_records=config.max_bad_records)
    for split in SPLITS:
        training = split == "train"
        try:
            examples = experiment.build_data(split, context)
            if examples is not None:
                pipelines[split] = data.Pipeline(
                    data.as_source(examples),
                    global_batch_size=config.global_batch_size, seed=config.seed,
                    shuffle=training, repeat=training, split=split,
                    ranges=experiment.ranges)
        except errors.ConfigError as error:
            start = f"Split {split}: "
            # Not an error anew: the program prints the innermost one.
            error.args = (f"{start}{str(error).removeprefix(start)}",)
            raise
    if "train" not in pipelines:
        raise errors.ConfigError(
            f"{type(experiment).__name__}.build_data returned nothing for 'train'.",
            "Return arrays, a tf.data.Dataset or mpl.FileSource for that split.")
    sources = [pipeline.source for pipeline in pipelines.values()]
    if config.max_bad_records and not any(
            getattr(source, "max_bad_records", 0) for source in sources):
        raise errors.ConfigError(
            f"`max_bad_records` ({config.max_bad_records}) has no effect: no split is "
            "a FileSource that takes it.",
            "Write mpl.FileSource(..., max_bad_records=context.max_bad_records).")
    return pipelines


def resolve_train_steps(config: Any, batches_per_epoch: int | None) -> int:
    """Returns how many steps a run trains for.

    Raises:
        ConfigError: nobody knows how long an epoch is.
    """
    if config.train_steps is not None:
        return config.train_steps
    if batches_per_epoch is None:
        raise errors.ConfigError(
            "`train_steps` is not set and the training data do not know how many "
            "examples they hold.",
            "Set --train_steps, or `num_examples` of the DatasetSource.")
    return (config.train_epochs or 1) * batches_per_epoch
