"""The ONNX files of a bundle, run by onnxruntime instead of the PyTorch model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everseg.data.batches.transforms import resize_nearest
from everseg.errors import CheckpointError, ConfigError, first_line
from everseg.labels import IGNORED
from everseg.runs.commit import Committed, read_committed
from everseg.runs.model_folder import PRECISIONS, ModelFile, is_bundle, read_model_file
from everseg.runs.place import what_is


class OnnxFiles:
    """The opened ONNX files of a model, one for each branch, on the CPU."""

    def __init__(self, sessions: Mapping[str, Any], lasting: Mapping[str, Sequence[int]]) -> None:
        """Take opened files (`session_of`).

        Args:
            sessions: branch -> its file.
            lasting: branch -> lasting id of each of its outputs.
        """
        import onnxruntime

        self.sessions, self._lasting = sessions, lasting
        self._options = onnxruntime.RunOptions()
        sides = [tuple(session.get_inputs()[0].shape[1:3]) for session in sessions.values()]
        self.one_size = next((side for side in sides if all(type(length) is int for length in side)), None)
        """The only size (H, W) that the graphs take; None = any."""

    @classmethod
    def of_bundle(cls, path: Path, precision: str, committed: Committed | None = None) -> OnnxFiles:
        """Open the files of a bundle. Their bytes are compared with its manifest as they are read.

        Args:
            committed: the bundle's manifest, if the caller has read it before.

        Raises:
            ConfigError: it is no bundle, has no file of that precision, or onnxruntime is missing.
            CheckpointError: a file is damaged, or onnxruntime cannot read it.
        """
        if not is_bundle(path):
            raise ConfigError(
                f"--precision {precision}: {path} {what_is(path)}; the ONNX files are in a bundle (everseg export RUN)"
            )
        committed = committed or read_committed(path)
        about = read_model_file(path, committed)
        files, registry = files_of(path, about, precision), about.lasting_ids(path)
        sessions = {branch: session_of(committed.read(name), path / name) for branch, name in files.items()}
        return cls(sessions, {branch: registry.ids(space) for branch, space in about.spaces.items()})

    def logits(self, image: Tensor, branch: str) -> Tensor:
        """Run a graph on images (B, 3, h, w), as they are stored. Return its logits (B, C, h', w')."""
        logits = self._run(branch, "logits", image)
        return torch.from_numpy(logits)

    def ids(self, image: Tensor, branch: str, size: tuple[int, int]) -> Tensor:
        """Run a graph on one image (3, h, w). Return the train ids of its mask, (H, W) of `size`."""
        mask = self._run(branch, "mask", image[None])
        lasting = self._lasting[branch]
        table = np.zeros(max(lasting) + 1, np.uint8 if len(lasting) <= IGNORED else np.uint16)
        table[list(lasting)] = np.arange(len(lasting))
        return torch.from_numpy(resize_nearest(table[mask[0]], *size).copy())

    def give_up(self) -> None:
        """End the run of a graph that goes on in another thread, and all later ones: they raise a RuntimeError."""
        self._options.terminate = True

    def go_on(self) -> None:
        """Let graphs run again."""
        self._options.terminate = False

    def _run(self, branch: str, output: str, image: Tensor) -> np.ndarray:
        pixels = image.permute(0, 2, 3, 1).contiguous().numpy()
        try:
            (found,) = self.sessions[branch].run([output], {"image": pixels}, self._options)
        except Exception as error:  # onnxruntime has its own exception classes
            raise RuntimeError(f"the ONNX file cannot be run: {first_line(error)}") from error
        result: np.ndarray = found
        return result


def files_of(path: Path, about: ModelFile, precision: str) -> dict[str, str]:
    """Find the ONNX files of a precision: branch -> file name.

    Raises:
        ConfigError: there is no such precision, the bundle lacks it, or onnxruntime is missing.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision}: expected one of {', '.join(PRECISIONS)}")
    files = about.onnx_files(precision)
    if missing := [branch for branch in about.spaces if branch not in files]:
        here = [name for name in PRECISIONS if len(about.onnx_files(name)) == len(about.spaces)]
        has = f"it has {', '.join(here)}" if here else "it has none at all"
        of = f" of branch '{missing[0]}'" if len(about.spaces) > 1 else ""
        raise ConfigError(
            f"--precision {precision}: {path} has no such ONNX file{of}, {has}; everseg export {path} -o NEW "
            f"--precision {precision} makes a bundle with one"
        )
    try:
        importlib.import_module("onnxruntime")
    except Exception as error:  # a broken installation can raise almost any exception
        raise ConfigError(
            f"--precision {precision} needs onnxruntime ({first_line(error)}): pip install 'everseg[export]'"
        ) from None
    return files


def session_of(file: bytes, where: object, threads: int | None = None) -> Any:
    """Open an ONNX file with onnxruntime, on the CPU.

    Args:
        file: its bytes.
        where: its place, for the message.
        threads: how many it uses; None = as many as PyTorch.

    Raises:
        CheckpointError: onnxruntime cannot read it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.log_severity_level = 3  # errors only: it warns of layers that it runs in another way
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own exception classes
        raise CheckpointError(f"{where}: onnxruntime cannot read it ({first_line(error)})") from None
