"""The errors that kd's commands print as one line: a setting, a checkpoint, an image, a training that cannot go on."""


class ConfigError(ValueError):
    """An invalid setting. The message names the setting, its value and what is allowed."""


class CheckpointError(ValueError):
    """A file that cannot be used. The message names the path and what is wrong with it."""


class ImageError(ValueError):
    """A file that cannot be read as an image. The message names its path and the reason."""


class TrainingError(RuntimeError):
    """Training that cannot continue. The message names the update and the reason."""


def require(holds: object, message: str, error: type[Exception] = ConfigError) -> None:
    """Raise `error` with this message unless `holds` is true."""
    if not holds:
        raise error(message)
