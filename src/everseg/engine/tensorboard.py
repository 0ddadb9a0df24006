"""TensorBoard's files as a place for a run's numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from everseg.engine.events import Record, Sink

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def tensorboard(folder: Path, notify: Callable[[str], None] | None = None) -> list[Sink]:
    """Return the place, or none where TensorBoard is missing or broken, with a note that says so.

    Args:
        folder: the run's `events` folder, made with the first numbers.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except Exception as error:  # not only ImportError: protobuf and NumPy mismatches raise anything
        if notify is not None:
            notify(
                "note: no TensorBoard events, which draw live curves; pip install 'everseg[tensorboard]' adds them"
                + ("" if isinstance(error, ModuleNotFoundError) else f" ({type(error).__name__}: {error})")
            )
        return []
    return [_Files(folder)]


class _Files:
    """Files of events.

    A run that is resumed writes into the same folder. TensorBoard then hides what the folder holds for the iteration of
    the first new numbers and for later ones (`SummaryWriter`'s `purge_step`), so that nothing shows twice. Accelerate's
    tracker of the same name knows no pictures of single images and no texts beside the numbers.
    """

    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, folder: Path) -> None:
        self.name = f"TensorBoard in {folder}"
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def write(self, iteration: int, record: Record) -> None:
        if self._writer is None:
            self._writer = _open(self._folder, iteration)
        for tag, value in record.values.items():
            self._writer.add_scalar(tag, value, iteration)
        for tag, picture in record.pictures.items():
            self._writer.add_image(tag, picture, iteration, dataformats="HWC")
        for tag, text in record.texts.items():
            self._writer.add_text(tag, text, iteration)
        # The writer has a thread of its own; an error in it is raised here.
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _open(folder: Path, iteration: int) -> SummaryWriter:
    """Open a new file in `folder`, and hide what earlier files hold for this iteration and later ones."""
    from torch.utils.tensorboard import SummaryWriter

    earlier = any(folder.glob("events.out.tfevents.*"))
    return SummaryWriter(str(folder), purge_step=iteration if earlier else None)
