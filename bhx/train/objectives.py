"""What each stage trains, and the loss of each subject of a batch.

An objective holds the networks that learn. Its `terms` name the parts of the loss, each with the
modality that a subject needs for it. Called with samples it gives the losses of the subjects that
have them, or with `look=True` the trained representation of every sample, for the monitors.
"""

from __future__ import annotations

import hashlib
from copy import deepcopy

import torch
from torch import nn

from bhx.encode.inputs import encode_parts, sequences
from bhx.model.dynamics import jepa_loss
from bhx.model.layers import Block
from bhx.model.structure import mae_loss


class StructureObjective(nn.Module):
    """Masked autoencoding of T1 cubes."""

    def __init__(self, networks, plan):
        super().__init__()
        self.terms = {"loss": "t1"}
        self.encoder, self.decoder = networks.structure, networks.structure_decoder

    def forward(self, samples, look=False):
        t1 = torch.stack([s.reading.t1 for s in samples])
        if look:
            return list(self.encoder(t1))
        hidden = torch.stack([s.hidden for s in samples])
        return {"loss": mae_loss(self.encoder, self.decoder, t1, hidden)}

    def cost(self, sample):
        """Tokens of a sample."""
        return self.encoder.config.tokens

    def follow(self, momentum):
        """Nothing follows the encoder."""


class DynamicsObjective(nn.Module):
    """Joint-embedding prediction: the student's predictor guesses the teacher's hidden tokens.

    The predictor reads the student's geometry, and the teacher is the moving average of the
    student; the teacher is what is kept.
    """

    def __init__(self, networks, plan):
        super().__init__()
        self.terms = {"loss": "bold"}
        self.student = deepcopy(networks.dynamics)
        self.predictor = networks.dynamics_predictor
        self.predictor.predictor_pos_embed = self.student.pos_embed
        self.teacher = networks.dynamics.requires_grad_(False)

    def forward(self, samples, look=False):
        patches = [s.reading.windows[0] for s in samples]
        if look:  # the mean over patches
            tokens, lengths = self.teacher(patches)
            parcels = self.teacher.config.parcels
            return [t.unflatten(0, (parcels, -1)).mean(1) for t in tokens.split(lengths)]
        keep, hide = ([getattr(s, k)[0] for s in samples] for k in ("keep", "hide"))
        return {"loss": jepa_loss(self.student, self.predictor, self.teacher, patches, keep, hide)}

    def cost(self, sample):
        """Tokens of a sample."""
        return len(sample.reading.tokens[0])

    @torch.no_grad()
    def follow(self, momentum):
        """Move the teacher towards the student."""
        slow, fast = ([_local(p) for p in m.parameters()] for m in (self.teacher, self.student))
        torch._foreach_lerp_(slow, fast, 1 - momentum)


class HarmonizerObjective(nn.Module):
    """Reconstruction of both modalities' tokens, made by frozen encoders, from the hub tokens."""

    def __init__(self, networks, plan):
        super().__init__()
        self.harmonizer = networks.harmonizer
        self.networks = [networks]  # in a list: the frozen encoders are no parameters of this
        for frozen in (networks.dynamics, networks.structure):
            frozen.requires_grad_(False)
        self.release = plan.loss == "release"
        self.terms = {"loss": None} if self.release else {"loss_bold": "bold", "loss_t1": "t1"}

    def forward(self, samples, look=False):
        tokens, rows = self.encode(samples)
        if look:
            return list(self.harmonizer(tokens, rows)[:, 1:])
        if self.release:
            return {"loss": self.harmonizer.release_loss(tokens, rows)}
        seen = [self.seen(*x) for x in zip(tokens, rows, samples, strict=True)]
        return self.harmonizer.losses(*map(list, zip(*seen, strict=True)), tokens, rows)

    @torch.no_grad()
    def see(self, samples):
        """Take the mean token of each place, and the variance around it, from these samples."""
        h = self.harmonizer
        total, square = torch.zeros_like(h.mean_tokens), torch.zeros_like(h.mean_tokens)
        count = total.new_zeros(len(total), 1)
        for sample in samples:
            (tokens,), (rows,) = self.encode([sample])
            total[rows - 1] += tokens
            square[rows - 1] += tokens**2
            count[rows - 1] += 1
        h.mean_tokens.copy_(total / count.clamp(min=1))
        left = (square - count * h.mean_tokens**2).mean(1)
        is_t1 = h.config.is_structure(1 + torch.arange(len(count), device=count.device))
        for i, here in enumerate((~is_t1, is_t1)):
            if count[here].any():
                h.spread[i] = (left[here].sum() / count[here].sum()).clamp(min=1e-6)

    @torch.no_grad()
    def encode(self, samples):
        """Each sample's data tokens (n, width) and the rows they take."""
        if samples[0].tokens is not None:
            return [s.tokens.float() for s in samples], [s.rows for s in samples]
        readings = [s.reading for s in samples]
        device = self.harmonizer.cls_token.device
        parts = encode_parts(self.networks[0], readings, device)
        tokens, rows, _ = sequences(self.networks[0].config, readings, *parts)
        return [t.float() for t in tokens], rows

    def seen(self, tokens, rows, sample):
        """A sample's tokens without the modality it was to lose."""
        is_t1 = self.harmonizer.config.is_structure(rows)
        kept = {"": is_t1 | ~is_t1, "bold": is_t1, "t1": ~is_t1}[sample.dropped]
        return tokens[kept], rows[kept]

    def cost(self, sample):
        """Tokens of a sample."""
        if sample.tokens is not None:
            return len(sample.tokens)
        windows = sum(len(k) for k in sample.reading.tokens)
        return windows + (0 if sample.reading.t1 is None else self.harmonizer.config.cubes)

    def follow(self, momentum):
        """Nothing follows the harmonizer."""


OBJECTIVES = {
    "structure": StructureObjective,
    "dynamics": DynamicsObjective,
    "harmonizer": HarmonizerObjective,
}


def compile_blocks(objective) -> None:
    """Compile what each token goes through alone; attention keeps its own fused kernels."""
    for module in objective.modules():
        if isinstance(module, Block):
            module.before = torch.compile(module.before, dynamic=True)
            module.after = torch.compile(module.after, dynamic=True)


def shard_blocks(objective, device, processes: int):
    """Split each block's weights over the processes, and the rest as one (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
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


def spread(whole, like):
    """A whole tensor as `like` is: split over the same processes, or as it is."""
    if not hasattr(like, "placements") or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def digest(*modules) -> str:
    """Checksum of weights."""
    found = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
