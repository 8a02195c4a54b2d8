"""The two versions on a page of porting train to the same weights."""

import contextlib
import glob

import doc_pages
import numpy as np
import pytest
import tensorflow as tf


@pytest.mark.slow
def test_fit_and_an_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The page compares the weights of `fit` in mpl's order itself.
    names, count = doc_pages.executed("port_from_keras_fit.md", {"__name__": "page"})
    assert count == 4
    assert names["results"]["validation"]["accuracy"] > 0.6
    assert max(np.abs(weight).max() for weight in names["twin"].get_weights()) > 0.3
    start = names["build_model"]()  # other weights: training did move them
    assert any(np.abs(a - b).max() > 0.01 for a, b in zip(
        start.get_weights(), names["twin"].get_weights()))
    # What `run` trained is what the experiment trained by hand: same seed, same order.
    (path,) = glob.glob("runs/model/latest/checkpoints/ckpt-24.index")
    trained = names["build_model"]()
    tf.train.Checkpoint(model=trained).restore(
        path.removesuffix(".index")).expect_partial()
    for ours, theirs in zip(trained.get_weights(), names["twin"].get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def orbit_page(change=lambda code: code):
    names = {"__name__": "page"}
    for code in doc_pages.blocks(doc_pages.page("port_from_orbit.md"), "python"):
        exec(compile(change(code), "port_from_orbit.md, a block", "exec"), names)
    return names


@pytest.mark.slow
def test_orbit_and_a_trainer(tmp_path, monkeypatch):
    pytest.importorskip("orbit", reason="tf-models-official is not installed")
    monkeypatch.chdir(tmp_path)
    names = orbit_page(lambda code: code.replace('"mixed_bfloat16"', '"float32"'))
    theirs = names["trainer"].model.get_weights()
    ours = names["mixed"].model.get_weights()
    for a, b in zip(theirs, ours):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert int(names["mixed"].global_step) == int(names["trainer"].global_step) == 30
    assert names["mixed"].weights.buckets[0].kind.compute == tf.float32


@pytest.mark.slow
def test_the_imports_alone_and_mixed_precision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = doc_pages.page("port_from_orbit.md")
    table = text.split("| instead of | write |")[1].split("\n\n")[0]
    rows = [row.split("`")[1::2] for row in table.splitlines()[2:]]
    assert len(rows) == 3

    def ported(code):
        for theirs, ours in rows:
            code = code.replace(theirs, ours)
        return code.replace("import orbit\n", "import mpl\n")

    names = orbit_page(ported)
    assert names["trainer"].__class__.__mro__[1].__module__ == "mpl.loop.trainer"
    kinds = [bucket.kind.compute for bucket in names["mixed"].weights.buckets]
    assert set(kinds) == {tf.bfloat16, tf.float32}  # the last layer is float32
    losses = [float(names[name].loss.result()) for name in ("trainer", "mixed")]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] < 0.5
    full, mixed = (names[name].model.get_weights() for name in ("trainer", "mixed"))
    distance = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(full, mixed)))
    assert 0 < distance < 0.1 * np.sqrt(sum(np.sum(a**2) for a in full))
    with contextlib.suppress(ImportError):  # and these are the weights of Orbit's
        theirs = orbit_page()["trainer"].model.get_weights()
        for a, b in zip(full, theirs):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
