"""Messages about bad counts and malformed tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamljax.checks import check_count, check_positive, check_task
from mamljax.types import Examples, Task

GOOD = Examples(jnp.zeros((3, 2)), jnp.zeros((3, 1)))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", None])
def test_count_must_be_a_positive_whole_number(value):
    with pytest.raises(ValueError, match=r"inner_steps must be a whole number of at least 1, got .*\. Use pretrain"):
        check_count("inner_steps", value, "Use pretrain.")


@pytest.mark.parametrize("value", [0, -1.0, np.inf, np.nan, True, np.True_, jnp.array(True), np.ones(1), "1", None])
def test_what_must_be_positive_is_a_positive_number(value):
    with pytest.raises(ValueError, match=r"strength must be positive and finite, got .*\. Use 1\."):
        check_positive("strength", value, "Use 1.")


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), np.array(0.5), jnp.array(0.5)])
def test_numbers_of_all_kinds_may_be_positive(value):
    check_positive("strength", value)


def test_zero_passes_where_it_may():
    check_positive("damping", 0.0, or_zero=True)
    with pytest.raises(ValueError, match=r"damping must be at least 0 and finite, got -1\.0\."):
        check_positive("damping", -1.0, or_zero=True)


def test_a_traced_number_passes_and_several_do_not():
    jax.vmap(lambda value: check_positive("strength", value))(jnp.zeros(2))
    with pytest.raises(ValueError, match="strength must be positive and finite, got"):
        jax.jit(lambda values: check_positive("strength", values))(jnp.ones(2))


def test_count_may_have_another_minimum():
    check_count("eval_steps", 0, minimum=0)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        check_count("eval_steps", -1, minimum=0)


def test_well_formed_tasks_pass():
    check_task(Task(GOOD, Examples(jnp.zeros((5, 2)), jnp.zeros((5, 1)))))


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (
            Examples(jnp.zeros((2, 2)), jnp.zeros((3, 1))),
            r"x and y of the support set must have one length.*\(2, 2\).*\(3, 1\)",
        ),
        (Examples(jnp.zeros(()), jnp.zeros((3, 1))), "one length"),
        (Examples(jnp.zeros((0, 2)), jnp.zeros((0, 1))), "the support set is empty"),
        (Examples(jnp.zeros((3, 4)), jnp.zeros((3, 1))), "differ in length only"),
        ({"x": jnp.zeros((3, 2)), "y": jnp.zeros((3, 1))}, "same structure.*Build both as Examples"),
    ],
)
def test_malformed_tasks(support, message):
    with pytest.raises(ValueError, match=message):
        check_task(Task(support, GOOD))


def test_something_else_than_examples():
    with pytest.raises(ValueError, match=r"support and query must be Examples\(x, y\), got tuple"):
        check_task(Task(tuple(GOOD), tuple(GOOD)))


def test_something_else_than_a_task():
    with pytest.raises(ValueError, match=r"expected a Task\(support, query\).*got tuple"):
        check_task((GOOD, GOOD))
