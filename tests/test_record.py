"""The files of a run: when a checkpoint is due, TensorBoard events, one process at a time."""

from types import SimpleNamespace

import numpy as np
import pytest

from mamljax.record import Record, read_metrics
from mamljax.run_directory import CheckpointError, alone_in

TREE = {"weight": np.float32(1.0)}


def test_a_checkpoint_is_due_so_long_after_the_last(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("mamljax.record.time", SimpleNamespace(monotonic=lambda: clock.now))
    with Record(tmp_path, {}) as record:
        for update, start in enumerate((100.0, 126.0, 152.0), start=1):  # the first is due so long after the beginning
            clock.now = start + 25.0
            assert not record.is_due(25.0)
            clock.now = start + 26.0
            assert record.is_due(25.0)
            record.save(update, TREE)


@pytest.mark.parametrize("strange", ["{}", "5", "null", '{"update": 2}', '{"update": 2, "seco'])
def test_lines_that_are_none_of_a_log_end_it(tmp_path, strange):
    with Record(tmp_path, {}) as record:
        record.restore(TREE)
        record.log(1, {"loss": 0.5})
        record.save(1, TREE)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + strange + "\n")
    with Record(tmp_path, {}) as record:
        assert record.restore(TREE)[0] == 1
    assert [line["loss"] for line in read_metrics(path)] == [0.5]
    assert path.read_text().count("\n") == 1


def test_a_log_that_cannot_be_read_is_said_to_be_so(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with Record(tmp_path, {}) as record, pytest.raises(CheckpointError, match="cannot read .*metrics.jsonl: Is a directory"):
        record.restore(TREE)


def test_one_process_at_a_time(tmp_path):
    with Record(tmp_path, {}), pytest.raises(CheckpointError, match="another process is training in .*Wait for it"):
        Record(tmp_path, {}).__enter__()
    with Record(tmp_path, {}):
        pass


def test_what_fails_alone_in_a_directory_lets_others_in(tmp_path):
    with pytest.raises(RuntimeError), alone_in(tmp_path / "new"):
        raise RuntimeError
    with alone_in(tmp_path / "new"), pytest.raises(CheckpointError, match="another process"), alone_in(tmp_path / "new"):
        pass


def test_tensorboard_events(tmp_path):
    """Those of metrics; and where a run goes on, one that makes void what the last session wrote after its checkpoint."""
    pytest.importorskip("tensorboardX")
    for done in (0, 10):
        with Record(tmp_path, {}, tensorboard=True) as record:
            assert record.restore(TREE)[0] == done
            for update in (done + 5, done + 10, done + 15):
                record.log(update, {"loss": update / 10})
            record.save(done + 10, TREE)
        (file,) = (tmp_path / "tensorboard").iterdir()
        events = [*events_of(file.read_bytes())]
        file.unlink()  # its name is the second in which it was made
        losses = [(event.step, value.simple_value) for event in events for value in event.summary.value if value.tag == "loss"]
        np.testing.assert_allclose(losses, [(update, update / 10) for update in (done + 5, done + 10, done + 15)], rtol=1e-6)
        assert [event.step for event in events if event.session_log.status == event.session_log.START] == [done + 1]


def events_of(content):
    """Each is its length, a checksum of that, itself and a checksum of it."""
    from tensorboardX.proto.event_pb2 import Event

    while content:
        length = int.from_bytes(content[:8], "little")
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
