"""The errors a user can meet. Each says what was wrong, the numbers, and what to do."""

from offload_rt.printable import printable

_MOST_CHARACTERS = 2000


class OffloadError(Exception):
    """Base of all errors of this package; the command line prints it without a traceback.

    Its message is one line that is safe to show: names and texts of a model are in many of them.

    Attributes:
        exit_code: what `offload-run` exits with (2 usage or configuration, 3 no plan fits, 4 bad
            model files).
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        text = printable(" ".join(message.split("\n")))
        if len(text) > _MOST_CHARACTERS:  # a name of a megabyte; what to do is at the end
            text = f"{text[: _MOST_CHARACTERS // 2]} ... {text[-_MOST_CHARACTERS // 2 :]}"
        super().__init__(text)


class ConfigError(OffloadError):
    """An option or a combination of options cannot be used."""


class ProfileError(OffloadError):
    """A hardware profile cannot be read or does not belong to this machine."""


class PlanError(OffloadError):
    """No placement fits the memory limits; the message names the smallest change that would.

    Attributes:
        needed_bytes: the smallest device limit that would do, where that is what binds.
    """

    exit_code = 3

    def __init__(self, message: str, needed_bytes: int = 0) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class SessionError(OffloadError):
    """A loaded model cannot be used now: it is closed, or somebody else is using it."""


class CapacityError(OffloadError):
    """A request needs more KV rows than the plan set aside."""


class CheckpointError(OffloadError):
    """Model files are missing, damaged, unsafe, not supported, or changed while running."""

    exit_code = 4


class NumbersError(OffloadError):
    """What a model computes is NaN or infinite, so that no token can be told from it."""


class WeightsError(NumbersError):
    """The same, and the model's files are to blame."""

    exit_code = 4


class DeviceError(OffloadError):
    """The device refused something: no such device, memory that cannot be pinned or allocated."""


class StreamOrderError(OffloadError):
    """An access to device memory was not ordered by an event, or layers came in a wrong order."""
