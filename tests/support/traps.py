"""What goes off when it is unpickled."""

from pathlib import Path


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, sprung: Path):
        self.sprung = str(sprung)

    def __reduce__(self):
        return Path.touch, (Path(self.sprung),)
