"""What a monitor does about transitions: rows at once, weights from around them, the user's
function, metrics; and that what fails there fails alone.
"""

import pytest
import torch

import monitor
from monitor.detection import Series
from monitor.measure import Monitor
from monitor.sinks import MemorySink
from tests.callbacks.tiny import TinyLM, text
from tests.recorded import scrape

LOSS = Series.best("loss", "in_context", "loss_early", stderr=False)


def shaken(model, step, *, at=30):
    """The model, with noise, and from some step on sure of a token that is hardly ever right."""
    random = torch.Generator().manual_seed(step)
    with torch.no_grad():
        model.unembedding.bias.normal_(0.0, 0.02, generator=random)
        model.unembedding.bias[0] += 4 * torch.sigmoid(torch.tensor(2.0 * (step - at)))
    return model


@pytest.fixture
def watched(tmp_path):
    """Measures a model whose loss jumps, at steps of 10, and returns the monitor."""
    made = []

    def watched(steps=range(45), **more):
        options = {"run": "r", "text": text(), "sequences": 4, "probes": ["in_context"]}
        one = Monitor(tmp_path, **(options | {"series": [LOSS]} | more))
        made.append(one)
        torch.manual_seed(0)
        model = TinyLM()
        for step in steps:
            one.measure(shaken(model, step), step=10 * step)
        return one

    yield watched
    for one in made:
        one.close()


def test_a_transition_is_recorded_and_told_of_at_once(tmp_path, watched):
    told = []

    def on_transition(notice):
        # It is on disk by now, and so are the weights.
        rows = monitor.read(tmp_path, "transitions")
        last = rows[rows.series == notice.event.series].iloc[-1]
        assert (last["step"], last["state"]) == (notice.event.step, notice.event.state)
        assert all((tmp_path / name).exists() for name in notice.checkpoints)
        assert last["checkpoints"].split() == list(notice.checkpoints)
        told.append(notice)

    one = watched(on_transition=on_transition)
    of_loss = [notice for notice in told if notice.event.series == "loss"]
    assert [notice.event.state for notice in of_loss] == ["provisional", "confirmed"]
    assert 290 <= of_loss[0].event.onset <= 310
    assert of_loss[0].event.step <= 330
    assert of_loss[1].fitted.midpoint == pytest.approx(300, abs=10)
    before, during, after = (int(name[-15:-3]) for name in of_loss[1].checkpoints)
    assert before <= of_loss[0].event.onset <= during < after
    assert not one.pending
    assert "failures" not in monitor.tables(tmp_path)


def test_what_was_said_is_a_metric_until_something_else_is(watched):
    metrics = scrape(watched(metrics_port=0).url)
    assert metrics["phasewatch_transitions_confirmed", "loss"] == 1
    assert metrics["phasewatch_transitions_provisional", "loss"] == 0
    assert metrics["phasewatch_transitions_midpoint_steps", "loss"] == pytest.approx(300, abs=10)


def test_a_function_that_raises_is_recorded_and_training_goes_on(tmp_path, watched):
    def on_transition(notice):
        raise RuntimeError("nobody answers")

    watched(on_transition=on_transition)
    failures = monitor.read(tmp_path, "failures")
    assert set(failures["part"]) == {"on_transition"}
    assert failures["error"].str.contains("nobody answers").all()
    rows = monitor.read(tmp_path, "transitions")
    assert rows[rows.series == "loss"]["state"].tolist() == ["provisional", "confirmed"]


def test_weights_that_cannot_be_written_are_recorded(tmp_path, watched):
    (tmp_path / "_checkpoints").write_text("no folder")
    watched()
    failures = monitor.read(tmp_path, "failures")
    assert set(failures["part"]) == {"checkpoints"}
    rows = monitor.read(tmp_path, "transitions")
    assert rows[rows.series == "loss"]["state"].tolist() == ["provisional", "confirmed"]
    assert (rows["checkpoints"] == "").all()


def test_a_run_that_is_taken_up_goes_on_where_it_was(tmp_path, watched):
    watched(range(32))
    first = monitor.read(tmp_path, "transitions")
    assert first[first.series == "loss"]["state"].tolist() == ["provisional"]
    watched(range(32, 45), resumed_from=310)
    rows = monitor.read(tmp_path, "transitions")
    rows = rows[rows.series == "loss"]
    assert rows["state"].tolist() == ["provisional", "confirmed"]
    assert rows["attempt"].tolist() == [1, 2]
    assert rows["detected_at"].tolist() == [rows["step"].tolist()[0]] * 2


def test_from_before_a_transition_it_is_said_again(tmp_path, watched):
    watched(range(45))
    watched(range(20, 45), resumed_from=190)
    rows = monitor.read(tmp_path, "transitions")
    rows = rows[rows.series == "loss"]
    assert rows["state"].tolist() == ["provisional", "confirmed"]
    assert rows["attempt"].tolist() == [2, 2]


def test_nothing_is_followed_where_nothing_is_wanted(tmp_path, watched):
    one = watched(false_alarms=None)
    assert "transitions" not in monitor.tables(tmp_path)
    assert not (tmp_path / "_checkpoints").exists()
    assert dict(one.pending) == {}


def test_without_a_folder_notices_go_to_the_other_sinks():
    memory = MemorySink()
    options = {"text": text(), "sequences": 4, "probes": ["in_context"], "series": [LOSS]}
    with Monitor(None, sinks=[memory], **options) as one:
        torch.manual_seed(0)
        model = TinyLM()
        for step in range(45):
            one.measure(shaken(model, step), step=10 * step)
    rows = memory.read("transitions")
    assert rows[rows.series == "loss"]["state"].tolist() == ["provisional", "confirmed"]
    assert (rows["checkpoints"] == "").all()


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"series": ["select 1"]}, TypeError, r"series= needs a list of Series\(...\); got str"),
        ({"series": [LOSS, LOSS]}, ValueError, "'loss' are there more than once"),
        ({"false_alarms": 0.0}, ValueError, "expected a number above 0"),
        ({"checkpoint_bytes": -1}, ValueError, "checkpoint_bytes=-1; expected"),
        ({"checkpoint_bytes": 1e9}, ValueError, "expected a whole number"),
        ({"on_transition": "print"}, TypeError, "on_transition= is str; expected a function"),
    ],
)
def test_arguments_of_no_use_are_refused(tmp_path, given, error, said):
    with pytest.raises(error, match=said):
        Monitor(tmp_path, **given)
