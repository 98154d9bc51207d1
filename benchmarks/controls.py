"""Every control beside the tokens of the shipped weights, for four labels of the synthetic cohort.

    python benchmarks/controls.py

The same subjects in the same folds (five, stratified by site), every step fitted in the fold;
intervals over participants. About two minutes on one core.
"""

from __future__ import annotations

import bhx

LABELS = {"age": "r", "sex": "auroc", "diagnosis": "auroc", "fusion": "auroc"}


def main():
    cohort = bhx.open_cohort("synthetic").load()
    ours = [
        *tokens(cohort, bhx.load_model("workshop", device="cpu"), ""),
        *tokens(cohort, bhx.random_model("workshop", seed=0, device="cpu"), ", random weights"),
    ]
    for target, metric in LABELS.items():
        features = [*ours, *bhx.plain_controls(cohort, target)]
        scores = bhx.probe(features, target, stratify="site", seed=0)
        table = bhx.compare(scores, control="connectome").xs(metric, level="metric")
        print(f"\n{target}, {metric}\n{table.round(2).to_string()}", flush=True)


def tokens(cohort, model, more):
    """All hub tokens of each subject side by side, and those of the encoders before the hub."""
    latents = bhx.embed(cohort, model, keep=("structure", "dynamics")).load()
    hub, *parts = (bhx.pool(latents, "concatenate", of=m) for m in ("hub", "structure", "dynamics"))
    return [hub.assign_attrs(name=f"hub tokens{more}"), bhx.fuse(*parts, name=f"encoders{more}")]


if __name__ == "__main__":
    main()
