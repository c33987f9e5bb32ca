"""Runs launch_configs/slurm.sbatch on a real Slurm of two nodes, preempts it, and compares with a job left alone.

    python tests/benchmarks/slurm.py                     # needs root, and Debian's slurm-wlm and munge

The nodes are two network namespaces of this machine, each with its own slurmd; slurmctld is on the first. Everything
lies in a temporary folder, which stays if something is wrong, and all that is started is ended. Jobs of two processes,
one on each node: one is preempted by a job of a higher partition, one likewise while it is still loading, one is warned
before the end of its time. They must queue again by themselves, resume from their checkpoints, and end with the weights
and the metrics of a job that was left alone, bit for bit. A cancelled job must stay cancelled.
"""

import argparse
import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from hosts import missing, two_hosts  # noqa: E402
from kills import prepare, result  # noqa: E402

from train_loop.checkpoint.durable import steps_in  # noqa: E402

SLURM_CONF = """
ClusterName=little
SlurmctldHost={first.name}({first.address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
# cred_expire: a job that queues again may begin once its old credential is void; by default after two minutes
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=2 MaxTime=INFINITE
"""


class Cluster:
    """The little cluster's commands, as on its first node."""

    def __init__(self, host, environment):
        self.host, self.environment = host, environment

    def __call__(self, *words, **environment):
        command = [*self.host.prefix, *map(str, words)]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment | environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, words))}: {done.stdout}{done.stderr}")
        return done.stdout

    def state(self, job):
        """(state, how often it was started again) of a job, by its number."""
        shown = self("scontrol", "show", "job", job)
        return tuple(re.search(rf"\b{name}=(\w+)", shown)[1] for name in ("JobState", "Restarts"))

    def wait(self, job, *states, seconds=300):
        wait_for(lambda: self.state(job)[0] in states, f"job {job} becoming {' or '.join(states)}", seconds)


def wait_for(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"waited {seconds} s for {what}")
        time.sleep(0.2)


@contextlib.contextmanager
def little_cluster(folder):
    """A `Cluster` of two nodes, up and idle; its daemons' logs are in `folder`."""
    with two_hosts() as hosts, contextlib.ExitStack() as cleanup:
        folder.chmod(0o755)
        for name in ("state", *(host.name for host in hosts)):
            (folder / name).mkdir()
        munge = folder / "munge"
        munge.mkdir()
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        for path in (munge, munge / "key"):
            shutil.chown(path, "munge", "munge")
        nodes = [f"NodeName={h.name} NodeAddr={h.address} CPUs=8 Gres=gpu:8 State=UNKNOWN" for h in hosts]
        conf = folder / "slurm.conf"
        conf.write_text(SLURM_CONF.format(first=hosts[0], folder=folder, nodes="\n".join(nodes)))
        for number in range(8):
            # the script asks for GPUs and there are none: Slurm takes any device for one, here /dev/null's twins
            os.mknod(folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        environment = os.environ | {"SLURM_CONF": str(conf), "GLOO_SOCKET_IFNAME": "eth0"}
        environment |= {"HF_HOME": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

        def start(name, *command):
            log = cleanup.enter_context(open(folder / f"{name}.log", "w"))
            daemon = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            cleanup.callback(stop, daemon)

        files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
        munged = ["munged", "--foreground", f"--socket={munge}/socket", *files]
        start("munged", "setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", *munged)
        wait_for((munge / "socket").exists, "munged", 10)
        start("slurmctld", *hosts[0].prefix, "slurmctld", "-D")
        for host in hosts:
            start(f"slurmd-{host.name}", *host.prefix, "slurmd", "-D")
        cluster = Cluster(hosts[0], environment)
        cleanup.callback(cancel_all, cluster)
        wait_for(lambda: cluster("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == "2", "two nodes", 60)
        yield cluster


def stop(daemon):
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def cancel_all(cluster):
    cluster("scancel", "--state=PENDING")
    cluster("scancel", "--state=RUNNING")
    wait_for(lambda: not cluster("squeue", "-h"), "the jobs' end")


def submit(cluster, arguments, output_dir, *flags):
    """The number of a job of two processes, one on each node."""
    flags = ["--parsable", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={output_dir}.log", *flags]
    arguments = [*arguments, f"--output_dir={output_dir}"]
    return cluster("sbatch", *flags, "launch_configs/slurm.sbatch", *arguments, ACCELERATE_MIXED_PRECISION="no").strip()


def preempt(cluster):
    """Takes both nodes from whoever has them, and waits until they are free again."""
    flags = ["--parsable", "--partition=high", "--nodes=2", "--gpus-per-node=8", "--output=/dev/null"]
    cluster.wait(cluster("sbatch", *flags, "--wrap=srun sleep 1").strip(), "COMPLETED")


def harness(folder):
    """Runs the jobs; returns what was seen. Raises SystemExit at the first difference."""
    arguments = [*prepare(folder), "--max_train_steps=1500", "--checkpointing_steps=20", "--eval_steps=100"]
    arguments += ["--logging_steps=50"]
    seen = {}

    def check(name, job, began_again=None):
        """The job has ended as the one left alone did, after it was started again `began_again` times."""
        cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        state, restarts = cluster.state(job)
        log = Path(f"{folder / name}.log").read_text()
        equal = state == "COMPLETED" and result(folder / name) == expected
        if not equal or (int(restarts) != began_again if began_again is not None else int(restarts) == 0):
            raise SystemExit(f"{name}: {state} after {restarts} restarts, equal: {equal}\n{log}")
        went_on = [line.split("/")[-1] for line in log.splitlines() if line.startswith("resuming") and "step-" in line]
        seen[name] = {"started again": int(restarts), "from": went_on, "equal": equal}

    with little_cluster(folder) as cluster:
        began = time.monotonic()
        job = submit(cluster, arguments, folder / "alone")
        cluster.wait(job, "COMPLETED", "FAILED")
        if cluster.state(job)[0] != "COMPLETED":
            raise SystemExit((folder / "alone.log").read_text())
        seen["seconds of the job left alone"] = round(time.monotonic() - began, 1)
        expected = result(folder / "alone")

        job = submit(cluster, arguments, folder / "preempted")
        wait_for(lambda: steps_in(folder / "preempted" / "checkpoints"), "a checkpoint")
        preempt(cluster)
        check("preempted", job, 1)

        job = submit(cluster, arguments, folder / "preempted while loading")
        cluster.wait(job, "RUNNING")
        time.sleep(1)
        preempt(cluster)
        check("preempted while loading", job, 1)

        job = submit(cluster, arguments, folder / "out of time", "--time=1", "--signal=TERM@35")
        check("out of time", job)

        job = submit(cluster, arguments, folder / "cancelled")
        wait_for(lambda: steps_in(folder / "cancelled" / "checkpoints"), "a checkpoint")
        cluster("scancel", job)
        cluster.wait(job, "CANCELLED")
        wait_for(lambda: not cluster("squeue", "-h"), "the job's end")
        time.sleep(3)
        seen["cancelled"] = cluster.state(job)[0]
        if seen["cancelled"] != "CANCELLED":
            raise SystemExit("a cancelled job queued itself again")
    return seen


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if reason := missing():
        raise SystemExit(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm_"))
    print(harness(folder))
    shutil.rmtree(folder)
