"""What a modality is: all that the rest of bhx asks of one, and what holds for most of them.

NumPy only. One subject's values go in, arrays come out; labels, tensors and files live elsewhere.
A modality is described by its dims, and whoever works by dims (lesions, maps, alignment, pages)
needs nothing more from it.
"""

from __future__ import annotations

from math import prod

import numpy as np


class Modality:
    """One kind of data of a subject.

    The defaults are those of values per place, dims (place, measure) such as ("roi", "measure"):
    a token is a place, its measures go through a linear embedding.

    Attributes
    ----------
    name : of its tokens in `modality_share`, and of `variable` unless that is another
    variable : of the cohort that it reads
    dims : of one subject's values of that variable
    files : columns of a table of scans that name its files, its own first
    tokens : the variable of latents that keeps its tokens, and its encoder's place in the networks
    token_dims : of one subject's tokens, before `feature`
    map_name, map_dims : of the attention that hub tokens pay to it
    needs : coordinates on subject without which it cannot be read
    encoder : whether `model/` has an encoder of its own for it; else a linear embedding
    partial : whether a place of which only some numbers were measured still makes a token
    least : patches that a scan of it has at least; 1 without time
    components, weight : of the teacher that relational pretraining fits to its `summary`
    """

    name = ""
    dims: tuple[str, ...] = ("roi", "measure")
    files: tuple[str, ...] = ()
    token_dims: tuple[str, ...] = ("roi",)
    needs: tuple[str, ...] = ()
    encoder = False
    partial = False
    least = 1
    components, weight = 48, 1.0

    @property
    def variable(self) -> str:
        """The cohort's variable: the modality's own name, unless it is derived from another."""
        return self.name

    @property
    def has(self) -> str:
        """The coordinate on subject that says who has it."""
        return f"has_{self.variable}"

    @property
    def tokens(self) -> str:
        """Variable of latents, and attribute of the networks."""
        return f"{self.name}_tokens"

    @property
    def map_name(self) -> str:
        """Variable of latents with the attention of each hub token."""
        return f"hub_to_{self.name}"

    @property
    def map_dims(self) -> tuple[str, ...]:
        """Dims of that attention, after (subject, token)."""
        return self.token_dims

    # Checked: what may not be ---

    def check(self, cohort) -> None:
        """Refuse a cohort whose labels do not fit this modality; values are not read."""

    def check_lengths(self, cohort, config) -> None:
        """Refuse subjects of whom not one token can be made; only labels are read."""

    def check_training(self, labels) -> None:
        """Refuse subjects that a model cannot be trained on; only labels are read."""

    def fit(self, cohort, config):
        """The cohort with this modality on the model's grid, lazily, or a refusal."""
        return cohort

    # Read: from one subject's values to inputs of tokens ---

    def trim(self, values: np.ndarray, facts) -> np.ndarray:
        """Values without their padding; `facts` are the subject's coordinates by name."""
        return values

    def scale(self, values, config, *, scaling=None, missing="refuse", names=()) -> np.ndarray:
        """Values as the networks read them, NaN where nothing was measured.

        `scaling` and `missing` are options of `bhx.embed`, `names` those of the places.
        """
        return np.asarray(values, np.float32)

    def cut(self, values: np.ndarray, facts, config) -> list[np.ndarray]:
        """Scaled values as windows (*places, numbers), each read by the hub tokens on its own."""
        return [values.reshape(len(values), -1)]

    def augment(self, values, facts, config, plan, random):
        """Values and facts as training reads them: cropped, thinned; by default as they are."""
        return values, facts

    def summary(self, window: np.ndarray, config) -> np.ndarray:
        """A window (*places, numbers) as one vector that people are compared by."""
        return np.asarray(window).ravel()

    # Placed: where each token sits ---

    def count(self, facts, config) -> int:
        """Windows' patches together: how long the modality is in one subject; 1 without time."""
        return 1

    def places(self, config) -> tuple[int, ...]:
        """Sizes of `token_dims` in one window at most: each place has a position of its own."""
        return (config.places(self.name),)

    def rows(self, config, shape: tuple[int, ...]) -> np.ndarray:
        """Which of all places the tokens of a window of that shape take, flat and in C order."""
        places = self.places(config) if len(shape) > 1 else shape
        return np.arange(prod(places)).reshape(places)[tuple(map(slice, shape))].ravel()

    def so_far(self, running, config, middle, width) -> list[np.ndarray]:
        """What `cut` gives for a scan that is still running (`modalities.running`)."""
        raise NotImplementedError(self.name)

    def join(self, windows: list[np.ndarray], config) -> np.ndarray:
        """Tokens of all windows (*shape, feature) as one array (*token dims, feature)."""
        return windows[0].reshape(*self.places(config), -1)

    def split(self, tokens: np.ndarray, config) -> list[np.ndarray]:
        """Inverse of `join`: tokens (*token dims, feature) as windows (*places, feature)."""
        return [tokens.reshape(-1, tokens.shape[-1])]

    def coords(self, config) -> dict:
        """Coordinates of the token dims: name -> (dim, values, attributes)."""
        return {}

    def about(self, cohort) -> dict:
        """Attributes of latents: what was read, and how it was scaled."""
        return {}

    # Mapped: what attention to its places says ---

    def to_map(self, weights: np.ndarray, config) -> np.ndarray:
        """Attention (hub, place) to the dims of the map: summed over what the map leaves out."""
        spread = weights.reshape(len(weights), *self.places(config))
        gone = [i + 1 for i, dim in enumerate(self.token_dims) if dim not in self.map_dims]
        return spread.sum(tuple(gone))
