"""What ends a load test before it has a result. Each is one clear line for the person at the terminal."""


class LoadTestError(Exception):
    """The test cannot be run, or could not be finished. `exit_code` is what the process ends with."""

    exit_code = 2


class TargetError(LoadTestError):
    """The URL is not one that this client sends load to."""


class WorkloadError(LoadTestError):
    """The requests cannot be made as asked."""


class ServerError(LoadTestError):
    """A server under test did not start, or does not answer what every server answers."""

    exit_code = 4


class ResultsError(LoadTestError):
    """A results file cannot be read or does not fit the other."""
