"""What decides about the weights of a run, and whether a checkpoint belongs to it."""

import dataclasses
import hashlib
import json

# what may differ from a checkpoint when the user asks for it; the rest of an identity may not
CHANGEABLE = {
    "num_steps",
    "learning_rate",
    "lr_scheduler_type",
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
}
# what decides about the model that is exported, where it need not be the last of all steps
SELECTING = {"load_best_model_at_end", "early_stopping_patience", "early_stopping_threshold"}
CHANGEABLE |= SELECTING | {"eval_steps", "eval_stride", "validation blocks"}


def run_identity(settings, model, split, eval_split, num_steps, accelerator):
    """What decides about the weights of a run, by name: a checkpoint goes on only under the same. Paths and names do
    not: the blocks themselves and the model's config do."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    values = {name: getattr(settings, name) for name in sorted((CHANGEABLE | {"seed"}) & set(vars(settings)))}
    if settings.load_best_model_at_end or settings.early_stopping_patience:
        values["validation blocks"] = eval_split.digest()
    else:  # evaluations decide about nothing
        del values["eval_steps"], values["eval_stride"]
    return {
        **values,
        **split.identity(),
        "documents end with token": split.document_end,
        "model config": hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:32],
        "blocks in an optimizer step": settings.blocks_per_step(accelerator.num_processes),
        "num_steps": num_steps,
        "mixed_precision": accelerator.mixed_precision,
    }


def differences(state, new, settings):
    """(fixed, changed, others) between a checkpoint's `state` and a run that would go on from it, a clause each: what
    makes it another run, what changes its result and may be wanted, and settings that decide about nothing."""
    old = state["identity"]
    # a setting that is newer than the checkpoint had its default
    old = {name: old.get(name, getattr(type(settings), name, None)) for name in new}
    clauses = {name: f"{name}: {old[name]} -> {new[name]}" for name in new if old[name] != new[name]}
    values = dataclasses.asdict(settings)
    others = [
        f"{name}: {value} -> {values.get(name)}"
        for name, value in state["settings"].items()
        if values.get(name) != value and name not in clauses and not name.startswith("resume_")
    ]
    fixed = [clause for name, clause in clauses.items() if name not in CHANGEABLE]
    return fixed, [clause for name, clause in clauses.items() if name in CHANGEABLE], others
