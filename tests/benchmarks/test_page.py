"""The page on performance: its tables are those of the reports, its links and commands lead somewhere."""

import importlib
import re

import page
import pytest

TEXT = page.PAGE.read_text()


def test_tables_are_those_of_the_reports():
    assert len(page.TABLE.findall(TEXT)) >= 4
    assert page.refreshed(TEXT) == TEXT, "python benchmarks/page.py brings the tables up to date"


def test_a_table_is_taken_from_below_its_heading(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "report.md").write_text(
        "# r\n\n## a: ms by number of adaptation steps\n\n| 1 |\n\nm.\n\n## b\n\n| 2 |\n"
    )
    text = "<!-- results/report.md: {} -->\n| old |\n\nafter\n"
    assert page.refreshed(text.format("a: ms"), tmp_path) == "<!-- results/report.md: a: ms -->\n| 1 |\n\nafter\n"
    assert "| 2 |" in page.refreshed(text.format("b"), tmp_path)
    with pytest.raises(ValueError, match="has no heading 'c'"):
        page.refreshed(text.format("c"), tmp_path)
    with pytest.raises(ValueError, match="other.md is missing"):
        page.refreshed("<!-- results/other.md: a -->\n", tmp_path)


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (page.PAGE.parent / target).exists(), target


def test_commands_name_options_that_there_are():
    commands = re.findall(r"python benchmarks/(\w+)\.py([^\n`]*)", TEXT)
    assert {"order_cost", "peers", "throughput", "startup"} <= {script for script, _ in commands}
    for script, arguments in commands:
        fields = getattr(importlib.import_module(script), "Options", None)
        for option in re.findall(r"--([a-z-]+)", arguments):
            assert option.replace("-", "_") in fields.__dataclass_fields__, f"{script}.py has no --{option}"
