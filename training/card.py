"""Write the model card of a demo checkpoint from what was recorded.

    python training/card.py --run RUN --data DIR --results fp.jsonl --out assets/pi05-metaworld
    python training/card.py --run RUN --data DIR --results trained.jsonl \\
        --out assets/libero/pi05-object --note "..."

Data from the collection's manifest, steps and time from the training log, success from an
evaluation's results file (`omega-qvla eval`): nothing is typed in by hand but the note.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from omega_qvla.evaluation.records import REFERENCE, EpisodeRecord
from omega_qvla.evaluation.results import read_results
from omega_qvla.evaluation.statistics import wilson
from omega_qvla.policies.registry import load_policy

TITLES = {"pi05": "pi0.5", "groot_n15": "GR00T N1.5"}
METAWORLD_TASKS = (
    "six Meta-World tasks",
    "six",
    "the demo and the tests of\nomega-qvla quantize it.",
)
LIBERO_TASKS = (
    "LIBERO's ten object tasks",
    "ten",
    "omega-qvla measures\nquantization in LIBERO with it.",
)
_NOISE = (
    "In two of three episodes noise was added to what was executed, while the label stayed the "
    "expert's action at the state visited."
)
METAWORLD = (
    f"Meta-World's scripted experts. {_NOISE} Two cameras of {{size}} pixels (base, wrist), hand "
    "position and gripper opening."
)
LIBERO = (
    "The scripted expert of `omega_qvla.envs.libero_oracle`, at starts drawn from the tasks' "
    f"definitions: none is a shipped initial state. {_NOISE} Two cameras (base, wrist), rendered "
    "in {size} pixels and shrunk as the policy shrinks them, from {assets}; hand position and "
    "rotation, both fingers."
)
SUBSTITUTES = (
    "assets that are partly **substitutes**: physics is LIBERO's, pictures are not, and no success "
    "rate here is a LIBERO result"
)


def data_section(manifest: dict[str, Any]) -> str:
    """What the policy was trained on."""
    libero = "protocol" in manifest
    lines = []
    for task, entry in manifest["tasks"].items():
        prompt = "" if libero else f'; instruction "{entry["prompt"]}"'
        lines.append(
            f"- {task}: {entry['episodes']} demonstrations, {entry['steps']} steps, "
            f"{entry['images']} of them rendered{prompt}"
        )
    versions = ", ".join(f"{name} {value}" for name, value in manifest["versions"].items())
    return (
        f"{_experts(manifest) if libero else METAWORLD.format(size=manifest['size'])}\n\n"
        + "\n".join(lines)
        + f"\n\nCollected with {versions}.\n"
    )


def _experts(manifest: dict[str, Any]) -> str:
    own = "LIBERO's own assets" if manifest["assets"] == "original" else SUBSTITUTES
    return LIBERO.format(size=manifest["protocol"]["camera_size"], assets=own)


def success_section(records: list[EpisodeRecord], settings: dict[str, Any]) -> str:
    """Success per task with Wilson intervals. settings: of the results file."""
    played = Counter(record.task for record in records)
    solved = Counter(record.task for record in records if record.success)
    rows = ["| task | solved | success | 95% interval |", "|---|---|---|---|"]
    for name, n in [*played.items(), ("all", len(records))]:
        k = sum(solved.values()) if name == "all" else solved[name]
        low, high = wilson(k, n)
        rows.append(f"| {name} | {k} of {n} | {k / n:.0%} | {low:.0%} to {high:.0%} |")
    versions = ", ".join(f"{name} {value}" for name, value in settings["versions"].items())
    played_as = "Seeds held out from training."
    if settings["env"] == "libero":
        options = settings["env_options"]
        played_as = (
            f"Protocol `{options['protocol']['name']}`, assets: {options['assets']}. Initial "
            "states that no demonstration began at."
        )
    return "\n".join(rows) + f"\n\n{played_as} Measured with {versions}.\n"


def training_section(run: Path) -> str:
    """How long, and how far."""
    state = torch.load(run / "state.pt", weights_only=True)
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    return (
        f"Flow matching from scratch on one CPU core: {state['step']} steps of 64 observations "
        f"with 4 noise draws each, {state['elapsed'] / 60:.0f} minutes; AdamW, bfloat16 autocast, "
        "random shifts and brightness, and an auxiliary loss on the position of the task's object "
        f"(its head is not part of the checkpoint). Flow loss {last['flow']:.4f} in training, "
        f"{last['held_out']:.4f} on held-out episodes. The weights are an exponential moving "
        "average.\n"
    )


def card(run: Path, data: Path, results: Path, checkpoint: Path, note: str = "") -> str:
    """The whole card, Markdown. note: follows the training."""
    policy = load_policy(checkpoint)
    header, records = read_results(results)
    records = [r for r in records if r.family == policy.family and r.arm == REFERENCE]
    parameters = sum(p.numel() for p in policy.module.parameters())
    size = (checkpoint / "model.safetensors").stat().st_size
    title = TITLES[policy.family]
    libero = header["settings"]["env"] == "libero"
    tasks, number, purpose = LIBERO_TASKS if libero else METAWORLD_TASKS
    aside = f"\n{note}\n" if note else ""
    return f"""# {title} on {tasks}

A small policy with {title}'s architecture, trained from scratch: {purpose}
{parameters / 1e6:.1f} M parameters, {size / 1e6:.1f} MB in bfloat16,
in the original checkpoint's layout and under its tensor names; {policy.num_steps} denoising steps,
chunks of {policy.action_horizon} actions. It knows its {number} instructions and nothing else: it
is no use on a robot. Made by `training/` of the same repository; Apache-2.0, as the rest of it.

## Data

{data_section(json.loads((data / "manifest.json").read_text()))}
## Training

{training_section(run)}{aside}
## Success in full precision

{success_section(records, header["settings"])}"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("run", "data", "results", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--note", default="", help="what the logs do not say of the training")
    args = parser.parse_args()
    text = card(args.run, args.data, args.results, args.out, args.note)
    (args.out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
