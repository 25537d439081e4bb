"""One rank of a process group over gloo: waits for jobs and sends back what they return.

Started by the fixture ``ranks`` of conftest.py: ``python rank.py RANK WORLD STORE ADDRESS``. A job
is a function of a test file, named by path, and runs on every rank at the same time.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
import traceback
from functools import cache
from multiprocessing.connection import Client

import torch
import torch.distributed as dist


@cache
def load(path: str):
    spec = importlib.util.spec_from_file_location(f"jobs_{abs(hash(path))}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    rank, world, store, address = sys.argv[1:]
    torch.set_num_threads(1)
    with Client(address) as parent:
        parent.send(int(rank))
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world)
        )
        while (job := pickle.loads(parent.recv_bytes())) is not None:
            path, name, arguments = job
            try:
                answer = (getattr(load(path), name)(**arguments), None)
            except BaseException as error:  # pytest's own, of pytest.raises, are no Exceptions
                answer = (error, traceback.format_exc())
            parent.send_bytes(pickle.dumps(answer))  # tensors by value, not by shared memory
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
