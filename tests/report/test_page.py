"""The report's page and images: whole, valid, safe against its own prompts, and honest about what it leaves out."""

import importlib.util
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_cases import planted, write_factors
from results_cases import make_layout, write_folder

from fisher_vmap.report.__main__ import main
from fisher_vmap.report.data import Sampling, compare_prompts, short_names, survey
from fisher_vmap.report.figures import log_axis, typed
from fisher_vmap.report.page import page_data, render_page, sampling_notes
from fisher_vmap.results.reader import open_results

pytestmark = pytest.mark.needs("matplotlib", "plotly", "scipy")

NASTY = '</script><script>alert(1)</script> "quoted" & <b>bold</b> \u2028 '


class Page(HTMLParser):
    """The scripts of a page, and every address that it mentions in a tag."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.addresses, self.tags, self._in = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._in = tag == "script"
        self.addresses += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if self._in:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in = False

    def handle_data(self, data):
        if self._in:
            self.scripts[-1] += data

    @property
    def data(self):
        return json.loads(self.scripts[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    first, _, _ = planted("common", 0, count=60)
    second, _, _ = planted("private", 1, count=60, width=40)
    texts = [NASTY if i == 7 else f"prompt number {i}" for i in range(60)]
    folder = tmp_path_factory.mktemp("results") / "out"
    return write_factors(folder, {"m.3": first, "m.10": second}, texts=texts, keep_columns=("kind",))


@pytest.fixture(scope="module")
def page(results):
    return Page(render_page(survey(results, Sampling())))


def test_the_page_asks_nobody_for_anything(page, results):
    assert page.addresses == []
    assert "link" not in page.tags and "img" not in page.tags and page.tags.count("script") == 3
    assert "default-src 'none'" in render_page(survey(results, Sampling(details=2)))
    assert len(page.scripts[0]) > 1e6  # plotly.js


def test_a_prompt_cannot_break_out(page, results):
    assert page.data["rows"]["text"][7] == " ".join(NASTY.split())
    assert page.data["details"]["7"]["text"] == NASTY
    assert "<" not in page.scripts[1]


def test_the_numbers_are_those_of_the_folder(page, results):
    data = page.data
    table = results.to_pandas()
    assert data["total"] == 60 and data["rows"]["index"] == list(range(60))
    for number, layer in enumerate(results.layers):
        np.testing.assert_allclose(data["layers"][number]["trace"], table[f"{layer}/trace"], rtol=1e-3)
        record = results.at(layer)[5]
        shown = data["details"]["5"]["layers"][layer]
        np.testing.assert_allclose(shown["S"], record.S, rtol=1e-3)
        np.testing.assert_allclose(shown["trades"], record.trades().T, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(shown["energy"], record.position_energy, rtol=1e-3)
    assert data["details"]["5"]["pieces"] == list(results[5].prompt_tokens)
    assert data["details"]["5"]["top"][0] == " t0"


def themed(value):
    if isinstance(value, str) and value.startswith("@"):
        assert re.fullmatch(r"@[a-z]+(/[0-9.]+)?", value)
        return [[0, "#000000"], [1, "#ffffff"]] if value in ("@scale", "@points") else "#123456"
    if isinstance(value, dict):
        return {key: themed(inner) for key, inner in value.items()}
    return [themed(inner) for inner in value] if isinstance(value, list) else value


def test_every_figure_is_valid_and_every_colour_is_in_the_palette(page, results):
    from plotly import graph_objects

    figures = [f for layer in page.data["layers"] for f in layer["figures"].values()]
    figures += page.data["layer_figures"].values()
    assert len(figures) == 2 * (2 + 4 + 2 + 2) + 3
    css = Path(importlib.util.find_spec("fisher_vmap.report").origin).with_name("page.css").read_text("utf-8")
    known = set(re.findall(r"--(\w+):", css)) | {"scale", "points"}
    for figure in figures:
        graph_objects.Figure(themed(figure))
        assert set(re.findall(r'"@(\w+)', json.dumps(figure))) <= known


def test_the_similarity_map_is_the_cosines_in_its_own_order(results):
    found = compare_prompts(results, "m.3", np.arange(0, 60, 2))
    assert sorted(found.prompts) == list(range(0, 60, 2))
    for i in (0, 3, 11):
        for j in (0, 8, 29):
            expected = results[int(found.prompts[i])].cosine(results[int(found.prompts[j])])
            assert abs(found.cosines[i, j] - expected) < 1e-5


def test_clustering_puts_a_group_side_by_side(tmp_path):
    rng = np.random.default_rng(0)
    groups = [np.linalg.qr(rng.normal(size=(20, 4)))[0].T for _ in range(3)]
    factors = np.stack([groups[i % 3] + 0.1 * rng.normal(size=(4, 20)) for i in range(30)])
    found = compare_prompts(write_factors(tmp_path, {"m": factors}), "m", np.arange(30))
    kinds = found.prompts % 3
    assert (np.diff(kinds) != 0).sum() == 2


def test_the_planted_five_are_the_first_on_the_page(tmp_path):
    factors, who, _ = planted("common", 0)
    data = Page(render_page(survey(write_factors(tmp_path, {"m": factors}), Sampling()))).data
    assert sorted(found["index"] for found in data["layers"][0]["outliers"][:5]) == who.tolist()
    assert data["layers"][0]["outliers"][0]["company"] == who.tolist()


def test_what_is_sampled_is_said(results, tmp_path):
    looked = survey(results, Sampling(similarity=20, details=10, points=30, rows=40, always=(33,)))
    notes = " ".join(sampling_notes(looked))
    for part in ("compares 20 prompts drawn at random of 60", "30 of 60", "10 prompts can be opened", "40 of 60"):
        assert part in notes
    assert 33 in looked.shown and notes in " ".join(render_page(looked).split()).replace("&#39;", "'")
    assert sampling_notes(survey(results, Sampling())) == []
    data = Page(render_page(looked)).data
    assert set(looked.points) <= set(data["rows"]["index"])  # each point has a tooltip


def test_the_command(results, tmp_path, capsys):
    out = tmp_path / "look.html"
    assert main([str(results.folder), "--output", str(out), "--prompts", "3,4", "--details", "5"]) == 0
    told = capsys.readouterr().out
    assert "look.html" in told and "60 prompts, 2 layers" in told
    names = {path.name for path in (tmp_path / "look").glob("*.png")}
    kinds = ("prompts", "similarity", "spectra")
    assert names == {"layers.png", *(f"{kind}.{layer}.png" for kind in kinds for layer in ("m.3", "m.10"))}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (tmp_path / "look").glob("*.png"))
    assert {"3", "4"} <= set(Page(out.read_text("utf-8")).data["details"])
    assert main([str(results.folder), "--prompts", "77"]) == 2
    assert "there is no prompt 77" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2 and "not a results folder" in capsys.readouterr().err


def test_the_same_folder_gives_the_same_page(results):
    assert render_page(survey(results, Sampling(details=9))) == render_page(survey(results, Sampling(details=9)))


def test_a_folder_with_failures_or_unfinished_or_without_text_or_tokens(tmp_path):
    write_folder(tmp_path / "a", 10, make_layout())
    write_folder(tmp_path / "b", 10, make_layout(store_text=False), finish=False)
    for name in "ab":
        assert main([str(tmp_path / name), "--no-images"]) == 0
        data = Page((tmp_path / name / "report.html").read_text("utf-8")).data
        assert data["rows"]["status"][2:4] == ["failed", "skipped"] and data["tiles"][0][1].endswith(
            "1 failed, 1 skipped"
        )
        assert data["details"]["0"]["pieces"] is None and data["details"]["0"]["top"][0].startswith("#")
        assert "2" not in data["details"]
    open_results(tmp_path / "a", check="full")


def test_all_prompts_failed(tmp_path, capsys):
    from results_cases import open_writer, without_numbers

    writer = open_writer(tmp_path, shard_size=4)
    writer.missing_shards(3)
    writer.add(0, [without_numbers(i, "failed", "not finite") for i in range(3)])
    writer.finish(settings={})
    assert main([str(tmp_path)]) == 2 and not (tmp_path / "report.html").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "none of the 3 prompts" in error and "(the first failed: not finite)" in error


@pytest.mark.parametrize("flag", ["--prompts", "--details"])
def test_what_is_no_number_is_told_in_words(tmp_path, capsys, flag):
    assert main([str(tmp_path), flag, "a"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "_indices" not in error and "_count" not in error and "'a'" in error


def test_many_images_are_told_by_kind(tmp_path, capsys):
    layers = {f"m.{i}": planted("common", i, count=8, width=14)[0] for i in range(5)}
    assert main([str(write_factors(tmp_path, layers).folder)]) == 0
    assert "images, spectra.LAYER.png, prompts.LAYER.png" in capsys.readouterr().out


def test_a_folder_that_kept_the_mean_alone(tmp_path):
    factors, _, _ = planted("common", 0, count=60)
    write_factors(tmp_path, {"m": factors}, means_only=True)
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text("utf-8")
    data = Page(text).data
    assert "This run kept the mean alone" in text and 'id="unlike"' not in text
    assert data["details"] == {} and not data["single"] and len(data["layers"][0]["trace"]) == 60


@pytest.mark.parametrize("median", [True, False], ids=["now", "of before"])
def test_a_step_is_compared_with_the_norm_that_the_folder_has(tmp_path, median):
    factors, _, _ = planted("common", 0, count=8, width=14)
    data = page_data(survey(write_factors(tmp_path, {"m": factors}, median_norm=median), Sampling()))
    assert data["average"] == ("median" if median else "mean")
    assert next(iter(data["details"].values()))["layers"]["m"]["norm"] == 5.0


@pytest.mark.parametrize("zero", [slice(None), slice(0, 1), slice(1, None)], ids=["all", "one", "all but one"])
def test_matrices_that_are_zero(tmp_path, zero, recwarn):
    """The next token of a chat model may be certain, so that nothing changes it."""
    factors = planted("common", 0, count=12)[0]
    factors[zero] = 0
    write_factors(tmp_path, {"m": factors})
    assert main([str(tmp_path)]) == 0
    data = Page((tmp_path / "report.html").read_text("utf-8")).data
    assert len(data["details"]) == 12 and not any("nan" in text for text in data["layers"][0]["findings"])
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize("name", ["plotly", "matplotlib", "scipy"])
def test_a_missing_package_is_named_with_what_to_do(results, monkeypatch, capsys, name):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else real(asked))
    assert main([str(results.folder)]) == 2
    assert capsys.readouterr().err == f"fisher_vmap: the report needs {name}: pip install 'fisher_vmap[report]'\n"


def test_small_helpers():
    assert short_names(["model.layers.3", "model.layers.15"]) == ["3", "15"]
    assert short_names(["a.1.mlp", "a.1.attn"]) == ["mlp", "attn"]
    assert log_axis([0.02, 300])["ticktext"] == ["0.1", "1", "10", "100"]
    assert log_axis([2e4, 9e4])["ticktext"] == ["2·10⁴", "5·10⁴", "10⁵"]
    assert typed(np.array([[1.5, 2]]))["shape"] == "1, 2"


def test_where_the_page_cannot_go_is_said_before_anything_is_computed(results, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fisher_vmap.report.__main__.open_results", lambda *_, **__: pytest.fail("it was opened"))
    index = results.folder / "index.json"
    before = index.read_bytes()
    for path, told in (
        (index, f"{index} is a file of the results in {results.folder}; choose another --output"),
        (tmp_path, f"{tmp_path} is a folder, not a file; choose another --output"),
        (".", ". is a folder, not a file; choose another --output"),
        ("/nowhere/look.html", "cannot write /nowhere/look.html: no such file or directory; choose another --output"),
    ):
        assert main([str(results.folder), "--output", str(path)]) == 2
        assert told in capsys.readouterr().err
    assert before == index.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_it_without_errors(results, tmp_path):
    out = tmp_path / "look.html"
    assert main([str(results.folder), "--output", str(out), "--no-images"]) == 0
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--enable-logging=stderr",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--virtual-time-budget=8000", f"--user-data-dir={tmp_path / 'profile'}",
    )  # fmt: skip
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", f"file://{out}#prompt-7"], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert done.stdout.count('data-ready="1"') == 11  # 8 of the layer, 3 of all layers
    assert "60 of 60 prompts" in done.stdout and 'id="which">Prompt 7<' in done.stdout
    assert "alert(1)&lt;/script&gt;" in done.stdout
