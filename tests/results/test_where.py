"""Which prompts `where` chooses: every form of it, for every method that takes one, and what is refused."""

import datetime as dt
import re
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from results_cases import make_layout, make_prompt, make_prompts, open_writer

from fisher_vmap.errors import UserError
from fisher_vmap.export import condition
from fisher_vmap.results.reader import open_results

N = 10
OK = [0, 1, 4, 5, 6, 7, 8, 9]  # 2 failed, 3 was skipped
KEPT = {
    "kind": list("abcabcabca"),
    "level": [1, 2, 3, 1, 2, 3, 1, 2, 3, None],
    "digit": ["1", "2", "3", "1", "2", "3", "1", "2", "3", None],
    "score": [0.5, float("nan"), 1.0, 1.5, 2.0, None, 0.5, 1.0, 3.0, 0.5],
    "flag": [True, False, None, True, False, True, False, True, False, True],
    "day": [dt.date(2024, 5, 1 + i % 3) for i in range(N)],
    "tags": [["a"], ["b"], ["a", "b"], None, [], ["a"], ["b"], ["a"], ["b"], ["a"]],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("where")
    layout = make_layout({"a": 6}, keep_columns=tuple(KEPT))
    writer = open_writer(folder, layout, shard_size=4)
    for number, start, stop in writer.missing_shards(N):
        prompts = make_prompts(start, stop, layout)
        for prompt in prompts:
            object.__setattr__(prompt, "kept", {name: values[prompt.index] for name, values in KEPT.items()})
        writer.add(number, prompts)
    writer.finish(settings={})
    return open_results(folder)


def dense(results, chosen):
    return np.mean([results[i].matrix().astype(np.float64) for i in chosen], 0)


def chosen_by(results, where):
    """The prompts, by the stack: those without numbers too."""
    stack = results.stack(where=where)
    every = results.stack()
    found = [i for i in range(N) for S in stack.S if i in OK and np.array_equal(every.S[i], S)]
    return found + [None] * int(np.isnan(stack.S).any(1).sum())


def check_every_method(results, where, expected):
    """mean, stack, directions, contrast and residual_norm take the same prompts, those of OK in `expected`."""
    have = [i for i in expected if i in OK]
    others = [i for i in OK if i not in expected]
    assert [i for i in chosen_by(results, where) if i is not None] == have
    mean = dense(results, have)
    np.testing.assert_allclose(results.mean(where=where), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(results.directions(1, where=where).S, np.linalg.eigvalsh(mean)[-1:], rtol=1e-5)
    np.testing.assert_allclose(results.mean_factors(where=where).S[:1], np.linalg.eigvalsh(mean)[-1:], rtol=1e-5)
    assert results.residual_norm(where=where) == pytest.approx(np.mean([3.0 + i for i in have]), rel=1e-5)
    if others:
        found = results.contrast(where, rank=1)
        v = found.directions[0]
        assert found.inside[0] == pytest.approx(v @ mean @ v, rel=1e-3)
        assert found.outside[0] == pytest.approx(v @ dense(results, others) @ v, rel=1e-3, abs=1e-6)
        turned = results.contrast(others, where, rank=1)
        v = turned.directions[0]
        assert turned.outside[0] == pytest.approx(v @ mean @ v, rel=1e-3, abs=1e-6)


def of_table(results, make):
    return make(results.to_pandas())


@pytest.mark.parametrize(
    "order",
    [
        lambda mask: mask,
        lambda mask: mask[::-1],
        lambda mask: mask.sample(frac=1, random_state=1),
        lambda mask: mask.sort_values(),
        lambda mask: mask.astype("boolean"),
        lambda mask: mask.drop([2, 3]),  # they have no numbers
        lambda mask: mask.astype(object),
    ],
    ids=["as it is", "reversed", "shuffled", "sorted", "nullable", "without the failed", "objects"],
)
def test_a_series_goes_by_its_index(results, order):
    mask = order(results.to_pandas()["kind"] == "a")
    check_every_method(results, mask, [0, 6, 9])


def test_a_series_of_a_filtered_and_sorted_table(results):
    table = results.to_pandas().query("status == 'ok'").sort_values("a/trace", ascending=False)
    check_every_method(results, table["tokens"] >= 0, OK)
    check_every_method(results, table["prompt_index"] % 2 == 1, [1, 5, 7, 9])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda t: (t["kind"] == "a").iloc[:5], "has 5 of 10 prompts and lacks prompt 5; .*reindex"),
        (lambda t: (t["kind"] == "a").set_axis(list("abcdefghij")), "not labelled by prompt: 'a' is no prompt number"),
        (lambda t: (t["kind"] == "a").set_axis(range(1, 11)), "not labelled by prompt: 10 is no prompt number"),
        (lambda t: (t["kind"] == "a").set_axis([0] * 10), "a label is there twice"),
        (lambda t: (t["kind"] == "a").set_axis(t["kind"] == "a"), "True is no prompt number|False is no prompt number"),
        (lambda t: (t["kind"] == "a").where(t.index > 2), "has 3 missing of 10 values; fill them, such as by .fillna"),
        (lambda t: t["flag"], "has 1 missing of 10 values"),
        (lambda t: t["kind"], r"where is an array \(10,\) of str; expected \(10,\) booleans or a list of prompt"),
        (lambda t: t["score"].fillna(0), "of float64?; expected"),
        (lambda t: t[["kind"]] == "a", "where is DataFrame .*; expected"),
    ],
)
def test_a_series_that_does_not_say_which_prompts(results, make, said):
    refused_by_every_method(results, of_table(results, make), said)


def refused_by_every_method(results, where, said):
    for call in (
        lambda: results.mean(where=where), lambda: results.stack(where=where), lambda: results.contrast(where),
        lambda: results.directions(1, where=where), lambda: results.residual_norm(where=where),
        lambda: results.contrast([0], where), lambda: results.mean_factors(where=where),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)


MASK = [i in (1, 5, 8) for i in range(N)]


@pytest.mark.parametrize(
    "mask",
    [
        MASK, tuple(MASK), np.array(MASK), np.array(MASK, object), torch.tensor(MASK), pa.array(MASK),
        pa.chunked_array([MASK[:3], MASK[3:]]), pd.array(MASK), pd.array(MASK, dtype="boolean"), pd.Index(MASK),
        [np.bool_(value) for value in MASK],
    ],
    ids=lambda mask: type(mask).__name__,
)  # fmt: skip
def test_booleans_by_length(results, mask):
    check_every_method(results, mask, [1, 5, 8])


@pytest.mark.parametrize(
    "numbers",
    [
        [8, 1, 5], (1, 5, 8), {1, 5, 8}, np.array([1, 5, 8]), torch.tensor([5, 8, 1]), pd.Index([1, 5, 8]),
        pd.Series([8, 5, 1]), range(2, 9, 3), np.array([1, 5, 8], np.uint8), {1: "x", 5: "y", 8: "z"}.keys(),
    ],
    ids=lambda numbers: type(numbers).__name__,
)  # fmt: skip
def test_prompt_numbers(results, numbers):
    check_every_method(results, numbers, list(range(2, 9, 3)) if isinstance(numbers, range) else [1, 5, 8])


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ([True] * 3, r"where is an array \(3,\) of bool; expected \(10,\) booleans"),
        (np.ones((10, 1), bool), r"where is an array \(10, 1\) of"),
        ([True, None] * 5, "has 5 missing of 10 values"),
        (pd.array([True, None] * 5, dtype="boolean"), "has 5 missing of 10 values"),
        (np.array([0, 1] * 5), "10 integers 0 and 1, which may be a mask or prompt numbers"),
        ([1, 1, 2], "has 3 prompt numbers, and a prompt is there twice"),
        ([4, 10], "prompt 10 is not stored; expected different ones of 0 to 9"),
        ([-1, 3], "prompt -1 is not stored"),
        (np.ones(10), "of float64; expected"),
        ([True, 1, 2], "of bool and int"),
        (["a", "b"], r"where is an array \(2,\) of str; expected"),
        ([[1], [2, 3]], "of lists; expected"),
        ("kind=a", "where is str 'kind=a'; expected {column: value}"),
        (3, "where is int 3; expected"),
        (True, "where is bool True; expected"),
        (np.zeros(0, bool), r"where is an array \(0,\) of bool; expected \(10,\)"),
    ],
)
def test_what_is_neither(results, where, said):
    refused_by_every_method(results, where, said)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"kind": "a"}, [0, 6, 9]),
        ({"kind": ["a", "b"]}, [0, 1, 4, 6, 7, 9]),
        ({"kind": ("a", "b")}, [0, 1, 4, 6, 7, 9]),
        ({"kind": {"c"}}, [5, 8]),
        ({"kind": np.array(["c", "b"])}, [1, 4, 5, 7, 8]),
        ({"kind": pd.Index(["c"])}, [5, 8]),
        ({"kind": pd.Series(["c", "a"], index=[7, 5])}, [0, 5, 6, 8, 9]),
        ({"kind": np.str_("c")}, [5, 8]),
        ({"kind": pd.Categorical(["c"])}, [5, 8]),
        ({"kind": pa.array(["c"])}, [5, 8]),
        ({"level": 1}, [0, 6]),
        ({"level": "1"}, [0, 6]),
        ({"level": 1.0}, [0, 6]),
        ({"level": "1.0"}, [0, 6]),
        ({"level": Decimal(1)}, [0, 6]),
        ({"level": np.int8(1)}, [0, 6]),
        ({"level": torch.tensor([1, 2])}, [0, 1, 4, 6, 7]),
        ({"level": range(2, 4)}, [1, 4, 5, 7, 8]),
        ({"level": None}, [9]),
        ({"level": float("nan")}, [9]),
        ({"level": pd.NA}, [9]),
        ({"level": [None, 1]}, [0, 6, 9]),
        ({"digit": 1}, [0, 6]),
        ({"digit": "1"}, [0, 6]),
        ({"digit": [1, "3", None]}, [0, 5, 6, 8, 9]),
        ({"digit": np.array([1, 3])}, [0, 5, 6, 8]),
        ({"score": 0.5}, [0, 6, 9]),
        ({"score": "0.5"}, [0, 6, 9]),
        ({"score": 1}, [7]),
        ({"score": None}, [1, 5]),
        ({"score": np.float32(0.5)}, [0, 6, 9]),
        ({"flag": True}, [0, 5, 7, 9]),
        ({"flag": "true"}, [0, 5, 7, 9]),
        ({"flag": "False"}, [1, 4, 6, 8]),
        ({"flag": np.bool_(False)}, [1, 4, 6, 8]),
        ({"flag": 1}, [0, 5, 7, 9]),
        ({"day": "2024-05-01"}, [0, 6, 9]),
        ({"day": dt.date(2024, 5, 1)}, [0, 6, 9]),
        ({"day": pd.Timestamp("2024-05-01")}, [0, 6, 9]),
        ({"day": pd.to_datetime(["2024-05-01", "2024-05-02"])}, [0, 1, 4, 6, 7, 9]),
        ({"day": np.datetime64("2024-05-01", "ns")}, [0, 6, 9]),
        ({"tags": [["b"]]}, [1, 6, 8]),
        ({"tags": '["b"]'}, [1, 6, 8]),
        ({"kind": "a", "level": [1, None]}, [0, 6, 9]),
        ({}, OK),
        (lambda row: row["level"] == 1, [0, 6]),
        (lambda row: re.match("a|b", row["kind"]), [0, 1, 4, 6, 7, 9]),
        (lambda row: row["day"] > dt.date(2024, 5, 2), [5, 8]),
    ],
    ids=lambda value: None if "0x" in str(value) else str(value),
)  # fmt: skip
def test_values_of_columns(results, where, expected):
    check_every_method(results, where, expected)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"sort": "a"}, "the prompts table has no column 'sort'; there is prompt_index"),
        ({3: "a"}, "no column 3"),
        ({"level": "one"}, r"level holds numbers, and 'one' \(str\) cannot be read as one of them"),
        ({"level": [1, "x"]}, r"level holds numbers, and 'x'"),
        ({"level": {"a": 1}}, r"level holds numbers, and \{'a': 1\} \(dict\)"),
        ({"level": dt.date(2024, 1, 1)}, "level holds numbers, and datetime.date"),
        ({"flag": "maybe"}, "flag holds booleans, and 'maybe'"),
        ({"flag": 2}, "flag holds booleans, and 2"),
        ({"day": "May 1st"}, "day holds dates, and 'May 1st'"),
        ({"day": 20240501}, "day holds dates, and 20240501"),
        ({"day": dt.datetime(2024, 5, 1, 12)}, "day holds dates, and datetime"),
        ({"kind": len}, r"kind holds text, and <built-in function len> \(builtin_function_or_method\)"),
        ({"top_tokens": "yes"}, "top_tokens holds lists, .*function of the row"),
        (lambda row: row["levle"], r"the function given as where fails for prompt 0 \(KeyError: 'levle'\)"),
        (lambda row: row["level"] > 1, r"fails for prompt 9 \(TypeError: '>' not supported between"),
        (lambda row: row["score"], "answers nan for prompt 1; expected a boolean"),
        (lambda row: pd.NA, "answers <NA> for prompt 0|fails for prompt 0"),
    ],
)
def test_values_that_no_row_can_have(results, where, said):
    refused_by_every_method(results, where, said)


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ({"kind": ["x", "y"]}, "no prompt has kind in ['x', 'y']; there are a, b, c"),
        ({"kind": []}, "no prompt has kind in []; there are a, b, c"),
        ({"level": "7"}, "no prompt has level == '7'; there are 1, 2, 3"),
        ({"kind": {"a": 1}}, "no prompt has kind == {'a': 1}; there are a, b, c"),
        ({"kind": None}, "no prompt has kind == None; there are a, b, c"),
        ([], "no prompt is chosen, of 10"),
        ([2], "none of the 1 prompts that are chosen has numbers: they were skipped or have failed"),
    ],
)
def test_nobody_is_chosen(results, where, line):
    assert np.isnan(results.mean(where=where)).all() and np.isnan(results.residual_norm(where=where))
    for call in (lambda: results.directions(1, where=where), lambda: results.contrast(where)):
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value) == line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind=a", [0, 6, 9]), ("level=1", [0, 6]), ("level=01", [0, 6]), ("digit=3", [5, 8]),
        ("score=0.50", [0, 6, 9]), ("flag=true", [0, 5, 7, 9]), ("flag=True", [0, 5, 7, 9]),
        ("day=2024-05-02", [1, 4, 7]), ("level=", [9]),
        ("level=None", [9]), ("score=nan", [1, 5]), ('tags=["b"]', [1, 6, 8]), ("digit=none", [9]),
    ],
)  # fmt: skip
def test_the_words_of_the_command_line(results, text, expected):
    check_every_method(results, condition(results, text), expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind=z", "no prompt has kind 'z'; there is a, b, c"),
        ("kind=", "no prompt has kind ''; there is a, b, c"),
        ("level=x", "level holds numbers, and 'x'"),
        ("day=yesterday", "day holds dates"),
        ("day=2023-01-01", "no prompt has day '2023-01-01'; there is 2024-05-01, 2024-05-02, 2024-05-03"),
        ("nope=1", "does not choose prompts; expected COLUMN=VALUE, of kind"),
    ],
)
def test_words_that_choose_nobody(results, text, said):
    with pytest.raises(UserError, match=re.escape(said)):
        condition(results, text)


def test_an_unfinished_folder_with_a_gap_goes_by_prompt_numbers(tmp_path):
    layout = make_layout({"a": 6}, keep_columns=("kind",))
    writer = open_writer(tmp_path, layout, shard_size=2)
    writer.missing_shards(8)
    for number in (0, 3):
        writer.add(number, [make_prompt(i, layout) for i in (2 * number, 2 * number + 1)])
    results = open_results(tmp_path, allow_incomplete=True)
    table = results.to_pandas()
    assert table.index.tolist() == table["prompt_index"].tolist() == [0, 1, 6, 7]
    expected = np.mean([results[i].matrix() for i in (1, 7)], 0)
    mask = table["kind"] == "kind 1"
    for where in (mask, mask[::-1], mask.to_numpy(), [1, 7], table.index[mask], {"kind": "kind 1"}):
        np.testing.assert_allclose(results.mean(where=where), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="2 is no prompt number"):
        results.mean(where=mask.reset_index(drop=True))
