"""The tables of the README and of the other pages are those of the results; links and commands lead somewhere."""

import importlib
import re

import pytest
import tables

from mamljax import report

RESULTS = sorted((tables.ROOT / "results").rglob("results.json"))


@pytest.fixture(params=tables.PAGES, ids=lambda page: page.stem)
def page(request):
    return request.param


def test_tables_are_those_of_the_results(page):
    text = page.read_text()
    assert len(tables.TABLE.findall(text)) >= 2
    assert tables.refreshed(text) == text, "python docs/tables.py brings the tables up to date"


def test_a_table_of_methods_names_its_report(page):
    above = re.findall(r"(.*)\n\| method \|", page.read_text())
    assert above
    assert all(line.startswith("<!-- results/") for line in above)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_committed_reports_are_made_of_their_results(path):
    assert path.with_name("report.md").read_text() == report.markdown(report.read_results(path))


def test_a_table_is_taken_from_below_its_heading(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "report.md").write_text(
        "# r\n\n## a: ms by number of adaptation steps\n\n| 1 |\n\nm.\n\n## b\n\n| 2 |\n"
    )
    text = "<!-- results/report.md: {} -->\n| old |\n\nafter\n"
    assert tables.refreshed(text.format("a: ms"), tmp_path) == "<!-- results/report.md: a: ms -->\n| 1 |\n\nafter\n"
    assert "| 2 |" in tables.refreshed(text.format("b"), tmp_path)
    with pytest.raises(ValueError, match="has no heading 'c'"):
        tables.refreshed(text.format("c"), tmp_path)
    with pytest.raises(ValueError, match="other.md is missing"):
        tables.refreshed("<!-- results/other.md: a -->\n", tmp_path)


def test_the_summary_is_of_the_first_metric_of_each_experiment(tmp_path, monkeypatch):
    beside = {"protocol": "paper", "tasks": 600, "seeds": 2, "meta_updates": 1500, "ci95": 0.25}
    rows = [
        report.Row("maml", "5-shot", metric=metric, step=step, mean=mean, published=40.0 if step == 3 else None, **beside)
        for metric, step, mean in (("accuracy", 0, 20.0), ("accuracy", 3, 41.5), ("loss", 3, 0.5))
    ]
    path = tmp_path / "results" / "mine" / "results.json"
    path.parent.mkdir(parents=True)
    report.write_results(path, experiment="mine", config={}, rows=rows, seconds=1.0)
    text = "<!-- summary -->\n| old |\n\nafter\n"
    monkeypatch.setattr(tables, "ENTRIES", (tables.Entry("Mine, %", "mine", 3), tables.Entry("Mine, %", "mine", 0)))
    _, _, third, first = tables.refreshed(text, tmp_path).split("\n\n")[0].splitlines()[1:]
    assert third == "| Mine, % | 3 | 41.5 ± 0.2 | 40 | 1,500 meta-updates, 2 seeds |"
    assert first == "| Mine, % | 0 | 20.0 ± 0.2 |  | 1,500 meta-updates, 2 seeds |"
    monkeypatch.setattr(tables, "ENTRIES", (tables.Entry("Mine, %", "mine", 2),))
    with pytest.raises(ValueError, match="has no step 2 of 'maml'"):
        tables.refreshed(text, tmp_path)


@pytest.mark.parametrize("page", [*tables.PAGES, *(tables.ROOT / name for name in ("docs/few_shot.md", "CONTRIBUTING.md"))])
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            path = page.parent / path if path else page
            assert path.exists(), target
            headings = re.findall(r"^#+ (.*)", path.read_text(), flags=re.MULTILINE) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings], (
                target
            )


def test_commands_of_benchmarks_name_options_that_there_are():
    commands = re.findall(r"python benchmarks/(\w+)\.py([^\n`]*)", "\n".join(page.read_text() for page in tables.PAGES))
    assert {"order_cost", "peers", "throughput", "startup"} <= {script for script, _ in commands}
    for script, arguments in commands:
        fields = getattr(importlib.import_module(script), "Options", None)
        for option in re.findall(r"--([a-z-]+)", arguments):
            assert option.replace("-", "_") in fields.__dataclass_fields__, f"{script}.py has no --{option}"
