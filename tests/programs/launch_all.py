"""Runs several commands of `accelerate launch` at once, each argument one. The exit status is the highest of theirs."""

import os
import sys

from accelerate.commands.launch import launch_command, launch_command_parser

children = []
for command in sys.argv[1:]:
    if not (pid := os.fork()):
        launch_command(launch_command_parser().parse_args(command.split()))
        os._exit(0)
    children.append(pid)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
