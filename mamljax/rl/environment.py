"""What an environment is: pure functions, of which one compiled program serves all tasks and trajectories.

Shape legend, beside that of `types.py`: T horizon, E trajectories, o dimensions of an observation, a of an action.
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from mamljax.types import PyTree


class Step(NamedTuple):
    """What comes of one action."""

    state: PyTree  # of the environment
    observation: Array  # [o]
    reward: Array  # []
    done: Array  # [] bool: the trajectory ends with this step


class Environment(NamedTuple):
    """A Markov decision process as pure functions of single states; `vmap` makes batches of tasks and trajectories."""

    sample_task: Callable[[Array], PyTree]  # key -> task: a goal, a velocity, a direction
    # (key, task) -> (state, observation [o]). A batch draws E first states, and later trajectories begin with them again: a
    # random key stored in a state would repeat, so draw from the key that `step` gets.
    reset: Callable[[Array, PyTree], tuple[PyTree, Array]]
    step: Callable[[Array, PyTree, Array, PyTree], Step]  # (key, state, action [a], task) -> what comes of it
    observation_size: int
    action_size: int
    discrete_actions: bool = False  # an action is then [] int32, a choice from 0 to `action_size` - 1
