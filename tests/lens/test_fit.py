"""`fisher-vmap lens`: the lens is the mean of its prompts' matrices, to the bit however the work was cut."""

import json

import pytest
import torch
from command_cases import VOCABULARY, save_model
from models import tiny
from oracles import relative

from fisher_vmap import FisherModel
from fisher_vmap.errors import UserError
from fisher_vmap.lens import fit
from fisher_vmap.lens.__main__ import main
from fisher_vmap.lens.flags import SETTINGS, LensSettings, read
from fisher_vmap.lens.folder import write_info
from fisher_vmap.lens.jacobian_lens import JacobianLens
from fisher_vmap.lens.matrices import prompt_matrices
from fisher_vmap.lens.sums import Sums, part_path
from fisher_vmap.results import files

pytestmark = pytest.mark.usefixtures("no_power_cuts")

TEXTS = [f"text number {i}, " + "and so on " * (1 + i % 4) for i in range(10)] + ["no"]
SKIP, LENGTH = 4, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("gpt2") / "model", tiny("gpt2", torch.float32, vocab_size=VOCABULARY))


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


def words(folder, out, *more, **settings):
    given = {
        "model_path": folder, "dataset_name": "texts.jsonl", "num_prompts": "all", "dtype": "float32", "device": "cpu",
        "skip_first": SKIP, "max_length": LENGTH, "shard_size": 3, "output_dir": out, **settings,
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + list(more)


@pytest.fixture
def whole(folder, data):
    """A fit without any interruption."""
    assert main(words(folder, "whole")) == 0
    return JacobianLens.load("whole")


def same(one, other):
    assert one.layers == other.layers and one.n_prompts == other.n_prompts
    assert torch.equal(one.metric, other.metric)
    assert all(torch.equal(one.of(layer), other.of(layer)) for layer in one.layers)


def test_the_mean_of_the_prompts_matrices(folder, data, whole, capsys):
    from fisher_vmap import load_model

    loaded = load_model(str(folder), dtype="float32", device="cpu")
    fisher = FisherModel(loaded.model, layers=[0, 1, 2], precision="float32")
    ids = [loaded.tokenizer(text).input_ids[:LENGTH] for text in TEXTS]
    found = [prompt_matrices(fisher, [one], SKIP)[0] for one in ids if len(one) > SKIP + 1]
    assert whole.n_prompts == len(found) == 10 and whole.layers == [0, 1, 2]
    for number, layer in enumerate(fisher.layers):
        each = torch.stack([one.jacobians[layer] for one in found]).double()
        mean = each.mean(0)
        assert relative(whole.of(number), mean) < 1e-6
        error = ((each - mean).square().sum((1, 2)).sum() / 10 / 9).sqrt() / mean.norm()
        assert whole.standard_errors[number] == pytest.approx(float(error), rel=1e-4)
        half = (each[0::2].mean(0) - each[1::2].mean(0)).norm() / mean.norm()
        info = json.loads((data / "whole" / "lens.json").read_text())["found"]["spread"][layer]
        assert info["split_half"] == pytest.approx(float(half), rel=1e-4)
    assert relative(whole.metric, torch.stack([one.metric for one in found]).mean(0)) < 1e-6
    capsys.readouterr()
    assert main(words(folder, "whole")) == 0
    assert "1 prompts skipped (prompt 10: 2 tokens, and the first 4 and the last one are left out)" in (
        capsys.readouterr().out
    )


def test_the_official_file(whole):
    payload = torch.load("whole/jacobian_lens.pt", weights_only=True)
    assert set(payload) == {"J", "n_prompts", "source_layers", "d_model", "metadata"}
    assert payload["source_layers"] == [0, 1, 2] and payload["d_model"] == 36 and payload["n_prompts"] == 10
    for layer, J in payload["J"].items():
        assert J.dtype == torch.float16 and relative(J.float(), whole.of(layer)) < 1e-3
    loaded = JacobianLens.load("whole/jacobian_lens.pt")
    assert loaded.metadata == whole.metadata and loaded.metadata["skip_first"] == SKIP


@pytest.mark.parametrize("calls", [1, 3, 5])
def test_killed_and_resumed_to_the_bit(folder, data, whole, monkeypatch, calls):
    left, right = [calls], fit.prompt_matrices

    def dies(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return right(*args)

    monkeypatch.setattr(fit, "prompt_matrices", dies)
    assert main(words(folder, "killed", batch_size=2)) == 130
    monkeypatch.setattr(fit, "prompt_matrices", right)
    assert main(words(folder, "killed", batch_size=2)) == 0
    assert main(words(folder, "at once", batch_size=2)) == 0
    same(JacobianLens.load("killed"), JacobianLens.load("at once"))
    parts = [part_path(data / name, "1-of-1").read_bytes() for name in ("killed", "at once")]
    assert parts[0] == parts[1]


def test_three_tasks_equal_one(folder, data, whole):
    for i in (2, 3):
        assert main(words(folder, "array", "--shards", f"{i}/3")) == 0
        assert not (data / "array" / "jacobian_lens.pt").exists()
    assert main(words(folder, "array", "--shards", "1/3")) == 0
    same(JacobianLens.load("array"), whole)


def test_a_single_process_finishes_what_tasks_began(folder, data, whole):
    assert main(words(folder, "array", "--shards", "2/3")) == 0
    assert main(words(folder, "array")) == 0
    same(JacobianLens.load("array"), whole)


def test_more_prompts_are_added(folder, data, whole, capsys):
    assert main(words(folder, "grown", num_prompts=4)) == 0
    assert JacobianLens.load("grown").n_prompts == 4
    assert main(words(folder, "grown")) == 0
    grown = JacobianLens.load("grown")
    assert grown.n_prompts == 10 and all(relative(grown.of(n), whole.of(n)) < 1e-6 for n in whole.layers)
    for fewer in (4, 6):  # within a shard, and at its end
        assert main(words(folder, "grown", num_prompts=fewer)) == 2
        assert "holds sums of more prompts than are asked for" in capsys.readouterr().err


def test_the_same_command_again_computes_nothing(folder, data, whole, monkeypatch):
    monkeypatch.setattr(fit, "prompt_matrices", None)
    assert main(words(folder, "whole")) == 0
    same(JacobianLens.load("whole"), whole)


def test_until(folder, data, whole, capsys):
    assert main(words(folder, "until", until=5)) == 0
    stopped = JacobianLens.load("until")
    assert stopped.n_prompts == 3  # after the first shard
    assert main(words(folder, "until", until=5)) == 0 and JacobianLens.load("until").n_prompts == 3
    capsys.readouterr()
    assert main(words(folder, "until", until=0.001)) == 0
    same(JacobianLens.load("until"), whole)
    assert "the data ended before the halves differed by no more than until" in capsys.readouterr().out


def test_merged_slices_are_the_whole(folder, data, whole):
    assert main(words(folder, "first", num_prompts=4)) == 0
    assert main(words(folder, "second", offset=4)) == 0
    slices = [JacobianLens.load(name) for name in ("first", "second")]
    merged = JacobianLens.merged(slices)
    assert merged.n_prompts == 10 and relative(merged.of(1), whole.of(1)) < 1e-6
    assert relative(merged.metric, whole.metric) < 1e-6
    assert merged.standard_errors[1] == pytest.approx(whole.standard_errors[1], rel=0.5)
    with pytest.raises(ValueError, match="expected lenses of the same layers"):
        JacobianLens.merged([whole, JacobianLens({0: whole.of(0)}, 3)])


@pytest.mark.parametrize(
    ("changes", "more", "line"),
    [
        ({"hook_layer_name": 3}, [], "is the last block, whose J is the identity; leave it out"),
        ({"hook_layer_name": "transformer.h.1.mlp"}, [], "is no decoder block, and a lens is of blocks"),
        ({"hook_layer_name": 9}, [], "9"),
        ({"skip_first": 30}, [], "no position is left; lower skip_first"),
        ({"until": "0.1"}, ["--shards", "1/2"], "each process sees only its own prompts"),
        ({"engine": "ray", "until": "0.1"}, [], "until with engine ray"),
        ({"until": "-1"}, [], "until: '-1' was given, none, or a part of |J| such as 0.02 was expected"),
        ({"overwrite": "true"}, ["--shards", "1/2"], "--shards with overwrite"),
        ({}, ["--shards", "3/2"], "correct the flag --shards"),
        ({}, ["--read", " "], "--read is an empty text"),
        ({}, ["--dim_batch", "8"], "did you mean --cotangent_chunk?"),
        ({}, ["--estimator", "full"], "--estimator"),
        ({"dataset_name": "nothing.jsonl"}, [], "nothing.jsonl"),
    ],
)
def test_one_line_for_a_mistake(folder, data, capsys, changes, more, line):
    assert main(words(folder, "wrong", *more, **changes)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert line in told[-1] and told[-1].startswith("fisher_vmap: ")
    assert not (data / "wrong" / "lens.json").exists()


def test_a_folder_of_other_settings(folder, data, whole, capsys):
    assert main(words(folder, "whole", skip_first=5)) == 2
    assert "skip_first is 5 here but 4 in whole; use another --output_dir" in capsys.readouterr().err
    (data / "other").mkdir()
    (data / "other" / "thesis.tex").write_text("")
    assert main(words(folder, "other")) == 2
    assert "other holds other files (such as thesis.tex) and no lens.json" in capsys.readouterr().err
    assert main(words(folder, "whole", skip_first=5, overwrite="true")) == 0
    assert JacobianLens.load("whole").metadata["skip_first"] == 5


def test_damaged_sums(folder, data, whole, capsys):
    path = part_path(data / "whole", "1-of-1")
    good = path.read_bytes()
    path.write_bytes(good[:-3] + b"xyz")
    assert main(words(folder, "whole")) == 2
    assert "is damaged" in capsys.readouterr().err
    path.write_bytes(good[:100])
    assert main(words(folder, "whole")) == 2
    told = capsys.readouterr().err
    assert "is damaged" in told and "remove it to compute its shards again" in told
    path.unlink()
    assert main(words(folder, "whole")) == 0
    same(JacobianLens.load("whole"), whole)


def test_the_table_has_each_layers_own_norm(folder, data, whole, capsys):
    assert main(words(folder, "turned", hook_layer_name="2,0")) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "transformer.h." in line]
    assert [row[0] for row in rows] == ["transformer.h.0", "transformer.h.2"]
    assert [float(row[1]) for row in rows] == [pytest.approx(float(whole.of(n).norm()), rel=1e-3) for n in (0, 2)]


def test_a_lens_is_not_made_of_the_shards_of_another_part_of_the_data(folder, data, capsys):
    assert main(words(folder, "out", "--shards", "4/4", num_prompts=11)) == 0
    assert main(words(folder, "out", "--shards", "1/2", num_prompts=5)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "holds sums of more prompts than are asked for" in line and not (data / "out" / "jacobian_lens.pt").exists()


def test_a_fit_that_was_stopped_before_its_first_file_begins_anew(folder, data, whole):
    """And a process of a job array finds no folder of a stranger where another has just begun."""
    (data / "out").mkdir()
    (data / "out" / ".lock").touch()
    assert main(words(folder, "out")) == 0
    same(JacobianLens.load("out"), whole)
    order = []

    def first(path, info):
        order.append([each.name for each in path.iterdir() if not each.name.startswith(".")])
        write_info(path, info)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fisher_vmap.lens.opening.write_info", first)
        assert main(words(folder, "new")) == 0
    assert order == [[]]  # lens.json is the first file of all


def test_a_lens_json_of_another_kind_is_one_line_and_overwritten(folder, data, whole, capsys):
    path = data / "whole" / "lens.json"
    info = json.loads(path.read_text())
    for text in ("{", "[]", '{"fingerprint": {}}', json.dumps({k: v for k, v in info.items() if k != "threads"})):
        path.write_text(text)
        assert main(words(folder, "whole")) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("fisher_vmap: ") and "lens.json cannot be read" in line
    assert main(words(folder, "whole", overwrite="true")) == 0
    same(JacobianLens.load("whole"), whole)


def test_readouts_are_of_the_lens_beside_them(folder, data, capsys, caplog):
    caplog.set_level("INFO")
    readouts = data / "out" / "readouts.json"
    text = "the quick brown fox jumps over the lazy dog"
    assert main(words(folder, "out", "--read", text, num_prompts=3)) == 0
    out, before = capsys.readouterr().out, readouts.read_bytes()
    assert f"(cut to max_length, {LENGTH} tokens)" in out and "lazy dog" not in out
    assert json.loads(before)["readouts"][0]["text"] == text[:LENGTH]
    assert main(words(folder, "out", num_prompts=3)) == 0
    assert readouts.read_bytes() == before
    assert main(words(folder, "out")) == 0
    assert not readouts.exists() and "was of the lens before and is removed" in caplog.text
    assert main(words(folder, "out", "--read", "short one")) == 0
    assert "cut to" not in capsys.readouterr().out and readouts.exists()
    assert main(words(folder, "out", skip_first=5, overwrite="true")) == 0
    assert not readouts.exists()
    assert main(words(folder, "part", "--shards", "1/2", "--read", "x")) == 0
    assert "nothing is read yet: give --read again when the lens is written" in capsys.readouterr().out


def test_temporary_files_of_a_killed_fit_are_removed(folder, data, whole):
    left = data / "whole" / "shards" / f".part-1-of-1.safetensors~{files._HOST}~4999999~{'0' * 12}.tmp"
    left.write_bytes(b"x" * 100)
    assert main(words(folder, "whole")) == 0
    assert not left.exists()


def test_a_model_of_one_block(data, tmp_path):
    model = tiny("gpt2", torch.float32, vocab_size=VOCABULARY, n_layer=1)
    one = save_model(tmp_path / "one", model)
    assert main(words(one, "out")) == 0
    found = JacobianLens.load("out")
    assert found.layers == [0] and relative(found.of(0), torch.eye(len(found.of(0)))) < 1e-5


def test_files_by_name_and_of_large_numbers(data, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(data))
    lens = JacobianLens({0: torch.tensor([[7e4, 0.0], [0.0, 1.0]])}, 2)
    for name in ("~/lens.pt", "~/lens.safetensors"):
        lens.save(name)
        same_J = JacobianLens.load(name).of(0)
        assert torch.equal(same_J, lens.of(0)) and (data / name[2:]).is_file()
    assert "is in float32, since torch.float16 cannot hold J, up to 7e+04" in caplog.text
    small = JacobianLens({0: torch.eye(2)}, 2)
    small.save("~/small.pt")
    assert torch.load(data / "small.pt", weights_only=True)["J"][0].dtype == torch.float16
    zero = JacobianLens({0: torch.zeros(2, 2)}, 2, None, {0: 0.5})
    assert torch.equal(JacobianLens.merged([zero, zero]).of(0), torch.zeros(2, 2))


def test_a_shard_in_two_parts(folder, data, whole, capsys):
    path = part_path(data / "whole", "1-of-1")
    part_path(data / "whole", "1-of-2").write_bytes(path.read_bytes())
    assert main(words(folder, "whole")) == 2
    assert "its prompts would count twice; remove one of the two files" in capsys.readouterr().err


def test_numbers_that_are_not_finite(folder, data, monkeypatch, capsys):
    right = fit.prompt_matrices

    def broken(*args):
        found = right(*args)
        found[0].jacobians["transformer.h.0"][0, 0] = float("nan")
        return found

    monkeypatch.setattr(fit, "prompt_matrices", broken)
    assert main(words(folder, "nan", "--strict", batch_size=1)) == 2  # no prompt is left
    assert "no prompt has a matrix (prompt 0: its numbers are not finite)" in capsys.readouterr().err
    calls = []

    def second_broken(*args):
        calls.append(args)
        return (broken if len(calls) == 2 else right)(*args)

    monkeypatch.setattr(fit, "prompt_matrices", second_broken)
    assert main(words(folder, "one", "--strict", batch_size=1)) == 3
    assert JacobianLens.load("one").n_prompts == 9


def test_settings_from_a_file(folder, data, whole):
    (data / "run.yaml").write_text(f"model_path: {folder}\ndataset_name: texts.jsonl\ntop_k_tokens: 3\nskip_first: 7\n")
    command = read(["--config", "run.yaml", "--max_length", "99"])
    assert command.settings.skip_first == 7 and command.settings.max_length == 99
    assert command.settings.dataset_name == "texts.jsonl" and command.settings.chat_template is False
    (data / "wrong.yaml").write_text("skip_frist: 7\n")
    with pytest.raises(UserError, match="unknown setting 'skip_frist'"):
        read(["--config", "wrong.yaml"])


def test_every_setting_is_a_flag():
    assert (
        {"skip_first", "until", "shard_size", "precision", "engine"} <= set(SETTINGS) <= set(LensSettings.model_fields)
    )


def test_files_that_are_no_lens(data):
    for name, content in (("a.pt", b"no"), ("b.safetensors", b"no")):
        (data / name).write_bytes(content)
        with pytest.raises(UserError, match="holds no lens"):
            JacobianLens.load(name)
    torch.save({"weights": torch.ones(2)}, "c.pt")
    with pytest.raises(UserError, match=r"holds no lens \('J'\); expected J, n_prompts, source_layers, d_model"):
        JacobianLens.load("c.pt")
    with pytest.raises(UserError, match=r"there is no file d\.pt"):
        JacobianLens.load("d.pt")
    (data / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no jacobian_lens\.pt"):
        JacobianLens.load("empty")
    with pytest.raises(UserError, match=r"lens.bin ends in .bin; expected .pt or .safetensors"):
        JacobianLens({0: torch.eye(2)}, 1).save("lens.bin")
    with pytest.raises(ValueError, match="a lens without layers"):
        JacobianLens({}, 1)
    with pytest.raises(ValueError, match=r"J of layer 1 has shape \(3, 3\); expected \(2, 2\)"):
        JacobianLens({0: torch.eye(2), 1: torch.eye(3)}, 1)


def test_sums_of_a_single_prompt_have_no_error():
    sums = Sums("x", {"a": 2})
    assert all(value != value for value in sums.spread("a"))
