"""Bring the tables of the README and of the pages here up to date with the results. `python docs/tables.py`

A table stands below a comment that names a report and one of its headings, or the summary of all experiments.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

from mamljax import report
from mamljax.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "performance.md")
TABLE = re.compile(r"<!-- (results/\S+): (.+) -->\n(?:\|.*\n)*")
SUMMARY = re.compile(r"<!-- summary -->\n(?:\|.*\n)*")


class Entry(NamedTuple):
    """A line of the summary: one method of one experiment, after one number of adaptation steps."""

    title: str
    directory: str  # under results/
    step: int
    method: str = "maml"


ENTRIES = (
    Entry("Sinusoids, 5 points: squared error", "sinusoid", 1),
    Entry("Sinusoids, 5 points: squared error", "sinusoid", 10),
    Entry("Omniglot 5-way 1-shot, %", "omniglot-5w1s", 3),
    Entry("Omniglot 5-way 1-shot, begun with the 20-way network, %", "omniglot-5w1s_from_20w1s", 3),
    Entry("Omniglot 5-way 1-shot, MAML++, %", "omniglot-5w1s_maml++", 5, "maml++"),
    Entry("Omniglot 5-way 1-shot, implicit MAML, %", "omniglot-5w1s_imaml", 16, "imaml"),
    Entry("Omniglot 5-way 1-shot, Proto-MAML (98.7 is published of MAML), %", "omniglot-5w1s_proto_maml", 1, "proto_maml"),
    Entry("Omniglot 5-way 1-shot, memory module, %", "omniglot-5w1s_memory_module", 0, "memory_module"),
    Entry("Omniglot 5-way 1-shot, neural statistician, %", "omniglot-5w1s_neural_statistician", 0, "neural_statistician"),
    Entry("Omniglot 5-way 1-shot, context alone, %", "omniglot-5w1s_context", 3, "context"),
    Entry("Omniglot 5-way 5-shot, %", "omniglot-5w5s", 3),
    Entry("Omniglot 5-way 5-shot, with the 1-shot network begun with the 20-way one, %", "omniglot-5w5s_from_1s", 3),
    Entry("Omniglot 20-way 1-shot, %", "omniglot-20w1s", 5),
    Entry("Omniglot 20-way 1-shot, Proto-MAML (95.8 is published of MAML), %", "omniglot-20w1s_proto_maml", 1, "proto_maml"),
    Entry("Omniglot 20-way 1-shot, prototypical networks, %", "omniglot-20w1s_prototypical", 0, "prototypical"),
    Entry("Omniglot 20-way 1-shot, siamese networks, %", "omniglot-20w1s_siamese", 0, "siamese"),
    Entry("Omniglot 20-way 5-shot, %", "omniglot-20w5s", 5),
    Entry("Omniglot 20-way 5-shot, Proto-MAML (98.9 is published of MAML), %", "omniglot-20w5s_proto_maml", 1, "proto_maml"),
    Entry("Omniglot 20-way 5-shot, with the 1-shot network, %", "omniglot-20w5s_with_1s", 5),
    Entry("Omniglot 5-way 1-shot, no convolutions, %", "omniglot-5w1s-fc", 3),
    Entry("Omniglot 5-way 1-shot, no convolutions, memory-augmented, %", "omniglot-5w1s-fc_mann", 0, "mann"),
    Entry("Omniglot 5-way 5-shot, no convolutions, %", "omniglot-5w5s-fc", 3),
    Entry("Omniglot 5-way 5-shot, no convolutions, memory-augmented, %", "omniglot-5w5s-fc_mann", 0, "mann"),
    Entry("miniImageNet 5-way 1-shot, %", "miniimagenet-5w1s", 10),
    Entry("miniImageNet 5-way 1-shot, first order, %", "miniimagenet-5w1s_first_order", 10, "fomaml"),
    Entry("miniImageNet 5-way 1-shot, an LSTM that takes the steps, %", "miniimagenet-5w1s_meta_lstm", 5, "meta_lstm"),
    Entry("miniImageNet 5-way 5-shot, %", "miniimagenet-5w5s", 10),
    Entry("miniImageNet 5-way 5-shot, with the 1-shot network, %", "miniimagenet-5w5s_from_1s", 10),
    Entry("2D navigation, by TRPO: return", "navigation_multi_step", 3),
    Entry("2D navigation, ProMP (-11.68 is published of MAML): return", "navigation", 1, "promp"),
    Entry("2D navigation, ProMP (-3.33): return", "navigation", 2, "promp"),
    Entry("2D navigation, ProMP (-3.23): return", "navigation", 3, "promp"),
    Entry("Half-cheetah, goal velocity: return", "half_cheetah_velocity", 3),
    Entry("Half-cheetah, goal velocity, ProMP: return", "half_cheetah_velocity", 3, "promp"),
    Entry("Half-cheetah, goal direction: return", "half_cheetah_direction", 3),
    Entry("Half-cheetah, goal direction, ProMP: return", "half_cheetah_direction", 3, "promp"),
    Entry("Ant, goal velocity, ProMP (101.41 is published of MAML): return", "ant_velocity_promp", 3, "promp"),
    Entry("Ant, goal direction, ProMP (499.11 is published of MAML): return", "ant_direction_promp", 3, "promp"),
)


def refreshed(text: str, root: Path = ROOT) -> str:
    """The text with the tables that the results have now.

    Raises:
        ValueError: there is no such report or result, or it has no such heading, method or step.
    """
    text = TABLE.sub(lambda match: f"<!-- {match[1]}: {match[2]} -->\n{_table(root / match[1], match[2])}", text)
    return SUMMARY.sub(lambda match: f"<!-- summary -->\n{_summary(root)}", text)


def _table(path: Path, heading: str) -> str:
    if not path.exists():
        raise ValueError(f"{path} is missing. Run its command with --out results/{path.parent.name}, or take the table out.")
    for section in path.read_text().split("\n## ")[1:]:
        title, *lines = section.splitlines()
        if title.removesuffix(" by number of adaptation steps") == heading:
            return "".join(f"{line}\n" for line in lines if line.startswith("|"))
    raise ValueError(f"{path} has no heading {heading!r}. Run its command again, or correct the heading.")


def _summary(root: Path) -> str:
    lines = ["| | steps | here | published | trained for |", "|---|---|---|---|---|"]
    for entry in ENTRIES:
        row = _row(root / "results" / entry.directory / "results.json", entry)
        published = "" if row.published is None else f"{row.published:g}"
        cells = (entry.title, str(entry.step), report.cell(row), published, report.trained_for(row))
        lines.append("| " + " | ".join(cells) + " |")
    return "".join(f"{line}\n" for line in lines)


def _row(path: Path, entry: Entry) -> report.Row:
    rows = report.read_results(path)["rows"]
    headline = (rows[0].setting, rows[0].metric)
    for row in rows:
        if (row.setting, row.metric, row.method, row.step) == (*headline, entry.method, entry.step):
            return row
    raise ValueError(f"{path} has no step {entry.step} of {entry.method!r}. Run its command again, or correct the entry.")


def main() -> int:
    """Rewrite the pages; returns the exit code."""
    try:
        for page in PAGES:
            write_atomically(page, refreshed(page.read_text()))
    except (ValueError, OSError, report.ResultsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
