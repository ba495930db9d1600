"""The progress bar: a step's numbers and the time left; without a terminal a line now and then."""

from __future__ import annotations

import math
import time
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 10.0
# What tqdm writes of its own is cut down so that the numbers of a step fit into 80 columns.
BAR = "{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}"


class Progress:
    """Shows the steps of a run on a console, or nothing where it has none."""

    def __init__(self, console: TextIO | None, total: int, *, plain: bool = False) -> None:
        """Make ready; nothing is drawn before the first step.

        Args:
            console: a text stream, or None on ranks that show nothing.
            total: steps of the whole run.
            plain: write lines even on a terminal.
        """
        self.console = console
        self.total = total
        self.plain = plain or console is None or not console.isatty()
        self.every_step = plain
        self.bar: tqdm[Any] | None = None
        self.last = ""
        self.previous = 0
        self.last_line = 0.0
        self.begin = 0.0
        self.first = 0

    def start(self, iteration: int) -> None:
        """Begin at `iteration`, which has been done already."""
        self.previous = self.first = iteration
        self.begin = time.perf_counter()
        if self.console is not None and not self.plain:
            self.bar = tqdm(
                total=self.total,
                initial=iteration,
                file=self.console,
                bar_format=BAR,
                dynamic_ncols=True,
            )

    def steps_since(self, iteration: int) -> int:
        """Steps since the last one that was shown."""
        return iteration - self.previous

    def step(self, record: dict[str, Any]) -> None:
        """Show a step from its metrics record."""
        iteration = record["iteration"]
        advance = iteration - self.previous
        self.previous = iteration
        if self.console is None:
            return
        loss, speed = record["lm_loss"], record["tokens_per_s"] or 0.0
        if self.bar is not None:
            self.last = (
                f"loss {loss:.4f}{_accuracy(record, ', acc')}, lr {_number(record['lr'], '.1e')}, "
                f"norm {_number(record['grad_norm'], '.2f')}, {speed:,.0f} tok/s"
            )
            self.bar.set_postfix_str(self.last, refresh=False)
            self.bar.update(advance)
            return
        now = time.perf_counter()
        if not self.every_step and now - self.last_line < LINE_SECONDS and iteration != self.total:
            return
        self.last_line = now
        done = max(1, iteration - self.first)
        imbalance = record.get("expert_imbalance")
        experts = "" if imbalance is None else f"  expert imbalance {imbalance:.2f}"
        left = (now - self.begin) / done * (self.total - iteration)
        self._line(
            f"step {iteration}/{self.total}  loss {loss:.4f}{_accuracy(record, '  accuracy')}  "
            f"{_gradient(record)}  lr {_number(record['lr'], '.2e')}"
            f"{experts}  {speed:,.0f} tokens/s  {_duration(left)} left"
        )

    def evaluation(self, record: dict[str, Any]) -> None:
        """Show the result of an evaluation."""
        apart = ", ".join(
            f"{name} {each['loss']:.4f}" if each["loss"] is not None else f"{name} -"
            for name, each in record.get("sources", {}).items()
        )
        if "eval_accuracy" in record:
            self._line(
                f"step {record['iteration']}: {record['split']} accuracy {record['eval_accuracy']:.4f} "
                f"({record['correct']:g} of {record['total']:g})"
            )
        if "loss" not in record:
            return
        self._line(
            f"step {record['iteration']}: {record['split']} loss {record['loss']:.4f}"
            f"{_perplexity(record)}{_accuracy(record, ', accuracy')} "
            f"over {record['tokens']:,} tokens" + (f" ({apart})" if apart else "")
        )
        if self.bar is not None:
            self.bar.set_postfix_str(self.last)

    def note(self, text: str) -> None:
        """Show what is being done where no step is."""
        if self.bar is not None:
            self.bar.set_postfix_str(text)

    def message(self, text: str) -> None:
        """Show a line of its own."""
        self._line(text)

    def _line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=self.console)
        elif self.console is not None:
            print(text, file=self.console, flush=True)

    def close(self) -> None:
        """Leave the bar as the last step left it."""
        if self.bar is not None:
            self.bar.set_postfix_str(self.last, refresh=False)
            self.bar.close()
            self.bar = None


def _number(value: float | None, form: str) -> str:
    """A number, or a dash where there is none: a skipped step has no gradient norm."""
    return "-" if value is None else format(value, form)


def _perplexity(record: dict[str, Any]) -> str:
    """That of a cross-entropy; a draft's loss is none."""
    return f", perplexity {record['perplexity']:.3f}" if "perplexity" in record else ""


def _accuracy(record: dict[str, Any], title: str) -> str:
    """The share of trained tokens that the model gets right, where it is known."""
    share = record["token_accuracy"]
    return "" if not math.isfinite(share) else f"{title} {share:.3f}"


def _gradient(record: dict[str, Any]) -> str:
    if record.get("skipped"):
        return "skipped: gradients too large for fp16's loss scale"
    norm = record["grad_norm"]
    return "grad norm -" if norm is None else f"grad norm {norm:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
