"""Several processes that share one job: who one is, what is exchanged, what is split."""

from __future__ import annotations

import atexit
import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from bhx.model.layers import Block

LONGEST_WAIT = timedelta(hours=12)  # of processes of which one has more to embed than another


@dataclass(frozen=True)
class Processes:
    """One of the processes that torchrun started, or the only one."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Meet the other processes, where torchrun started several."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            return cls(0, 1, device)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=LONGEST_WAIT)
            atexit.register(dist.destroy_process_group)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()

    def summed(self, values: list) -> list:
        """Each number summed over the processes."""
        if self.world == 1:
            return values
        values = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return values.tolist()

    def joined(self, mine: torch.Tensor, total: int) -> torch.Tensor:
        """Rows of all processes in the order of the batch that `share_of` dealt."""
        if self.world == 1:
            return mine
        whole = mine.new_zeros(total, *mine.shape[1:])
        whole[self.rank :: self.world] = mine
        dist.all_reduce(whole)
        return whole

    def most(self, value: int) -> int:
        """The largest over the processes."""
        if self.world == 1:
            return value
        value = torch.tensor(value, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def share_of(self, subjects):
        """This process's part of a batch, or of a list of jobs."""
        return subjects[self.rank :: self.world]

    def parallel(self, objective: nn.Module, shard: bool) -> nn.Module:
        """The objective as all processes train it together."""
        if self.world == 1:
            return objective
        if shard:
            return _sharded(objective, self.device, self.world)
        ids = [self.device.index or 0] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            objective,
            device_ids=ids,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=objective.compares,  # modalities that a part does not have
        )

    def exchange(self, parallel: nn.Module, shard: bool, last: bool):
        """A context: gradients are exchanged after the last part of a batch only."""
        if self.world > 1 and shard:
            parallel.set_requires_gradient_sync(last)
        elif self.world > 1 and not last:
            return parallel.no_sync()
        return contextlib.nullcontext()


def own_device(device: str | None) -> str | None:
    """Under torchrun each process takes the GPU of its number on the machine."""
    on_gpu = torch.cuda.is_available() if device is None else str(device) == "cuda"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    return device


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 by itself, and so gains from it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and has


def _sharded(objective, device, world):
    """Each block's weights split over the processes, and the rest as one (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world,))
    for module in list(objective.modules()):
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    return fully_shard(objective, mesh=mesh, reshard_after_forward=True)


def gathered(value):
    """A state with every sharded tensor whole, on the CPU; all processes must ask for it."""
    if isinstance(value, dict):
        return {k: gathered(v) for k, v in value.items()}
    if isinstance(value, list):
        return [gathered(v) for v in value]
    if hasattr(value, "full_tensor"):
        return value.full_tensor().cpu()
    return value


def split_like(whole, like):
    """A whole tensor as `like` is: split over the same processes, or as it is."""
    if not hasattr(like, "placements") or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def local(tensor):
    """The part of a tensor that this process holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
