"""Processes in touch: here threads with a `Peers` each, on ports of this machine."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import tensorflow as tf

from mpl.distribute import peers as peers_lib
from mpl.distribute.cluster import Cluster
from mpl.distribute.peers import Peers, joined
from mpl.errors import ClusterError
from mpl.launch import local

pytestmark = pytest.mark.slow  # real connections, processes and time-outs


def clusters_of(size):
    addresses = [f"localhost:{port}" for port in local.free_ports(size)]
    return [Cluster({"worker": addresses}, "worker", index) for index in range(size)]


@pytest.fixture
def together():
    """Runs a function of `Peers` on each of n peers at once; returns the results."""

    def run(functions, timeout_secs=10.0, **settings):
        clusters = clusters_of(len(functions))

        def one(cluster, function):
            peers = Peers(cluster, timeout_secs, **settings)
            peers.connect()
            error = None
            try:
                return function(peers)
            except BaseException as caught:
                error = caught
                raise
            finally:
                peers.close(error)

        with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
            futures = [pool.submit(one, *each) for each in zip(clusters, functions)]
            done = [future.exception(timeout=60) or future.result()
                    for future in futures]
        return done

    return run


def test_alone_nothing_is_waited_for():
    with joined(None, 1.0) as peers:
        assert peers.is_chief and (peers.rank, peers.size) == (0, 1)
        assert peers.share({"a": 1}) == [{"a": 1}]
        assert peers.any_of([True, False]) == [True, False]
        peers.agree({"a": 1})
        assert peers.of_chief("x") == "x"


def test_values_come_by_rank(together):
    def share(peers):
        first = peers.share(peers.rank * 10)
        return first, peers.any_of([peers.rank == 2, False]), peers.of_chief(
            f"of {peers.rank}")

    assert together([share] * 4) == [([0, 10, 20, 30], [True, False], "of 0")] * 4


def test_a_slow_peer_is_waited_for(together):
    def share(peers):
        time.sleep(1.5 * (peers.rank == 1))
        return peers.share(peers.rank)

    assert together([share] * 3, timeout_secs=1.0) == [[0, 1, 2]] * 3


def test_equal_facts_agree_and_different_ones_are_named_on_all(together):
    assert together([lambda peers: peers.agree({"flags": "a", "code": 1})] * 2) == [
        None, None]
    errors = together([
        lambda peers: peers.agree({"flags": "a", "code": 1}),
        lambda peers: peers.agree({"flags": "a", "code": 1}),
        lambda peers: peers.agree({"flags": "b", "code": 1}),
    ])
    for error in errors:
        assert isinstance(error, ClusterError)
        assert "`flags` differs: worker 0 (localhost:" in str(error)
        assert "has a, worker 2 (localhost:" in str(error) and "has b." in str(error)


def test_a_fact_that_one_lacks_differs(together):
    errors = together([lambda peers: peers.agree({}),
                       lambda peers: peers.agree({"test data": "x"})])
    assert all("`test data` differs" in str(error) for error in errors)


def test_who_does_not_start_is_named():
    clusters = clusters_of(3)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        chief = pool.submit(Peers(clusters[0], 3.0).connect)
        there = Peers(clusters[2], 3.0)
        there.connect()
        told = pool.submit(there.share, 1).exception(timeout=20)
        there.close(told)  # or it would end this process
        error = chief.exception(timeout=20)
    assert isinstance(error, ClusterError)
    address = clusters[0].addresses[1]
    assert str(error).startswith(f"worker 1 ({address}) did not start within 3 s.\n")
    assert "--cluster_timeout" in str(error)
    assert isinstance(told, ClusterError) and "did not start" in str(told)


def test_a_chief_that_does_not_start_is_named():
    cluster = clusters_of(2)[1]
    with pytest.raises(ClusterError, match=r"worker 0 \(.*\) did not answer"):
        Peers(cluster, 1.0).connect()


def test_a_port_in_use_is_named():
    cluster = clusters_of(2)[0]
    port = int(cluster.addresses[0].rpartition(":")[2])
    with socket.create_server(("localhost", port)):
        with pytest.raises(ClusterError, match=f"localhost:{port} of the chief"):
            Peers(cluster, 1.0).connect()


def test_strangers_do_not_disturb():
    clusters = clusters_of(2)
    host, _, port = clusters[0].addresses[0].rpartition(":")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        chief = Peers(clusters[0], 20.0)
        waiting = pool.submit(chief.connect)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 7, "size": 2}\n',
                      b'{"rank": 1, "size": 9}\n', b"[]\n"):
            for _ in range(100):  # until it listens
                try:
                    stranger = socket.create_connection((host, int(port)))
                    break
                except OSError:
                    time.sleep(0.05)
            stranger.sendall(words)
            stranger.close()
        other = Peers(clusters[1], 20.0)
        pool.submit(other.connect).result(timeout=30)
        waiting.result(timeout=30)
        results = [pool.submit(peers.share, peers.rank) for peers in (chief, other)]
        assert [result.result(timeout=30) for result in results] == [[0, 1]] * 2
        for closing in [pool.submit(peers.close) for peers in (chief, other)]:
            closing.result(timeout=30)


def test_a_failure_is_told_to_those_who_wait(together):
    def fail(peers):
        raise ValueError("no such file\nin the folder")

    share = lambda peers: peers.share(1)  # noqa: E731
    errors = together([share, fail, share])
    assert isinstance(errors[1], ValueError)
    for rank in (0, 2):
        assert isinstance(errors[rank], ClusterError)
        assert "worker 1 (localhost:" in str(errors[rank])
        assert "failed: ValueError: no such file.\n" in str(errors[rank])


def test_a_process_that_hangs_when_another_is_gone_is_ended(together, monkeypatch):
    monkeypatch.setattr(peers_lib, "_GRACE_SECS", 0.5)
    ended, codes = threading.Event(), []

    def end(code):
        codes.append(code)
        ended.set()

    def fail(peers):
        raise RuntimeError("gone")

    def hang(peers):  # as in a collective
        assert ended.wait(20)

    together([hang, fail], end=end)
    assert codes == [1]


def test_silence_counts_as_the_end(together, monkeypatch):
    monkeypatch.setattr(peers_lib, "_SILENCE_SECS", 1.0)
    monkeypatch.setattr(peers_lib, "_BEAT_SECS", 60.0)
    errors = together([lambda peers: peers.share(1), lambda peers: time.sleep(3)])
    assert "is gone: nothing was heard of it for 1 s" in str(errors[0])


def test_beats_break_the_silence(together, monkeypatch):
    monkeypatch.setattr(peers_lib, "_SILENCE_SECS", 1.0)
    monkeypatch.setattr(peers_lib, "_BEAT_SECS", 0.2)

    def share(peers):
        time.sleep(2.5 * peers.rank)
        return peers.share(peers.rank)

    assert together([share] * 2) == [[0, 1]] * 2


def test_errors_of_tensorflow_become_the_loss_that_caused_them():
    clusters = clusters_of(2)

    def chief():
        with joined(clusters[0], 10.0):
            time.sleep(0.5)
            raise tf.errors.UnavailableError(None, None, "Connection reset by peer")

    def other():
        with joined(clusters[1], 10.0):
            raise ValueError("broken")

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(chief), pool.submit(other)
        error = first.exception(timeout=30)
        assert isinstance(second.exception(timeout=30), ValueError)
    assert isinstance(error, ClusterError)
    assert "failed: ValueError: broken" in str(error)
    assert isinstance(error.__cause__, tf.errors.UnavailableError)


def test_other_errors_of_tensorflow_stay():
    with pytest.raises(tf.errors.UnavailableError):
        with joined(None, 1.0):
            raise tf.errors.UnavailableError(None, None, "alone")


@pytest.mark.slow
def test_a_killed_process_is_noticed_at_once_and_named():
    clusters = clusters_of(2)
    program = textwrap.dedent(f"""
        from mpl.distribute.cluster import Cluster
        from mpl.distribute.peers import joined
        import time
        cluster = Cluster({dict(clusters[1].jobs)!r}, "worker", 1)
        with joined(cluster, 60.0) as peers:
            peers.share("up")
            time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        with pytest.raises(ClusterError, match="worker 1 .* its process has ended"):
            with joined(clusters[0], 60.0) as peers:
                assert peers.share(None)[1] == "up"
                os.kill(process.pid, signal.SIGKILL)
                began = time.monotonic()
                peers.share(None)
        assert time.monotonic() - began < 10
    finally:
        process.kill()
        process.wait()
