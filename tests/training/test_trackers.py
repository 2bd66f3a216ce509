"""What trackers get: TensorBoard and trackio with their real packages where they are installed, and the alarm."""

import sys
import types

import pytest
from small import images, trainer
from transformers import TrainerCallback

import hfproj


class Low(hfproj.SpectrumCallback):
    """Measures a rank that falls."""

    def measure(self):
        step = self.trainer.state.global_step
        return {"rankme_h": 10.0 if step == 0 else 1.0, "rankme_z": 4.0, "std_h": 0.2, "std_z": 0.3}


class TrackioCallback(TrainerCallback):
    """Stands for transformers' own, by its name."""


def alarmed(folder, callbacks=(), **options):
    alarm = hfproj.CollapseCallback(warmup=0, limits={"loss": None})
    extra = {"callbacks": [Low(every=1, images=8), alarm, *callbacks]}
    with pytest.warns(hfproj.CollapseWarning):
        trainer(folder, None, images(32), max_steps=3, extra=extra, **options).train()
    return alarm.alarm


def test_the_alarm_is_an_alert_where_trackio_is_reported_to(tmp_path, monkeypatch):
    sent = []
    level = types.SimpleNamespace(ERROR="error")
    fake = types.SimpleNamespace(alert=lambda **alert: sent.append(alert), AlertLevel=level)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    alarmed(tmp_path / "without")
    assert sent == []
    alarm = alarmed(tmp_path / "with", [TrackioCallback()])
    assert sent == [{"title": "Collapse at step 2: rankme_h", "text": alarm.message, "level": "error"}]


def test_trackio_gets_the_history_and_the_alert(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    options = {"report_to": "trackio", "project": "hfproj-test", "run_name": "one"}
    alarm = alarmed(tmp_path / "run", **options)
    run = trackio.Api().runs("hfproj-test")[0]
    [alert] = run.alerts()
    assert (alert["title"], alert["level"]) == ("Collapse at step 2: rankme_h", "error")
    assert alert["text"] == alarm.message


def test_tensorboard_gets_the_history(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    alarmed(tmp_path / "run", report_to="tensorboard", log_representation=True)
    [events] = (tmp_path / "board").rglob("events.out.*")
    board = EventAccumulator(str(events.parent)).Reload()
    names = board.Tags()["scalars"]
    assert any("probe_rankme_h" in name for name in names), names
    assert any("batch_rankme_h" in name for name in names), names
