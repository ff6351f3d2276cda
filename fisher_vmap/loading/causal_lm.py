"""Is what a user names a causal LM? Its configuration is asked before its weights are read, the model itself after."""

from typing import Any

import transformers

from fisher_vmap.anatomy.causality import sees_ahead
from fisher_vmap.errors import UserError
from fisher_vmap.pullbacks.quantized import CannotDifferentiate, quantized_pullbacks


def refuse_other_kinds(model_path: str, config: Any) -> None:
    """Raise UserError for what its configuration says is an encoder, an encoder-decoder, or no language model."""
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{model_path} is an encoder-decoder ({config.model_type}); expected a decoder-only causal LM")
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    made_for = getattr(config, "architectures", None) or []
    if config.model_type not in known and not remote:
        raise UserError(
            f"{model_path} is a {config.model_type} model, which has no causal LM; expected a decoder-only causal LM"
        )
    if made_for and not remote and all(name.endswith("ForMaskedLM") for name in made_for):
        raise UserError(f"{model_path} is a masked LM ({made_for[0]}); expected a decoder-only causal LM")


def refuse_foresight(model_path: str, model: Any) -> None:
    """Raise UserError for a model whose attention looks ahead, whatever it calls itself, or that has no derivatives."""
    try:
        with quantized_pullbacks(model):
            ahead = sees_ahead(model)
    except CannotDifferentiate as error:
        raise UserError(f"{model_path}: {error}") from error
    if ahead:
        raise UserError(
            f"{model_path}: {type(model).__name__} sees later tokens from earlier ones; expected a causal LM, "
            "whose attention looks back only"
        )
