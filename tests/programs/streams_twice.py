"""A run in the folder of the last argument, and the same resumed, as a kill before step 20 would have left it."""

import shutil
import sys

from train_loop.main import main

*words, folder = sys.argv[1:]
statuses = [main([*words, f"--output_dir={folder}/run"])]
shutil.copytree(f"{folder}/run", f"{folder}/resumed")
shutil.rmtree(f"{folder}/resumed/checkpoints/step-000020")
statuses += [main([*words, f"--output_dir={folder}/resumed", "--resume_from_checkpoint=auto"])]
sys.exit(max(statuses))
