"""`parameters`: which weights were measured, of a model as it is, and through a run."""

import pytest
import torch

import monitor
from monitor.measure import Monitor, measure
from monitor.sketching import digest
from tests.callbacks.tiny import TinyLM, text


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyLM()


def test_norm_and_digest_are_those_of_the_weights(model):
    (row,) = measure(model, probes=["parameters"])["parameters"].to_dict("records")
    whole = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert row["norm"] == pytest.approx(float(whole.double().norm()), rel=1e-6)
    assert row["digest"] == digest(model)
    assert row["n"] == len(whole)
    assert len(row["sketch"]) == 512


def test_weights_that_are_not_finite_say_so(model):
    with torch.no_grad():
        model.unembedding.bias[0] = float("nan")
    (row,) = measure(model, probes=["parameters"])["parameters"].to_dict("records")
    assert row["validity"] == "norm is not finite"
    assert len(row["digest"]) == 32


def test_a_checkpoint_that_is_another_one_is_said_to_be(tmp_path, model):
    """Early weights served at a late step, in a run whose weights move on."""
    random = torch.Generator().manual_seed(0)
    options = {"run": "r", "text": text(), "sequences": 4, "probes": ["parameters", "in_context"]}
    kept = {}
    with Monitor(tmp_path, **options) as one:
        for step in range(0, 200, 10):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=random))
            kept[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            if step == 150:
                model.load_state_dict(kept[30])
            one.measure(model, step=step)
            model.load_state_dict(kept[step])
    said = monitor.read(tmp_path, "transitions")
    broken = said[said["kind"] == "break"]
    assert broken["step"].iloc[0] == 150
    assert broken["label"].iloc[0] == "its weights are those of step 30"
    # Weights that wander may seem to change before that.
    assert not ((said["kind"] == "change") & (said["step"] >= 150)).any()
