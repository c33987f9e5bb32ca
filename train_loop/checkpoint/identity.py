"""What determines the weights of a run, and whether a checkpoint belongs to it."""

import dataclasses
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from train_loop.checkpoint.sharded import digest_of_frozen
from train_loop.data import Split, TrainingData
from train_loop.settings import Settings

FORMAT = 2  # of state.json and of the names of tensors; one more with each change that an older reader does not know

# what may differ from a checkpoint with --resume_with_changes; the rest of an identity may not
CHANGEABLE = {
    "num_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "num_warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "mixed_precision",
    "tf32",
    "training files' times of change",
    "optimizer",
    "optimizer's options",
}
FIXED = {"seed", "lora_r", "lora_alpha", "lora_target_modules", "lora_dropout"}  # settings that may not
# what determines which model is exported, where that need not be the last one
SELECTING = {"load_best_model_at_end", "early_stopping_patience", "early_stopping_threshold"}
CHANGEABLE |= SELECTING | {"eval_delay", "eval_steps", "eval_stride", "validation blocks"}
# a resumed run is equal bit for bit only if these are the same: a difference is reported, never refused
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")
CODE = (
    "loss.py",
    "cross_entropy.py",
    "head.py",
    "lean.py",
    "model.py",
    "lora.py",
    "optim.py",
    "loop.py",
    "data/blocks.py",
    "data/mixture.py",
)  # of the package
CODE_OF = "code of "


def same_bits(settings: Settings) -> dict:
    """By name, what determines the last bits of a result: threads, tuning, versions, and the code of the step."""
    folder = Path(__file__).parent.parent
    code = {name: folder / name for name in CODE}
    return {
        "CPU threads of a process": torch.get_num_threads(),
        "tuning": settings.tuning,
        **{f"version of {package}": version(package) for package in PACKAGES},
        **{f"{CODE_OF}{name}": hashlib.blake2b(path.read_bytes()).hexdigest()[:12] for name, path in code.items()},
    }


def optimizer_identity(optimizer: torch.optim.Optimizer) -> dict:
    """The class of an optimizer and the options of its groups: the state of a different class means different
    things."""
    options = sorted({name for group in optimizer.param_groups for name in group} - {"params", "initial_lr"})
    kind = type(optimizer)
    return {"optimizer": f"{kind.__module__}.{kind.__qualname__}", "optimizer's options": ", ".join(options)}


def run_identity(
    settings: Settings,
    model: PreTrainedModel,
    split: TrainingData,
    eval_split: Split,
    num_steps: int,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
) -> dict:
    """What determines the weights of a run, by name: a checkpoint can be resumed only with the same values. Paths and
    names do not count; the blocks themselves and the model's config do. `optimizer` is not prepared yet. A
    difference in "same bits" is reported and not refused."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    values = {name: getattr(settings, name) for name in sorted((CHANGEABLE | FIXED) & set(vars(settings)))}
    # of the main process: it alone may have read the weights, where FSDP sends the others their shares
    if frozen := broadcast_object_list([digest_of_frozen(model)])[0]:
        values["frozen weights"] = frozen
    if settings.load_best_model_at_end or settings.early_stopping_patience:
        values["validation blocks"] = eval_split.digest()
    else:  # evaluations decide about nothing
        del values["eval_delay"], values["eval_steps"], values["eval_stride"]
    return {
        **values,
        **split.identity(),
        "documents are kept apart": split.documents_apart or None,  # None: as in checkpoints that have no word of it
        "model config": hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:32],
        "blocks in an optimizer step": settings.blocks_per_step(accelerator.num_processes),
        "num_steps": num_steps,
        "mixed_precision": accelerator.mixed_precision,
        **optimizer_identity(optimizer),
        "same bits": same_bits(settings),
    }


def differences(
    state: dict[str, Any], new: dict[str, Any], settings: Settings
) -> tuple[list[str], list[str], list[str], list[str], list[str]]:
    """(fixed, changed, code, bits, others): the differences between a checkpoint's `state` and a run that would resume
    from it, a clause each. fixed: they make it a different run. changed: they change the result, and may be wanted.
    code: the files of the step that changed. bits: they may change the last bits. others: settings without effect on
    the result."""
    old, old_settings = (_with_one_warmup(state[key]) for key in ("identity", "settings"))
    old_bits, new_bits = old.get("same bits", {}), new.get("same bits", {})
    other_bits = [name for name in {**old_bits, **new_bits} if old_bits.get(name) != new_bits.get(name)]
    code = [name.removeprefix(CODE_OF) for name in other_bits if name.startswith(CODE_OF)]
    bits = [f"{n}: {old_bits.get(n)} -> {new_bits.get(n)}" for n in other_bits if not n.startswith(CODE_OF)]
    # a setting that is newer than the checkpoint had its default
    old = {name: old.get(name, getattr(type(settings), name, None)) for name in new if name != "same bits"}
    clauses = {name: f"{name}: {old[name]} -> {new[name]}" for name in old if old[name] != new[name]}
    values = dataclasses.asdict(settings)
    others = [
        f"{name}: {value} -> {values.get(name)}"
        for name, value in old_settings.items()
        if values.get(name) != value and name not in clauses | new_bits and not name.startswith("resume_")
    ]
    fixed = [clause for name, clause in clauses.items() if name not in CHANGEABLE]
    return fixed, [clause for name, clause in clauses.items() if name in CHANGEABLE], code, bits, others


def _with_one_warmup(values: dict[str, Any]) -> dict[str, Any]:
    """The same with `num_warmup_steps` alone. Older checkpoints have a share of the steps, `warmup_ratio`, as well."""
    share = values.get("warmup_ratio")
    values = {name: value for name, value in values.items() if name != "warmup_ratio"}
    return values | {"num_warmup_steps": share} if share else values


def refusal(state: dict[str, Any], identity: dict[str, Any], settings: Settings) -> str | None:
    """Why a run must not resume from a checkpoint with this `state`, as a clause that follows the checkpoint's name;
    None if it may. A run that is refused would continue in a different way than the interrupted one."""
    if state.get("format") != FORMAT:
        return (
            f"is a checkpoint of format {state.get('format', 1)}, and this version of train_loop reads format {FORMAT}"
            f": resume it with the version that wrote it ({state.get('train_loop', 'an older one')})"
        )
    step, (fixed, changed, *_) = state["position"]["step"], differences(state, identity, settings)
    if fixed:
        return f"belongs to a different run (checkpoint -> now): {'; '.join(fixed)}"
    if changed and not settings.resume_with_changes:
        return (
            f"has different settings that change the result (checkpoint -> now): {'; '.join(changed)}. To resume with "
            "the new ones, give --resume_with_changes"
        )
    if identity["num_steps"] < step:
        return f"is of step {step}, but this run ends at step {identity['num_steps']}"
    return None


def remarks(state: dict[str, Any], identity: dict[str, Any], settings: Settings) -> list[str]:
    """The differences from the run that made a checkpoint which are no reason to refuse it, a sentence each."""
    _, changed, code, bits, others = differences(state, identity, settings)
    found = {
        "settings differ from the checkpoint's, and the new ones are used": "; ".join(changed + others),
        "the code changed since the checkpoint, and the new code runs from here on": ", ".join(code),
        "the result may differ in its last bits from that of a run that was not interrupted": "; ".join(bits),
    }
    return [f"{what}: {names}" for what, names in found.items() if names]
