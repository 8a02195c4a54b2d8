"""--profile_steps: exactly these steps, whatever the blocks are."""

import pytest
import tensorflow as tf
from absl import logging

from mpl.errors import ConfigError
from mpl.launch.config import RunConfig, parse_profile_steps
from mpl.launch.profile import Profile


class Profiler:
    """Notes at which step the profiler was started and stopped."""

    def __init__(self, monkeypatch):
        self.step, self.calls = 0, []
        experimental = tf.profiler.experimental
        monkeypatch.setattr(
            experimental, "start", lambda path: self.calls.append(("start", self.step)))
        monkeypatch.setattr(
            experimental, "stop", lambda: self.calls.append(("stop", self.step)))

    def run(self, profile, first, last, block):
        self.step = first
        while self.step < last:
            end = min(last, self.step - self.step % block + block,
                      self.step + profile.ahead(self.step))
            with profile.around(end):
                self.step = end


@pytest.mark.parametrize("block", [1, 3, 100])
@pytest.mark.parametrize("steps, begin, expected", [
    ("1,1", 0, [0, 1]), ("4,9", 0, [3, 9]), ("20,20", 0, [19, 20]),
    ("4,9", 5, [5, 9]), ("4,9", 9, []), ("18,40", 0, [17, 20]), (None, 0, []),
])
def test_exactly_these_steps(steps, begin, expected, block, monkeypatch, capsys):
    profiler, said = Profiler(monkeypatch), []
    monkeypatch.setattr(
        logging, "warning", lambda text, *args: said.append(text % args))
    profile = Profile(steps, "my profile")
    profiler.run(profile, begin, 20, block)
    profile.stop()
    assert [step for _, step in profiler.calls] == expected
    assert [name for name, _ in profiler.calls] == ["start", "stop"][:len(expected)]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(expected) // 2
    assert said == (["No profile: step 9 is over."] if begin == 9 else [])
    if lines:
        first, last = steps.split(",")
        assert lines[0].startswith(f"Profile of steps {first} to {last}: ")
        assert lines[0].endswith("tensorboard --logdir='my profile'")


def test_one_of_several_processes_writes(monkeypatch, capsys):
    profiler = Profiler(monkeypatch)
    profile = Profile("2,3", "p", writes=False)
    assert [profile.ahead(step) for step in (0, 1, 2)] == [1, 2, 1]  # as the others
    profiler.run(profile, 0, 5, 2)
    assert profiler.calls == [] and not capsys.readouterr().out


def test_it_says_what_to_install(monkeypatch, capsys):
    profiler = Profiler(monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    profiler.run(Profile("1,1", "p"), 0, 2, 1)
    assert capsys.readouterr().out == (
        "Profile of steps 1 to 1: pip install tensorboard tensorboard-plugin-profile; "
        "tensorboard --logdir=p\n")


@pytest.mark.slow
def test_a_trace_is_written(tmp_path):
    profile = Profile("1,2", str(tmp_path))
    with profile.around(2):
        tf.matmul(tf.ones([9, 9]), tf.ones([9, 9]))
    (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    assert b"MatMul" in trace.read_bytes()


@pytest.mark.parametrize("text", ["", "5", "5,4", "0,4", "a,b", "1,2,3", "-1,2", "1, "])
def test_wrong_texts(text):
    with pytest.raises(ConfigError, match="`profile_steps` "):
        RunConfig(profile_steps=text)


def test_right_text():
    assert parse_profile_steps("3,12") == (3, 12)
