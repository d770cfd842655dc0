"""Summed cross-entropy of the supervised tokens, in the form that fits a model.

Shapes: B sequences, T positions, N supervised tokens, C tokens of a chunk, V vocabulary, D hidden size.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from finetune.errors import explained, of_libraries

if TYPE_CHECKING:
    from peft import PeftModel

Inputs = dict[str, Any]
"""The arguments of a model's forward: tensors, and lists for the host."""
# (model, its inputs, places of supervised tokens among B * T, labels) -> summed nats (fp32 scalar), nats of each token (fp32, (N,))
TokenLosses = Callable[[PreTrainedModel, Inputs, Tensor, Tensor], tuple[Tensor, Tensor]]
CHUNK_TOKENS = 512  # on two CPU cores 128 is 40 % slower: every chunk is one more pass over the gradient of the head
LARGE_CHUNK_TOKENS = 4096  # of a trained head on a GPU, where that pass takes as long as the chunk's own product


def full(model: PreTrainedModel, inputs: Inputs, positions_N: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Summed nats (fp32 scalar), and of each token (fp32, (N,)), from the model's own logits, all in memory at once: for any head.

    `positions_N` are the places among B * T whose next token is supervised, and `labels_N` is that token.
    """
    is_single = len(inputs["input_ids"]) == 1 and takes_places(model)
    # of padded rows no one set of columns is wanted: all
    kept = {"logits_to_keep": positions_N} if is_single else {}
    logits_NV = model(**inputs, **kept, use_cache=False).logits.flatten(0, 1)
    logits_NV = logits_NV if is_single else logits_NV[positions_N]
    losses_N = F.cross_entropy(logits_NV.float(), labels_N, reduction="none")
    return losses_N.sum(), losses_N


def chunked(
    model: PreTrainedModel, inputs: Inputs, positions_N: Tensor, labels_N: Tensor, is_large: bool = False
) -> tuple[Tensor, Tensor]:
    """The same from the decoder's output and the head's weight: never more than `CHUNK_TOKENS` rows of logits at once."""
    hidden_ND = decoder_of(model)(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    # Where every token is supervised, the selection would only copy all hidden states.
    if len(positions_N) < len(hidden_ND):
        hidden_ND = hidden_ND.index_select(0, positions_N)
    head = head_of(model)
    if head is None:
        raise ValueError("the head of this model is not one linear layer")
    return LinearCrossEntropy.apply(hidden_ND, head.weight, head.bias, labels_N, head.scale, head.cap, is_large)


def in_large_chunks(
    model: PreTrainedModel, inputs: Inputs, positions_N: Tensor, labels_N: Tensor
) -> tuple[Tensor, Tensor]:
    """As `chunked`, in fewer passes over memory (`Plan.gpu_sums`): `LARGE_CHUNK_TOKENS` rows of logits at once, if the head is trained."""
    return chunked(model, inputs, positions_N, labels_N, is_large=True)


def fitting(model: PreTrainedModel) -> tuple[TokenLosses, str | None]:
    """`chunked`, or `full` and the reason if the model's logits are not its linear head on its decoder's output."""
    head = head_of(model)
    if head is None:
        return full, "its head is not one linear layer"
    tokens = torch.arange(2, 10, device=head.weight.device)[None] % len(head.weight)
    with torch.no_grad():  # what FSDP makes in inference mode could not be trained
        with explained("transformers cannot run it", type(unwrapped(model)).__name__):
            logits = model(input_ids=tokens, use_cache=False).logits
        try:
            hidden = decoder_of(model)(input_ids=tokens, use_cache=False).last_hidden_state
            ours = _shaped(F.linear(hidden, head.weight.to(hidden.dtype), head.bias), head.scale, head.cap)
        except of_libraries():
            return full, "its decoder gives no hidden states"
    if ours.shape != logits.shape or (ours - logits).abs().max() > 1e-3 * logits.abs().max():
        return full, "its logits are not its head on its decoder's output"
    return chunked, None


def note(reason: str | None) -> str | None:
    """A line for the user about the reason of `fitting`; None without one."""
    return f"the loss holds the logits of a whole micro-batch: {reason}" if reason else None


def takes_places(model: PreTrainedModel) -> bool:
    """Whether the model can compute the logits of given places alone."""
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters


class Head(NamedTuple):
    """logits = cap * tanh(scale * (weight @ hidden + bias) / cap), without a cap scale * (weight @ hidden + bias)."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    cap: float | None


def head_of(model: PreTrainedModel) -> Head | None:
    """The model's own head, if it is one linear layer; how its logits are scaled and capped is in its config."""
    layer = _language_model(model).get_output_embeddings()
    # A subclass, like a quantized layer, computes something else with its weight.
    if type(layer) is not torch.nn.Linear:
        return None
    config = model.config.get_text_config()
    # Cohere multiplies by logit_scale, Granite divides by logits_scaling.
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(layer.weight, layer.bias, float(scale), getattr(config, "final_logit_softcapping", None))


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The module before the head: it computes the hidden states."""
    return cast(PreTrainedModel, _language_model(model).get_decoder())


def _language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the head: of some families with images, it is a whole causal LM inside (Llama 4)."""
    whole = unwrapped(model)
    inner = whole.get_decoder()
    has_head = whole.get_output_embeddings() is None and getattr(inner, "get_output_embeddings", lambda: None)()
    return cast(PreTrainedModel, inner if has_head else whole)


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model of transformers under an adapter, or the model itself."""
    inner = cast("PeftModel", model).get_base_model() if hasattr(model, "peft_config") else model
    return cast(PreTrainedModel, inner)


def _shaped(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    if scale != 1.0:
        logits = logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


class LinearCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy in one, chunk by chunk; the gradients are made in the forward pass, while a chunk's logits exist.

    It takes three matrix products, as the plain way does, and memory for only C x V logits. The sum alone is differentiable, so
    all tokens have one incoming gradient, which the backward pass multiplies in. Products are in autocast's type or the
    hidden states' own, everything else is in fp32. As in Liger's fused kernel (Hsu et al. 2024, arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        scale: float,
        cap: float | None,
        is_large: bool = False,
    ) -> tuple[Tensor, Tensor]:
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        # Cast by hand: autocast may cast the head again for every chunk.
        with torch.autocast(device, enabled=False):
            head = Head(weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype), scale, cap)
            hidden_grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
            # In fp32, because a sum over many chunks would lose digits in bf16.
            weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
            bias_grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
            losses, tokens = [], LARGE_CHUNK_TOKENS if is_large and wants_weight else CHUNK_TOKENS
            for start in range(0, len(labels_N), tokens):
                chunk = slice(start, start + tokens)
                hidden_CD = hidden_ND[chunk].to(dtype)
                # An evaluation wants no gradients, which are two of the three products.
                wants_grad = any(ctx.needs_input_grad)
                losses_C, logits_grad_CV = _chunk(hidden_CD, head, labels_N[chunk], wants_grad, is_large)
                losses.append(losses_C)
                if logits_grad_CV is None:
                    continue
                if hidden_grad_ND is not None:
                    hidden_grad_ND[chunk] = logits_grad_CV @ head.weight
                if weight_grad_VD is not None:
                    _add_product(weight_grad_VD, logits_grad_CV.T, hidden_CD, is_large)
                if bias_grad_V is not None:
                    bias_grad_V += logits_grad_CV.sum(0, dtype=torch.float32)
                del logits_grad_CV  # else it lives while the next chunk's is made
        losses_N = torch.cat(losses)
        ctx.save_for_backward(hidden_grad_ND, weight_grad_VD, bias_grad_V)
        ctx.types = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(losses_N)
        return losses_N.sum(), losses_N

    @staticmethod
    def backward(
        ctx: Any, sum_grad: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None]:
        pairs = zip(ctx.saved_tensors, ctx.types, strict=True)
        # in place: the gradient of a head may be the largest tensor of all, and nothing else reads it
        grads = [None if grad is None else grad.mul_(sum_grad).to(dtype) for grad, dtype in pairs]
        return grads[0], grads[1], grads[2], None, None, None, None


def _chunk(
    hidden_CD: Tensor, head: Head, labels_C: Tensor, wants_grad: bool, is_large: bool
) -> tuple[Tensor, Tensor | None]:
    """Nats of each token, and the gradient of their sum with respect to the bare product, in its own type."""
    product_CV = F.linear(hidden_CD, head.weight, head.bias)
    is_bare = is_large and head.scale == 1.0 and head.cap is None
    # In fp32, as in transformers' own loss; a bare product is cast within the softmax.
    logits_CV = product_CV if is_bare else _shaped(product_CV.float(), head.scale, head.cap)
    log_probabilities_CV = F.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
    losses_C = -log_probabilities_CV.gather(1, labels_C[:, None])[:, 0]
    if not wants_grad:
        return losses_C, None
    grad_CV = log_probabilities_CV.exp_()  # in place: such a tensor is hundreds of megabytes
    # The gradient of cross-entropy by its logits: the probabilities, less 1 at the label.
    grad_CV[torch.arange(len(labels_C), device=labels_C.device), labels_C] -= 1
    if head.cap is not None:
        # The derivative of cap * tanh(x / cap) by x.
        grad_CV.mul_(1 - (logits_CV / head.cap) ** 2)
    if head.scale != 1.0:
        grad_CV.mul_(head.scale)
    return losses_C, grad_CV.to(product_CV.dtype)


def _add_product(sum_: Tensor, left: Tensor, right: Tensor, is_large: bool) -> None:
    if left.dtype == sum_.dtype:
        sum_.addmm_(left, right)
    elif is_large and sum_.device.type == "cuda" and "dtype_out" in torch.ops.aten.addmm.overloads():
        torch.addmm(sum_, left, right, out_dtype=sum_.dtype, out=sum_)  # a CPU has no such kernel
    else:
        sum_ += left @ right  # the product is rounded once, the sum over chunks is not
