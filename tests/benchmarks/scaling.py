"""What more processes bring: the model (README.md, Scaling), the measured values, and what it predicts for GPUs.

    python tests/benchmarks/scaling.py            # prints the tables of README.md; computes, measures nothing

P parameters, n processes, A micro-batches in a step, each t tokens; seconds of a step

    compute     A C,  C = 6 P t / (F u)                         F: FLOP/s of a device, u: the part of them that is used
    exchange    DDP   X = 2 (n - 1) / n x 4 P / b               the gradients' sum, float32, in a ring, once a step
                FSDP  X = (n - 1) / n x (2 A x 2 P + 4 P) / b   each micro-batch gathers the bf16 weights twice
    step        A C + X  if nothing is hidden;  max(A C, (A - 2/3) C + X)  if all of DDP's hides behind the backward
                pass of the last micro-batch, two thirds of C; max(A C, X) for FSDP, which prefetches in both passes
    efficiency  A C / step; P cancels out: it is the same for every model
"""

# of tests/benchmarks/two_hosts.py --repeats 1, per accumulation: tokens/s, and the share of the exchange
MEASURED = {
    1: {"one": 5399, "one thread": 2905, "two": 4625, "hosts": 4546, "share": 0.032},
    4: {"one": 5283, "one thread": 3032, "two": 5474, "hosts": 5458, "share": 0.009},
}
FLOPS, USED = 989e12, 0.4  # H100, bf16, dense; the part used is an assumption
TOKENS = 8192  # of a micro-batch, on each GPU
NVLINK = 450e9  # bytes/s, one direction, each GPU
GPU_BYTES, ACTIVATION_BYTES = 80e9, 20e9  # an assumption: what activations and the head's work take
NODE = 8
NETWORKS = {  # bytes/s that leave a node of 8 GPUs
    "400 Gb/s for each GPU": 8 * 50e9,
    "400 Gb/s for a node": 50e9,
    "100 Gb/s for a node": 12.5e9,
}
MODELS = {"82 M": 82e6, "1.5 B": 1.5e9, "7 B": 7e9}


def bandwidth(num_gpus, node_bandwidth):
    """Bytes/s at the narrowest place of a ring through all GPUs: what a ring sends on leaves each node once."""
    return NVLINK if num_gpus <= NODE else min(NVLINK, node_bandwidth)


def ddp_exchange(P, n, b):
    return 2 * (n - 1) / n * 4 * P / b


def fsdp_exchange(P, n, b, A):
    return (n - 1) / n * (2 * A * 2 * P + 4 * P) / b


def efficiency(P, n, node_bandwidth, A, sharded=False):
    """(with nothing hidden, with as much hidden as can be)"""
    C, b = 6 * P * TOKENS / (FLOPS * USED), bandwidth(n, node_bandwidth)
    X = fsdp_exchange(P, n, b, A) if sharded else ddp_exchange(P, n, b)
    hidden = max(A * C, X) if sharded else max(A * C, (A - 2 / 3) * C + X)
    return A * C / (A * C + X), A * C / hidden


def print_check():
    share = MEASURED[1]["share"]
    exchange = share / (1 - share)  # in units of a micro-batch's compute
    predicted = exchange / (4 + exchange)
    print(f"share of the exchange with accumulation 4, from that with 1: {predicted:.2%} (measured ", end="")
    print(f"{MEASURED[4]['share']:.1%})")
    print("\n| accumulation | 2 processes / 1 of one thread | 2 hosts / 2 processes | 2 processes / 1 of two threads |")
    print("|---" * 4 + "|")
    for A, m in MEASURED.items():
        ratios = m["two"] / m["one thread"], m["hosts"] / m["two"], m["two"] / m["one"]
        print(f"| {A} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


def print_predictions():
    head = ["efficiency", "A", "8 GPUs, NVLink", *(f"{n}, {name}" for name in NETWORKS for n in (64, 512))]
    print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")

    def cell(*arguments, **options):
        low, high = (round(100 * value) for value in efficiency(1e9, *arguments, **options))
        return f"{low} to {high} %"

    for sharded in (False, True):
        for A in (1, 8):
            row = ["FSDP" if sharded else "DDP", A, cell(NODE, NVLINK, A, sharded=sharded)]
            row += [cell(n, b, A, sharded=sharded) for b in NETWORKS.values() for n in (64, 512)]
            print("| " + " | ".join(map(str, row)) + " |")
    print("\ntokens of a micro-batch from which on DDP's exchange can hide, A = 1: ", end="")
    print("; ".join(f"{2 * FLOPS * USED / min(NVLINK, b):,.0f} ({name})" for name, b in NETWORKS.items()))


def print_memory():
    print("\n| GB a GPU, activations aside | DDP | FSDP, 8 GPUs | 64 | 512 | the same with A > 1: 8 | 64 | 512 |")
    print("|---" * 8 + "|")
    for name, P in MODELS.items():
        at_work = 0.1 * 2 * P  # the layers that are whole at a time, in bf16: a tenth of all, an assumption
        cells = [20 * P, *(16 * P / n + at_work for n in (8, 64, 512))]
        cells += [12 * P / n + 4 * P + at_work for n in (8, 64, 512)]  # no_sync keeps the gradients whole
        print(f"| {name} | " + " | ".join(f"{size / 1e9:,.1f}" for size in cells) + " |")
    print(f"\nDDP fits up to {(GPU_BYTES - ACTIVATION_BYTES) / 20 / 1e9:.1f} B parameters")


if __name__ == "__main__":
    print_check()
    print_predictions()
    print_memory()
