"""Several runs under FSDP2 in the same processes, on CPUs: starting these takes longer than training. Accelerate shards
over gloo once its state says FSDP; the launcher's word alone becomes DDP there.

Each run is [precision, rank whose disk is full or null, arguments, port].
"""

import json
import os
import resource
import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from train_loop.machine import launch
from train_loop.main import leave, main


class Accelerator(launch.Accelerator):
    def __init__(self, **options):
        super().__init__(**options)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if self.mixed_precision != "no":
            self.state.fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.state.distributed_type = DistributedType.FSDP


launch.Accelerator = Accelerator
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
for precision, full_disk_of, arguments, port in json.loads(sys.argv[1]):
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    os.environ["MASTER_PORT"] = str(port)  # in the store of the run before the processes would read its addresses
    if os.environ["RANK"] == str(full_disk_of):  # what meets the limit sees a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    status = main(arguments)
    if os.environ["RANK"] == "0":
        print("exit status", status, flush=True)
    AcceleratorState._reset_state(reset_partial_state=True)
leave(0)
