"""Data is never markup: each place's signs are gone from what is shown there, and nothing else is."""

import html
import json
import re
import unicodedata

import pytest

from fisher_vmap.escape import (
    code_points,
    distinct_labels,
    file_names,
    plotly_text,
    script_json,
    short,
    visible,
)

MARKUP = (
    "$x$", "$", "a_b", "_hidden", "@red", "#ff0000", "<b>x</b>", '<a href="javascript:alert(1)">x</a>', "&amp;",
    "&#36;", "%{x}", "%{customdata[0]}<extra></extra>", "{}", "{0}", r"\alpha", r"\$", "x^2", "a\nb", "a\tb",
    "\x1b[31mred", "\x00", "</script><script>alert(1)</script>", "\u2028", "\u202eabc", "a\u200bb", "中文", "مرحبا",
    "🙂", "", " ", "| a | b |", "`x`", "1", "2024-01-01", "true", "none", "nan",
)  # fmt: skip
LONG = f"{'x' * 26}…{'x' * 13}"


@pytest.mark.parametrize("text", MARKUP)
def test_every_character_can_be_seen_and_stays_on_its_line(text):
    shown = visible(text)
    assert "\n" not in shown and shown == shown.strip()
    assert all(c == " " or unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp", "Zs") for c in shown)
    assert visible(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a↵b⇥c"), ("\x1b[0m", "<U+001B>[0m"), ("a\u200bb", "a<U+200B>b"), ("\u202eabc", "<U+202E>abc"),
        (" a  b ", "␣a␣␣b␣"), ("a b", "a b"), ("a\u00a0b", "a<U+00A0>b"), ("\u0301e", "<U+0301>e"), ("é", "é"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"), ("👨\u200d👩", "👨\u200d👩"), ("\u200d", "<U+200D>"),
        ("a\u200cb", "a<U+200C>b"),
        ("\ufeffx", "<U+FEFF>x"), ("\u3164", "<U+3164>"), ("\ud800", "<U+D800>"), ("\U000e0041", "<U+E0041>"), ("", ""),
    ],
)  # fmt: skip
def test_what_is_shown_for_it(text, shown):
    assert visible(text) == shown


def test_spaces_of_a_sentence_stay():
    assert visible(" a  b\n", spaces=False) == " a  b↵"
    assert visible("plain  text", spaces=False) == "plain  text"


@pytest.mark.parametrize("text", MARKUP)
def test_plotly_finds_no_tag_no_entity_no_formula_no_template_and_no_colour(text):
    safe = plotly_text(text)
    assert html.unescape(safe) == text or text == "\x00"
    assert not set(safe) & set("<>$%@{}")
    assert re.sub(r"&#\d+;", "", safe).count("&") == 0


@pytest.mark.parametrize("text", MARKUP)
def test_a_script_element_cannot_be_left(text):
    safe = script_json({text: [text, "\u2029"]})
    assert not set(safe) & set("<>&\u2028\u2029\x00\n")
    assert json.loads(safe) == {text: [text, "\u2029"]}


def test_half_a_character_can_be_written():
    assert json.loads(script_json("a\ud800").encode()) == "a\ud800"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1, "1", True, "True", 1], ["1 (number)", "1 (text)", "True (true or false)", "True (text)", "1 (number)"]),
        ([None, "none", float("nan"), "nan"], ["none (missing)", "none (text)", "nan (number)", "nan (text)"]),
        (["a", "a\n", "a↵", "a"], ["a", "a↵", "a↵ #2", "a"]),
        (["", " ", "\u200b"], ["(empty)", "␣", "<U+200B>"]),
        (["others", "x"], ["others (text)", "x"]),
        (["x" * 99, "x" * 98 + "y"], [LONG, f"{LONG[:-1]}y"]),
        (["x" * 99, "x" * 98, "x" * 99], [LONG, f"{LONG} #2", LONG]),
        ([0, False, 0.0], ["0", "False", "0.0"]),
    ],
)  # fmt: skip
def test_labels_are_different_where_values_are(values, labels):
    assert distinct_labels(values, taken=["others"]) == labels


def test_labels_of_all_kinds_of_markup_are_different():
    labels = distinct_labels(MARKUP)
    assert len(set(labels)) == len(MARKUP) and all(labels) and max(map(len, labels)) <= 45


def test_a_long_text_keeps_both_ends():
    assert short("abcdefghij", 10) == "abcdefghij" and short("abcdefghijk", 10) == "abcdef…ijk"
    assert code_points("中文") == "<U+4E2D U+6587>"


def test_names_of_files_are_no_paths_and_differ():
    long = ["x" * 500, "x" * 500 + "y"]
    names = ["m.3", "../up", "a/b", "a\\b", "CON", *long, "H.1", "h.1", "$x$", ".", "..", "", "a\nb", "中"]
    found = file_names(names)
    assert found[0] == "m.3" and len({name.casefold() for name in found}) == len(names)
    for name in found:
        assert 0 < len(name) <= 130 and not set(name) & set('/\\:*?"<>|\n') and not name.startswith(".")
