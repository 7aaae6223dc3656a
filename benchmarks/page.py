"""Bring the tables of docs/performance.md up to date with the reports under results/. `python benchmarks/page.py`

Each table there stands below a comment that names a report and one of its headings.
"""

import re
import sys
from pathlib import Path

from mamljax.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
TABLE = re.compile(r"<!-- (results/\S+): (.+) -->\n(?:\|.*\n)*")


def refreshed(text: str, root: Path = ROOT) -> str:
    """The text with the tables that the reports have now.

    Raises:
        ValueError: there is no such report, or it has no such heading.
    """
    return TABLE.sub(lambda match: f"<!-- {match[1]}: {match[2]} -->\n{_table(root / match[1], match[2])}", text)


def _table(path: Path, heading: str) -> str:
    if not path.exists():
        raise ValueError(f"{path} is missing. Run its benchmark with --out results/{path.parent.name}, or take the table out.")
    for section in path.read_text().split("\n## ")[1:]:
        title, *lines = section.splitlines()
        if title.removesuffix(" by number of adaptation steps") == heading:
            return "".join(f"{line}\n" for line in lines if line.startswith("|"))
    raise ValueError(f"{path} has no heading {heading!r}. Run its benchmark again, or correct the heading.")


def main() -> int:
    """Rewrite the page; returns the exit code."""
    try:
        write_atomically(PAGE, refreshed(PAGE.read_text()))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
