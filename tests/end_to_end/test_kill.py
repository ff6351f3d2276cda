"""The real process, killed at random moments and started again, ends with what an undisturbed run has, to the bit."""

import random
import signal
import subprocess
import sys
import time

import pytest
from command_cases import arguments, environment, real_command, save_model, texts, write_prompts

from fisher_vmap import open_results
from fisher_vmap.errors import UserError
from fisher_vmap.run.__main__ import main

SHARDS = 12
needs_sigkill = pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command line of the run, but for its folder."""
    folder = tmp_path_factory.mktemp("parts")
    data = write_prompts(folder / "prompts.jsonl", [*texts(3 * SHARDS - 2), ""])
    model = save_model(folder / "model")
    return lambda out: arguments(model, data, out, hook_layer_name="0,2", shard_size=3, batch_size=2)


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = real_command(command(out))
    assert done.returncode == 0, done.stderr
    return results(out)


def results(out):
    """The bytes of everything that holds numbers or text."""
    kinds = (".safetensors", ".parquet", ".npz")
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.suffix in kinds}


def stored(out):
    return len(list(out.glob("shards/shard-*.parquet")))


def killed(argv, out, shards, delay):
    """Start the command and kill it `delay` seconds after `shards` shards are there; whether it was still running."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fisher_vmap.run", *argv], env=environment(), stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not ((out / "index.json").exists() and stored(out) >= shards):
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    return process.wait() != 0


def check_readable(out):
    """Whatever is there at this moment is right, or refused in one line."""
    try:
        found = open_results(out, check="full", allow_incomplete=True)
    except UserError as error:
        assert "no index.json" in str(error)
        return
    assert all(record.status in ("ok", "skipped") for record in found)


def kill_and_resume(command, out, moments):
    """Kill the run at each moment in turn, in the same folder, then let it end."""
    hits = 0
    for shards, delay in moments:
        hits += killed(command(out), out, shards, delay)
        check_readable(out)
    done = real_command(command(out))
    assert done.returncode == 0, done.stderr
    assert not list(out.rglob("*.tmp"))
    return hits


@needs_sigkill
def test_five_kills(command, undisturbed, tmp_path):
    chance = random.Random(5)
    moments = [(shards, 0.15 * chance.random()) for shards in (0, 2, 5, 8, SHARDS)]
    assert kill_and_resume(command, tmp_path / "out", moments) >= 4  # the last may come when all is done
    assert results(tmp_path / "out") == undisturbed
    assert open_results(tmp_path / "out", check="full").index.complete


@needs_sigkill
def test_ctrl_c(command, undisturbed, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "fisher_vmap.run", *command(out)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job starts without it
    )
    while process.poll() is None and stored(out) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in told
    assert told.strip().splitlines()[-1].startswith("fisher_vmap: stopped; ")
    check_readable(out)
    assert main(command(out)) == 0  # in this process, with the number of threads of that one
    assert results(out) == undisturbed


@pytest.mark.slow
@needs_sigkill
@pytest.mark.parametrize("seed", range(6))
def test_thirty_kills(command, undisturbed, tmp_path, seed):
    chance = random.Random(100 + seed)
    waits = [*sorted(chance.choices(range(SHARDS), k=4)), SHARDS]
    hits = kill_and_resume(command, tmp_path / "out", [(shards, 0.3 * chance.random()) for shards in waits])
    assert hits >= 3
    assert results(tmp_path / "out") == undisturbed
