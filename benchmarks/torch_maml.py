"""MAML in PyTorch as one would write it: a loop over tasks, `torch.func`, `torch.compile` of it. For `peers.py`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Params = dict[str, Tensor]  # by the path that they have in the library: "Conv3x3_0/kernel"


class Task(NamedTuple):
    """Inputs and targets of one task; or of a meta-batch, each with a leading axis [B]."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


class Arithmetic(NamedTuple):
    """What a meta-update computes."""

    network: Callable[[Params, Tensor], Tensor]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    inner_lr: float
    inner_steps: int
    second_order: bool

    def loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss over examples."""
        return self.loss_fn(self.network(params, x), y)


def strided_conv(params: Params, x: Tensor) -> Tensor:
    """`image_models.StridedConvNet` of images [n, C, H, W]; logits [n, ways]."""
    for block in range(4):
        # As XLA pads for "SAME", which PyTorch does not have for strides: an odd one more at the end.
        missing = [max((-(-size // 2) - 1) * 2 + 3 - size, 0) for size in (x.shape[3], x.shape[2])]
        x = functional.pad(x, [side for pad in missing for side in (pad // 2, pad - pad // 2)])
        x = functional.relu(_normalised(params, block, x, stride=2))
    return _linear(params, 0, x.mean((2, 3)))


def pooled_conv(params: Params, x: Tensor) -> Tensor:
    """`image_models.PooledConvNet` of images [n, C, H, W]; logits [n, ways]."""
    for block in range(4):
        x = functional.max_pool2d(functional.relu(_normalised(params, block, x, padding=1)), 2)
    return _linear(params, 0, x.permute(0, 2, 3, 1).flatten(1))  # channels last, as the library has them


def mlp(params: Params, x: Tensor) -> Tensor:
    """`models.mlp` with two hidden layers, of inputs [n, d]; outputs [n, d]."""
    for layer in range(2):
        x = functional.relu(_linear(params, layer, x))
    return _linear(params, 2, x)


def _normalised(params: Params, block: int, x: Tensor, **keywords: int) -> Tensor:
    x = functional.conv2d(x, params[f"Conv3x3_{block}/kernel"], params[f"Conv3x3_{block}/bias"], **keywords)
    shift = params[f"BatchStatNorm_{block}/shift"]
    # On CUDA the second backward pass fails without a weight: "tensor does not have a device".
    scale = torch.ones_like(shift) if x.is_cuda else None
    return functional.batch_norm(x, None, None, scale, shift, training=True, eps=1e-3)


def _linear(params: Params, layer: int, x: Tensor) -> Tensor:
    return x @ params[f"Dense_{layer}/kernel"] + params[f"Dense_{layer}/bias"]


def split(params: Params) -> tuple[Params, Params]:
    """Divide parameters into those that adapt, and the shifts of normalisation, which the outer loop alone learns."""
    shared = {name: value for name, value in params.items() if name.endswith("/shift")}
    return {name: value for name, value in params.items() if name not in shared}, shared


def func_task_loss(arithmetic: Arithmetic, params: Params, task: Task) -> Tensor:
    """Loss on the query set after adaptation to the support set, by `torch.func.grad`."""
    adapted, shared = split(params)
    gradient_of = torch.func.grad(lambda adapted: arithmetic.loss(adapted | shared, task.support_x, task.support_y))
    for _ in range(arithmetic.inner_steps):
        gradient = gradient_of(adapted)
        if not arithmetic.second_order:
            gradient = {name: value.detach() for name, value in gradient.items()}
        adapted = {name: value - arithmetic.inner_lr * gradient[name] for name, value in adapted.items()}
    return arithmetic.loss(adapted | shared, task.query_x, task.query_y)


def autograd_task_loss(arithmetic: Arithmetic, params: Params, task: Task) -> Tensor:
    """The same by `torch.autograd.grad`."""
    adapted, shared = split(params)
    for _ in range(arithmetic.inner_steps):
        loss = arithmetic.loss(adapted | shared, task.support_x, task.support_y)
        gradient = torch.autograd.grad(loss, list(adapted.values()), create_graph=arithmetic.second_order)
        adapted = {
            name: value - arithmetic.inner_lr * slope for (name, value), slope in zip(adapted.items(), gradient, strict=True)
        }
    return arithmetic.loss(adapted | shared, task.query_x, task.query_y)


def one_by_one(task_loss: Callable, arithmetic: Arithmetic, params: Params, tasks: Task) -> Callable[[], Tensor]:
    """Build what adds the meta-gradient to `params` in a loop over tasks, and returns the mean loss."""

    def backward() -> Tensor:
        total = tasks.query_x.new_zeros(())
        for task in zip(*tasks, strict=True):
            loss = task_loss(arithmetic, params, Task(*task)) / len(tasks.query_x)
            loss.backward()  # adds to the gradients, and frees the graph of this task
            total += loss.detach()
        return total

    return backward


def all_at_once(arithmetic: Arithmetic, params: Params, tasks: Task) -> Callable[[], Tensor]:
    """The same with `torch.func.vmap` over tasks."""
    losses = torch.func.vmap(partial(func_task_loss, arithmetic), in_dims=(None, 0))

    def backward() -> Tensor:
        loss = losses(params, tasks).mean()
        loss.backward()
        return loss.detach()

    return backward


def compiled(arithmetic: Arithmetic, params: Params, tasks: Task) -> Callable[[], Tensor]:
    """The same, with loss and meta-gradient in one function that `torch.compile` has compiled; this compiles it."""
    losses = torch.func.vmap(partial(func_task_loss, arithmetic), in_dims=(None, 0))
    run = torch.compile(torch.func.grad_and_value(lambda params, tasks: losses(params, tasks).mean()), dynamic=False)

    def backward() -> Tensor:
        gradient, loss = run({name: value.detach() for name, value in params.items()}, tasks)
        for name, value in params.items():
            value.grad = gradient[name].contiguous()  # fused Adam takes no other layout
        return loss

    backward()
    return backward


STYLES = {
    "torch.func": all_at_once,
    "loop over tasks": partial(one_by_one, autograd_task_loss),
    "torch.compile": compiled,
}
NETWORKS = {"mlp": mlp, "strided_conv": strided_conv, "pooled_conv": pooled_conv}


def build(
    style: Callable,
    arithmetic: Arithmetic,
    params: Mapping[str, np.ndarray],
    tasks: tuple[np.ndarray, ...],
    *,
    meta_lr: float,
    device: str,
) -> tuple[Callable[[int], float], Callable[[], dict[str, np.ndarray]]]:
    """Build a meta-update on fixed tasks.

    Args:
        style: (arithmetic, params, tasks) -> what adds the meta-gradient to the parameters and returns the loss.
        arithmetic: what to compute.
        params: of the network, in the library's layouts.
        tasks: support x [B, n, H, W, C] or [B, n, d], support y [B, n] or [B, n, d], and those of the query set.
        meta_lr: step size of Adam.
        device: PyTorch's name for where to compute, "cpu" or "cuda".

    Returns:
        What does so many meta-updates and returns the loss before the last; and what returns Adam's mean of the meta-gradients.

    Raises:
        ImportError: PyTorch has no GPU to compute on.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ImportError("JAX runs on a GPU, but this PyTorch finds none. Install one with CUDA, or set JAX_PLATFORMS=cpu.")
    leaves = {name: nn.Parameter(_to_torch(value).to(device)) for name, value in params.items()}
    adam = torch.optim.Adam(leaves.values(), lr=meta_lr, fused=True)
    backward = style(arithmetic, leaves, Task(*(_inputs_to_torch(values).to(device) for values in tasks)))

    def update(count: int) -> float:
        for _ in range(count):
            adam.zero_grad()
            loss = backward()
            adam.step()
        return loss.item()  # which waits for the device

    return update, lambda: {name: _to_numpy(adam.state[value]["exp_avg"]) for name, value in leaves.items()}


def _inputs_to_torch(values: np.ndarray) -> Tensor:
    """Images [B, n, H, W, C] become [B, n, C, H, W], labels int64."""
    if values.ndim == 5:
        values = np.moveaxis(values, -1, -3)
    return torch.tensor(values.astype(np.int64) if values.dtype == np.int32 else values).contiguous()


def _to_torch(value: np.ndarray) -> Tensor:
    """Kernels of convolutions [3, 3, C, F] become [F, C, 3, 3]."""
    value = torch.tensor(value)
    return value.permute(3, 2, 0, 1).contiguous() if value.ndim == 4 else value


def _to_numpy(value: Tensor) -> np.ndarray:
    return (value.permute(2, 3, 1, 0) if value.ndim == 4 else value).cpu().numpy()
