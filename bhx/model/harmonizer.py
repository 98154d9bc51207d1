"""The harmonizer: dynamics and structure tokens fused into hub tokens, and the reconstruction
that trains it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from bhx.errors import InputError
from bhx.model.layers import Block, attention_weights, initialise, run, sincos


@dataclass(frozen=True)
class HarmonizerConfig:
    """Sizes of the harmonizer; the defaults are the released ("base") ones."""

    parcels: int = 400
    max_patches: int = 18
    cubes: int = 1200
    hubs: int = 128
    width: int = 768
    depth: int = 12
    heads: int = 12
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    target_width: int = 768

    @property
    def data_tokens(self) -> int:
        """Rows of the positions after CLS: every dynamics token, then every structure token."""
        return self.parcels * self.max_patches + self.cubes

    def dynamics_rows(self, patches: int):
        """Rows of a scan's tokens (parcels * patches,), parcel by parcel."""
        parcel = torch.arange(self.parcels)[:, None] * self.max_patches
        return (1 + parcel + torch.arange(patches)).flatten()

    def structure_rows(self):
        """Rows of a T1's tokens (cubes,)."""
        return 1 + self.parcels * self.max_patches + torch.arange(self.cubes)

    def is_structure(self, rows):
        """Which rows are a T1's."""
        return rows > self.parcels * self.max_patches


class Harmonizer(nn.Module):
    """A subject's data tokens to hub tokens, and back through the decoder.

    A batch is a list of subjects' tokens [(n_i, width)] and the rows [(n_i,)] of the positions
    they take (HarmonizerConfig.dynamics_rows, structure_rows). What a subject does not have, a
    modality, a patch, a parcel, is simply not among its tokens.
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
        self.register_buffer("spread", torch.ones(2))  # variance around it, of BOLD and of T1
        initialise(self)
        for name in ("cls_token", "mask_token"):
            nn.init.normal_(getattr(self, name), std=0.02)
        for name in ("latent_tokens", "enc_latent_token_positional_embedding",
                     "dec_latent_token_positional_embedding"):  # fmt: skip
            nn.init.normal_(getattr(self, name))  # hub tokens differ from the start
        nn.init.zeros_(self.decoder_pred.weight)  # the decoder begins at `mean_tokens`
        with torch.no_grad():
            for block in self.blocks:  # and so does what each of them reads
                block.attn.qkv.weight[: 2 * c.width] *= 3

    def forward(self, tokens, rows):
        """Hub tokens (B, 1 + hubs, width), CLS first, after the norm."""
        return self.norm(self.encode(tokens, rows))

    def encode(self, tokens, rows):
        """Hub tokens (B, 1 + hubs, width), CLS first, before the norm."""
        x, lengths = self.sequence(tokens, rows)
        x = run(self.blocks, x, lengths)
        return torch.stack([ends(s, self.config.hubs) for s in x.split(lengths)])

    def sequence(self, tokens, rows):
        """Packed [CLS | data tokens | hub] of every subject, and each one's length."""
        hub = self.latent_tokens + self.enc_latent_token_positional_embedding
        cls = (self.cls_token + self.pos_embed[:, :1])[0]
        sequences = []
        for data, at in zip(tokens, rows, strict=True):
            if not len(data):
                raise InputError("Expected a subject with data tokens, found none", "Leave it out")
            sequences.append(torch.cat([cls, data + self.pos_embed[0, at], hub]))
        return torch.cat(sequences), tuple(len(s) for s in sequences)

    @torch.no_grad()
    def attention(self, tokens, rows, method: str | int = "last"):
        """How much each hub token reads each of its subject's data tokens, [(hubs, n_i)].

        `method` is a layer's number, "last", "mean" (over layers), or "rollout" (Abnar & Zuidema,
        arXiv 2005.00928). Heads are averaged; each row sums to 1. Only hub rows, or for the
        rollout blocks of rows, are ever held.
        """
        layers = self.layers_of(method)
        x, lengths = self.sequence(tokens, rows)
        inputs = []
        for block in self.blocks:
            inputs.append(x)
            x = block(x, lengths)
        if method == "rollout":
            maps = self._rollout(inputs, lengths)
        else:
            hub = slice(-self.config.hubs, None)
            each = [self.blocks[i].weights(inputs[i], lengths, hub) for i in layers]
            maps = [
                torch.stack([w.mean(0) for w in one]).mean(0) for one in zip(*each, strict=True)
            ]
        data = [m[:, 1 : -self.config.hubs] for m in maps]
        return [m / m.sum(-1, keepdim=True) for m in data]

    def layers_of(self, method):
        """The layers whose attention a method reads."""
        depth = len(self.blocks)
        if method in ("mean", "rollout"):
            return range(depth)
        if method == "last":
            return [depth - 1]
        if isinstance(method, int) and -depth <= method < depth:
            return [method]
        fact = f"Expected attention of 'last', 'mean', 'rollout' or a layer below {depth}, "
        fact += f"found {method!r}"
        raise InputError(fact, "Choose one of these")

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

    def losses(self, tokens, rows, targets, target_rows):
        """The paper's two terms: the mean squared error of each modality's valid tokens, in units
        of their variance around the mean token of each place, so that neither drowns the other.

        Returns `loss_bold` and `loss_t1`, one value for each subject that has the modality among
        its targets. What is fed in (`tokens`, `rows`) may lack it: the hub tokens must then guess.
        """
        decoded = self.decode(self(tokens, rows), target_rows)
        decoded = decoded.split([len(r) for r in target_rows])
        terms = {"loss_bold": [], "loss_t1": []}
        for guess, target, at in zip(decoded, targets, target_rows, strict=True):
            error = (guess - target).pow(2).mean(-1)
            is_t1 = self.config.is_structure(at)
            chosen = (~is_t1, is_t1)
            for name, here, spread in zip(terms, chosen, self.spread, strict=True):
                if here.any():
                    terms[name].append(error[here].mean() / spread)
        return {k: torch.stack(v) if v else decoded[0].new_zeros(0) for k, v in terms.items()}

    def release_loss(self, tokens, rows):
        """The released objective of each subject (B,): one mean over all positions, those of
        patches that a scan does not have included (as zeros), targets normalised over channels."""
        full = torch.arange(1, 1 + self.config.data_tokens, device=self.pos_embed.device)
        decoded = self.decode(self(tokens, rows), [full] * len(tokens)).unflatten(
            0, (len(tokens), -1)
        )
        target = torch.zeros_like(decoded)
        for one, data, at in zip(target, tokens, rows, strict=True):
            one[at - 1] = data.to(one)
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        return (decoded - (target - mean) / (var + 1e-6).sqrt()).pow(2).mean((1, 2))


def ends(sequence, hubs: int):
    """CLS and the hub tokens of one sequence (N, width)."""
    return torch.cat([sequence[:1], sequence[-hubs:]])


def line_positions(tokens: int, width: int):
    """Fixed positions (1, 1 + tokens, width) along one line; CLS is zero."""
    return torch.cat([torch.zeros(1, width), sincos(torch.arange(tokens), width).float()])[None]
