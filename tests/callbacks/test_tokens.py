"""Token ids in whatever a loader yields, and taken from a loader without disturbing it."""

from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from torch import tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from callbacks.tokens import TokenCount, tokens_in, tokens_of_loader

IDS = tensor([[1, 2, 3], [4, 5, 6]])
OTHER = tensor([[7, 8, 9], [7, 8, 9]])


class Pair(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor


@pytest.mark.parametrize(
    "batch",
    [
        IDS,
        IDS.int(),
        IDS.short(),
        (IDS, OTHER),
        [IDS, OTHER],
        [[IDS], OTHER],
        Pair(IDS, OTHER),
        {"input_ids": IDS, "labels": OTHER},
        {"labels": OTHER, "input_ids": IDS},
        UserDict(labels=OTHER, input_ids=IDS),
        {"x": IDS, "y": OTHER},
        {"text": {"input_ids": IDS}},
        [torch.ones(2, 3), "text", None, 5, tensor([1, 2]), IDS],
        (torch.ones(2, 3, dtype=torch.bool), IDS),
        {"image": torch.ones(2, 3), "ids": IDS},
    ],
)
def test_the_first_integer_matrix_is_the_token_ids(batch):
    found = tokens_in(batch)
    assert torch.equal(found.long(), IDS)


@pytest.mark.parametrize(
    "batch",
    [None, 5, "text", b"text", [], {}, (), torch.ones(2, 3), tensor([1, 2]), tensor([[[1]]]),
     torch.ones(2, 3, dtype=torch.bool), ["a", "b"], {"input_ids": torch.ones(2, 3)},
     {"input_ids": [[1, 2], [3, 4]]}],
)  # fmt: skip
def test_batches_without_token_ids(batch):
    assert tokens_in(batch) is None


def test_rows_with_padding_are_left_out():
    mask = tensor([[1, 1, 0], [1, 1, 1]])
    assert tokens_in({"input_ids": IDS, "attention_mask": mask}).tolist() == [[4, 5, 6]]
    assert tokens_in({"input_ids": IDS, "attention_mask": mask.bool()}).tolist() == [[4, 5, 6]]
    nothing = tokens_in({"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)})
    assert nothing.shape == (0, 3)


def test_a_mask_of_another_shape_says_nothing_of_the_rows():
    batch = {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 3)}
    assert torch.equal(tokens_in(batch), IDS)


class Watched(TensorDataset):
    """Notes which examples it was asked for."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(index)


def test_examples_are_spread_over_the_data_set():
    data = Watched(torch.arange(200).view(100, 2))
    tokens = tokens_of_loader(DataLoader(data, batch_size=7, shuffle=True), sequences=4)
    assert data.asked == [0, 33, 66, 99]
    assert tokens[:, 0].tolist() == [0, 66, 132, 198]


def test_all_of_a_small_data_set():
    loader = DataLoader(TensorDataset(torch.arange(6).view(3, 2)), batch_size=2)
    assert tokens_of_loader(loader, sequences=16).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_no_sampler_moves_and_no_random_number_is_drawn():
    class Sampler(torch.utils.data.SequentialSampler):
        def __iter__(self):
            raise AssertionError("the loader was iterated over")

    data = TensorDataset(torch.arange(20).view(10, 2))
    before = torch.get_rng_state()
    assert tokens_of_loader(DataLoader(data, sampler=Sampler(data)), sequences=2) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_the_loaders_own_collation_is_used():
    loader = DataLoader(
        [[1, 2], [3, 4]],
        collate_fn=lambda rows: {"labels": OTHER, "input_ids": tensor(rows)},
    )
    assert tokens_of_loader(loader, sequences=2).tolist() == [[1, 2], [3, 4]]


class Stream(IterableDataset):
    def __iter__(self):
        raise AssertionError("the stream was read")


@pytest.mark.parametrize(
    "loader",
    [
        None,
        [IDS],
        iter([IDS]),
        DataLoader(Stream()),
        DataLoader(TensorDataset(torch.ones(4, 3))),
        DataLoader(TensorDataset(torch.ones(0, 3, dtype=torch.long))),
        DataLoader([1, 2, 3]),
    ],
)
def test_loaders_that_give_none(loader):
    assert tokens_of_loader(loader, sequences=4) is None


def test_a_data_set_of_nothing_but_padding_gives_none():
    rows = [{"input_ids": IDS[0], "attention_mask": tensor([1, 0, 0])}] * 3
    assert tokens_of_loader(DataLoader(rows), sequences=4) is None


def test_a_count_adds_up_over_batches_and_processes():
    count = TokenCount(100, processes=2)
    mask = tensor([[1, 1, 0], [1, 1, 1]])
    assert count.value == 100
    count.add({"input_ids": IDS, "attention_mask": mask})
    assert count.value == 110
    count.add(IDS)
    assert count.value == 110 + 2 * IDS.numel()


def test_a_batch_in_which_training_broke_off_is_taken_back_once():
    count = TokenCount(0)
    count.add(IDS)
    count.add(OTHER)
    count.take_back()
    count.take_back()
    assert count.value == IDS.numel()


def test_a_count_is_unknown_once_one_batch_is():
    count = TokenCount(0)
    count.add(IDS)
    count.add("text")
    assert count.value is None
    count.add(IDS)
    assert count.value is None
    late = TokenCount(None)
    late.add(IDS)
    assert late.value is None
