"""What the Trainer's log says of transitions."""

from transformers import TrainerCallback

import monitor
from monitor.detection import Series
from tests.callbacks.huggingface.rows import text
from tests.models import gpt2

LOSS = Series.best("loss", "in_context", "loss_early", stderr=False)
JUMP = 200


class Spoil(TrainerCallback):
    """From some step on the model is sure of a token that is hardly ever right."""

    def on_step_end(self, args, state, control, model=None, **more):
        if state.global_step >= JUMP:
            model.transformer.ln_f.bias.data[:] = 3 * model.lm_head.weight.data[0].sign()


def test_a_transition_is_in_the_log_of_the_trainer(trainer, dynamics, root):
    callback = dynamics(
        run="r", schedule=8, probes=["in_context"], series=[LOSS], text=text(), concepts=[]
    )
    running = trainer(Spoil(), callback, model=gpt2(), max_steps=280)
    running.train()
    rows = monitor.read(root, "transitions")
    rows = rows[rows.series == "loss"]
    assert rows["state"].tolist() == ["provisional", "confirmed"]
    assert JUMP <= rows["step"].iloc[0] <= JUMP + 16
    logged = {
        entry["step"]: entry["phasewatch/loss/confirmed"]
        for entry in running.state.log_history
        if "phasewatch/loss/confirmed" in entry
    }
    assert logged == {rows["step"].iloc[1]: rows["began"].iloc[1]}
