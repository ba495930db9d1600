import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from post_training.arguments.completion import _check_wandb, complete_run, validate
from post_training.arguments.config_file import resolved_config
from post_training.errors import SetupError
from tests.helpers.launch import LIMIT

ROOT = Path(__file__).resolve().parents[3]
# What may change `args` outside of `post_training/arguments/`, and why.
EXCEPTIONS = {
    # Damage is met inside of `pretrain()`, which reads there which checkpoint to load instead.
    "post_training/checkpoint/resume.py: args.ckpt_step",
}
_CHANGING = ("append", "extend", "insert", "remove", "clear", "update", "pop", "setdefault", "sort")

CHECK = """
from post_training.errors import SetupError
from post_training.arguments.completion import _check_wandb
try:
    _check_wandb()
    print("good")
except SetupError as error:
    print(error)
"""


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="not installed"):
        _check_wandb()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "WANDB_API_KEY"),
        ({"WANDB_MODE": "offline"}, "good"),
        ({"WANDB_API_KEY": "0" * 40}, "good"),
    ],
)
def test_credentials_are_looked_for(tmp_path, variables, expected):
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), **variables}
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert expected in done.stdout


# --- what Megatron is told of a run ------------------------------------------------------------------


def completed(args, **found):
    nothing = {"load": None, "ckpt_step": None, "finetune": False, "by_modelopt": False}
    complete_run(args, **nothing | found)
    validate(args)
    return args


def test_what_megatron_is_told_is_not_in_config_yaml(parse):
    """Which says what was asked for: given again, it finds checkpoint, place and steps by itself."""
    args = parse("--save-retain-interval", "1000", "--num-epochs", "2", "--train-iters", "0")
    asked = resolved_config(args)
    completed(args, load="there", ckpt_step=5, begins_at=8, train_iters=12, evaluates=True)
    assert (args.load, args.ckpt_step, args.data_begins_at, args.train_iters) == ("there", 5, 8, 12)
    assert (args.retain_interval, args.save_retain_interval, args.eval_iters) == (1000, None, 1)
    assert (args.stop_at_nonfinite, args.check_for_nan_in_loss_and_grad) == (True, False)
    assert args.hang_timeout == 600 and args.distributed_timeout_minutes == 62
    assert asked["save_retain_interval"] == 1000 and asked["check_for_nan_in_loss_and_grad"]
    assert asked["distributed_timeout_minutes"] == 10 and not asked["train_iters"]
    for name in ("load", "ckpt_step", "eval_iters", "hang_timeout"):
        assert asked[name] is None, name


def test_asynchronous_saves_on_a_cpu_have_no_persistent_worker(parse):
    """Without which Megatron's validation would drop the flag."""
    args = completed(parse("--async-save"))
    assert args.async_save and not args.use_persistent_ckpt_worker


@pytest.mark.parametrize(("flags", "wrapped"), [([], True), (["--skip-train"], False)])
def test_mixed_precision_is_left_to_fsdp2_where_it_wraps(parse, flags, wrapped):
    args = completed(parse("--use-torch-fsdp2", "--bf16", *flags))
    assert args.fsdp_compute_dtype is (torch.bfloat16 if wrapped else None)
    assert args.params_dtype is (torch.float32 if wrapped else torch.bfloat16)


# --- and nothing changes after ----------------------------------------------------------------------


def changes_of_args(source: str) -> Iterator[tuple[int, str]]:
    """Where source code changes the run's arguments: the line, and what it writes to."""
    tree = ast.parse(source)
    names = {"args"} | {
        node.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.arg)
        and node.annotation
        and "Namespace" in ast.unparse(node.annotation)
    }

    def is_args(node: ast.expr) -> bool:
        if isinstance(node, ast.Call):
            return ast.unparse(node.func).rpartition(".")[2] == "get_args"
        if isinstance(node, ast.Attribute):
            return node.attr == "args"
        return isinstance(node, ast.Name) and node.id in names

    def is_inside(node: ast.expr) -> bool:
        """A value that belongs to the arguments, or all of them as a mapping."""
        if isinstance(node, ast.Call):
            return ast.unparse(node.func) == "vars" and bool(node.args) and is_args(node.args[0])
        return isinstance(node, ast.Attribute) and is_args(node.value)

    for node in ast.walk(tree):
        written = isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))
        if isinstance(node, ast.Attribute) and written and is_args(node.value):
            yield node.lineno, f"args.{node.attr}"
        elif isinstance(node, ast.Subscript) and written and is_inside(node.value):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in _CHANGING and is_inside(node.func.value):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            if is_args(node.args[0]):
                yield node.lineno, ast.unparse(node)


def test_args_change_in_one_room_only():
    product = [ROOT / "finetune.py", ROOT / "model_provider.py"]
    for folder in ("data", "post_training", "scripts", "benchmarks"):
        product += sorted((ROOT / folder).rglob("*.py"))
    found = {}
    for path in product:
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("post_training/arguments/"):
            for line, what in changes_of_args(path.read_text(encoding="utf-8")):
                found[f"{name}: {what}"] = line
    assert found.keys() == EXCEPTIONS, found


@pytest.mark.parametrize(
    "source",
    [
        "args.load = None",
        "a, self.args.load = 1, 2",
        "args.count += 1",
        "del args.load",
        "get_args().load = 1",
        "for args.step in range(3): pass",
        "def f(trial: argparse.Namespace): trial.load = 1",
        "setattr(args, name, 1)",
        "vars(args)['load'] = 1",
        "vars(self.args).update(load=1)",
        "args.derived.append('load')",
        "args.lists[0] = 1",
    ],
)
def test_every_way_to_change_args_is_seen(source):
    assert len(list(changes_of_args(source))) == 1
    assert not list(changes_of_args("args = parse()\nargs.load\nx.load = args.load\nargs.f(1)"))


@pytest.mark.parametrize(
    ("world", "flags", "file", "expected"),
    [
        (2, "", "", [True, True]),
        (1, "", "", [False, False]),
        (2, "--optimizer sgd", "", [True, False]),  # without the distributed optimizer
        (2, "--tensor-model-parallel-size 2", "", [False, False]),
        (2, "--use-torch-fsdp2", "", [False, False]),
        (2, "--eval-only", "", [False, False]),
        (2, "", "overlap_grad_reduce: false", [False, False]),
        (2, "", "overlap_param_gather: false", [True, False]),
    ],
)
def test_messages_overlap_on_gpus_with_data_parallelism(
    parse, tmp_path, monkeypatch, world, flags, file, expected
):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    (tmp_path / "run.yaml").write_text(f"seed: 1\n{file}\n")
    words = [*flags.split(), "--config", str(tmp_path / "run.yaml")]

    def overlap():
        args = parse(*words)
        return [args.overlap_grad_reduce, args.overlap_param_gather]

    assert overlap() == [False, False]
    monkeypatch.setenv("SFT_DEVICE", "cuda")
    assert overlap() == expected
