"""This package."""

from torch import Tensor, nn

from fisher_vmap import compress, fisher_full, fisher_scores


# begin: top-k
def top_k(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str, k: int) -> tuple[Tensor, Tensor]:
    scores = fisher_scores(model, input_ids, attention_mask, layers=layer, top_k=k)
    low_rank = compress(scores.factor(), rank=k)
    return low_rank.singular_values, low_rank.vectors


# end


# begin: whole
def whole(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str) -> Tensor:
    every = model.config.hidden_size
    A_BDD = fisher_full(model, input_ids, attention_mask, layers=layer, rank=every, oversampling=0).factors[layer]
    return A_BDD.mT @ A_BDD


# end


# begin: leading
def leading_whole(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str, rank: int, **options: int
) -> tuple[Tensor, Tensor]:
    estimate = fisher_full(model, input_ids, attention_mask, layers=layer, rank=rank, **options)
    low_rank = compress(estimate.factors[layer], rank=rank)
    return low_rank.singular_values, low_rank.vectors


# end
