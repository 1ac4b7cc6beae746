"""Write the averaged weights of a training run as a checkpoint in the original layout.

python training/export.py --run RUN --data DIR --out assets/pi05-metaworld
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from data import load_demonstrations
from families import FAMILIES, Policy, make_family
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.registry import save_policy


def allow_longer_prompts(policy: Pi05Policy) -> None:
    """Training pads every prompt to the longest of the data; a user may type a longer one."""
    config = dataclasses.replace(policy.model.config, max_token_len=64)
    policy.model.config = policy.processor.model = config


def allow_larger_pictures(policy: Policy) -> None:
    """Have the policy shrink its pictures, as those that it was trained on were shrunk.

    Raises:
        SystemExit: the family shrinks by another rule than `collect_libero.py`.
    """
    if not isinstance(policy, Pi05Policy):
        raise SystemExit(f"{policy.family} does not shrink pictures as the demonstrations' were")
    policy.processor.config = dataclasses.replace(policy.processor.config, resize=True)


def export(run: Path, data: Path, out: Path) -> None:
    """Load the run's averaged weights into a fresh policy and save it in 16 bit."""
    state = torch.load(run / "state.pt", weights_only=True)
    name = state["family"]
    demos = load_demonstrations(data, FAMILIES[name].horizon)
    family = make_family(name, demos, seed=0, compiled=False)
    missing, unexpected = family.trainable.load_state_dict(state["average"], strict=False)
    parameters = {n for n, _ in family.trainable.named_parameters()}
    if unexpected or parameters & set(missing):
        raise SystemExit(f"{run}: the state does not fit: {missing} {unexpected}")
    if isinstance(family.policy, Pi05Policy):
        allow_longer_prompts(family.policy)
    if demos.shrunk:
        allow_larger_pictures(family.policy)
    save_policy(family.policy, out)
    print(f"{out}: step {state['step']}, {state['elapsed'] / 60:.1f} minutes of training")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    export(args.run, args.data, args.out)


if __name__ == "__main__":
    main()
