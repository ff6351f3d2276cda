"""`fisher-vmap compare`: what it prints, its page and its JSON, and mistakes in one line."""

import json
import os
import re
import threading
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from command_cases import real_command
from report_cases import planted, write_factors
from results_cases import make_layout, make_prompt, open_writer, without_numbers, write_folder

from fisher_vmap.cli import main as command
from fisher_vmap.compare.__main__ import main
from fisher_vmap.compare.page import histogram
from fisher_vmap.results.reader import open_results

pytestmark = pytest.mark.usefixtures("no_power_cuts")

ODD = "<script>alert(1)</script> & \u202eabc"
WORDS = ["<b>no</b>", " the", "\n", "\u200b", "&amp;", "$x$", "", *[f" t{i}" for i in range(10)]]
COUNT = 24


def write(folder, prompts, layout):
    """A folder of these prompts."""
    writer = open_writer(folder, layout, shard_size=len(prompts))
    writer.missing_shards(len(prompts))
    writer.add(0, prompts)
    writer.finish(settings={}, save="both", export_npz=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder, and one that reacts to one more direction in every third prompt; of two layers."""
    out = tmp_path_factory.mktemp("compared")
    factors, _, _ = planted("common", 0, count=COUNT, width=16)
    u = np.eye(16)[3]
    more = np.concatenate([factors, np.where(np.arange(COUNT) % 3 == 1, 2.0, 0.0)[:, None, None] * u], 1)
    texts = [f"{ODD} {i}" for i in range(COUNT)]
    options = {"texts": texts, "values": {"<i>kind": ["<u>x</u>", "$y$", None]}, "words": WORDS[:9]}
    write_factors(out / "a", {"m.1": factors, "m.2": factors}, **(options | {"words": WORDS[:8]}))
    write_factors(out / "b", {"m.1": more, "m.2": more}, shard_size=7, **options)
    return out / "a", out / "b"


def run(capsys, *words, code=0):
    """Standard output, or of a mistake the line on standard error."""
    assert main([*map(str, words), "--quiet"]) == code
    found = capsys.readouterr()
    if code == 0:
        return found.out
    assert found.out == "" and found.err.count("\n") == 1 and found.err.startswith("fisher_vmap: "), found.err
    return found.err.strip()


def test_what_is_printed(folders, capsys, tmp_path):
    a, b = folders
    page = tmp_path / "c.html"
    lines = run(capsys, a, b, "--layer_a", "1", "--output", page, "--rank", "2").splitlines()
    compared = open_results(a).compare(open_results(b))
    assert lines[:2] == [f"A          {a}: m.1", f"B          {b}: m.1"]
    assert f"prompts    {COUNT} compared, the same by text" in lines
    (cosine,) = (line for line in lines if line.startswith("cosine"))
    assert f"{np.median(compared.cosine):.4g} (median, {compared.cosine.min():.4g} to" in cosine
    start = next(i for i, line in enumerate(lines) if line.startswith(" prompt"))
    rows = [line.split() for line in lines[start + 1 : start + 11]]
    assert [int(row[0]) for row in rows] == compared.prompt_index[compared.order()[:10]].tolist()
    assert all(float(row[1]) == pytest.approx(compared.change[int(row[0])], rel=1e-3) for row in rows)
    assert "<U+202E>" in lines[start + 1] and "\u202e" not in "".join(lines)
    assert f"what B reacts to and A does not, all {COUNT} prompts" in lines
    assert sum(line.strip().startswith(("0  ratio", "1  ratio")) for line in lines) == 2
    assert lines[-1].startswith(f"{page}: ")


def test_groups_are_printed_with_the_directions_that_b_has_more_of(folders, capsys):
    out = run(capsys, *folders, "--layer_a", "1", "--by", "<i>kind", "--no-page")
    titles = re.findall(r"what B reacts to and A does not, (.*)", out)
    assert titles == [f"all {COUNT} prompts", "<i>kind <u>x</u> (8 prompts)", "<i>kind $y$ (8 prompts)",
                      "<i>kind none (8 prompts)"]  # fmt: skip
    (part,) = re.findall(r"\$y\$ \(8 prompts\)\n(.*?)\n\n", out, re.DOTALL)
    assert part.count("ratio") == 1 and "likelier" in part


def test_the_json(folders, capsys, tmp_path):
    a, b = folders
    path = tmp_path / "c.json"
    out = run(capsys, a, b, "--json", path, "--no-page", "--by", "<i>kind", "--rank", "2", "--ridge", "0.1")
    assert f"{path}: {2 * COUNT} prompts, 16 directions" in out
    document = json.loads(path.read_text("utf-8"))
    assert (document["a"], document["b"], document["matched_by"]) == (str(a), str(b), "text")
    assert (document["rank"], document["ridge"], document["by"]) == (2, 0.1, "<i>kind")
    assert [(x["layer_a"], x["layer_b"], x["prompts"], x["left_out"]) for x in document["layers"]] == [
        (layer, layer, COUNT, 0) for layer in ("m.1", "m.2")
    ]
    compared = open_results(a).compare(open_results(b), 2, rank=2, ridge=0.1)
    rows = [row for row in document["prompts"] if row["layer_a"] == "m.2"]
    assert [row["prompt_index"] for row in rows] == list(range(COUNT))
    for name in ("cosine", "change", "trace_a", "trace_b", "trace_ratio", "outside", "overlap"):
        values = compared.ratio if name == "trace_ratio" else getattr(compared, name)
        assert [row[name] for row in rows] == [float(f"{value:.6g}") for value in values]
    of_all = [x for x in document["directions"] if x["layer_a"] == "m.2" and x["group"] is None]
    assert [(x["direction"], x["prompts"]) for x in of_all] == [(0, COUNT), (1, COUNT)]
    assert of_all[0]["ratio"] == float(f"{compared.directions.ratios[0]:.6g}")
    assert of_all[0]["in_b"] > of_all[0]["in_a"] and set(of_all[0]["up"][0]) == {"id", "token", "change"}
    assert {x["group"] for x in document["directions"]} == {None, "<u>x</u>", "$y$", "none"}


def test_json_has_none_for_what_is_no_number(tmp_path, capsys):
    layout = make_layout()
    prompts = [make_prompt(i, layout, 1) for i in range(4)]
    prompts[2:] = (replace(without_numbers(i, "failed", "x"), text=None) for i in (2, 3))
    write(tmp_path / "a", prompts, layout)
    prompts = [make_prompt(i, layout) for i in range(4)]
    found = prompts[1].layers["blocks.0"]
    prompts[1].layers["blocks.0"] = found._replace(S=0 * found.S, V=0 * found.V, trace=0.0)
    write(tmp_path / "b", prompts, layout)
    run(capsys, tmp_path / "b", tmp_path / "a", "--json", tmp_path / "c.json")
    document = json.loads((tmp_path / "c.json").read_text())
    (row,) = (row for row in document["prompts"] if row["prompt_index"] == 1)
    assert row["cosine"] is row["trace_ratio"] is None and row["change"] == row["outside"] == 1.0
    assert document["layers"][0]["left_out"] == 2 and "NaN" not in (tmp_path / "c.json").read_text()


# The page


class Reader(HTMLParser):
    """Tags, attributes, and the text of each element in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_whole_and_escapes_whatever_it_shows(folders, capsys):
    a, b = folders
    run(capsys, a, b, "--by", "<i>kind")
    text = (b / "compare.html").read_text("utf-8")
    page = Reader(text)
    assert not {"b>", "script", "i", "u", "a", "img", "link"} & set(page.tags)
    assert page.tags.count("b") == 2 * 5  # the tiles of two layers
    assert not [value for name, value in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")
    shown = "".join(page.words)
    assert "<script>alert(1)</script> & <U+202E>abc 7" in shown and "\u202e" not in text
    assert "'<b>no</b>'" in shown and "<i>kind <u>x</u> (8 prompts)" in shown and "<code>&#39;␣the&#39;</code>" in text
    assert text.count('<table class="prompts">') == 2 and text.count('<table class="directions">') == 2 * 4
    rows = re.findall(r'<table class="prompts">.*?</table>', text, re.DOTALL)[0]
    order = [int(prompt) for prompt in re.findall(r"<tr><td>(\d+)</td>", rows)]
    compared = open_results(a).compare(open_results(b))
    assert order == compared.prompt_index[compared.order()].tolist()
    assert text.count("<svg") == 2 and len(text) < 200_000


def test_a_page_of_many_prompts_says_that_it_is_a_part(folders, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("fisher_vmap.compare.page.SHOWN", 5)
    run(capsys, *folders, "--layer_b", "m.2", "--output", tmp_path / "c.html")
    text = (tmp_path / "c.html").read_text("utf-8")
    assert f"The first 5 of {COUNT}." in text and len(re.findall(r"<tr><td>\d+</td><td>[\d.]+</td><td>", text)) >= 5


def test_settings_that_differ_are_told(tmp_path, capsys):
    for name, k in (("a", 4), ("b", 5)):
        marks = {"top_k_tokens": k, "model": {"files": name}, "system_prompt": "<b>\nx" if name == "b" else None}
        write_folder(tmp_path / name, 6, make_layout(top_k=k), fingerprint=marks)
    out = run(capsys, tmp_path / "a", tmp_path / "b")
    (note,) = (line for line in out.splitlines() if line.startswith("note"))
    assert "top_k_tokens is 4 in A and 5 in B" in note and "system_prompt is None in A and '<b>\\nx' in B" in note
    assert "model" not in note and "&lt;b&gt;" in (tmp_path / "b" / "compare.html").read_text("utf-8")


def test_other_data_are_told(tmp_path, capsys):
    for name in "ab":
        write_folder(tmp_path / name, 6, fingerprint={"data": f"jsonl sha256:{name}"})
    out = run(capsys, tmp_path / "a", tmp_path / "b", "--no-page")
    (note,) = (line for line in out.splitlines() if line.startswith("note"))
    assert "data is 'jsonl sha256:a' in A and 'jsonl sha256:b' in B, of which only what is named below was" in note
    out = run(capsys, tmp_path / "a", tmp_path / "a", "--no-page")
    assert not [line for line in out.splitlines() if line.startswith("note")]


@pytest.mark.parametrize("values", [[0.5, 0.7, 1.0, np.nan], [1.0] * 4, [np.nan], []])
def test_a_histogram(values):
    svg = str(histogram(np.array(values)))
    known = np.isfinite(values).sum()
    assert bool(svg) == bool(known) and "nan" not in svg
    assert svg.count("<rect") == len({round(v, 3) for v in values if np.isfinite(v)})


def test_what_is_left_out_of_the_groups_is_told(tmp_path, capsys):
    factors, _, _ = planted("common", 0, count=50, width=12)
    for name, more in (("a", {}), ("b", {3: "other"})):
        values = {"n": [more.get(i, str(i // 2)) for i in range(50)]}
        write_factors(tmp_path / name, {"m": factors}, values=values)
    out = run(capsys, tmp_path / "a", tmp_path / "b", "--by", "n", "--json", tmp_path / "c.json")
    told = ["5 smaller groups of n are left out", "prompts whose n is another in B: 1; the groups are by that in A"]
    assert out.splitlines()[-5:-3] == told, out.splitlines()[-6:]
    page = (tmp_path / "b" / "compare.html").read_text("utf-8")
    assert all(f"{line}." in page for line in told)
    document = json.loads((tmp_path / "c.json").read_text())
    assert (document["layers"][0]["more_groups"], document["layers"][0]["other_values"]) == (5, 1)
    assert {x["value"] for x in document["directions"]} == {None, *(str(i) for i in range(20))}


def test_a_value_that_is_no_number_is_none_in_the_json(tmp_path, capsys):
    factors, _, _ = planted("common", 0, count=6, width=12)
    write_factors(tmp_path / "a", {"m": factors}, values={"x": [float("nan"), 2.5]})
    run(capsys, tmp_path / "a", tmp_path / "a", "--by", "x", "--json", tmp_path / "c.json", "--no-page")
    found = {(x["group"], x["value"]) for x in json.loads((tmp_path / "c.json").read_text())["directions"]}
    assert (None, None) in found and ("2.5", 2.5) in found and {value for _, value in found} == {None, 2.5}


def test_a_pair_of_matrices_that_are_zero_has_no_directions_and_is_told(folders, tmp_path, capsys):
    b = folders[1]
    factors, _, _ = planted("common", 0, count=COUNT, width=16)
    texts = [f"{ODD} {i}" for i in range(COUNT)]
    write_factors(tmp_path / "c", {"m.1": factors, "m.2": 0 * factors}, texts=texts)
    out = run(capsys, tmp_path / "c", b)
    assert f"all {COUNT} prompts: no direction, since all matrices of A or all of B are zero" in out.split("m.2")[-1]
    assert re.findall(r"(?m)^A .*: (\S+)$", out) == ["m.1", "m.2"]
    text = (b / "compare.html").read_text("utf-8")
    assert text.count('<table class="directions">') == 1 and "no direction, since all" in text


# Layers, and where files go


def test_all_layers_are_checked_before_anything_is_printed(folders, tmp_path, capsys):
    factors, _, _ = planted("common", 0, count=COUNT, width=16)
    texts = [f"{ODD} {i}" for i in range(COUNT)]
    write_factors(tmp_path / "c", {"m.1": factors, "m.2": factors[:, :, :12]}, texts=texts)
    line = run(capsys, folders[0], tmp_path / "c", code=2)  # and nothing on standard output
    assert "m.2 of" in line and "has the width 16 and m.2 of" in line and "name others with --layer_a" in line
    assert "rank is 13; expected 1 to 12, the width of m.2" in run(
        capsys, tmp_path / "c", tmp_path / "c", "--rank", "13", code=2
    )


def test_files_that_are_something_else(folders, tmp_path, capsys, monkeypatch):
    """A link stays one, and a pipe is written to."""
    a, b = folders
    (tmp_path / "real.html").write_text("old")
    (tmp_path / "link.html").symlink_to("real.html")
    os.mkfifo(tmp_path / "pipe")
    read = []
    thread = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    thread.start()
    run(capsys, a, b, "--layer_a", "1", "--output", tmp_path / "link.html", "--json", tmp_path / "pipe")
    thread.join(60)
    assert len(json.loads(read[0])["prompts"]) == COUNT and (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link.html").is_symlink() and "<html" in (tmp_path / "real.html").read_text("utf-8")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", [".", "..", "/", "folder"])
@pytest.mark.parametrize("flag", ["--json", "--output"])
def test_a_folder_is_no_file(folders, tmp_path, capsys, monkeypatch, flag, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert f"{name} is a folder, not a file; choose another {flag}" in run(capsys, *folders, flag, name, code=2)


def test_a_results_folder_keeps_its_files(folders, tmp_path, capsys, monkeypatch):
    a, b = folders
    (tmp_path / "link.json").symlink_to(a / "index.json")
    kept = {path: path.read_bytes() for path in a.rglob("*") if path.is_file()}
    own = [
        a / "index.json",
        a / "metadata.yaml",
        a / "prompts.parquet",
        tmp_path / "link.json",
        *(a / "shards").iterdir(),
    ]
    for path in own:
        for flag in ("--json", "--output"):
            line = run(capsys, a, b, flag, path, code=2)
            assert f"{path} is a file of the results in {a}; choose another {flag}" in line
    assert kept == {path: path.read_bytes() for path in kept}
    monkeypatch.chdir(tmp_path)
    line = run(capsys, a, b, "--output", tmp_path / "x", "--json", "./x", code=2)
    assert "--json and --output are both" in line


def test_common_layers_are_compared_one_after_the_other(folders, capsys):
    out = run(capsys, *folders, "--no-page")
    assert re.findall(r"(?m)^A .*: (\S+)$", out) == ["m.1", "m.2"]
    out = run(capsys, folders[0], folders[0], "--layer_a", "m.1", "--layer_b", "2", "--no-page")
    assert re.findall(r"(?m)^[AB] .*: (\S+)$", out) == ["m.1", "m.2"]
    assert not (folders[0] / "compare.html").exists()


def test_layers_that_are_not_common(folders, tmp_path, capsys):
    a, _ = folders
    factors, _, _ = planted("common", 0, count=COUNT, width=16)
    write_factors(tmp_path / "c", {"x.1": factors}, texts=[f"{ODD} {i}" for i in range(COUNT)])
    line = run(capsys, a, tmp_path / "c", code=2)
    assert "m.1, m.2" in line and "x.1, no layer in common; name one of each with --layer_a and --layer_b" in line
    line = run(capsys, a, tmp_path / "c", "--layer_a", "2", code=2)
    assert "--layer_a is m.2, which was not hooked in" in line and "x.1: name one of them with --layer_b" in line
    line = run(capsys, tmp_path / "c", a, "--layer_b", "2", code=2)
    assert "--layer_b is m.2" in line and "name one of them with --layer_a" in line
    assert "layer 7 was not hooked" in run(capsys, a, a, "--layer_a", "7", code=2)
    out = run(capsys, a, tmp_path / "c", "--layer_a", "2", "--layer_b", "x.1", "--no-page")
    assert re.findall(r"(?m)^[AB] .*: (\S+)$", out) == ["m.2", "x.1"]


def test_a_folder_of_the_hub_is_not_written_to(folders, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    where = {"hf://datasets/me/a": folders[0], "hf://datasets/me/b": folders[1]}
    monkeypatch.setattr("fisher_vmap.compare.__main__.open_results", lambda name: open_results(where[name]))
    out = run(capsys, *where, "--layer_a", "1")
    assert (tmp_path / "compare.html").is_file() and "compare.html: " in out.splitlines()[-1]


def test_the_real_command(folders, tmp_path):
    done = real_command([*folders, "--layer_a", "1", "--output", tmp_path / "c.html"], "fisher_vmap.compare")
    assert done.returncode == 0 and f"{COUNT} compared" in done.stdout and (tmp_path / "c.html").is_file()


# Mistakes


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--rank", "0"], "rank is 0; expected 1 to 16"),
        (["--rank", "x"], "argument --rank: invalid int value: 'x'"),
        (["--ridge", "-1"], "ridge is -1.0; expected a fraction"),
        (["--by", "sort"], "'sort' is no kept column"),
        (["--layer", "1"], "unknown flag '--layer'; name it with --layer_a"),
        (["--no-page", "--output", "x.html"], "--output x.html is the page's file, and --no-page leaves it out"),
        (["--json", "x", "--output", "x"], "--json and --output are both x; name two files"),
        (["again"], "unexpected argument 'again'"),
    ],
)
def test_wrong_flags_are_one_line(folders, capsys, more, told):
    assert told in run(capsys, *folders, *more, code=2)


def test_files_that_cannot_be_written_are_one_line(folders, capsys):
    for flag in ("--output", "--json"):
        assert main([*map(str, folders), flag, "/proc/nothing/here", "--quiet"]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "cannot write /proc/nothing/here" in line


def test_folders_that_cannot_be_compared_are_one_line(folders, tmp_path, capsys):
    a, _ = folders
    assert "is not a results folder" in run(capsys, a, tmp_path, code=2)
    write_folder(tmp_path / "unfinished", 6, finish=False)
    line = run(capsys, tmp_path / "unfinished", a, code=2)
    assert "is unfinished: 6 of 6 prompts are stored; give the command of its run again" in line
    write_folder(tmp_path / "other", COUNT, make_layout({"m.1": 16}))
    line = run(capsys, a, tmp_path / "other", code=2)
    assert line.startswith("fisher_vmap: prompt 0 is '<script>") and "'prompt number 0'" in line
    write_folder(tmp_path / "wide", COUNT, make_layout({"m.1": 17}))
    assert "wide 17; expected equal ones" in run(capsys, a, tmp_path / "wide", code=2)
    write_folder(tmp_path / "mean", 6, make_layout({"m.1": 16}, means_only=True), save="mean", export_npz=False)
    assert "keeps the mean alone (save: mean)" in run(capsys, tmp_path / "mean", a, code=2)
    assert command(["compare", str(a)]) == 2
    assert "the following arguments are required: B" in capsys.readouterr().err
