"""What is remembered of a model lives and dies with it, whatever its modules refer to, and is in no copy of it."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from models import block, fresh, padded, prompts
from oracles import plain_scores, relative
from torch import nn

from fisher_vmap import FisherModel, fisher_full, fisher_scores
from fisher_vmap.model.patches import NAME, Remembered

LENGTHS = (6, 3)


def hooks_that_hold_the_model(model):
    """A user's hooks whose closures have the model: what holds a module then holds the model."""
    model.register_forward_hook(lambda _m, _a, _o: model and None)
    for part in model.modules():
        part.register_forward_hook(lambda _m, _a, _o: model and None)


def agrees(model, layer, budget=1e-6, **options):
    rows = prompts(LENGTHS)
    found = fisher_scores(model, *padded(rows, "left"), layers=layer, top_k=3, **options)
    for b, row in enumerate(rows):
        expected = plain_scores(model, row, layer, top_k=3)
        assert relative(found.gradients[layer][b], expected.gradients) < budget


@pytest.mark.parametrize("precision", ["model", "float32"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_model_is_freed_whose_hooks_refer_to_it(family, precision):
    model = fresh(family, torch.bfloat16)
    hooks_that_hold_the_model(model)
    ids, mask = padded(prompts(LENGTHS), "right")
    fisher_scores(model, ids, mask, layers=[0, 2], top_k=3, precision=precision)
    fisher_full(model, ids, mask, layers=1, rank=2, precision=precision)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_a_model_without_such_hooks_needs_no_collector():
    model = fresh("llama", torch.bfloat16)
    gc.collect()
    gc.disable()
    try:
        remembered = Remembered[nn.Module]()
        remembered[model] = model.lm_head
        watched = weakref.ref(model)
        del model
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save"])
def test_a_copy_of_a_used_model_remembers_nothing(how):
    model, layer = fresh("llama"), block("llama", 1)
    agrees(model, layer)
    if how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        assert b"fisher_vmap.model" not in file.getvalue()  # it can be loaded where this package is not
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = getattr(copy, how)(model)
    thing = Remembered[int]()
    thing[model] = 1
    assert other not in thing and thing.get(other) is None and thing.setdefault(other, 2) == 2 and thing[model] == 1
    if how != "copy":  # a shallow one has the same weights
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.1)
    agrees(other, layer)
    agrees(model, layer)


def test_it_is_no_part_of_the_model():
    model = fresh("llama")
    names = [name for name, _ in model.named_modules()]
    state, shown = list(model.state_dict()), repr(model)
    FisherModel(model, layers=1).scores(torch.tensor([[1, 2, 3]]))
    assert NAME in vars(model)
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == state and repr(model) == shown


def test_a_mapping_from_models():
    thing, other = Remembered[list[int]](), Remembered[list[int]]()
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    assert a not in thing and thing.get(a) is None and thing.pop(a) is None
    with pytest.raises(KeyError):
        thing[a]
    assert thing.setdefault(a, [1]) is thing.setdefault(a, [2]) and thing[a] == [1]
    with pytest.raises(KeyError):
        thing[b]
    other[a] = [3]
    assert b not in thing and other[a] == [3] and thing.pop(a) == [1]
    assert a not in thing and a in other
