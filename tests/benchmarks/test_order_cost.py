"""The order-cost benchmark at tiny size, and what it does where memory is short."""

import harness
import jax
import order_cost
import pytest

from mamljax import report

TINY = ["--problem", "sinusoid", "--points", "5", "--num-tasks", "2", "--widths", "4", "--inner-steps", "1", "2"]
TINY += ["--repeats", "1"]


def rows_of(directory):
    return report.read_results(directory / "results.json")["rows"]


def test_writes_time_arithmetic_and_memory_of_every_mode(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(order_cost, "MODES", modes := ("first_order", "rematerialised"))  # two of four, for time
    assert order_cost.main([*TINY, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert {(row.method, row.step) for row in rows} == {(mode, steps) for mode in modes for steps in (1, 2)}
    assert all(row.mean > 0 for row in rows)
    assert [row.mean for row in rows if row.method == "first_order" and "relative" in row.metric] == [1.0] * 6
    counted = {row.step: row.mean for row in rows if row.metric == "FLOPs relative to first order" and row.mean != 1}
    assert 1 < counted[1] < counted[2]
    assert (tmp_path / "order_cost.png").exists()
    assert "time relative to first order" in capsys.readouterr().out


@pytest.mark.parametrize("precision", [None, "float32", "bfloat16"])
def test_precision_is_that_of_products_or_of_the_whole_network(precision, monkeypatch):
    programs = []

    def compare(options, setting, steps):
        params = jax.eval_shape(setting.model.init, jax.random.key(0))
        programs.append(str(jax.make_jaxpr(setting.model.apply)(params, setting.tasks.query.x[0])))
        return []

    monkeypatch.setattr(order_cost, "compare", compare)
    order_cost.measure(
        order_cost.Options(problem=("sinusoid",), widths=(4,), points=(5,), inner_steps=(1,), precision=precision)
    )
    assert [("bf16" in program, "HIGHEST" in program) for program in programs] == [
        (precision == "bfloat16", precision == "float32")
    ]


def test_settings_change_one_thing_at_a_time():
    sizes = {"num_tasks": 1, "num_episodes": 1, "image_size": 2}
    options = order_cost.Options(widths=(4, 8), points=(5, 6), ways=(2,), shots=(1, 3), filters=(2, 4), **sizes)
    names = [setting.name for setting in order_cost.settings(options)]
    assert names[:3] == [f"sinusoid, {points} support points, width {width}" for points, width in ((5, 4), (5, 8), (6, 4))]
    assert names[3:-1] == [f"images, 2-way {shots}-shot, {filters} filters" for shots, filters in ((1, 2), (1, 4), (3, 2))]
    assert names[-1] == "miniimagenet-5w1s"


def test_the_rematerialised_gradient_is_that_of_reverse_mode():
    setting = next(order_cost.settings(order_cost.Options(widths=(4,), points=(5,), num_tasks=2)))
    norms = [order_cost.compile_update(mode, setting, 2, 1e6).run()[1]["grad_norm"] for mode in ("reverse", "rematerialised")]
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-4)


def test_a_setting_that_does_not_fit_says_so_and_the_next_is_measured(tmp_path, monkeypatch, capsys):
    def compile_update(mode, setting, steps, limit):
        return order_cost.Program(None if steps == 1 else lambda: None, megabytes=2.0 / steps, gigaflops=1.0)

    monkeypatch.setattr(order_cost, "compile_update", compile_update)
    assert order_cost.main([*TINY, "--memory-mb", "1", "--out", str(tmp_path)]) == 0
    times = [row for row in rows_of(tmp_path) if row.metric == "milliseconds per meta-gradient"]
    assert {(row.step, row.mean is None, row.note) for row in times} == {(1, True, harness.NO_ROOM), (2, False, "")}
    assert {row.mean for row in rows_of(tmp_path) if row.metric == "MB of temporary memory"} == {1.0, 2.0}
    assert "| mixed | does not fit in memory | 0." in capsys.readouterr().out


def test_what_has_no_room_is_not_run_and_may_run_out_of_memory():
    def fail(message):
        raise jax.errors.JaxRuntimeError(message)

    assert harness.has_room(lambda: None, 1.0, limit=2.0)
    assert not harness.has_room(lambda: fail("INTERNAL: was run"), 3.0, limit=2.0)
    assert not harness.has_room(lambda: fail("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), 1.0, limit=2.0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        harness.has_room(lambda: fail("INTERNAL: broken"), 1.0, limit=2.0)
    assert harness.free_megabytes() > 1


def test_a_list_has_a_value(tmp_path, capsys):
    assert order_cost.main([*TINY, "--out", str(tmp_path / "run"), "--widths"]) == 2
    assert "error: --widths must have at least one value" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--inner-steps", "--points", "--num-tasks", "--memory-mb", "--repeats"])
def test_counts_are_positive(tmp_path, capsys, option):
    assert order_cost.main([*TINY, option, "0", "--out", str(tmp_path / "run")]) == 2
    assert f"error: {option} must be a whole number of at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
