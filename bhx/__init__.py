"""bhx: scans -> cohort -> model -> latents -> explore / evaluate.

Only names live here: the public ones, each loaded from its file at first use, so that `import bhx`
costs nothing. `__init__.pyi` repeats them for type checkers. No computation may be here.
"""

from importlib import import_module

from bhx.errors import InputError
from bhx.settings import __version__, folders

# file -> its public names; tests/test_layout.py holds this table and __init__.pyi together
PUBLIC = {
    "modalities.t1": ("t1_grid", "scale_t1", "coarsen_t1"),
    "modalities.table": ("register",),
    "data.atlas": ("load_atlas", "reparcellate", "load_mesh"),
    "data.geometry": ("harmonics",),
    "data.parcellation": ("build_atlas",),
    "data.catalog": ("catalog_table", "load_entry"),
    "data.derivatives": ("find_scans", "write_derivatives"),
    "data.quality_page": ("quality_page",),
    "data.prepare": ("prepare", "read_scan"),
    "data.store": ("save_cohort",),
    "data.splits": ("split",),
    "data.synthetic": ("synthetic_cohort", "Site"),
    "data.cohort": ("open_cohort", "as_cohort", "scan"),
    "model.config": ("PRESETS", "STAND_IN", "build"),
    "model.released": ("write_release",),
    "encode.model": ("load_model", "random_model", "weights_table"),
    "encode.embed": ("embed", "robust_scaling"),
    "encode.stream": ("stream",),
    "train.recipes": ("Recipe",),
    "train.pretrain": ("pretrain",),
    "train.log": ("read_log", "plot_log"),
    "latents.pool": ("pool", "project"),
    "latents.similarity": ("neighbours", "fingerprint", "contrast"),
    "latents.maps": ("region_map", "map_controls", "spin_test"),
    "latents.gradients": ("integrated_gradients",),
    "latents.lesions": ("lesion",),
    "evaluate.features": ("connectome", "cube_means", "nothing", "fuse", "plain_controls"),
    "evaluate.confounds": ("match_subjects",),
    "evaluate.probe": ("probe",),
    "evaluate.scores": ("compare",),
    "evaluate.report": ("report", "made_with", "explained_by", "plot_scores"),
    "evaluate.fine_tuning": ("fine_tune", "FineTuning", "predict", "tuned_model"),
    "show.surface": ("plot_surface",),
    "show.volume": ("plot_volume",),
    "show.tokens": ("plot_tokens", "token_table"),
    "show.people": ("plot_latents",),
    "show.hidden": ("hidden_cubes", "hidden_tokens", "live"),
    "show.answers": ("check_answer",),
    "show.figures": ("check_figure",),
    "show.explorer": ("explore",),
}
_FILE_OF = {name: file for file, names in PUBLIC.items() for name in names}
__all__ = ["InputError", "__version__", "folders", *_FILE_OF]


def __getattr__(name: str):
    if name not in _FILE_OF:
        raise AttributeError(f"bhx has no '{name}'. dir(bhx) lists the public names.")
    globals()[name] = found = getattr(import_module(f"bhx.{_FILE_OF[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_FILE_OF})
