"""`torch.autograd.grad(is_grads_batched=True)`: the loop's K backward passes as one, vectorised by torch."""

import torch
from torch import Tensor, nn

CHUNK = 128


# begin: both
def scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str, k: int) -> tuple[Tensor, Tensor]:
    model.requires_grad_(False).set_attn_implementation("eager")
    last_B = attention_mask.sum(1) - 1
    each_B = torch.arange(len(last_B))
    theta = torch.zeros(len(last_B), 1, model.config.hidden_size, requires_grad=True)
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: output + theta)
    hidden_BTD = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    handle.remove()
    log_p_BK = model.lm_head(hidden_BTD[each_B, last_B]).log_softmax(-1).topk(k).values
    summed_K = log_p_BK.sum(0)
    chunks = torch.eye(k).split(CHUNK)
    rows = [torch.autograd.grad(summed_K, theta, one_hot, True, is_grads_batched=True)[0] for one_hot in chunks]
    return log_p_BK.detach(), torch.cat(rows)[:, :, 0].transpose(0, 1)


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
