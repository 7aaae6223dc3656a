"""MAML on images in PyTorch, as one would write it: a loop over tasks, and `torch.func`. For `peers.py`, on the CPU."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Style = Literal["torch.func", "loop"]
Params = dict[str, Tensor]  # by the path that they have in the library: "PatchConv_0/kernel"


def network(params: Params, x: Tensor) -> Tensor:
    """`models.StridedConvNet` of images [n, C, H, W]; logits [n, ways]."""
    for block in range(4):
        missing = [max((-(-size // 2) - 1) * 2 + 3 - size, 0) for size in (x.shape[3], x.shape[2])]
        x = functional.pad(x, [side for pad in missing for side in (pad // 2, pad - pad // 2)])
        x = functional.conv2d(x, params[f"PatchConv_{block}/kernel"], params[f"PatchConv_{block}/bias"], stride=2)
        shift = params[f"BatchStatNorm_{block}/shift"]
        x = functional.relu(functional.batch_norm(x, None, None, bias=shift, training=True, eps=1e-3))
    return x.mean((2, 3)) @ params["Dense_0/kernel"] + params["Dense_0/bias"]


def support_loss(adapted: Params, shared: Params, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy as a function of the parameters that adapt."""
    return functional.cross_entropy(network(adapted | shared, x), y)


def task_loss(params: Params, x: Tensor, y: Tensor, *, style: Style, inner_lr: float, second_order: bool) -> Tensor:
    """Loss on the query set after one step on the support set; x [2, n, C, H, W] and y [2, n], support first."""
    shared = {name: value for name, value in params.items() if name.endswith("/shift")}
    initial = {name: value for name, value in params.items() if name not in shared}
    if style == "torch.func":
        gradient = torch.func.grad(support_loss)(initial, shared, x[0], y[0])
        if not second_order:
            gradient = {name: value.detach() for name, value in gradient.items()}
    else:
        loss = support_loss(initial, shared, x[0], y[0])
        gradient = torch.autograd.grad(loss, list(initial.values()), create_graph=second_order)
        gradient = dict(zip(initial, gradient, strict=True))
    adapted = {name: value - inner_lr * gradient[name] for name, value in initial.items()}
    return support_loss(adapted, shared, x[1], y[1])


def build(
    params: dict[str, np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    *,
    style: Style,
    inner_lr: float,
    meta_lr: float,
    second_order: bool,
) -> tuple[Callable[[], Tensor], Callable[[], dict[str, np.ndarray]]]:
    """Build a meta-update on fixed tasks.

    Args:
        params: of the network, in the library's layouts.
        x: [B, 2, n, H, W, C] images, those of the support set first.
        y: [B, 2, n] labels.
        style: a loop over tasks with `torch.autograd.grad`, or `torch.func.vmap` over tasks of `torch.func.grad`.
        inner_lr: step size of adaptation.
        meta_lr: step size of Adam.
        second_order: whether to differentiate through the inner gradient.

    Returns:
        What does one meta-update and returns the loss before it; and what returns Adam's mean of the meta-gradients.
    """
    params = {name: _to_torch(value).requires_grad_() for name, value in params.items()}
    x, y = torch.tensor(np.moveaxis(x, -1, -3)).contiguous(), torch.tensor(y, dtype=torch.int64)
    adam = torch.optim.Adam(params.values(), lr=meta_lr, fused=True)
    one_task = partial(task_loss, style=style, inner_lr=inner_lr, second_order=second_order)

    def all_at_once() -> Tensor:
        loss = torch.func.vmap(one_task, in_dims=(None, 0, 0))(params, x, y).mean()
        loss.backward()
        return loss.detach()

    def one_by_one() -> Tensor:
        total = torch.zeros((), dtype=x.dtype)
        for task in zip(x, y, strict=True):
            loss = one_task(params, *task) / len(x)
            loss.backward()  # adds to the gradients, and frees the graph of this task
            total += loss.detach()
        return total

    def update() -> Tensor:
        adam.zero_grad()
        loss = all_at_once() if style == "torch.func" else one_by_one()
        adam.step()
        return loss

    return update, lambda: {name: _to_numpy(adam.state[value]["exp_avg"]) for name, value in params.items()}


def _to_torch(value: np.ndarray) -> Tensor:
    """Kernels of convolutions [3, 3, C, F] become [F, C, 3, 3]."""
    value = torch.tensor(value)
    return value.permute(3, 2, 0, 1).contiguous() if value.ndim == 4 else value


def _to_numpy(value: Tensor) -> np.ndarray:
    return (value.permute(2, 3, 1, 0) if value.ndim == 4 else value).numpy()
