"""The files of a derivatives folder: found, joined with phenotypes, and written for teaching."""

from __future__ import annotations

import os
import re
from pathlib import Path
from zipfile import is_zipfile

import nibabel as nib
import numpy as np
import pandas as pd

from bhx.data.atlas import load_atlas
from bhx.data.files import FORM, attempt, entities, space_of
from bhx.data.labels import as_words, tidy
from bhx.errors import InputError, listed
from bhx.modalities.bold import BOLD
from bhx.modalities.t1 import ANATOMY
from bhx.modalities.table import MODALITIES
from bhx.schema import is_missing, subject_coords, taken_names, who_has

RUN_FILE, CONFOUNDS = BOLD.files
IMAGE, MASK = ANATOMY.files
FACTS = {"tr", "n_volumes", "coverage", "warnings", "homotopy", "bold_scale"}
FACTS |= {"n_scrubbed", "dof", "inputs"}  # what reading finds out about a row
NOT_RUN = FORM | {"sub", "ses", "task"}
BOLD_FORMS = (  # the best first; the right hemisphere is found from the left
    r"(Schaefer|atlas-|seg-).*_(timeseries|bold)\.(tsv|csv)(\.gz)?$",
    r"\.ptseries\.nii$",
    r"bold.*\.dtseries\.nii$",
    r"^(?=.*hemi-L)(?=.*space-(fsLR|fsaverage)).*bold.*\.gii$",
    r"space-MNI.*desc-(preproc|denoised|clean)_bold\.nii(\.gz)?$",
)
TABLES, CIFTI, SURFACE, VOLUME = (0, 1), 2, 3, 4
SURFACES = r"fsLR:(32k)?|fsaverage5:(10k)?|fsaverage:10k"  # space:den that are read
CONFOUND_FORMS = (
    r"desc-confounds_(timeseries|regressors)\.tsv$",
    r"_confounds\.tsv$",
    r"(?<!desc-filtered)_motion\.tsv$",
    r"_motion\.tsv$",
)


def find_scans(
    folder, *, task: str = "rest", phenotypes=None, atlas: str | None = "schaefer400"
) -> pd.DataFrame:
    """The scans in a folder of derivatives (fMRIPrep, sMRIPrep, XCP-D names), one row each.

    Parameters
    ----------
    folder : BIDS derivatives, with participants.tsv or without
    task : of the BOLD runs
    phenotypes : another table of participants, with a column `participant_id`
    atlas : its tables go before those of other parcellations; None takes the first

    Returns
    -------
    DataFrame with `subject` (participant[/session][/run]), `participant`, `session`, `run`, the
    paths `bold`, `confounds`, `t1`, `t1_mask` ("" where there is none), and the phenotypes. Runs
    that differ in another entity of their names (dir-AP) have it in `subject` and in a column. A
    run in several forms counts once: parcel table, then CIFTI, surface, volume; MNI152NLin6Asym
    before other spaces. What was left out is named in `attrs["notes"]`.
    """
    folder, notes = Path(folder), []
    if not folder.is_dir():
        is_zip = folder.is_file() and is_zipfile(folder)
        fact = (
            f"Expected a folder of derivatives, found {'a zip' if is_zip else 'none'} at {folder}"
        )
        help = "Give the folder that holds dataset_description.json or sub-*"
        raise InputError(fact, "Unzip it, and give the folder inside" if is_zip else help)
    fits = _tables_of(atlas)
    described = [_described(file, fits) for file in _files_below(folder, notes)]
    files = sorted(filter(None, described), key=lambda file: file["rank"])
    best: dict[tuple, dict] = {}
    for file in files:
        if file["task"] in ("", task):
            best.setdefault((file["kind"], *file["key"]), file)
            best.setdefault((file["kind"], file["sub"]), file)  # for sessions without their own
    runs = [f for key, f in best.items() if key[0] == RUN_FILE and len(key) > 2]
    ids = {run["key"] for run in runs}
    runs = [run for run in runs if run["combined"] == run["key"] or run["combined"] not in ids]
    alone = [f for k, f in best.items() if k[0] == IMAGE and len(k) > 2]
    alone = [image for image in alone if (RUN_FILE, image["sub"]) not in best]
    rows = [_row(file, best) for file in [*runs, *alone]]
    if not rows:
        tasks = sorted({file["task"] for file in files if file["kind"] == RUN_FILE})
        fact = f"Expected BOLD of task-{task} or T1 in MNI152 space below {folder}, found tasks: "
        help = "Name another task, or run the pipeline with --output-spaces MNI152NLin6Asym"
        raise InputError(fact + (listed(tasks) or "none"), help)
    for file in files:
        first = best.get((file["kind"], *file["key"]), file)
        if file["kind"] == IMAGE and file["run"] != first["run"]:
            notes.append(f"of several T1, {first['path']} is taken, {file['path']} left out")
    table = pd.DataFrame(rows).fillna("").sort_values("subject", ignore_index=True)
    table.attrs["notes"] = notes
    return with_participants(table, folder, phenotypes)


def _row(file, best):
    """The row of one run, or of one T1 of somebody without runs, with the files that go with it."""
    sub, ses, *_ = file["key"]
    image = best.get((IMAGE, sub, ses)) or best.get((IMAGE, sub), {"path": ""})
    mask = best.get((MASK, *image.get("masked", ())), {"path": ""})
    is_run = file["kind"] == RUN_FILE
    names = [f"sub-{sub}", ses and f"ses-{ses}", *(file["run"] if is_run else ())]
    return {
        "subject": "/".join(filter(None, names)),
        "participant": f"sub-{sub}",
        "session": ses,
        "run": "",
        **(dict(name.split("-", 1) for name in file["run"]) if is_run else {}),
        RUN_FILE: file["path"] if is_run else "",
        CONFOUNDS: best.get((CONFOUNDS, *file["combined"]), {"path": ""})["path"],
        IMAGE: image["path"],
        MASK: mask["path"],
    }


def _described(file, fits):
    """What a file's name says: whose it is, of what kind, and how good; None for none of ours."""
    tags = entities(file.name)
    if "sub" not in tags or tags.get("part") == "phase" or tags.get("stat", "mean") != "mean":
        return None
    space, den = space_of(file.name), tags.get("den", "")
    kind, rank = "", 0.0
    if forms := [i for i, form in enumerate(BOLD_FORMS) if re.search(form, file.name)]:
        kind, form = RUN_FILE, forms[0]
        usable = {
            CIFTI: den in ("", "32k", "91k"),
            SURFACE: re.fullmatch(SURFACES, f"{space}:{den}"),
            VOLUME: space.startswith("MNI152"),
        }.get(form) or (form in TABLES and fits(tags))
        rank = form + 10 * (not usable) + 0.5 * (form == VOLUME and "NLin6" not in space)
    elif forms := [i for i, form in enumerate(CONFOUND_FORMS) if re.search(form, file.name)]:
        kind, rank = CONFOUNDS, forms[0]
    elif space.startswith("MNI152") and "task" not in tags:
        last = re.search(r"_(T1w|desc-brain_mask)\.nii(\.gz)?$", file.name)
        kind = {"T1w": IMAGE, "desc-brain_mask": MASK}[last[1]] if last else ""
        rank = int("NLin6" not in space)  # FSL's space first
    if not kind:
        return None
    tags["run"] = re.sub(r"^0+(?=\d)", "", tags.get("run", ""))
    others = [f"{k}-{v}" for k, v in sorted(tags.items()) if k not in NOT_RUN and v]
    whole = [name for name in others if not name.startswith(("echo-", "part-"))]
    who = (tags["sub"], tags.get("ses", ""))
    masked = (*who, space, tags.get("res", ""), *others)
    key = {IMAGE: who, MASK: masked}.get(kind, (*who, *others))
    about = {"kind": kind, "rank": rank, "key": key, "run": others, "path": str(file)}
    about |= {"combined": (*who, *whole), "masked": masked}
    return about | {"sub": tags["sub"], "task": tags.get("task", "")}


def _tables_of(atlas):
    """Whether the entities of a parcel table may name an atlas: a function of them."""
    if atlas is None:
        return lambda tags: True
    parcels = load_atlas(atlas)
    name, n = parcels.attrs["atlas"], parcels.sizes["roi"]
    known = rf"(?i)^{re.escape(name)}_"
    if name.startswith("schaefer"):  # XCP-D: 4S456Parcels, or Schaefer417 for 400 in 17 networks
        known += rf"|^4S{n + 56}P|^Schaefer({n}|{n + 17})?(?!\d)|^Schaefer2018.*\D{n}P"

    def fits(tags):
        said = tags.get("seg") or tags.get("atlas")
        return not said or bool(re.search(known, f"{said}_{tags.get('desc', '')}"))

    return fits


def reserved() -> set[str]:
    """Names of a cohort that no column of phenotypes may have."""
    return {"subject", "participant", *FACTS, *taken_names(), *(m.has for m in MODALITIES.values())}


def with_participants(scans: pd.DataFrame, folder: Path, phenotypes=None) -> pd.DataFrame:
    """Rows of scans with phenotypes, else with those of the folder's participants.tsv if any."""
    if phenotypes is None and (folder / "participants.tsv").is_file():
        phenotypes = folder / "participants.tsv"
    return scans if phenotypes is None else join_phenotypes(scans, phenotypes)


def join_phenotypes(scans: pd.DataFrame, phenotypes) -> pd.DataFrame:
    """Rows of scans with their participants' columns; a participant without a line gets blanks.

    `phenotypes` is a DataFrame or the path of a table (.tsv, .csv) with a column participant_id,
    with or without "sub-"; leading zeros that ids have lost are found again where that is clear.
    `attrs["notes"]` says so, and names participants without a line.
    """
    if not isinstance(phenotypes, pd.DataFrame):
        phenotypes = read_participants(phenotypes)
    people = phenotypes.rename(columns=lambda name: str(name).strip())
    if "participant_id" not in people:
        fact = f"Expected a column participant_id, found {listed(people.columns, 20)}"
        raise InputError(fact, "Name the column of ids participant_id")
    people = people[~people.apply(is_missing).all(axis=1)].reset_index(drop=True)
    bare = as_words(people["participant_id"]).str.removeprefix("sub-")
    if twice := sorted({*bare[bare.duplicated()]}):
        fact = f"Expected one line a participant, found several for {listed(twice) or 'no id'}"
        raise InputError(fact, "Keep one, and give what differs between scans in a table of scans")
    if taken := {*scans.columns, *reserved()} & {*people.columns}:
        fact = f"Expected columns that bhx does not use itself, found {listed(sorted(taken))}"
        help = "Rename these columns in the table of participants; taken are "
        raise InputError(fact, help + listed(sorted(reserved()), 99))
    people, notes = tidy(people.drop(columns="participant_id").set_index(bare), missing=())
    key = scans["participant"].str.removeprefix("sub-")
    short = [number.lstrip("0") for number in bare]
    again = {n: i for n, i in zip(short, bare, strict=True) if n.isdigit() and short.count(n) == 1}
    asked = {k.lstrip("0") for k in key.unique()}
    lost = ~key.isin(bare)
    if len(asked) == key.nunique():
        key = key.where(~lost, key.str.lstrip("0").map(again).fillna(key))
    if found := sorted({*key[lost & key.isin(bare)]}):
        notes.append(f"ids {listed(found)} of {len(found)} participants lack zeros in one place")
    blank = sorted({*key[~key.isin(bare)]})
    if len(blank) == key.nunique():
        found = f"ids like {listed(bare, 3)} for participants like {listed(key, 3)}"
        fact = f"Expected phenotypes of these participants, found {found}"
        raise InputError(fact, "Write the ids in both as the folders do, with or without sub-")
    if blank:
        notes.append(f"no line in the table of participants for {len(blank)}: {listed(blank)}")
    out = pd.concat([scans, people.reindex(key).set_index(scans.index)], axis=1)
    out.attrs["notes"] = [*scans.attrs.get("notes", []), *notes]
    return out


def read_participants(path) -> pd.DataFrame:
    """A table of participants as text; what is missing is what `is_missing` says."""
    separator = "," if ".csv" in Path(path).name else "\t"
    help = "Write it as UTF-8 text with one line of column names"
    with attempt(f"a table of participants in {path}", help):
        options = {"encoding": "utf-8-sig", "dtype": str, "keep_default_na": False}
        return pd.read_csv(path, sep=separator, **options)


def _files_below(folder, notes):
    """Files in name order; folders behind links too, each once, so that a loop of links ends.
    What cannot be listed, and the "._" files of macOS, are noted."""
    seen, closed, apple = set(), [], []
    for where, folders, files in os.walk(folder, followlinks=True, onerror=closed.append):
        folders.sort()
        if (real := os.path.realpath(where)) in seen:
            folders.clear()
        else:
            apple += [name for name in files if name.startswith("._")]
            yield from (Path(where, n) for n in sorted(files) if not n.startswith("._"))
        seen.add(real)
    notes += [f"the folder {e.filename} cannot be read: {e.strerror}" for e in closed]
    if apple:
        notes.append(f"{len(apple)} files that macOS leaves are passed over: {listed(apple, 3)}")


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
