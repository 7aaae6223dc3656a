"""The README: its code runs, its numbers come from results files, its links lead somewhere."""

import re
from pathlib import Path

import pytest

from mamljax import report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "results").rglob("results.json"))


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


def test_tables_of_results_are_those_of_the_reports():
    reported = {line for path in RESULTS for line in report.markdown(report.read_results(path)).splitlines()}
    tables = re.findall(r"<!-- (results/\S+) -->\n(.*?)\n\n", README, flags=re.DOTALL)
    assert len(tables) >= 3
    for source, table in tables:
        assert (ROOT / source).exists()
        for line in table.splitlines():
            assert line in reported, f"{line!r} is in no report of results/"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_committed_reports_are_made_of_their_results(path):
    assert path.with_name("report.md").read_text() == report.markdown(report.read_results(path))


def test_no_placeholder_is_left():
    assert not re.search(r"\b[A-Z]{8,}\b", re.sub(r"```.*?```", "", README, flags=re.DOTALL))


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
