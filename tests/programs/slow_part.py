"""The GPU benchmark with one part that never ends, and 0.2 seconds for it. Prints the table."""

import pathlib
import sys
import time

sys.path.insert(0, "tests/benchmarks")
import gpu

gpu.gpu_parts.slow = lambda bench: time.sleep(60)
folder = pathlib.Path(sys.argv[1])
print(gpu.table({"slow": gpu.run_part("slow", folder, folder, True, 0.2)}))
