"""Two folders of the same prompts: each number against dense float64 matrices, and what is refused."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
from report_cases import planted, write_factors
from results_cases import make_layout, make_prompt, make_prompts, open_writer, without_numbers, write_folder

from fisher_vmap import algebra
from fisher_vmap.errors import UserError
from fisher_vmap.results import means
from fisher_vmap.results.comparison import GROUPS
from fisher_vmap.results.reader import open_results
from fisher_vmap.results.shard_reader import ShardReader

OK = [0, 1, *range(4, 11)]  # of eleven prompts, 2 and 3 have no numbers
WIDTHS = {"blocks.0": 7, "blocks.1": 7}
COLUMN = ("kind",)


def write(folder, prompts, layout, *, shard_size=4, finish=True, save="both"):
    """A folder of these prompts."""
    writer = open_writer(folder, layout, shard_size=shard_size)
    for number, start, stop in writer.missing_shards(len(prompts)):
        writer.add(number, prompts[start:stop])
    if finish:
        writer.finish(settings={}, save=save, export_npz=False)
    return open_results(folder, allow_incomplete=not finish)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folders whose ranks, numbers of tokens and shards differ."""
    out = tmp_path_factory.mktemp("two")
    write_folder(out / "a", 11, make_layout(WIDTHS, keep_columns=COLUMN), seed=1)
    write_folder(out / "b", 11, make_layout(WIDTHS, top_k=5, rank=4, keep_columns=COLUMN), seed=2, shard_size=3)
    return open_results(out / "a"), open_results(out / "b")


def dense(record):
    S, V = record.S.astype(np.float64), record.V.astype(np.float64)
    return (V.T * S) @ V


def mean(results, prompts=OK):
    return np.mean([dense(results[i]) for i in prompts], axis=0)


@pytest.mark.parametrize("layer", WIDTHS)
def test_each_number_is_that_of_the_dense_matrices(two, layer):
    a, b = (results.at(layer) for results in two)
    found = a.compare(b)
    assert found.prompt_index.tolist() == OK and found.left_out == 2 and found.matched_by == "text"
    assert found.layers == (layer, layer) and found.folders == (a.folder, b.folder)
    for place, i in enumerate(OK):
        A, B = dense(a[i]), dense(b[i])
        norms = np.linalg.norm(A), np.linalg.norm(B)
        V = a[i].V[a[i].S > 0].astype(np.float64)
        P = V.T @ np.linalg.pinv(V @ V.T) @ V
        expected = {
            "cosine": np.trace(A @ B) / np.prod(norms),
            "change": np.linalg.norm(B - A) / sum(norms),
            "trace_a": a[i].trace,
            "trace_b": b[i].trace,
            "ratio": b[i].trace / a[i].trace,
            "outside": 1 - np.trace(P @ B) / np.trace(B),
            "overlap": algebra.overlap(a[i], b[i]),
        }
        for name, value in expected.items():
            assert getattr(found, name)[place] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert (np.diff(found.change[found.order()]) <= 0).all()


def test_the_directions_are_generalised_eigenvectors_of_the_means(two):
    a, b = two
    found = a.compare(b, rank=3, ridge=0.05).directions
    A, B = mean(a), mean(b)
    r = 0.05 * np.trace(A) / 7
    ratios = np.sort(np.linalg.eigvals(np.linalg.solve(A + r * np.eye(7), B)).real)[::-1]
    np.testing.assert_allclose(found.ratios, ratios[:3], rtol=1e-5)
    for v, inside, outside in zip(found.directions, found.inside, found.outside, strict=True):
        assert (v @ B @ v, v @ A @ v) == pytest.approx((inside, outside), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("by", [None, "kind"])
def test_the_tokens_are_those_whose_probability_changes_most(two, by):
    a, b = two
    found = a.compare(b, rank=2, by=by)
    for group in (found.all, *found.groups.values()):
        for v, traded in zip(group.directions.directions, group.tokens, strict=True):
            change = {}
            for i in group.prompt_index.tolist():
                moved = np.exp(b[i].log_probs.astype(float)) * (b[i].scores().astype(float) @ v)
                for token, value in zip(b[i].token_ids.tolist(), moved, strict=True):
                    change[token] = change.get(token, 0.0) + value
            order = sorted(change, key=change.get)
            assert [token.token_id for token in traded.up] == order[::-1][: len(traded.up)]
            assert [token.token_id for token in traded.down] == order[: len(traded.down)]
            for token in traded.up + traded.down:
                assert token.change == pytest.approx(change[token.token_id], rel=1e-4, abs=1e-6)
                assert token.text == f"#{token.token_id}"


def test_any_other_token_is_none(tmp_path):
    layout = make_layout(top_k=3, include_rest=True)
    prompts = [
        replace(make_prompt(i, make_layout()), token_ids=np.array([5, 6, 7, -1])) for i in range(4)
    ]  # the layout's K + 1 outcomes are those of K = 4
    results = write(tmp_path, prompts, layout)
    (first, *_) = results.compare(results).all.tokens
    assert {token.token_id for token in first.up + first.down} <= {5, 6, 7}


@pytest.mark.parametrize("vectors_dtype", ["float32", "float16"])
def test_a_folder_beside_itself(tmp_path, vectors_dtype):
    write_folder(tmp_path, 11, make_layout(WIDTHS, vectors_dtype=vectors_dtype))
    results = open_results(tmp_path)
    found = results.compare(results)
    near = 1e-12  # though vectors in float16 are orthonormal to a thousandth
    np.testing.assert_allclose(found.cosine, 1, atol=1e-9)
    np.testing.assert_allclose(found.change, 0, atol=1e-7)
    np.testing.assert_array_equal(found.ratio, 1)
    np.testing.assert_allclose(found.outside, 0, atol=near)
    np.testing.assert_allclose(found.overlap, 1, atol=near)
    assert (found.directions.ratios < 1).all()


def planted_folders(tmp_path, who, *, width=32, strength=3.0):
    """A folder, and one whose prompts `who` react to one direction more."""
    factors, _, u = planted("common", 0, count=60, few=0, width=width)  # none of them reacts to u
    rows = np.where(who, strength, 0.0)[:, None, None] * u
    kinds = {"kind": ["one", "other", None]}
    a = write_factors(tmp_path / "a", {"m.1": factors}, values=kinds)
    b = write_factors(tmp_path / "b", {"m.1": np.concatenate([factors, rows], 1)}, values=kinds, shard_size=7)
    return a, b, u


@pytest.mark.parametrize("wide", [False, True])
def test_a_planted_direction_is_found(tmp_path, monkeypatch, wide):
    monkeypatch.setattr(means, "DENSE_WIDTH", 16 if wide else 16_384)
    a, b, u = planted_folders(tmp_path, np.arange(60) % 4 == 0)
    found = a.compare(b)
    assert abs(found.directions.directions[0] @ u) > 0.99
    assert found.directions.ratios[0] > 20 and (found.directions.ratios[1:] < 1.05).all()
    assert set(found.order()[:15]) == set(range(0, 60, 4))
    assert (found.outside[::4] > 0.1).all() and np.allclose(np.delete(found.change, range(0, 60, 4)), 0, atol=1e-3)


def test_a_direction_of_one_group_is_found_in_that_group(tmp_path):
    a, b, u = planted_folders(tmp_path, np.arange(60) % 3 == 1)
    found = a.compare(b, by="kind")
    assert found.by == "kind" and found.more_groups == 0
    assert {label: len(group.prompt_index) for label, group in found.groups.items()} == {
        "one": 20, "other": 20, "none": 20
    }  # fmt: skip
    ratios = {label: group.directions.ratios[0] for label, group in found.groups.items()}
    assert ratios["other"] > 20 and max(ratios["one"], ratios["none"]) < 1.05
    assert abs(found.groups["other"].directions.directions[0] @ u) > 0.99
    np.testing.assert_array_equal(found.groups["other"].prompt_index % 3, 1)


def test_the_largest_groups_of_many(tmp_path):
    factors, _, _ = planted("common", 0, count=60, width=12)
    values = {"n": [0, 0, *range(1, 30)]}
    results = write_factors(tmp_path, {"m": factors}, values=values)
    found = results.compare(results, by="n")
    assert len(found.groups) == GROUPS and found.more_groups == 30 - GROUPS and next(iter(found.groups)) == "0"
    assert all(len(group.directions.ratios) == 5 for group in found.groups.values())


def test_a_group_has_no_more_directions_than_its_matrices(tmp_path):
    results = write_factors(
        tmp_path, {"m": planted("common", 0, count=3, few=0, width=20, rank=2)[0]}, values={"n": [1, 2, 3]}
    )
    found = results.compare(results, by="n", rank=6)
    assert len(found.directions.ratios) == len(found.all.tokens) == 6
    assert [len(group.tokens) for group in found.groups.values()] == [2, 2, 2]


def test_prompts_without_numbers_in_one_of_the_two_are_left_out_and_counted(tmp_path):
    layout = make_layout()
    one, other = (make_prompts(0, 8, layout, seed) for seed in (1, 2))
    other[5] = replace(without_numbers(5, "failed", "not finite"), text="prompt number 5")
    one[7] = replace(without_numbers(7, "skipped", "empty"), text=None)
    found = write(tmp_path / "a", one, layout).compare(write(tmp_path / "b", other, layout))
    assert found.prompt_index.tolist() == [0, 1, 4, 6] and found.left_out == 4


def test_of_an_unfinished_run_the_stored_prompts(tmp_path):
    layout = make_layout()
    a = write(tmp_path / "a", make_prompts(0, 10, layout, 1), layout)
    writer = open_writer(tmp_path / "b", layout, shard_size=3)
    for number, start, stop in writer.missing_shards(10)[1:3]:
        writer.add(number, make_prompts(start, stop, layout, 2))
    found = a.compare(open_results(tmp_path / "b", allow_incomplete=True))
    assert found.prompt_index.tolist() == [4, 5, 6, 7, 8] and found.left_out == 5


def test_two_shards_are_in_memory_at_a_time(two, monkeypatch):
    alive, most, real = [], [0], ShardReader.stack

    def counted(reader, layer):
        most[0] = max(most[0], sum(reference() is not None for reference in alive))
        stack = real(reader, layer)
        alive.append(weakref.ref(stack.V))
        return stack

    monkeypatch.setattr(ShardReader, "stack", counted)
    two[0].compare(two[1], by="kind")
    assert len(alive) > 10 and most[0] <= 2


# Layers


def test_layers_and_views(two):
    a, b = two
    assert a.compare(b).layers == ("blocks.0", "blocks.0")
    assert a.compare(b, 1).layers == ("blocks.1", "blocks.1")
    assert a.compare(b, "blocks.0", 1).layers == ("blocks.0", "blocks.1")
    assert a.at(0).compare(a.at(1)).layers == ("blocks.0", "blocks.1")
    assert a.at(1).compare(b).layers == ("blocks.1", "blocks.1")
    assert a.at(1).compare(b.at(0)).layers == ("blocks.1", "blocks.0")


def test_a_layer_that_the_other_folder_has_not(two, tmp_path):
    write_folder(tmp_path, 11, make_layout({"other.0": 7}))
    with pytest.raises(UserError, match=r"'blocks.0' was not hooked in .*; there is other.0"):
        two[0].compare(open_results(tmp_path))
    assert two[0].compare(open_results(tmp_path), other_layer=0).layers == ("blocks.0", "other.0")


# What is refused


def texts(layout, changed):
    return [replace(make_prompt(i, layout), text=changed.get(i, f"prompt number {i}")) for i in range(6)]


def test_the_first_prompt_that_differs_is_named_with_both_texts(tmp_path):
    layout = make_layout()
    a = write(tmp_path / "a", texts(layout, {}), layout)
    b = write(tmp_path / "b", texts(layout, {4: "another\none", 5: "x"}), layout, shard_size=3)
    line = rf"^prompt 4 is 'prompt number 4' in {a.folder} and 'another\\none' in {b.folder}; .*same order$"
    with pytest.raises(UserError, match=line):
        a.compare(b)


def test_long_texts_are_shortened_to_where_they_differ(tmp_path):
    layout = make_layout()
    a = write(tmp_path / "a", texts(layout, {1: 900 * "a" + "here" + 900 * "b"}), layout)
    b = write(tmp_path / "b", texts(layout, {1: 900 * "a" + "THERE" + 900 * "b"}), layout)
    with pytest.raises(UserError) as raised:
        a.compare(b)
    line = str(raised.value)
    assert "aahere" in line and "aaTHERE" in line and len(line) < 400


def test_a_text_that_another_tokenizer_has_cut_elsewhere_is_the_same(tmp_path):
    layout = make_layout()
    one, other = texts(layout, {}), texts(layout, {})
    one[1], other[1] = replace(one[1], text="a long te", truncated=True), replace(other[1], text="a long text")
    a, b = write(tmp_path / "a", one, layout), write(tmp_path / "b", other, layout)
    assert len(a.compare(b).cosine) == 6
    other[1] = replace(other[1], text="a lost text")
    with pytest.raises(UserError, match="prompt 1 is 'a long te' in"):
        a.compare(write(tmp_path / "c", other, layout))


@pytest.mark.parametrize(("what", "told"), [("source_row", "row 99 of the data"), ("num_tokens", "with 12 tokens")])
def test_without_texts_source_rows_and_token_counts_are_compared(tmp_path, what, told):
    layout, without = make_layout(), make_layout(store_text=False)
    a = write(tmp_path / "a", texts(layout, {}), layout)
    b = write(tmp_path / "b", texts(without, {}), without)
    assert a.compare(b).matched_by == "source rows and token counts"
    prompts = texts(without, {})
    longer = [{**x.layers["blocks.0"]._asdict(), "position_energy": np.ones(12)} for x in prompts]
    changed = {"source_row": 99} if what == "source_row" else {
        "num_tokens": 12, "layers": {"blocks.0": type(prompts[0].layers["blocks.0"])(**longer[2])}
    }  # fmt: skip
    prompts[2] = replace(prompts[2], **changed)
    line = rf"prompt 2 is row 12 of .* and .*{told}.*one of the folders stores no texts, so that source rows and token"
    with pytest.raises(UserError, match=line):
        a.compare(write(tmp_path / "c", prompts, without))


def test_another_number_of_prompts(two, tmp_path):
    write_folder(tmp_path, 9, make_layout(WIDTHS))
    with pytest.raises(UserError, match=r"has 11 prompts and .* 9: prompt 9 is in .*/a alone; .*same --num_prompts"):
        two[0].compare(open_results(tmp_path))


def test_other_widths(two, tmp_path):
    write_folder(tmp_path, 11, make_layout({"blocks.0": 9}))
    with pytest.raises(UserError, match=r"blocks.0 of .* has the width 7 and blocks.0 of .* 9; expected equal ones"):
        two[0].compare(open_results(tmp_path))


def test_a_folder_that_keeps_the_mean_alone(two, tmp_path):
    write_folder(tmp_path, 11, make_layout(WIDTHS, means_only=True), save="mean", export_npz=False)
    for one, other in ((two[0], open_results(tmp_path)), (open_results(tmp_path), two[0])):
        with pytest.raises(UserError, match=r"keeps the mean alone \(save: mean\), .* run it with save: both"):
            one.compare(other)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"rank": 0}, "rank is 0; expected 1 to 7, the width of blocks.0"),
        ({"rank": 8}, "rank is 8; expected 1 to 7"),
        ({"ridge": 0}, "ridge is 0; expected a fraction"),
        ({"ridge": float("nan")}, "ridge is nan"),
        ({"ridge": 1e-7}, "ridge is 1e-07; expected a fraction of the mean eigenvalue from 1e-06 to 1e.06"),
        ({"ridge": 1e308}, "ridge is 1e.308"),
        ({"ridge": "x"}, "ridge is 'x'"),
        ({"ridge": True}, "ridge is True"),
        ({"rank": 2.5}, "rank is 2.5; expected 1 to 7"),
        ({"rank": None}, "rank is None"),
        ({"rank": True}, "rank is True"),
        ({"by": "sort"}, "'sort' is no kept column of .*; there is kind"),
        ({"layer": 5}, "layer 5 was not hooked"),
    ],
)
def test_wrong_arguments(two, options, line):
    with pytest.raises(UserError, match=line):
        two[0].compare(two[1], **options)


def test_other_mistakes(two, tmp_path):
    with pytest.raises(UserError, match="other is str; expected the Results that open_results returns"):
        two[0].compare("b")
    layout = make_layout()
    none = [without_numbers(i, "failed", "x") for i in range(3)]
    a = write(tmp_path / "a", none, layout)
    with pytest.raises(UserError, match="no prompt has numbers in both"):
        a.compare(a)
    with pytest.raises(UserError, match="none is kept: run with --keep_columns"):
        a.compare(a, by="kind")


@pytest.mark.parametrize("wide", [False, True])
def test_matrices_that_are_zero_have_no_directions(tmp_path, monkeypatch, wide):
    monkeypatch.setattr(means, "DENSE_WIDTH", 4 if wide else 16_384)
    layout = make_layout(keep_columns=COLUMN)
    some = [make_prompt(i, layout) for i in range(8)]
    zero = [replace(prompt, layers=dict(prompt.layers)) for prompt in some]
    for prompt in zero:
        found = prompt.layers["blocks.0"]
        prompt.layers["blocks.0"] = found._replace(S=0 * found.S, V=0 * found.V, trace=0.0)
    a, b = write(tmp_path / "a", some, layout), write(tmp_path / "b", zero, layout)
    for one, other in ((a, b), (b, a)):
        found = one.compare(other, by="kind")
        assert np.isnan(found.cosine).all() and (found.change == 1).all()
        for group in (found.all, *found.groups.values()):
            assert group.directions.directions.shape == (0, 7) and group.tokens == ()
    assert np.isnan(a.compare(b).outside).all() and (b.compare(a).outside == 1).all()
    of_kind = [prompt.kept["kind"] for prompt in some]
    one_kind = [z if kind == of_kind[0] else x for x, z, kind in zip(some, zero, of_kind, strict=True)]
    found = write(tmp_path / "c", one_kind, layout).compare(a, by="kind")
    counts = {group.value: len(group.directions.ratios) for group in found.groups.values()}
    assert len(counts) > 1 and counts.pop(of_kind[0]) == 0 and min(counts.values()) > 0
    assert len(found.directions.ratios) == 5


@pytest.mark.parametrize("vectors_dtype", ["float32", "float16"])
def test_what_is_not_held_is_that_of_a_projector(tmp_path, vectors_dtype):
    layouts = [make_layout(vectors_dtype=vectors_dtype, rank=rank) for rank in (3, 2)]
    a, b = (
        write(tmp_path / str(seed), make_prompts(0, 6, layout, seed), layout) for seed, layout in enumerate(layouts)
    )
    found = a.compare(b)
    for place, i in enumerate(found.prompt_index.tolist()):
        V, W = (np.linalg.qr(x[i].V[x[i].S > 0].astype(float).T)[0] for x in (a, b))
        B = dense(b[i])
        assert found.outside[place] == pytest.approx(1 - np.trace(V.T @ B @ V) / np.trace(B), abs=1e-12)
        V, W = V[:, : W.shape[1]], W[:, : V.shape[1]]
        assert found.overlap[place] == pytest.approx(np.linalg.norm(V.T @ W) ** 2 / V.shape[1], abs=1e-12)


def test_a_text_is_the_beginning_of_another_only_where_it_was_cut(tmp_path):
    layout = make_layout()
    one, other = texts(layout, {}), texts(layout, {})
    one[1], other[1] = replace(one[1], text="a long text", truncated=True), replace(other[1], text="a long")
    a = write(tmp_path / "a", one, layout)
    with pytest.raises(UserError, match="prompt 1 is 'a long text' in"):
        a.compare(write(tmp_path / "b", other, layout))
    other[1] = replace(other[1], truncated=True)
    assert len(a.compare(write(tmp_path / "c", other, layout)).cosine) == 6


def test_a_group_has_the_value_of_the_column_in_a(tmp_path):
    factors, _, _ = planted("common", 0, count=6, width=12)
    long = "how to " + 80 * "x" + " end"
    a = write_factors(tmp_path / "a", {"m": factors}, values={"kind": [long, None, 1.5]})
    b = write_factors(tmp_path / "b", {"m": factors}, values={"kind": [long, "only b", 1.5]})
    found = a.compare(b, by="kind")
    assert [group.value for group in found.groups.values()] == [long, None, "1.5"]
    assert found.other_values == 2 and found.all.value is None
    assert a.compare(a, by="kind").other_values == 0
    none = write_factors(tmp_path / "none", {"m": factors})
    assert a.compare(none, by="kind").other_values == none.compare(a, by="kind").other_values == 0
