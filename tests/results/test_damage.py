"""Whatever happens to the bytes of a folder, reading gives the right numbers or one line that names the file."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from results_cases import make_layout, write_folder

from fisher_vmap.errors import UserError
from fisher_vmap.results.index import read_index, write_index
from fisher_vmap.results.reader import open_results
from fisher_vmap.results.shard import tensor_specs, write_tensors

LAYOUT = make_layout({"a": 5, "b": 6}, keep_columns=("source",))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "results"
    write_folder(folder, 7, LAYOUT)
    return folder, read_everything(open_results(folder))


def read_everything(results):
    """All that the reader can give, as plain values that compare equal when the numbers are the same."""
    records = [
        (r.layer, r.row, r.residual_norm, *(getattr(r, name).tobytes() for name in ARRAYS))
        for layer in results.layers
        for r in results.at(layer)
    ]
    stacks = [part.tobytes() for layer in results.layers for part in results.stack(layer)]
    means = [results.mean(layer).tobytes() for layer in results.layers]
    means += [results.mean(layer, where={"source": "source 1"}).tobytes() for layer in results.layers]
    return str((records, stacks, means, results.table().to_pydict(), results.metadata, results.index))


ARRAYS = ("S", "V", "Q", "position_energy", "token_ids", "log_probs")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_damage_is_reported_or_harmless(sound, tmp_path_factory, data):
    original, expected = sound
    folder = tmp_path_factory.mktemp("damaged") / "results"
    shutil.copytree(original, folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names.remove(".lock")
    path = folder / data.draw(st.sampled_from(names))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "overwrite", "truncate", "delete", "append"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if kind == "delete":
        path.unlink()
    else:
        if kind == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "overwrite":
            new = data.draw(st.binary(min_size=1, max_size=30))
            content[place : place + len(new)] = new[: len(content) - place]
        elif kind == "truncate":
            del content[place:]
        else:
            content += data.draw(st.binary(min_size=1, max_size=30))
        path.write_bytes(content)
    unchanged = kind == "overwrite" and bytes(content) == (original / path.relative_to(folder)).read_bytes()
    try:
        read = read_everything(open_results(folder))
    except UserError as error:
        assert "\n" not in str(error) and not unchanged
    else:
        assert read == expected
    if not unchanged:
        with pytest.raises(UserError):
            open_results(folder, check="full")
    shutil.rmtree(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(place=st.integers(0), bit=st.integers(0, 7))
def test_trusting_a_folder_never_crashes_on_a_damaged_header(sound, tmp_path_factory, place, bit):
    """With check="none" wrong numbers are the reader's own wish; anything but them or a UserError is not."""
    folder = tmp_path_factory.mktemp("damaged") / "results"
    shutil.copytree(sound[0], folder)
    path = folder / "shards" / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[place % (8 + int.from_bytes(content[:8], "little"))] ^= 1 << bit
    path.write_bytes(content)
    try:
        read_everything(open_results(folder, check="none"))
    except UserError as error:
        assert "shard-00001.safetensors is damaged" in str(error)
    shutil.rmtree(folder)


def test_the_shard_is_named(tmp_path):
    write_folder(tmp_path, 7, LAYOUT)
    path = tmp_path / "shards" / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"shard-00001\.safetensors is damaged: it has \d+ bytes instead of \d+; give the"
    ):
        open_results(tmp_path)
    assert open_results(tmp_path, check="none")[0].status == "ok"
    path.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is damaged: no such file or directory"):
        open_results(tmp_path)


def test_one_row_is_checked_without_its_shard(tmp_path):
    write_folder(tmp_path, 7, LAYOUT)
    path = tmp_path / "shards" / "shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    V = np.asarray(open_results(tmp_path).at("b")[1].V).tobytes()
    content[content.index(V)] ^= 1
    path.write_bytes(content)
    results = open_results(tmp_path)
    assert results[1].status == "ok" and results.at("b")[0].status == "ok"
    for read in (lambda: results.at("b")[1], lambda: results.stack("b"), lambda: results.mean("b", lambda row: True)):
        with pytest.raises(UserError, match=r"shard-00000.*the numbers of prompt 1 differ from their checksum"):
            read()
    with pytest.raises(UserError, match=r"shard-00000\.safetensors is damaged: its SHA-256 differs from the index"):
        open_results(tmp_path, check="full")


def test_a_tensor_of_another_shape_or_dtype_is_refused(tmp_path):
    write_folder(tmp_path, 7, LAYOUT)
    path = tmp_path / "shards" / "shard-00001.safetensors"
    size = path.stat().st_size
    specs = tensor_specs(LAYOUT, 3, 5)
    for name, spec in (("b/S", specs["b/S"]._replace(shape=(1, 9))), ("a/Q", specs["a/Q"]._replace(dtype="float16"))):
        with open(path, "wb") as file:
            changed = {**specs, name: spec}
            write_tensors(file, changed, lambda name, changed=changed: np.zeros(changed[name].shape))
            file.truncate(size) if file.tell() > size else None
        index = read_index(tmp_path)
        entry = index.shards[1].model_copy(update={"bytes": path.stat().st_size})
        write_index(tmp_path, index.model_copy(update={"shards": (index.shards[0], entry)}))
        layer = name[0]
        with pytest.raises(UserError, match=rf"shard-00001.*{name} is"):
            open_results(tmp_path, check="none").stack(layer)


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def change_index(folder, change):
    """Edit index.json and give it the right checksum: what an attacker would do, not a disk."""
    path = folder / "index.json"
    values = json.loads(path.read_text())
    change(values)
    values["checksum"] = "0" * 64
    text = json.dumps(values, indent=1)
    path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "shard-00001.safetensors", "a/b", "", "C:\\x"]
)
@pytest.mark.parametrize("field", ["file", "table"])
def test_paths_in_the_index_cannot_leave_the_folder(tmp_path, field, name):
    write_folder(tmp_path, 7, LAYOUT)
    change_index(tmp_path, lambda values: values["shards"][0].update({field: name}))
    with pytest.raises(UserError, match=r"index\.json is not valid: .*shard 0 has file names"):
        open_results(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["files"].update({"../x": {"sha256": "", "bytes": 0}}), r"it lists the file '\.\./x'"),
        (lambda v: v.update(version=2), "has format version 2, this package reads 1; install a newer one"),
        (lambda v: v.pop("shards"), "shards are missing"),
        (lambda v: v["shards"].reverse(), "its shards are not in order"),
        (lambda v: v["shards"].pop(0), "shards are missing"),
        (lambda v: v["shards"][1].update(start=5), r"shard 1 has the prompts \[5, 7\)"),
        (lambda v: v["shards"][1].update(stop=9), r"shard 1 has the prompts \[4, 9\)"),
        (lambda v: v["shards"][1].update(number=-1), "greater than or equal to 0"),
        (lambda v: v.update(num_prompts=100), "shards are missing"),
        (lambda v: v.update(shard_size="4"), "shard_size"),
        (lambda v: v.update(surprise=1), "surprise"),
        (lambda v: v["layout"].update(vectors_dtype="int4"), "layout.vectors_dtype"),
        (lambda v: v["layout"].update(widths={"a/../../b": 5}), "cannot be part of a file name"),
        (lambda v: v.update(resolved=nested(500)), "resolved|recursion"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(tmp_path, change, message):
    write_folder(tmp_path, 7, LAYOUT)
    change_index(tmp_path, change)
    with pytest.raises(UserError, match=message):
        open_results(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"\xff\xfe", b'{"checksum": "' + b"[" * 100_000, b"null"])
def test_an_index_that_is_no_index_is_refused(tmp_path, text):
    (tmp_path / "index.json").write_bytes(text)
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        open_results(tmp_path)


def test_an_edited_index_is_refused(tmp_path):
    write_folder(tmp_path, 7, LAYOUT)
    path = tmp_path / "index.json"
    path.write_text(path.read_text().replace('"top_k_tokens": 4', '"top_k_tokens": 5'))
    with pytest.raises(UserError, match=r"index\.json is damaged or was changed by hand"):
        open_results(tmp_path)


def test_not_a_results_folder(tmp_path):
    for path, message in ((tmp_path, "it has no index.json"), (tmp_path / "none", "it has no index.json")):
        with pytest.raises(UserError, match=f"is not a results folder: {message}"):
            open_results(path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"is not a results folder: .*[Nn]ot a directory"):
        open_results(tmp_path / "file")
    with pytest.raises(UserError, match="check is 'most'"):
        open_results(Path("x"), check="most")
