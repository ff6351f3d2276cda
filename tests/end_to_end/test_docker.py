"""The Dockerfiles, read: what they copy is there, versions are pinned, nobody runs as root.

They are built where Docker is at hand, and linted elsewhere: `nox -s images`.
"""

import fnmatch
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """Keyword and arguments of each instruction, lines that are continued joined."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


def of(path: Path, keyword: str) -> list[str]:
    return [arguments for name, arguments in instructions(path) if name == keyword]


def is_sent(name: str) -> bool:
    """Whether .dockerignore leaves a file of the root in the build's context: the last line that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        if line and not line.startswith("#") and fnmatch.fnmatch(name, line.removeprefix("!")):
            sent = line.startswith("!")
    return sent


def test_there_is_one_for_cpus_and_one_for_gpus():
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
class TestEach:
    def test_its_base_is_a_version_that_the_package_takes(self, path):
        (base,) = of(path, "FROM")
        found = re.fullmatch(r"python:(3)\.(\d+)\.\d+-slim-\w+", base)
        assert found and f"Programming Language :: Python :: 3.{found[2]}" in PROJECT["classifiers"]
        assert "://" not in path.read_text("utf-8")  # no index or registry but the default ones

    def test_what_it_copies_is_there_and_sent(self, path):
        copied = [name for arguments in of(path, "COPY") for name in arguments.split()[:-1]]
        assert {"constraints.txt", "pyproject.toml", "fisher_vmap", *PROJECT["license-files"]} <= set(copied)
        for name in copied:
            assert (ROOT / name).exists() and is_sent(name), name
        assert not is_sent(".git") and not is_sent("tests") and not is_sent("demo_results")

    def test_every_installed_version_is_pinned(self, path):
        pinned = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8")))
        installs = re.findall(r"pip install ([^&]+)", " && ".join(of(path, "RUN")))
        assert len(installs) == 2 and installs[0].split()[-1] == "torch"  # alone and first: nothing chooses another
        for arguments in installs:
            assert "--constraint constraints.txt" in arguments
            for name in re.sub(r"\$\{.*?\}|--constraint \S+|--\S+", "", arguments).split():
                if extras := re.fullmatch(r'"\.\[(.*)\]"', name):
                    assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
                else:
                    assert name in pinned, name

    def test_it_runs_the_command_as_a_plain_user(self, path):
        (entry,), (user,) = of(path, "ENTRYPOINT"), of(path, "USER")
        assert json.loads(entry)[0] in PROJECT["scripts"]
        assert int(user) > 0 and f"useradd --create-home --uid {user} " in " ".join(of(path, "RUN"))
        last = [name for name, _ in instructions(path)]
        assert last.index("USER") > max(i for i, name in enumerate(last) if name == "RUN")

    def test_the_hubs_cache_is_a_volume(self, path):
        variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(of(path, "ENV"))))
        (volume,) = json.loads(of(path, "VOLUME")[0])
        assert variables["HF_HOME"].startswith(f"{volume}/") and variables["XDG_CACHE_HOME"] == volume

    def test_a_linter_has_nothing_to_say(self, path):
        linter = shutil.which("hadolint")
        if linter is None:
            pytest.skip("hadolint is not installed: nox -s images")
        done = subprocess.run([linter, path], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (0, "")
