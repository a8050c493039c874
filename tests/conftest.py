"""pytest-xdist's workers share the cores, each with the processes that it starts."""
import os

workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
if workers > 1:  # before torch is imported, which reads it once
    os.environ['OMP_NUM_THREADS'] = str(max(1, (os.cpu_count() or 1) // workers))
