"""Checks, before anything slow, that the settings fit together and that the input files are usable."""

from pathlib import Path

from train_loop.files import FILE_KINDS, data_files, file_kind
from train_loop.settings.choices import SCHEDULES
from train_loop.settings.settings import Settings
from train_loop.settings.sources import sources_of, validation_sets_of, weights_of


def contradictions(s: Settings) -> list[str]:
    """One line for each contradiction between settings, and for each input file that is not usable."""
    found, sources = [], sources_of(s)
    models = [n for n in ("model_name_or_path", "config_name", "model_type") if getattr(s, n)]
    if len(models) != 1:
        given = " and ".join(models) or "none"
        found.append(f"give exactly one of model_name_or_path, config_name, model_type: {given} given")
    if (s.model_name_or_path or "").endswith(".gguf"):
        found.append("model_name_or_path is a GGUF file: give its folder, and its name as gguf_file")
    elif s.gguf_file and not s.model_name_or_path:
        found.append("gguf_file needs model_name_or_path: the folder or the repository that holds it")
    elif s.gguf_file and (folder := Path(s.model_name_or_path or "")).is_dir() and not (folder / s.gguf_file).is_file():
        found.append(f"gguf_file {s.gguf_file}: no such file in {folder}")
    if s.model_revision and s.model_type:
        found.append("model_revision needs model_name_or_path or config_name")
    if s.config_overrides and s.model_name_or_path:
        found.append("config_overrides needs config_name or model_type: a pretrained model's shape is fixed")
    if s.tokenizer_name and s.tokenizer_vocab_size:
        found.append("give tokenizer_name or tokenizer_vocab_size, not both")
    if s.model_name_or_path and s.tokenizer_vocab_size:
        found.append("tokenizer_vocab_size needs config_name or model_type: a pretrained model has its tokenizer")
    if s.model_type and not (s.tokenizer_name or s.tokenizer_vocab_size):
        found.append("model_type needs tokenizer_name or tokenizer_vocab_size")
    for name in ("lora_alpha", "lora_target_modules", "lora_dropout"):
        if getattr(s, name) != getattr(Settings, name) and not s.lora_r:
            found.append(f"{name} needs lora_r")
    if s.lora_r and not s.model_name_or_path:
        found.append("lora_r needs model_name_or_path: random weights are not worth freezing")
    if s.lora_r and s.optimizer == "muon":
        found.append("give lora_r or optimizer muon, not both: Muon is for training from scratch")
    if s.dataset_name and s.train_file:
        found.append("give dataset_name or train_file, not both; a recipe's list of sources may hold both")
    data_sets = [of_one.dataset_name for of_one in sources.values() if of_one.dataset_name]
    if "wikitext" in data_sets and not Path("wikitext").exists():
        found.append("dataset_name wikitext: the hub has it as Salesforce/wikitext; give that name")
    if s.dataset_config_name and not data_sets:
        found.append("dataset_config_name needs dataset_name")
    if s.eval_only and not s.model_name_or_path:
        found.append("eval_only needs model_name_or_path")
    if s.eval_only and not (s.dataset_name or s.train_file or s.validation_file):
        found.append("eval_only needs data: dataset_name, train_file or validation_file")
    if not s.eval_only and not (s.dataset_name or s.train_file):
        found.append("no training data: give dataset_name or train_file")
    if not s.eval_only and not s.output_dir:
        found.append("output_dir is needed: the folder for the trained model")
    if s.resume_from_checkpoint and (s.overwrite_output_dir or s.eval_only):
        other = "overwrite_output_dir" if s.overwrite_output_dir else "eval_only"
        found.append(f"give resume_from_checkpoint or {other}, not both")
    if s.eval_delay and not s.eval_steps and not s.max_train_steps and s.eval_delay > s.num_train_epochs:
        found.append(f"eval_delay is {s.eval_delay:g} epochs, but the run has num_train_epochs {s.num_train_epochs:g}")
    if s.dry_run and s.eval_only:
        found.append("give dry_run or eval_only, not both: dry_run plans a training")
    if s.eval_stride and s.eval_stride > s.block_size:
        found.append(f"eval_stride is {s.eval_stride}, more than block_size {s.block_size}: tokens would be left out")
    if s.streaming and not s.eval_only:
        if not s.max_train_steps:
            found.append("streaming needs max_train_steps: the length of an epoch is unknown before its end")
        if s.tokenizer_vocab_size:
            found.append("streaming needs a tokenizer: tokenizer_vocab_size would read all training rows to train one")
        if "python_docs" in data_sets:
            found.append("streaming cannot read python_docs: give train_file, or a data set of the hub or of a folder")
    if s.streaming and len(sources) > 1 and not weights_of(s):
        found.append("streaming several sources needs a weight for each, in a recipe: their lengths are not known")
    if s.streaming and not s.validation_file and any(of_one.train_file for of_one in sources.values()):
        found.append("streaming needs validation_file: the last rows cannot be held out before they are all read")
    if s.shuffle_buffer_size != Settings.shuffle_buffer_size and not s.streaming:
        found.append("shuffle_buffer_size needs streaming: prepared blocks are shuffled over the whole epoch")
    found += _schedule_problems(s)
    for name in ("document_attention", "eval_stride", "named_perplexities"):
        if getattr(s, name) and not s.packing:
            found.append(f"{name} needs packing: without it each row has a block of its own")
    if s.early_stopping_threshold and not s.early_stopping_patience:
        found.append("early_stopping_threshold needs early_stopping_patience")
    if s.load_best_model_at_end and s.checkpointing_steps == "none":
        found.append("load_best_model_at_end needs checkpoints, but checkpointing_steps is none")
    of_training = ("load_best_model_at_end", "early_stopping_patience", "sample_prompt", "report_to", "lora_r")
    for name in (*of_training, "save_minutes", "max_minutes", "mirror"):
        if s.eval_only and getattr(s, name) not in (None, False, ["none"]):
            found.append(f"{name} is for training: it has no effect with eval_only")
    if s.mirror and s.output_dir and ("://" not in s.mirror or s.mirror.startswith("file://")):
        place = Path(s.mirror.removeprefix("file://")).resolve()
        if Path(s.output_dir).resolve() in (place, *place.parents):
            found.append(f"mirror {s.mirror} is in output_dir: give it a different place")
    for name in ("hub_model_id", "hub_private_repo", "hub_strategy"):
        if getattr(s, name) != getattr(Settings, name) and not s.push_to_hub:
            found.append(f"{name} needs push_to_hub")
    if s.push_to_hub and s.eval_only:
        found.append("give push_to_hub or eval_only, not both: evaluating exports nothing")
    if s.hub_strategy == "every_save" and s.checkpointing_steps == "none":
        found.append("hub_strategy every_save needs checkpoints, but checkpointing_steps is none")
    inputs = [("train_file", of_one.train_file) for of_one in sources.values()]
    inputs += [("validation_file", of_one.validation_file) for of_one in validation_sets_of(s).values()]
    for kind, value in inputs:
        if not value:
            continue
        files = data_files(str(value))
        if not files.paths:
            found.append(f"{kind} {value}: there is no text file in it")
        if len(kinds := {file_kind(path) or "unknown" for path in files.paths}) > 1:
            found.append(f"{kind} {value}: files of more than one kind ({', '.join(sorted(kinds))})")
        for path in [] if files.each_is_a_row else files.paths:
            if not path.is_file():
                found.append(f"{kind} {path}: no such file")
            elif file_kind(path) is None:
                found.append(f"{kind} {path}: this kind of file is unknown; use {', '.join(FILE_KINDS)}, also with .gz")
            elif path.stat().st_size == 0:
                found.append(f"{kind} {path} is empty")
            elif s.add_eos_token and file_kind(path) == "text":
                found.append(
                    f"add_eos_token: a row of {path} is a line, not a document; use a folder, jsonl or parquet"
                )
    return found


def _schedule_problems(s: Settings) -> list[str]:
    """The same for the learning rate."""
    schedule, given = s.lr_scheduler_type, s.lr_scheduler_kwargs or {}
    known, found = SCHEDULES[schedule], []
    if schedule == "constant" and s.num_warmup_steps:
        found.append("num_warmup_steps has no effect with lr_scheduler_type constant: give constant_with_warmup")
    for name, value in (known | given).items():
        of = f"lr_scheduler_kwargs: {name} of lr_scheduler_type {schedule} is {value}"
        if name not in known:
            allowed = f"it takes {', '.join(known)}" if known else "it takes none"
            found.append(f"lr_scheduler_kwargs: lr_scheduler_type {schedule} has no {name}; {allowed}")
        elif name == "lr_end" and not 0 <= value < s.learning_rate:
            found.append(f"{of}, but must be at least 0 and below learning_rate {s.learning_rate}")
        elif name.endswith("_ratio") and not 0 <= value <= 1:
            found.append(f"{of}, but must be from 0 to 1")
        elif name in ("num_cycles", "power", "decay_ratio") and value <= 0:
            found.append(f"{of}, but must be above 0")
    return found
