"""What each stage trains, and the loss of each subject of a batch.

An objective holds the networks that learn. Its `terms` name the parts of the loss, each with the
modality that a subject needs for it (None: every subject). Called with samples it gives, by term,
the losses of the subjects that have it, or with `look=True` the trained representation of every
sample, for the log. `hide` says what of a sample the network does not see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F

from bhx.encode.inputs import Sequences, encode_readings, sequences
from bhx.modalities.bold import BOLD, jepa_masks
from bhx.modalities.t1 import ANATOMY, cube_mask
from bhx.model.dynamics import jepa_loss
from bhx.model.layers import Block, LinearEmbedding
from bhx.model.structure import mae_loss
from bhx.train.processes import local


class Objective(nn.Module):
    """What the loop asks of every stage, and what holds for most."""

    names: tuple[str, ...] = ()  # modalities that it reads; all of the model's where empty
    terms: Mapping[str, str | None]

    @staticmethod
    def hide(sample, config, plan, random) -> None:
        """Choose what of a sample the network does not see."""

    def begin(self, samples) -> None:
        """Take what is fitted before the first step from samples of the training subjects."""

    def follow(self, momentum: float) -> None:
        """What moves after each step without a gradient."""

    def groups(self, plan) -> list[dict]:
        """Groups of parameters: `decays` and `scale` multiply weight decay and learning rate.
        Biases and 1-D parameters do not decay."""
        groups = {1.0: [], 0.0: []}
        for name, p in self.named_parameters():
            if p.requires_grad:
                groups[float(p.ndim > 1 and not name.endswith("bias"))].append(p)
        return [{"params": p, "decays": d, "scale": 1.0} for d, p in groups.items() if p]


class StructureObjective(Objective):
    """Masked autoencoding of T1 cubes."""

    names, terms = (ANATOMY.name,), {"loss": ANATOMY.name}

    def __init__(self, networks, plan):
        super().__init__()
        self.encoder, self.decoder = networks.structure, networks.structure_decoder

    @staticmethod
    def hide(sample, config, plan, random):
        """Three quarters of the cubes, or as many as the plan says."""
        mask = cube_mask(config.structure.tokens, plan.hidden, random)
        sample.hidden = {"cubes": torch.from_numpy(mask)}

    def forward(self, samples, look=False):
        voxels = torch.stack([s.reading.windows[ANATOMY.name][0] for s in samples])
        if look:
            tokens, lengths = self.encoder(list(voxels))
            return list(tokens.split(lengths))
        hidden = torch.stack([s.hidden["cubes"] for s in samples])
        return {"loss": mae_loss(self.encoder, self.decoder, voxels, hidden)}


class DynamicsObjective(Objective):
    """Joint-embedding prediction: the student's predictor guesses the teacher's hidden tokens.

    The predictor reads the student's geometry, and the teacher is the moving average of the
    student; the teacher is what is kept.
    """

    names, terms = (BOLD.name,), {"loss": BOLD.name}

    def __init__(self, networks, plan):
        super().__init__()
        self.student = deepcopy(networks.dynamics)
        self.predictor = networks.dynamics_predictor
        self.predictor.predictor_pos_embed = self.student.pos_embed
        self.teacher = networks.dynamics.requires_grad_(False)

    @staticmethod
    def hide(sample, config, plan, random):
        """Blocks of parcels x patches (`modalities.bold.jepa_masks`)."""
        shape = sample.reading.windows[BOLD.name][0].shape[:2]
        keep, hide = map(torch.from_numpy, jepa_masks(*shape, random))
        sample.hidden = {"keep": keep, "hide": hide}

    def forward(self, samples, look=False):
        patches = [s.reading.windows[BOLD.name][0] for s in samples]
        if look:  # the mean over patches
            tokens, lengths = self.teacher(patches)
            parcels = self.teacher.config.parcels
            return [t.unflatten(0, (parcels, -1)).mean(1) for t in tokens.split(lengths)]
        keep, hide = ([s.hidden[k] for s in samples] for k in ("keep", "hide"))
        return {"loss": jepa_loss(self.student, self.predictor, self.teacher, patches, keep, hide)}

    @torch.no_grad()
    def follow(self, momentum):
        """Move the teacher towards the student."""
        slow, fast = ([local(p) for p in m.parameters()] for m in (self.teacher, self.student))
        torch._foreach_lerp_(slow, fast, 1 - momentum)


class HarmonizerObjective(Objective):
    """Reconstruction of every modality's tokens from the hub tokens. Encoders are frozen; the
    linear embeddings of modalities that have none learn along."""

    def __init__(self, networks, plan):
        super().__init__()
        self.harmonizer = networks.harmonizer
        self.embeddings = nn.ModuleDict()
        self.networks = [networks]  # in a list: the frozen encoders are no parameters of this
        for name in networks.config.modalities:
            encoder = networks.encoder(name)
            if isinstance(encoder, LinearEmbedding):
                self.embeddings[name] = encoder
            else:
                encoder.requires_grad_(False)
        self.release = plan.loss == "release"
        terms = {f"loss_{name}": name for name in networks.config.modalities}
        self.terms = {"loss": None} if self.release else terms

    @staticmethod
    def hide(sample, config, plan, random):
        """One modality of those who have several, in a share of cases."""
        if len(sample.has) > 1 and random.random() < plan.drop_modality:
            sample.unseen = str(random.choice(sample.has))

    def forward(self, samples, look=False):
        subjects = self.read(samples).subjects
        if look:
            return list(self.harmonizer(subjects)[:, 1:])
        if self.release:
            return {"loss": self.harmonizer.release_loss(subjects)}
        pairs = zip(subjects, samples, strict=True)
        seen = [{n: x for n, x in one.items() if n != sample.unseen} for one, sample in pairs]
        targets = [{name: (x.detach(), at) for name, (x, at) in one.items()} for one in subjects]
        return self.harmonizer.losses(seen, targets)

    @torch.no_grad()
    def begin(self, samples):
        """Fit the linear embeddings, then the mean token of each place and its variance."""
        samples = list(samples)
        for name, embedding in self.embeddings.items():
            inputs = [s.reading.windows[name][0] for s in samples if name in s.reading.windows]
            if inputs:
                embedding.fit(torch.stack(inputs))
        if not self.release:
            self.harmonizer.fit_means(one for s in samples for one in self.read([s]).subjects)

    def read(self, samples) -> Sequences:
        """What the harmonizer reads of these samples, in float32."""
        return read_sequences(self.networks[0], samples, self.harmonizer.cls_token.device)


class LabelObjective(Objective):
    """A label of the subjects, from the mean of the hub tokens before the last norm through a fresh
    norm and a linear layer. `trains` says what of the harmonizer learns along."""

    def __init__(self, networks, plan, *, truth, outputs: int, units=None, pooled=None):
        super().__init__()
        self.terms = {"loss": None}
        self.networks, self.plan = [networks], plan
        self.truth, self.units = truth, units  # by row of the cohort; (mean, deviation) of numbers
        self.pooled = {} if pooled is None else pooled  # row -> mean hub token, if it cannot change
        h = deepcopy(networks.harmonizer).requires_grad_(False)
        self.harmonizer, depth = h, len(h.blocks)
        self.norm = nn.LayerNorm(h.config.width, eps=1e-6)
        self.head = nn.Linear(h.config.width, outputs)
        nn.init.normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        self.first = {"all": 0, "last block": depth, "head only": depth + 1}[plan.trains]
        for layer in self.layers()[self.first :]:
            for parameter in layer:
                parameter.requires_grad_(True)
        for i, block in enumerate(h.blocks):
            learns = i + 1 >= self.first
            block.drop_path = learns * plan.drop_path * (i / (depth - 1) if depth > 1 else 1)

    def layers(self) -> list:
        """Parameters of each layer: what enters the harmonizer, its blocks, the head."""
        h = self.harmonizer
        enters = [h.cls_token, h.latent_tokens, h.enc_latent_token_positional_embedding]
        blocks = [list(block.parameters()) for block in h.blocks]
        return [enters, *blocks, [*self.norm.parameters(), *self.head.parameters()]]

    def groups(self, plan):
        """The head has the whole rate, each layer below `layer_decay` times that of the one above;
        biases and norms do not decay. Source of the rule: BEiT, arXiv 2106.08254."""
        layers, groups = self.layers(), []
        for i in range(self.first, len(layers)):
            scale = plan.layer_decay ** (len(layers) - 1 - i)
            for decays in (1.0, 0.0):
                params = [p for p in layers[i] if (p.ndim > 1) == bool(decays)]
                if params:
                    groups.append({"params": params, "decays": decays, "scale": scale})
        return groups

    def forward(self, samples, look=False):
        raw = self.outputs(samples)
        if look:
            return [one[None] for one in raw]
        truth = [self.truth[s.row].item() for s in samples]
        if self.units is None:
            truth = torch.tensor(truth, device=raw.device)
            smooth = self.plan.smoothing if self.training else 0.0
            return {"loss": F.cross_entropy(raw, truth, reduction="none", label_smoothing=smooth)}
        middle, deviation = self.units
        truth = raw.new_tensor([(one - middle) / deviation for one in truth])
        return {"loss": (raw[:, 0] - truth) ** 2}

    def outputs(self, samples):
        """(subject, class) before softmax, or one number in training deviations."""
        if self.plan.trains != "head only":
            return self.head(self.norm(self.pool(samples))).float()
        for sample in samples:
            if sample.row not in self.pooled:
                self.pooled[sample.row] = self.pool([sample])[0].detach()
        return self.head(self.norm(torch.stack([self.pooled[s.row] for s in samples]))).float()

    def pool(self, samples):
        """Mean hub token (subject, width), over the windows of each subject by their share."""
        read = read_sequences(self.networks[0], samples, self.head.weight.device)
        hub = self.harmonizer.encode(read.subjects)[:, 1:].float().mean(1)
        owner = torch.tensor(read.owner, device=hub.device)
        out = hub.new_zeros(len(samples), hub.shape[1])
        return out.index_add(0, owner, hub * read.share.to(hub)[:, None])


def read_sequences(networks, samples, device) -> Sequences:
    """What the harmonizer reads of samples: their stored tokens, or those that the encoders make;
    no gradient reaches encoders that are frozen."""
    if samples[0].tokens is None:
        readings = [s.reading for s in samples]
        read = sequences(networks.config, readings, encode_readings(networks, readings, device))
        subjects, owner, share = read.subjects, read.owner, read.share
    else:
        subjects = [one for s in samples for one in s.tokens.subjects]
        owner = [i for i, s in enumerate(samples) for _ in s.tokens.subjects]
        share = torch.cat([s.tokens.share for s in samples])
    subjects = [{n: (x.float(), at) for n, (x, at) in one.items()} for one in subjects]
    return Sequences(subjects, owner, share)


OBJECTIVES = {
    "structure": StructureObjective,
    "dynamics": DynamicsObjective,
    "harmonizer": HarmonizerObjective,
}


def compile_blocks(objective) -> None:
    """Compile what each token goes through alone; attention keeps its own fused kernels."""
    for module in objective.modules():
        if isinstance(module, Block):
            for name in ("before", "after"):
                setattr(module, name, torch.compile(getattr(module, name), dynamic=True))


def digest(*modules) -> str:
    """Checksum of weights."""
    found = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
