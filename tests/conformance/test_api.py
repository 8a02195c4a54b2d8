"""The public names and their signatures; a change here is a change for users."""

import inspect
import subprocess
import sys

import mpl

SIGNATURES = {
    "ArraySource": "arrays, transform=",
    "CheckpointError": "class",
    "ClusterError": "class",
    "Conditional": "condition, action",
    "ConfigError": "class",
    "Controller": (
        "*global_step, *trainer=, *evaluator=, *strategy=, *train_actions=, "
        "*eval_actions=, *steps_per_loop=, *log_every_steps=, *eval_every_steps=, "
        "*checkpoint_manager=, *checkpoint_every_steps=, "
        "*checkpoint_every_secs=, *summary_interval=, *summary_dir=, "
        "*eval_summary_dir=, *reporters=, *after_restore=, *agree=, "
        "*interrupt=, *watchdog=, *evaluation_due=, *clock="
    ),
    "DataContext": "data_dir, global_batch_size, seed, compute_dtype, max_bad_records=",
    "DatasetSource": "dataset, num_examples=",
    "DynamicLossScale": (
        "initial=, period=, factor=, backoff=, minimum=, maximum=, hysteresis="
    ),
    "EarlyStopping": "metric, patience, mode=, stop=",
    "Evaluator": "eval_dataset=, options=, *name=",
    "EvaluatorOptions": (
        "use_tf_function=, use_tf_while_loop=, recreate_iterator_for_each_eval="
    ),
    "EverySecs": "action, every_secs, clock=",
    "EverySteps": "action, interval, global_step",
    "Experiment": "",
    "ExportSavedModel": "export, directory, *global_step, *max_to_keep=",
    "LossOutput": "per_example, weights, outputs=",
    "FileSource": (
        "files, read, *examples_per_file=, *shuffle_buffer=, *max_bad_records=, "
        "*transform="
    ),
    "LossScaleOptimizer": (
        "inner, loss_scale=, weights=, *clip_norm=, *ema_decay=, "
        "*nominal_weight=, *reduce_dtype="
    ),
    "MasterWeights": (
        "model, policy, *pack_below=, *sparse=, *no_decay=, *lr_multipliers=, "
        "*bucket_mb="
    ),
    "NewBestMetric": "metric, mode=",
    "NoLossScale": "",
    "NonFiniteError": "class",
    "Policy": "name, param_dtype, compute_dtype, output_dtype, overrides=",
    "Reporter": "args, kwargs",
    "RunConfig": "class",
    "StaticLossScale": "value",
    "Trainer": "train_dataset=, options=, *name=",
    "TrainerOptions": "use_tf_function=, use_tf_while_loop=",
    "accumulate": "replica_forward, batch, steps, *weights",
    "apply_together": "updates",
    "cast_floating": "tree, dtype",
    "get_policy": "name, overrides=",
    "load_predictor": "path, experiment_class=, settings",
    "option": (
        "default, help, *choices=, *minimum=, *above=, *maximum=, *below=, *math="
    ),
    "remat": "function",
    "run": "experiment_class, overrides",
}


def _signature(name):
    value = getattr(mpl, name)
    if inspect.isclass(value) and issubclass(value, (Exception, mpl.RunConfig)):
        return "class"
    parameters = inspect.signature(value).parameters.values()
    shown = [
        f"{'*' if p.kind is p.KEYWORD_ONLY else ''}{p.name}"
        f"{'' if p.default is p.empty else '='}" for p in parameters
    ]
    return ", ".join(shown)


def test_names_and_signatures_are_frozen():
    assert {name: _signature(name) for name in mpl.__all__} == SIGNATURES


def test_all_is_sorted_and_complete():
    assert mpl.__all__ == sorted(set(mpl.__all__))
    for name in mpl.__all__:
        assert inspect.getdoc(getattr(mpl, name)), name


def test_importing_touches_no_device():
    code = (
        "import mpl, tensorflow as tf\n"
        "cpu = tf.config.list_physical_devices('CPU')[0]\n"
        "two = [tf.config.LogicalDeviceConfiguration()] * 2\n"
        "tf.config.set_logical_device_configuration(cpu, two)\n"
        "print(len(tf.config.list_logical_devices('CPU')))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "2", result.stderr
