"""curvlinops: the generalised Gauss-Newton matrix of the cross entropy, with the bias as its only parameter."""

import torch
from curvlinops import GGNLinearOperator
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn


# begin: both
class Bias(nn.Module):
    def __init__(self, model: nn.Module, layer: str):
        super().__init__()
        self.model, self.layer = model.requires_grad_(False), model.get_submodule(layer)
        self.model.set_attn_implementation("eager")
        self.theta = nn.Parameter(torch.zeros(model.config.hidden_size))

    def forward(self, ids_1T: Tensor) -> Tensor:
        handle = self.layer.register_forward_hook(lambda module, args, output: output + self.theta)
        logits_1V = self.model(input_ids=ids_1T, use_cache=False, logits_to_keep=1).logits[:, 0]
        handle.remove()
        return logits_1V


def matrix(biased: nn.Module, loss: nn.Module, ids_T: Tensor, target: Tensor) -> GGNLinearOperator:
    return GGNLinearOperator(biased, loss, [biased.theta], [(ids_T[None], target)], check_deterministic=False)


def leading(operator: GGNLinearOperator, k: int) -> tuple[Tensor, Tensor]:
    values, vectors = eigsh(operator.to_scipy(), k, which="LA")
    return torch.tensor(values[::-1].copy()).float(), torch.tensor(vectors.T[::-1].copy()).float()


# end


# begin: top-k
class TopRows(Bias):
    def __init__(self, model: nn.Module, layer: str, tokens_K: Tensor):
        super().__init__(model, layer)
        self.tokens_K = tokens_K

    def forward(self, ids_1T: Tensor) -> Tensor:
        log_p_1K = super().forward(ids_1T).log_softmax(-1)[:, self.tokens_K]
        return (log_p_1K.detach() / 2).exp() * log_p_1K


def top_k(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str, k: int) -> tuple[Tensor, Tensor]:
    pairs = []
    for ids_T, n in zip(input_ids, attention_mask.sum(1).tolist(), strict=True):
        with torch.no_grad():
            tokens_K = Bias(model, layer)(ids_T[None, :n]).topk(k).indices[0]
        rows = TopRows(model, layer, tokens_K)
        twice_F = matrix(rows, nn.MSELoss(reduction="sum"), ids_T[:n], torch.zeros(1, k))
        values_K, vectors_KD = leading(twice_F, k)
        pairs.append((values_K / 2, vectors_KD))
    return torch.stack([values for values, _ in pairs]), torch.stack([vectors for _, vectors in pairs])


# end


# begin: whole
def whole(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str) -> Tensor:
    biased, ce, target = Bias(model, layer), nn.CrossEntropyLoss(reduction="sum"), torch.zeros(1, dtype=torch.int64)
    lengths = attention_mask.sum(1).tolist()
    every = torch.eye(model.config.hidden_size)
    return torch.stack([matrix(biased, ce, ids[:n], target) @ every for ids, n in zip(input_ids, lengths, strict=True)])


# end


# begin: leading
def leading_whole(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str, rank: int
) -> tuple[Tensor, Tensor]:
    biased, ce, target = Bias(model, layer), nn.CrossEntropyLoss(reduction="sum"), torch.zeros(1, dtype=torch.int64)
    lengths = attention_mask.sum(1).tolist()
    pairs = [leading(matrix(biased, ce, ids[:n], target), rank) for ids, n in zip(input_ids, lengths, strict=True)]
    return torch.stack([values for values, _ in pairs]), torch.stack([vectors for _, vectors in pairs])


# end
