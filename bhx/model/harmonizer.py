"""The harmonizer of the paper: data tokens of every modality fused into hub tokens by
self-attention over one sequence, and the reconstruction that trains it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from bhx.errors import InputError, check_choice
from bhx.model.layers import (
    ATTENTIONS,
    Block,
    TokenPlaces,
    attention_weights,
    initialize,
    normalized,
    run,
    sincos,
)


@dataclass(frozen=True)
class HarmonizerConfig(TokenPlaces):
    """Sizes of the harmonizer; those of its networks are by default the released ("base") ones."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    target_width: int = 768


class Harmonizer(nn.Module):
    """Subjects' data tokens to hub tokens, and back through the decoder.

    A batch is a list of subjects; a subject is a dict: modality -> tokens (n, width) and the places
    (n,) that they take among the modality's. What a subject does not have, a modality, a patch, a
    parcel, is simply not among its tokens.
    """

    def __init__(self, config: HarmonizerConfig):
        super().__init__()
        c = config
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.latent_tokens = nn.Parameter(torch.zeros(c.hubs, c.width))
        self.enc_latent_token_positional_embedding = nn.Parameter(torch.zeros(c.hubs, c.width))
        self.register_buffer("pos_embed", line_positions(c.data_tokens, c.width), persistent=False)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=1e-6)

        self.decoder_embed = nn.Linear(c.width, c.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_width))
        self.dec_latent_token_positional_embedding = nn.Parameter(
            torch.zeros(1, c.hubs, c.decoder_width)
        )
        self.register_buffer(
            "decoder_pos_embed", line_positions(c.data_tokens, c.decoder_width), persistent=False
        )
        self.decoder_blocks = nn.ModuleList(
            Block(c.decoder_width, c.decoder_heads) for _ in range(c.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(c.decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(c.decoder_width, c.target_width)
        # the mean token of each place, which pretraining fills in: the hub tokens then have only
        # to carry what differs between subjects; zero with released weights
        self.register_buffer("mean_tokens", torch.zeros(c.data_tokens, c.target_width))
        self.register_buffer("spread", torch.ones(len(c.places)))  # variance around it
        initialize(self)
        for name in ("cls_token", "mask_token"):
            nn.init.normal_(getattr(self, name), std=0.02)
        for name in ("latent_tokens", "enc_latent_token_positional_embedding",
                     "dec_latent_token_positional_embedding"):  # fmt: skip
            nn.init.normal_(getattr(self, name))  # hub tokens differ from the start
        nn.init.zeros_(self.decoder_pred.weight)  # the decoder begins at `mean_tokens`
        with torch.no_grad():
            for block in self.blocks:  # and so does what each of them reads
                block.attn.qkv.weight[: 2 * c.width] *= 3

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.cls_token.device

    def entries(self) -> list[nn.Parameter]:
        """Parameters of what enters the first block."""
        place = self.enc_latent_token_positional_embedding
        return [self.cls_token, self.latent_tokens, place]

    def forward(self, subjects):
        """Hub tokens (B, hubs, width) after the norm."""
        return self.norm(self.encode(subjects))[:, 1:]

    read = forward

    def pooled(self, subjects):
        """The mean hub token (B, width) of each subject, before the norm."""
        return self.encode(subjects)[:, 1:].float().mean(1)

    def encode(self, subjects):
        """Hub tokens (B, 1 + hubs, width), CLS first, before the norm."""
        x, lengths = self.sequence(subjects)
        x = run(self.blocks, x, lengths)
        hubs = self.config.hubs
        return torch.stack([torch.cat([s[:1], s[-hubs:]]) for s in x.split(lengths)])

    def rows(self, subject):
        """Rows (n,) of the positions of a subject's tokens, one modality behind the other."""
        first = self.config.first
        return torch.cat([first[name] + places for name, (_, places) in subject.items()])

    def sequence(self, subjects):
        """Packed [CLS | data tokens | hub] of every subject, and each one's length."""
        hub = self.latent_tokens + self.enc_latent_token_positional_embedding
        cls = (self.cls_token + self.pos_embed[:, :1])[0]
        sequences = []
        for subject in subjects:
            if not subject:
                raise InputError("Expected a subject with data tokens, found none", "Leave it out")
            places = self.pos_embed[0, self.rows(subject)]
            sequences.append(torch.cat([cls, data_of(subject) + places, hub]))
        return torch.cat(sequences), tuple(len(s) for s in sequences)

    @torch.no_grad()
    def attention(self, subjects, method: str = "last"):
        """How much each hub token reads each data token: [modality -> (hubs, n)] of each subject.

        `method` is "last" (layer), "mean" (over layers), or "rollout" (Abnar & Zuidema, arXiv
        2005.00928). Heads are averaged; over all modalities each row sums to 1. Only hub rows, or
        for the rollout blocks of rows, are ever held.
        """
        check_choice("attention", method, ATTENTIONS)
        x, lengths = self.sequence(subjects)
        inputs = []
        for block in self.blocks:
            inputs.append(x)
            x = block(x, lengths)
        if method == "rollout":
            maps = self._rollout(inputs, lengths)
        else:
            hub, first = slice(-self.config.hubs, None), 0 if method == "mean" else -1
            layers = zip(self.blocks[first:], inputs[first:], strict=True)
            each = zip(*(block.weights(x, lengths, hub) for block, x in layers), strict=True)
            maps = [torch.stack([w.mean(0) for w in one]).mean(0) for one in each]
        out = []
        for whole, subject in zip(maps, subjects, strict=True):
            data = whole[:, 1 : -self.config.hubs]
            data = data / data.sum(-1, keepdim=True)
            parts = data.split([len(places) for _, places in subject.values()], 1)
            out.append(dict(zip(subject, parts, strict=True)))
        return out

    def _rollout(self, inputs, lengths, rows_at_once: int = 512):
        hubs = self.config.hubs
        own = torch.eye(hubs, device=inputs[0].device)
        flows = [nn.functional.pad(own, (n - hubs, 0)) for n in lengths]
        for block, x in zip(reversed(self.blocks), reversed(inputs), strict=True):
            for i, (sequence, flow) in enumerate(zip(x.split(lengths), flows, strict=True)):
                q, k, _ = block.before(sequence)
                parts = zip(q.split(rows_at_once), flow.split(rows_at_once, 1), strict=True)
                through = sum(f @ attention_weights(part, k).mean(0) for part, f in parts)
                flows[i] = (flow + through) / 2
        return flows

    def decode(self, hub, rows):
        """Data tokens at the positions `rows` [(n_i,)] of each subject, from its hub tokens.

        `hub` (B, 1 + hubs, width) with CLS first. Returns packed (sum n_i, target width).
        """
        z = self.decoder_embed(hub)
        tail = self.dec_latent_token_positional_embedding[0]
        sequences = []
        for one, wanted in zip(z, rows, strict=True):
            cls = one[:1] + self.decoder_pos_embed[0, :1]
            mask = self.mask_token[0] + self.decoder_pos_embed[0, wanted]
            sequences += [cls, mask, one[1:] + tail]
        lengths = tuple(len(r) + hub.shape[1] for r in rows)
        x = run(self.decoder_blocks, torch.cat(sequences), lengths)
        x = torch.cat([s[1 : 1 + len(r)] for s, r in zip(x.split(lengths), rows, strict=True)])
        return self.decoder_pred(self.decoder_norm(x)) + self.mean_tokens[torch.cat(list(rows)) - 1]

    def losses(self, seen, targets):
        """The paper's terms: the mean squared error of each modality's valid tokens, in units of
        their variance around the mean token of each place, so that neither drowns the other.

        Returns loss_<modality>, one value for each subject that has it among its `targets`. What
        is read (`seen`) may lack it: the hub tokens must then guess.
        """
        decoded = self.decode(
            self.norm(self.encode(seen)), [self.rows(subject) for subject in targets]
        )
        parts = [(name, x) for subject in targets for name, (x, _) in subject.items()]
        terms = {name: [decoded.new_zeros(0)] for name in self.config.modalities}
        guesses = decoded.split([len(x) for _, x in parts])
        for (name, tokens), guess in zip(parts, guesses, strict=True):
            terms[name].append((guess - tokens).pow(2).mean()[None])
        pairs = zip(terms.items(), self.spread, strict=True)
        return {f"loss_{name}": torch.cat(errors) / spread for (name, errors), spread in pairs}

    def release_loss(self, subjects):
        """The released objective of each subject (B,): one mean over all positions, those of
        patches that a scan does not have included (as zeros), targets normalized over channels."""
        full = torch.arange(1, 1 + self.config.data_tokens, device=self.pos_embed.device)
        decoded = self.decode(self.norm(self.encode(subjects)), [full] * len(subjects))
        decoded = decoded.unflatten(0, (len(subjects), -1))
        target = torch.zeros_like(decoded)
        for one, subject in zip(target, subjects, strict=True):
            one[self.rows(subject) - 1] = data_of(subject).to(one)
        return (decoded - normalized(target)).pow(2).mean((1, 2))

    @torch.no_grad()
    def fit_means(self, subjects):
        """Take the mean token of each place, and the variance around it, from these subjects."""
        total, square = torch.zeros_like(self.mean_tokens), torch.zeros_like(self.mean_tokens)
        count = total.new_zeros(len(total), 1)
        for subject in subjects:
            rows, data = self.rows(subject) - 1, data_of(subject)
            total[rows] += data
            square[rows] += data**2
            count[rows] += 1
        self.mean_tokens.copy_(total / count.clamp(min=1))
        left = (square - count * self.mean_tokens**2).mean(1)
        parts = zip(*(x.split(self.config.places) for x in (left, count)), strict=True)
        for i, (part, n) in enumerate(parts):
            if n.any():
                self.spread[i] = (part.sum() / n.sum()).clamp(min=1e-6)


def data_of(subject: dict) -> torch.Tensor:
    """Data tokens (n, width) of a subject, one modality behind the other."""
    return torch.cat([tokens for tokens, _ in subject.values()])


def line_positions(tokens: int, width: int):
    """Fixed positions (1, 1 + tokens, width) along one line; CLS is zero."""
    return torch.cat([torch.zeros(1, width), sincos(torch.arange(tokens), width).float()])[None]
