"""Checkpoints that a kill, a full disk or a damaged file cannot turn into a wrong run.

checkpoints/checkpoint-N/   the run after optimizer step N
  weights.safetensors       trained weights by name (frozen ones are read again from where the run took them)
  optimizer.safetensors     AdamW's moments, `exp_avg/NAME` and so on
  run.json                  optimizer groups, scheduler, random numbers of every rank, loss since the last log line
  trainer_state.json        Trainer's: step, best metric, early-stopping counter, log
  checksums.json            size and sha256 of the other files

Rank 0 writes a checkpoint atomically: `checkpoint-N` exists whole or not at all. Before a run goes on from it, every file is compared
with its checksum: a flipped bit in a moment or a random number would silently end in another model. The check takes 15 ms for the
quickstart's 887,424 parameters (10.7 MB, at 0.7 GB/s on a busy core), and writing a checkpoint 110 ms.
Tensors are stored whole, so that files do not depend on DDP, FSDP2 or one process. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from dti_model.files import (
    CHECKSUMS_FILE,
    DamagedFileError,
    WriteError,
    check_checksums,
    is_passing,
    is_temporary,
    read_file,
    remove_folder,
    remove_tree,
    whole_folder,
    write_checksums,
)
from dti_model.ranks import rank

WEIGHTS_FILE, OPTIMIZER_FILE = "weights.safetensors", "optimizer.safetensors"
RUN_FILE, TRAINER_FILE = "run.json", "trainer_state.json"
# Of run.json: 1 was without checksums.
CHECKPOINT_VERSION = 2
# Every rank reads a checkpoint's files; rank 0 writes them.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_FILES = {WEIGHTS_FILE, OPTIMIZER_FILE, RUN_FILE, TRAINER_FILE, CHECKSUMS_FILE}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and the way out."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that training changes, by their names in an unwrapped model; sharded if they are trained sharded."""
    for module in model.modules():
        # After a forward pass without a backward, as validation is, FSDP leaves whole copies of its last group in place.
        if isinstance(module, FSDPModule):
            module.reshard()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of trained weights on rank 0's CPU, empty elsewhere. Every rank has to get here.

    Not by torch's `get_model_state_dict`: it returns tied weights twice, and looks every entry up as an attribute, which those of
    quantised layers need not be.
    """
    whole = {}
    for name, parameter in trained_parameters(model).items():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if rank() == 0:
            whole[name] = full.detach().cpu().contiguous()
    return whole


def whole_optimizer(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """As `whole_weights`: the optimizer's tensors, and learning rate and the other numbers of every parameter group.

    Call it after `whole_weights`, which reshards the groups that FSDP left whole.
    """
    whole: Any = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    tensors = {
        f"{key}/{name}": value.contiguous()
        for name, values in whole.get("state", {}).items()
        for key, value in values.items()
    }
    groups = whole.get("param_groups", [])
    return tensors, [{key: value for key, value in group.items() if key != "params"} for group in groups]


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy a checkpoint's weights into a model's parameters, whole or sharded.

    Raises:
        CheckpointError: the file is damaged or of another model.
    """
    parameters, tensors = trained_parameters(model), _read_tensors(folder / WEIGHTS_FILE)
    _check_names(folder / WEIGHTS_FILE, tensors, {name: p.shape for name, p in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            whole = tensors[name]
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                whole = distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)
            parameter.copy_(whole)


def load_optimizer(
    model: nn.Module, optimizer: Optimizer, folder: Path, groups: list[dict[str, Any]]
) -> None:
    """Put a checkpoint's moments and group settings into an optimizer.

    Raises:
        CheckpointError: the file is damaged or of another model.
    """
    state: dict[str, Any] = {}
    for key_and_name, tensor in _read_tensors(folder / OPTIMIZER_FILE).items():
        key, name = key_and_name.split("/", 1)
        state.setdefault(name, {})[key] = tensor
    name_of = {parameter: name for name, parameter in trained_parameters(model).items()}
    _check_names(folder / OPTIMIZER_FILE, state, dict.fromkeys(name_of.values()))
    named = [
        {**settings, "params": [name_of[parameter] for parameter in group["params"]]}
        for group, settings in zip(optimizer.param_groups, groups, strict=True)
    ]
    whole: Any = {"state": state, "param_groups": named}
    set_optimizer_state_dict(model, optimizer, whole, options=_WHOLE)


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
        CheckpointError: a file cannot be written, or somebody's own is in the way; earlier checkpoints are untouched and nothing is
            left behind.
    """
    foreign = foreign_in(folder) if os.path.lexists(folder) else None
    if foreign is not None:
        raise CheckpointError(
            f"{foreign} is no file of a checkpoint, and in the way of one: move it elsewhere, and give the same command again to go "
            "on from the last one"
        )
    try:
        with whole_folder(folder) as temporary:
            for name, group in tensors.items():
                save_file(dict(group), temporary / name)
            for name, document in documents.items():
                (temporary / name).write_text(json.dumps(document, indent=1) + "\n")
            write_checksums(temporary)
    except (OSError, SafetensorError) as error:
        reason = error.__cause__ if isinstance(error, WriteError) and error.__cause__ is not None else error
        raise CheckpointError(
            f"{folder} cannot be written ({' '.join(str(reason).split())}). Earlier checkpoints are untouched: make room, and give the same "
            "command again to go on from the last one"
        ) from error


def step_of(folder: Path) -> int | None:
    """N of a folder `checkpoint-N`; None: the name is none of ours."""
    match = _NAME.fullmatch(folder.name)
    return None if match is None else int(match[1])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a folder of checkpoints."""
    steps = [step for step, path in checkpoints_in(folder).items() if path.is_dir() and not path.is_symlink()]
    return folder / f"checkpoint-{max(steps)}" if steps else None


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Paths with the name of a checkpoint, by step. Others, `checkpoint-5.old` or `checkpoint-best`, are somebody's own, and stay."""
    if not folder.is_dir():
        return {}
    steps = {path: step_of(path) for path in folder.iterdir()}
    return {step: path for path, step in steps.items() if step is not None}


def foreign_in(folder: Path) -> Path | None:
    """Something that no run wrote, in a folder with the name of a checkpoint or in its place; None: nothing.

    By names; `check_checkpoint` says whether files of these names are a checkpoint's.
    """
    if folder.is_symlink() or not folder.is_dir():
        return folder
    for path in sorted(folder.iterdir()):
        if is_passing(path):
            continue
        if path.name not in _FILES or path.is_symlink() or not path.is_file():
            return path
    return None


def check_checkpoint(folder: Path, best: bool = False) -> None:
    """Compare a checkpoint with its checksums; one of version 0.1.0 has none.

    `best`: it is kept for its weights, which no other checkpoint has.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    way_out = _way_out(folder)
    if best:
        way_out = f"The best weights so far are lost: delete {folder.parent} and give the same command again to begin anew"
    try:
        if not folder.is_dir():
            raise DamagedFileError(f"{folder} is missing. {way_out}")
        if not (folder / CHECKSUMS_FILE).is_file() and "version" in read_document(folder / RUN_FILE):
            raise DamagedFileError(f"{folder / CHECKSUMS_FILE} is missing. {way_out}")
        check_checksums(folder, way_out)
    except DamagedFileError as error:
        raise CheckpointError(str(error)) from error
    step = read_document(folder / TRAINER_FILE).get("global_step")
    if step != step_of(folder):
        raise CheckpointError(f"{folder} holds the state after step {step}, so it was renamed. {way_out}")


def tidy(folder: Path, keep: set[Path]) -> None:
    """Remove all checkpoints but some, and what a killed run left half written or half removed.

    One that somebody put something into stays: the run's next start names it.
    """
    for path in checkpoints_in(folder).values():
        if path not in keep and foreign_in(path) is None:
            remove_folder(path)
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half written or half removed. Who trains here holds the run folder's lock: nobody is writing one."""
    for path in folder.glob(".checkpoint-*"):
        if is_temporary(path):
            remove_tree(path)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    with using(file):
        tensors: dict[str, Tensor] = load_file(file)
    return tensors


def read_document(file: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint, an object.

    Raises:
        CheckpointError: it cannot be read.
    """
    with using(file):
        value = json.loads(read_file(file))
        if not isinstance(value, dict):
            raise ValueError("not an object")
    return value


@contextmanager
def using(file: Path) -> Iterator[None]:
    """Whatever fails while a file of a checkpoint is read or used, the file is damaged: without checksums, as version 0.1.0 wrote it, it
    may hold anything.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{file} is damaged ({' '.join(str(error).split())}). {_way_out(file.parent)}"
        ) from error


def _way_out(folder: Path) -> str:
    return (
        f"Delete {folder} and give the same command again: the run goes on from the checkpoint before it, or from the start "
        "where there is none"
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
