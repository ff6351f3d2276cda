"""Several Ray nodes on this machine: processes of ours, on loopback, which end with the context whatever happens."""

import os
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager, suppress

import psutil

STORE_BYTES = 80 * 2**20


def ray_processes(mark):
    """Processes of a Ray whose folder is `mark`, wherever in their command line or environment it stands."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE and (
                any(mark in part for part in process.cmdline()) or mark in process.environ().get("RAY_TMPDIR", "")
            ):  # fmt: skip
                found.append(process)
    return found


def wait_until_gone(mark, seconds=30):
    """What is left of a Ray after that many seconds, or as soon as nothing is."""
    until = time.monotonic() + seconds
    while (left := ray_processes(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    return left


@contextmanager
def ray_folder(monkeypatch):
    """A folder for Ray's files, short enough for the names of its sockets; what still lives in it is killed."""
    folder = tempfile.mkdtemp(prefix="fv-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    try:
        yield folder
    finally:
        for process in wait_until_gone(folder, 5):
            with suppress(psutil.Error):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


class Nodes:
    """A head without room for workers, and nodes with one CPU each."""

    def __init__(self, cluster, nodes):
        self._cluster, self.nodes = cluster, nodes
        self.address = cluster.address

    def add(self):
        """One more node."""
        self.nodes.append(self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, include_dashboard=False))

    def kill(self, place):
        """A node gone from one moment to the next: SIGKILL for its raylet and all workers on it."""
        raylet = psutil.Process(self.nodes[place].all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)


@contextmanager
def ray_nodes(monkeypatch, count):
    """A Ray of a head and so many nodes."""
    from ray.cluster_utils import Cluster

    with ray_folder(monkeypatch):
        head = {
            "num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False,
            "node_ip_address": "127.0.0.1",
        }  # fmt: skip
        cluster = Cluster(initialize_head=True, head_node_args=head)
        nodes = Nodes(cluster, [])
        try:
            for _ in range(count):
                nodes.add()
            yield nodes
        finally:
            cluster.shutdown()
