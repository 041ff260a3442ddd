"""What the tests hold the operators to: the definition, in float64, by operations whose derivatives PyTorch knows."""

import torch


def norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, rms=False):
    """The definition, differentiable to every order; in the dtype of ``x``."""
    dims = tuple(range(-len(normalized_shape), 0))
    if not rms:
        x = x - x.mean(dims, keepdim=True)
    y = x * (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def truth(x, normalized_shape, weight=None, bias=None, eps=1e-5, rms=False, grad=None):
    """(output, gradients of x, weight and bias, None where absent) in float64, from the tensors' own rounded values."""
    wide = [None if t is None else t.detach().double() for t in (x, weight, bias)]
    if not rms:
        # Layer norm does not see a row's offset, but float64 arithmetic on float64 data does.
        rows = wide[0].reshape(*x.shape[: x.dim() - len(normalized_shape)], -1)
        wide[0] = (rows - rows[..., :1]).reshape(x.shape)
    wide = [None if t is None else t.requires_grad_() for t in wide]
    y = norm(wide[0], normalized_shape, *wide[1:], eps=eps, rms=rms)
    grads = [None, None, None]
    if grad is not None:
        present = [t for t in wide if t is not None]
        found = iter(torch.autograd.grad(y, present, grad.double()))
        grads = [None if t is None else next(found) for t in wide]
    return y.detach(), *grads


def gradients(y, tensors, grad):
    """Of ``tensors``, None for those that are None or require none."""
    wanted = [t is not None and t.requires_grad for t in tensors]
    found = iter(torch.autograd.grad(y, [t for t, w in zip(tensors, wanted, strict=True) if w], grad))
    return [next(found) if w else None for w in wanted]
