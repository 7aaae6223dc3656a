"""The README: its code runs, its commands are those of CI. For its tables and links see `test_tables.py`."""

import re
from pathlib import Path

import numpy as np

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
    assert not re.search(r"\b[A-Z]{8,}\b", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
