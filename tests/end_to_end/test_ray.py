"""Engine ray: real nodes on this machine, killed and started again; and its driver without Ray, in this process."""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest
from command_cases import (
    SETTINGS,
    SHARDS,
    arguments,
    entries_of,
    environment,
    numbers_of,
    real_command,
    run_here,
    start_command,
    write_shards,
)

from fisher_vmap import open_results
from fisher_vmap.data.sequences import tokens_of
from fisher_vmap.errors import UserError, WorkerError
from fisher_vmap.results.writer import ResultsWriter
from fisher_vmap.run import ray
from fisher_vmap.run.__main__ import main
from fisher_vmap.run.ray import Pool, RayEngine
from fisher_vmap.run.ray_worker import ShardWorker, begin, begin_shard, times_begun

pytestmark = pytest.mark.needs("ray")
ray_nodes = importlib.import_module("ray_nodes")

TESTS = os.path.dirname(__file__)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "prompts.jsonl")


@pytest.fixture(scope="module")
def alone(model, data, tmp_path_factory):
    """What the command leaves on one machine."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = real_command(arguments(model, data, out, **SETTINGS))
    assert done.returncode == 0, done.stderr
    return numbers_of(out)


def on_ray(model, data, out, **settings):
    return arguments(model, data, out, **SETTINGS, engine="ray", **settings)


def start(worker, argv, **options):
    """The command with another worker than its own."""
    script = os.path.join(TESTS, "ray_workers.py")
    return subprocess.Popen([sys.executable, script, worker, *argv], env=environment(), text=True, **options)


def wait_for_shards(process, out, count):
    while process.poll() is None and len(list(out.glob("shards/shard-*.parquet"))) < count:
        time.sleep(0.01)


@pytest.fixture
def paths(monkeypatch):
    """What Ray's processes need to find the tests' modules."""
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"] + os.pathsep + TESTS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_two_workers_of_this_machine_leave_what_the_local_run_does(model, data, alone, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with ray_nodes.ray_folder(monkeypatch) as folder:
        process = start_command(on_ray(model, data, out, ray_workers=2), stderr=subprocess.PIPE, text=True)
        wait_for_shards(process, out, 1)
        raylets = [
            line for p in ray_nodes.ray_processes(folder) if (line := p.cmdline()) and "raylet/raylet" in line[0]
        ]
        _, told = process.communicate(timeout=250)
        assert process.returncode == 0, told
        assert not ray_nodes.wait_until_gone(folder)
    assert len(raylets) == 1 and "--node_ip_address=127.0.0.1" in raylets[0]  # not to be reached from other machines
    assert numbers_of(out) == alone
    assert "shards to compute: 13, on 2 workers with 1 CPU each" in told and "computing: 0 of 38 prompts" in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_two_nodes(model, data, alone, tmp_path, monkeypatch, paths):
    out = tmp_path / "out"
    with ray_nodes.ray_nodes(monkeypatch, 2) as nodes:
        done = real_command(on_ray(model, data, out, ray_address=nodes.address))
    assert done.returncode == 0, done.stderr
    assert "on 2 workers with 1 CPU each" in done.stderr
    assert numbers_of(out) == alone


@pytest.mark.slow
@pytest.mark.parametrize("comes_back", [False, True])
def test_a_node_killed_in_mid_run(model, data, alone, tmp_path, monkeypatch, paths, comes_back):
    out = tmp_path / "out"
    with ray_nodes.ray_nodes(monkeypatch, 2) as nodes:
        process = start_command(on_ray(model, data, out, ray_address=nodes.address), stderr=subprocess.PIPE, text=True)
        wait_for_shards(process, out, 2)
        assert process.poll() is None
        nodes.kill(0)
        if comes_back:
            nodes.add()
        _, told = process.communicate(timeout=250)
    assert process.returncode == 0, told
    assert numbers_of(out) == alone


@pytest.mark.slow
def test_the_driver_killed_and_started_again_computes_no_finished_shard_twice(
    model, data, alone, tmp_path, monkeypatch, paths
):
    out = tmp_path / "out"
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted"))
    with ray_nodes.ray_nodes(monkeypatch, 2) as nodes:
        argv = on_ray(model, data, out, ray_address=nodes.address)
        process = start("Counting", argv)
        wait_for_shards(process, out, 3)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        time.sleep(5)  # its workers end with it: what they are at they may store
        before, there = entries_of(out), {path: path.stat().st_mtime_ns for path in out.glob("shards/shard-*.*t*")}
        assert 3 <= len(before) < SHARDS
        (tmp_path / "counted").write_text("")
        process = start("Counting", argv, stderr=subprocess.PIPE)
        _, told = process.communicate(timeout=250)
        assert process.returncode == 0, told
    computed = [int(line) for line in (tmp_path / "counted").read_text().split()]
    finished = {int(name[6:11]) for name in before}
    assert sorted(computed) == sorted(set(range(SHARDS)) - finished)
    assert all(path.stat().st_mtime_ns == when for path, when in there.items() if int(path.name[6:11]) in finished)
    assert numbers_of(out) == alone


@pytest.mark.slow
def test_a_worker_that_throws_on_one_prompt(model, data, alone, tmp_path, monkeypatch, paths):
    out = tmp_path / "out"
    with ray_nodes.ray_folder(monkeypatch):
        process = start("Throwing", on_ray(model, data, out, ray_workers=2), stderr=subprocess.PIPE)
        _, told = process.communicate(timeout=250)
        assert process.returncode == 1
        line = told.strip().splitlines()[-1]
        assert line.startswith("fisher_vmap: shard 2 (from prompt 6) failed in process ")
        assert "ArithmeticError: a prompt that nobody can compute (ray_workers.py, line" in line
        assert "12 shards are stored" in line and "1 still lacking; the same command carries on" in line
        assert "Traceback" not in told
        done = real_command(on_ray(model, data, out, ray_workers=1))  # by a worker that does not
    assert done.returncode == 0, done.stderr
    assert "shards to compute: 1," in done.stderr
    assert numbers_of(out) == alone


@pytest.mark.slow
def test_a_worker_that_dies_over_one_shard_again_and_again(model, data, tmp_path, monkeypatch, paths):
    out = tmp_path / "out"
    with ray_nodes.ray_folder(monkeypatch):
        process = start("Dying", on_ray(model, data, out, ray_workers=2), stderr=subprocess.PIPE)
        _, told = process.communicate(timeout=250)
    assert process.returncode == 2, told
    line = told.strip().splitlines()[-1]
    assert line.startswith("fisher_vmap: shard 2 (from prompt 6) failed in process "), told
    assert "3 processes have died over it" in line and "12 shards are stored" in line
    assert len(open_results(out, allow_incomplete=True, check="full")) == 35


@pytest.mark.slow
def test_workers_that_cannot_be_made(model, data, tmp_path, monkeypatch, paths):
    with ray_nodes.ray_folder(monkeypatch):
        process = start("Unmakable", on_ray(model, data, tmp_path / "out", ray_workers=2), stderr=subprocess.PIPE)
        _, told = process.communicate(timeout=250)
    assert process.returncode == 1, told
    line = told.strip().splitlines()[-1]
    assert line.startswith("fisher_vmap: a worker failed: it could not be made: "), told
    assert "OSError: no model on this machine" in line and "\x1b" not in line


class HereEngine:
    """An engine whose workers are in this process, one after the other, handed three items at a time."""

    def run_items(self, worker, arguments, items):
        made = worker(*arguments)
        for start in range(0, len(items), 3):
            yield from made(list(items[start : start + 3]))


def drive_here(settings, worker=ShardWorker):
    begin(settings, 1.0)
    writer = ResultsWriter.attach(settings.output_dir)
    steps = []
    missing = writer.missing_shards(38)
    summary = ray.drive(HereEngine(), worker, (settings, 1.0), writer, missing, 38, steps.append)
    ray.finish(summary, writer, settings, 38)
    return summary, steps


@pytest.fixture
def settings(model, data, tmp_path):
    from fisher_vmap.run.cli_args import load_settings

    return load_settings(arguments(model, data, tmp_path / "out", **SETTINGS))


def test_the_driver_and_its_workers_without_ray(settings, model, data, tmp_path):
    summary, steps = drive_here(settings)
    assert run_here(model, data, tmp_path / "alone", **SETTINGS) == 0
    assert numbers_of(tmp_path / "out") == numbers_of(tmp_path / "alone")
    assert sum(step.prompts for step in steps) == summary.prompts == 38
    assert (
        summary.tokens
        == sum(step.tokens for step in steps)
        == open_results(tmp_path / "out").to_pandas()["tokens"].sum()
    )
    again, steps = drive_here(settings)
    assert (again.stored_before, again.tokens, len(steps)) == (38, 0, 1)


def test_workers_write_the_completions_of_the_local_run(settings, model, data, tmp_path):
    asked = {"targets": 3, "samples": 2, "estimator": "full"}
    drive_here(settings.model_copy(update=asked))
    assert run_here(model, data, tmp_path / "alone", **SETTINGS, **asked) == 0
    assert numbers_of(tmp_path / "out") == numbers_of(tmp_path / "alone")
    assert any(record.completion_ids for record in open_results(tmp_path / "out"))


@pytest.mark.slow
def test_two_workers_write_the_completions_of_the_local_run(model, data, tmp_path, monkeypatch, paths):
    asked = {"targets": 3, "samples": 2, "estimator": "full"}
    assert real_command(arguments(model, data, tmp_path / "alone", **SETTINGS, **asked)).returncode == 0
    with ray_nodes.ray_nodes(monkeypatch, 2) as nodes:
        done = real_command(on_ray(model, data, tmp_path / "out", ray_address=nodes.address, **asked))
    assert done.returncode == 0, done.stderr
    assert numbers_of(tmp_path / "out") == numbers_of(tmp_path / "alone")


def test_one_shard_that_fails_is_named_and_the_others_are_kept(settings):
    from ray_workers import Throwing

    with pytest.raises(WorkerError, match=r"shard 2 \(from prompt 6\) failed in process .* ArithmeticError") as caught:
        drive_here(settings, Throwing)
    assert "12 shards are stored" in str(caught.value) and "\n" not in str(caught.value)


def test_where_everything_fails_the_run_ends_soon(settings):
    class Broken(ShardWorker):
        def _compute(self, numbers):
            raise UserError("no space left")

    tried = []

    class Counted(Broken):
        def _compute(self, numbers):
            tried.extend(numbers if len(numbers) == 1 else [])
            return super()._compute(numbers)

    with pytest.raises(UserError, match=r"no space left, and 9 more shards failed; 0 shards are stored"):
        drive_here(settings, Counted)
    assert len(tried) < SHARDS


def test_batches_that_were_split_are_kept_by_the_driver(settings, monkeypatch):
    from fisher_vmap.fisher_model import FisherModel

    numbers = FisherModel.numbers

    def small(self, prompts_ids, rank):
        if len(prompts_ids) > 1 and max(map(tokens_of, prompts_ids)) > 30:
            raise MemoryError("out of memory")
        return numbers(self, prompts_ids, rank)

    monkeypatch.setattr(FisherModel, "numbers", small)
    drive_here(settings)
    splits = open_results(settings.output_dir).index.resolved["splits"]
    assert splits and all(len(batch) == 2 for batch in splits)


def test_without_ray_one_line(model, data, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    assert main(on_ray(model, data, tmp_path / "out")) == 2
    assert capsys.readouterr().err == "fisher_vmap: engine ray needs the package ray: pip install 'fisher_vmap[ray]'\n"


def test_ray_is_imported_where_it_is_asked_for_alone(model, data, tmp_path):
    argv = arguments(model, data, tmp_path / "out", **SETTINGS, num_prompts=3)
    code = f"import sys; from fisher_vmap.run.__main__ import main; assert main({argv!r}) == 0"
    code += "; assert 'ray' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_fraction_of_a_gpu_is_a_fraction_of_its_batches(settings, monkeypatch):
    from fisher_vmap.run.open import model_of, open_run, source_of

    monkeypatch.setattr("fisher_vmap.fisher_model.batch_tokens_for", lambda *args: 10_000)
    run = open_run(settings, model_of(settings), source_of(settings), device_share=0.25)
    assert run.fisher.max_batch_tokens == 2500


def test_no_ray_at_the_address(model, data, tmp_path, monkeypatch):
    with ray_nodes.ray_folder(monkeypatch):
        done = real_command(on_ray(model, data, tmp_path / "out", ray_address="auto"))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("fisher_vmap: Ray cannot be reached at ray_address auto (ConnectionError: ")
    assert "ray start --head" in last and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_driver_with_a_ray_of_its_own_is_killed_and_the_local_run_carries_on(
    model, data, alone, tmp_path, monkeypatch, paths
):
    out = tmp_path / "out"
    with ray_nodes.ray_folder(monkeypatch) as folder:
        process = start_command(on_ray(model, data, out, ray_workers=2), stderr=subprocess.DEVNULL)
        wait_for_shards(process, out, 2)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not ray_nodes.wait_until_gone(folder, 60)
    done = real_command(arguments(model, data, out, **SETTINGS))
    assert done.returncode == 0, done.stderr
    assert numbers_of(out) == alone


def test_a_shard_over_which_processes_died_is_tried_by_itself_and_then_given_up(settings):
    begin(settings, 1.0)
    folder = ResultsWriter.attach(settings.output_dir).folder
    worker = ShardWorker(settings, 1.0)
    for number, deaths in ((1, 2), (2, 3)):
        for _ in range(deaths):
            begin_shard(folder, number)
    accounts = {account["number"]: account for account in worker([0, 1, 2, 3])}
    assert [number for number, account in accounts.items() if "error" in account] == [2]
    assert "3 processes have died over it" in accounts[2]["error"]
    assert [times_begun(folder, number) for number in range(4)] == [0, 0, 0, 0]
    begin_shard(folder, 5)
    begin(settings, 1.0)
    assert times_begun(folder, 5) == 0  # a run that is started again tries everything anew


def test_an_address_of_ray_client(model, data, tmp_path, capsys):
    assert main(on_ray(model, data, tmp_path / "out", ray_address="ray://head:10001")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "ray_address ray://head:10001 is for Ray Client" in line and "with ray_address auto" in line


class FakeRay:
    def __init__(self, **resources):
        self.resources = resources

    def cluster_resources(self):
        return self.resources


@pytest.mark.parametrize(
    ("resources", "pool", "expected"),
    [
        ({"CPU": 8.0}, ("auto", "auto", 1), (0.0, 8, 8)),
        ({"CPU": 8.0}, ("auto", "auto", 3), (0.0, 2, 2)),
        ({"CPU": 1.0}, ("auto", "auto", 4), (0.0, 1, 1)),
        ({"CPU": 8.0}, (3, "auto", 1), (0.0, 3, 3)),
        ({"CPU": 8.0, "GPU": 4.0}, ("auto", "auto", 1), (1.0, 4, 4)),
        ({"CPU": 8.0, "GPU": 4.0}, ("auto", 0.5, 1), (0.5, 8, 8)),
        ({"CPU": 8.0, "GPU": 3.0}, ("auto", 0.1, 1), (0.1, 30, 30)),
        ({"CPU": 8.0, "GPU": 5.0}, ("auto", 2.0, 1), (2.0, 2, 2)),
        ({"CPU": 8.0, "GPU": 4.0}, ("auto", 0.0, 1), (0.0, 8, 8)),
        ({"CPU": 8.0, "GPU": 4.0}, ((2, 64), "auto", 1), (1.0, 2, 64)),
    ],
)
def test_how_many_workers_there_are(resources, pool, expected):
    engine = RayEngine(FakeRay(**resources), Pool(None, *pool))
    assert (engine.gpus, engine.least, engine.most) == expected


def test_more_gpus_than_there_are(caplog):
    for workers, gpus in ((5, 1.0), ("auto", 8.0), ((3, 9), 2.0)):
        with pytest.raises(UserError, match=r"were asked for, and Ray has 4 GPUs; lower ray_workers"):
            RayEngine(FakeRay(CPU=8.0, GPU=4.0), Pool(None, workers, gpus, 1))
    assert RayEngine(FakeRay(CPU=8.0, GPU=4.0), Pool("auto", 5, 1.0, 1)).most == 5
    assert "waiting for the others" in caplog.text
