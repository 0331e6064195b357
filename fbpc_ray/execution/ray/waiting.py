"""Wait with a limit: log once if it is long, raise if too long. Pure: the clock is an argument."""

from collections.abc import Callable

from fbpc_ray.core.errors import UserError


class Wait:
    """Watches a wait. `check` logs once after `log_after` seconds and raises UserError after `patience` seconds."""

    def __init__(
        self,
        clock: Callable[[], float],
        log: Callable[[str], None],
        *,
        log_after: float,
        patience: float,
        message: Callable[[], str],
        error: Callable[[float], str],
    ):
        """Start the wait.

        Args:
            message: returns the line to log.
            error: returns the error message after so many seconds.
        """
        self._clock, self._log, self._log_after, self._patience = clock, log, log_after, patience
        self._message, self._error = message, error
        self.restart()

    def restart(self) -> None:
        """Count the seconds from now on, and log again if they get long."""
        self._start, self._logged = self._clock(), False

    def check(self) -> None:
        """Log or raise if the wait is long. Raises UserError."""
        seconds = self._clock() - self._start
        if seconds > self._log_after and not self._logged:
            self._logged = True
            self._log(self._message())
        if seconds > self._patience:
            raise UserError(self._error(seconds), code=1)
