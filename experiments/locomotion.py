"""Half-cheetah and ant: figure 5 of Finn et al. 2017, and its tables in the appendix. `python experiments/locomotion.py`

Each method trains one policy to run at velocities or in directions that it is not told, and is judged on new ones before and
after each of a few policy-gradient steps.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import reinforcement
import runner
import tyro
from jax import Array, lax
from reinforcement import Method, Trained

from mamljax.figures import new_figure, steps_taken
from mamljax.inner import adapt
from mamljax.rl.environment import Environment
from mamljax.rl.locomotion import locomotion
from mamljax.rl.maml_rl import reinforce_loss
from mamljax.rl.rendering import RenderingError, render_strip
from mamljax.types import PyTree

SOURCE = "Finn et al. 2017, appendix"
PUBLISHED = {  # mean return by number of adaptation steps
    "half_cheetah_velocity": {
        "maml": (-129.53, -78.57, -66.62, -60.78),
        "pretrained": (-158.00, -135.39, -128.47, -133.61),
        "random": (-254.83, -254.33, -246.79, -230.83),
        "oracle": (-54.47,),
    },
    "half_cheetah_direction": {
        "maml": (-50.69, 293.19, 313.48, 315.65),
        "context": (-40.49, -44.08, -38.27, -42.50),
        "pretrained": (-43.03, -24.75, -12.85, 19.57),
        "random": (-35.73, 21.83, 62.32, 86.18),
        "oracle": (442.69,),
    },
    "ant_velocity": {
        "maml": (30.58, 96.74, 100.06, 101.41),
        "pretrained": (-1.83, 6.11, 8.47, 9.47),
        "random": (-78.64, -62.81, -48.55, -35.56),
        "oracle": (107.89,),
    },
    "ant_direction": {
        "maml": (8.66, 499.15, 500.68, 499.11),
        "pretrained": (3.16, 1.27, 6.51, 6.86),
        "random": (3.11, 9.25, 15.96, 26.11),
        "oracle": (524.80,),
    },
}
STRIP_FRAMES = 8
Problem = Literal["half_cheetah_velocity", "half_cheetah_direction", "ant_velocity", "ant_direction"]


@dataclasses.dataclass(frozen=True)
class Options(reinforcement.Options):
    """Half-cheetah and ant with a velocity or a direction.

    Tasks, trajectories and steps are those of the paper's authors (section 5.3). Chosen here, by trainings of half-cheetah, are
    --inner-objective, --gae-lambda and --max-kl, which they have as log_prob, 1 and 0.01 (0.02 for half-cheetah's directions).
    """

    preset: Problem = "half_cheetah_velocity"
    """The robot and what it is to do, with values for all options below and above."""
    task: tyro.conf.Suppress[tyro.conf.Fixed[Problem]] = "half_cheetah_velocity"
    """The robot and what it is to do, as the preset says."""
    protocol: Literal["paper", "gymnasium"] = "paper"
    """Simulation, observation and reward: as in the authors' code, 1 step of the physics for each action (paper); or those of
    Gymnasium's HalfCheetah-v5 and Ant-v5, 5 steps (gymnasium)."""
    engine: Literal["mujoco", "mjx"] = "mujoco"
    """MuJoCo's C engine on this machine's cores, or MJX on an accelerator."""
    steps: int = 500
    out: Path = Path("out/half_cheetah_velocity")
    num_tasks: int = 40
    horizon: int = 200
    tuning_lrs: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def preset(task: Problem, gae_lambda: float = 0.98, **differences: int) -> Options:
    """The values for a task, in a directory of its own."""
    chosen = {"inner_objective": "likelihood_ratio", "gae_lambda": gae_lambda, "max_kl": 0.02}
    return Options(preset=task, task=task, out=Path("out") / task, **chosen, **differences)


PRESETS = {
    "half_cheetah_velocity": preset("half_cheetah_velocity"),
    "half_cheetah_direction": preset("half_cheetah_direction", gae_lambda=0.95),
    "ant_velocity": preset("ant_velocity"),
    "ant_direction": preset("ant_direction", trajectories=40, eval_trajectories=40),
}


def execute(options: Options, run: runner.Run) -> None:
    """Train every method, evaluate all on the same test tasks, draw the figures."""
    try:
        env = locomotion(options.task, protocol=options.protocol, engine=options.engine)
    except ImportError as error:
        # Of a `ValueError` that a script raises `runner.main` shows the message alone.
        raise ValueError(str(error)) from error
    trained = reinforcement.run_methods(
        options, run, env, setting=options.task, protocol=options.protocol, published=PUBLISHED[options.task], source=SOURCE
    )
    if options.horizon < STRIP_FRAMES:
        print(f"no strip of frames: it has {STRIP_FRAMES}, and --horizon is {options.horizon}", file=sys.stderr)
    elif method := next((name for name in ("promp", "maml") if name in trained), None):
        draw_strip(options, env, method, trained[method], options.out / "strip.png")


def draw_strip(options: Options, env: Environment, method: Method, trained: Trained, path: Path) -> None:
    """Draw the first seed's policy before and after one step on a task; where nothing can render, say so and go on."""
    task_key, key = jax.random.split(jax.random.key(runner.TEST_SEED))
    task = env.sample_task(task_key)
    params = jax.tree.map(lambda leaf: leaf[0], trained.states.params)
    positions = adapted_positions(options, env, params, jnp.float32(trained.lr), key, task)
    try:
        strips = [render_strip(options.task, positions[step], frames=STRIP_FRAMES) for step in range(2)]
    except RenderingError as error:
        print(f"no strip of frames: {error}", file=sys.stderr)
        return
    figure = new_figure(2 * STRIP_FRAMES, 4)
    for step, (axes, strip) in enumerate(zip(figure.subplots(2, 1), strips, strict=True)):
        axes.imshow(jnp.concatenate(list(strip), axis=1))
        metres = positions[step, -1, 0] - positions[step, 0, 0]
        axes.set(
            title=f"{method} in {options.task}, task {task:.2f}, {steps_taken(step)}: {metres:+.1f} m", xticks=[], yticks=[]
        )
    figure.savefig(path, dpi=100)


@functools.partial(jax.jit, static_argnames=("options", "env"))
def adapted_positions(options: Options, env: Environment, params: PyTree, lr: Array, key: Array, task: Array) -> Array:
    """Where the robot is at each step of a trajectory of mean actions, before and after one adaptation step: [2, T, nq]."""
    policy, collect = reinforcement.collector_of("maml", reinforcement.at_test(options), env)
    rule = reinforcement.rule_of("maml", lr)
    batch_key, reset_key, step_key = jax.random.split(key, 3)
    batches = jax.tree.map(lambda leaf: leaf[None], collect(batch_key, params, task))
    _, path = adapt(functools.partial(reinforce_loss, policy), params, batches, rule)

    def trajectory(params: PyTree) -> Array:
        def step(carry: tuple, key: Array) -> tuple[tuple, Array]:
            state, observation = carry
            outcome = env.step(key, state, policy.apply(params, observation[None])[0][0], task)
            return (outcome.state, outcome.observation), state.position

        return lax.scan(step, env.reset(reset_key, task), jax.random.split(step_key, options.horizon))[1]

    return jax.vmap(trajectory)(path)


if __name__ == "__main__":
    runner.run_script("locomotion", PRESETS, execute)
