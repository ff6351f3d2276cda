"""Values of a model's configuration that the user changes, as if they stood in its config.json.

`from_pretrained` sets such values on a finished configuration, where values that follow from others stay as they were,
and unknown names may be dropped. Here the configuration is made again from the changed values, and each is looked for.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import transformers

from fisher_vmap.errors import UserError
from fisher_vmap.load.options import ARGUMENTS
from fisher_vmap.load.source import explained

ROPE = ("rope_theta", "rope_scaling", "rope_parameters")  # earlier names, and that of transformers 5
# What says which model it is, and in which form it answers.
FIXED = {
    *("model_type", "architectures", "auto_map", "is_encoder_decoder", "transformers_version", "quantization_config"),
    *("return_dict", "output_hidden_states", "output_attentions", "use_cache"),
}
PER_LAYER = ("layer_types", "mlp_layer_types")


def changed_config(model_path: str, config: Any, stored: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """The configuration with changed values.

    Args:
        model_path: for messages.
        config: as it was read.
        stored: the contents of its config.json.
        changes: new values by name; those of a part of the configuration as a mapping.

    Raises:
        UserError: the configuration has no such name, or does not take the value.
    """
    if not changes:
        return config
    changes = _with_numbers(changes)
    kind = type(config)
    names = {*stored, *(field.name for field in fields(config)), *config.attribute_map}
    rope = dict(getattr(config, "rope_parameters", None) or {})
    names |= set(ROPE if rope else ())
    for name in changes:
        if name not in names or name in FIXED or name.startswith("_"):
            raise UserError(
                f"model_kwargs has {name!r}, which cannot be given to from_pretrained here and is not in the "
                f"{kind.__name__} of {model_path}; {_instead(name, config, names - FIXED)}"
            )
    values = dict(stored)
    for name, value in changes.items():
        part = isinstance(getattr(config, name, None), transformers.PretrainedConfig) and isinstance(value, dict)
        values[config.attribute_map.get(name, name)] = {**stored.get(name, {}), **value} if part else value
    if rope and any(name in changes for name in ROPE):
        values = {n: v for n, v in values.items() if n not in ROPE} | {"rope_parameters": _rope(rope, changes)}
    layers = values.get(config.attribute_map.get("num_hidden_layers", "num_hidden_layers"))
    for name in PER_LAYER:  # of fewer layers, the first
        if isinstance(values.get(name), list) and isinstance(layers, int) and name not in changes:
            values[name] = values[name][:layers]
    made = explained(model_path, "config", kind.from_dict, values, hint="check model_kwargs")
    made.name_or_path = config.name_or_path
    _check_taken(model_path, made, changes)
    return made


def _rope(before: dict[str, Any], changes: Mapping[str, Any]) -> Any:
    """The new `rope_parameters`: a new scaling keeps the base wavelength, and a new wavelength keeps the scaling."""
    scaling = changes.get("rope_parameters", changes.get("rope_scaling", before))
    if not isinstance(scaling, dict | None):
        raise UserError(
            f"rope_scaling in model_kwargs is {scaling!r}; expected a mapping such as {{rope_type: linear}}"
        )
    nested = any(isinstance(value, dict) for value in (before if scaling is None else scaling).values())
    if nested and "rope_theta" in changes:
        raise UserError(
            "this model has a rope_theta for each kind of layer; give all of rope_parameters in model_kwargs"
        )
    if nested:
        return scaling
    theta = changes.get("rope_theta", before.get("rope_theta"))
    return {"rope_theta": theta, **(scaling or {})} | ({"rope_theta": theta} if "rope_theta" in changes else {})


def _with_numbers(value: Any) -> Any:
    """The value with numbers such as 1e-5 as numbers, which YAML reads as text where they have no point."""
    if isinstance(value, Mapping):
        return {name: _with_numbers(inner) for name, inner in value.items()}
    written = isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+", value)
    return float(value) if written else value


def _check_taken(model_path: str, made: Any, changes: Mapping[str, Any]) -> None:
    """Raise UserError for a value that the configuration has dropped or that no layer looks at."""
    for name, value in changes.items():
        if name in ROPE or isinstance(value, dict):
            continue
        found = getattr(made, name, None)
        if found != value and not (isinstance(value, list) and list(found or ()) == value):
            raise UserError(
                f"model_kwargs sets {name} to {value!r}, but {type(made).__name__} makes {found!r} of it; what it "
                f"depends on is in the config.json of {model_path}"
            )
    types = getattr(made, "layer_types", None)
    if changes.get("sliding_window") and types and "sliding_attention" not in types:
        raise UserError(
            f"model_kwargs sets sliding_window, but none of the layer_types of {model_path} is sliding_attention; give "
            "layer_types as well"
        )


def _instead(name: str, config: Any, names: Iterable[str]) -> str:
    for part in getattr(config, "sub_configs", {}):
        if hasattr(getattr(config, part, None), name):
            return f"it is in its {part}: give {{{part}: {{{name}: ...}}}}"
    near = difflib.get_close_matches(name, [*names, *ARGUMENTS], n=1, cutoff=0.7)
    return f"did you mean {near[0]!r}?" if near else "its config.json has the names"
