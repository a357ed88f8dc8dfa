"""What two processes can say to each other; run by test_two_processes.py under a launcher."""

from __future__ import annotations

import torch

from finetune.config.schema import TrainConfig
from finetune.distributed import start
from finetune.errors import UserError

processes = start(TrainConfig(device="cpu"))
rank, world = processes.rank, processes.world
assert world == 2
assert processes.threads == torch.get_num_threads()
assert processes.gather_object(f"{rank}") == ["0", "1"]
assert processes.gather(torch.tensor([rank, 5])).tolist() == [[0, 5], [1, 5]]
assert processes.broadcast(rank + 7) == 7
assert processes.any(rank == 1) and not processes.all(rank == 1) and processes.all(True)
assert processes.on_main(lambda: rank + 40, "adding") == 40
processes.barrier()


def fail(error: Exception) -> None:
    raise error


for error, expected in ((UserError("no such folder"), UserError), (KeyError("x"), RuntimeError if rank else KeyError)):
    try:
        processes.on_main(lambda error=error: fail(error), "failing")  # type: ignore[misc]
    except expected as caught:
        assert type(error) is KeyError or "no such folder" in str(caught)
    else:
        raise AssertionError("an error of the main process did not reach this one")
print(f"rank {rank} is content with {processes.threads} threads", flush=True)
