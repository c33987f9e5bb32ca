"""The arguments that users of transformers know: those of TrainingArguments, run_clm and run_clm_no_trainer.

    same       a setting has this name; SAME says where it differs a little
    alias      a different name for a setting
    no effect  accepted; a line says why it has no effect here
    refused    a sentence says what to give instead

README.md beside this file lists them all; page.py writes it.
"""

from typing import Any

TRUE = ("true", "yes", "y", "t", "1")

SAME = {
    "model_name_or_path": "",
    "config_name": "without model_name_or_path: the weights are drawn at random",
    "model_type": "",
    "config_overrides": "also with config_name",
    "model_revision": "of the model and its tokenizer; default: the main branch",
    "tokenizer_name": "",
    "trust_remote_code": "",
    "cache_dir": "",
    "dataset_name": "WikiText is Salesforce/wikitext on the hub today; several data sets: a mixture",
    "dataset_config_name": "",
    "train_file": "also jsonl, parquet, .gz, folders, patterns; several files: a mixture",
    "validation_file": "likewise; several files: several validation sets",
    "validation_split_percentage": "holds out the last rows; run_clm holds out the first",
    "max_train_samples": "blocks",
    "max_eval_samples": "blocks",
    "streaming": "needs max_train_steps and validation data",
    "block_size": "default 128; run_clm takes the model's positions, at most 1,024. More than these is an error",
    "preprocessing_num_workers": "threads; the blocks do not depend on it",
    "output_dir": "a folder with a run in it is refused, unless you resume or overwrite the run",
    "overwrite_output_dir": "",
    "per_device_train_batch_size": "",
    "per_device_eval_batch_size": "",
    "gradient_accumulation_steps": "",
    "learning_rate": "",
    "weight_decay": "",
    "adam_beta1": "",
    "adam_beta2": "",
    "adam_epsilon": "",
    "max_grad_norm": "",
    "num_train_epochs": "",
    "max_train_steps": "",
    "lr_scheduler_type": "--help lists them",
    "lr_scheduler_kwargs": "--help lists what each schedule takes",
    "num_warmup_steps": "below 1 it is a share of all steps",
    "label_smoothing_factor": "in training only: the validation loss is a plain cross entropy",
    "seed": "",
    "gradient_checkpointing": "with dropout too the losses stay the same",
    "tf32": "",
    "logging_steps": "a whole number of steps, no share",
    "logging_first_step": "",
    "report_to": "",
    "run_name": "",
    "eval_steps": "a whole number of steps, no share; without it once an epoch",
    "eval_delay": "",
    "checkpointing_steps": "default: epoch",
    "load_best_model_at_end": "best is the lowest validation loss",
    "resume_from_checkpoint": "a checkpoint's folder, or auto; true means auto",
    "push_to_hub": "",
    "hub_model_id": "",
    "hub_private_repo": "",
    "hub_strategy": "end (the default) or every_save",
    "ddp_timeout": "default 600 seconds",
}

# alias: (setting, remark)
ALIASES = {
    "max_steps": ("max_train_steps", "-1 is none"),
    "warmup_steps": ("num_warmup_steps", "below 1 it is a share of all steps, there too"),
    "warmup_ratio": ("num_warmup_steps", "which takes a share as well, as warmup_steps of transformers does"),
    "save_steps": ("checkpointing_steps", ""),
    "save_strategy": ("checkpointing_steps", "steps: every save_steps or 500; epoch; no: none"),
    "save_total_limit": ("checkpoints_total_limit", "the best one is kept beside them; 0 keeps all"),
    "eval_strategy": ("eval_steps", "steps: every eval_steps, or logging_steps; epoch: once an epoch"),
    "evaluation_strategy": ("eval_steps", "the older name of eval_strategy"),
    "do_train": ("eval_only", "its opposite: with it do_eval has no effect. A run trains anyway"),
    "do_eval": ("eval_only", "without do_train: evaluate and stop"),
    "with_tracking": ("report_to", "all, where report_to is not given"),
    "activation_checkpointing": ("gradient_checkpointing", "its newer name"),
    "full_determinism": ("deterministic", ""),
    "auto_find_batch_size": (
        "auto_micro_batch",
        "accumulation rises as the micro-batch falls; without dropout the same losses",
    ),
}

LOADER = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "multiprocessing_context", "in_order")
NO_EFFECT = {
    "overwrite_cache": "cached tokens are found by the data's content, so changed data is tokenised again",
    "low_cpu_mem_usage": "transformers always loads models this way now",
    "ignore_data_skip": "a resume skips no data: it starts at the right block",
    "prediction_loss_only": "evaluation keeps sums only",
    "eval_on_start": "the model is evaluated before the first step anyway",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "log_level": "the console is plain; metrics.jsonl is the record",
    "log_level_replica": "only the main process prints",
    "log_on_each_node": "only the main process prints",
    "disable_tqdm": "progress bars appear only in a terminal",
    "remove_unused_columns": "only the columns of the rows are read",
    "include_num_input_tokens_seen": "tokens_seen is in metrics.jsonl anyway",
    "include_tokens_per_second": "tokens_per_second is in metrics.jsonl anyway",
    "save_safetensors": "checkpoints are always safetensors",
    "skip_memory_metrics": "peak memory is always in all_results.json",
    "length_column_name": "all blocks have the same length: rows are joined and cut, or padded",
    "ddp_bucket_cap_mb": "torch's default is used",
    **dict.fromkeys(
        ("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"), "evaluation keeps sums only"
    ),
    **{
        f"dataloader_{name}": "there is no DataLoader: blocks come from prepared tokens, or from a stream's buffer"
        for name in LOADER
    },
}


def _launch(flag: str) -> str:
    return f"give it to the launcher: accelerate launch {flag} train_loop/main.py ..."


HALF = "weights are trained in float32; for lower precision in the passes: accelerate launch --mixed_precision bf16"
COMPILE = _launch("--dynamo_backend inductor")
SHARDING = _launch("--config_file launch_configs/fsdp.yaml")
DDP = "Accelerate sets up DDP; to change it, edit train_loop/machine/launch.py"
METRIC = "a metric is code: edit `plain` in train_loop/loss.py"
RECOMPUTED = "gradient_checkpointing always uses use_reentrant=False and restores dropout's masks"
Instead = tuple[str, str]  # (name, what to do instead)
# name: (what to do instead, values that are accepted because they ask for what is done anyway)
REFUSED = {
    "bf16": (_launch("--mixed_precision bf16"), "false"),
    "fp16": (_launch("--mixed_precision fp16"), "false"),
    "bf16_full_eval": ("evaluation uses the launcher's precision, and sums in float32", "false"),
    "fp16_full_eval": ("evaluation uses the launcher's precision, and sums in float32", "false"),
    "dtype": (HALF, "float32"),
    "torch_dtype": (HALF, "float32"),
    "use_cpu": (_launch("--config_file launch_configs/cpu.yaml"), "false"),
    "no_cuda": (_launch("--config_file launch_configs/cpu.yaml"), "false"),
    "torch_compile": (COMPILE, "false"),
    "torch_compile_backend": (COMPILE, ""),
    "torch_compile_mode": (_launch("--dynamo_backend inductor --dynamo_mode MODE"), ""),
    "fsdp": (SHARDING, ""),
    "fsdp_config": (SHARDING, ""),
    "deepspeed": (
        "DeepSpeed is not supported; FSDP is: accelerate launch --config_file launch_configs/fsdp.yaml ...",
        "",
    ),
    "local_rank": (_launch("--num_processes N"), "-1"),
    "ddp_backend": (DDP, ""),
    "ddp_find_unused_parameters": (DDP, "false"),
    "ddp_broadcast_buffers": (DDP, ""),
    "ddp_static_graph": (DDP, "false"),
    "accelerator_config": (_launch("--config_file FILE"), ""),
    "parallelism_config": (SHARDING, ""),
    "use_cache": ("keys and values are cached only in generation, as the model's config says", "false"),
    "use_liger_kernel": ("the loss already works without full logits", "false"),
    "liger_kernel_config": ("the loss already works without full logits", ""),
    "optim": ("give --optimizer adamw or muon; any other: train_loop/optim.py", "adamw_torch,adamw_torch_fused"),
    "optim_args": ("to change the optimizer, edit train_loop/optim.py", ""),
    "optim_target_modules": ("to change the optimizer, edit train_loop/optim.py", ""),
    "neftune_noise_alpha": ("for noise on embeddings, edit train_loop/model.py", ""),
    "average_tokens_across_devices": ("the loss is always the mean over the tokens of all processes", "true"),
    "torch_empty_cache_steps": ("to add it, edit train_loop/loop.py", ""),
    "logging_strategy": ("the loss is logged every logging_steps steps: give --logging_steps N", "steps"),
    "logging_dir": ("TensorBoard's files are in output_dir/tensorboard", ""),
    "project": ("for wandb set the environment variable WANDB_PROJECT", "huggingface"),
    "include_for_metrics": (METRIC, ""),
    "include_inputs_for_metrics": (METRIC, "false"),
    "batch_eval_metrics": (METRIC, "false"),
    "label_names": ("labels come from the tokens: `inputs_and_labels` in train_loop/data/blocks.py", ""),
    "metric_for_best_model": ("the best model is that of the lowest validation loss", "loss,eval_loss"),
    "greater_is_better": ("the best model is that of the lowest validation loss", "false"),
    "save_only_model": ("a checkpoint always holds what a resume needs; the model is exported at the end", "false"),
    "save_on_each_node": ("checkpoints are written once: all machines must see output_dir", "false"),
    "enable_jit_checkpoint": ("SIGTERM saves a checkpoint anyway", "false"),
    "hub_always_push": ("while a push is running, the next one is skipped; the last one is not", "false"),
    "hub_revision": ("pushes go to the main branch", "main"),
    "restore_callback_states_from_checkpoint": ("there are no callbacks", "false"),
    "data_seed": ("seed also determines the order of blocks: give --seed", ""),
    "dataloader_drop_last": ("a short last batch is trained too; each of its targets counts like any other", "false"),
    "train_sampling_strategy": ("to change the order of blocks, edit train_loop/data/blocks.py", "random"),
    "group_by_length": ("all blocks have the same length: rows are joined and cut, or padded", "false"),
    "debug": ("--traceback shows where an error comes from", ""),
    "do_predict": ("to generate text: python -m train_loop.generate FOLDER PROMPT", "false"),
    "keep_linebreaks": ("line breaks are part of the text and are kept", "true"),
    "no_keep_linebreaks": ("line breaks are part of the text and are kept", "false"),
    "use_fast_tokenizer": ("only fast tokenizers work here", "true"),
    "no_use_fast_tokenizer": ("only fast tokenizers work here", "false"),
    "use_slow_tokenizer": ("only fast tokenizers work here", "false"),
    **dict.fromkeys(
        ("token", "hub_token", "use_auth_token"),
        ("set the environment variable HF_TOKEN, or log in: hf auth login", ""),
    ),
    **dict.fromkeys(("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"), (RECOMPUTED, "")),
    **dict.fromkeys(
        ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        ("trackers use their defaults; to change that, edit train_loop/report/trackers.py", ""),
    ),
}


def is_habit(name: str) -> bool:
    return name in ALIASES or name in NO_EFFECT or name in REFUSED


def translate(entries: dict[str, Any], remarks: list[str]) -> tuple[dict[str, Any], dict[str, str], list[Instead]]:
    """(settings, written, refused) of `entries`, {name: value as it was written}. settings: the same with the settings'
    names instead of aliases. written: {setting: the alias that was written}. refused: [(name, what to do instead)].
    Arguments without effect go to `remarks`."""
    problems = []
    settings = {name: value for name, value in entries.items() if not is_habit(name)}
    if str(settings.get("resume_from_checkpoint")).lower() == "true":
        settings["resume_from_checkpoint"] = "auto"
    for name in entries:
        if name in NO_EFFECT:
            remarks.append(f"{name} has no effect: {NO_EFFECT[name]}")
        elif name in REFUSED and entries[name] is not None and _text(entries[name]) not in REFUSED[name][1].split(","):
            problems.append((name, REFUSED[name][0]))
    found: dict[str, Any] = {}
    written: dict[str, str] = {}
    for name in [name for name in entries if name in ALIASES]:
        target, value = _meaning(name, entries[name], entries, problems)
        if target is None:
            continue
        is_unset = target == "eval_steps" or (name == "warmup_ratio" and _number(settings.get(target)) == 0)
        if target in entries and not is_unset and settings[target] != value:
            problems.append((name, f"{target} is given too: give one of them"))
        elif target == "num_warmup_steps" and found.get(target, value) != value:
            problems.append((name, f"{written[target]} is given too: give one of them"))
        found[target], written[target] = value, name
    return settings | found, written, problems


def remarks_on_defaults(values: dict[str, Any]) -> list[str]:
    """What users of transformers may not expect, given the settings `values`, {name: value}."""
    found = []
    if "block_size" not in values:
        found.append("the default of block_size is 128; run_clm takes the model's positions, at most 1,024")
    if values.get("train_file") and not values.get("validation_file") and not values.get("streaming"):
        found.append("without a validation_file the last rows are held out; run_clm holds out the first")
    return found


def _meaning(name: str, value: Any, entries: dict[str, Any], problems: list[Instead]) -> tuple[str | None, Any]:
    """(setting, value) that an alias stands for; (None, None) if it sets nothing."""
    text, number, target = _text(value), _number(value), ALIASES[name][0]
    if name == "max_steps":
        return target, None if number is not None and number <= 0 else value
    if name == "save_total_limit":
        return target, None if number is not None and number <= 0 else value
    # 0 is the default of both in transformers: it does not stand against the other one
    others = {"warmup_ratio": ("num_warmup_steps", "warmup_steps"), "warmup_steps": ("warmup_ratio",)}.get(name, ())
    if number == 0 and any(_number(entries.get(other)) for other in others):
        return None, None
    if name == "warmup_ratio" and number is not None and number >= 1:
        problems.append((name, f"{text} is not a share below 1; in steps: num_warmup_steps"))
        return None, None
    if name == "save_steps" and "save_strategy" in entries:
        return None, None
    if name in ("save_strategy", "eval_strategy", "evaluation_strategy"):
        if text == "epoch":
            return target, "epoch" if name == "save_strategy" else None
        if text == "steps":
            every = entries.get("logging_steps", 500) if name != "save_strategy" else 500
            return target, entries.get("save_steps" if name == "save_strategy" else "eval_steps", every)
        if text == "no" and name == "save_strategy":
            return target, "none"
        wanted = {
            "best": "give --load_best_model_at_end, which keeps the best model's checkpoint",
            "no": "the model is evaluated before the first step, once an epoch and at the end; --eval_steps N with N "
            "above the number of steps leaves the first and the last",
        }
        problems.append((name, wanted.get(text, "must be steps, epoch or no")))
        return None, None
    if name in ("do_train", "do_eval"):
        only_evaluates = name == "do_eval" and text in TRUE and _text(entries.get("do_train", "false")) not in TRUE
        return (target, "true") if only_evaluates else (None, None)
    if name == "with_tracking":
        return (target, "all") if text in TRUE and "report_to" not in entries else (None, None)
    return target, value


def _text(value: object) -> str:
    return str(value).strip().lower()


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
