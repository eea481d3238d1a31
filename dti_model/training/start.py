"""Run folders that a training may start in, and the checkpoint that an interrupted one goes on from.

A folder is a run's if its `config.yaml` is one of ours. Any other folder that is not empty is somebody's: it is refused, and nothing in it
is touched. A training holds the lock `.lock` from before the first look at the checkpoints to the end, so that two runs never share a
folder; the kernel releases it when a process is killed. Every check raises `RunExistsError`, which names what is in the way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dti_model.config import CONFIG_FILE, ConfigFileError, TrainConfig, is_run_config, why_owned
from dti_model.evaluation import OLDER_PREDICTION_COLUMNS, PREDICTION_COLUMNS, REPORT_MARK
from dti_model.files import CHECKSUMS_FILE, locked, opened, read_checksums
from dti_model.model import MODEL_FOLDER, OtherOriginError, Provenance, RunExistsError, check_model_is_ours
from dti_model.precision import Resolved
from dti_model.ranks import first_rank_does
from dti_model.training.checkpoint import (
    RUN_FILE,
    TRAINER_FILE,
    CheckpointError,
    check_checkpoint,
    checkpoints_in,
    foreign_in,
    last_checkpoint,
    read_document,
)

CHECKPOINTS_FOLDER, LOCK_FILE = "checkpoints", ".lock"
METRICS_FILE, REPORT_FILE = "metrics.json", "report.png"
# Written into the folder by a run; through a link, it would write somewhere else.
_WRITTEN = (CONFIG_FILE, METRICS_FILE, MODEL_FOLDER, CHECKSUMS_FILE, REPORT_FILE)


def check_is_ours(folder: Path) -> None:
    """Refuse a folder that something other than a run is in; reads only."""
    check_is_no_broken_link(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunExistsError(f"{folder} is not a folder: choose another --out")
    if (folder / CONFIG_FILE).exists():
        if not is_run_config(folder / CONFIG_FILE):
            raise RunExistsError(
                f"{folder} is not a run folder: its {CONFIG_FILE} is another program's. Choose another --out"
            )
        return
    foreign = [path.name for path in folder.iterdir() if not _is_of_a_start(path)]
    if foreign:
        raise RunExistsError(
            f"{folder} exists, is not empty and is not a run folder (it holds {min(foreign)}): choose another --out"
        )


def check_is_no_broken_link(folder: Path) -> None:
    """Refuse a symbolic link to nothing, or to itself."""
    if folder.is_symlink() and not folder.exists():
        raise RunExistsError(
            f"{folder} is a symbolic link to {os.readlink(folder)}, where no folder is: make that folder, or choose another --out"
        )


def check_results_are_ours(folder: Path) -> None:
    """Refuse files that are somebody's where a run writes its results, or links to them."""
    predictions = [folder / f"predictions-{split}.parquet" for split in ("test", "val")]
    for path in (*(folder / name for name in _WRITTEN), *predictions):
        if path.is_symlink():
            raise RunExistsError(
                f"{path} is a symbolic link, and the run writes a file or folder of that name: remove the link"
            )
    for path in (folder / CHECKSUMS_FILE, folder / REPORT_FILE, *predictions):
        if path.exists() and not _is_result(path):
            raise RunExistsError(
                f"{path} is no file of a run, and the run writes one of that name: move it elsewhere, or choose another --out"
            )


def _is_result(path: Path) -> bool:
    """Whether a file with the name of a result is one, which a run that was killed at its end has left; by what it holds."""
    try:
        with opened(path) as file:
            if path.name == CHECKSUMS_FILE:
                return CONFIG_FILE in read_checksums(path, "")
            if path.name == REPORT_FILE:
                return REPORT_MARK["Software"].encode() in file.read(1000)
            return pq.read_schema(file).names in (PREDICTION_COLUMNS, OLDER_PREDICTION_COLUMNS)
    except (OSError, ValueError, TypeError, pa.ArrowException):
        return False


def _is_of_a_start(path: Path) -> bool:
    """Left by a start that was killed before config.yaml was there."""
    if path.name == CHECKPOINTS_FOLDER:
        return path.is_dir() and not any(path.iterdir())
    return path.name == LOCK_FILE or path.name.startswith(f".{CONFIG_FILE}.")


@contextmanager
def run_folder_of(out: Path, purpose: str) -> Iterator[None]:
    """Hold a run folder: rank 0 locks it, and the error of a lock that another process holds is raised by all ranks.

    Args:
        out: the folder, which is made; it is gone again if nothing was written there.
        purpose: what others are told, such as "dti train".

    Raises:
        RunExistsError: it is not a run folder, or in the place of another run's or prepared data's own files.
        LockedError: another process writes there; the message says which.
    """

    def check_place() -> None:
        owned = why_owned(out, is_run=True)
        if owned is not None:
            raise RunExistsError(f"{out} {owned}")
        check_is_ours(out)

    first_rank_does(check_place)
    checkpoints = out / CHECKPOINTS_FOLDER
    is_new = not checkpoints.exists()
    with ExitStack() as stack:
        first_rank_does(lambda: stack.enter_context(locked(out / LOCK_FILE, purpose)))
        try:
            yield
        finally:
            if is_new:
                with suppress(OSError):  # not empty: something has been written
                    checkpoints.rmdir()


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint that an earlier, killed call with the same settings left; None: start anew. Call it under the lock.

    Raises:
        RunExistsError: the folder belongs to a run with other settings, or to a finished one, or something in it is no run's.
        CheckpointError: the checkpoint is damaged.
        ConfigFileError: config.yaml is.
    """
    check_is_ours(config.out)
    if not (config.out / CONFIG_FILE).exists():
        return None
    if (config.out / METRICS_FILE).exists():
        raise RunExistsError(f"{config.out} holds a finished run: choose another --out, or delete it")
    # The run would put its files in the place of somebody's, or remove them with old checkpoints.
    check_results_are_ours(config.out)
    for path in checkpoints_in(config.out / CHECKPOINTS_FOLDER).values():
        foreign = foreign_in(path)
        if foreign is not None:
            raise RunExistsError(
                f"{foreign} is no file of a run's checkpoint, and would go with it: move it elsewhere, or choose another --out"
            )
    check_model_is_ours(config.out / MODEL_FOLDER)
    checkpoint = last_checkpoint(config.out / CHECKPOINTS_FOLDER)
    if checkpoint is None:
        _check_same_as_model(config)
        return None
    check_same_settings(config, places=False)
    check_checkpoint(checkpoint)
    # Fingerprints, if any were kept, say more about data and model than their paths do.
    check_same_settings(config, places=provenance_of(checkpoint) is None)
    _check_checkpoint_settings(config, checkpoint)
    best = read_document(checkpoint / TRAINER_FILE).get("best_global_step")
    best_folder = checkpoint.with_name(f"checkpoint-{best}") if best else checkpoint
    if best_folder != checkpoint:
        check_checkpoint(best_folder, best=True)
        _check_checkpoint_settings(config, best_folder)
    for other in checkpoints_in(checkpoint.parent).values():
        if other not in (checkpoint, best_folder):
            _check_may_go(config, other)
    return checkpoint


def _check_may_go(config: TrainConfig, checkpoint: Path) -> None:
    """The next save removes it: whatever is not an older checkpoint of this run is somebody's."""
    try:
        check_checkpoint(checkpoint)
    except CheckpointError as error:
        raise RunExistsError(
            f"{checkpoint} is no whole checkpoint of this run, and would be removed: move it elsewhere, or choose another --out ({error})"
        ) from error
    _check_checkpoint_settings(config, checkpoint)


def check_same_settings(config: TrainConfig, places: bool) -> None:
    """Refuse a folder of a run with other settings; `places`: compare where data and pretrained model are, too."""
    difference = TrainConfig.load(config.out).first_difference(config, places)
    if difference is not None:
        raise RunExistsError(
            f"{config.out} was started with other settings ({difference}; see {CONFIG_FILE} there): choose another --out"
        )


def _check_checkpoint_settings(config: TrainConfig, checkpoint: Path) -> None:
    """config.yaml beside it may be another run's."""
    made_of = provenance_of(checkpoint)
    if made_of is not None and not made_of.has_settings_of(config):
        raise RunExistsError(
            f"{checkpoint} is of a run with other settings than {CONFIG_FILE} beside it: choose another --out, or put the "
            "run's own files back"
        )


def _check_same_as_model(config: TrainConfig) -> None:
    """A start anew leaves an older model where it is until its own is written: with other settings they would not belong together."""
    model = config.out / MODEL_FOLDER
    if not model.is_dir() or not any(model.iterdir()):
        return
    made_of = Provenance.load(model, f"Delete {model}, or choose another --out")
    if made_of is None:
        check_same_settings(config, places=True)
    elif not made_of.has_settings_of(config):
        raise RunExistsError(f"{model} was trained with other settings: choose another --out, or delete it")


def provenance_of(checkpoint: Path) -> Provenance | None:
    """Of the run that wrote a checkpoint; None: version 0.1.0 did."""
    kept = read_document(checkpoint / RUN_FILE).get("provenance")
    return Provenance.from_dict(kept) if isinstance(kept, dict) else None


def precision_of(checkpoint: Path) -> Resolved | None:
    """What the run that wrote a checkpoint computed in, which it goes on in; None: not known, since it was not `auto`'s choice."""
    made_of = provenance_of(checkpoint)
    return None if made_of is None else made_of.precision


def check_same_origin(checkpoint: Path, now: Provenance) -> None:
    """Refuse to go on with other data, another tokenizer, another pretrained model or another run to begin from.

    Raises:
        OtherOriginError: naming what changed.
    """
    before = provenance_of(checkpoint)
    changed = None if before is None else before.differs(now)
    if changed is not None:
        raise OtherOriginError(
            f"{changed} changed after {checkpoint} had been written: going on would mix two runs. Put the former back, or train "
            "into another --out"
        )


def with_template_of_run(config: TrainConfig) -> TrainConfig:
    """The settings, with the prompt template of the run to go on with where they name none: its default was another one once."""
    path = config.out / CONFIG_FILE
    if config.model.template is not None or config.model.pretrained is None or not path.is_file():
        return config
    try:
        template = TrainConfig.load(config.out).model.template
    except ConfigFileError:  # which those say who read it next
        return config
    return replace(config, model=replace(config.model, template=template))
