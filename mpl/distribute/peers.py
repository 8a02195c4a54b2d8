"""The processes of a run in touch: they agree at the start, and notice who is gone.

TensorFlow's collectives wait for ever for a process that died, and compare nothing. So
each process keeps one connection with the first one, over which they share small values
and hear of each other's end.
"""

import contextlib
import json
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
from absl import logging

from mpl.distribute.cluster import Cluster
from mpl.errors import ClusterError, Preempted

_BEAT_SECS = 5.0
_SILENCE_SECS = 60.0  # after so long without a beat a host counts as gone
_GRACE_SECS = 20.0  # for a save that is under way, or TensorFlow's own error
_GO_ON = "Run the same command again: it goes on from the last checkpoint."
# What TensorFlow raises when a process it talks to is gone.
_OF_LOSS = (
    tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError,
    tf.errors.InternalError, tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
)


class Peers:
    """The processes that train in step with this one; alone without a cluster.

        chief:   waits until all have come          others: connect, within the time-out
        share(value): everyone's values, by rank    (who comes first waits)
        a connection that breaks, or 60 s of silence: `lost` says whose, all end

    Args:
        cluster: the processes, or None.
        timeout_secs: how long to wait for all to start.
        end: called with an exit code when a process is lost and this one does not end
            by itself.

    Attributes:
        lost: who is gone and how; None while all are there.
    """

    def __init__(
        self, cluster: Cluster | None = None, timeout_secs: float = 300.0,
        end: Callable[[int], Any] = os._exit,
    ):
        self._cluster, self._timeout_secs, self._end = cluster, timeout_secs, end
        self.rank = cluster.rank if cluster else 0
        self.size = len(cluster.addresses) if cluster else 1
        self.lost: str | None = None
        self._connections: dict[int, _Connection] = {}
        self._closing = threading.Event()
        self._lock = threading.Lock()

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def connect(self) -> None:
        """Waits until all have started.

        Raises:
            ClusterError: some did not, or one came twice.
        """
        assert self._cluster
        host, _, port = self._cluster.addresses[0].rpartition(":")
        deadline = time.monotonic() + self._timeout_secs
        if self.is_chief:
            self._gather(host, int(port), deadline)
        else:
            self._connections[0] = self._call(host, int(port), deadline)
        for rank, connection in self._connections.items():
            for target in (self._listen, self._beat):
                threading.Thread(
                    target=target, args=(rank, connection), daemon=True).start()

    def _gather(self, host: str, port: int, deadline: float) -> None:
        assert self._cluster
        is_local = host in ("localhost", "127.0.0.1")
        try:
            listener = socket.create_server((host if is_local else "", port))
        except OSError as error:
            cause = f"The address {host}:{port} of the chief cannot be used: {error}."
            remedy = "End the process that uses it, or take another port."
            raise ClusterError(cause, remedy) from error
        with listener:
            while len(self._connections) < self.size - 1:
                missing = [rank for rank in range(1, self.size)
                           if rank not in self._connections]
                try:
                    listener.settimeout(max(0.01, deadline - time.monotonic()))
                    connection = _Connection(listener.accept()[0])
                except TimeoutError:
                    names = ", ".join(map(self._cluster.name, missing))
                    cause = f"{names} did not start within {self._timeout_secs:g} s"
                    self._tell(cause)
                    remedy = "Look at its log, or wait longer: --cluster_timeout."
                    raise ClusterError(f"{cause}.", remedy) from None
                with contextlib.suppress(OSError, ValueError, LookupError):
                    hello = connection.receive(timeout_secs=5.0)
                    if (hello["size"], hello["rank"] in missing) == (self.size, True):
                        connection.send(kind="welcome")
                        self._connections[hello["rank"]] = connection
                    else:
                        connection.send(kind="lost", cause=(
                            f"Rank {hello['rank']} of {hello['size']} came, and the "
                            f"chief waits for {missing} of {self.size}"))

    def _call(self, host: str, port: int, deadline: float) -> "_Connection":
        assert self._cluster
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, LookupError):
                connection = _Connection(socket.create_connection((host, port), 5.0))
                connection.send(rank=self.rank, size=self.size)
                answer = connection.receive(max(1.0, deadline - time.monotonic()))
                if answer["kind"] == "welcome":
                    return connection
                self.lost = answer["cause"]
                raise self.error()
            time.sleep(0.2)
        name = self._cluster.name(0)
        cause = f"{name} did not answer within {self._timeout_secs:g} s."
        remedy = "Look at its log, or wait longer: --cluster_timeout."
        raise ClusterError(cause, remedy)

    def share(self, value: Any) -> list:
        """Returns the values that all processes gave, by rank; waits for them.

        Args:
            value: what JSON can hold.

        Raises:
            ClusterError: a process is gone.
        """
        if self.size == 1:
            return [value]
        if not self.is_chief:
            with contextlib.suppress(OSError):  # `_take` says who is lost
                self._connections[0].send(kind="value", value=value)
            return self._take(0)
        values = [value, *(self._take(rank) for rank in range(1, self.size))]
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # its reader says who is lost
                connection.send(kind="value", value=values)
        return values

    def of_chief(self, value: Any) -> Any:
        """Returns the chief's value; waits for all."""
        return self.share(value)[0]

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Returns for each flag whether it is true for one of the processes."""
        return [any(each) for each in zip(*self.share(list(flags)))]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Checks that all processes have the same facts.

        Raises:
            ClusterError: with the first that differs; the same on all.
        """
        chief, *others = self.share(dict(facts))
        for rank, other in enumerate(others, start=1):
            for name in {**chief, **other}:
                if chief.get(name) != other.get(name):
                    assert self._cluster
                    raise ClusterError(
                        f"`{name}` differs: {self._cluster.name(0)} has "
                        f"{chief.get(name)}, {self._cluster.name(rank)} has "
                        f"{other.get(name)}.",
                        "Start all processes with the same flags, code and data.",
                    )

    def _take(self, rank: int) -> Any:
        inbox = self._connections[rank].inbox
        while True:
            try:
                return inbox.get(timeout=0.5)
            except queue.Empty:
                if self.lost:
                    raise self.error() from None

    def error(self) -> ClusterError:
        """Returns what to raise when a process is lost."""
        return ClusterError(f"{self.lost}.", _GO_ON)

    def _listen(self, rank: int, connection: "_Connection") -> None:
        assert self._cluster
        how = "is gone: its process has ended"
        try:
            while True:
                message = connection.receive(_SILENCE_SECS)
                if message["kind"] == "value":
                    connection.inbox.put(message["value"])
                elif message["kind"] == "lost":
                    return self._lose(message["cause"])
                elif message["kind"] == "bye":
                    return
        except TimeoutError:
            how = f"is gone: nothing was heard of it for {_SILENCE_SECS:g} s"
        except (OSError, ValueError, LookupError):
            pass
        self._lose(f"{self._cluster.name(rank)} {how}")

    def _beat(self, rank: int, connection: "_Connection") -> None:
        with contextlib.suppress(OSError):
            while not self._closing.wait(_BEAT_SECS):
                connection.send(kind="beat")

    def _lose(self, cause: str) -> None:
        """Says once who is lost, passes it on, and ends a process that hangs."""
        with self._lock:
            if self.lost or self._closing.is_set():
                return
            self.lost = cause
        self._tell(cause)
        if self._closing.wait(1.0):
            return  # all end, each by itself
        logging.error("%s.", cause)
        if not self._closing.wait(_GRACE_SECS):
            print(self.error(), flush=True)
            self._end(1)

    def _tell(self, cause: str) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.send(kind="lost", cause=cause)

    def close(self, error: BaseException | None = None) -> None:
        """Parts from the others; without an error once all are done.

        Raises:
            ClusterError: a process is gone before the end.
        """
        try:
            if error is None:
                self.share(None)
        finally:
            self._closing.set()
            if error is not None and not self.lost and self._cluster:
                line = str(error).partition("\n")[0]
                name = self._cluster.name(self.rank)
                self._tell(f"{name} failed: {type(error).__name__}: {line}".rstrip("."))
            for connection in self._connections.values():
                connection.close()


class _Connection:
    """Lines of JSON over a socket; any thread may send, one receives."""

    def __init__(self, sock: socket.socket):
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._socket, self._lock = sock, threading.Lock()
        self._lines = sock.makefile("rb")

    def send(self, **message: Any) -> None:
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_secs: float) -> dict[str, Any]:
        self._socket.settimeout(timeout_secs)
        line = self._lines.readline()
        if not line:
            raise ConnectionResetError
        message = json.loads(line)
        if not isinstance(message, dict):  # of a stranger
            raise ValueError(message)
        return message

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.send(kind="bye")
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.close()


@contextlib.contextmanager
def joined(cluster: Cluster | None, timeout_secs: float) -> Iterator[Peers]:
    """Connects with the others for the time of the `with`.

    Raises:
        ClusterError: in place of TensorFlow's errors if a process is gone.
    """
    peers = Peers(cluster, timeout_secs)
    try:
        if cluster is not None:
            peers.connect()
        yield peers
    except BaseException as error:
        if isinstance(error, _OF_LOSS) and peers.size > 1:
            # TensorFlow gives a host up that is silent before this does.
            of_a_peer = re.search("/job:|/tensorflow.CoordinationService", str(error))
            deadline = time.monotonic() + (_SILENCE_SECS + 5 if of_a_peer else 5)
            while not peers.lost and time.monotonic() < deadline:
                time.sleep(0.05)
        is_loss = isinstance(error, _OF_LOSS) and peers.lost
        # After a preemption all have agreed to end.
        peers.close(None if isinstance(error, Preempted) else error)
        if is_loss:
            raise peers.error() from error
        raise
    peers.close()
