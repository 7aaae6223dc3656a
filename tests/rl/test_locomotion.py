"""Half-cheetah and ant: against Gymnasium's and against MuJoCo stepped by hand, in batches, and when they go wrong."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

mujoco = pytest.importorskip("mujoco")
pytest.importorskip("gymnasium.envs.mujoco")
gymnasium = pytest.importorskip("gymnasium")

from mamljax.rl.locomotion import TASKS, locomotion  # noqa: E402
from mamljax.rl.planar import is_planar  # noqa: E402
from mamljax.rl.protocols import PROTOCOLS  # noqa: E402
from mamljax.rl.robots import load_robot  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:compiler attribute 'settotalmass'")  # of Gymnasium's own loading
KEY = jax.random.key(0)
FORWARD = jnp.float32(1)


@pytest.fixture(autouse=True)
def _log_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings into the working directory


@functools.lru_cache
def compiled(task, protocol="paper"):
    environment = locomotion(task, protocol=protocol)
    return environment._replace(reset=jax.jit(environment.reset), step=jax.jit(environment.step))


def actions(environment, count, seed=0):
    return np.random.default_rng(seed).uniform(-1.2, 1.2, (count, environment.action_size)).astype(np.float32)


def bits(*parts):
    values = np.concatenate([np.asarray(part, np.float64) for part in parts])
    return jnp.asarray(values.view(np.uint32).reshape(-1, 2))


def placed(state, *, position=None, velocity=None):
    """The state with another position or velocity, as the engine has it."""
    position = state.position if position is None else position
    velocity = state.velocity if velocity is None else velocity
    return state._replace(
        position=jnp.asarray(position, jnp.float32),
        velocity=jnp.asarray(velocity, jnp.float32),
        resume=bits(position, velocity, np.zeros_like(velocity)),
    )


def by_hand(robot, state):
    """MuJoCo itself, with the paper's settings, at a state."""
    settings = PROTOCOLS[robot, "paper"]
    model = load_robot(robot, timestep=settings.timestep, edits=settings.edits, measures=settings.measures)
    data = mujoco.MjData(model)
    data.qpos, data.qvel = np.asarray(state.position), np.asarray(state.velocity)
    return model, data


def evaluated(model, data):
    """A copy of the data, evaluated at its state and control."""
    copy = mujoco.MjData(model)
    copy.qpos, copy.qvel, copy.ctrl = data.qpos, data.qvel, data.ctrl
    mujoco.mj_forward(model, copy)
    mujoco.mj_rnePostConstraint(model, copy)
    return copy


def test_half_cheetah_is_gymnasiums():
    ours, theirs = compiled("half_cheetah_direction", "gymnasium"), gymnasium.make("HalfCheetah-v5").unwrapped
    theirs.reset(seed=0)
    state, observation = ours.reset(KEY, FORWARD)
    theirs.set_state(np.asarray(state.position, np.float64), np.asarray(state.velocity, np.float64))
    np.testing.assert_allclose(observation, theirs._get_obs(), rtol=1e-6)
    for action in actions(ours, 30):
        step = ours.step(KEY, state, action, FORWARD)
        state = step.state
        expected, reward, *_ = theirs.step(np.clip(action, -1, 1))
        np.testing.assert_allclose(step.observation, expected, rtol=1e-4, atol=1e-5)
        assert step.reward == pytest.approx(reward, abs=1e-4)
        assert not step.done
    assert ours.observation_size == theirs.observation_space.shape[0]


def test_ant_is_gymnasiums_with_contacts_and_velocity_of_the_new_state():
    ours, theirs = compiled("ant_direction", "gymnasium"), gymnasium.make("Ant-v5").unwrapped
    theirs.reset(seed=0)
    state, observation = ours.reset(KEY, FORWARD)
    theirs.set_state(np.asarray(state.position, np.float64), np.asarray(state.velocity, np.float64))
    np.testing.assert_allclose(observation, theirs._get_obs(), rtol=1e-6)
    touched = False
    for action in actions(ours, 25):
        before = theirs.data.qpos[0]
        step = ours.step(KEY, state, action, FORWARD)
        state = step.state
        expected, _, terminated, _, terms = theirs.step(np.clip(action, -1, 1))
        forces = np.clip(evaluated(theirs.model, theirs.data).cfrc_ext, -1, 1)
        np.testing.assert_allclose(step.observation[:27], expected[:27], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(step.observation[27:], forces[1:].ravel(), rtol=1e-3, atol=2e-3)
        reward = (theirs.data.qpos[0] - before) / theirs.dt + terms["reward_ctrl"] + terms["reward_survive"]
        assert step.reward == pytest.approx(reward - 5e-4 * (forces**2).sum(), abs=1e-3)
        assert step.done == terminated
        touched |= np.abs(forces).max() > 0.5
    assert touched
    assert ours.observation_size == theirs.observation_space.shape[0]


def test_half_cheetah_is_the_papers():
    velocity, direction = compiled("half_cheetah_velocity"), compiled("half_cheetah_direction")
    state, observation = velocity.reset(KEY, FORWARD)
    model, data = by_hand("half_cheetah", state)
    assert observation.shape == (20,)
    for action in actions(velocity, 40):
        step = velocity.step(KEY, state, action, jnp.float32(1.5))
        backward = direction.step(KEY, state, action, jnp.float32(-1))
        state = step.state
        data.ctrl = np.clip(action, -1, 1)
        mujoco.mj_step(model, data)
        now = evaluated(model, data)
        expected = np.concatenate([now.qpos[1:], now.qvel, now.subtree_com[1]])
        np.testing.assert_allclose(step.observation, expected, rtol=1e-5, atol=1e-6)
        measured = step.state.measured["centre_of_mass_velocity"]
        np.testing.assert_allclose(measured, now.subtree_linvel[1], rtol=1e-5, atol=1e-6)
        cost = 0.05 * (np.clip(action, -1, 1) ** 2).sum()
        assert step.reward == pytest.approx(-abs(now.subtree_linvel[1, 0] - 1.5) - cost, abs=1e-5)
        assert backward.reward == pytest.approx(-now.subtree_linvel[1, 0] - cost, abs=1e-5)
    np.testing.assert_array_equal(state.resume, bits(data.qpos, data.qvel, data.qacc_warmstart))  # to the bit
    assert data.time == pytest.approx(0.4)


def test_ant_is_the_papers():
    velocity, direction = compiled("ant_velocity"), compiled("ant_direction")
    state, observation = velocity.reset(KEY, FORWARD)
    model, data = by_hand("ant", state)
    assert observation.shape == (125,)
    touched = False
    for action in actions(velocity, 15):
        step = velocity.step(KEY, state, action, jnp.float32(1.5))
        backward = direction.step(KEY, state, action, jnp.float32(-1))
        state = step.state
        data.ctrl = np.clip(action, -1, 1)
        mujoco.mj_step(model, data)
        now = evaluated(model, data)
        forces = np.clip(now.cfrc_ext, -1, 1)
        expected = np.concatenate([now.qpos, now.qvel, forces.ravel(), now.xmat[1], now.subtree_com[1]])
        np.testing.assert_allclose(step.observation, expected, rtol=1e-3, atol=1e-3)
        rest = 0.05 - 0.005 * (np.clip(action, -1, 1) ** 2).sum() - 0.0005 * (forces**2).sum()
        assert step.reward == pytest.approx(1 - abs(now.subtree_linvel[1, 0] - 1.5) + rest, abs=1e-5)
        assert backward.reward == pytest.approx(-now.subtree_linvel[1, 0] + rest, abs=1e-5)
        touched |= np.abs(forces).max() > 0.5
    assert touched
    assert data.time == pytest.approx(0.3)
    assert model.geom_solimp[1][:3].tolist() == [0.8, 0.8, 0.01]
    assert model.geom_margin.tolist() == [0] + [0.01] * 13


@pytest.mark.parametrize(
    ("task", "protocol", "index", "start", "spread"),
    [
        ("half_cheetah_direction", "gymnasium", 1, 0.0, 0.1 / np.sqrt(3)),
        ("ant_velocity", "paper", 2, 0.55, 0.01),
        ("ant_direction", "gymnasium", 2, 0.75, 0.1 / np.sqrt(3)),
    ],
)
def test_first_states(task, protocol, index, start, spread):
    environment = compiled(task, protocol)
    states, _ = jax.vmap(environment.reset, (0, None))(jax.random.split(KEY, 400), FORWARD)
    assert float(states.position[:, index].mean()) == pytest.approx(start, abs=5 * spread / np.sqrt(400))
    assert float(states.position.std(0).mean()) == pytest.approx(spread, rel=0.1)
    assert float(states.velocity.std()) == pytest.approx(0.1, rel=0.1)
    assert states.stable.all()


@pytest.mark.parametrize("task", TASKS)
def test_tasks(task):
    tasks = np.asarray(jax.vmap(locomotion(task).sample_task)(jax.random.split(KEY, 4000)))
    fastest = {"half_cheetah_velocity": 2, "ant_velocity": 3}.get(task)
    assert (tasks.shape, tasks.dtype) == ((4000,), np.float32)
    if fastest is None:
        assert set(tasks) == {-1, 1}
        assert abs(tasks.mean()) < 5 / np.sqrt(4000)
    else:
        assert 0 <= tasks.min() < 0.01 < fastest - 0.01 < tasks.max() <= fastest
        assert tasks.mean() == pytest.approx(fastest / 2, abs=5 * fastest / np.sqrt(12 * 4000))


def rollouts(environment, traces=None):
    """A jitted rollout of tasks [B] and actions [B, E, T, a] from keys [B, E]: rewards and observations."""

    def one(key, task, chosen):
        if traces is not None:
            traces.append(1)
        state, _ = environment.reset(key, task)

        def body(state, action):
            step = environment.step(key, state, action, task)
            return step.state, (step.reward, step.observation)

        return jax.lax.scan(body, state, chosen)[1]

    return jax.jit(jax.vmap(jax.vmap(one, (0, None, 0))))


def test_trajectories_of_a_batch_do_not_touch_each_other():
    environment = locomotion("half_cheetah_velocity", threads=3)
    run = rollouts(environment)
    keys, tasks = jax.random.split(KEY, (2, 3)), jnp.array([0.5, 1.5])
    chosen = np.random.default_rng(0).uniform(-1, 1, (2, 3, 20, 6)).astype(np.float32)
    rewards, observations = run(keys, tasks, chosen)
    again = run(keys, tasks, chosen)
    np.testing.assert_array_equal(observations, again[1])
    chosen[1, 2] *= -1
    other_rewards, other = run(keys, tasks, chosen)
    same = np.ones((2, 3), bool)
    same[1, 2] = False
    np.testing.assert_array_equal(other[same], observations[same])
    assert (other[1, 2, -1] != observations[1, 2, -1]).any()
    np.testing.assert_array_equal(other_rewards[same], rewards[same])


def test_one_program_serves_all_tasks():
    traces = []
    run = rollouts(compiled("half_cheetah_velocity"), traces)
    keys, chosen = jax.random.split(KEY, (1, 1)), np.zeros((1, 1, 2, 6), np.float32)
    rewards = [run(keys, jnp.array([task]), chosen)[0] for task in (0.0, 1.0, 2.0)]
    assert len(traces) == 1
    np.testing.assert_allclose(rewards[2] - rewards[1], -1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("protocol", "height", "ends", "bonus"),
    [
        ("paper", 0.1, True, 0.05),
        ("paper", 0.6, False, 0.05),
        ("paper", 1.2, True, 0.05),
        ("gymnasium", 0.6, False, 1.0),
        ("gymnasium", 1.2, True, 0.0),
    ],
)
def test_ant_ends_outside_of_its_heights(protocol, height, ends, bonus):
    environment = compiled("ant_direction", protocol)
    state, _ = environment.reset(KEY, FORWARD)
    position = np.array(state.position)
    position[2] = height
    still = placed(state, position=position, velocity=np.zeros(14))
    step = environment.step(KEY, still, np.zeros(8, np.float32), jnp.float32(0))  # no reward for moving
    assert step.done == ends
    assert step.state.stable
    assert -84 * 0.0005 <= step.reward - bonus <= 1e-6


@pytest.mark.parametrize("wrong", ["fast", "faster", "not a number", "action"])
def test_an_unstable_simulation_ends_alone(wrong):
    environment = compiled("half_cheetah_velocity")
    states, observations = jax.vmap(environment.reset, (0, None))(jax.random.split(KEY, 3), FORWARD)
    chosen = np.zeros((3, 6), np.float32)
    well = jax.vmap(environment.step, (None, 0, 0, None))(KEY, states, chosen, FORWARD)
    if wrong == "action":
        chosen[1] = np.nan
    else:
        velocity = np.full(9, {"fast": 1e5, "faster": 1e12, "not a number": np.nan}[wrong])
        resume = states.resume.at[1].set(bits(states.position[1], velocity, np.zeros(9)))
        states = states._replace(resume=resume)
    step = jax.vmap(environment.step, (None, 0, 0, None))(KEY, states, chosen, FORWARD)
    np.testing.assert_array_equal(step.done, [False, True, False])
    np.testing.assert_array_equal(step.state.stable, [True, False, True])
    np.testing.assert_array_equal(np.isfinite(step.state.position).all(1), [True, False, True])
    np.testing.assert_array_equal(step.observation[1], observations[1])
    np.testing.assert_array_equal(step.observation[::2], well.observation[::2])
    assert step.reward[1] == 0
    assert np.isfinite(step.reward).all()


PLANAR = """
<mujoco>
  <worldbody>
    {beside}
    <body name="torso" pos="0 0 1" {turned}>
      <joint type="slide" axis="1 0 0"/>
      <joint type="slide" axis="0 0 1"/>
      <joint type="hinge" axis="{axis}" pos="{joint}"/>
      <geom size="0.1"/>
      <body pos="0 0 -0.5">
        <joint type="hinge" axis="0 1 0" ref="{ref}"/>
        <geom size="0.1"/>
      </body>
    </body>
  </worldbody>
</mujoco>
"""


@pytest.mark.parametrize(
    ("change", "planar"),
    [
        ({}, True),
        ({"turned": 'quat="0.7 0 0.7 0"'}, False),
        ({"axis": "0 0 1"}, False),
        ({"joint": "0.1 0 0"}, False),
        ({"ref": "0.3"}, False),
        ({"beside": '<body><geom size="0.1"/></body>'}, False),
    ],
)
def test_what_makes_a_robot_planar(change, planar):
    """Whose centre of mass is then taken from its joints alone."""
    parts = {"beside": "", "turned": "", "axis": "0 1 0", "joint": "0 0 0", "ref": "0"} | change
    assert is_planar(mujoco.MjModel.from_xml_string(PLANAR.format(**parts))) == planar


def test_bad_settings():
    for name, given in (("task", "walker"), ("protocol", "ours"), ("engine", "bullet")):
        settings = {"task": "ant_velocity", name: given}
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{given}'"):
            locomotion(**settings)
    for name, given in (("frame_skip", 0), ("frame_skip", 2.5), ("threads", 0)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {given}"):
            locomotion("ant_velocity", **{name: given})
    for timestep in (0, -0.01, float("nan")):
        with pytest.raises(ValueError, match="timestep must be a positive number"):
            locomotion("ant_velocity", timestep=timestep)


@pytest.mark.parametrize("missing", ["mujoco.batch", "mujoco"])
def test_without_mujoco_the_extra_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'pip install "mamljax\[rl\]"'):
        locomotion("ant_velocity")


def test_frame_skip_and_timestep_are_settings():
    environment = locomotion("half_cheetah_direction", protocol="paper", frame_skip=3, timestep=0.005)
    state, _ = compiled("half_cheetah_direction").reset(KEY, FORWARD)
    model, data = by_hand("half_cheetah", state)
    model.opt.timestep = 0.005
    action = actions(environment, 1)[0]
    data.ctrl = np.clip(action, -1, 1)
    mujoco.mj_step(model, data, nstep=3)
    np.testing.assert_allclose(
        jax.jit(environment.step)(KEY, state, action, FORWARD).state.position, data.qpos, rtol=1e-6, atol=1e-7
    )
