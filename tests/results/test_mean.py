"""`save: mean`: the same mean to the bit, from a folder that holds no prompt's matrix."""

import numpy as np
import pytest
from command_cases import run_here, save_model, texts, write_prompts
from results_cases import RESOLVED, digests, make_layout, make_prompts, open_writer, write_folder

from fisher_vmap.errors import UserError
from fisher_vmap.info import main as info
from fisher_vmap.results import means
from fisher_vmap.results.reader import open_results
from fisher_vmap.verify.__main__ import main as verify

WIDTHS = {"a": 7, "b": 5}
KEEPING = make_layout(WIDTHS)
LAYOUT = make_layout(WIDTHS, means_only=True)


@pytest.fixture(autouse=True)
def fold_two(monkeypatch):
    monkeypatch.setattr(means.fold, "__defaults__", (2,))


def means_only(folder, count=22, **options):
    return write_folder(folder, count, LAYOUT, save="mean", export_npz=False, **options)


def arrays_left(folder):
    return sorted(path.name for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("count", [3, 8, 22, 24])
def test_the_mean_is_that_of_a_run_that_keeps_everything(tmp_path, count):
    write_folder(tmp_path / "all", count, KEEPING)
    means_only(tmp_path / "mean", count)
    both = open_results(tmp_path / "all", check="full"), open_results(tmp_path / "mean", check="full")
    for layer in WIDTHS:
        np.testing.assert_array_equal(both[0].mean(layer), both[1].mean(layer))
    assert digests(tmp_path / "all")["mean.safetensors"] == digests(tmp_path / "mean")["mean.safetensors"]
    assert both[0].table().equals(both[1].table())
    full = count // 4
    left = ["mean.safetensors", *([f"shard-{full:05d}.safetensors"] if count % 4 else [])]
    assert arrays_left(tmp_path / "mean") == left + ([f"sum-{full:05d}.safetensors"] if full else [])


def test_while_it_runs_no_more_than_a_few_shards_have_arrays(tmp_path):
    writer = open_writer(tmp_path, LAYOUT)
    most = 0
    for number, start, stop in writer.missing_shards(40):
        writer.add(number, make_prompts(start, stop, LAYOUT))
        most = max(most, len(list(tmp_path.rglob("shard-*.safetensors"))))
        partial = open_results(tmp_path, allow_incomplete=True).mean("b")
        every = [p.layers["b"] for p in make_prompts(0, stop, LAYOUT) if p.status == "ok"]
        np.testing.assert_allclose(partial, np.mean([(p.V.T * p.S) @ p.V for p in every], 0), rtol=1e-5, atol=1e-6)
    assert most == 1  # after each `add`: two are folded as soon as there are two


def test_shards_that_come_out_of_order_are_folded_in_order(tmp_path):
    writer = open_writer(tmp_path / "out", LAYOUT)
    for number, start, stop in reversed(writer.missing_shards(22)):
        writer.add(number, make_prompts(start, stop, LAYOUT))
    writer.finish(settings={}, save="mean", export_npz=False)
    write_folder(tmp_path / "all", 22, KEEPING)
    assert digests(tmp_path / "all")["mean.safetensors"] == digests(tmp_path / "out")["mean.safetensors"]


def test_a_killed_run_carries_on_and_more_prompts_can_come(tmp_path):
    means_only(tmp_path, 10, finish=False)
    assert means_only(tmp_path, 22) == [2, 3, 4, 5]  # the third shard had two prompts
    assert means_only(tmp_path, 22) == []
    assert means_only(tmp_path, 30) == [5, 6, 7]
    write_folder(tmp_path / "all", 30, KEEPING)
    assert digests(tmp_path / "all")["mean.safetensors"] == digests(tmp_path)["mean.safetensors"]


@pytest.mark.parametrize("moment", ["before the index", "after the index"])
def test_killed_while_folding(tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    def die(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patch:
        name = "fisher_vmap.results.means.write_index" if moment == "before the index" else "pathlib.Path.unlink"
        patch.setattr(name, die)
        with pytest.raises(Killed):
            means_only(tmp_path, 22)
    means_only(tmp_path, 22)
    write_folder(tmp_path / "all", 22, KEEPING)
    assert digests(tmp_path / "all")["mean.safetensors"] == digests(tmp_path)["mean.safetensors"]
    assert arrays_left(tmp_path)[-3:] == ["shard-00005.safetensors", "shard-00005.safetensors", "sum-00005.safetensors"]


def test_single_prompts_and_groups_are_refused_in_one_line(tmp_path):
    means_only(tmp_path)
    results = open_results(tmp_path)
    for ask in (
        lambda: results[0], results.stack, lambda: results.mean(where={"status": "ok"}), lambda: list(results),
        lambda: results.contrast({"prompt_index": 1}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"keeps the mean alone \(save: mean\).*save: both") as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert len(results) == 22 and len(results.to_pandas()) == 22
    assert results.directions(3).V.shape == (3, 7)


@pytest.mark.parametrize(("file", "shards"), [("sum-00005.safetensors", 5), ("shards/shard-00001.parquet", 5)])
@pytest.mark.parametrize("delete", [False, True])
def test_what_is_damaged_is_found_and_mended(tmp_path, capsys, file, shards, delete):
    means_only(tmp_path)
    whole = digests(tmp_path)
    assert verify([str(tmp_path)]) == 0 and info([str(tmp_path)]) == 0
    assert "in the sum alone" in capsys.readouterr().out
    data = bytearray((tmp_path / file).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / file).unlink() if delete else (tmp_path / file).write_bytes(data)
    assert verify([str(tmp_path)]) == 1 and "BAD " in capsys.readouterr().out
    with pytest.raises(UserError, match="damaged"):
        open_results(tmp_path, check="full")
    assert means_only(tmp_path) == list(range(shards))
    assert digests(tmp_path) == whole and verify([str(tmp_path)]) == 0


def test_the_command(tmp_path, capsys):
    model, data = save_model(tmp_path / "model"), write_prompts(tmp_path / "data.jsonl", texts(11))
    assert run_here(model, data, tmp_path / "all") == 0
    assert run_here(model, data, tmp_path / "mean", save="mean") == 0
    both = open_results(tmp_path / "all"), open_results(tmp_path / "mean")
    np.testing.assert_array_equal(both[0].mean(), both[1].mean())
    assert both[1].metadata["settings"]["save"] == "mean" and not list((tmp_path / "mean").glob("*.npz"))
    assert run_here(model, data, tmp_path / "prompts", save="prompts") == 0
    assert not (tmp_path / "prompts" / "mean.safetensors").exists()
    assert run_here(model, data, tmp_path / "prompts", save="both") == 0
    assert digests(tmp_path / "prompts")["mean.safetensors"] == digests(tmp_path / "all")["mean.safetensors"]
    assert run_here(model, data, tmp_path / "no", save="mean", export_npz="true") == 2
    assert run_here(model, data, tmp_path / "mean") == 2
    assert "save is both or prompts here but mean in" in capsys.readouterr().err


def test_a_folder_is_of_one_kind(tmp_path):
    means_only(tmp_path / "mean")
    with pytest.raises(UserError, match="save is both or prompts here but mean in"):
        open_writer(tmp_path / "mean", KEEPING)
    write_folder(tmp_path / "all", 10, KEEPING)
    with pytest.raises(UserError, match="save is mean here but both or prompts in"):
        open_writer(tmp_path / "all", LAYOUT)
    with pytest.raises(UserError, match="export_npz needs each prompt's matrix"):
        write_folder(tmp_path / "npz", 10, LAYOUT, save="mean")
    assert open_writer(tmp_path / "all", KEEPING).resolved == RESOLVED
