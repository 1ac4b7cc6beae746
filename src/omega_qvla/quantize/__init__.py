"""Builds: a policy (or somebody else's module) goes in, quantized layers come out as a pack.

`policy.quantize_policy` for the families of this package, `module.quantize_` for any `nn.Module`.
"""

from omega_qvla.quantize.jobs import Job, plan, site_profiles
from omega_qvla.quantize.origin import software
from omega_qvla.quantize.policy import quantize_policy
from omega_qvla.quantize.progress import BuildReport, Progress

__all__ = [
    "BuildReport",
    "Job",
    "Progress",
    "plan",
    "quantize_policy",
    "site_profiles",
    "software",
]
