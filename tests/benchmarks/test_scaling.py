"""The scaling benchmark at tiny size, on simulated devices; processes are tested with the library's own (test_devices.py)."""

import pytest
import scaling

TINY = ["--processes", "1", "--updates", "5", "--num-tasks", "4", "--chunk-size", "2", "--filters", "2"]


def test_devices_agree_with_one_collective():
    tiny = {"updates": 5, "num_tasks": 4, "chunk_size": 2, "filters": 2}
    rows = scaling.measure(scaling.Options(devices=(1, 2), processes=1, dtype="float64", **tiny))
    values = {(row.method, row.metric): row.mean for row in rows}
    for name, collectives in (("1 device", 0), ("2 devices", 1)):
        assert values[name, "collective operations in a meta-update"] == collectives
        assert values[name, "milliseconds per meta-update"] > 0
        assert values[name, "relative distance of the parameters"] < 1e-13
    assert values["1 device", "time relative to the first"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "9", "--num-tasks", "9"], "9 devices were asked for, but there are 4"),
        (["--devices", "3"], "--num-tasks must be a multiple of the number of devices, 3, got 4"),
        (["--updates", "7"], "--updates must be a multiple of 5, got 7"),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, message):
    assert scaling.main([*TINY, *arguments, "--out", str(tmp_path)]) == 2
    assert f"error: {message}" in capsys.readouterr().err
