"""The files of a derivatives folder: found, joined with phenotypes, and written for teaching."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from bhx.data.atlas import load_atlas
from bhx.data.files import attempt
from bhx.errors import InputError, listed
from bhx.modalities.bold import BOLD
from bhx.modalities.t1 import ANATOMY
from bhx.modalities.table import MODALITIES
from bhx.schema import subject_coords, who_has

SESSION = ["sub", "ses"]
RUN = ["sub", "ses", "run"]
RUN_FILE, CONFOUNDS = BOLD.files
IMAGE, MASK = ANATOMY.files


def find_scans(folder, *, task: str = "rest", phenotypes=None) -> pd.DataFrame:
    """The scans in a folder of derivatives (fMRIPrep, sMRIPrep, XCP-D names), one row each.

    Parameters
    ----------
    folder : BIDS derivatives, with participants.tsv or without
    task : of the BOLD runs
    phenotypes : another table of participants, with a column `participant_id`

    Returns
    -------
    DataFrame with `subject` (participant[/session][/run]), `participant`, `session`, `run`, the
    paths `bold`, `confounds`, `t1`, `t1_mask` ("" where there is none), and the phenotypes. A run
    that comes in several forms counts once: parcel table, then CIFTI, surface, volume.
    """
    folder = Path(folder)
    if not folder.is_dir():
        fact = f"Expected a folder of derivatives, found none at {folder}"
        raise InputError(fact, "Give the folder that holds dataset_description.json or sub-*")
    found = [_described(file) for file in _files_below(folder)]
    files = pd.DataFrame(found, columns=[*RUN, "task", "space", "kind", "rank", "path"])
    files = files[files.kind != ""].sort_values("rank", kind="stable")

    def the_best(kind, keys):
        of_kind = files[(files.kind == kind) & files.task.isin(["", task])].drop_duplicates(keys)
        return of_kind[[*keys, "path"]].rename(columns={"path": kind})

    anatomy = the_best(IMAGE, [*SESSION, "space"]).drop_duplicates(SESSION)
    anatomy = anatomy.merge(the_best(MASK, [*SESSION, "space"]), "left").drop(columns="space")
    runs = the_best(RUN_FILE, RUN).merge(the_best(CONFOUNDS, RUN), "left")
    alone = anatomy[~anatomy["sub"].isin(runs["sub"])]
    rows = pd.concat([runs.merge(anatomy, "left"), alone])
    first = anatomy.drop_duplicates("sub").set_index("sub")  # for sessions without their own
    without = rows[IMAGE].isna()
    for kind in ANATOMY.files:
        rows[kind] = rows[kind].mask(without, rows["sub"].map(first[kind]))
    rows = rows.fillna("").sort_values(RUN).reset_index(drop=True)
    if rows.empty:
        tasks = sorted({*files.task[files.kind == RUN_FILE]})
        fact = f"Expected BOLD of task-{task} or T1 in MNI152 space below {folder}, found tasks: "
        help = "Name another task, or run the pipeline with --output-spaces MNI152NLin6Asym"
        raise InputError(fact + (listed(tasks) or "none"), help)
    runs = rows[RUN].to_dict("records")
    rows.insert(0, "subject", ["/".join(f"{k}-{v}" for k, v in run.items() if v) for run in runs])
    rows["sub"] = "sub-" + rows["sub"]
    rows = rows.rename(columns={"sub": "participant", "ses": "session"})
    return with_participants(rows, folder, phenotypes)


def reserved() -> set[str]:
    """Names of a cohort that no column of phenotypes may have."""
    names = {"subject", "participant", "tr", "n_volumes", "coverage", "warnings"}
    names |= {"homotopy", "bold_scale", "n_scrubbed"}
    return names | {name for m in MODALITIES.values() for name in (m.variable, m.has, *m.dims)}


def with_participants(scans: pd.DataFrame, folder: Path, phenotypes=None) -> pd.DataFrame:
    """Rows of scans with phenotypes, else with those of the folder's participants.tsv if any."""
    if phenotypes is None and (folder / "participants.tsv").is_file():
        phenotypes = folder / "participants.tsv"
    return scans if phenotypes is None else join_phenotypes(scans, phenotypes)


def join_phenotypes(scans: pd.DataFrame, phenotypes) -> pd.DataFrame:
    """Rows of scans with their participants' columns; a participant without a line gets blanks.

    `phenotypes` is a DataFrame or the path of a table (.tsv, .csv) with a column participant_id,
    with or without "sub-".
    """
    if not isinstance(phenotypes, pd.DataFrame):
        phenotypes = read_participants(phenotypes)
    if "participant_id" not in phenotypes:
        fact = f"Expected a column participant_id, found {listed(phenotypes.columns, 20)}"
        raise InputError(fact, "Name the column of ids participant_id")
    people = phenotypes.assign(participant_id=phenotypes["participant_id"].astype(str).str.strip())
    bare = people["participant_id"].str.removeprefix("sub-")
    if bare.duplicated().any():
        fact = (
            f"Expected one line a participant, found several for {listed(bare[bare.duplicated()])}"
        )
        raise InputError(fact, "Keep one, and give what differs between scans in a table of scans")
    if taken := {*scans.columns, *reserved()} & {*people.columns}:
        fact = f"Expected columns that bhx does not use itself, found {listed(sorted(taken))}"
        raise InputError(fact, "Rename these columns in the table of participants")
    people = people.drop(columns="participant_id").set_index(bare)
    key = scans["participant"].str.removeprefix("sub-")
    if not key.isin(people.index).any():
        found = f"ids like {listed(people.index, 3)} for participants like {listed(key, 3)}"
        fact = f"Expected phenotypes of these participants, found {found}"
        raise InputError(fact, "Write the ids in both as the folders do, with or without sub-")
    return pd.concat([scans, people.reindex(key).set_index(scans.index)], axis=1)


def read_participants(path) -> pd.DataFrame:
    """A table of participants; "n/a" and empty cells are missing."""
    separator = "," if ".csv" in Path(path).name else "\t"
    help = "Write it as UTF-8 text with one line of column names"
    with attempt(f"a table of participants in {path}", help):
        ids = {"participant_id": str}
        return pd.read_csv(path, sep=separator, encoding="utf-8-sig", dtype=ids)


def _described(file):
    """What a file's name says: whose it is, of what kind ("" for none of ours), and how good."""
    tags = dict(re.findall(r"(?:^|_)([a-zA-Z]+)-([^_.]+)", file.name))
    kind, rank = "", 0
    if forms := [i for i, form in enumerate(BOLD_FORMS) if re.search(form, file.name)]:
        kind, rank = RUN_FILE, forms[0]
    elif file.name.endswith("desc-confounds_timeseries.tsv"):
        kind = CONFOUNDS
    elif tags.get("space", "").startswith("MNI152") and "task" not in tags:
        last = re.search(r"_(T1w|desc-brain_mask)\.nii(\.gz)?$", file.name)
        kind = {"T1w": IMAGE, "desc-brain_mask": MASK}[last[1]] if last else ""
        rank = int("NLin6" not in tags["space"])  # FSL's space first
    named = {key: tags.get(key, "") for key in [*RUN, "task", "space"]}
    return {**named, "kind": kind if "sub" in tags else "", "rank": rank, "path": str(file)}


BOLD_FORMS = (  # the best first; the right hemisphere is found from the left
    r"Schaefer.*(timeseries|bold).*\.(tsv|csv)(\.gz)?$",
    r"\.ptseries\.nii$",
    r"bold.*\.dtseries\.nii$",
    r"hemi-L.*space-(fsLR|fsaverage5).*bold.*\.gii$",
    r"space-MNI.*desc-(preproc|denoised|clean)_bold\.nii(\.gz)?$",
)


def _files_below(folder):
    """Files in name order; folders behind links too, each once, so that a loop of links ends."""
    seen = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(where)) in seen:
            folders.clear()
        else:
            yield from (Path(where, name) for name in sorted(files))
        seen.add(real)


def write_derivatives(cohort, folder, *, surface: bool = True) -> Path:
    """Write a cohort as a folder such as fMRIPrep leaves, for teaching and tests.

    Parameters
    ----------
    cohort : of a Schaefer atlas, with BOLD, T1 or both
    folder : a new folder
    surface : BOLD as fsaverage5 surfaces whose vertices share their parcel's series; False writes
        parcel tables as XCP-D does

    Returns
    -------
    The folder: participants.tsv; under each participant func/ (BOLD, sidecar, confounds of pure
    noise) and anat/ (T1 in MNI152NLin6Asym, and its mask).
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    labels = [n for n in subject_coords(cohort) if n not in {*reserved(), "session", "run"}]
    runs, images = BOLD.variable, ANATOMY.variable
    has = {v: who_has(cohort, v) & (v in cohort) for v in (runs, images)}
    people = []
    for i in range(cohort.sizes["subject"]):
        row = cohort.isel(subject=i)
        name = "sub-" + re.sub("[^a-zA-Z0-9]", "", str(row.participant.values).removeprefix("sub-"))
        run = f"{name}_task-rest"
        for part in ("func", "anat"):
            (folder / name / part).mkdir(parents=True)
        if has[runs][i]:
            bold = row[runs].isel(time=slice(0, int(row.n_volumes))).transpose(*BOLD.dims)
            _write_bold(bold.compute(), folder / name / "func" / run, float(row.tr), surface)
        if has[images][i]:
            stem = folder / name / "anat" / f"{name}_space-MNI152NLin6Asym"
            _write_t1(row[images].compute(), stem)
        people.append({"participant_id": name, **{n: row[n].values.item() for n in labels}})
    table = pd.DataFrame(people).drop_duplicates("participant_id")
    table.to_csv(folder / "participants.tsv", sep="\t", index=False, na_rep="n/a")
    return folder


def _write_bold(bold, stem, tr, surface):
    """One run, its sidecars, and confounds as fMRIPrep names them."""
    names = []
    if surface:
        atlas = load_atlas(bold.attrs.get("atlas", f"schaefer{bold.sizes['roi']}"))
        atlas = atlas.sel(roi=bold.roi)
        paint = np.zeros((int(atlas.label.max()) + 1, bold.sizes["time"]), "float32")
        paint[atlas.label.values] = 1000 + bold.values
        paint[0] = 0
        for hemi, vertices in zip("LR", np.split(atlas.labels_fsaverage5.values, 2), strict=True):
            about = {"intent": "NIFTI_INTENT_TIME_SERIES", "meta": {"TimeStep": f"{1000 * tr}"}}
            volumes = [nib.gifti.GiftiDataArray(v, **about) for v in paint[vertices].T]
            names.append(f"{stem.name}_hemi-{hemi}_space-fsaverage5_bold")
            nib.save(nib.GiftiImage(darrays=volumes), stem.with_name(names[-1] + ".func.gii"))
    else:
        names = [f"{stem.name}_space-MNI152NLin6Asym_atlas-Schaefer_timeseries"]
        columns = [name.split("_", 1)[1] for name in bold.roi.values]
        table = pd.DataFrame(bold.values.T, columns=columns)
        table.to_csv(stem.with_name(names[0] + ".tsv"), sep="\t", index=False)
    for name in names:
        stem.with_name(name + ".json").write_text(f'{{"RepetitionTime": {tr}}}')
    rng = np.random.default_rng(bold.sizes["time"])
    n, kinds = bold.sizes["time"], ("", "_derivative1", "_power2", "_derivative1_power2")
    motion = [f"{m}_{axis}{k}" for m in ("trans", "rot") for axis in "xyz" for k in kinds]
    columns = ["framewise_displacement", "csf", "white_matter", *motion]
    noise = pd.DataFrame(np.abs(rng.standard_normal((n, len(columns)))) / 10, columns=columns)
    noise["cosine00"] = np.cos(np.pi * (np.arange(n) + 0.5) / n)
    file = stem.with_name(f"{stem.name}_desc-confounds_timeseries.tsv")
    noise.to_csv(file, sep="\t", index=False)


def _write_t1(t1, stem):
    """A T1 in MNI152 space with its brain mask."""
    affine = np.diag([*(float(t1[a][1] - t1[a][0]) for a in "xyz"), 1.0])
    affine[:3, 3] = [float(t1[a][0]) for a in "xyz"]
    for name, values in {"desc-preproc_T1w": t1.values, "desc-brain_mask": t1.values > 0}.items():
        image = nib.Nifti1Image(values.astype("float32"), affine)
        image.header.set_xyzt_units("mm")
        nib.save(image, stem.with_name(f"{stem.name}_{name}.nii.gz"))
