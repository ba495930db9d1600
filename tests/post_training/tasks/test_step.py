import types
from typing import Any

import pytest
import torch

from post_training.errors import RunStopped
from post_training.metrics.step_counters import counters
from post_training.tasks.model import TaskModel
from post_training.tasks.rows import RowBatch
from post_training.tasks.step import TaskStep
from tests.helpers.models import load_model


class Chunk(torch.nn.Module):
    """Where Megatron's wrappers are: called as the model, which lies inside."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(self.model.weight)

    def forward(self, x, labels=None):
        loss = self.model(x).sum()
        if labels is None:
            return loss
        kept = labels != -100
        mean = (self.model(x).flatten() * kept).sum() / kept.sum()
        return types.SimpleNamespace(loss=mean, logits=self.model(x))


class Task:
    device = torch.device("cpu")
    model: Any

    def __init__(self, train=None, evaluate=None):
        self.train, self.evaluate = train, evaluate

    def get_train_model_output(self, batch):
        return self.train(self.model, batch)

    def get_eval_model_output(self, batch):
        return self.evaluate(batch)


X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
LABELS, NONE = torch.tensor([5, -100]), torch.tensor([-100, -100])


def run(task, batch, rows=2, training=True):
    counters.reset()
    chunk = Chunk().train(training)
    said: list[str] = []
    step = TaskStep(task, "t", said.append)
    loss, weigh = step(iter([RowBatch(batch, rows)]), chunk)
    return (*weigh(loss)[:2], said, chunk)


@pytest.mark.parametrize(
    ("train", "total", "count"),
    [
        (lambda model, batch: model(batch["x"]), 10.0, 1),
        (lambda model, batch: (model(batch["x"]), 2), 10.0, 2),
        (lambda model, batch: [model(batch["x"]), model(batch["x"])], 20.0, 2),
        (lambda model, batch: (model(batch["x"]), {"other": 3.0}), 10.0, 1),
        (lambda model, batch: ((model(batch["x"]), 4), {"other": 3.0}), 10.0, 4),
        (lambda model, batch: model(batch["x"], labels=LABELS).loss, 3.0, 1),
        (lambda model, batch: model(batch["x"], labels=NONE).loss, 0.0, 0),
        (lambda model, batch: (model(batch["x"]) / 0 * 0, 0), 0.0, 0),
    ],
)
def test_forms_of_a_loss_and_their_weights(train, total, count):
    loss, weight, _, chunk = run(Task(train), {"x": X})
    assert float(loss.detach()) == total and int(weight) == count
    loss.backward()
    if count:
        assert bool(chunk.model.weight.grad.any())
    else:
        assert bool(torch.isfinite(chunk.model.weight.grad).all())
    named = counters._gathered()
    assert named == {} or named == {"other": (6.0, 2.0)}


@pytest.mark.parametrize(
    "wrap", [lambda logits: {"found": [logits]}, lambda logits: (None, logits)]
)
def test_a_loss_of_nothing_has_no_gradient_whatever_the_model_returns(wrap):
    class Own(Chunk):
        def forward(self, x, labels=None):
            return wrap(self.model(x))

    def train(model, batch):
        found = wrap(0)
        out = model(batch["x"])
        logits = out["found"][0] if isinstance(found, dict) else out[1]
        return logits.sum() * float("nan"), 0

    chunk = Own()
    loss, _ = TaskStep(Task(train), "t", print)(iter([RowBatch({"x": X}, 2)]), chunk)
    loss.backward()
    gradient = chunk.model.weight.grad
    assert float(loss.detach()) == 0 and gradient is not None and not bool(gradient.any())


def test_labels_that_are_shifted_already_are_counted_as_they_are(hf_model):
    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = load_model(hf_model("qwen3"))

        def forward(self, **inputs):
            return self.model(**inputs)

    ids = torch.arange(6).view(1, 6)
    labels = torch.tensor([[-100, -100, 3, 4, 5, 6]])
    model = TaskModel(Whole())
    for options in ({}, {"shift_labels": labels.roll(-1, 1).clone()}, {"shift_labels": ids}):
        model.forget()
        loss = model(input_ids=ids, labels=labels, **options).loss
        ((mean, count),) = model.calls
        assert mean is loss and count == (6 if options.get("shift_labels") is ids else 4)


def test_a_batch_that_stands_for_none_weighs_nothing():
    loss, weight, _, chunk = run(
        Task(lambda model, batch: (model(batch["x"]), 2)), {"x": X}, rows=0
    )
    loss.backward()
    assert (
        float(loss.detach()) == 0 and int(weight) == 0 and not bool(chunk.model.weight.grad.any())
    )


def test_that_micro_batches_weigh_the_same_is_said_once():
    _, _, said, _ = run(Task(lambda model, batch: model(batch["x"])), {"x": X})
    assert len(said) == 1 and "weigh the same" in said[0]
    _, _, said, _ = run(Task(lambda model, batch: model(batch["x"], labels=LABELS).loss), {"x": X})
    assert not said


@pytest.mark.parametrize(
    ("train", "says"),
    [
        (lambda model, batch: 3.0, "returned float"),
        (lambda model, batch: batch["x"], r"a tensor of shape \[2, 2\]"),
        (lambda model, batch: model(batch["x"]).detach(), "has no gradient"),
        (lambda model, batch: (model(batch["x"]), 1.5), "a count of 1.5, expected a whole number"),
        (lambda model, batch: (model(batch["x"]), 2**31), "a count of .*, expected a whole number"),
        (lambda model, batch: (model(batch["x"]), -1), "a count of -1"),
        (lambda model, batch: (model(batch["x"]), "many"), "returned tuple"),
        (lambda model, batch: (model(batch["x"]), torch.ones(2)), "returned tuple"),
        (
            lambda model, batch: (model(batch["x"]), {"a": "b"}),
            "returned str as 'a', expected a number",
        ),
        (lambda model, batch: (model(batch["x"]), {"a": batch["x"]}), "of shape .* as 'a'"),
        (lambda model, batch: (model(batch["x"]), {"lr": 1.0}), "'lr', which metrics.jsonl has"),
        (lambda model, batch: batch["images"], "asks for 'images'; .* collate_fn made has x, y"),
        (lambda model, batch: (model(batch["x"]), {"a": "b"}), "str as 'a', expected a number"),
    ],
)
def test_what_cannot_be_trained_is_refused(train, says):
    with pytest.raises(RunStopped, match=says):
        run(Task(train), {"x": X, "y": X})


def test_a_tensor_on_another_device_names_itself():
    task: Any = Task(lambda model, batch: (batch["x"] * task.weights).sum())
    task.weights = torch.ones(2, device="meta")
    with pytest.raises(
        RunStopped, match=r"computes \(cpu\): weights is on meta; move .*self.device"
    ):
        run(task, {"x": X})


@pytest.mark.parametrize(
    ("evaluate", "found"),
    [
        (lambda batch: torch.tensor(1), (1.0, 2.0)),
        (lambda batch: (3, 7), (3.0, 7.0)),
        (lambda batch: 3, "3 right of a batch of 2 rows"),
        (lambda batch: -1, "-1 right"),
        (lambda batch: [1, 0], "returned list"),
        (lambda batch: torch.ones(2), r"a tensor of shape \[2\]"),
    ],
)
def test_what_is_right_is_counted(evaluate, found):
    if isinstance(found, str):
        with pytest.raises(RunStopped, match=found):
            run(Task(evaluate=evaluate), {"x": X}, training=False)
        return
    run(Task(evaluate=evaluate), {"x": X}, training=False)
    assert counters._gathered() == {"eval_accuracy": found}
    run(Task(evaluate=evaluate), {"x": X}, rows=0, training=False)
    assert counters._gathered() == {}
