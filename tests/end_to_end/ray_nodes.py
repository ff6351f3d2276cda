"""Several Ray nodes on this machine: processes of ours, on loopback, which end with the context whatever happens."""

import os
import shutil
import signal
import subprocess
import sys
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


def wait_until_gone(mark, seconds=120):
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
    """A head without room for workers, and nodes with one CPU each, all of them children of a process of their own."""

    def __init__(self, process):
        self._process = process
        self.address = self._answer()

    def add(self):
        """One more node."""
        self._tell("add")

    def kill(self, place):
        """A node gone from one moment to the next: SIGKILL for its raylet and all workers on it."""
        self._tell(f"kill {place}")

    def _tell(self, line):
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        assert self._answer() == "done"

    def _answer(self):
        while line := self._process.stdout.readline():
            if line.startswith("> "):  # Ray may say things of its own
                return line[2:].strip()
        raise RuntimeError("the process that holds the nodes has ended")


@contextmanager
def ray_nodes(monkeypatch, count):
    """A Ray of a head and so many nodes."""
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # which is: stay on loopback, as on those
    with ray_folder(monkeypatch):
        process = subprocess.Popen(
            [sys.executable, __file__, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            yield Nodes(process)
        finally:
            process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def hold_nodes(count):
    """What the process that holds the nodes does: it obeys lines, and ends with its input."""
    from ray.cluster_utils import Cluster

    options = {"object_store_memory": STORE_BYTES, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **options})
    nodes = [cluster.add_node(num_cpus=1, **options) for _ in range(count)]
    print(f"> {cluster.address}", flush=True)
    for line in sys.stdin:
        word, *place = line.split()
        if word == "add":
            nodes.append(cluster.add_node(num_cpus=1, **options))
        elif word == "kill":
            raylet = psutil.Process(nodes[int(place[0])].all_processes["raylet"][0].process.pid)
            for process in [raylet, *raylet.children(recursive=True)]:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
        print("> done", flush=True)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()


if __name__ == "__main__":
    hold_nodes(int(sys.argv[1]))
