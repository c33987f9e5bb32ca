"""A run, from its settings to its output folder. This file is the table of contents:

settings -> rows -> blocks -> model -> optimizer -> where an earlier run was -> loop -> export
"""

import contextlib
import shlex
import time

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from train_loop import best, loop, output_dir
from train_loop.checkpoint import Checkpoints, run_identity
from train_loop.data import Split, TrainingData, all_rows, load_sources, load_training, load_validation
from train_loop.errors import UserError, num_of
from train_loop.evaluate import evaluate_splits
from train_loop.machine import (
    after_restart,
    build_accelerator,
    compile_in_place,
    end_training,
    mfu_per_token_rate,
    peak_device_memory_gib,
    peaks,
    prepare,
    quiet_libraries,
)
from train_loop.model import load_config, load_model, load_tokenizer
from train_loop.optim import build_optimizer, build_scheduler
from train_loop.position import Position
from train_loop.probes import head_of, keep_apart_where_possible
from train_loop.process import Clock, StopSignal
from train_loop.publish import Publisher
from train_loop.report import Kept, Metrics, Samples, Trackers, banner, table, write_block_nats
from train_loop.services import Services
from train_loop.settings import Settings
from train_loop.trial import Planned, check_loss, fit_micro_batch, print_plan
from train_loop.tuning import sharing_cores


def run(settings: Settings, stop: StopSignal, repository: str | None = None) -> bool:
    """Trains and exports; or only evaluates (`eval_only`), or reports the time and memory of a run (`dry_run`).

    Returns whether output_dir holds a finished run. `repository`: the model's name on the hub, None if it is not
    pushed. Raises UserError if the user can fix it, and Stopped.
    """
    accelerator = build_accelerator(settings)
    is_main, show_progress = accelerator.is_main_process, quiet_libraries(accelerator)
    with contextlib.ExitStack() as at_the_end:
        at_the_end.push(end_training(accelerator))
        if settings.tuning:
            at_the_end.enter_context(sharing_cores())
        settings = after_restart(settings, accelerator)
        at_the_end.enter_context(output_dir.held(settings, accelerator))

        # settings -> rows -> blocks
        config = load_config(settings)
        train_rows, eval_rows, held_out = load_sources(settings)  # by name: of each source, of each validation set
        tokenizer = load_tokenizer(settings, all_rows(train_rows), config)
        eval_splits = load_validation(eval_rows, tokenizer, settings, show_progress)
        if not settings.eval_only:
            train_split = load_training(train_rows, tokenizer, settings, show_progress)
        samples = Samples(settings, tokenizer) if settings.sample_prompt else None

        # -> model
        model = load_model(settings, config, tokenizer)
        splits: list[TrainingData] = [*([] if settings.eval_only else [train_split]), *eval_splits.values()]
        for remark in (*head_of(model).remarks, *keep_apart_where_possible(model, splits)):
            accelerator.print(f"loss        {remark}")
        compile_in_place(model, accelerator)
        if settings.eval_only:
            evaluate_only(model, eval_splits, settings, accelerator, held_out, show_progress)
            return False

        # -> optimizer
        run_length = train_split.blocks_in_epoch(settings), accelerator.num_processes
        per_epoch, num_steps = settings.steps_per_epoch(*run_length), settings.num_steps(*run_length)
        optimizer = build_optimizer(model, settings)
        decides = run_identity(
            settings, model, train_split, next(iter(eval_splits.values())), num_steps, accelerator, optimizer
        )
        model, optimizer = prepare(accelerator, model, optimizer)
        if settings.auto_micro_batch:
            settings = fit_micro_batch(model, train_split, settings, accelerator)
        for remark in check_loss(model, train_split, settings, accelerator):
            accelerator.print(f"loss        {remark}")
        set_seed(settings.seed, device_specific=True)  # each process has its own dropout
        unwrapped = accelerator.unwrap_model(model)
        arithmetic = banner(settings, accelerator, unwrapped, eval_splits, held_out, train_split, per_epoch, num_steps)
        if settings.dry_run:
            accelerator.print(arithmetic, flush=True)
            stop.timeout = settings.ddp_timeout  # not deferred: there is nothing to save
            scheduler = build_scheduler(optimizer, settings, num_steps)
            print_plan(Planned(model, optimizer, scheduler, train_split, eval_splits, settings, accelerator, stop))
            return False

        # -> where an earlier run was
        clock = Clock(settings.save_minutes, settings.max_minutes, stop.began)
        checkpoints, position = Checkpoints(settings, accelerator, decides, clock), Position()
        at_the_end.callback(checkpoints.end)
        mfu = mfu_per_token_rate(unwrapped, settings, accelerator)
        trackers = Trackers(settings)
        metrics = Metrics(settings.folder, num_steps, is_main, show_progress, trackers, mfu, list(eval_splits))
        at_the_end.callback(trackers.finish)
        path, (finished_step, damage) = checkpoints.find(), output_dir.finished_step(settings, accelerator)
        if path:
            position = checkpoints.position_of(path)
            is_done = position.step == best.last_step(position, num_steps, settings) == finished_step
            if is_done and damage:
                accelerator.print(f"the model in {settings.output_dir} is exported again: {damage}")
            elif is_done:
                accelerator.print(f"the run in {settings.output_dir} is finished: {num_of(position.step, 'step')}")
                if position.step < num_steps:
                    accelerator.print(best.say_why_it_ended(position, num_steps))
                return True
            checkpoints.restore(path, position, model, optimizer, metrics)
        elif settings.resume_from_checkpoint and finished_step is not None:
            where = f"output_dir {settings.output_dir}"
            damage = f". Its model is damaged: {damage}" if damage else ""
            raise UserError(
                f"{where} holds a finished run without checkpoints: there is nothing to resume{damage}. "
                "--overwrite_output_dir starts again from the beginning"
            )
        if is_main:
            output_dir.create_output_dir(settings, resuming=path is not None)
            if path:
                metrics.write_lines()
            print(arithmetic, flush=True)
            if settings.resume_from_checkpoint:
                print(f"resuming    {path or 'nothing yet: from the beginning'}", flush=True)
            trackers.start(metrics.lines, position.step if path else None)

        # -> loop
        scheduler = build_scheduler(optimizer, settings, num_steps, position.step)
        publisher = Publisher(
            settings,
            tokenizer,
            accelerator,
            repository,
            held_out,
            type(optimizer.optimizer).__name__,
            list(eval_splits),
        )
        at_the_end.callback(publisher.end)
        stop.defer(settings.ddp_timeout)
        loop.train(
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            position=position,
            train_split=train_split,
            eval_splits=eval_splits,
            settings=settings,
            services=Services(accelerator, metrics, checkpoints, stop, publisher, samples),
        )

        # -> export
        if position.step < num_steps:
            how_far = (
                clock.say(position.step, num_steps) if clock.is_over else best.say_why_it_ended(position, num_steps)
            )
            accelerator.print(how_far, flush=True)
        step, evaluation = best.load_best(checkpoints, position, model)
        if settings.load_best_model_at_end and position.evaluation:
            evaluation = {**evaluation, "exported_step": step, "last_eval_loss": position.evaluation["eval_loss"]}
        results = metrics.finish(evaluation, checkpoints.seconds) | peaks()
        exported = publisher.export_model(model, metrics.lines, results)
        if is_main:
            output_dir.write_results(settings.folder, {**results, "exported": exported})
            print(f"done: {settings.output_dir}. Generate text with")
            print(f'  python -m train_loop.generate {shlex.quote(str(settings.folder))} "The value of"')
        return True


def evaluate_only(
    model: PreTrainedModel,
    eval_splits: dict[str, Split],
    settings: Settings,
    accelerator: Accelerator,
    held_out: str,
    show_progress: bool,
) -> None:
    """Prints the loss of a model, and writes it to output_dir if that is set."""
    accelerator.print(banner(settings, accelerator, model, eval_splits, held_out), flush=True)
    model, began = prepare(accelerator, model), time.perf_counter()
    results = evaluate_splits(model, eval_splits, settings, accelerator, show_progress)
    assert results is not None  # nothing can stop it
    results["eval_runtime"] = time.perf_counter() - began  # seconds
    results |= peak_device_memory_gib()
    accelerator.print(table(results))
    if accelerator.is_main_process and settings.output_dir:
        output_dir.create_output_dir(settings)
        write_block_nats(settings.folder, {"last": Kept(None, results.block_nats)})
        output_dir.write_results(settings.folder, results)
