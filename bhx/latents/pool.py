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


def pool(latents: xr.Dataset, how: str = "mean", *, of: str = "hub", weights=None) -> xr.Dataset:
    """One feature vector a subject, from the hub tokens or an encoder's; lazy when the latents are.

    Parameters
    ----------
    latents : Dataset with `hub` (subject, token, feature); with embed(..., keep=) also the tokens
        of encoders, such as `dynamics` and `structure`
    how : "mean" over tokens, "concatenate" (token-major), or "weighted"
    of : "hub", or the variable with a modality's tokens: "dynamics" (a token is a parcel, its mean
        over patches), "structure" (a token is a cube), ...
    weights : DataArray over `token` (and `subject`), not negative; for "weighted" only: the mean
        over tokens under these weights, say a modality's share or a trained pooling's attention

    Returns
    -------
    Dataset with `features` (subject, feature), the subjects' coordinates, and attrs["name"]
    """
    check_choice("of", of, ("hub", *(m.tokens for m in MODALITIES.values())))
    check_choice("how", how, ("mean", "concatenate", "weighted"))
    if (weights is not None) != (how == "weighted"):
        fact = f"Expected weights with how='weighted' and only then, found how='{how}'"
        raise InputError(fact, "Give both or neither: pool(latents, 'weighted', weights=...)")
    tokens = _as_tokens(check(latents, "latents"), of)
    if how == "concatenate":
        features = tokens.stack(flat=("token", "feature"))
        features = features.drop_vars(["flat", "token", "feature"]).rename(flat="feature")
    elif how == "weighted":
        features = tokens.weighted(weights.fillna(0)).mean("token", keep_attrs=True)
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


def project(data: xr.Dataset, *, n: int = 2, method: str = "pca", fit_on=None, seed: int = 0):
    """Subjects in a few dimensions.

    Parameters
    ----------
    data : features, or latents (then their mean over tokens)
    n : components
    method : "pca", or "umap" (the extra `bhx[umap]`)
    fit_on : subject ids or a boolean mask; the others are only carried into the fitted space
    seed : of UMAP; PCA has no randomness, and its signs make each component's largest loading
        positive

    Returns
    -------
    DataArray (subject, component), with the subjects' coordinates; for PCA also `explained`
    (component), the share of the fitted subjects' variance
    """
    features = features_of(data)
    chosen = subject_mask(features, fit_on)
    values = np.asarray(features, float)
    if not 1 <= n <= min(chosen.sum(), values.shape[1]):
        fact = f"Expected 1 to {min(chosen.sum(), values.shape[1])} components of {chosen.sum()} "
        fact += f"subjects with {values.shape[1]} features, found n={n}"
        raise InputError(fact, "Ask for fewer components, or fit on more subjects")
    fitted = _reducer(method, n, seed).fit(values[chosen])
    out = xr.DataArray(
        fitted.transform(values),
        subject_coords(features) | {"component": np.arange(1, n + 1)},
        ("subject", "component"),
        name="projection",
        attrs={"long_name": method.upper(), "method": method, "seed": seed},
    )
    if method == "pca":
        out = out.assign_coords(explained=("component", fitted.explained_variance_ratio_))
    return out


def _reducer(method, n, seed):
    check_choice("method", method, ("pca", "umap"))
    if method == "pca":
        from sklearn.decomposition import PCA

        return PCA(n, svd_solver="full")
    try:
        from umap import UMAP
    except ImportError as error:
        raise InputError(
            "Expected the package umap-learn for method='umap', found none",
            "Install it with pip install 'bhx[umap]', or take method='pca'",
        ) from error
    return UMAP(n_components=n, random_state=seed, n_jobs=1)


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
