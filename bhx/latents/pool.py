"""One vector a subject: pool hub tokens or an encoder's, and project them to a few dimensions.

Every function takes plain xarray objects and returns one, with the subjects' labels kept. No
weights are read here and nothing is drawn.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from bhx.errors import InputError, check_choice, listed
from bhx.modalities.table import MODALITIES
from bhx.schema import check, subject_coords


def pool(latents: xr.Dataset, how: str = "mean", *, of: str = "hub") -> xr.Dataset:
    """One feature vector a subject, from the hub tokens or an encoder's; lazy when the latents are.

    Parameters
    ----------
    latents : Dataset with `hub` (subject, token, feature); with embed(..., keep=) also the tokens
        of encoders, such as `dynamics` and `structure`
    how : "mean" over tokens, or "concatenate" (token-major)
    of : "hub", or the variable with a modality's tokens: "dynamics" (a token is a parcel, its mean
        over patches), "structure" (a token is a cube), ...

    Returns
    -------
    Dataset with `features` (subject, feature), the subjects' coordinates, and attrs["name"]
    """
    check_choice("of", of, ("hub", *(m.tokens for m in MODALITIES.values())))
    check_choice("how", how, ("mean", "concatenate"))
    tokens = _as_tokens(check(latents, "latents"), of)
    if how == "concatenate":
        features = tokens.stack(flat=("token", "feature"))
        features = features.drop_vars(["flat", "token", "feature"]).rename(flat="feature")
    else:
        features = tokens.mean("token", keep_attrs=True)
    features = features.transpose("subject", "feature").astype("float32")
    features = features.reset_coords(drop=True).assign_coords(subject_coords(tokens))
    out = features.to_dataset(name="features")
    out.attrs = latents.attrs | {"name": f"{of} tokens, {how}"}
    return check(out, "features")


def _as_tokens(latents, of):
    """(subject, token, feature) of what `pool` reads; a modality's map says what a token is."""
    if of not in latents:
        fact = f"Expected latents with '{of}', found {listed(latents.data_vars, 20)}"
        raise InputError(fact, f"Keep them: embed(..., keep=('{of}',))")
    if of == "hub":
        return latents.hub
    kind = next(m for m in MODALITIES.values() if m.tokens == of)
    tokens = latents[of].mean([d for d in kind.token_dims if d not in kind.map_dims])
    tokens = tokens.stack(token=kind.map_dims).reset_index("token", drop=True)
    return tokens.drop_vars([n for n, c in tokens.coords.items() if "token" in c.dims])


def project(data: xr.Dataset, *, n: int = 2, fit_on=None) -> xr.DataArray:
    """Subjects in the few dimensions in which they differ most (principal components, PCA).

    Parameters
    ----------
    data : features, or latents (then their mean over tokens)
    n : components; their signs make each one's largest loading positive
    fit_on : subject ids or a boolean mask; the others are only carried into the fitted space

    Returns
    -------
    DataArray (subject, component), with the subjects' coordinates and `explained` (component),
    the share of the fitted subjects' variance
    """
    from sklearn.decomposition import PCA

    features = features_of(data)
    chosen = subject_mask(features, fit_on)
    values = np.asarray(features, float)
    if not 1 <= n <= min(chosen.sum(), values.shape[1]):
        fact = f"Expected 1 to {min(chosen.sum(), values.shape[1])} components of {chosen.sum()} "
        fact += f"subjects with {values.shape[1]} features, found n={n}"
        raise InputError(fact, "Ask for fewer components, or fit on more subjects")
    fitted = PCA(n, svd_solver="full").fit(values[chosen])
    coords = subject_coords(features) | {
        "component": np.arange(1, n + 1),
        "explained": ("component", fitted.explained_variance_ratio_),
    }
    dims, attrs = ("subject", "component"), {"long_name": "PCA"}
    return xr.DataArray(fitted.transform(values), coords, dims, "projection", attrs)


def features_of(data):
    """The DataArray (subject, feature) of features, or of latents' mean token."""
    if not isinstance(data, xr.Dataset) or "features" not in data:
        data = pool(data)
    return check(data, "features")["features"]


def subject_mask(data, subjects):
    """A boolean mask over the subjects from ids, a mask, or None for all."""
    ids = data.indexes["subject"]
    if subjects is None:
        return np.ones(len(ids), bool)
    subjects = np.atleast_1d(np.asarray(subjects))
    if subjects.dtype == bool:
        if subjects.shape != (len(ids),):
            fact = f"Expected a mask over {len(ids)} subjects, found one of length {len(subjects)}"
            raise InputError(fact, "Make it from the same Dataset: latents.site == 'A'")
        if not subjects.any():
            raise InputError("Expected at least one subject, found none", "Select some, or None")
        return subjects
    unknown = [s for s in subjects if s not in ids]
    if unknown or not len(subjects):
        fact = f"Expected ids among {listed(ids, 3)}, found {listed(unknown) or 'no ids'}"
        raise InputError(fact, "See latents.subject")
    return ids.isin(subjects)


def row_of(data, subject):
    """Position of a subject."""
    return int(subject_mask(data, [subject]).argmax())


def standardized(values):
    """Rows with mean 0 and length 1; constant rows become 0."""
    values = values - values.mean(-1, keepdims=True)
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.where(length > 0, length, 1)
