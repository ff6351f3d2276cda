"""Results on the hub, with the hub's client replaced: what is sent, what is not, and what is asked first."""

import fnmatch
import html
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from report_cases import planted, write_factors
from results_cases import FINGERPRINT, open_writer, write_folder

from fisher_vmap.errors import UserError
from fisher_vmap.export import main as export
from fisher_vmap.info import main as info
from fisher_vmap.report.__main__ import main as report
from fisher_vmap.results.hub import address
from fisher_vmap.results.local_paths import found_here, last_part
from fisher_vmap.results.reader import open_results
from fisher_vmap.results.writer import ResultsWriter
from fisher_vmap.verify.__main__ import main as verify

SOURCE = "lmsys/lmsys-chat-1m"
ON_HUB = {**FINGERPRINT, "data": f"hub {SOURCE} commit:abc config:default split:train"}


def response(status):
    return httpx2.Response(status, request=httpx2.Request("GET", "http://localhost/x"))


class Hub:
    """A hub that is a folder."""

    def __init__(self, root):
        self.root, self.gated, self.calls, self.error = root, {SOURCE: "auto", "open/data": False}, [], None

    def __call__(self, token=None):
        self.calls.append(("HfApi", token))
        return self

    def dataset_info(self, name):
        if name not in self.gated:
            raise RepositoryNotFoundError("no such", response=response(404))
        return SimpleNamespace(gated=self.gated[name])

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", repo_id, repo_type, private, exist_ok))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://hub/datasets/{repo_id}"

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, repo_type, revision, commit_message):
        (self.root / repo_id / path_in_repo).write_bytes(path_or_fileobj)

    def upload_folder(
        self, *, folder_path, allow_patterns, repo_id, repo_type, revision, commit_message, delete_patterns=()
    ):
        target = self.root / repo_id
        for path in [p for p in target.rglob("*") if p.is_file()]:
            if any(fnmatch.fnmatch(str(path.relative_to(target)), pattern) for pattern in delete_patterns):
                path.unlink()
        for path in [p for p in Path(folder_path).rglob("*") if p.is_file()]:
            name = str(path.relative_to(folder_path))
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target / name)

    def snapshot_download(self, repo_id, *, repo_type, revision, token, ignore_patterns):
        if self.error is not None:
            raise self.error
        self.calls.append(("snapshot_download", repo_id, repo_type, revision, ignore_patterns))
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.fixture
def results(tmp_path, monkeypatch):
    return folder_of(tmp_path, ON_HUB, monkeypatch)


def folder_of(tmp_path, fingerprint, monkeypatch, **options):
    monkeypatch.setitem(write_factors.__globals__, "open_writer",
                        lambda *args, **kwargs: open_writer(*args, fingerprint=fingerprint, **kwargs))  # fmt: skip
    factors = {"m": planted("common", 0, count=40, width=20)[0]}
    texts = [f"SECRET words {i}" for i in range(40)]
    return write_factors(tmp_path / "out", factors, texts=texts, keep_columns=("kind",), **options)


def bytes_of(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def text_in(folder):
    """Any of the prompts' text, wherever it may be: in tables too, which are compressed."""
    import pyarrow.parquet as pq

    tables = [str(pq.read_table(path).to_pylist()) for path in folder.rglob("*.parquet")]
    return "SEC" in "".join(tables) or b"SEC" in bytes_of(folder)


@pytest.mark.needs("matplotlib", "plotly", "scipy")
def test_there_and_back(hub, results, monkeypatch, tmp_path):
    hub.gated[SOURCE] = False
    (results.folder / "notes.txt").write_text("mine")
    url = results.push_to_hub("me/fisher", token="abc")
    assert url == "https://hub/datasets/me/fisher"
    assert hub.calls[:2] == [("HfApi", "abc"), ("create_repo", "me/fisher", "dataset", True, True)]
    assert not (hub.root / "me/fisher/notes.txt").exists()
    back = open_results("hf://datasets/me/fisher@v1")
    assert hub.calls[-1] == ("snapshot_download", "me/fisher", "dataset", "v1", ["*.npz"])
    assert len(back) == 40 and back[3].text == "SECRET words 3"
    assert back.table().equals(results.table()) and (back[3].V == results[3].V).all()
    open_results("hf://datasets/me/fisher", check="full")
    assert hub.calls[-1] == ("snapshot_download", "me/fisher", "dataset", None, None)
    monkeypatch.chdir(tmp_path)
    assert report(["hf://datasets/me/fisher", "--no-images"]) == 0
    assert (tmp_path / "report.html").exists() and not (back.folder / "report.html").exists()


def test_text_of_a_gated_data_set_needs_a_decision(hub, results, caplog):
    with pytest.raises(
        UserError, match=rf"{SOURCE} is a gated data set, and its text.*share_text=True.*share_text=False"
    ):
        results.push_to_hub("me/fisher")
    assert not hub.root.exists()
    with caplog.at_level(logging.WARNING):
        results.push_to_hub("me/fisher", share_text=True)
    assert f"{SOURCE} is a gated data set: the text of 40 prompts is shared in me/fisher" in caplog.text
    assert text_in(hub.root)


def test_a_data_set_that_cannot_be_looked_up_counts_as_gated(hub, results):
    del hub.gated[SOURCE]
    with pytest.raises(UserError, match=r"whether .* is gated cannot be looked up"):
        results.push_to_hub("me/fisher")


def test_without_text_nothing_of_it_leaves(hub, results, capsys):
    results.push_to_hub("hf://datasets/me/fisher", share_text=False)
    folder = hub.root / "me/fisher"
    assert not text_in(folder) and text_in(results.folder)
    assert verify([str(folder)]) == 0 and info([str(folder)]) == 0
    back = open_results("hf://datasets/me/fisher", check="full")
    assert back[3].text is None and back[3].prompt_tokens is None and back[3].row["kind"] is None
    assert back[3].top_tokens == results[3].top_tokens and back[3].row["source_row"] == results[3].row["source_row"]
    assert (back[3].V == results[3].V).all() and (back.mean() == results.mean()).all()
    assert (
        "SECRET" not in (folder / "README.md").read_text() and "text is left out" in (folder / "README.md").read_text()
    )
    assert results.folder.joinpath("prompts.parquet").exists() and open_results(results.folder, check="full")


PATHS = {
    "model_path": "/home/ada/models/tiny",
    "adapter_path": "../ada/adapter",
    "dataset_name": "/home/ada/prompts.jsonl",
    "output_dir": "/scratch/ada/out",
    "prefill": "/no_think",
    "hook_layer_name": ["m"],
}


@pytest.mark.parametrize("share_text", [True, False])
def test_paths_of_this_machine_stay_here(hub, tmp_path, monkeypatch, caplog, share_text):
    folder, layout = tmp_path / "out", folder_of(tmp_path, ON_HUB, monkeypatch).index.layout
    (folder / "metadata.yaml").unlink()
    writer = ResultsWriter.open(folder, layout=layout, shard_size=32, fingerprint=ON_HUB, settings=PATHS)
    writer.finish(settings=PATHS, export_npz=False)
    results = open_results(folder, check="full")
    assert results.metadata["settings"] == results.index.settings == PATHS
    with caplog.at_level(logging.INFO):
        results.push_to_hub("me/fisher", share_text=share_text)
    assert "model_path, adapter_path, dataset_name, output_dir, paths of this machine" in caplog.text
    assert b"/ada" in bytes_of(results.folder) and b"/ada" not in bytes_of(hub.root)
    assert "| `prefill` | `/no_think` |" in (hub.root / "me/fisher/README.md").read_text()  # no path
    back = open_results("hf://datasets/me/fisher", check="full")
    shared = PATHS | {"model_path": "tiny", "adapter_path": "adapter", "dataset_name": "prompts.jsonl",
                      "output_dir": "out"}  # fmt: skip
    assert back.metadata["settings"] == back.index.settings == shared
    assert verify([str(hub.root / "me/fisher")]) == 0
    assert open_results(results.folder, check="full").metadata["settings"] == PATHS


USERS = {  # setting: value, what is shared of it
    "posix": {"model_path": ("/home/zuse/models/tiny", "tiny"), "dataset_name": ("/data/zuse/p.jsonl", "p.jsonl")},
    "windows": {"model_path": ("C:\\Users\\zuse\\tiny", "tiny"), "dataset_name": ("D:/zuse/p.jsonl", "p.jsonl"),
                "adapter_path": ("..\\zuse\\lora", "lora"), "output_dir": ("\\\\server\\zuse\\out\\", "out")},
    "home": {"model_path": ("~/zuse/tiny.gguf", "tiny.gguf"), "dataset_name": ("~zuse", "~"),
             "output_dir": ("~/zuse/", "zuse")},
    "relative": {"model_path": ("./zuse/models/x", "x"), "dataset_name": ("../zuse/x.csv", "x.csv"),
                 "adapter_path": (".\\zuse\\x", "x"), "output_dir": ("zuse/runs/7", "7")},
    "template": {"chat_template_file": ("zuse/chat.jinja", "chat.jinja"), "model_path": ("owner/name", "owner/name")},
    "inside": {"model_kwargs": ({"cache_dir": "/home/zuse/.cache", "rope_theta": 5.0, "offload_folder": "./zuse/off",
                                 "deep": ["~/zuse/x", "sdpa"]},
                                {"cache_dir": ".cache", "rope_theta": 5.0, "offload_folder": "off",
                                 "deep": ["x", "sdpa"]})},
    "text": {"prefill": ("/no_think", "/no_think"), "system_prompt": ("C:\\x is a path", "C:\\x is a path"),
             "chat_template_kwargs": ({"opening": "/think"}, {"opening": "/think"})},
}  # fmt: skip


def with_settings(folder, settings, resolved=None, **fingerprint):
    """A finished folder of a run with these settings."""
    fingerprint = {**FINGERPRINT, **fingerprint}
    write_folder(folder, settings=settings, fingerprint=fingerprint, resolved=resolved, export_npz=False)
    return open_results(folder)


@pytest.mark.parametrize("case", USERS)
def test_paths_of_every_spelling_are_cut_in_all_that_is_uploaded(hub, tmp_path, case):
    given = {name: value for name, (value, _) in USERS[case].items()}
    shared = {name: value for name, (_, value) in USERS[case].items()}
    fingerprint = {name: value for name, value in given.items() if name in ("model_kwargs", "chat_template_file")}
    results = with_settings(tmp_path / "out", given, **fingerprint)
    results.push_to_hub("me/fisher", share_text=False)
    assert case in ("text", "template") or b"zuse" in bytes_of(results.folder)
    assert case == "home" or b"zuse" not in bytes_of(hub.root)
    back = open_results("hf://datasets/me/fisher", check="full")
    assert back.metadata["settings"] == back.index.settings == shared
    assert {name: back.index.fingerprint[name] for name in fingerprint} == {name: shared[name] for name in fingerprint}
    assert open_results(results.folder, check="full").metadata["settings"] == given


PLACES = [  # what the run wrote down, or what identified its model and data; what is shared
    ({"local_paths": ["model_path"]}, {}, "name", "lab/set"),
    ({"local_paths": ["dataset_name"]}, {}, "owner/name", "set"),
    ({"local_paths": []}, {"model": {"files": {}}, "data": ".jsonl sha256:1"}, "owner/name", "lab/set"),
    ({}, {"model": {"hub": "owner/name"}, "data": "hub lab/set commit:1 config:a split:b"}, "owner/name", "lab/set"),
    ({}, {"model": {"files": {"config.json": "1"}}, "data": ".jsonl sha256:1"}, "name", "set"),
    ({}, {"model": {"hub": "base/model", "adapter": {}}}, "owner/name", "lab/set"),
    (None, {}, "owner/name", "lab/set"),
]


@pytest.mark.parametrize("there", [False, True], ids=["elsewhere", "beside folders of these names"])
@pytest.mark.parametrize(("resolved", "fingerprint", "model", "data"), PLACES)
def test_the_run_decides_what_is_on_the_hub_not_the_working_folder(
    hub, tmp_path, monkeypatch, resolved, fingerprint, model, data, there
):
    settings = {"model_path": "owner/name", "dataset_name": "lab/set"}
    hub.gated["lab/set"] = False
    results = with_settings(tmp_path / "out", settings, resolved=resolved, **fingerprint)
    monkeypatch.chdir(tmp_path)
    for name in settings.values() if there else ():
        (tmp_path / name).mkdir(parents=True)
    results.push_to_hub("me/fisher")
    card = (hub.root / "me/fisher/README.md").read_text()
    assert f"# Fisher matrices of {model} on {data}\n" in card
    assert yaml.safe_load(card.split("---\n")[1]).get("source_datasets") == (["lab/set"] if "/" in data else None)
    assert open_results("hf://datasets/me/fisher").index.settings == {"model_path": model, "dataset_name": data}


def test_what_a_run_writes_down(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    settings = {"model_path": "owner/name", "adapter_path": None, "dataset_name": "lab/set", "prefill": "owner/name"}
    assert found_here(settings) == ["model_path"]
    assert found_here({"model_path": "a/b", "adapter_path": "owner", "dataset_name": "./no/such"}) == [
        "adapter_path",
        "dataset_name",
    ]
    assert found_here({"model_path": "a/b", "dataset_name": "x" * 5000, "output_dir": "owner"}) == []


@pytest.mark.parametrize(
    ("path", "last"),
    [("/a/b", "b"), ("/a/b/", "b"), ("C:\\a\\b", "b"), ("b", "b"), ("/", "/"), ("~", "~"), ("~ada/", "~"), ("", "")],
)
def test_the_last_part(path, last):
    assert last_part(path) == last


NASTY = [
    "two\nlines", "a|b", "`tick` and ``two``", "<script>alert(1)</script>", "---\nlicense: mit\n---", "\r\n| x | y |",
    "*bold* _it_ [a](b) $x$ ~~s~~", "&amp; &#124;", "trailing \\", "tab\tand \x00 and \x1b[31m", "\u2028\x85", "", " ",
    "日本語 🙂", '"q": {a: 1} # no comment', "- item", "'", "null", "a" * 300,
]  # fmt: skip


@pytest.mark.needs("markdown_it")
@pytest.mark.parametrize("value", NASTY)
def test_no_value_breaks_the_card(hub, tmp_path, value):
    import markdown_it

    settings = {"model_path": "tiny", "prefill": value, "dataset_name": value, "stop": ["x", value]}
    results = with_settings(tmp_path / "out", settings, resolved={"local_paths": []})
    results.push_to_hub("me/fisher", share_text=False)
    card = (hub.root / "me/fisher/README.md").read_text("utf-8")
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.S).groups()
    header = yaml.safe_load(head)
    assert set(header) - {"source_datasets"} == {"pretty_name", "tags", "size_categories", "configs"}
    assert header["pretty_name"].startswith("Fisher matrices of tiny on ")
    page = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body)
    assert len(re.findall("<h1>", page)) == 1 and len(re.findall("<h2>", page)) == 2
    assert not re.findall(r"<(?!/?(?:h1|h2|p|pre|code|table|thead|tbody|tr|th|td)\b)[^>]*>", page)
    rows = re.findall(r"<tr>(.*?)</tr>", page.split("these settings:")[1], re.S)
    assert len(rows) == 1 + len(settings) and all(row.count("<td>") == 2 for row in rows[1:])
    cells = [html.unescape(re.sub("<[^>]*>", "", row.split("<td>")[2])) for row in rows[1:]]
    if value.isprintable() and value.strip():
        assert cells[1].strip() == value.strip()


def test_the_table_can_be_loaded_as_a_data_set(hub, results, monkeypatch, tmp_path):
    """As the hub's viewer does: the card's `configs` name the file."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    results.push_to_hub("me/fisher", share_text=False)
    folder = hub.root / "me/fisher"
    for arguments in ((str(folder),), (str(folder), "prompts")):
        rows = datasets.load_dataset(*arguments, split="train", cache_dir=str(tmp_path / "cache"))
        assert len(rows) == 40 and rows["prompt_index"][:3] == [0, 1, 2] and rows["text"][0] is None
        assert rows["m/trace"][:] == open_results(folder).to_pandas()["m/trace"].tolist()


@pytest.mark.parametrize("data", [None, "local sha256:12", "hub open/data commit:1 config:a split:b"])
def test_text_of_ones_own_or_of_an_open_data_set_just_goes(hub, tmp_path, monkeypatch, data):
    folder_of(tmp_path, {**FINGERPRINT, "data": data}, monkeypatch).push_to_hub("me/fisher")
    assert text_in(hub.root)


def test_a_run_that_stored_no_text_has_nothing_to_decide(hub, tmp_path, monkeypatch):
    results = folder_of(tmp_path, ON_HUB, monkeypatch, store_text=False)
    with pytest.raises(UserError, match="gated"):  # the kept column may hold anything
        results.push_to_hub("me/fisher")
    results.push_to_hub("me/fisher", share_text=False)
    assert not text_in(hub.root)


def test_means_alone(hub, tmp_path, monkeypatch):
    results = folder_of(tmp_path, ON_HUB, monkeypatch, means_only=True)
    results.push_to_hub("me/fisher", share_text=False)
    back = open_results("hf://datasets/me/fisher")
    assert (back.mean() == results.mean()).all() and verify([str(hub.root / "me/fisher")]) == 0


def test_the_card(hub, results):
    results.push_to_hub("me/fisher", share_text=True)
    head, body = (hub.root / "me/fisher/README.md").read_text().split("---\n", 2)[1:]
    header = yaml.safe_load(head)
    assert header["configs"] == [{"config_name": "prompts", "data_files": "prompts.parquet"}]
    assert header["size_categories"] == ["n<1K"] and "fisher-information" in header["tags"]
    assert header["source_datasets"] == ["owner/data"]
    for part in (
        "40 prompts",
        "| `m` | 20 |",
        'open_results("hf://datasets/me/fisher")',
        "nats^2",
        "terms hold here too",
    ):
        assert part in body
    assert "/models/" not in body  # a path of this machine says nothing to others


def test_a_second_push_leaves_nothing_of_the_first(hub, results, tmp_path, monkeypatch):
    results.push_to_hub("me/fisher", share_text=True)
    smaller = planted("common", 1, count=20, width=20)[0]
    again = write_factors(tmp_path / "again", {"m": smaller})
    again.push_to_hub("me/fisher", share_text=True)
    assert len(open_results("hf://datasets/me/fisher", check="full")) == 20
    assert len(list((hub.root / "me/fisher/shards").iterdir())) == 2


def test_from_the_command_line(hub, results, capsys):
    assert export([str(results.folder), "hf://datasets/me/fisher"]) == 2
    assert "--no-text" in capsys.readouterr().err
    assert export([str(results.folder), "hf://datasets/me/fisher", "--no-text", "--public"]) == 0
    assert "https://hub/datasets/me/fisher" in capsys.readouterr().out
    assert ("create_repo", "me/fisher", "dataset", False, True) in hub.calls


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("x", response=response(403)), "me/fisher is gated: accept its terms"),
        (RepositoryNotFoundError("x", response=response(404)), "the hub has no data set me/fisher, or hides it"),
        (RevisionNotFoundError("x", response=response(404)), "no such revision"),
        (httpx2.ConnectError("no route"), r"no access to me/fisher on the hub \(no route\)"),
        (OSError("disk"), r"no access to me/fisher on the hub \(disk\)"),
    ],
)
def test_what_the_hub_says_is_one_line(hub, results, error, message):
    hub.error = error
    for ask in (
        lambda: open_results("hf://datasets/me/fisher"),
        lambda: results.push_to_hub("me/fisher", share_text=False),
    ):
        with pytest.raises(UserError, match=message) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_addresses():
    assert address("hf://datasets/a/b") == ("a/b", None) and address("a/b-c.d@refs/pr/1") == ("a/b-c.d", "refs/pr/1")
    for wrong in ("hf://datasets/a", "a", "hf://models/a/b", "a/b/c", ""):
        with pytest.raises(UserError, match="is no data set on the hub"):
            address(wrong)


def test_an_unfinished_folder_is_not_pushed(hub, tmp_path):
    writer = open_writer(tmp_path / "half")
    writer.missing_shards(4)
    results = open_results(tmp_path / "half", allow_incomplete=True)
    with pytest.raises(UserError, match="is unfinished"):
        results.push_to_hub("me/fisher")
