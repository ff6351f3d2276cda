"""The report's section on a Jacobian lens: what is shown, that data is never markup, and what is told of bad files."""

import json
import re
import shutil
import subprocess

import pytest
from report_cases import planted, write_factors

from fisher_vmap.errors import UserError
from fisher_vmap.escape import visible
from fisher_vmap.report.__main__ import main
from fisher_vmap.report.lens import lens_section, read_readouts

NASTY = '</script><script>alert("x")</script>'
TOKENS = ["The", " sky", NASTY, "\u202eabc", "\n", ""]


def readout(text="The sky", *, kl=True, layers=(0, 3, 10)):
    """Two tokens a cell; the first of layer l at position t is f"l{l}t{t}", with log p -(l + t) / 10."""

    def row(name, sign):
        return [[[f"{name}t{t}", sign * (t + 1) / 10], [NASTY, -2.5]] for t in range(len(TOKENS))]

    found = {"text": text, "tokens": TOKENS, "layers": list(layers), "model": row("m", -1)}
    found["top"] = {str(layer): row(f"l{layer}", -1) for layer in layers}
    return found | ({"kl": {str(layer): row(f"k{layer}", 1) for layer in layers}} if kl else {})


def stored(folder, *readouts):
    folder.mkdir(exist_ok=True)
    (folder / "readouts.json").write_text(json.dumps({"readouts": list(readouts)}), encoding="utf-8")
    return folder


def data_of(page, name="lens-data"):
    (found,) = re.findall(rf'<script id="{name}" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    factors = planted("common", 0, count=12, width=14)[0]
    return write_factors(tmp_path_factory.mktemp("lens") / "out", {"m": factors}).folder


@pytest.mark.needs("matplotlib", "plotly", "scipy")
def test_the_page_has_the_section_only_when_asked(results, tmp_path, capsys):
    lens, page = stored(tmp_path / "lens", readout()), tmp_path / "page.html"
    words = [str(results), "--no-images", "--output", str(page)]
    assert main(words) == 0
    assert 'id="lens"' not in page.read_text("utf-8") and "lens-data" not in page.read_text("utf-8")
    assert main([*words, "--lens", str(lens)]) == 0
    assert "1 read by a lens" in capsys.readouterr().out
    whole = page.read_text("utf-8")
    assert '<section id="lens">' in whole and '<a href="#lens">' in whole and len(data_of(whole)["prompts"]) == 1
    assert data_of(whole, "data")["total"] == 12
    assert main([*words, "--lens", str(lens / "readouts.json")]) == 0
    assert page.read_text("utf-8") == whole


@pytest.mark.needs("matplotlib", "plotly", "scipy")
def test_a_missing_lens_is_told_and_nothing_is_written(results, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main([str(results), "--output", str(page), "--lens", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "readouts.json is missing" in error and "fisher-vmap lens" in error
    assert not page.exists()


def test_a_folder_of_a_lens_alone_gets_a_page_of_its_own(tmp_path, capsys):
    folder = stored(tmp_path / "<b>lens", readout(), readout(None, kl=False))
    assert main([str(folder)]) == 0
    assert "2 prompts read by a lens" in capsys.readouterr().out
    page = (folder / "report.html").read_text("utf-8")
    assert '<section id="lens">' in page and 'id="glance"' not in page and "Plotly" not in page
    assert "default-src 'none'" in page and "src=" not in page.replace("default-src", "").replace("script-src", "")
    assert "&lt;b&gt;lens" in page and "<b>lens" not in page


def test_rows_are_layers_the_highest_first_and_values_are_those_of_the_file(tmp_path):
    data = data_of_section(tmp_path, readout(layers=(3, 10, 0)))
    (prompt,), words = data["prompts"], data["words"]
    assert prompt["layers"] == [10, 3, 0]
    assert [words[i] for i in prompt["tokens"]] == [visible(token) or "∅" for token in TOKENS]
    for row, layer in enumerate(prompt["layers"]):
        for t in range(len(TOKENS)):
            word, log_prob, other, second = prompt["top"][row][t]
            assert (words[word], log_prob, words[other], second) == (f"l{layer}t{t}", -(t + 1) / 10, NASTY, -2.5)
            assert words[prompt["kl"][row][t][0]] == f"k{layer}t{t}"
    assert [words[cell[0]] for cell in prompt["model"]] == [f"mt{t}" for t in range(len(TOKENS))]


def data_of_section(folder, *readouts, most=10):
    return json.loads(lens_section(read_readouts(stored(folder, *readouts)), most).data)


def test_tokens_are_never_markup(tmp_path):
    folder = stored(tmp_path, readout(NASTY))
    assert main([str(folder)]) == 0
    page = (folder / "report.html").read_text("utf-8")
    assert "alert" in page and NASTY not in page and page.count("<script") == 2
    data = data_of(page)
    assert data["prompts"][0]["text"] == NASTY
    assert {"<U+202E>abc", "↵", "∅", "␣sky"} <= set(data["words"])


def test_without_kl_there_is_no_switch(tmp_path):
    for number, kl in enumerate((None, {}, readout()["kl"])):
        folder = stored(tmp_path / str(number), readout() | {"kl": kl})
        assert main([str(folder)]) == 0
        page = (folder / "report.html").read_text("utf-8")
        assert ('id="lens-order"' in page) == bool(kl)
        assert (data_of(page)["prompts"][0]["kl"] is not None) == bool(kl)


def test_only_so_many_prompts_are_shown_and_the_page_says_so(tmp_path):
    folder = stored(tmp_path, *[readout(f"text {i}") for i in range(5)])
    assert main([str(folder), "--details", "2"]) == 0
    page = (folder / "report.html").read_text("utf-8")
    assert [prompt["text"] for prompt in data_of(page)["prompts"]] == ["text 0", "text 1"]
    assert "The first 2 of 5 prompts." in page


def test_without_its_text_a_prompt_is_named_by_its_tokens(tmp_path):
    (prompt,) = data_of_section(tmp_path, readout(None))["prompts"]
    assert prompt["text"].startswith("The sky")


def test_a_value_that_is_no_number_is_shown_as_none(tmp_path):
    one = readout()
    one["top"]["3"][0][0][1] = float("-inf")
    assert data_of_section(tmp_path, one)["prompts"][0]["top"][1][0][1] is None


def changed(**fields):
    return {"readouts": [readout() | fields]}


BAD = {
    "no JSON": "{",
    "empty": "",
    "no bytes of text": b"\xff\xfe",
    "a list": [],
    "another file": {"J": 1},
    "no prompts": {"readouts": []},
    "no tokens": changed(tokens=[]),
    "too few positions": changed(model=readout()["model"][:-1]),
    "too few positions of a layer": changed(top=readout()["top"] | {"3": []}),
    "too few positions by KL": changed(kl=readout()["kl"] | {"3": []}),
    "a layer without a row": changed(layers=[0, 7]),
    "a token that is a number": changed(tokens=[1] * len(TOKENS)),
    "a layer that is a word": changed(top={"a": []}),
    "a value that is a word": changed(model=[[["a", "b"]]] * len(TOKENS)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_readout_is_one_line(tmp_path, capsys, name):
    bad = BAD[name]
    text = bad if isinstance(bad, bytes) else (bad if isinstance(bad, str) else json.dumps(bad)).encode()
    (tmp_path / "readouts.json").write_bytes(text)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "readouts.json" in error and "fisher-vmap lens" in error
    assert "Traceback" not in error and not (tmp_path / "report.html").exists()


def test_a_file_that_is_missing_is_told_from_python_too(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        read_readouts(tmp_path / "none.json")


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_scripts_can_be_parsed(tmp_path):
    assert main([str(stored(tmp_path, readout()))]) == 0
    script = re.findall(r"<script>(.*?)</script>", (tmp_path / "report.html").read_text("utf-8"), re.DOTALL)[-1]
    (tmp_path / "page.js").write_text(script, encoding="utf-8")
    done = subprocess.run(["node", "--check", str(tmp_path / "page.js")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
