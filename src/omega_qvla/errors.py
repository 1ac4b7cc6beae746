"""The one exception tree: every error names the thing that is wrong and how to mend it."""

from __future__ import annotations


class OmegaError(Exception):
    """Base of every error that omega-qvla raises on purpose."""


class ConfigError(OmegaError):
    """A configuration value (model size, setting, option) is missing or impossible."""


class RecipeError(OmegaError):
    """A recipe matches nothing, catches a protected layer, or asks for an unknown scheme."""


class NumericsError(OmegaError):
    """A tensor has a shape or a value that the requested numerics cannot take."""


class CheckpointError(OmegaError):
    """A policy checkpoint is incomplete, unknown, or not of the claimed family."""


class ObservationError(OmegaError):
    """An observation lacks a camera, has a wrong size or dtype, or is not finite."""


class CalibrationError(OmegaError):
    """Calibration data is missing (a layer, a denoising step) or unusable (non-finite)."""


class PackError(OmegaError):
    """A pack file is truncated, altered, of another version, or of another checkpoint."""


class BundleError(OmegaError):
    """A bundle lacks a file, has an altered or truncated one, or cannot be written."""


class BackendError(OmegaError):
    """A kernel backend is unavailable here or cannot run the requested scheme."""


class StepError(OmegaError):
    """A step-dependent layer ran outside `denoising_step`, or in a step never calibrated."""


class ActionError(OmegaError):
    """A policy produced a non-finite action; it never reaches the robot."""


class RecordingError(OmegaError):
    """Observations cannot be recorded: the folder, its disk, or what was to be recorded."""


class EnvError(OmegaError):
    """A simulator or its renderer is missing, or was given an impossible action."""


class EvaluationError(OmegaError):
    """A results file does not belong to this evaluation, or a worker died."""
