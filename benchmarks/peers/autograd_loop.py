"""Plain autograd: one backward pass a token, each serving the whole batch through a bias row a prompt."""

import torch
from torch import Tensor, nn

NAME, PACKAGE = "autograd loop", "torch"
CANNOT = "K passes a batch; the whole vocabulary takes V of them"


# begin: both
def scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str, k: int) -> tuple[Tensor, Tensor]:
    model.requires_grad_(False)
    last_B = attention_mask.sum(1) - 1
    each_B = torch.arange(len(last_B))
    theta = torch.zeros(len(last_B), 1, model.config.hidden_size, requires_grad=True)
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: output + theta)
    hidden_BTD = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    handle.remove()
    log_p_BK = model.lm_head(hidden_BTD[each_B, last_B]).log_softmax(-1).topk(k).values
    rows = [torch.autograd.grad(log_p_BK[:, t].sum(), theta, retain_graph=True)[0][:, 0] for t in range(k)]
    return log_p_BK.detach(), torch.stack(rows, 1)


# end


# begin: top-k
def top_k(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str, k: int) -> tuple[Tensor, Tensor]:
    log_p_BK, G_BKD = scores(model, input_ids, attention_mask, layer, k)
    _, sigma_BK, V_BKD = torch.linalg.svd((log_p_BK / 2).exp()[:, :, None] * G_BKD, full_matrices=False)
    return sigma_BK**2, V_BKD


# end


# begin: whole
def whole(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str) -> Tensor:
    log_p_BV, G_BVD = scores(model, input_ids, attention_mask, layer, model.config.vocab_size)
    return G_BVD.mT @ (log_p_BV.exp()[:, :, None] * G_BVD)


# end
