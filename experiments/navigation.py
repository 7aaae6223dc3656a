"""2D navigation: figure 4 of Finn et al. 2017, and its table in the appendix. `python experiments/navigation.py`

Each method trains one policy to move a point to goals that it does not see, and is judged on new goals before and after each
of a few policy-gradient steps.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import reinforcement
import runner
from reinforcement import Method, Trained

from mamljax.figures import legend_below, new_figure, steps_taken
from mamljax.rl.environment import Environment
from mamljax.rl.maml_rl import collect_and_adapt
from mamljax.rl.navigation import navigation

SOURCE = "Finn et al. 2017, appendix"
PUBLISHED = {  # mean return by number of adaptation steps
    "maml": (-40.41, -11.68, -3.33, -3.23),
    "context": (-42.42, -13.90, -5.17, -3.18),
    "pretrained": (-40.81, -19.73, -11.72, -8.47),
    "random": (-82.66, -57.96, -53.84, -46.81),
    "oracle": (-2.29,),
}
REWARDS = {"paper": "distance", "corrected": "squared"}
DRAWN_GOALS, DRAWN_TRAJECTORIES = 3, 5
DRAWN_STEPS = {0: "0.7", 1: "C0", 3: "C2"}  # and their colours


@dataclasses.dataclass(frozen=True)
class Options(reinforcement.Options):
    """2D navigation."""

    preset: Literal["promp", "paper", "multi_step", "quick"] = "paper"
    """Values for all options below and above: those found best here, MAML by proximal steps, through two adaptation steps
    and judged after each (promp); as in the code of the paper's authors (paper, section 5.3); through three, judged after each,
    by TRPO (multi_step); or for a first look in about a minute (quick)."""
    protocol: Literal["paper", "corrected"] = "paper"
    """The reward of a step: minus the distance to the goal, as in the authors' code, which made the published numbers (paper),
    or minus its square, as the paper's text has it (corrected)."""
    steps: int = 100
    out: Path = Path("out/navigation_paper")
    inner_lr: float = 0.5
    """Step size of adaptation, halved after the first step; 0.5 in the authors' code, where the text has 0.1."""
    eval_steps: int = 4
    """Adaptation steps at test."""
    eval_trajectories: int = 40
    """Trajectories before and after each adaptation step at test; 20 in the paper."""


PROMP = Options(
    preset="promp",
    method=("promp", "pretrained", "random", "oracle"),
    steps=200,
    inner_steps=2,
    multi_step_loss=True,
    gae_lambda=0.95,
    out=Path("out/navigation"),
)
MULTI_STEP = Options(
    preset="multi_step",
    method=("maml", "pretrained", "random", "oracle"),
    steps=60,
    inner_steps=3,
    multi_step_loss=True,
    out=Path("out/navigation_multi_step"),
)
QUICK = Options(preset="quick", steps=15, method=("maml", "pretrained", "random"), out=Path("out/navigation_quick"))
PRESETS = {options.preset: options for options in (PROMP, Options(), MULTI_STEP, QUICK)}


def execute(options: Options, run: runner.Run) -> None:
    """Train every method, evaluate all on the same test tasks, draw the figures."""
    env = navigation(reward=REWARDS[options.protocol])
    trained = reinforcement.run_methods(
        options, run, env, setting="navigation", protocol=options.protocol, published=PUBLISHED, source=SOURCE
    )
    draw_paths(options, env, trained, options.out / "paths.png")


def draw_paths(options: Options, env: Environment, trained: Mapping[Method, Trained], path: Path) -> None:
    """Draw where the first seed's policies of MAML, ProMP and the pretrained baseline go, before and after adaptation."""
    methods = [method for method in ("maml", "promp", "pretrained") if method in trained]
    if not methods:
        return
    figure = new_figure(1 + 3.5 * DRAWN_GOALS, 1 + 3.5 * len(methods))
    panels = figure.subplots(len(methods), DRAWN_GOALS, sharex=True, sharey=True, squeeze=False)
    goal_keys, keys = jax.random.split(jax.random.key(runner.TEST_SEED), (2, DRAWN_GOALS))
    goals = jax.vmap(env.sample_task)(goal_keys)
    for method, line in zip(methods, panels, strict=True):
        params = jax.tree.map(lambda leaf: leaf[0], trained[method].states.params)
        collector = reinforcement.collector_of(method, reinforcement.at_test(options), env)
        rule = reinforcement.rule_of(method, trained[method].lr)
        adapt = functools.partial(collect_and_adapt, collector, rule, options.eval_steps)
        batches = jax.jit(jax.vmap(lambda key, goal, adapt=adapt, params=params: adapt(key, params, goal)))(keys, goals)
        steps = batches.trajectories
        # A row goes on with another trajectory where one ends; the first of each is drawn.
        of_first = jax.vmap(jax.vmap(lambda steps: steps.first))(steps)
        for axes, goal, observations, first in zip(line, goals, steps.observations, of_first, strict=True):
            for step, colour in DRAWN_STEPS.items():
                if step > options.eval_steps:
                    continue
                for trajectory in range(min(DRAWN_TRAJECTORIES, options.eval_trajectories)):
                    taken = observations[step, :, trajectory][first[step, :, trajectory]]
                    label = {"label": steps_taken(step)} if trajectory == 0 else {}
                    axes.plot(*taken.T, color=colour, linewidth=1, **label)
            axes.plot(*goal, "C3*", markersize=12, label="goal")
            axes.set(title=method, xlabel="x", ylabel="y", xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
            axes.label_outer()
    legend_below(figure, panels[0, 0])
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    runner.run_script("navigation", PRESETS, execute)
