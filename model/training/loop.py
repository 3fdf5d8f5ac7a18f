"""The training loop: batches in their order, gradients, steps; validation, checkpoints and the model now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.tokenizer import TOKENIZER_FILE
from model.training.initial import load_initial
from model.training.networks import make_network, network_config, save_network
from model.training.optimiser import learning_rate, make_optimisers
from model.training.order import WindowOrder
from model.training.processes import Processes
from model.training.recipe import Recipe
from model.training.report import Record, Report
from model.training.samples import complete
from model.training.state import has_state, load_state, save_state
from model.training.tokens import PackedTokens
from model.training.validation import Validation

STATE, MODEL = "state", "model"


class Trainer:
    """A run: made, or taken up where its state in the run's directory was left."""

    def __init__(self, recipe: Recipe, packed: PackedTokens, processes: Processes) -> None:
        """Raises ValueError where recipe, data and state do not fit together."""
        self.recipe, self.packed, self.processes = recipe, packed, processes
        training = recipe.training
        if training.batch % (training.micro_batch * processes.size):
            raise ValueError(
                f"training.batch: {training.batch} windows cannot be divided among {processes.size} processes in "
                f"micro-batches of {training.micro_batch}"
            )
        self.device = choose_device(recipe.run.device, processes.rank)
        self.config = network_config(recipe, packed.tokenizer)
        torch.manual_seed(training.seed)
        self.network = make_network(self.config)
        state = recipe.run.directory / STATE
        if training.initial is not None and not has_state(state):
            load_initial(training.initial, self.network, self.config, packed.tokenizer)
        self.network = self.network.to(self.device).train()
        self.optimisers = make_optimisers(self.network, training)
        weights = [source.weight for source in recipe.data.sources]
        self.order = WindowOrder(packed.sources, weights, recipe.data.window, training.seed)
        self.validation = Validation(packed, recipe.data.window, recipe.run.evaluation_windows, training.micro_batch)
        self.fixed = {**recipe.fixed(), "tokens": packed.digest}
        self.progress = load_state(state, self.network, self.optimisers, self.fixed)

    def run(self, is_stopped: Callable[[], bool] = lambda: False) -> bool:
        """Trains to the last step, or until `is_stopped`; either way the state is saved. Whether it came to the end.

        Raises FloatingPointError where the loss is no longer a number; the state is the last one saved.
        """
        run, steps = self.recipe.run, self.recipe.training.steps
        with self._report() as report:
            report.say(self._greeting())
            meter, saved_at = _Meter(), time.monotonic()
            while (step := self.progress.step) < steps:
                meter.add(*self._timed_step(step))
                step = self.progress.step
                report.advance(step, meter.last)
                stops = self.processes.any(is_stopped())
                is_last = step == steps
                evaluates = is_last or step % run.evaluate_every == 0
                if evaluates or step % run.log_every == 0:
                    report.log(self._record(meter, self._validate(report) if evaluates else None))
                    meter = _Meter()
                if is_last or stops or self.processes.any(time.monotonic() - saved_at > 60 * run.checkpoint_minutes):
                    self.save()
                    saved_at = time.monotonic()
                if stops:
                    report.say(f"stopped at step {step}; the same command goes on")
                    return is_last
        return True

    def _report(self) -> Report:
        run, is_silent = self.recipe.run, not self.processes.is_first
        steps = self.recipe.training.steps
        return Report(run.directory, steps, self.progress.step, is_silent=is_silent, has_board=run.tensorboard)

    def save(self) -> None:
        """Writes the state, and the model as it is, from the first process."""
        if self.processes.is_first:
            directory = self.recipe.run.directory
            save_state(directory / STATE, self.network, self.optimisers, self.progress, self.fixed)
            save_network(self.network, self.config, directory / MODEL, self.recipe.run.weights)
            tokenizer = (tokens_directory(self.recipe) / TOKENIZER_FILE).read_text(encoding="utf-8")
            (directory / MODEL / TOKENIZER_FILE).write_text(tokenizer, encoding="utf-8")
        self.processes.wait()

    def _greeting(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        tokens = sum(len(ids) for ids in self.packed.sources)
        return (
            f"{parameters:,} parameters, {tokens:,} tokens to train on, {self.validation.num_tokens:,} to validate on; "
            f"step {self.progress.step} of {self.recipe.training.steps}"
        )

    def _timed_step(self, step: int) -> tuple[float, float, float]:
        """Loss, norm of the gradient and time of one step."""
        start = time.perf_counter()
        loss, norm = self._step(step)
        took = time.perf_counter() - start
        self.progress = replace(self.progress, step=step + 1, seconds=self.progress.seconds + took)
        return loss, norm, took

    def _step(self, step: int) -> tuple[float, float]:
        training, processes = self.recipe.training, self.processes
        # What a network draws in a step depends on nothing before it.
        torch.manual_seed((training.seed << 32) + step * processes.size + processes.rank)
        rate = learning_rate(step, training)
        for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
            group["lr"] = rate
        mine = training.batch // processes.size
        first = step * training.batch + processes.rank * mine
        total = torch.zeros(())
        for offset in range(0, mine, training.micro_batch):
            loss = self._loss(first + offset) * (training.micro_batch / mine)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach().cpu()
        self._average_gradients()
        processes.average(total)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), training.clip)
        if not math.isfinite(float(total)) or not math.isfinite(float(norm)):
            raise FloatingPointError(f"step {step}: the loss is {float(total)}, its gradient's norm {float(norm)}")
        for optimiser in self.optimisers:
            optimiser.step()
        self.network.zero_grad(set_to_none=True)
        return float(total), float(norm)

    def _loss(self, first_window: int) -> Tensor:
        inputs, targets = self.order.batch(first_window, self.recipe.training.micro_batch)
        with self._autocast():
            logits: Tensor = self.network(torch.from_numpy(inputs).to(self.device))
        wanted = torch.from_numpy(targets).to(self.device)
        return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())

    def _autocast(self) -> AbstractContextManager[object]:
        if self.recipe.training.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _average_gradients(self) -> None:
        if self.processes.size == 1:
            return
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.processes.average(flat)
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _validate(self, report: Report) -> float:
        with self._autocast():
            loss = self.validation.loss(self.network, self.device, self.processes)
            if self.processes.is_first:
                for prompt in self.recipe.run.prompts:
                    text = complete(self.network, self.packed.tokenizer, prompt, self.recipe.data.window, self.device)
                    report.sample(self.progress.step, prompt, text)
        self.progress = replace(self.progress, best=min(loss, self.progress.best or math.inf))
        return loss

    def _record(self, meter: _Meter, validation_loss: float | None) -> Record:
        training, step = self.recipe.training, self.progress.step
        batch_tokens = training.batch * self.recipe.data.window
        return Record(
            step=step,
            tokens=step * batch_tokens,
            epoch=self.order.epoch_of(step * training.batch),
            loss=meter.loss / meter.steps,
            gradient_norm=meter.norm / meter.steps,
            learning_rate=learning_rate(step - 1, training),
            tokens_per_s=meter.steps * batch_tokens / meter.seconds,
            seconds=self.progress.seconds,
            validation_loss=validation_loss,
            validation_bits_per_byte=None
            if validation_loss is None
            else self.validation.bits_per_byte(validation_loss),
        )


class _Meter:
    """Sums since the last line of the log."""

    def __init__(self) -> None:
        self.steps, self.loss, self.norm, self.seconds, self.last = 0, 0.0, 0.0, 0.0, math.nan

    def add(self, loss: float, norm: float, seconds: float) -> None:
        self.steps += 1
        self.loss += loss
        self.norm += norm
        self.seconds += seconds
        self.last = loss


def choose_device(wanted: str, rank: int) -> torch.device:
    """The processor of this process. Raises ValueError where CUDA is wanted and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: no CUDA device was found")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def tokens_directory(recipe: Recipe) -> Path:
    """Where a run keeps its packed tokens."""
    return recipe.run.directory / "tokens"
