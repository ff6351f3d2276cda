"""The wheel, installed outside the checkout, does a whole job there."""

import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from command_cases import arguments, environment, save_model, texts, write_prompts

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.needs("build")]


def run(*command, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, check=False, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """A source archive and, from it, a wheel: of a copy, since building writes beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "fisher_vmap", source / "fisher_vmap", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--outdir", out, source)
    return out


@pytest.fixture(scope="module")
def python(archives, tmp_path_factory) -> Path:
    """The interpreter of a new environment that has the wheel, and finds what it depends on in this one's.

    A line of a .pth file adds a folder but does not read the .pth files in it, so an editable install stays out.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    (wheel,) = archives.glob("*.whl")
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", wheel)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "of_the_tests.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def test_both_archives_hold_every_file_of_the_package(archives):
    ours = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fisher_vmap").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"fisher_vmap/py.typed", "fisher_vmap/demo_prompts.jsonl", "fisher_vmap/report/page.html.j2"} <= ours
    (wheel,), (archive,) = archives.glob("*.whl"), archives.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as inside:
        assert ours <= set(inside.namelist())
    with tarfile.open(archive) as inside:
        assert ours <= {name.partition("/")[2] for name in inside.getnames()}


def test_the_wheel_runs_a_job_in_an_empty_folder(python, tmp_path):
    model = save_model(tmp_path / "model")
    data = write_prompts(tmp_path / "prompts.jsonl", texts(5))
    empty = tmp_path / "empty"
    empty.mkdir()
    outside = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    command = python.with_name("fisher-vmap")
    run(command, "run", *arguments(model, data, empty / "results"), cwd=empty, env=outside)
    found = run(
        python,
        "-c",
        "import fisher_vmap, sys; results = fisher_vmap.open_results('results')\n"
        "print(fisher_vmap.__file__); print(len(results), results[4].matrix().shape, results[4].S[0] > 0)",
        cwd=empty,
        env=outside,
    )
    file, numbers = found.splitlines()
    assert Path(file).is_relative_to(python.parents[1]) and not Path(file).is_relative_to(ROOT)
    assert numbers == "5 (36, 36) True"
    run(command, "report", "results", cwd=empty, env=outside)
    assert (empty / "results" / "report.html").stat().st_size > 10_000
