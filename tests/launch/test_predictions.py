"""What --mode=predict reads of a file that anybody may have written."""

import io
import types

import numpy as np
import pytest

from mpl.errors import ConfigError
from mpl.launch import predictions


def read(path):
    config = types.SimpleNamespace(input=str(path))
    (arrays,) = predictions.batches(types.SimpleNamespace(config=config))
    return arrays


def content(save, *args, **kwargs):
    buffer = io.BytesIO()
    save(buffer, *args, **kwargs)
    return buffer.getvalue()


GOOD = content(np.savez, x=np.array([1, 201]))


def test_arrays_are_read_by_name(tmp_path):
    (tmp_path / "input.npz").write_bytes(GOOD)
    assert read(tmp_path / "input.npz")["x"].tolist() == [1, 201]


@pytest.mark.parametrize("bad", [
    b"", GOOD[:-30], GOOD.replace(b"\xc9", b"\xca"), b"x,y\n1,2\n",
    content(np.save, np.arange(6)), content(np.savez, x=np.array([None])),
], ids=["empty", "cut", "damaged", "csv", "npy", "objects"])
def test_other_files_are_refused_in_two_lines(bad, tmp_path):
    (tmp_path / "input.npz").write_bytes(bad)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "input.npz")
    assert caught.value.cause.startswith(f"`input` ({tmp_path / 'input.npz'}) must be")
    assert caught.value.remedy == "Write one with numpy.savez(path, name=array)."
    assert str(caught.value).count("\n") == 1
