"""What the demo's report page says about its arms."""

from __future__ import annotations

from pathlib import Path

from omega_qvla.cli.comparison.plan import Comparison
from omega_qvla.cli.comparison.report import make_report
from omega_qvla.cli.comparison.run import Results

_ARMS = {
    "rtn": "naive W4A4: weights rounded to nearest with one scale per row, activations with one "
    "scale per token",
    "omega-paper": "the published recipe: SVD and Hadamard rotations, a table of scales per "
    "denoising step and channel; computed in floating point, since those scales do not factor "
    "out of an integer product; its rotations are stored and count as bytes",
    "omega": "W4A4 made for integer arithmetic: robust smoothing, Hadamard rotation, GPTQ, scales "
    "with a sign per token and group of 64 channels, a rank-4 residual in the action head",
}
_NOTES = (
    "The policies are small ones, trained for this.",
    "omega is built as two packs, backbone and action head, that are merged.",
)


def make_demo_report(plan: Comparison, results: Results, path: Path) -> Path:
    """Write the page."""
    return make_report(
        plan, results, path, title="Two robot policies at 4 bits", arms=_ARMS, notes=_NOTES
    )
