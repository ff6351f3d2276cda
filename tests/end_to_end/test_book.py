"""The book: every block of its pages runs, every link leads somewhere, and it builds without a warning."""

import re
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from book_blocks import COMMENT_ABOVE, FENCES, PAGES, ROOT, check, commands, ours, unlike
from command_cases import VOCABULARY, save_model, tiny_tokenizer
from models import tiny
from safetensors import safe_open

from fisher_vmap.run.__main__ import main as run_command

DOCS = ROOT / "docs"
ALL = [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts and ".template" not in path.name]
REAL = {"tutorial.md"}  # run on the demo's model
STAND_IN = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the pages' model, tiny and random here, of as many layers


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the hub that holds the pages' model."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / f"models--{STAND_IN.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    small = {"vocab_size": VOCABULARY, "num_hidden_layers": 30, "max_position_embeddings": 512}
    folder = save_model(repository / "snapshots" / ("0" * 40), tiny("llama", torch.float32, **small), tokenizer=False)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<|end|>"
    tokenizer.save_pretrained(folder)
    return cache


@pytest.fixture
def reader(hub, tmp_path, monkeypatch):
    """Somebody in an empty folder but for prompts.jsonl, who has the pages' model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = (DOCS / "guide" / "data.md").read_text("utf-8")
    (tmp_path / "prompts.jsonl").write_text(re.search(r"<!-- file: prompts.jsonl -->\n```\w+\n(.*?)```", text, re.S)[1])


def name_of(path):
    return str(path.relative_to(DOCS))


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.slow if p.name in REAL else (), id=name_of(p)) for p in ALL],
)
def test_blocks_run(page, reader):
    for example in PAGES.parse(page).examples():
        example.evaluate()


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_code_stands_in_fences(page):
    """An indented block is no language's, and nobody runs it."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text("utf-8"))
    assert not re.search(r"(?m)\n\n    \S.*", text)


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_notes_are_understood(page):
    document = PAGES.parse(page)
    for region in FENCES(document):
        above = COMMENT_ABOVE.search(document.text[: region.start])
        assert above is None or re.match(r"(file: |not run: |ends with \d|illustration|run: |python: )", above["note"])


@pytest.mark.parametrize("targets", ["last", "all", "3"])
def test_the_results_folder_is_as_its_page_says(targets, reader, tmp_path):
    text = (DOCS / "reference" / "results-folder.md").read_text("utf-8")
    flags = f"--model_path {STAND_IN} --dataset_name prompts.jsonl --hook_layer_name 15 --trace_samples 2 --save both"
    assert run_command([*flags.split(), "--targets", targets]) == 0
    with safe_open(tmp_path / "fisher_results/shards/shard-00000.safetensors", "np") as shard:
        stored = {name.replace("model.layers.15", "LAYER") for name in shard.keys()}  # noqa: SIM118 (no mapping)
    table = pq.read_schema(tmp_path / "fisher_results/prompts.parquet").names
    columns = {name.replace("model.layers.15", "LAYER") for name in table}
    of_shard, of_tables = text.split("## A shard")[1].split("## prompts.parquet")
    of_table, of_targets = of_tables.split("## With several targets")

    def named(part):
        """What stands in backticks in the first column of the part's table."""
        rows = [line.split(" | ")[0] for line in part.splitlines() if line.startswith("| ")]
        return set(re.findall(r"`([\w/]+)`", " ".join(rows)))

    assert named(of_shard) == stored
    assert named(of_table) | (set() if targets == "last" else named(of_targets)) == columns
    for name in re.findall(r"(?m)^  ([\w.-]+\.\w+) ", text):
        assert name.startswith("sum-") or (tmp_path / "fisher_results" / name).is_file(), name


def test_outputs_are_compared_by_their_numbers():
    shown = "loss 1.20e-02 at step 7\n...\nend"
    assert unlike(shown, "loss  1.25e-02 at step 7\nmore\nand more\nend\n") == ""
    assert "1.50e-02" in unlike(shown, "loss 1.50e-02 at step 7\nend")
    assert "8 printed" in unlike(shown, "loss 1.20e-02 at step 8\nend")
    assert unlike(shown, "loss 1.20e-02 at step 7\nstart")


def test_flags_are_checked():
    check("fisher_vmap.run", ["--num_prompts", "$COUNT", "--top-k-tokens=5"])
    check("fisher_vmap.verify", ["folder", "--kl"])
    with pytest.raises(ValueError, match="unknown flag"):
        check("fisher_vmap.run", ["--num_promts", "5"])


def test_the_commands_of_the_readme_are_understood():
    lines = re.findall(
        r"(?m)^    ((?:fisher-vmap|python -m fisher_vmap\.)\S* .+)$", (ROOT / "README.md").read_text("utf-8")
    )
    found = [ours(words) for line in lines for words in commands(line)]
    assert found
    for module, arguments in found:
        check(module, arguments)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    pytest.importorskip("sphinx", reason="the book needs the extra docs")
    out = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", out / "trees", DOCS, out / "html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out / "html"


def built(book):
    return {path: path.read_text("utf-8") for path in sorted(book.rglob("*.html"))}


def test_it_builds_without_a_warning_and_has_every_page(book):
    assert {name_of(page).replace(".md", ".html") for page in ALL} <= {str(p.relative_to(book)) for p in built(book)}


def test_it_asks_nobody_for_anything(book):
    """Nothing is loaded from elsewhere; links that a reader may follow are no matter."""
    loads = re.compile(r"""<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=["']([^"']+)""")
    for path, text in built(book).items():
        found = loads.findall(text)  # an image that stands in the page itself may hold any letters
        elsewhere = [address for address in found if "//" in address and not address.startswith("data:image/")]
        assert not elsewhere, f"{path.name} loads {elsewhere}"
    for path in book.rglob("*.css"):
        assert not re.search(r"""(?:url\(|@import)\s*["']?https?:""", path.read_text("utf-8")), path.name


def test_formulas_are_mathml_and_references_are_filled(book):
    assert (book / "the-matrix.html").read_text("utf-8").count("<math") > 20
    text = (book / "reference" / "python.html").read_text("utf-8")
    import fisher_vmap

    for name in set(fisher_vmap.__all__) - {"__version__"}:
        assert f'id="fisher_vmap.{name}"' in text, f"{name} is not in the reference"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_it_without_errors_or_requests(book, tmp_path):
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--enable-logging=stderr",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--virtual-time-budget=3000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
    )  # fmt: skip
    log = tmp_path / "net.json"

    def hosts(address):
        """Whom the browser asks while it shows this, and what it says of errors."""
        done = subprocess.run(
            ["chromium", *flags, f"--log-net-log={log}", address], capture_output=True, text=True, timeout=120
        )
        assert "CONSOLE" not in done.stderr and "</html>" in done.stdout, done.stderr[-2000:]
        return set(re.findall(r'"url":"https?://([^/"]+)', log.read_text("utf-8")))

    its_own = hosts("about:blank")  # a browser has questions of its own
    for page in ("index.html", "the-matrix.html", "inside.html", "reference/python.html"):
        assert hosts(f"file://{book / page}") <= its_own, page
