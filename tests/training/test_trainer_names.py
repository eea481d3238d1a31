"""Private names of transformers' Trainer that our trainer overrides or reads: a release that changes one fails here."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer

from dti_model.training import StreamTrainer
from dti_model.training.resumable import ResumableTrainer

# The parameters that our methods were written against, the same from transformers 5.17 to 5.24.
OVERRIDDEN = {
    "_load_best_model": "self",
    "_load_from_checkpoint": "self, resume_from_checkpoint, model=None",
    "_load_optimizer_and_scheduler": "self, checkpoint",
    "_load_rng_state": "self, checkpoint",
    "_maybe_log_save_evaluate": "self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None",
    "_run_epoch": "self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, ignore_keys_for_eval, "
    "start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
    "_save_checkpoint": "self, model, trial",
}
READ = ("_globalstep_last_logged", "_tr_loss")


def private_names() -> set[str]:
    ours = {*vars(StreamTrainer), *vars(ResumableTrainer)}
    return {name for name in ours if name.startswith("_") and not name.startswith("__")}


def test_private_methods_of_trainer_that_are_overridden_are_listed() -> None:
    assert {name for name in private_names() if hasattr(Trainer, name)} == OVERRIDDEN.keys()


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_has_the_parameters_it_was_written_against(name: str) -> None:
    parameters = inspect.signature(getattr(Trainer, name)).parameters.values()
    bare = [str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters]
    assert ", ".join(bare) == OVERRIDDEN[name]


def test_trainer_sets_the_attributes_that_are_read_and_no_other_of_ours() -> None:
    source = inspect.getsource(Trainer)
    for name in READ:
        assert f"self.{name} = " in source
    for name in private_names() - OVERRIDDEN.keys():
        assert f"self.{name}" not in source
