"""What docs/export.md says: modes, snippets, the server's JSON."""

import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf

import mpl
from experiments.datasets import digits
from experiments.digits import Digits

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
IMAGES = digits.load("test")["image"]


def python(holds, page=PAGE):
    found = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (block,) = [block for block in found if holds in block]
    return block


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    mpl.run(Digits, workdir=str(folder), train_steps=60, ema_decay=0.9, mode="all",
            policy="mixed_bfloat16", train_epochs=None, summary_every_steps=0)
    return str(folder)


def test_images_files_and_saved_models(run, tmp_path, capsys):
    for number in range(3):
        pixels = np.round(IMAGES[number] * (255 / 16)).astype(np.uint8)
        path = tmp_path / f"{number}.png"
        path.write_bytes(tf.io.encode_png(pixels).numpy())
    np.savez(tmp_path / "x.npz", image=IMAGES[:3])
    outputs = []
    for number, settings in enumerate([
        {"workdir": run, "input": str(tmp_path)},
        {"workdir": run, "input": str(tmp_path / "x.npz")},
        {"saved_model": f"{run}/export", "input": str(tmp_path)},
        {"saved_model": f"{run}/export", "input": str(tmp_path / "x.npz")},
    ]):
        out = str(tmp_path / f"out{number}.npz")
        mpl.run(Digits, mode="predict", output=out, **settings)
        assert capsys.readouterr().out.endswith(
            f"Predictions for 3 examples are in {out}\ndigits: predictions 3\n")
        with np.load(out) as arrays:
            outputs.append(arrays["predictions"])
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[2], outputs[3])
    np.testing.assert_allclose(outputs[0], outputs[2], atol=0.02)  # bfloat16, float32


def test_predictors_of_runs_checkpoints_and_exports(run):
    with np.load(f"{run}/predictions.npz") as arrays:
        expected = arrays["predictions"]
    names = {"mpl": mpl, "Digits": Digits, "export": f"{run}/export", "run": run,
             "images": IMAGES}  # fmt: skip
    exec(python("load_predictor"), names)
    np.testing.assert_array_equal(names["predict"]({"image": IMAGES}), expected)
    np.testing.assert_allclose(names["probabilities"], expected, atol=0.02)
    last = mpl.load_predictor(f"{run}/checkpoints/ckpt-60", Digits)
    np.testing.assert_array_equal(last({"image": IMAGES}), expected)
    accuracy = np.mean(expected.argmax(-1) == digits.load("test")["label"])
    assert accuracy > 0.7


def test_predictors_of_nothing(tmp_path):
    with pytest.raises(mpl.ConfigError, match="is no SavedModel.*\n.*for a run, its"):
        mpl.load_predictor(tmp_path)
    with pytest.raises(mpl.ConfigError, match="needs a run of digits"):
        mpl.load_predictor(tmp_path, Digits)


@pytest.mark.slow
def test_an_export_in_the_compute_dtype_is_half_as_large(run, tmp_path, capsys):
    mpl.run(Digits, workdir=run, mode="export", output=str(tmp_path / "small"),
            export_weights="compute")
    assert "compute export against mixed_bfloat16 tr" in capsys.readouterr().out
    sizes = [os.path.getsize(f"{path}/variables/variables.data-00000-of-00001")
             for path in (f"{run}/export", tmp_path / "small")]
    assert sizes[1] < 0.6 * sizes[0]
    small = mpl.load_predictor(tmp_path / "small")({"image": IMAGES})
    assert small.dtype == np.float32
    large = mpl.load_predictor(f"{run}/export")({"image": IMAGES})
    assert 0 < np.abs(small - large).max() < 0.05


def served(signature, body):
    """Answers as TensorFlow Serving's REST API does, in its row format."""
    specs = signature.structured_input_signature[1]
    rows = body["instances"]
    assert all(row.keys() == specs.keys() for row in rows)
    columns = {name: tf.constant([row[name] for row in rows], spec.dtype)
               for name, spec in specs.items()}  # fmt: skip
    for name, spec in specs.items():
        assert spec.shape.is_compatible_with(columns[name].shape)
    outputs = {n: tensor.numpy().tolist() for n, tensor in signature(**columns).items()}
    if len(outputs) == 1:
        return {"predictions": next(iter(outputs.values()))}
    return {"predictions": [dict(zip(outputs, row)) for row in zip(*outputs.values())]}


def test_the_servers_request(run, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    loaded = tf.saved_model.load(f"{run}/export")
    requests = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            size = int(self.headers["Content-Length"])
            requests.append((self.path, json.loads(self.rfile.read(size))))
            answer = served(loaded.signatures["serving_default"], requests[-1][1])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        names = {"images": IMAGES[:4]}
        port = str(server.server_address[1])
        exec(python("urllib").replace("8501", port), names)
    assert requests[0][0] == "/v1/models/digits:predict"
    predict = mpl.load_predictor(f"{run}/export")
    np.testing.assert_allclose(
        names["predictions"], predict({"image": IMAGES[:4]}), atol=1e-6)
    (script,) = re.findall(r"^(docker run.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert "/models/digits/1:ro" in script and "MODEL_NAME=digits" in script


def test_the_hooks_of_the_pages(tmp_path):
    names = {"Digits": Digits, "np": np, "tf": tf}
    exec(python("read_input"), names)
    scans = names["Scans"]()
    assert scans.read_input("x.npz") is None
    np.savetxt(tmp_path / "x.txt", IMAGES[:2].reshape([2, -1]))
    (batch,) = scans.read_input(str(tmp_path / "x.txt"))
    np.testing.assert_array_equal(batch["image"], IMAGES[:2])
    page = (ROOT / "docs" / "tensorboard.md").read_text(encoding="utf-8")
    exec(python("def images", page), names)
    shown = names["Shown"]()
    shown.predict = lambda batch: tf.one_hot([3, 5], 10)
    batch = {"image": tf.fill([2, 8, 8, 1], np.uint8(8)), "label": tf.constant([3, 4])}
    wrong = shown.images(batch)["wrong"].numpy()
    assert wrong[0].max() == 0 and wrong[1].min() == 0.5


@pytest.mark.slow
def test_the_command_line_needs_no_run_for_a_saved_model(run, tmp_path):
    np.savez(tmp_path / "x.npz", image=IMAGES[:2])
    command = [sys.executable, "-m", "experiments.digits", "--mode=predict",
               f"--input={tmp_path / 'x.npz'}", f"--saved_model={run}/export"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.splitlines()[-1] == "digits: predictions 2", done.stderr
    with np.load(tmp_path / "predictions.npz") as arrays:
        assert arrays["predictions"].shape == (2, 10)
