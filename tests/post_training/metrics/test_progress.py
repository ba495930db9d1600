import io

import pytest

from post_training.metrics.progress import Progress


class Terminal(io.StringIO):
    """A console of 80 columns that keeps what is written."""

    def isatty(self) -> bool:
        return True

    @property
    def last_line(self) -> str:
        """What stands on the last line that is not empty."""
        lines = [line for line in self.getvalue().replace("\n", "\r").split("\r") if line.strip()]
        return lines[-1].strip()


def record(iteration, **numbers):
    return {
        "iteration": iteration,
        "lm_loss": 2.0 / iteration,
        "token_accuracy": 0.25 * iteration,
        "lr": 2e-5 / iteration,
        "grad_norm": 1.5 * iteration,
        "tokens_per_s": 12345.0,
        **numbers,
    }


EVALUATION = {
    "iteration": 3,
    "split": "valid",
    "loss": 0.5,
    "perplexity": 1.65,
    "token_accuracy": 0.875,
    "tokens": 17,
}


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def test_the_bar_shows_a_step_and_ends_with_the_last(terminal):
    progress = Progress(terminal, 3)
    progress.start(0)
    for iteration in (1, 2, 3):
        progress.step(record(iteration))
    progress.note("evaluating on valid")
    assert terminal.last_line.endswith("evaluating on valid")
    progress.evaluation(EVALUATION)
    progress.close()
    assert "valid loss 0.5000, perplexity 1.650, accuracy 0.875 over 17" in terminal.getvalue()
    # Whole: within the 80 columns.
    step = "loss 0.6667, acc 0.750, lr 6.7e-06, norm 4.50, 12,345 tok/s"
    assert terminal.last_line.startswith("3/3 ") and terminal.last_line.endswith(step)


def test_a_run_that_ends_within_an_evaluation_ends_with_the_last_step_too(terminal):
    progress = Progress(terminal, 3)
    progress.start(0)
    progress.step(record(1, grad_norm=None, token_accuracy=float("nan")))
    progress.note("evaluating on valid")
    progress.close()
    assert terminal.last_line.endswith("loss 2.0000, lr 2.0e-05, norm -, 12,345 tok/s")


def test_lines_say_the_same_where_there_is_no_terminal():
    console = io.StringIO()
    progress = Progress(console, 3, plain=True)
    progress.start(0)
    progress.step(record(1))
    (line,) = console.getvalue().splitlines()
    assert line.startswith("step 1/3  loss 2.0000  accuracy 0.250  grad norm 1.500  lr 2.00e-05  ")
