"""The README: its code runs, its commands are those of CI. For its tables and links see `test_tables.py`."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_code_blocks_run_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    mean = names["mean"]
    assert mean.shape == (4,)
    assert mean[1] < 0.2 * mean[0]  # the example learns: one step takes away most of the error
    assert "error before and after" in capsys.readouterr().out
    assert abs(names["model"].apply(names["adapted"], np.full((1, 1), 0.8)).item() - 1.2) < 0.3  # the line of the new task
    learned = names["fit"](names["own"], names["sample"], key=names["jax"].random.key(0), num_updates=300, num_tasks=16)
    errors = names["evaluate"](names["own"], learned.state, names["sample"], key=names["jax"].random.key(1), num_tasks=100)
    assert errors["loss"][:, 3].mean() < 0.5 * errors["loss"][:, 0].mean()  # by the loss that it has learned


def test_the_code_for_images_of_your_own_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    noise = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "mine" / f"class{number}"
        folder.mkdir(parents=True)
        for image in range(4 + number % 2):
            Image.fromarray(noise.integers(0, 256, (9, 9, 3), np.uint8)).save(folder / f"{image}.png")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "few_shot.md").read_text(), flags=re.DOTALL):
        exec(compile(block, "few_shot.md", "exec"), names)
    assert names["result"].num_updates == 10
    assert names["adapted"].keys() == {"features", "head"}
    assert names["sample"]["test"](names["jax"].random.key(0)).query.x.shape == (6, 28, 28, 3)


def test_the_first_example_is_about_thirty_lines():
    first = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL).group(1)
    assert len([line for line in first.splitlines() if line.strip()]) <= 32


def test_the_commands_are_those_of_ci():
    commands = re.findall(r"```bash\n(.*?)\n```", README, flags=re.DOTALL)
    assert commands[:2] == [
        'pip install -e ".[experiments]" && python experiments/sinusoid.py',
        'pip install -e ".[test]" && pytest',
    ]
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(part in ci for part in ('pip install --quiet -e ".[test]"', "\npytest\n"))


def test_no_placeholder_is_left():
    assert not re.search(r"\b[A-Z]{8,}\b", re.sub(r"```.*?```|\]\(.*?\)", "", README, flags=re.DOTALL))
