"""Files of ROLL and RLinf: each key changes what a run resolves to, is without effect, or is refused."""

import argparse
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from megatron.training.arguments import add_megatron_arguments

from post_training.arguments.config_file import apply_settings
from post_training.arguments.parser import add_finetune_arguments
from post_training.arguments.ranges import apply_ranges
from post_training.errors import SetupError
from post_training.recipes.aliases import Refused, Unused
from post_training.recipes.recipe import read_recipe
from post_training.recipes.rlinf import RLINF
from post_training.recipes.roll import ROLL

FOLDER = Path(__file__).parents[2] / "recipes/foreign"
FILES = {ROLL: FOLDER / "sft_config.yaml", RLINF: FOLDER / "custom_sft_vlm.yaml"}
MODEL, TRAINING, DATA = (f"sft_train.{name}_args" for name in ("model", "training", "data"))
STRATEGY = "sft_train.strategy_args.strategy_config"
FSDP, OPTIM = "actor.fsdp_config", "actor.optim"
# What a key is changed to, and before that what makes it count, where it does not in the file.
ROLL_WALK = {
    "exp_name=b": "track_with=wandb tracker_kwargs.project=p",
    "seed=8": "",
    "output_dir=b": "",
    "track_with=wandb": "tracker_kwargs.project=p",
    "tracker_kwargs.log_dir=b": "",
    "tracker_kwargs.project=b": "track_with=wandb tracker_kwargs.project=p",
    "tracker_kwargs.name=b": "track_with=wandb tracker_kwargs.project=p ~exp_name",
    "save_steps=5": "",
    "logging_steps=5": "",
    "eval_steps=-1": "",
    "max_ckpt_to_keep=0": "",
    "resume_from_checkpoint=runs/a/checkpoints/iter_0000012": "",
    "sequence_length=64": "",
    "max_grad_norm=0": "",
    "pretrain=b": "",
    "system_key=b": "",
    "prompt_key=b": "",
    "query_key=null": "",
    "response_key=b": "",
    "global_template=chatml": "",
    "validation.data_args.file_name=[b, c]": "",
    f"{MODEL}.dtype=bf16": "",
    f"{MODEL}.adapter_name_or_path=b": "",
    f"{MODEL}.lora_target=all-linear": "",
    f"{MODEL}.lora_rank=4": f"{MODEL}.lora_target=q_proj,v_proj",
    f"{MODEL}.lora_alpha=4": f"{MODEL}.lora_target=q_proj,v_proj",
    f"{MODEL}.lora_dropout=0.1": f"{MODEL}.lora_target=q_proj,v_proj",
    f"{MODEL}.disable_gradient_checkpointing=true": "",
    f"{MODEL}.moe_aux_loss_coef=0.1": "",
    f"{MODEL}.freeze_module_prefix=vision_model": "",
    f"{MODEL}.ulysses_size=2": f"{STRATEGY}.context_parallel_size=null",
    f"{TRAINING}.num_train_epochs=2.0": "",
    f"{TRAINING}.per_device_train_batch_size=3": "",
    f"{TRAINING}.gradient_accumulation_steps=3": "",
    f"{TRAINING}.learning_rate=1e-5": "",
    f"{TRAINING}.lr_scheduler_type=linear": "",
    f"{TRAINING}.warmup_steps=3": "",
    f"{TRAINING}.warmup_ratio=0.2": "",
    f"{TRAINING}.weight_decay=0": "",
    f"{TRAINING}.adam_beta1=0.8": "",
    f"{TRAINING}.adam_beta2=0.9": "",
    f"{TRAINING}.save_hf_model=true": "",
    f"{TRAINING}.bf16=true": "",
    f"{TRAINING}.fp16=true": "",
    f"{DATA}.file_name=b": "",
    f"{DATA}.template=qwen3": "",
    f"{DATA}.preprocessing_num_workers=2": "",
    f"{DATA}.messages=b": "",
    f"{DATA}.image_max_pixels=1000": "",
    f"{DATA}.image_min_pixels=1000": "",
    "sft_train.strategy_args.strategy_name=fsdp2_train": "",
    f"{STRATEGY}.tensor_model_parallel_size=1": "",
    f"{STRATEGY}.pipeline_model_parallel_size=1": "",
    f"{STRATEGY}.context_parallel_size=1": "",
    f"{STRATEGY}.expert_model_parallel_size=2": "",
    f"{STRATEGY}.sequence_parallel=false": "",
    f"{STRATEGY}.use_distributed_optimizer=false": "",
    f"{STRATEGY}.virtual_pipeline_model_parallel_size=2": "",
    f"{STRATEGY}.param_dtype=bf16": "",
    "sft_train.device_mapping=list(range(0,8))+[8,9,10,11,12,13,14,15]": "",
    "sft_train.infer_batch_size=2": "",
    "sft_train.backend_timeout=5": "",
}
RLINF_WALK = {
    "runner.max_epochs=9": "",
    "runner.max_steps=9": "runner.max_epochs=-1",
    "runner.val_check_interval=-1": "",
    "runner.save_interval=-1": "",
    "runner.output_dir=b": "~runner.logger.log_path runner.output_dir=a",
    "runner.experiment_name=b": "~runner.logger.experiment_name",
    "runner.logger.log_path=b": "",
    "runner.logger.experiment_name=b": "",
    "runner.logger.project_name=b": "runner.logger.logger_backends=[wandb]",
    "runner.logger.logger_backends=[tensorboard, wandb]": "",
    "runner.resume_dir=logs/a/checkpoints/global_step_100": "",
    "data.train_data_paths=null": "",
    "data.val_data_paths=[b, c]": "",
    "data.eval_data_paths=b": "~data.val_data_paths",
    "data.prompt_key=b": "",
    "data.choice_key=b": "",
    "data.answer_key=b": "",
    "data.image_keys=[a, b]": "",
    "data.max_prompt_length=64": "",
    "actor.training_backend=fsdp2": "~actor.training_backend",
    "actor.micro_batch_size=2": "",
    "actor.eval_batch_size=1": "",
    "actor.global_batch_size=4": "",
    "actor.seed=8": "",
    "actor.model.model_path=b": "",
    "actor.model.precision=bf16": f"~{FSDP}.mixed_precision",
    "actor.model.is_lora=true": "",
    "actor.model.lora_rank=4": "actor.model.is_lora=true",
    "actor.model.lora_path=b": "",
    "actor.model.trust_remote_code=true": "",
    "actor.tokenizer.tokenizer_model=b": "",
    "actor.tokenizer.trust_remote_code=true": "",
    f"{OPTIM}.lr=1e-5": "",
    f"{OPTIM}.min_lr=1e-6": "",
    f"{OPTIM}.adam_beta1=0.8": "",
    f"{OPTIM}.adam_beta2=0.9": "",
    f"{OPTIM}.adam_eps=1e-9": "",
    f"{OPTIM}.weight_decay=0": "",
    f"{OPTIM}.clip_grad=0": "",
    f"{OPTIM}.lr_scheduler=constant": "",
    f"{OPTIM}.total_training_steps=50": "",
    f"{OPTIM}.lr_warmup_steps=3": "",
    f"{OPTIM}.lr_warmup_steps_ratio=0.1": f"{OPTIM}.lr_warmup_steps=-1",
    f"{FSDP}.sharding_strategy=full_shard": "",
    f"{FSDP}.gradient_checkpointing=true": "",
    f"{FSDP}.mixed_precision.param_dtype=fp32": "",
    f"{FSDP}.amp_autocast.enabled=true": f"{FSDP}.mixed_precision.param_dtype=fp32",
    f"{FSDP}.amp_autocast.precision=fp16": f"{FSDP}.amp_autocast.enabled=true",
}
WALKS = {
    ROLL: ROLL_WALK,
    RLINF: {k: f"{OPTIM}.total_training_steps=70 {v}" for k, v in RLINF_WALK.items()},
}


@pytest.fixture(scope="module")
def parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    apply_ranges(add_finetune_arguments(parser))
    return parser


def changes_something(system, key):
    """Whether a rule can say a flag, for some value."""
    rule = system.rules[key]
    if isinstance(rule, (Unused, Refused)):
        return False
    return not isinstance(rule, dict) or any(
        isinstance(meaning, dict) and meaning for meaning in rule.values()
    )


@pytest.mark.parametrize("system", WALKS, ids=lambda system: system.name)
def test_changing_any_key_changes_what_a_run_resolves_to(parser, system):
    walked = set()

    @functools.cache
    def resolved(before):
        return apply_settings(parser, read_recipe(FILES[system], before.split()))

    for change, before in WALKS[system].items():
        changed = read_recipe(FILES[system], [*before.split(), change])
        assert apply_settings(parser, changed) != resolved(before), change
        walked.add(change.partition("=")[0])
    under = {key for key in walked if key not in system.rules}
    assert {key.rpartition(".")[0] for key in under} <= {
        key for key, rule in system.rules.items() if rule == "*"
    }
    mapped = {key for key in system.rules if changes_something(system, key)}
    without = {f"{STRATEGY}.fsdp_size", STRATEGY, f"{FSDP}.mixed_precision.buffer_dtype"}
    assert mapped - walked - without == set()


def test_the_table_of_the_page_has_what_is_mapped_or_refused():
    page = (FOLDER.parents[2] / "docs/recipes.md").read_text()
    for system in WALKS:
        for key, rule in system.rules.items():
            word = key.rpartition(".")[2]
            whole = {word, f"{word.partition('_')[0]}_*"}
            told = isinstance(rule, Unused) or word == "task_type" or any(w in page for w in whole)
            assert told, f"{system.name}: {key}"


def test_what_a_key_without_effect_says_changes_nothing_and_is_named():
    for file in FILES.values():
        whole = read_recipe(file, [], {"train_iters"})
        for key in whole.unused:
            rest = read_recipe(file, [f"~{key}"], {"train_iters"})
            assert rest.settings == whole.settings and key not in rest.unused, key
        assert len(whole.unused) > 9


REFUSED = [
    (ROLL, "sft_train.strategy_args.strategy_name=deepspeed_train", "FSDP2 shards .*fsdp2_train"),
    (ROLL, "sft_train.strategy_args.strategy_name=vllm", "is not one of megatron_train"),
    (ROLL, "sft_train.device_mapping=list(range(0,6))", "6 devices cannot be shared out .* of 8"),
    (ROLL, "sft_train.device_mapping=os.system('x')", "is no list of devices"),
    (ROLL, f"{TRAINING}.num_train_epochs=0.5", "whole passes"),
    (ROLL, f"{TRAINING}.gradient_accumulation_steps=many", "expects an integer, found 'many'"),
    (ROLL, f"{TRAINING}.learning_rat=1", r"did you mean sft_train.training_args.learning_rate\?"),
    (ROLL, "sft_train.model_args.ulysses_size=0", "cannot be shared out to parallel groups of 0"),
    (ROLL, "sft_train.model_args.lora_target=[q]", "lora_target: is of another type"),
    (ROLL, "zzz=1", "zzz 1: has no meaning here; leave it out"),
    (ROLL, "track_with=swanlab", "TensorBoard, metrics.jsonl and wandb"),
    (ROLL, "track_with=wandb", "name tracker_kwargs.project"),
    (ROLL, f"{DATA}.domain_interleave_probs={{a: 1}}", "PATH=WEIGHT"),
    (ROLL, f"{STRATEGY}.offload_policy=true", "weights stay"),
    (ROLL, f"{STRATEGY}.fsdp_size=4", "spread over all"),
    (RLINF, "", "max_epochs 4: .* give --num-epochs 4 or --train-iters 4"),
    (RLINF, "runner.max_steps=9", "and max_steps 9: give --num-epochs 4 or --train-iters 9"),
    (RLINF, "runner.max_epochs=.inf", "max_epochs: expects an integer, found inf"),
    (RLINF, "runner.logger.logger_backends=3", "logger_backends 3: is of another type"),
    (RLINF, "runner.task_type=embodied", "task_type embodied: is not one of sft"),
    (RLINF, "actor.training_backend=megatron", "use fsdp"),
    (RLINF, f"{FSDP}.sharding_strategy=hybrid_shard", "use full_shard or no_shard"),
    (RLINF, f"{FSDP}.mixed_precision.buffer_dtype=int8", "is not one of bf16, fp16, fp32"),
    (RLINF, f"{FSDP}.cpu_offload=true", "weights stay"),
    (RLINF, "actor.model.precision=fp8", "is not one of bf16"),
    (RLINF, "data.use_chat_template=false", "rows are rendered by a chat template"),
    (
        RLINF,
        "data={a: 1, b: 1, c: 1, d: 1, e: 1, num_worker: 1}",
        "a 1: has no meaning.*and 1 more",
    ),
    (RLINF, "data.prompt_kye=q", r"did you mean data.prompt_key\?"),
    (RLINF, f"{OPTIM}.total_training_steps=${{runner.max_epoch}}", "max_epoch"),
]


@pytest.mark.parametrize(("system", "change", "told"), REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(system, change, told):
    with pytest.raises(SetupError, match=told) as caught:
        read_recipe(FILES[system], [change] if change else [])
    assert str(FILES[system]) in str(caught.value)


def test_a_mistake_in_a_value_names_the_foreign_key(parser):
    for value, told in (("high", "expects a number, found 'h"), (".nan", "nan is out of range")):
        recipe = read_recipe(FILES[ROLL], [f"{TRAINING}.learning_rate={value}"])
        with pytest.raises(SetupError, match=rf"training_args\.learning_rate: {told}"):
            apply_settings(parser, recipe)


def test_a_global_batch_does_not_depend_on_the_processes_of_the_job(monkeypatch):
    for world in ("1", "2", "16"):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert read_recipe(FILES[ROLL]).settings["global_batch_size"] == 2
        alone = read_recipe(FILES[ROLL], ["sft_train.device_mapping=null", f"~{STRATEGY}"])
        assert alone.settings["global_batch_size"] == 2 * int(world)


def test_a_flag_names_the_key_that_counts():
    recipe = read_recipe(FILES[RLINF], [], {"train_iters"})
    assert recipe.settings["bf16"] and recipe.where("bf16").endswith("mixed_precision.param_dtype")
    recipe = read_recipe(FILES[ROLL], [f"{STRATEGY}.param_dtype=bf16"])
    assert recipe.settings["bf16"] and recipe.where("bf16").endswith("param_dtype")


def test_epochs_or_steps_is_answered_on_the_command_line():
    for given in ("train_iters", "num_epochs"):
        settings = read_recipe(FILES[RLINF], [], {given}).settings
        assert not {"train_iters", "num_epochs", "lr_decay_iters"} & settings.keys()
    steps = read_recipe(FILES[RLINF], ["runner.max_epochs=-1", "runner.max_steps=6"]).settings
    assert steps["train_iters"] == 6 and "lr_decay_iters" not in steps
    both_off = read_recipe(FILES[RLINF], ["runner.max_epochs=-1"]).settings
    assert both_off["num_epochs"] == 1  # as RLinf has it
    evaluation = read_recipe(FILES[RLINF], ["data.train_data_paths=null"]).settings
    assert evaluation["eval_only"] and "num_epochs" not in evaluation


def test_the_translated_recipe_says_the_same(tmp_path):
    root = Path(__file__).parents[3]
    words = [str(FILES[ROLL]), "sft_train.training_args.learning_rate=1e-5"]
    command = [sys.executable, "scripts/translate_config.py", *words]
    env = {**os.environ, "PYTHONPATH": str(root)}
    printed = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True)
    (tmp_path / "flat.yaml").write_text(printed.stdout)
    assert (
        read_recipe(tmp_path / "flat.yaml").settings == read_recipe(FILES[ROLL], words[1:]).settings
    )
    assert "lr: 1e-5  # sft_train.training_args.learning_rate\n" in printed.stdout
    assert "#   hydra: it is of Hydra's process" in printed.stdout
    assert yaml.safe_load(printed.stdout)["hf_model"] == "./model"
