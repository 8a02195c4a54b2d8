"""The messages that docs/troubleshooting.md explains are those of the source."""

import ast
import pathlib
import re

import doc_pages
import keras
import pytest
import tensorflow as tf

import mpl
from experiments.digits import Digits
from mpl.launch import flags

PAGE = doc_pages.page("troubleshooting.md")
PROSE = re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE)


def templates(source):
    """All texts of a program, with … for what is put into them."""
    parts = {part for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…"
                          for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (
                node not in parts):
            yield re.sub(r"%[-\w.]*[sdfg]", "…", node.value)


MESSAGES = [text for path in sorted((doc_pages.ROOT / "mpl").rglob("*.py"))
            for text in templates(path.read_text(encoding="utf-8"))]
QUOTED = [(bool(other), head.strip(" …")) for other, head in
          re.findall(r"(TensorFlow:\s|the shell:\s)?``(.+?)``(?!`)", PROSE)]


@pytest.mark.parametrize("head", [head for other, head in QUOTED if not other])
def test_a_message_is_in_the_source(head):
    assert any(head in text for text in MESSAGES)


def test_messages_are_found():
    source = ('cause = f"`a` ({a}) " "is bad" + f"{b}."\n'
              'logging.warning("%s is %.1f s late", x)')
    assert {"`a` (…) is bad", "….", "… is … s late"} <= set(templates(source))
    assert len([head for other, head in QUOTED if not other]) > 60
    assert [head for other, head in QUOTED if other] == [
        "OOM when allocating tensor with shape", "Killed",
        "triggered tf.function retracing"]


def test_tensorflow_s_own_message_is_there():
    folder = pathlib.Path(tf.__file__).parent / "python" / "eager"
    said = [path for path in folder.rglob("*.py")
            if "triggered tf.function retracing" in " ".join(
                templates(path.read_text(encoding="utf-8")))]
    assert said


def test_every_kind_of_error_is_explained():
    for name in mpl.__all__:
        if name.endswith("Error"):
            assert f"`mpl.{name}`" in PAGE


def test_recomputed_blocks():
    names, count = doc_pages.executed("troubleshooting.md", {"__name__": "page"})
    assert count == 1
    model = names["model"]
    assert model(tf.zeros([2, 64])).shape == (2, 256)
    assert [type(layer).__name__ for layer in model.layers] == ["Remat", "Remat"]
    assert isinstance(model, keras.Model)


def test_exit_codes_are_those_of_the_other_page():
    codes = re.findall(r"^\| (\d+) \|", doc_pages.page("preemption.md"), re.MULTILINE)
    shown = PAGE.rpartition("## Exit codes")[2]
    assert [code for code in codes if not re.search(rf"\b{code}\b", shown)] == []


def test_numerics_are_checked_at_the_operation(tmp_path):
    class Bad(Digits):

        def build_model(self):
            tf.debugging.enable_check_numerics()
            return super().build_model()

        def loss(self, batch, training):
            right = super().loss(batch, training)
            return right._replace(per_example=tf.math.log(0 * right.per_example))

    words = re.search(r"^3\. `(--debug_eager --train_steps=5)`", PAGE, re.MULTILINE)
    settings = flags.parse(Digits.Config, ["digits", *words[1].split()])
    try:
        with pytest.raises(tf.errors.InvalidArgumentError, match="Inf.*Log"):
            mpl.run(Bad, workdir=str(tmp_path), policy="float32", **settings)
    finally:
        tf.debugging.disable_check_numerics()
