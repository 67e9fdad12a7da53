"""Errors a user can act on. Each message says what was asked, what is possible and what to do; the command line
prints it as one line and exits with 1."""


class EvodiffError(Exception):
    """Base of all errors that are the asker's to mend."""


class ConfigError(EvodiffError):
    """A configuration that cannot be run."""


class BudgetError(ConfigError):
    """An NFE that a solver cannot spend exactly."""


class StoreError(EvodiffError):
    """A folder or file that is not what its manifest promises."""


class SamplingError(EvodiffError):
    """The sampler cannot go on: a network that returns NaN, a solver asked for what it cannot do."""


class MetricError(EvodiffError):
    """Images, features or reference statistics that cannot be scored."""


class CheckpointError(EvodiffError):
    """A weight file that cannot be had, or that is not what it should be."""
