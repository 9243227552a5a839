"""The training loop, the only one: teacher, student and control all run through `Trainer.fit`.

Everything random in it is a function of the seed and the position: the order of (seed, epoch), the augmentation of
(seed, epoch, image), dropout and mixup of (seed, update). So the position is the whole random state of a run.
"""

import math
import textwrap
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from itertools import chain, islice
from typing import Any, NoReturn, cast

import torch
from accelerate.utils import gather_object
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from kd.checkpoint import store
from kd.checkpoint.files import advised
from kd.data import Batch, mixer
from kd.errors import CheckpointError, TrainingError
from kd.losses.methods.base import Seen
from kd.metrics import nll, top_k_accuracy
from kd.models.wrappers import Student
from kd.runtime.signals import GO_ON, Interrupted, stop_requested
from kd.training.logger import Logger
from kd.training.nonfinite import bad_rows, describe, first_bad_gradient
from kd.training.objective import Objective, Terms
from kd.training.predict import not_finite, predict
from kd.training.run import Run
from kd.training.schedule import ema, epoch_order, mixed_seed, optimizer, schedule, share
from kd.training.stage import Stage, as_trained, build, metadata

MOST_SKIPPED = 32  # halvings take fp16's loss scale from 65,536 to 1.5e-5: by then it is not the scale that overflows


@dataclass
class Progress:
    """Where a stage stands: with the weights and the optimizer, all that a resumed run needs."""

    update: int = 0
    seconds: float = 0.0
    selected: dict[str, float] = field(default_factory=dict)  # epoch, val_top1 and val_nll of the selected weights
    epochs: int = 0  # validated; a run that is stopped while it validates resumes with that validation
    skipped: int = 0  # updates that fp16's gradient scaler left out


class Trainer:
    """Trains one stage of a run; `fit` resumes from the stage's directory and leaves its weights there."""

    def __init__(self, stage: Stage, run: Run):
        self.stage, self.data = stage, stage.data
        self.recipe, self.accelerator = recipe, accelerator = run.recipe, run.accelerator
        self.directory, self.owner = run.stage_directory(stage.name), run.owner(stage.name)
        self.metadata = metadata(stage.name, recipe, stage.data)
        # A trained teacher serves many runs, so its curve is kept beside its weights.
        curve = (self.directory if stage.name == "teacher" else run.directory) / "metrics.jsonl"
        self.logger = Logger(curve, accelerator, run.logger.console)
        self.updates_per_epoch = len(self.data.train) // recipe.train.batch_size
        self.updates = stage.epochs * self.updates_per_epoch
        self.progress = Progress()
        self.skipped_in_a_row = 0
        self.saved_at = time.monotonic()
        self.selected_weights: dict[str, Tensor] | None = None  # on the CPU: every checkpoint has them
        self.deployed = build(stage, recipe, accelerator)
        self.optimizer = optimizer(stage.model.model, recipe)
        # What the objective learns follows the same rule for weight decay.
        o = recipe.optimizer
        rule = {"weight_decay": o.weight_decay, "weight_decay_exclude_1d": not o.decay_norm_and_bias}
        for group in param_groups_weight_decay(stage.objective, **rule):
            self.optimizer.add_param_group(group)
        self.scheduler = schedule(self.optimizer, recipe, stage.epochs, self.updates_per_epoch)
        self.ema = ema(self.deployed, recipe.train) if recipe.train.ema_decay else None
        for network in stage.networks() if recipe.train.compile else ():
            network.compile()
        self.model, self.stepper = accelerator.prepare(stage.model, self.optimizer)
        self.mix = mixer(recipe.data, self.data.num_classes)

    # ---- epochs

    def fit(self) -> None:
        """Train to the last epoch, from the newest checkpoint where there is one, and write the weights."""
        self._load()
        self.logger.rewind(self.stage.name, self.progress.update, self.progress.epochs)
        with self.logger.progress(self.stage.name, self.updates, self.progress.update):
            while (epoch := self.progress.epochs) < self.stage.epochs:
                if self.progress.update < (epoch + 1) * self.updates_per_epoch:
                    self._epoch(epoch)
                    self.stage.objective.end_epoch()
                self._validate(epoch)
                self._save_or_stop()
        if self.accelerator.is_main_process:
            weights = {"last": self._evaluated().model.state_dict()}
            if self.selected_weights:
                weights["selected"] = self.selected_weights
            self.logger.flush()
            p = self.progress
            about = {"updates": self.updates, "seconds": p.seconds, "selected": p.selected, "skipped": p.skipped}
            store.finish(self.directory, weights, self.metadata, about, self.owner)
        self.accelerator.wait_for_everyone()

    def measure(self, updates: int = 2) -> float:
        """Seconds that one update takes, after a first one that warms up. Nothing is written."""
        batches = self._batches(0, 0)
        started = 0.0  # of the last update: the first one compiles kernels and fills caches
        for _ in range(updates):
            started = time.perf_counter()
            self._update(list(islice(batches, self.recipe.train.accumulation)))
        return time.perf_counter() - started

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """The micro-batches of this process from update `first` of an epoch on."""
        train = self.recipe.train
        order = epoch_order(len(self.data.train), self.recipe.seed, epoch)
        # The last incomplete batch is left out, as is usual: batch normalisation needs a full one.
        batches = order[: self.updates_per_epoch * train.batch_size].view(-1, train.batch_size)[first:]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        plan = [piece for batch in batches for piece in share(batch, train.accumulation, world, rank)]
        return iter(self.data.train.batches(plan, epoch))

    def _epoch(self, epoch: int) -> None:
        first = self.progress.update % self.updates_per_epoch
        batches = self._batches(epoch, first)
        for _ in range(first, self.updates_per_epoch):
            started = time.perf_counter()
            logged = self._update(list(islice(batches, self.recipe.train.accumulation)))
            seconds = time.perf_counter() - started
            will_log = self._logs_next()
            self.progress.update += 1
            self.progress.seconds += seconds
            self.logger.advance(self.progress.update)
            if will_log:
                self._log(epoch, logged, seconds)
            if self.progress.update % self.updates_per_epoch:  # an epoch's last update is saved after its validation
                self._save_or_stop()

    # ---- one update

    def _update(self, batches: list[Batch]) -> dict[str, Tensor]:
        """One optimizer step over the global batch; returns what there is to log, as sums over this process."""
        self.model.train()
        self.stage.objective.train()
        # Before the update and from its number alone: the schedule has no state to save.
        self.scheduler.step_update(self.progress.update)
        self._weigh_classes(batches)
        logged: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            # DDP sends gradients once an update, with the last pass.
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                for name, value in self._forward_backward(batch, i).items():
                    logged[name] = logged.get(name, 0) + value
        self._average_gradients()
        limit = self.recipe.train.clip_grad or math.inf
        learned = chain(self.model.parameters(), self.stage.objective.parameters())
        norm = cast(Tensor, self.accelerator.clip_grad_norm_(learned, limit))
        # fp16's scaler looks by itself, and leaves out an update that is not finite.
        if self.accelerator.scaler is None and not torch.isfinite(norm):
            self._refuse(f"gradient norm {float(norm)}", batches)
        self.stepper.step()
        self._count_skipped(batches)
        self.stepper.zero_grad()
        if self.ema and not self.stepper.step_was_skipped:
            # The decay follows from the position, so that the warm-up has no state to save.
            made = self.progress.update + 1 - self.progress.skipped
            self.ema.update(self.deployed, made if self.ema.use_warmup else None)
        return {**logged, "grad_norm": norm}

    def _weigh_classes(self, batches: list[Batch]) -> None:
        """Divide the cross entropy by the class weights of the global batch's labels, as nn.CrossEntropyLoss."""
        weight, data = self.stage.objective.class_weight, self.recipe.data
        # Mixed labels are probabilities, for which nn.CrossEntropyLoss divides by their number.
        if weight is None or data.mixup or data.cutmix:
            return
        own = torch.stack([weight[batch.targets].sum() for batch in batches]).sum()
        total = cast(Tensor, self.accelerator.reduce(own, reduction="sum"))
        self.stage.objective.divide_ce(total / self.recipe.train.batch_size)

    def _average_gradients(self) -> None:
        """Average the objective's gradients over the processes. DDP would also send its buffers, such as a memory bank,
        on every update.
        """
        if self.accelerator.num_processes > 1:
            for parameter in self.stage.objective.parameters():
                if parameter.grad is not None:
                    parameter.grad = cast(Tensor, self.accelerator.reduce(parameter.grad, reduction="mean"))

    def _forward(self, batch: Batch, i: int) -> tuple[Seen, Terms]:
        """The i-th piece of the next update; all that is random in it comes from its position."""
        seed = mixed_seed(self.recipe.seed, self.progress.update, self.accelerator.process_index, i)
        torch.manual_seed(seed)  # dropout has no other state
        epoch = self.progress.update / self.updates_per_epoch
        batch = as_trained(batch, self.mix, seed, self.recipe.train.channels_last)
        seen = self.stage.see(batch, epoch, self.model, self.accelerator)
        return seen, self.stage.objective(seen)

    def _forward_backward(self, batch: Batch, i: int) -> dict[str, Tensor]:
        seen, terms = self._forward(batch, i)
        # The loss sums over images; DDP averages over processes. Together: the mean over the global batch, whatever
        # the number of processes and accumulation steps, also where their shares are uneven.
        scale = self.accelerator.num_processes / self.recipe.train.batch_size
        logged = _observe(terms, self.stage.objective, seen) if self._logs_next() else {}
        # A loss that is not finite makes the gradient so on every process, also where its own derivative is finite: one
        # look at the norm, which all share, then sees both. To any other loss this adds 0.
        self.accelerator.backward(terms.loss * (scale + 0 * terms.loss.detach()))
        return {**logged, "loss": terms.loss.detach()}

    def _logs_next(self) -> bool:
        done = self.progress.update + 1
        return done % self.recipe.train.log_every == 0 or done == self.updates

    def _count_skipped(self, batches: list[Batch]) -> None:
        """Count the updates that fp16's scaler leaves out: a few while it finds its scale, more are an error."""
        if not self.stepper.step_was_skipped:
            self.skipped_in_a_row = 0
            return
        self.progress.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MOST_SKIPPED:
            self._refuse(f"{MOST_SKIPPED} updates in a row without a finite gradient in fp16", batches)

    def _refuse(self, what: str, batches: list[Batch]) -> NoReturn:
        """Stop before NaN reaches the weights, and run the update again to find where it comes from."""
        self.stepper.zero_grad()
        rows = []
        for i, batch in enumerate(batches):
            with self.accelerator.no_sync(self.model):
                seen, terms = self._forward(batch, i)
                terms.loss.backward()
            rows.append(bad_rows(seen, self.stage.objective))
        parameter = first_bad_gradient(self.stage.model.model, self.stage.objective)
        raise TrainingError(
            f"{self.stage.name}: {what} in update {self.progress.update + 1} of {self.updates}, which was not applied; "
            f"the last saved state is kept. {describe(gather_object(rows), gather_object([parameter]))}"
        )

    def _log(self, epoch: int, logged: dict[str, Tensor], seconds: float) -> None:
        norm = logged.pop("grad_norm")
        reduced = self.accelerator.reduce(torch.stack([value.float() for value in logged.values()]), reduction="sum")
        size = self.recipe.train.batch_size
        values = {name: value / size for name, value in zip(logged, reduced.tolist(), strict=True)}
        values |= {
            "grad_norm": float(norm),
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": size / seconds,
        }
        if self.accelerator.scaler:
            values["skipped"] = self.progress.skipped
        self.logger.write({"stage": self.stage.name, "update": self.progress.update, "epoch": epoch, **values})

    # ---- validation

    def _evaluated(self) -> Student:
        """The network that is evaluated and saved: the averaged one where train.ema_decay is set."""
        return self.ema.module if self.ema else self.deployed

    def _validate(self, epoch: int) -> None:
        if self.accelerator.num_processes > 1:
            # Running statistics are each process's own: all validate the network that the first one saves.
            for buffer in self._evaluated().buffers():
                torch.distributed.broadcast(buffer, 0)
        try:
            logits = predict(self._evaluated(), self.data.val, self.recipe.train.batch_size, self.accelerator)
        except Interrupted:
            self._stop()
        if wrong := not_finite(logits):  # the gradient cannot show what an epoch's last update did
            raise TrainingError(
                f"{self.stage.name}: {wrong} after update {self.progress.update} of {self.updates}; the last saved "
                f"state is kept. Try a smaller optimizer.lr, or train.clip_grad=1"
            )
        targets = self.data.val.targets
        top1, val_nll = top_k_accuracy(logits, targets, 1).item(), nll(logits, targets).item()
        entry = {"stage": self.stage.name, "update": self.progress.update, "epoch": epoch}
        self.logger.write({**entry, "val_top1": top1, "val_nll": val_nll})
        skipped = f"   {self.progress.skipped} updates skipped (fp16)" if self.progress.skipped else ""
        self.logger.say(
            f"{self.stage.name:8} epoch {epoch + 1:>3}/{self.stage.epochs}   validation top-1 {top1:6.2%}   "
            f"nll {val_nll:.4f}{skipped}"
        )
        self.progress.epochs = epoch + 1
        best = self.progress.selected
        # Ties in accuracy, common on small sets, go to the lower nll.
        if not best or (top1, -val_nll) > (best["val_top1"], -best["val_nll"]):
            self.progress.selected = {"epoch": epoch + 1, "val_top1": top1, "val_nll": val_nll}
            weights = self._evaluated().model.state_dict()
            # Cloned, since the network trains on, and kept off the GPU, whose memory is scarcer.
            self.selected_weights = {name: weight.cpu().contiguous().clone() for name, weight in weights.items()}

    # ---- checkpoints

    def _save_or_stop(self) -> None:
        if stop_requested(self.accelerator):
            self._stop()
        if time.monotonic() - self.saved_at >= self.recipe.train.save_every:
            self._save()

    def _stop(self) -> NoReturn:
        self._save()
        self.accelerator.wait_for_everyone()
        raise Interrupted(f"{self.stage.name} stopped after update {self.progress.update} of {self.updates}")

    def _save(self) -> None:
        self.logger.flush()  # a checkpoint must not be newer than the lines that are on disk
        if self.accelerator.is_main_process:
            update, state = self.progress.update, self._state()
            store.save(self.directory, update, state, self.selected_weights, self.metadata, self.owner)
        self.saved_at = time.monotonic()

    def _modules(self) -> dict[str, nn.Module]:
        modules = {"model": self.stage.model.model, "objective": self.stage.objective}
        return modules | ({"ema": self.ema.module} if self.ema else {})

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        modules = {name: module.state_dict() for name, module in self._modules().items()}
        return {"ema": None, **modules, **asdict(self.progress)} | {
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }

    def _load(self) -> None:
        with advised(store.advice(self.stage.name, self.directory)):
            newest = store.load(self.directory, self.logger.say, self.owner)
        if self.accelerator.is_main_process:
            store.clean(self.directory)
        names = gather_object([newest.path.name if newest else "none"])
        if len(set(names)) > 1:  # they would train from different weights, and average their gradients
            raise CheckpointError(
                f"{self.directory}: not all processes find the same checkpoint ({', '.join(names)}); a shared file "
                f"system may lag behind; {GO_ON}"
            )
        if newest is None:
            return
        try:
            self._restore(newest.state)
        except (LookupError, AttributeError, TypeError, RuntimeError, ValueError) as error:  # of another torch or timm
            reason = textwrap.shorten(str(error), 300)  # torch writes several lines
            raise CheckpointError(f"{newest.path}: does not fit this run ({reason})") from error
        self.selected_weights = newest.selected
        self.logger.say(f"{self.stage.name:8} goes on after update {self.progress.update} of {self.updates}")

    def _restore(self, state: dict[str, Any]) -> None:
        for name, module in self._modules().items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**{f.name: state[f.name] for f in fields(Progress)})


# ---- what is logged of a batch


def _observe(terms: Terms, objective: Objective, seen: Seen) -> dict[str, Tensor]:
    """Sums over the batch of what is worth watching; the terms are unweighted."""
    logits = objective.logits(seen.student)
    observed = {"student_entropy": _entropy(logits), **terms.values}
    if seen.teacher:
        observed["teacher_entropy"] = _entropy(seen.teacher.logits)
        observed["agreement"] = (logits.argmax(-1) == seen.teacher.logits.argmax(-1)).float().sum()
    return observed


def _entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.detach().float().softmax(-1)).sum()
