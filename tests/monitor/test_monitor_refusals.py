"""What a monitor refuses: at once, or at the first measurement, and before anything is written."""

import pytest
from torch import nn

import monitor
from monitor.anatomy import NotALanguageModelError
from monitor.capture import NoAttentionError
from monitor.measure import Monitor
from tests.callbacks.tiny import CONTEXT, VOCABULARY, TinyLM, text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"run": "../x"}, ValueError, "run name '../x' cannot be used"),
        ({"run": ""}, ValueError, "run name '' cannot be used"),
        ({"probes": ["inductoin"]}, ValueError, "did you mean 'induction'"),
        ({"probes": ["induction.entrpy"]}, ValueError, "did you mean 'entropy'"),
        ({"probes": []}, ValueError, "expected a list of names"),
        ({"probes": "induction"}, ValueError, "expected a list of names"),
        ({"sequences": 1}, ValueError, "sequences=1: expected a whole number of at least 2"),
        ({"sequences": 2.5}, ValueError, "sequences=2.5"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"context": 0}, ValueError, "context=0"),
        ({"text": text()[0]}, ValueError, "reshape it to one sequence a row"),
        ({"text": text()[..., None]}, ValueError, "reshape it to one sequence a row"),
        ({"text": text()[:0]}, ValueError, "sequence a row"),
        ({"text": text().float()}, TypeError, "pass token ids, not embeddings"),
        ({"text": text().tolist()}, TypeError, "needs token ids as an integer tensor"),
        ({"text": text() - VOCABULARY}, ValueError, "token ids from -32 to -1"),
        ({"metrics_port": 70_000}, ValueError, "metrics_port=70000"),
        ({"metrics_port": -1}, ValueError, "metrics_port=-1"),
        ({"adapters": [nn.Linear]}, TypeError, "expected a dictionary from classes of modules"),
        ({"adapters": {"Linear": len}}, TypeError, "adapters has the entry 'Linear'"),
        ({"adapters": {nn.Linear: 3}}, TypeError, "adapters has the entry"),
    ],
)
def test_arguments_that_are_refused_at_once(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        Monitor(tmp_path / "runs", **arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": text() + 1}, ValueError, "token ids from 1 to 32; expected 0 to 31"),
        ({"text": text()[:, :24], "context": 32}, ValueError, "smaller context="),
        ({"context": CONTEXT + 1}, ValueError, f"longer than the {CONTEXT} positions"),
        ({"context": 8}, ValueError, "too short"),
        ({"vocab_size": VOCABULARY + 1}, ValueError, "larger than the model's own"),
    ],
)
def test_arguments_that_are_refused_at_the_first_measurement(
    tmp_path, model, start, arguments, error, message
):
    one = start(tmp_path, **arguments, metrics_port=0)
    for _ in range(2):
        with pytest.raises(error, match=message):
            one.measure(model, step=0)
    assert one.url is None
    one.close()
    assert monitor.tables(tmp_path) == []


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (nn.Linear(2, 2), NotALanguageModelError),
        (nn.ModuleList([TinyLM(), TinyLM()]), NotALanguageModelError),
        (nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)), NoAttentionError),
        (None, TypeError),
        (len, TypeError),
    ],
)
def test_models_that_are_refused(tmp_path, start, wrong, error):
    one = start(tmp_path)
    with pytest.raises(error):
        one.measure(wrong, step=0)
    assert monitor.tables(tmp_path) == []


@pytest.mark.parametrize("step", [None, "1", 1.5])
def test_a_first_step_that_is_none(tmp_path, model, start, step):
    with pytest.raises(TypeError):
        start(tmp_path).measure(model, step=step)
    assert monitor.tables(tmp_path) == []


def test_roots_that_are_refused(tmp_path, start):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        start(tmp_path / "file" / "runs")
    (tmp_path / "x.parquet").write_text("")
    with pytest.raises(ValueError, match="did not write"):
        start(tmp_path)
