"""Labels that mean nothing: control tasks and shuffled labels, against what they promise."""

import dataclasses

import pytest
import torch

from monitor.features.tasks import control_labels, shuffled_labels
from monitor.stimuli import text_stimulus
from tests.models.planted_direction import labelled


@pytest.fixture
def stimulus():
    whole = labelled(rows=24, vocab_size=50)
    values = whole.labels.values.clone()
    values[:, :, ::3] = 0
    return dataclasses.replace(whole, labels=dataclasses.replace(whole.labels, values=values))


def test_a_control_task_gives_every_token_id_one_side(stimulus):
    control = control_labels(stimulus)
    values = stimulus.labels.values
    assert control.dtype == torch.int8
    assert torch.equal(control != 0, values != 0)
    sides = []
    for task in control:
        of_id = [task[(stimulus.tokens == token) & (task != 0)].unique() for token in range(50)]
        assert all(len(side) == 1 for side in of_id)
        sides.append(torch.cat(of_id))
    # Each concept has a draw of its own, and that knows nothing of the concept.
    for i, side in enumerate(sides):
        assert 10 < (side > 0).sum() < 40
        assert all((side != other).any() for other in sides[:i])


def test_shuffled_labels_are_the_same_ones_at_other_tokens_of_the_same_split(stimulus):
    shuffled, values = shuffled_labels(stimulus), stimulus.labels.values
    for split in range(3):
        here = stimulus.labels.split == split
        for mixed, plain in zip(shuffled[:, here], values[:, here], strict=True):
            assert torch.equal(mixed != 0, plain != 0)
            assert mixed.sum() == plain.sum()
            agree = (mixed == plain)[plain != 0].float().mean()
            assert 0.3 < agree < 0.7


@pytest.mark.parametrize("made", [control_labels, shuffled_labels])
def test_they_are_drawn_by_the_seed_and_leave_the_labels_alone(made, stimulus):
    before = stimulus.labels.values.clone()
    assert torch.equal(made(stimulus), made(stimulus))
    assert not torch.equal(made(stimulus), made(stimulus, seed=1))
    assert torch.equal(stimulus.labels.values, before)
    with pytest.raises(ValueError, match="expected one with labels"):
        made(text_stimulus(stimulus.tokens))
