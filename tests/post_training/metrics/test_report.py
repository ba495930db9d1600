import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from post_training.metrics.report import MOST_POINTS, draw, drawings, write_report

HOSTILE = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Tags that are open at the end, or closed without having been open; and what is loaded."""

    def __init__(self, text):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def step(number, **more):
    usual = {"lm_loss": 9.0 / number, "lr": 1e-5, "grad_norm": 1.0, "tokens_per_s": 500.0}
    return {"iteration": number, **usual, **more}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text(
        f"derived_flags: [seed]\nhf_model: {json.dumps(HOSTILE)}\ntrain_iters: 30\nseed: 7\n"
        "tensor_model_parallel_size: 4\n"
    )
    records: list[dict[str, Any]] = [step(n, expert_imbalance=1.5) for n in range(1, 31)]
    records.insert(
        20, {"iteration": 20, "split": "valid", "loss": 3.21, "perplexity": 24.8, "tokens": 9}
    )
    records.insert(10, step(10, grad_norm=None))
    lines = [json.dumps(r) for r in records] + ['{"iteration": 31, "lm_lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    start = {"processes": 8, "tensor": 4, "host": "node3", "command": "finetune.py", "versions": {}}
    starts = [start | {"iteration": n, "versions": {"torch": "2.14.1"}} for n in (0, 15)]
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(s) + "\n" for s in starts))
    (tmp_path / "data.txt").write_text("train: 12 documents & more\n")
    answers = [{"question": HOSTILE, "answer": "4", "correct": True}]
    (tmp_path / "after.json").write_text(
        json.dumps({"model": "m", "correct": 1, "rows": 1, "answers": answers})
    )
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "answers").mkdir()
    for name in ("valid-9", "valid-20", "test-30"):
        own = {"correct": 0, "rows": 1, "answers": [{"answer": f"of {name}"}]}
        (tmp_path / "answers" / f"{name}.json").write_text(json.dumps(own))
    (tmp_path / "quantisation.json").write_text('{"quantised": 1.625}')
    return tmp_path


def test_a_page_holds_everything_and_loads_nothing(run):
    write_report(run, run / "report.html")
    text = (run / "report.html").read_text()
    page = Page(text)
    assert "1.625" in text
    assert page.loads == [] and "script" not in page.tags and page.open == []
    assert "url(" not in text and "@import" not in text
    assert text.count("&lt;script&gt;") == 4, "the model's name three times, the question once"
    for told in (
        "Loss per trained token",
        "Learning rate",
        "Gradient norm",
        "Tokens a second",
        "Expert imbalance",
        "<td>20</td><td>valid</td><td>3.21</td>",
        "train: 12 documents &amp; more",
        "node3",
        "torch 2.14.1",
        "Answers: after.json",
        "<p>m: 1 of 1 right",
        "<p>0 of 1 right",
        "of valid-20",
        "of test-30",
        "all 4 values",
    ):
        assert told in text, told
    assert "valid-9" not in text
    assert page.tags.count("svg") == 5 and text.count('class="restart"') == 5


def test_a_page_of_a_run_that_has_done_nothing(tmp_path):
    write_report(tmp_path, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert "svg" not in page.tags and "h1" in page.tags


def test_a_page_of_values_of_other_types(run):
    other = {"total_trained_tokens": HOSTILE, "tokens_per_s": [1], "lm_loss": {}, "iteration": 31}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"\n{json.dumps(other)}\n")
    with (run / "starts.jsonl").open("a") as file:
        file.write('{"iteration": 9, "versions": "x"}\n')
    write_report(run, run / "page.html")
    assert "script" not in Page((run / "page.html").read_text()).tags


@pytest.mark.parametrize("quantised", ["", "[1]", '{"before": 1.'])
def test_no_file_of_a_run_keeps_the_page_from_being_written(tmp_path, quantised):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step(1)) + "\n")
    (tmp_path / "quantisation.json").write_text(quantised)
    start = {"iteration": 0, "command": "finetune.py --output-dir r\udcff"}  # as a shell gives it
    (tmp_path / "starts.jsonl").write_text(json.dumps(start) + "\n")
    write_report(tmp_path, tmp_path / "page.html")
    assert "--output-dir r\\udcff" in (tmp_path / "page.html").read_text()


def test_places_of_points():
    drawing: Any = draw("x", {"a": [(0, 1.0), (10, 3.0)]}, [5])
    assert drawing.lines[0].path == "M58.0,216.0 L628.0,10.0" and drawing.restarts == [343.0]
    assert [label for _, label in drawing.across] == ["0", "2", "4", "6", "8", "10"]
    assert [label for _, label in drawing.upwards] == ["1", "1.5", "2", "2.5", "3"]


@pytest.mark.parametrize("points", [[(3, 2.0)], [(0, 5.0), (9, 5.0)], [(0, 0.0), (1, 0.0)]])
def test_flat_and_lone_points_are_drawn(points):
    drawing: Any = draw("x", {"a": points}, [])
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d", drawing.lines[0].path)]
    assert numbers and all(0 <= n <= 640 and math.isfinite(n) for n in numbers)
    assert drawing.upwards


def test_thinning_loses_no_spike():
    points: list[tuple[float, float]] = [(n, 1.0) for n in range(100_000)]
    points[77_777] = (77_777, 50.0)
    drawing: Any = draw("x", {"a": points}, [])
    (line,) = drawing.lines
    assert line.path.count(",") <= MOST_POINTS and ",10.0" in line.path


def test_what_is_no_number_is_left_out():
    assert drawings([{"iteration": 1, "lm_loss": None, "lr": "x"}], []) == []
