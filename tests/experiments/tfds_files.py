"""Small sets in the layout of TensorFlow Datasets."""

import json

import tensorflow as tf

KINDS = "tensorflow_datasets.core.features"


def write(folder, name, version, splits, num_classes=10):
    """Writes a set of images; returns its folder.

    Args:
        folder: of all sets.
        name, version: of the set.
        splits: images `[n, height, width, channels]` and labels `[n]` of each.
        num_classes: of the labels.
    """
    path = folder / name / version
    path.mkdir(parents=True)
    infos = []
    for split, (images, labels) in splits.items():
        file = path / f"{name}-{split}.tfrecord-00000-of-00001"
        with tf.io.TFRecordWriter(str(file)) as writer:
            for image, label in zip(images, labels, strict=True):
                writer.write(_record(image, label))
        infos.append({
            "name": split, "shardLengths": [str(len(labels))],
            "numBytes": str(file.stat().st_size),
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"})
    _, *shape = next(iter(splits.values()))[0].shape
    sizes = [str(size) for size in shape]
    image = {"dtype": "uint8", "shape": {"dimensions": sizes}, "encodingFormat": "png"}
    features = {
        "image": {"pythonClassName": f"{KINDS}.image_feature.Image", "image": image},
        "label": {"pythonClassName": f"{KINDS}.class_label_feature.ClassLabel",
                  "classLabel": {"numClasses": str(num_classes)}}}
    (path / "features.json").write_text(json.dumps({
        "pythonClassName": f"{KINDS}.features_dict.FeaturesDict",
        "featuresDict": {"features": features}}))
    (path / "dataset_info.json").write_text(json.dumps({
        "name": name, "version": version, "fileFormat": "tfrecord", "splits": infos}))
    return path


def _record(image, label):
    encoded = tf.io.encode_png(image).numpy()
    return tf.train.Example(features=tf.train.Features(feature={
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded])),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[int(label)])),
    })).SerializeToString()
