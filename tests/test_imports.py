"""What imports what: a light package, and maths that knows nothing but torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fisher_vmap

PACKAGE = Path(fisher_vmap.__file__).parent
CORE = ("fisher", "decomposition", "estimators", "linearize.network")  # these and all that they import are the maths
BRIDGE = "kernels.hf_attention"  # the only one of them that may know transformers, and only when it is used


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def path_of(module: str) -> Path:
    """The file of a module of the package, by its dotted name, with or without the package's."""
    return PACKAGE.joinpath(*module.removeprefix("fisher_vmap.").split(".")).with_suffix(".py")


def imported(path: Path, *, at_top_only: bool = False) -> set[str]:
    """Dotted names of what a file imports, anywhere in it or outside functions and type checks only."""
    found: set[str] = set()
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            base = node.module or ""
            submodules = {f"{base}.{a.name}" for a in node.names if path_of(f"{base}.{a.name}").exists()}
            found |= submodules or {base}
        if at_top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if at_top_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        stack += ast.iter_child_nodes(node)
    return found


def test_importing_the_package_loads_nothing_heavy():
    run(
        "import sys, fisher_vmap\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pandas', 'pydantic', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert {'fisher_scores', 'compress', 'FisherModel', 'open_results', '__version__'} <= set(dir(fisher_vmap))\n"
        "assert not heavy & set(sys.modules)\n"
    )


def test_every_public_name_is_there_and_no_other_is():
    for name in fisher_vmap.__all__:
        assert getattr(fisher_vmap, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fisher_score'"):
        _ = fisher_vmap.fisher_score


def test_the_kernel_needs_neither_datasets_nor_transformers():
    run(
        "import sys\n"
        "for name in ('datasets', 'transformers', 'pydantic', 'pandas', 'pyarrow'):\n"
        "    sys.modules[name] = None\n"
        "from fisher_vmap import compress, fisher_scores\n"
        "import torch\n"
        "assert compress(torch.ones(1, 2, 3), 2).rank.tolist() == [1]\n"
    )


def test_a_model_of_ones_own_needs_neither_datasets_nor_transformers():
    here = str(Path(__file__).parent)
    run(
        "import sys\n"
        f"sys.path.insert(0, {here!r})\n"
        "import torch\n"
        "from toys import ToyLM\n"
        "for name in [n for n in sys.modules if n.split('.')[0] in ('datasets', 'transformers')]:\n"
        "    del sys.modules[name]\n"
        "sys.modules['datasets'] = sys.modules['transformers'] = None\n"
        "from fisher_vmap import fisher_scores\n"
        "fisher_scores(ToyLM(), torch.arange(6)[None], layers=1, top_k=2)\n"
    )


def maths() -> set[str]:
    """The modules that the core is made of."""
    reached, stack = set(), list(CORE)
    while stack:
        name = stack.pop()
        if name not in reached:
            reached.add(name)
            lower = (module.partition(".") for module in imported(path_of(name)))
            stack += [rest for root, _, rest in lower if root == "fisher_vmap" and rest]
    return reached


@pytest.mark.parametrize("name", sorted(maths()))
def test_maths_imports_only_torch_and_maths(name):
    allowed = {"fisher_vmap", "torch"} | ({"transformers"} if name == BRIDGE else set())
    roots = {module.partition(".")[0] for module in imported(path_of(name))}
    assert roots - sys.stdlib_module_names <= allowed


def test_the_maths_is_what_the_design_says():
    assert {"kernels.attention", "model.head", "linearize.block", "linearize.probe", BRIDGE} <= maths()
    folders = {name.partition(".")[0] for name in maths() if "." in name}
    assert folders == {"model", "kernels", "linearize"}
    assert not {"run", "results", "data", "load", "fisher_model"} & {name.partition(".")[0] for name in maths()}


def test_the_bridge_imports_transformers_only_when_it_is_used():
    assert not any(m.startswith("transformers") for m in imported(path_of(BRIDGE), at_top_only=True))


def modules() -> dict[str, Path]:
    """The modules of the package by their dotted names, without the packages' own `__init__`."""
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name: path for name, path in found.items() if not name.endswith("__init__")}


def visit_all(edges: dict[str, set[str]]) -> None:
    """Fail at the first circle of a graph."""
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for lower in sorted(edges.get(name, ())):
                visit(lower, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def edges(**options) -> dict[str, set[str]]:
    return {
        name: {m.removeprefix("fisher_vmap.") for m in imported(path, **options) if m.startswith("fisher_vmap.")}
        for name, path in modules().items()
    }


def test_imports_point_downward():
    """No circle among the modules of the package, imports inside functions and for types included."""
    visit_all(edges())


def test_folders_point_downward():
    """No circle among the folders either."""
    folders: dict[str, set[str]] = {}
    for name, lower in edges().items():
        here = name.rpartition(".")[0]
        folders.setdefault(here, set()).update(m.rpartition(".")[0] for m in lower)
    visit_all({here: below - {here, ""} for here, below in folders.items() if here})


def test_the_house_stays_small_enough_to_hold_in_the_head():
    lines = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    # 90, and the six that rules by composition and live rows are made of: parts, mlp, experts, attention_rule and
    # compose of kernels/, and last_block of linearize/. Joined to what it belongs to, each would pass 400 lines.
    # And those of other people's files and habits: local_files, files, conversations, formats, chat_template, render,
    # pieces of data/ (two before), options, overrides and folders of load/, kept, means, local_paths and card of
    # results/, setting_types, fingerprint and plan_folder of run/, escape, direction_files and __main__.
    # And those of targets: targets and rope_scaling of model/, sequences, answers and literal_text of data/, targets of
    # results/ and of report/, completions, full_matrix, fisher_record and kl_report.
    # And those of natural steps: natural, objective, points, and steps of model/, the hook that knows positions; of
    # their command steer_to, its flags, and what it prints, before_after.
    # And those of the Jacobian lens, a folder of 13, with reports' lens; and residual_norms of linearize/.
    # And those of comparing two folders: same_prompts, comparison and traded of results/, and the 4 of compare/.
    assert len(list(PACKAGE.rglob("*.py"))) <= 158
    assert {name: n for name, n in lines.items() if n > 400} == {}
    assert {name for name, n in lines.items() if n < 30} <= {"errors", "report.__main__"}
