"""Residual norms in a folder: the median over a prompt's tokens, and in folders of before the mean that they stored."""

import numpy as np
import pytest
from results_cases import (
    digests,
    make_layout,
    make_prompt,
    make_prompts,
    open_writer,
    without_fields,
    write_folder,
)
from safetensors import safe_open
from safetensors.numpy import load_file

from fisher_vmap.errors import UserError
from fisher_vmap.export import main as export
from fisher_vmap.finish import finish
from fisher_vmap.results.index import ShardLayout
from fisher_vmap.results.reader import open_results
from fisher_vmap.verify.__main__ import main as verify

WIDTHS = {"model.layers.1": 7, "model.layers.2": 5}
BEFORE, NOW = make_layout(WIDTHS, median_norm=False), make_layout(WIDTHS)
SETTINGS = {"save": "both", "export_npz": True}


def norm_tensors(folder):
    """The names of the shards' tensors of norms."""
    found = set()
    for path in (folder / "shards").glob("*.safetensors"):
        with safe_open(path, framework="np") as shard:
            found |= {name for name in shard.keys() if "residual_norm" in name}  # noqa: SIM118
    return found


def folder_of_before(folder, num_prompts, **options):
    """As the package left it that had the mean: nothing in its index.json says which of the two it is."""
    write_folder(folder, num_prompts, BEFORE, settings=SETTINGS, **options)
    without_fields(folder, "median_norm")
    return folder


@pytest.mark.parametrize("layout", [BEFORE, NOW], ids=["before", "now"])
def test_the_tensors_name_says_which_of_the_two_it_is(tmp_path, layout):
    write_folder(tmp_path, 10, layout)
    name = "residual_norm_median" if layout is NOW else "residual_norm"
    assert norm_tensors(tmp_path) == {f"{layer}/{name}" for layer in WIDTHS}
    stored = load_file(tmp_path / "shards" / "shard-00001.safetensors")[f"model.layers.2/{name}"]
    np.testing.assert_array_equal(stored, np.float32([7, 8, 9, 10]))  # of the prompts 4 to 7, as they were given


def test_a_layout_is_of_before_unless_it_says_otherwise():
    assert not ShardLayout(widths=WIDTHS, top_k=4, rank=3).median_norm


def test_a_folder_of_before_is_read(tmp_path, capsys):
    results = open_results(folder_of_before(tmp_path, 10), check="full")
    assert not results.index.layout.median_norm
    for layer in WIDTHS:
        for record in results.at(layer):
            if record.status == "ok":
                expected = make_prompt(record.index, BEFORE).layers[layer]
                assert record.residual_norm == 3.0 + record.index
                assert record.row[f"{layer}/trace_norm2"] == pytest.approx(expected.trace * (3.0 + record.index) ** 2)
        assert results.residual_norm(layer) == pytest.approx(np.mean([3.0 + i for i in (0, 1, 4, 5, 6, 7, 8, 9)]))
        assert results.stack(layer).S.shape == (10, 3)
    assert verify([str(tmp_path)]) == 0
    assert export([str(tmp_path), str(tmp_path / "v.safetensors"), "--prompt", "4", "--scale", "0.5"]) == 0
    steps = load_file(tmp_path / "v.safetensors")
    for layer in WIDTHS:
        np.testing.assert_allclose(steps[layer], 0.5 * 7.0 * results.at(layer)[4].V[:1], rtol=1e-5)


def test_a_changed_norm_is_damage(tmp_path, capsys):
    """The checksum of a row covers it under either name."""
    for name, layout in (("before", BEFORE), ("now", NOW)):
        write_folder(tmp_path / name, 4, layout)
        path = tmp_path / name / "shards" / "shard-00000.safetensors"
        bytes_ = bytearray(path.read_bytes())
        at = bytes_.index(np.float32([3.0, 4.0]).tobytes())
        bytes_[at : at + 4] = np.float32(3.5).tobytes()
        path.write_bytes(bytes_)
        with pytest.raises(UserError, match="differ from their checksum"):
            open_results(tmp_path / name)[0]
        assert verify([str(tmp_path / name)]) == 1


@pytest.mark.parametrize("first", [4, 7, 10], ids=["a shard", "a short shard", "all"])
@pytest.mark.parametrize("finished", [False, True], ids=["stopped", "finished"])
def test_a_folder_of_before_goes_on_as_it_began(tmp_path, first, finished):
    """What it leaves is what the package of before would have left, to the bit."""
    write_folder(tmp_path / "before", 14, BEFORE, settings=SETTINGS)
    folder_of_before(tmp_path / "out", first, finish=finished)
    writer = open_writer(tmp_path / "out", NOW, settings=SETTINGS)
    assert writer.index.layout == BEFORE  # the run asks this which of the two to compute
    for number, start, stop in writer.missing_shards(14):
        writer.add(number, make_prompts(start, stop, BEFORE))
    writer.finish(settings=SETTINGS)
    there, expected = digests(tmp_path / "out"), digests(tmp_path / "before")
    assert there == expected
    assert norm_tensors(tmp_path / "out") == {f"{layer}/residual_norm" for layer in WIDTHS}


def test_a_folder_of_before_is_finished(tmp_path):
    folder_of_before(tmp_path, 10, finish=False)
    assert finish(tmp_path).complete and verify([str(tmp_path)]) == 0
    assert open_results(tmp_path, check="full")[9].residual_norm == 12.0


def test_a_folder_of_now_is_not_carried_on_with_the_mean(tmp_path):
    write_folder(tmp_path, 4, NOW)
    assert open_writer(tmp_path, BEFORE).index.layout == NOW
