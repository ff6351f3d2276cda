"""The tests marked `on_device`, run by pytest on the device in a process of its own."""

import os
import re
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path
from threading import Timer

from benchmarks.cuda.session import Session

ROOT = Path(__file__).parents[2]
# The files that hold them: collecting others would import packages that a machine with a GPU may lack.
FILES = (
    "tests/kernels/test_attention.py",
    "tests/kernels/test_rotary_attention.py",
    "tests/kernels/test_gated_mlp.py",
    "tests/kernels/test_norm.py",
    "tests/kernels/test_decoder_block.py",
    "tests/model/test_head.py",
    "tests/model/test_precision.py",
    "tests/linearize/test_output.py",
    "tests/linearize/test_linear_map.py",
    "tests/test_decomposition.py",
    "tests/test_fisher_scores.py",
    "tests/test_fisher_full.py",
)
SMALL_FILES = FILES[2:4]
PROCESSES = 4
_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_FILE = re.compile(r"\btests/[\w/]+\.py")


def device_tests(session: Session) -> None:
    """All of them, for as long as there is time."""
    files = SMALL_FILES if session.small else FILES
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-m", "on_device", "-p", "no:cacheprovider"]
    command += ["--device", session.device.type, *files]
    if find_spec("xdist") and not session.small:
        command += ["--numprocesses", str(PROCESSES), "--dist", "loadfile"]
    found: dict[str, Counter[str]] = defaultdict(Counter)
    failures: list[str] = []
    last: list[str] = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    ) as process:
        assert process.stdout is not None
        stopped = Timer(max(1.0, session.left()), os.killpg, (process.pid, signal.SIGKILL))
        stopped.start()
        for line in process.stdout:
            last = [*last[-29:], line.rstrip()]
            outcome, file = _OUTCOME.search(line), _FILE.search(line)
            if line.startswith(("FAILED", "ERROR")):  # pytest's summary
                failures.append(line.strip()[:400])
                session.say(line.strip()[:200])
            elif outcome and file:
                found[file.group()][outcome.group().lower()] += 1
        code = process.wait()
        in_time = stopped.is_alive()
        stopped.cancel()
    for file, outcomes in found.items():
        session.say(f"{file}: {', '.join(f'{n} {what}' for what, n in outcomes.items())}")
    session.record["tests"] = {
        "files": {file: dict(outcomes) for file, outcomes in found.items()},
        "failures": failures,
        "exit_code": code,
        "finished": in_time,
        "last_lines": last if code else last[-1:],
    }
    if not in_time:
        session.leave_out("the tests that were not reached")
    elif code:
        raise RuntimeError(f"pytest ended with code {code}: {last[-1] if last else 'no output'}")
