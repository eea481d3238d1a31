"""Checkpoints that a kill, a full disk or a damaged file cannot turn into a wrong run.

checkpoints/checkpoint-N/   the run after optimizer step N
  weights.safetensors       trained weights by name (frozen ones are read again from where the run took them)
  optimizer.safetensors     AdamW's moments, `exp_avg/NAME` and so on
  run.json                  optimizer groups, scheduler, random numbers of every rank, loss since the last log line
  trainer_state.json        Trainer's: step, best metric, early-stopping counter, log

A checkpoint is written under a hidden name by rank 0, flushed to the disk and renamed: `checkpoint-N` exists whole or not at all.
Sharded weights are gathered one tensor at a time, so files do not depend on DDP, FSDP2 or one process. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers.trainer_utils import get_last_checkpoint

from dti_model.ranks import rank

WEIGHTS_FILE, OPTIMIZER_FILE = "weights.safetensors", "optimizer.safetensors"
RUN_FILE, TRAINER_FILE = "run.json", "trainer_state.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and the way out."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by the name that it has in an unwrapped model; sharded where it is trained sharded."""
    for module in model.modules():
        # After a forward pass without a backward, as validation is, FSDP leaves whole copies of its last group in place.
        if isinstance(module, FSDPModule):
            module.reshard()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def whole_weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies on rank 0's CPU, empty elsewhere. Every rank has to get here."""
    return _on_first_rank({name: parameter.detach() for name, parameter in parameters.items()})


def whole_optimizer(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """As `whole_weights`, of the optimizer's tensors."""
    return _on_first_rank(
        {
            f"{key}/{name}": value
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
    )


def _on_first_rank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            whole[name] = full.cpu().contiguous()
    return whole


def optimizer_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Learning rate and the other numbers of every parameter group."""
    return [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]


def load_weights(parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Copy a checkpoint's weights into a model's parameters, whole or sharded.

    Raises:
        CheckpointError: the file is damaged or of another model.
    """
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    _check_names(folder / WEIGHTS_FILE, tensors, {name: p.shape for name, p in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_placed_like(parameter, tensors[name]))


def load_optimizer(
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    folder: Path,
    groups: list[dict[str, Any]],
) -> None:
    """Put a checkpoint's moments and group settings into an optimizer.

    Raises:
        CheckpointError: the file is damaged or of another model.
    """
    tensors = _read_tensors(folder / OPTIMIZER_FILE)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key_and_name, tensor in tensors.items():
        key, name = key_and_name.split("/", 1)
        by_parameter.setdefault(name, {})[key] = tensor
    _check_names(folder / OPTIMIZER_FILE, by_parameter, dict.fromkeys(parameters))
    name_of = {parameter: name for name, parameter in parameters.items()}
    state: dict[int, dict[str, Tensor]] = {}
    numbered = []
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        indices = range(len(state), len(state) + len(group["params"]))
        for index, parameter in zip(indices, group["params"]):
            values = by_parameter[name_of[parameter]]
            state[index] = {key: _placed_like(parameter, value) for key, value in values.items()}
        numbered.append({**settings, "params": list(indices)})
    optimizer.load_state_dict({"state": state, "param_groups": numbered})


def _placed_like(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """Sharded as the parameter is, if it is; a step count stays what it is."""
    if isinstance(parameter, DTensor) and whole.shape == parameter.shape:
        return distribute_tensor(
            whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return whole


def _check_names(file: Path, found: Mapping[str, Any], wanted: Mapping[str, torch.Size | None]) -> None:
    wrong = sorted(found.keys() ^ wanted.keys()) or [
        name for name, shape in wanted.items() if shape is not None and found[name].shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{file} is of another model: {wrong[0]} differs ({len(wrong)} tensors do). Choose another --out"
        )


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
) -> None:
    """Write a checkpoint so that `folder` is there whole or not at all.

    Args:
        folder: `checkpoint-N`.
        tensors: from the name of a safetensors file to its tensors.
        documents: from the name of a JSON file to its content.

    Raises:
        CheckpointError: a file cannot be written; earlier checkpoints are untouched and nothing is left behind.
    """

    def write(temporary: Path) -> None:
        for name, group in tensors.items():
            save_file(dict(group), temporary / name)
        for name, document in documents.items():
            (temporary / name).write_text(json.dumps(document, indent=1) + "\n")

    try:
        write_folder(folder, write)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error}). Earlier checkpoints are untouched: make room, and give the same "
            "command again to go on from the last one"
        ) from error


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Fill a folder under a hidden name beside it, flush it to the disk, then rename it; an older one of its name goes."""
    temporary = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        remove_folder(folder)
        temporary.rename(folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it exists; killed meanwhile, its name is gone, so half of it is never taken for the whole."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a folder of checkpoints."""
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return None if found is None else Path(found)


def tidy(folder: Path, keep: set[Path]) -> None:
    """Remove all checkpoints but some, and what a killed run left half written or half removed."""
    for path in folder.iterdir():
        if path.name.startswith(".checkpoint-"):
            shutil.rmtree(path)
        elif path.name.startswith("checkpoint-") and path not in keep:
            remove_folder(path)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise damaged(file, error) from error
    return tensors


def read_document(file: Path) -> Any:
    """A JSON file of a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> CheckpointError:
    """What to do about a file that cannot be read."""
    return CheckpointError(
        f"{file} is damaged ({error}). Delete {file.parent} and give the same command again: the run goes on from the "
        "checkpoint before it, or from the start where there is none"
    )


def random_state() -> dict[str, Any]:
    """This process's random number generators as plain numbers."""
    numpy_state: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [x.tolist() if isinstance(x, np.ndarray) else x for x in numpy_state],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave, after a way through JSON."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
