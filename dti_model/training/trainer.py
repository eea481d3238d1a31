"""Hugging Face's Trainer over packed streaming prompts: the loss, the validation and the checks; everything else is Trainer's.

    loss = sum over targets of cross-entropy(LM head at the [SUM], label token) / number of targets in the optimizer step

so that every target weighs 1, whatever the batches, the accumulation and the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback

from dti_model.config import DTIConfig
from dti_model.model import EAGER, Parts, can_be_graphed, layers_of, token_logits
from dti_model.precision import wants_few_shapes
from dti_model.prompts import PackedPrompts, StreamBatch
from dti_model.ranks import world_size
from dti_model.training.flops import Speed, StepCost, peak_flops
from dti_model.training.graphed_steps import MOST_FLOPS, StepGraphs, padded_batch
from dti_model.training.resumable import ResumableTrainer

# What `torch.nn.functional.cross_entropy` leaves out.
NO_ANSWER = -100


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the batch."""


class _LossCheck:
    """Whether a loss is finite, asked on the device when it is made and read later: nobody waits for the device meanwhile."""

    def __init__(self, loss: Tensor, where: str) -> None:
        """`where`: what is said if it is not."""
        self._where, self._event = where, None
        self._finite = torch.isfinite(loss)
        if loss.is_cuda:
            on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._finite = on_host.copy_(self._finite, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> None:
        """Wait for the loss.

        Raises:
            NonFiniteLossError: it is not finite.
        """
        if self._event is not None:
            self._event.synchronize()
        if not self._finite:
            raise NonFiniteLossError(self._where)


class StreamTrainer(ResumableTrainer):
    """Trains on `PackedPrompts`, one packed batch per device and step."""

    def __init__(
        self,
        *,
        dti: DTIConfig,
        answers: tuple[int, int],
        validate: Callable[[], dict[str, float]],
        graphs: bool = False,
        parts: Parts = EAGER,
        **kwargs: Any,
    ) -> None:
        """As Trainer's, and:

        Args:
            dti: what the model was made with.
            answers: token of a negative and of a positive label.
            validate: scores the validation targets with the model as it is; metrics by name.
            graphs: replay steps as CUDA graphs where the model can be captured (`graphed_steps.py`).
            parts: what computes the layers around their attention in training steps.
            kwargs: keyword arguments of Trainer; `train_dataset` is a `PackedPrompts`.
        """
        kwargs["args"].train_sampling_strategy = "sequential"  # the data set shuffles itself, by epoch
        super().__init__(data_collator=self._collate, **kwargs)
        self.dti, self.validate, self.parts = dti, validate, parts
        # The last one is `NO_LABEL`'s, which cross-entropy leaves out.
        self.answers = torch.tensor((*answers, NO_ANSWER), device=self.args.device)
        self.loss_is_scaled_for_ga = True
        self._last_loss: _LossCheck | None = None
        peak = peak_flops(self.args.device, self.args.bf16)
        self.speed = Speed(peak and peak * world_size())
        self.add_callback(self.speed)
        assert isinstance(self.model, (PreTrainedModel, PeftModel))
        self.step_cost = StepCost.of(self.model)
        self._num_layers = len(layers_of(self.model))
        alone = world_size() == 1 and self.args.n_gpu <= 1
        self.graphs = StepGraphs(self.model) if graphs and alone and can_be_graphed(self.model) else None

    def _collate(self, batches: list[StreamBatch]) -> dict[str, Any]:
        """The one batch, padded for graphs, and its FLOPs, rows and targets while the layout is on the CPU: accelerate moves the batch to the
        device."""
        (batch,) = batches
        counts = {"flops": self.step_cost.flops(batch.layout), "rows": batch.layout.num_rows}
        counts["targets"] = batch.layout.num_sum
        is_graphed = self.graphs is not None and counts["flops"] <= MOST_FLOPS * self._num_layers
        return {"batch": padded_batch(batch) if is_graphed else batch, "is_graphed": is_graphed, **counts}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of a batch, forward and backward."""
        flops: int = inputs["flops"]
        return flops

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The batches of one optimizer step and the number of their targets over all devices."""
        self.speed.begin()
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        mine = [sum(sample[name] for sample in samples) for name in ("targets", "rows", "flops")]
        mine.append(int(self.terminate))
        if world_size() > 1:
            # One exchange a step: float64 holds these integers exactly.
            counts = self.accelerator.gather(torch.tensor([mine], dtype=torch.float64, device=device)).sum(0)
            mine = [int(count) for count in counts.tolist()]
        targets, tokens, flops, num_terminated = mine
        self.speed.add(targets, tokens, flops)
        self.stopping = num_terminated > 0
        # Written there: a copy would wait for the device.
        return samples, torch.full((), targets, device=device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, and how fast the steps since the last line were."""
        if "loss" in logs:
            logs.update(self.speed.report())
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Summed cross-entropy over the targets of the whole optimizer step."""
        batch: StreamBatch = inputs["batch"]
        few_shapes = wants_few_shapes("bf16" if self.args.bf16 else "fp32", batch.input_ids.device)
        logits = token_logits(
            model, batch.input_ids, batch.layout, self.dti, few_shapes=few_shapes, parts=self.parts
        )
        labels = self.answers[batch.labels]
        total = F.cross_entropy(logits.float(), labels, reduction="sum")
        # Gradients are averaged over devices, but every target weighs the same whatever device it is on.
        loss = (
            total
            * self.accelerator.num_processes
            / ((labels != NO_ANSWER).sum() if num_items_in_batch is None else num_items_in_batch)
        )
        return (loss, {"logits": logits}) if return_outputs else loss

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Trainer's, and stop at the first loss that is not finite, once the next batch is under way: so the device never waits for the host."""
        loss: Tensor
        if self.graphs is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            step = super().training_step
            run = self.graphs.run if inputs["is_graphed"] else self.graphs.as_it_is
            loss = run(
                inputs["batch"], num_items_in_batch, lambda batch, count: step(model, {"batch": batch}, count)
            )
        before, self._last_loss = self._last_loss, _LossCheck(loss, self._where(inputs))
        if before is not None:
            before.read()
        return loss

    def _check_last_loss(self) -> None:
        """Before anything is made of the weights that the last step has left."""
        if self._last_loss is not None:
            self._last_loss.read()
            self._last_loss = None

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save:
            self._check_last_loss()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; every loss has been finite."""
        self._last_loss = None
        try:
            result = super().train(*args, **kwargs)
        finally:
            if self.graphs is not None:
                self.graphs.end()
        self._check_last_loss()
        return result

    def _where(self, inputs: Mapping[str, Any]) -> str:
        state, dataset = self.state, self.train_dataset
        epoch = int(state.epoch or 0)
        assert isinstance(dataset, PackedPrompts)
        return (
            f"the loss is not finite at optimizer step {state.global_step + 1} (epoch {epoch + 1}), in a batch of "
            f"{inputs['targets']} targets and {inputs['rows']} rows. The last checkpoint is good: lower "
            "the learning rate (--optim.learning-rate), or look at the batch with the same --seed"
        )

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Validation metrics, one global figure each."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class RunLog(TrainerCallback):
    """One line per `logging_steps` and per validation, and a progress bar where one is wanted."""

    def __init__(self, progress: bool, baseline_auc: float | None = None) -> None:
        """`baseline_auc`: validation AUC of the item + user baseline, which a model that has learnt the task exceeds."""
        self.progress, self.baseline_auc = progress, baseline_auc
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step and state.is_world_process_zero:
            tqdm.write(f"goes on from step {state.global_step:,} of {state.max_steps:,}")
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=not (self.progress and state.is_world_process_zero),
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n if not self.bar.disable else 0)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        if "loss" in logs:
            tqdm.write(step_line(state.global_step, state.max_steps, logs))
        if "eval_auc" in logs:
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            tqdm.write(validation_line(state.epoch, losses, logs, self.baseline_auc))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def step_line(step: int, num_steps: int, logs: Mapping[str, float]) -> str:
    """Loss, learning rate and speed in one line."""
    line = f"step {step}/{num_steps}: loss {logs['loss']:.4f}, learning rate {logs['learning_rate']:.2e}"
    if "targets_per_s" in logs:
        line += f", {logs['targets_per_s']:,.0f} targets/s, {logs['tokens_per_s']:,.0f} tokens/s"
    if "mfu" in logs:
        line += f", MFU {logs['mfu']:.1%}"
    return line


def validation_line(
    epoch: float, losses: Sequence[float], logs: Mapping[str, float], baseline_auc: float | None
) -> str:
    """Validation beside the item + user baseline."""
    auc = logs["eval_auc"]
    loss = f"loss {losses[-1]:.4f}, " if losses else ""
    beside = "" if baseline_auc is None else f" (item + user baseline {baseline_auc:.4f})"
    line = f"epoch {epoch:g}: {loss}validation AUC {auc:.4f}{beside}, log loss {logs['eval_log_loss']:.4f}, GAUC {logs['eval_gauc']:.4f}"
    if baseline_auc is not None and auc <= baseline_auc:
        line += f"\nWARNING: validation AUC {auc:.4f} is not above the item + user baseline {baseline_auc:.4f}, which reads no text"
    return line
