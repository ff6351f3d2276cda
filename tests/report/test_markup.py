"""Values of kept columns, tokens and names of layers are data on the page and in the images, whatever they hold."""

import html
import json
import logging
import re
import shutil
import subprocess
import warnings
from importlib.resources import files
from types import SimpleNamespace

import pytest
from report_cases import planted, write_factors

from fisher_vmap.escape import visible
from fisher_vmap.report import images
from fisher_vmap.report.__main__ import main
from fisher_vmap.report.data import OTHERS, Sampling, _next_tokens, survey
from fisher_vmap.report.page import page_data

pytestmark = pytest.mark.needs("matplotlib", "plotly", "scipy")

VALUES = {
    "formula": ["$x$", "$", r"$\frac{1}$", "a_b^c", "{}"],
    "_hidden": ["_hidden", "__x", "_", "@red", "@blue/0.2"],
    "<b>tags<b>": ["<b>x</b>", '<a href="javascript:alert(1)">x</a>', "&amp;", "</script>", "<br>"],
    "%{x}": ["%{x}", "%{customdata}", "%{fullData.name}<extra></extra>", "\\", "\n", "\t", "\x07", "\u202eabc"],
    "kinds": ["1", "2024-01-01", "true", None, "none", "", " ", "#ff0000"],
    "other scripts": ["中文", "日本語", "한국어", "مرحبا", "🙂🧠", "\u200b"],
    "long": ["x" * 3000, "x" * 3000 + "y", "x" * 2999, OTHERS],
    "covered mass": [1.5, float("nan"), None, 2.0],
    "flag": [True, False, None, True],
    "__proto__": ["constructor", "toString", "__proto__", "0"],
}
LAYERS = ("m.$a$.3", "m._b<b>.3", "m.a..中.3")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    layers = {name: planted("common", i, count=48, width=20)[0] for i, name in enumerate(LAYERS)}
    return write_factors(tmp_path_factory.mktemp("markup") / "out", layers, values=VALUES)


@pytest.fixture(scope="module")
def data(results):
    return page_data(survey(results, Sampling()))


def strings(value, key=""):
    """Every string of a figure with the property that it belongs to."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from strings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner, key)


@pytest.mark.parametrize("column", VALUES)
def test_every_value_has_its_own_entry_in_the_legends(data, column):
    labels = set(data["rows"]["groups"][visible(column)])
    assert len(labels) == len({(type(value), str(value)) for value in VALUES[column]})
    for layer in data["layers"]:
        for kind in ("scatter", "similarity"):
            names = [
                trace["name"] for trace in layer["figures"][f"{kind} by {visible(column)}"]["data"] if "name" in trace
            ]
            assert {html.unescape(name) for name in names} - {"unlike the rest"} == labels
            assert not any(set(name) & set("<>$%@{}\n\t") for name in names)


def test_no_figure_holds_data_but_as_escaped_names_and_ticks(data):
    figures = [figure for layer in data["layers"] for figure in layer["figures"].values()]
    figures += data["layer_figures"].values()
    for figure in figures:
        for key, text in strings(figure):
            if key in ("name", "text", "ticktext"):
                ours = {"covered<br>mass", "5% to 95%", "25% to 75%"}
                assert text in ours or not set(text) & set("<>$%@{}")
            else:
                assert "color" in key or not text.startswith("@")
            if key == "hovertemplate":
                assert set(re.findall(r"%\{(\w+)", text)) <= {"x", "y", "text"}
                assert re.sub(r"<extra></extra>$", "", text).isascii() and "<" not in text[:-15]
        for name, axis in figure["layout"].items():
            assert "axis" not in name or axis["type"] in ("linear", "log")


def test_a_column_named_as_the_pages_own_choice_is_another_one(data):
    figures = data["layers"][0]["figures"]
    assert {"scatter", "scatter by covered mass", "similarity", "similarity by covered mass"} <= figures.keys()
    assert figures["scatter"]["data"][0]["name"] == "prompts"


def test_the_command_writes_page_and_images_and_says_nothing_on_the_way(results, tmp_path, capsys, caplog):
    out = tmp_path / "look.html"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([str(results.folder), "--output", str(out), "--quiet"]) == 0
    shown = capsys.readouterr()
    assert "Glyph" not in shown.err and "findfont" not in shown.err + caplog.text
    text = out.read_text("utf-8")
    (shown,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert set(json.loads(shown)["rows"]["groups"]["<b>tags<b>"]) == set(VALUES["<b>tags<b>"])
    names = {
        path.relative_to(tmp_path / "look").as_posix() for path in (tmp_path / "look").rglob("*") if path.is_file()
    }
    kinds = ("prompts", "similarity", "spectra")
    layers = ("m._a_.3", "m._b_b_.3", "m.a..中.3")
    assert names == {"layers.png", *(f"{kind}.{layer}.png" for kind in kinds for layer in layers)}


@pytest.mark.parametrize("column", ["formula", "_hidden", "<b>tags<b>", "other scripts", "long"])
def test_each_column_can_be_the_legend_of_the_images(tmp_path, column, monkeypatch):
    """The first kept column is the legend of the similarity map."""
    legends = []
    real = images._similarity

    def seen(*arguments):
        figure = real(*arguments)
        legends.extend(figure.axes[0].get_legend().get_texts())
        return figure

    monkeypatch.setattr(images, "_similarity", seen)
    factors = planted("common", 0, count=24, width=14)[0]
    results = write_factors(tmp_path / "out", {"m.$x$": factors}, values={column: VALUES[column]})
    found = survey(results, Sampling())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(images.write_images(tmp_path / "images", found)) == 3
    labels = {value for values in found.rows.groups.values() for value in values}
    assert len({text.get_text() for text in legends}) == len(labels) == len(legends)
    assert not any(text.get_parse_math() or text.get_usetex() or not text.get_visible() for text in legends)


@pytest.fixture
def no_other_fonts(monkeypatch):
    monkeypatch.setattr(images, "_other_families", lambda: ["DejaVu Sans"])


@pytest.mark.parametrize("text", ["中文", "日本 x", "🧠", "한국어"])
def test_what_no_font_has_is_its_code_point_with_one_line(no_other_fonts, caplog, text):
    caplog.set_level(logging.INFO, "fisher_vmap")
    lettering = images.Lettering([text, "plain"])
    drawn = lettering.drawn(text)
    missing = [c for c in text if not c.isascii()]
    assert drawn.isascii() and all(f"U+{ord(c):04X}" in drawn for c in missing)
    assert lettering.drawn("plain") == "plain"
    (record,) = caplog.records
    assert (
        "no font of this machine has" in record.getMessage() and f"<U+{ord(min(missing)):04X}>" in record.getMessage()
    )


@pytest.mark.parametrize("text", ["Grüße", "مرحبا", "Привет", "a↵b␣⇥", "❤\ufe0f"])
def test_what_the_usual_font_has_is_drawn_without_a_line(caplog, text):
    caplog.set_level(logging.INFO, "fisher_vmap")
    lettering = images.Lettering([text])
    assert lettering.drawn(text) in (text, text.replace("\ufe0f", "")) and not caplog.records


def test_a_font_of_the_machine_that_has_the_characters_is_used(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fisher_vmap")
    path = tmp_path / "wide.ttf"
    _font(path, "Wide Test", "中文")
    monkeypatch.setattr(images, "findSystemFonts", lambda: [str(path), str(tmp_path / "none.ttf")])
    monkeypatch.setattr(images.fontManager, "ttflist", [f for f in images.fontManager.ttflist if "DejaVu" in f.name])
    (tmp_path / "none.ttf").write_bytes(b"no font")
    lettering = images.Lettering(["中文 x"])
    assert lettering.families[-1] == "Wide Test" and lettering.drawn("中文 x") == "中文 x" and not caplog.records
    factors = planted("common", 0, count=24, width=14)[0]
    results = write_factors(tmp_path / "out", {"m": factors}, values={"中": ["中", "文"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.write_images(tmp_path / "images", survey(results, Sampling()))


def _font(path, name, characters):
    """A font with a square for each character."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for i, point in enumerate([(0, 0), (0, 700), (700, 700), (700, 0)]):
        (pen.moveTo if i == 0 else pen.lineTo)(point)
    pen.closePath()
    square = pen.glyph()
    glyphs = [".notdef", *(f"g{i}" for i in range(len(characters)))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(c): f"g{i}" for i, c in enumerate(characters)})
    builder.setupGlyf(dict.fromkeys(glyphs, square))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_tokens_that_look_alike_are_told_apart_in_the_table(tmp_path):
    factors = planted("common", 0, count=12, width=14)[0]
    words = ["\ufffd", "\ufffd", " the", "the", "the", *["x"] * 3]
    top = survey(write_factors(tmp_path / "a", {"m": factors}, words=words), Sampling()).rows.top
    assert top[0] == "\ufffd<id 0> \ufffd<id 1> ␣the the<id 3> the<id 4>"  # a folder of before: one sign for all parts
    words = ["<0xE4><0xB8>", "<0xE4>", "\u200b", "", "\n", *["x"] * 3]
    top = survey(write_factors(tmp_path / "b", {"m": factors}, words=words), Sampling()).rows.top
    assert top[0] == "<0xE4><0xB8> <0xE4> <U+200B> <id 3> ↵"
    folded = SimpleNamespace(entry=SimpleNamespace(folded=True))
    assert _next_tokens(words, folded, 0) == "<0xE4><0xB8> <0xE4> <U+200B> ∅ ↵"  # of a mean alone there are no ids
    details = page_data(survey(write_factors(tmp_path / "d", {"m": factors}, words=words), Sampling()))["details"][0]
    assert details["ids"] == list(range(8)) and details["top"] == words


def test_numbers_of_a_column_whose_shards_differ_in_type_are_one_value(tmp_path):
    values = [1, 2] * 16 + [1.0, 2.5] * 16
    factors = planted("common", 0, count=64, width=14)[0]
    found = survey(write_factors(tmp_path, {"m": factors}, values={"n": values}), Sampling())
    assert set(found.rows.groups["n"]) == {"1.0", "2.0", "2.5"}


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_pages_script_shows_tokens_as_the_package_does():
    folder = files("fisher_vmap.report")
    script = (folder / "basics.js").read_text("utf-8") + (folder / "page.js").read_text("utf-8")
    (signs,) = re.findall(r"^const UNSEEN.*?^const visible[^\n]*\n", script, re.DOTALL | re.MULTILINE)
    (names,) = re.findall(r"^function pieceName.*?^}\n", script, re.DOTALL | re.MULTILINE)
    (colours,) = re.findall(r"^function coloured.*?^}\n", script, re.DOTALL | re.MULTILINE)
    texts = [
        "a\nb",
        "\t",
        "\x00\x1b",
        "\u200b",
        "\u202e",
        "a\u200cb",
        "م\u200cخ",
        "👨\u200d👩",
        "\u200d",
        "\u0301e",
        "\u3000",
        "中",
    ]
    figure = {
        "name": "@red",
        "marker": {"color": "@red"},
        "text": ["@red"],
        "line": {"width": 1},
        "colorscale": "@scale",
    }
    asked = f"""
        const colour = () => "#123456";
        console.log(JSON.stringify([{json.dumps(texts)}.map(visible), coloured({json.dumps(figure)}),
          pieceName(["", "", "中", ""], 0), pieceName(["a", ""], 1), visible("")]));"""
    done = subprocess.run(["node", "-e", signs + names + colours + asked], capture_output=True, text=True, timeout=60)
    shown, figure, part, last, empty = json.loads(done.stdout)
    assert shown == [visible(text) for text in texts]
    assert figure["name"] == "@red" and figure["text"] == ["@red"]
    assert figure["marker"]["color"] == figure["colorscale"] == "#123456"
    assert (part, last, empty) == ("part of 中", "∅", "∅")
