"""nngeometry: the bias as the weight of a Linear(1, D) fed with a one, its Jacobian, its dense Fisher matrix."""

import torch
from nngeometry import FIM, Jacobian
from nngeometry.layercollection import LayerCollection
from nngeometry.object import PMatDense
from torch import Tensor, nn


# begin: both
class Bias(nn.Module):
    """Logits of the last token as a function of a bias, which is a layer since nngeometry knows layers alone."""

    def __init__(self, model: nn.Module, layer: str):
        super().__init__()
        self.model, self.layer = model.requires_grad_(False), model.get_submodule(layer)
        self.bias = nn.Linear(1, model.config.hidden_size, bias=False)
        nn.init.zeros_(self.bias.weight)

    def forward(self, ones_B1: Tensor, input_ids: Tensor, last_B: Tensor) -> Tensor:
        theta = self.bias(ones_B1)[:, None]
        handle = self.layer.register_forward_hook(lambda module, args, output: output + theta)
        hidden_BTD = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        handle.remove()
        return self.model.lm_head(hidden_BTD[torch.arange(len(last_B)), last_B])


# end


# begin: top-k
def top_k(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str, k: int) -> tuple[Tensor, Tensor]:
    biased = Bias(model, layer)

    def rows(*batch: Tensor) -> Tensor:
        log_p_BK = biased(*batch).log_softmax(-1).topk(k).values
        return (log_p_BK.detach() / 2).exp() * log_p_BK

    parts = LayerCollection()
    parts.add_layer_from_model(biased, biased.bias)
    batch = (torch.ones(len(input_ids), 1), input_ids, attention_mask.sum(1) - 1)
    A_KBD = Jacobian(biased, batch, function=rows, layer_collection=parts).to_torch()
    _, sigma_BK, V_BKD = torch.linalg.svd(A_KBD.transpose(0, 1), full_matrices=False)
    return sigma_BK**2, V_BKD


# end


# begin: whole
def whole(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str) -> Tensor:
    biased = Bias(model, layer)
    parts = LayerCollection()
    parts.add_layer_from_model(biased, biased.bias)
    matrices = []
    for ids_T, mask_T in zip(input_ids, attention_mask, strict=True):
        n = int(mask_T.sum())
        prompt = (torch.ones(1, 1), ids_T[None, :n], torch.tensor([n - 1]))
        matrices.append(FIM(biased, prompt, PMatDense, function=biased, layer_collection=parts).to_torch())
    return torch.stack(matrices)


# end
