"""Two hosts on one machine, for what several machines do: network namespaces joined by a veth pair.

Each has an interface eth0 with an address of its own, a host name of its own, and a loopback of its own; the disk is
shared. Needs Linux, root, and iproute2.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Host:
    name: str
    address: str
    namespace: str
    prefix: tuple  # words to put before a command that is to run on this host


def missing():
    """Why there can be no hosts here, or None."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if not all(shutil.which(program) for program in ("ip", "unshare", "mount")):
        return "network namespaces need Linux with ip (iproute2), unshare and mount"
    probe = f"probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "network namespaces are not permitted here"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


@contextlib.contextmanager
def two_hosts():
    """Two `Host`s. At the end their namespaces are removed; what was started in them is the caller's to end."""

    def ip(*words):
        subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)

    with tempfile.TemporaryDirectory(prefix="hosts_") as folder, contextlib.ExitStack() as cleanup:
        table, pair = Path(folder) / "hosts", []
        for number in (1, 2):
            # a mount in the command's own mount namespace, which `ip netns exec` makes: /etc/hosts itself stays
            enter = f'hostname host{number} && mount --bind {table} /etc/hosts && exec "$@"'
            namespace = f"host{number}-{os.getpid()}"
            prefix = ("ip", "netns", "exec", namespace, "unshare", "--uts", "sh", "-c", enter, "sh")
            pair.append(Host(f"host{number}", f"10.77.0.{number}", namespace, prefix))
        table.write_text("127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in pair))
        for host in pair:
            ip("netns", "add", host.namespace)
            cleanup.callback(ip, "netns", "del", host.namespace)
        first, second = (host.namespace for host in pair)
        ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for host in pair:
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                ip("-n", host.namespace, "link", "set", interface, "up")
        yield pair


def documented_command(config):
    """The words of the command in a launch config's comment, from "accelerate" to "train_loop/main.py"."""
    comment = (ROOT / "launch_configs" / config).read_text(encoding="utf-8")
    return re.search(r"^#   (accelerate launch .*)$", comment, re.MULTILINE)[1].split()


def launch_on(pair, rank, flags, arguments, script="train_loop/main.py", timeout=300, **environment):
    """launch_configs/multi_node.yaml's command on the host of that machine rank, with the launcher's `flags` and the
    script's `arguments`. Returns the finished process with its output as text."""
    words = documented_command("multi_node.yaml")[2:-1]
    words[words.index("--machine_rank") + 1] = rank
    words[words.index("ADDRESS")] = pair[0].address
    launcher = (*pair[rank].prefix, sys.executable, "-m", "accelerate.commands.launch")
    return subprocess.run(
        list(map(str, (*launcher, *words, *flags, script, *arguments))),
        cwd=ROOT,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "eth0", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def launch_on_both(pair, *values, **options):
    """`launch_on` both hosts at once: the two finished processes, that of machine 0 first."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: launch_on(pair, rank, *values, **options), (0, 1)))
