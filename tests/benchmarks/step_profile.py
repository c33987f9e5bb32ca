"""Where the time of an optimizer step goes, by kind of operation: the plain way, and this loop's.

python tests/benchmarks/step_profile.py --batch_size 32
python tests/benchmarks/step_profile.py --batch_size 32 --precision bf16

distilgpt2's shape, random weights, blocks of 128, dropout on. The plain way is what `Trainer` does: modules of
transformers, whole logits, the libraries' defaults for memory. Each is a process of its own; the third step is
profiled. An operation's time is without those inside it; "outside" is what no operation accounts for.
"""

import argparse
import collections
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from train_loop import tuning

KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm"),
    "random numbers of dropout": ("bernoulli_",),
    "softmax and loss": (
        *("_log_softmax", "_log_softmax_backward_data", "_softmax", "_softmax_backward_data", "masked_fill_", "exp_"),
        *("nll_loss", "nll_loss_forward", "nll_loss_backward", "gather", "scatter_add_"),
    ),
    "activation (GELU)": ("gelu", "gelu_", "gelu_backward", "tanh", "tanh_backward", "pow"),
    "layer norm": ("native_layer_norm", "native_layer_norm_backward"),
    "optimizer and norm": ("_fused_adamw_", "linalg_vector_norm", "_foreach_mul_", "_foreach_norm"),
    "copies and fills": ("copy_", "fill_", "zero_", "cat", "clone"),
    "other elementwise": ("mul", "mul_", "add", "add_", "div", "div_", "sum", "where", "sub", "neg"),
}


def profile(plain, batch_size, num_warm, precision):
    if not plain:
        tuning.keep_memory()
    import torch
    from torch.profiler import ProfilerActivity
    from transformers import AutoConfig, AutoModelForCausalLM

    from train_loop.head import Head
    from train_loop.lean import use_lean_modules
    from train_loop.loss import next_token_loss

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=6), dtype=torch.float32).train()
    if not plain:
        use_lean_modules(model)
    model.inspected_head = Head(in_chunks=not plain)
    if precision == "bf16":
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # as Accelerate does
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    ids = torch.randint(50257, (batch_size, 128))

    def step():
        nll_sum, num_targets, _ = next_token_loss(model, {"input_ids": ids, "labels": ids})
        (nll_sum / num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(num_warm):
        step()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
    kind_of = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
    spent = collections.Counter()
    for event in profiler.key_averages():
        spent[kind_of.get(event.key, "all else")] += event.self_cpu_time_total / 1e6
    return {"seconds": seconds, "spent": {**spent, "outside": max(0.0, seconds - sum(spent.values()))}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32, help="blocks in a step")
    parser.add_argument("--warm", type=int, default=2, help="steps before the one that is profiled")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32", help="of both")
    parser.add_argument("--one", choices=["plain", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        done = profile(arguments.one == "plain", arguments.batch_size, arguments.warm, arguments.precision)
        print(json.dumps(done))
        return
    done = {}
    for which in ("plain", "ours"):
        command = [sys.executable, __file__, "--one", which, "--batch_size", str(arguments.batch_size)]
        command += ["--warm", str(arguments.warm), "--precision", arguments.precision]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        done[which] = json.loads(printed.strip().splitlines()[-1])
    print(f"batch {arguments.batch_size:<24}{'plain':>8}{'ours':>17}")
    for kind in [*KINDS, "all else", "outside"]:
        cells = [(run["spent"].get(kind, 0.0), run["seconds"]) for run in done.values()]
        print(f"{kind:<28}" + "".join(f"{spent:>8.2f} s {spent / whole:>5.1%}" for spent, whole in cells))
    print(f"{'a step':<28}" + "".join(f"{run['seconds']:>8.2f} s {'':>5}" for run in done.values()))


if __name__ == "__main__":
    main()
