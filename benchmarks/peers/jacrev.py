"""`torch.func.jacrev` of the log-probabilities with respect to a bias row a prompt."""

import torch
from torch import Tensor, nn

CHUNK = 128


# begin: both
def scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str, k: int) -> tuple[Tensor, Tensor]:
    model.requires_grad_(False).set_attn_implementation("eager")
    last_B = attention_mask.sum(1) - 1
    each_B = torch.arange(len(last_B))

    def log_p(theta: Tensor) -> tuple[Tensor, Tensor]:
        handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: output + theta)
        hidden_BTD = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        handle.remove()
        log_p_BK = model.lm_head(hidden_BTD[each_B, last_B]).log_softmax(-1).topk(k).values
        return log_p_BK.sum(0), log_p_BK

    zero = torch.zeros(len(last_B), 1, model.config.hidden_size)
    G_KB1D, log_p_BK = torch.func.jacrev(log_p, has_aux=True, chunk_size=CHUNK)(zero)
    return log_p_BK, G_KB1D[:, :, 0].transpose(0, 1)


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
