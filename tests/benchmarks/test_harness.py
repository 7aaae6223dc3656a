"""How every benchmark ends when it is stopped, or cannot begin."""

import dataclasses
from pathlib import Path

import harness


@dataclasses.dataclass(frozen=True)
class Options:
    """Nothing to measure."""

    out: Path
    """Directory for results.json."""


def stopped(options):
    raise KeyboardInterrupt


def test_ctrl_c_is_one_line(tmp_path, capsys):
    assert harness.main("nothing", Options, stopped, ["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith("stopped. Nothing was written")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_one_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert harness.main("nothing", Options, stopped, ["--out", str(tmp_path / "file")]) == 2
    assert "error: cannot write to" in capsys.readouterr().err
