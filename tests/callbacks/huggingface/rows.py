"""Data for the Trainer of transformers, and what its callbacks are compared with."""

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback

import monitor
from monitor.measure import measure
from tests.models import VOCABULARY

CONTEXT, BATCH = 32, 4
TOKENS_A_BATCH = CONTEXT * BATCH


def text(sequences: int = 64, *, seed: int = 0, positions: int = CONTEXT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (sequences, positions), generator=generator)


HELD_OUT = text(16, seed=5)


class Rows(Dataset):
    """Examples as Trainers take them; `real` of the positions are no padding."""

    def __init__(self, rows, *, real=None):
        self.rows = rows
        self.real = real

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = {"input_ids": self.rows[index], "labels": self.rows[index]}
        if self.real is not None:
            row["attention_mask"] = (torch.arange(len(self.rows[index])) < self.real).long()
        return row


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(Rows(self.rows))


class Keep(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **more):
        self.weights[state.global_step] = {k: v.clone() for k, v in model.state_dict().items()}


SAVING = {"save_strategy": "steps", "save_steps": 3}


def check_numbers(root, step: int, model) -> None:
    """What is stored at a step is what this model gives, to the last bit."""
    expected = measure(model, text=HELD_OUT, sequences=4, context=CONTEXT)
    for table, field in (("induction", "prefix_matching"), ("in_context", "score")):
        stored = monitor.read(root, table).query(f"step == {step}")[field]
        assert stored.tolist() == expected[table][field].tolist()
