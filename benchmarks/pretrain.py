"""How fast pretraining runs: scans and tokens a second, and the share of this machine's own
matrix product that the networks' arithmetic reaches.

    python benchmarks/pretrain.py --preset workshop --out DIR
    python benchmarks/pretrain.py --preset base --device cuda --out DIR

The loop is that of bhx.pretrain; its samples are a few synthetic people who are kept in memory, so
no disk and no reading is measured (`cohort.py` measures that). Model
FLOPs count matrix products alone: three times the forward pass of what is trained (one forward,
two backward), once that of frozen encoders and of the teacher. Nothing recomputed is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bhx
from bhx.encode.embed import aligned_to
from bhx.encode.model import random_model
from bhx.modalities.bold import BOLD
from bhx.model.config import PRESETS
from bhx.model.hub import HubConfig
from bhx.train.dataset import Samples, readable
from bhx.train.loop import Run
from bhx.train.objectives import objective_of
from bhx.train.recipes import STAGES, recipe

WARM_UP, LEAST, MOST = 2, 3, 200  # steps that are not timed, and bounds of those that are


def main():
    args = arguments()
    if args.only:
        return one_of_many(args)
    report = {"machine": machine(args), "rows": []}
    model = random_model(args.preset, device=args.device)
    peak = matrix_product(args.device, args.precision)
    report["matrix_product_tflops"] = peak
    print(f"matrix product, {args.precision}: {peak:.2f} TFLOP/s", flush=True)
    for settings in plans(args, model.config):
        row = measure(model, args, **settings)
        row["utilisation"] = row.get("tflops", float("nan")) / peak
        report["rows"].append(row)
        print(line(row), flush=True)
        write(report, args)
    for processes in args.processes:
        report["rows"] += scaled_out(args, processes, peak)
        write(report, args)
    return 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="workshop", choices=PRESETS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=4.0, help="measured for each row")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--precision", choices=("float32", "bfloat16"))
    parser.add_argument("--quick", action="store_true", help="no scaling with batch and length")
    parser.add_argument("--compile", nargs="+", choices=("no", "yes"), help="both on a GPU")
    parser.add_argument("--processes", type=int, nargs="*", help="numbers of processes (CPU)")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # a process of `scaled_out`
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    args.precision = args.precision or ("float32" if on_cpu else "bfloat16")
    args.compile = args.compile or (("no",) if on_cpu else ("no", "yes"))
    if args.processes is None:
        args.processes = (1, 2) if on_cpu and not args.quick else ()
    return args


def plans(args, config):
    """Settings of the rows: each stage eager and compiled, then other batches and lengths."""
    longest = config.dynamics.max_patches
    if not any(map(config.encodes, config.modalities.values())):
        args.stages = ("harmonizer",)
    for stage in args.stages:
        full = full_batch(stage, args.preset, config, longest)
        for choice in args.compile:
            compiled = choice == "yes"
            yield {"stage": stage, "batch": full, "patches": longest, "compiled": compiled}
    if args.quick or args.stages == ("harmonizer",):
        return
    for stage in args.stages:
        full = full_batch(stage, args.preset, config, longest)
        for batch in sorted({1, max(1, full // 3)} - {full}):
            yield {"stage": stage, "batch": batch, "patches": longest, "compiled": False}
    if "dynamics" in args.stages:
        for patches in (2, 6):
            batch = full_batch("dynamics", args.preset, config, patches)
            yield {"stage": "dynamics", "batch": batch, "patches": patches, "compiled": False}


def full_batch(stage, preset, config, patches):
    """As many subjects as are computed at once."""
    plan = recipe(stage, preset)
    if isinstance(config.harmonizer, HubConfig) and stage == "harmonizer":
        return plan.batch  # people are compared within a batch
    cubes, tokens = config.structure.tokens, config.dynamics.parcels * patches
    cost = {"structure": cubes, "dynamics": tokens, "harmonizer": tokens + cubes}[stage]
    return max(1, plan.tokens_at_once // cost)


def measure(model, args, stage, batch, patches, compiled):
    """One row: steps of the library's loop, timed after two that warm up."""
    row = {"stage": stage, "preset": args.preset, "batch": batch, "compiled": compiled}
    row |= {"patches": patches if stage != "structure" else 0}
    try:
        run = prepared(model, args, stage, batch, patches, compiled)
        forget_peak(args.device)
        began = time.perf_counter()
        run.go()
        row["warmup_s"] = run.ended[WARM_UP] - began
        seconds = np.diff(run.ended[WARM_UP:]).tolist()
        row |= {"step_s": statistics.median(seconds), "steps": len(seconds)}
        row["gib"] = peak_memory(args.device)
        row |= work(run, args)
        row["scans_per_s"] = batch / row["step_s"]
        row["tokens_per_s"] = row["tokens_per_scan"] * row["scans_per_s"]
        row["tflops"] = row["tflop_per_scan"] * row["scans_per_s"]
    except Exception as error:  # out of memory, no compiler: the other rows still count
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return row


def prepared(model, args, stage, batch, patches, compiled):
    """A run of the library's loop whose samples are in memory."""
    plan = recipe(
        stage, args.preset, steps=MOST + 100, batch=batch, precision=args.precision,
        compile=compiled, evaluate_every=10**9, checkpoint_every=10**9, drop_modality=0.0,
    )  # fmt: skip
    networks = deepcopy(model.networks).requires_grad_(True)
    objective = objective_of(networks, plan).to(model.device)
    samples = Memory(model, plan, objective, patches)
    everyone = np.arange(batch)
    return Timed(objective, samples, plan, None, everyone, everyone, {}, seconds=args.seconds)


class Timed(Run):
    """The library's loop, ended after `seconds` of measured steps; `ended` holds when each one
    was, after the start."""

    def __init__(self, *args, seconds: float, **options):
        super().__init__(*args, **options)
        self.seconds, self.ended, self.enough = seconds, [], False

    @property
    def stopped(self):
        """Asked by the loop before and after every step."""
        if self.step == len(self.ended):
            wait(self.device)
            self.ended.append(time.perf_counter())
            done = self.step - WARM_UP
            over = done >= LEAST and self.ended[-1] - self.ended[WARM_UP] > self.seconds
            self.enough = bool(self.processes.most(int(over or done >= MOST)))
        return self.enough


class Memory(Samples):
    """Those of as many synthetic people as a batch has, of which a few are read once and kept."""

    def __init__(self, model, plan, objective, patches, distinct: int = 8):
        config = model.config
        minutes = patches * config.dynamics.patch_seconds / 60 + 0.05
        cohort = bhx.synthetic_cohort(
            plan.batch, atlas=config.atlas, voxel_mm=config.structure.voxel_mm, tr=2.0,
            minutes=minutes, missing=0.0,
        )  # fmt: skip
        names = objective.names or tuple(config.modalities)
        plan = plan.model_copy(update={"crop": False, "decimate": (1,)})
        super().__init__(aligned_to(cohort, model), config, plan, names, objective.hide)
        self.distinct, self.kept, self.pinned = distinct, {}, model.device.type == "cuda"

    def __getitem__(self, key):
        row = key[1] % self.distinct
        kept = self.kept.setdefault(tuple(self.modalities), {})  # a teacher reads one of them
        if row not in kept:
            sample = readable(super().__getitem__((0, row)))
            kept[row] = sample.pin_memory() if self.pinned else sample  # as a loader would
        return kept[row]


def work(run, args):
    """Tokens of a step, and TFLOP of one scan: counted in a forward pass that is not compiled."""
    samples = [
        sample.to(run.device) for sample in run.samples.kept[tuple(run.samples.modalities)].values()
    ]
    for module in run.objective.modules():  # back to eager
        for name in ("before", "after"):
            module.__dict__.pop(name, None)
    total = frozen = 0
    for sample in samples:
        total += flops(lambda one=sample: run.objective([one]), run, args)
        frozen += flops(lambda one=sample: still(run.objective, one), run, args)
    each = (3 * (total - frozen) + frozen) / len(samples)
    tokens = sum(sample.cost for sample in samples) / len(samples)
    return {"tokens_per_scan": tokens, "tflop_per_scan": each / 1e12}


def still(objective, sample):
    """The part of a forward pass that is not trained."""
    if hasattr(objective, "teacher"):
        with torch.no_grad():
            objective.teacher([sample.reading.windows[BOLD.name][0]])
    elif hasattr(objective, "read"):
        objective.read([sample])


def flops(function, run, args):
    """Of the matrix products in a call, attention included."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention(query, key, value, *_, out_shape=None, **__):
        return sdpa_flop_count(query, key, value)

    counter = FlopCounterMode(display=False, custom_mapping={on_cpu: attention})
    half = args.precision == "bfloat16"
    with counter, torch.autocast(run.device.type, torch.bfloat16, half):
        function()
    return counter.get_total_flops()


def matrix_product(device, precision):
    """TFLOP/s of a large square product: what this machine can do, measured now."""
    n = 8192 if torch.device(device).type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=getattr(torch, precision))
    best = float("inf")
    end = time.perf_counter() + 3
    while time.perf_counter() < end:
        began = time.perf_counter()
        repeats = 20 if n > 4096 else 1
        for _ in range(repeats):
            a @ a
        wait(device)
        best = min(best, (time.perf_counter() - began) / repeats)
    return 2 * n**3 / best / 1e12


def scaled_out(args, processes, peak):
    """The same step shared by several processes on this machine (torchrun, gloo)."""
    rows = []
    for stage in args.stages:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={processes}", __file__, "--only", stage, "--preset", args.preset,
            "--device", args.device, "--precision", args.precision, "--out", str(args.out),
            "--seconds", str(args.seconds),
        ]  # fmt: skip
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        found = [x for x in done.stdout.splitlines() if x.startswith("{")]
        row = json.loads(found[-1]) if found else {"stage": stage, "error": done.stderr[-200:]}
        row |= {"processes": processes, "utilisation": row.get("tflops", float("nan")) / peak}
        print(line(row), flush=True)
        rows.append(row)
    return rows


def one_of_many(args):
    """What each process of `scaled_out` does; the first prints its row."""
    model = random_model(args.preset, device=args.device)
    longest = model.config.dynamics.max_patches
    full = full_batch(args.only, args.preset, model.config, longest)
    row = measure(model, args, args.only, max(2, full // 2 * 2), longest, False)
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(row), flush=True)
    return 0


def wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def forget_peak(device):
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """GiB on the GPU, or of the process where the system tells."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    peak = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(peak.split()[1]) / 2**20


def machine(args):
    name = platform.processor() or platform.machine()
    if torch.device(args.device).type == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan"),
        "torch": torch.__version__,
        "precision": args.precision,
    }


COLUMNS = {
    "stage": "{}", "processes": "{}", "batch": "{}", "patches": "{}", "compiled": "{}",
    "step_s": "{:.4f}", "scans_per_s": "{:.2f}", "tokens_per_s": "{:,.0f}",
    "tflop_per_scan": "{:.4f}", "tflops": "{:.2f}", "utilisation": "{:.1%}", "gib": "{:.2f}",
    "warmup_s": "{:.1f}",
}  # fmt: skip


def line(row):
    if "error" in row:
        return f"| {row['stage']} | {row.get('batch', '')} | {row['error']} |"
    cells = [COLUMNS[k].format(row.get(k, 1 if k == "processes" else "")) for k in COLUMNS]
    return "| " + " | ".join(cells) + " |"


def write(report, args):
    """JSON for programs, Markdown for people."""
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"pretrain_{args.preset}_{torch.device(args.device).type}"
    (args.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    about = ", ".join(f"{k} {v}" for k, v in report["machine"].items())
    table = [
        f"Pretraining, preset {args.preset}: {about}; matrix product "
        f"{report['matrix_product_tflops']:.2f} TFLOP/s",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *map(line, report["rows"]),
    ]
    (args.out / f"{stem}.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    sys.exit(main())
