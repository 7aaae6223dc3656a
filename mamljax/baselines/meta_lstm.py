"""The meta-learner LSTM (Ravi & Larochelle 2017, "Optimization as a model for few-shot learning"): a learned inner rule."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from mamljax.checks import check_count
from mamljax.rules import RuleLearningModel, check_step_size
from mamljax.types import Model, PyTree

LOG_RANGE = 10  # p: gradients above exp(-p) are seen by their logarithm
KEPT = 5.0  # the first bias of the forget gate, whose sigmoid is 0.993


class CellState(NamedTuple):
    """What the meta-learner remembers of each of n coordinates."""

    hidden: Array  # [n, h]
    memory: Array  # [n, h]
    input_gate: Array  # [n] i: the last step size
    forget_gate: Array  # [n] f: how much of the coordinate was kept


def meta_lstm(model: Model, inner_lr: float, *, hidden: int = 20) -> tuple[Model, optax.GradientTransformation]:
    r"""Let an LSTM that the outer loop learns, with the initialisation, take the adaptation steps.

    $\theta_t = f_t \odot \theta_{t-1} - i_t \odot \nabla L(\theta_{t-1})$: the parameters are the state of an LSTM cell, whose
    gates $i_t = \sigma(W_I [h_t, \theta_{t-1}, i_{t-1}] + b_I)$ and $f_t = \sigma(W_F [h_t, \theta_{t-1}, f_{t-1}] + b_F)$ see
    the output $h_t$ of another LSTM, which sees the gradient, as its logarithm and sign. All coordinates share the weights;
    each has a memory of its own.

    Args:
        model: the network.
        inner_lr: the step size with which training begins, between 0 and 1; 0.01 or so in the paper.
        hidden: h, units of the LSTM; 20 in the paper.

    Returns:
        A model whose params are a dict of "theta", the network's, and "cell", the LSTM's; and the rule that goes with it. Give
        both to `maml` with `differentiation="first_order"`: the paper, too, takes the gradients that the LSTM sees for
        constants.

    Raises:
        ValueError: a step size that is not positive, or not below 1, as a gate is; a count below 1.

    Differs from the paper: the LSTM does not see the loss, as an inner rule gets gradients and parameters alone.
    """
    check_count("hidden", hidden)
    check_step_size(inner_lr)
    if inner_lr >= 1:
        raise ValueError(f"the step size of a gate must be below 1, got {inner_lr}. The paper begins with about 0.01.")

    def init(key: Array) -> PyTree:
        theta_key, lstm_key, input_key, forget_key = jax.random.split(key, 4)
        small = jax.nn.initializers.normal(0.01)  # so that what the first steps do is up to the biases
        cell = {
            "lstm_kernel": small(lstm_key, (2 + hidden, 4 * hidden)),
            "lstm_bias": jnp.zeros((1, 4 * hidden)),
            "input_kernel": small(input_key, (hidden + 2,)),
            # The gate is a sigmoid: of the step size's logit it makes the step size.
            "input_bias": jnp.float32(math.log(inner_lr / (1 - inner_lr))),
            "forget_kernel": small(forget_key, (hidden + 2,)),
            "forget_bias": jnp.float32(KEPT),
        }
        return {"theta": model.init(theta_key), "cell": cell}

    def begin(params: PyTree) -> CellState:
        size = ravel_pytree(params["theta"])[0].size
        return CellState(
            hidden=jnp.zeros((size, hidden)),
            memory=jnp.zeros((size, hidden)),
            input_gate=jnp.zeros(size),
            forget_gate=jnp.zeros(size),
        )

    def step(gradient: PyTree, state: CellState, params: PyTree) -> tuple[PyTree, CellState]:
        slope, unravel = ravel_pytree(gradient["theta"])
        theta, cell = ravel_pytree(params["theta"])[0], params["cell"]
        inputs = jnp.concatenate([seen(slope), state.hidden], axis=1)
        out, memory = lstm(cell["lstm_kernel"], cell["lstm_bias"], inputs, state.memory)
        input_gate = _gate(cell["input_kernel"], cell["input_bias"], out, theta, state.input_gate)
        forget_gate = _gate(cell["forget_kernel"], cell["forget_bias"], out, theta, state.forget_gate)
        updates = {
            "theta": unravel((forget_gate - 1) * theta - input_gate * slope),  # -1, as an update is added to theta
            "cell": jax.tree.map(jnp.zeros_like, cell),
        }
        return updates, CellState(out, memory, input_gate, forget_gate)

    network = RuleLearningModel(init, lambda params, x: model.apply(params["theta"], x))
    return network, optax.GradientTransformation(begin, step)


def seen(slope: Array) -> Array:
    """What the LSTM sees of gradients [n], which differ by orders of magnitude: [n, 2], both in [-1, 1] but for large ones.

    It is the logarithm, in units of p, and the sign; of gradients below exp(-p), -1 and the gradient by exp(p) (Andrychowicz
    et al. 2016, arXiv 1606.04474, appendix A).
    """
    smallest = math.exp(-LOG_RANGE)
    size = jnp.abs(slope)
    logarithm = jnp.log(jnp.maximum(size, smallest)) / LOG_RANGE
    return jnp.stack([logarithm, jnp.where(size >= smallest, jnp.sign(slope), slope / smallest)], axis=1)


def lstm(kernel: Array, bias: Array, inputs: Array, memory: Array) -> tuple[Array, Array]:
    """One step of an LSTM: its inputs and last outputs [..., d + h], its memory [..., h] -> outputs and memory [..., h].

    The kernel is [d + h, 4 h], the bias [4 h] or [1, 4 h].
    """
    take, keep, show, new = jnp.split(inputs @ kernel + bias, 4, axis=-1)
    memory = jax.nn.sigmoid(keep) * memory + jax.nn.sigmoid(take) * jnp.tanh(new)
    return jax.nn.sigmoid(show) * jnp.tanh(memory), memory


def _gate(kernel: Array, bias: Array, out: Array, theta: Array, last: Array) -> Array:
    """A gate of each coordinate, in (0, 1): [n]."""
    inputs = jnp.concatenate([out, theta[:, None], last[:, None]], axis=1)
    return jax.nn.sigmoid(inputs @ kernel + bias)
