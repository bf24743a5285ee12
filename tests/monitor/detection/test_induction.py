"""What is said of induction while small models really train."""

import torch

import monitor
from monitor.measure import Monitor
from tests.models import AttentionOnly, train


def said(root, *, layers):
    """Of a training on random tokens that repeat at random periods: the changes in each series."""
    torch.manual_seed(100)
    model = AttentionOnly(layers=layers)
    with Monitor(root, probes=["induction"], metrics_port=None) as watch:

        def look(step):
            if step % 10 == 0:
                watch.measure(model, step)

        train(model, (8, 31), steps=450, seen=look)
    if "transitions" not in monitor.tables(root):
        return {}
    rows = monitor.read(root, "transitions").query("state == 'provisional'")
    return dict(zip(rows["series"], rows["step"], strict=True))


def test_two_layers_form_an_induction_head_and_it_is_said(tmp_path):
    """Its score passes half of its final one at step 370."""
    found = said(tmp_path, layers=2)
    assert 310 <= found["induction head"] <= 400
    assert 310 <= found["induction head formed"] <= 400


def test_of_one_layer_that_attends_by_position_no_induction_is_said(tmp_path):
    """Its prefix matching goes from 0.05 to 0.09 between steps 200 and 400, and forms a sigmoid:
    its heads come to look as far back as periods are long.
    """
    assert not {name for name in said(tmp_path, layers=1) if "induction" in name}
    best = monitor.read(tmp_path, "induction").groupby("step")["prefix_matching"].max()
    assert best.iloc[-1] > 0.08 > 0.06 > best.iloc[0]
