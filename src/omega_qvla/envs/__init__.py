"""Simulated robots to evaluate policies on. Importing this package imports no simulator."""

from omega_qvla.envs.base import Env, StepResult

__all__ = ["Env", "StepResult"]
