"""MAML in PyTorch with the packages made for it, `higher` and TorchOpt, both in a loop over tasks. For `peers.py`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch_maml import Arithmetic, Params, Task, one_by_one, split


class Network(nn.Module):
    """Parameters, and what to do with them, as the module that `higher` wants."""

    def __init__(self, params: Params, network: Callable[[Params, Tensor], Tensor]) -> None:
        """Take parameters in, without a copy."""
        super().__init__()
        self.names, self.network = tuple(params), network
        for name, value in params.items():
            self.register_parameter(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network."""
        return self.network({name: getattr(self, name) for name in self.names}, x)


def by_higher(arithmetic: Arithmetic, params: Params, tasks: Task) -> Callable[[], Tensor]:
    """Build what adds the meta-gradient to `params` with `higher.innerloop_ctx`, and returns the mean loss.

    In first order it tracks nothing, and the gradient is that at the adapted parameters.
    """
    import higher

    module = Network(params, arithmetic.network)
    inner = torch.optim.SGD(split(params)[0].values(), lr=arithmetic.inner_lr)
    tracking = {"copy_initial_weights": False, "track_higher_grads": arithmetic.second_order}

    def add_gradient(task: Task) -> Tensor:
        with higher.innerloop_ctx(module, inner, **tracking) as (fast, optimiser):
            for _ in range(arithmetic.inner_steps):
                optimiser.step(arithmetic.loss_fn(fast(task.support_x), task.support_y))
            loss = arithmetic.loss_fn(fast(task.query_x), task.query_y) / len(tasks.query_x)
            if arithmetic.second_order:
                loss.backward()
            else:
                for value, slope in zip(params.values(), torch.autograd.grad(loss, list(fast.parameters())), strict=True):
                    value.grad = slope.contiguous() if value.grad is None else value.grad + slope  # fused Adam's layout
        return loss.detach()

    return lambda: sum(add_gradient(Task(*task)) for task in zip(*tasks, strict=True))


def by_torchopt(arithmetic: Arithmetic, params: Params, tasks: Task) -> Callable[[], Tensor]:
    """The same with TorchOpt's functional gradient descent."""
    import torchopt

    rule = torchopt.sgd(arithmetic.inner_lr)

    def task_loss(arithmetic: Arithmetic, params: Params, task: Task) -> Tensor:
        adapted, shared = split(params)
        state = rule.init(adapted)
        for _ in range(arithmetic.inner_steps):
            loss = arithmetic.loss(adapted | shared, task.support_x, task.support_y)
            slopes = torch.autograd.grad(loss, list(adapted.values()), create_graph=arithmetic.second_order)
            updates, state = rule.update(dict(zip(adapted, slopes, strict=True)), state, inplace=False)
            adapted = torchopt.apply_updates(adapted, updates, inplace=False)
        return arithmetic.loss(adapted | shared, task.query_x, task.query_y)

    return one_by_one(task_loss, arithmetic, params, tasks)
