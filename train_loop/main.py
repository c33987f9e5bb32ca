"""Fine-tune a causal language model with a loop that you can read. This file is the table of contents.

accelerate launch train_loop/main.py                                    the quickstart: a small model, no network
accelerate launch train_loop/main.py --config distilgpt2_wikitext2      a recipe, by name or path
accelerate launch train_loop/main.py --config distilgpt2_wikitext2 --num_train_epochs 1     flags win
accelerate launch --config_file launch_configs/multi_cpu.yaml train_loop/main.py            two processes
accelerate launch --config_file launch_configs/multi_gpu.yaml train_loop/main.py --config distilgpt2_wikitext2
accelerate launch train_loop/main.py --model_name_or_path runs/quickstart --validation_file my.txt --eval_only
"""

import os
import re
import signal
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder's modules must not stand in for other packages' (evaluate)
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train_loop import hub, trackers, tuning
from train_loop.config import read_settings
from train_loop.stop import Stopped, StopSignal


def main(argv=None):
    """Exit status: 0 done; 1 an error that the user can mend, told in one sentence; 75 stopped by a signal, with a
    checkpoint to go on from; 128 + the signal's number: stopped before there was anything to save."""
    argv = sys.argv[1:] if argv is None else argv
    is_main = int(os.environ.get("RANK", 0)) == 0
    with StopSignal() as stop:
        try:
            settings = read_settings(argv)
            repository = run(settings, stop)
            if repository:  # on the main process, and when all processes have let go of each other
                hub.push(settings, repository, stop)
        except (ValueError, OSError, FloatingPointError) as error:
            if "--traceback" in argv:
                raise
            say(error)
            return 1
        except RuntimeError as error:
            if "--traceback" in argv or not (problem := known_problem(str(error))):
                raise
            # every process says it: one that is gone cannot
            print(f"error: process {os.environ.get('RANK', 0)} {problem}", file=sys.stderr)
            return 1
        except Stopped as stopped:
            if is_main:
                way_on = ". To go on: the same command with --resume_from_checkpoint auto" if str(stopped) else ""
                print(f"stopped by {stop.name} {stopped}".rstrip() + way_on, file=sys.stderr)
            return 75 if "step-" in str(stopped) else 128 + stop.number
    return 0


def say(error):
    """Prints it. Mostly all processes have met the same one, and a launcher ends the others when one has ended: the
    main process says it, another one only if it is still there three seconds later."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    start = f"error: process {rank}: " if rank else "error: "
    print("\n".join(start + line for line in str(error).split("\n")), file=sys.stderr)


def known_problem(message):
    """What torch's RuntimeError means for the user; None for one that is nobody's but the programmer's."""
    if re.search(r"allocate memory|out of memory", message):
        return "has too little memory: give --auto_micro_batch, or lower per_device_train_batch_size or block_size"
    if re.search(r"peer|timed? ?out|connection", message, re.IGNORECASE):
        return f"lost its peers: {message.splitlines()[0]}"
    return None


def run(settings, stop):
    """Trains, exports, and returns the repository on the hub that the model is to be pushed to, None if it is not."""
    trackers.wanted_trackers(settings)  # raises where a library is missing
    if settings.tuning:
        tuning.keep_memory()
    if settings.preprocessing_num_workers:
        os.environ["RAYON_NUM_THREADS"] = str(settings.preprocessing_num_workers)  # read by tokenizers at first use
    unreachable = hub.use_cache_if_unreachable(settings)
    is_main = int(os.environ.get("RANK", 0)) == 0
    if not (is_main and sys.stderr.isatty()):
        os.environ["TQDM_DISABLE"] = "1"  # read when it is imported; some bars of libraries have no other switch
    if unreachable and is_main:
        print(f"{hub.hub_address()} cannot be reached: looking in the cache alone", file=sys.stderr)
    with tuning.uncollected():  # imported here, not above: --help and a mistyped flag answer before torch is loaded
        from accelerate.utils import set_seed

        from train_loop import (
            best,
            checkpoint,
            data,
            evaluate,
            launch,
            loop,
            loss,
            metrics,
            micro_batch,
            model,
            optim,
            publish,
            sample,
            sources,
            streaming,
        )

    launch.stop_with_launcher()
    repository = hub.check_push(settings, unreachable) if is_main else None
    accelerator = launch.build_accelerator(settings)
    show_progress, publisher, log = launch.quiet_libraries(accelerator), None, None
    try:
        settings = launch.after_restart(settings, accelerator)
        publish.check_output_dir(settings)

        # settings -> data
        config = model.load_config(settings)
        train_rows, eval_rows, held_out = (sources if settings.streaming else data).load_rows(settings)
        tokenizer = model.load_tokenizer(settings, train_rows)
        eval_split = data.load_split(eval_rows, tokenizer, "validation", settings, show_progress)
        if settings.streaming and not settings.eval_only:
            train_split = streaming.Stream(train_rows, tokenizer, settings)
        elif not settings.eval_only:
            train_split = data.load_split(train_rows, tokenizer, "training", settings, show_progress)
        samples = sample.Samples(settings, tokenizer) if settings.sample_prompt else None

        # -> model
        net = model.load_model(settings, config, tokenizer)
        if not loss.put_loss_in_head(net) and is_main:
            print("loss        through whole logits: this model's head is more than a linear layer", flush=True)
        launch.compile_in_place(net, accelerator)
        if settings.eval_only:
            if is_main:
                print(metrics.banner(settings, accelerator, net, [eval_split], held_out), flush=True)
            net, began = launch.prepare(accelerator, net), time.perf_counter()
            result = evaluate.evaluate(net, eval_split, settings, accelerator, show_progress)
            result["eval_runtime"] = time.perf_counter() - began  # seconds
            result |= metrics.peak_device_memory_gib()
            if is_main:
                print(metrics.table(result))
                if settings.output_dir:
                    publish.create_output_dir(settings)
                    metrics.write_json(Path(settings.output_dir) / "all_results.json", result)
            return
        run_length = train_split.num_blocks, settings, accelerator.num_processes
        per_epoch, num_steps = loop.steps_per_epoch(*run_length), loop.num_steps(*run_length)
        optimizer = optim.build_optimizer(net, settings)
        scheduler = optim.build_scheduler(optimizer, settings, num_steps)
        identity = checkpoint.identity(settings, net, train_split, eval_split, num_steps, accelerator)
        net, optimizer = launch.prepare(accelerator, net, optimizer)
        if settings.auto_micro_batch:
            settings = micro_batch.fit_micro_batch(net, train_split, settings, accelerator)
        set_seed(settings.seed, device_specific=True)  # dropout differs from process to process
        whole, splits = accelerator.unwrap_model(net), [train_split, eval_split]
        banner = metrics.banner(settings, accelerator, whole, splits, held_out, per_epoch, num_steps)
        if settings.dry_run:
            from train_loop import plan

            accelerator.print(banner, flush=True)
            stop.timeout = settings.ddp_timeout  # not deferred: there is nothing to save
            plan.print_plan(net, optimizer, scheduler, train_split, eval_split, settings, accelerator, stop)
            return

        # -> where an earlier run was
        checkpoints, position = checkpoint.Checkpoints(settings, accelerator, identity), checkpoint.Position()
        log = metrics.Metrics(settings.output_dir, num_steps, is_main, show_progress, trackers.Trackers(settings))
        path = checkpoints.find()
        if path:
            position = checkpoints.position_of(path)
            is_done = position.step == best.last_step(position, num_steps, settings)
            if is_done and publish.is_finished(settings.output_dir, position.step):
                if is_main:
                    print(f"the run in {settings.output_dir} is finished: {position.step:,} steps")
                    if position.step < num_steps:
                        print(best.say_why_it_ended(position, num_steps))
                return repository
            checkpoints.restore(path, position, net, optimizer, scheduler, log)
        if is_main:
            publish.create_output_dir(settings, resuming=path is not None)
            print(banner, flush=True)
            if settings.resume_from_checkpoint:
                print(f"resuming    {path or 'nothing yet: from the beginning'}", flush=True)
            log.trackers.start(log.lines, position.step if path else None)

        # -> train
        publisher = publish.Publisher(settings, tokenizer, accelerator, repository, held_out)
        stop.defer(settings.ddp_timeout)
        loop.train(
            net,
            optimizer,
            scheduler,
            train_split,
            eval_split,
            settings,
            accelerator,
            log,
            checkpoints,
            stop,
            position,
            publisher,
            samples,
        )

        # -> export
        if is_main and position.step < num_steps:
            print(best.say_why_it_ended(position, num_steps), flush=True)
        step, evaluation = best.load_best(checkpoints, position, net)
        if settings.load_best_model_at_end:
            evaluation = {**evaluation, "exported_step": step, "last_eval_loss": position.evaluation["eval_loss"]}
        results = log.finish(evaluation, checkpoints.seconds)
        publisher.export_model(net, log.lines, results)
        if is_main:
            metrics.write_json(Path(settings.output_dir) / "all_results.json", results)  # says that the run is finished
            print(f"done: {settings.output_dir}. Generate text with")
            print(f'  python -m train_loop.generate {settings.output_dir} "The value of"')
        return repository
    finally:
        if log is not None:
            log.trackers.finish()
        if publisher is not None:
            publisher.end()
        accelerator.end_training()  # without it a run of several CPU processes aborts at exit


def leave(status):
    """Ends this process. One of several does not go through the interpreter's shutdown: behind a DDP model torch keeps
    gloo's threads alive, whatever is destroyed, and now and then one of them would abort a run that is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
