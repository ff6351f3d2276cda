"""The npz export: documented names, F = U @ diag(S) @ V, a stream in memory that does not grow with the prompts."""

import errno
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
from results_cases import factor, make_layout, make_prompt, make_prompts, open_writer, write_folder

from fisher_vmap.errors import UserError
from fisher_vmap.results import outputs
from fisher_vmap.results.reader import open_results
from fisher_vmap.results.shard_reader import readers


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_names_shapes_and_the_product(tmp_path, dtype):
    write_folder(tmp_path, 10, make_layout(rank=4, vectors_dtype=dtype))
    with np.load(tmp_path / "fisher_matrices_compressed.npz") as archive:
        assert archive.files == [f"{letter}_{i}" for i in range(10) for letter in "USV"]
        for i in range(10):
            U, S, V = (archive[f"{letter}_{i}"] for letter in "USV")
            assert (U.shape, S.shape, V.shape) == ((7, 4), (4,), (4, 7))
            assert U.dtype == S.dtype == V.dtype == np.float32
            if i in (2, 3):  # failed and skipped
                assert np.isnan(U).all() and np.isnan(S).all() and np.isnan(V).all()
                continue
            A, _ = factor(i, 0, 4, 7)
            F = A.T @ A
            tolerance = 1e-6 if dtype == "float32" else 2e-3
            assert np.linalg.norm(U @ np.diag(S) @ V - F) <= tolerance * np.linalg.norm(F)


def test_several_layers_have_a_file_each(tmp_path):
    write_folder(tmp_path, 5, make_layout({"model.layers.0": 7, "model.layers.1": 5}))
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == [
        "fisher_matrices_compressed.model.layers.0.npz",
        "fisher_matrices_compressed.model.layers.1.npz",
    ]
    with np.load(tmp_path / "fisher_matrices_compressed.model.layers.1.npz") as archive:
        assert np.array_equal(archive["V_4"], open_results(tmp_path).at("model.layers.1")[4].V)


def test_arrays_beyond_the_limit_of_plain_zip_files(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "_ZIP64_FROM", 100)
    write_folder(tmp_path, 5)
    with np.load(tmp_path / "fisher_matrices_compressed.npz") as archive:
        assert np.array_equal(archive["V_4"], open_results(tmp_path)[4].V)
    with zipfile.ZipFile(tmp_path / "fisher_matrices_compressed.npz") as archive:
        assert archive.testzip() is None


def test_finishing_holds_one_shard_in_memory(tmp_path):
    layout = make_layout({"blocks.0": 512}, rank=4)
    prompt = make_prompt(0, layout)

    def peak(num_prompts):
        folder = tmp_path / str(num_prompts)
        writer = open_writer(folder, layout, shard_size=16)
        for number, start, stop in writer.missing_shards(num_prompts):
            prompts = [make_prompt(0, layout, layers=prompt.layers) for _ in range(start, stop)]
            for index, p in zip(range(start, stop), prompts, strict=True):
                object.__setattr__(p, "index", index)
            writer.add(number, prompts)
        tracemalloc.start()
        writer.finish(settings={})
        reached = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return reached

    peak(16)  # what is imported on first use
    few, many = peak(64), peak(384)
    of_one_prompt = 2 * 4 * 512 * 4  # U and V
    assert many - few < 320 * of_one_prompt / 5, (few, many)


def test_means_against_dense_matrices(tmp_path):
    layout = make_layout({"a": 6, "b": 9}, rank=4, keep_columns=("source",))
    write_folder(tmp_path, 10, layout)
    results = open_results(tmp_path)
    ok = [0, 1, 4, 5, 6, 7, 8, 9]
    for number, (layer, D) in enumerate(layout.widths.items()):

        def dense(chosen, number=number, D=D):
            return sum(factor(i, number, 4, D)[0].T @ factor(i, number, 4, D)[0] for i in chosen) / len(chosen)

        def close(found, chosen, dense=dense):
            expected = dense(chosen)
            assert found.dtype == np.float32
            assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)

        close(results.mean(layer), ok)
        close(results.mean(layer, where={"source": "source 1"}), [1, 5, 7, 9])
        close(results.mean(layer, where={"source": "source 1", "tokens": results[5].row["tokens"]}), [
            i for i in (1, 5, 7, 9) if results[i].row["tokens"] == results[5].row["tokens"]
        ])  # fmt: skip
        close(results.mean(layer, where=lambda row: row["prompt_index"] >= 6), [6, 7, 8, 9])
        close(results.mean(layer, where=np.arange(10) < 5), [0, 1, 4])
        close(results.at(layer).mean(where=[True] * 10), ok)
        assert np.isnan(results.mean(layer, where={"source": "none"})).all()
    for where, message in (
        ({"sauce": 1}, "has no column 'sauce'; there is prompt_index, "),
        ([True], r"where is an array \(1,\) of bool; expected \(10,\) booleans"),
        (np.ones(10), "of float64"),
    ):
        with pytest.raises(UserError, match=message):
            results.mean(where=where)


def test_a_mean_over_nothing_is_nan(tmp_path):
    writer = open_writer(tmp_path)
    writer.missing_shards(4)
    layout = make_layout()
    writer.add(0, [make_prompt(i, layout, status="failed", reason="none") for i in range(4)])
    writer.finish(settings={})
    assert np.isnan(open_results(tmp_path, check="full").mean()).all()


@pytest.mark.parametrize("room", range(0, 20_000, 997))
def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path, monkeypatch, room):
    """Every write may be the one that does not fit: shard, index, table, mean, npz, metadata."""
    layout = make_layout()

    class FullDisk:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            nonlocal room
            room -= memoryview(data).nbytes
            if room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda path, mode="r", *a, o=open, **k: FullDisk(o(path, mode, *a, **k)) if mode == "xb" else o(path, mode, *a, **k))  # fmt: skip  # noqa: E501
        with pytest.raises(UserError, match=r"no space left to write .*; free some and run the same command again"):
            write_folder(tmp_path / "x", 10, layout)
    assert not list(tmp_path.rglob("*.tmp"))
    write_folder(tmp_path / "x", 10, layout)
    results = open_results(tmp_path / "x", check="full")
    assert [r.status for r in results] == [p.status for p in make_prompts(0, 10, layout)]
    assert len(list(readers(tmp_path / "x", results.index))) == 3
