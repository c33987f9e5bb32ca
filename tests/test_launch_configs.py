"""Each launch config, started by the launcher itself; several machines, as network namespaces of this one."""

import itertools
import json
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import (
    LAUNCH,
    NO_DROPOUT,
    PROGRAMS,
    ROOT,
    TINY,
    TWO,
    assert_lines_agree,
    assert_same_run,
    lines_of,
    run,
    run_program,
    without_timings,
)
from hosts import documented_command, launch_on, launch_on_both, missing, two_hosts
from safetensors.torch import load_file

from train_loop.checkpoint.durable import name_of, steps_in
from train_loop.main import main

ON_CPUS = ["--num_processes=2", "--mixed_precision=no"]  # multi_node.yaml with one process on each host

STARTED = {
    "cpu.yaml": {"world_size": 1, "local_world_size": 1, "precision": "no", "cpu": "True"},
    "multi_cpu.yaml": {"world_size": 2, "local_world_size": 2, "precision": "no"},
    "single_gpu.yaml": {"world_size": 1, "local_world_size": 1, "precision": "bf16", "cpu": "False"},
    "multi_gpu.yaml": {"world_size": 8, "local_world_size": 8, "precision": "bf16"},
    "fsdp.yaml": {"world_size": 8, "local_world_size": 8, "precision": "bf16", "fsdp": "true", "fsdp_version": "2"},
    "multi_node.yaml": {"world_size": 16, "local_world_size": 8, "precision": "bf16"},
}


def test_each_config_starts_what_it_says(tmp_path):
    """The launcher starts a script in the place of the loop, which writes down its environment: this much works without
    GPUs. The two machines of multi_node.yaml meet on the loopback."""
    assert set(STARTED) == {path.name for path in (ROOT / "launch_configs").glob("*.yaml")}
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    script = PROGRAMS / "show_environment.py"
    commands = [f"--config_file launch_configs/{name} {script} {tmp_path}/{name}" for name in STARTED]
    *commands, node = commands
    place = f"--main_process_ip 127.0.0.1 --main_process_port {port}"
    commands += [f"--machine_rank {rank} {place} {node}" for rank in (0, 1)]
    done = run_program("launch_all.py", *commands)
    assert done.returncode == 0, done.stderr
    for name, expected in STARTED.items():
        found = [json.loads(path.read_text()) for path in tmp_path.glob(f"{name}.*")]
        assert found == [expected] * expected["world_size"], name


@pytest.mark.parametrize(
    "config, says",
    [
        ("cpu.yaml", "precision float32, world size 1"),
        pytest.param("multi_cpu.yaml", "precision float32, world size 2", marks=pytest.mark.slow),
        # without a GPU these train on the CPU, and FSDP falls back to DDP
        pytest.param("single_gpu.yaml", "precision bf16, world size 1", marks=pytest.mark.slow),
        pytest.param("multi_gpu.yaml", "precision bf16, world size 2", marks=pytest.mark.slow),
        pytest.param("fsdp.yaml", "precision bf16, world size 2", marks=pytest.mark.slow),
    ],
)
def test_the_command_in_a_config_trains(config, says, text_file, tmp_path):
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=2", f"--output_dir={tmp_path}/run"]
    done = run(*arguments, launcher=(*LAUNCH, *documented_command(config)[2:]))
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line] == [2]


@pytest.fixture(scope="module")
def hosts():
    if reason := missing():
        pytest.skip(reason)
    with two_hosts() as pair:
        yield pair


def test_two_hosts_train_as_one_process_does_and_one_process_resumes_their_run(hosts, text_file, tmp_path):
    """multi_node.yaml with a process on each host, against one process with two micro-batches in a step. Then one
    process resumes from the hosts' checkpoint of step 18. Without dropout, whose numbers differ between processes."""
    arguments = [*TINY, NO_DROPOUT, f"--train_file={text_file}", "--num_train_epochs=2", "--logging_steps=1"]
    arguments += ["--learning_rate=1e-3", "--per_device_train_batch_size=4", "--checkpointing_steps=9"]
    first, second = launch_on_both(hosts, ON_CPUS, [*arguments, f"--output_dir={tmp_path}/two"])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "world size 2" in first.stdout and not second.stdout.strip()
    arguments += ["--gradient_accumulation_steps=2"]
    assert main([*arguments, f"--output_dir={tmp_path}/one"]) == 0
    assert_lines_agree(without_timings(tmp_path / "two"), without_timings(tmp_path / "one"))

    checkpoints = tmp_path / "two" / "checkpoints"
    for step in set(steps_in(checkpoints)) - {18}:
        shutil.rmtree(checkpoints / name_of(step))
    (tmp_path / "two" / "all_results.json").unlink()
    assert main([*arguments, f"--output_dir={tmp_path}/two", "--resume_from_checkpoint=auto"]) == 0
    assert_lines_agree(without_timings(tmp_path / "two"), without_timings(tmp_path / "one"))


@pytest.mark.slow
def test_processes_wait_for_the_one_that_prepares_longer_than_ddp_timeout(text_file, tmp_path):
    """They wait at a file's lock, which is no collective."""
    program = PROGRAMS / "prepares_slowly.py"
    environment = {"PYTHONPATH": str(ROOT), "FOLDER": str(tmp_path)}
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=2", "--ddp_timeout=5"]
    done = run(
        program, *arguments, f"--output_dir={tmp_path}/run", launcher=TWO, HF_HOME=f"{tmp_path}/cache", **environment
    )
    assert done.returncode == 0, done.stderr
    assert sorted(found.name.split()[0] for found in tmp_path.glob("* by *")) == ["training", "validation"]


@pytest.mark.slow
def test_hosts_without_a_shared_cache_prepare_once_each(hosts, text_file, tmp_path):
    """Two processes on each of two hosts, equal to one process."""
    program = PROGRAMS / "prepares_slowly.py"
    environment = {"PYTHONPATH": str(ROOT), "FOLDER": str(tmp_path)}
    arguments = [*TINY, NO_DROPOUT, f"--train_file={text_file}", "--max_train_steps=5", "--learning_rate=1e-3"]
    arguments += ["--logging_steps=1"]
    batch = ["--per_device_train_batch_size=2", "--ddp_timeout=5", f"--output_dir={tmp_path}/four"]
    flags = ["--num_processes=4", "--mixed_precision=no"]
    environment |= {"CACHES": f"{tmp_path}/caches"}
    first, second = launch_on_both(hosts, flags, [*arguments, *batch], program, **environment)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    prepared = sorted(found.name.split(" by ")[0] for found in tmp_path.glob("* by *"))
    assert prepared == [f"{split} on {host.name}" for split in ("training", "validation") for host in hosts]
    assert main([*arguments, "--per_device_train_batch_size=8", f"--output_dir={tmp_path}/one"]) == 0
    assert_lines_agree(without_timings(tmp_path / "four"), without_timings(tmp_path / "one"))


@pytest.mark.slow
def test_gradients_are_exchanged_once_an_optimizer_step(hosts, text_file, tmp_path):
    """Bytes on the wire, whatever the accumulation: of n processes each has to send 2 (n - 1) / n times the gradient's
    size (R. Patarasuk and X. Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009)."""
    program = PROGRAMS / "counts_bytes.py"
    environment = {"PYTHONPATH": str(ROOT), "FOLDER": str(tmp_path)}
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=12", "--per_device_train_batch_size=2"]
    arguments += ["--config_overrides=n_layer=2,n_head=2,n_embd=192,n_positions=64"]
    for accumulation in (1, 4):
        more = [f"--gradient_accumulation_steps={accumulation}", f"--output_dir={tmp_path}/run{accumulation}"]
        first, second = launch_on_both(hosts, ON_CPUS, [*arguments, *more], program, **environment)
        assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
        for rank in (0, 1):
            counts = [int(line) for line in (tmp_path / f"sent by {rank}").read_text().split()]
            sent = sorted(b - a for a, b in itertools.pairwise(counts))
            bound = 4 * sum(t.numel() for t in load_file(tmp_path / f"run{accumulation}/model.safetensors").values())
            # headers, acknowledgements, and the counts and losses, which are reduced too
            assert bound < sent[len(sent) // 2] < 1.1 * bound, (accumulation, rank, sent, bound)
            (tmp_path / f"sent by {rank}").unlink()


@pytest.mark.slow
def test_a_lost_process_or_host_costs_the_steps_since_the_checkpoint(hosts, text_file, tmp_path):
    """The run is not lost, although the host that lost no process counts no restart and was told to overwrite. A host
    that comes back needs the same command again."""
    program = PROGRAMS / "host_dies_once.py"
    environment = {"PYTHONPATH": str(ROOT), "FOLDER": str(tmp_path)}
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    flags = [*ON_CPUS, "--rdzv_backend=c10d", "--max_restarts=3"]
    arguments = [*TINY, f"--train_file={text_file}", "--num_train_epochs=2", "--checkpointing_steps=5"]
    arguments += ["--per_device_train_batch_size=4", "--overwrite_output_dir"]

    def launch(rank, dies):
        output_dir = f"--output_dir={tmp_path}/without {dies}"
        return launch_on(hosts, rank, flags, [*arguments, output_dir], program, DIES=dies, **environment)

    for dies in ("nothing", "process", "host"):
        with ThreadPoolExecutor(1) as pool:
            first, second = pool.submit(launch, 0, dies), launch(1, dies)
            if dies == "host":
                assert second.returncode == -signal.SIGKILL
                second = launch(1, dies)
            first = first.result()
        assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
        steps = [int(line) for line in (tmp_path / "steps of 0").read_text().split()]
        assert steps == ([*range(1, 27)] if dies == "nothing" else [*range(1, 9), *range(6, 27)])
        (tmp_path / "steps of 0").unlink()
        (tmp_path / "dead").unlink(missing_ok=True)
        assert_same_run(tmp_path / f"without {dies}", tmp_path / "without nothing")


@pytest.mark.slow
def test_a_slurm_job_queues_itself_again_and_ends_as_if_left_alone(tmp_path):
    """tests/benchmarks/slurm.py: launch_configs/slurm.sbatch on a Slurm of two nodes."""
    if reason := missing() or [f"{p} is missing" for p in ("slurmctld", "slurmd", "munged") if not shutil.which(p)]:
        pytest.skip(str(reason))
    done = run("tests/benchmarks/slurm.py", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
