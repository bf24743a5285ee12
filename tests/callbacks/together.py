"""One of several processes that train together, one training after another:
`python -m tests.callbacks.together FOLDER RANK HOW …`.

The first process keeps the weights at every step; each one says in a file how a training ended.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from callbacks.pace import Pace
from tests.callbacks.tiny import OBSERVING, TinyLM, hook, loader, saver, text, tiny_class, trainer

PACKAGE = "pytorch_lightning"
STEPS = 6
HELD_OUT = text(16, seed=5)
WATCHING = {"metrics_port": None, "sequences": 5, "overhead": None, "text": HELD_OUT}
WATCHING["probes"] = [*OBSERVING, "optimisation"]


def lightning(folder: Path, how: str) -> None:
    """Under DDP, or with FSDP2 under ModelParallelStrategy."""
    from pytorch_lightning.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from callbacks import TrainingDynamics

    class Sharded(tiny_class(PACKAGE)):
        def configure_model(self):
            if how == "fsdp" and not hasattr(self.net.blocks[0], "unshard"):
                mesh = self.device_mesh["data_parallel"]
                for block in self.net.blocks:
                    fully_shard(block, mesh=mesh)
                fully_shard(self.net, mesh=mesh)

    torch.manual_seed(0)
    module = Sharded()

    def keep(running: Any, *_: Any) -> None:
        if how == "fsdp":
            assert all(hasattr(value, "full_tensor") for value in module.net.parameters())
        weights = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in module.net.state_dict().items()
        }
        if running.is_global_zero:
            torch.save(weights, folder / f"{running.global_step}.pt")

    def break_off(running: Any, *_: Any) -> None:
        if how == "raising" and running.global_step == 4 and running.global_rank == 1:
            raise RuntimeError("planted")

    own = {"pace": {"overhead": 0.5}, "raising": {"text": None}}.get(how, {})
    watching = TrainingDynamics(folder / "runs", schedule=2, **WATCHING | own)
    strategies = {
        "fsdp": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    }
    running = trainer(
        PACKAGE, folder, devices=2, strategy=strategies.get(how, lambda: "ddp")(),
        max_steps=STEPS, enable_checkpointing=True,
        callbacks=[
            *([] if how == "bare" else [watching]),
            hook(PACKAGE, on_train_batch_start=keep, on_train_batch_end=break_off),
            hook(PACKAGE, on_train_end=keep),
            saver(PACKAGE, folder / "saved", every_n_train_steps=3),
        ],
    )  # fmt: skip
    running.fit(module, loader(), loader(text(16, seed=1)))


def huggingface(folder: Path) -> None:
    """Under DDP, as torchrun starts it."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from callbacks.huggingface import TrainingDynamics

    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = TinyLM()

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict:
            logits = self.net(input_ids)
            return {"loss": nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:])}

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **more):
            if state.is_world_process_zero:
                torch.save(model.net.state_dict(), folder / f"{state.global_step}.pt")

        def on_step_end(self, *arguments, **more):
            self.on_step_begin(*arguments, **more)

    rows = [{"input_ids": row, "labels": row} for row in text()]
    torch.manual_seed(0)
    Trainer(
        model=Scored(),
        args=TrainingArguments(
            str(folder / "saved"), max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True,
            report_to=[], save_steps=3, disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows[:16],
        callbacks=[TrainingDynamics(folder / "runs", schedule=2, **WATCHING), Keep()],
    ).train()  # fmt: skip


def disagree_on_time(folder: Path, rank: int) -> None:
    """Makes the processes' own views of the budget differ, were they asked: the first says no to
    step 4, the other to every step.
    """

    def admits(self: Pace, step: int, **figures: Any) -> bool:
        return rank == 0 and step != 4

    own, Pace.admits = Pace.admits, admits  # type: ignore[method-assign]
    try:
        lightning(folder, "pace")
    finally:
        Pace.admits = own  # type: ignore[method-assign]


def main(folder: Path, rank: int, *ways: str) -> None:
    for how in ways:
        where = folder / how
        where.mkdir(exist_ok=True)
        try:
            if how == "huggingface":
                huggingface(where)
            elif how == "pace":
                disagree_on_time(where, rank)
            else:
                lightning(where, how)
            end = "trained"
        except Exception:
            end = traceback.format_exc()
        (where / f"end-{rank}").write_text(end)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
