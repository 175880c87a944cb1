"""Medusa-2: the model learns along with its heads, through adapters that are then merged into it.

The loss is the model's own plus lambda_0 times that of the heads (arXiv:2401.10774, 2.2.2 and
appendix B). Heads have four times the model's learning rate, and a warm-up spares the model
untrained heads. With self-distillation the model's own loss is the divergence from what it was: the
teacher is the same network with its adapters off, so there is no second model in memory.

The model must fit into memory here. Texts go through it one by one and their gradients add up to a
step's, so nothing is padded and the logits of one text are in memory at a time.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax

from offload_rt.errors import ConfigError, NumbersError
from offload_rt.speculative.medusa.heads import MedusaHeads
from offload_rt.training.corpus import Sample, pack
from offload_rt.training.frozen import SAVE_S, Tally
from offload_rt.training.loss import Score, head_weight, rate_factor, token_loss
from offload_rt.training.settings import WarmUp
from offload_rt.training.state import Recipe, load_state, save_state
from offload_rt.training.vocabulary import Vocabulary

HEADS_RATE = 4  # times the model's learning rate
_DROPOUT = 0.05
_MOST_LOSS = 700.0  # whose exponential is still a number


def require_peft() -> Any:  # noqa: ANN401 - an optional module
    """The library of adapters.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "--method medusa-2 needs peft, which is not installed: pip install 'offload-rt[train]'"
        ) from error
    return peft


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:  # noqa: ANN401
    """The whole model, in transformers' own modules."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    return model.to(device).eval()


def add_adapters(model: Any, rank: int, seed: int) -> Any:  # noqa: ANN401
    """Adapters beside every linear layer but the output head, and nothing else trainable."""
    peft = require_peft()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=max(1, rank // 2),
        lora_dropout=_DROPOUT,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


@dataclass(frozen=True, slots=True)
class _Read:
    """What was computed from a text: [R, E] hidden states and [R, V] logits of its places."""

    hidden: torch.Tensor
    logits: torch.Tensor


class JointTrainer:
    """Trains a model's adapters and its heads together.

    Args:
        model: with adapters, from `add_adapters`.
        heads: fp32, on the same device.
        vocabulary: tokens of their rows, on the same device.
        samples: texts to train on.
        recipe: how; its seed decides the order of texts, and dropout.
        distill: whether the model is held to what it was, and not to the texts.

    Attributes:
        progress: how far it is.
        steps: how many there are.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - of peft, which has no types
        heads: MedusaHeads,
        vocabulary: Vocabulary,
        samples: Sequence[Sample],
        recipe: Recipe,
        *,
        distill: bool,
    ) -> None:
        self.model, self.heads, self.vocabulary = model, heads, vocabulary
        config = self._config = recipe.config
        self._samples, self._distill = samples, distill
        self._seed, self._path = recipe.seed, recipe.state
        self._device = next(heads.parameters()).device
        adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._parameters = adapters | {f"heads.{n}": p for n, p in heads.named_parameters()}
        groups = [
            {"params": list(adapters.values()), "scale": 1 / HEADS_RATE},
            {"params": list(heads.parameters()), "scale": 1.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0)
        self.progress = load_state(recipe.state, self._parameters, self._optimizer)
        self._batches = pack(samples, config.batch_tokens)
        self.steps = config.epochs * len(self._batches)

    def run(self, *, poll: Callable[[], None] = lambda: None, save_s: float = SAVE_S) -> None:
        """Train to the end.

        Args:
            poll: called before each text; what it raises ends the training after saving the last
                whole step.
            save_s: seconds between saves.

        Raises:
            ConfigError: the disk is full.
        """
        saved_at = time.monotonic()
        while self.progress.step < self.steps:
            tally = Tally.empty(self.heads.shape.heads, self._device)
            try:
                own_loss = self._step(self.progress.step, tally, poll)
            except BaseException:
                # Parameters move at the end of a step: they are those of the last whole one.
                self.save()
                raise
            self.progress.step += 1
            self.progress.history.append(tally.note(self.progress.step) | {"own_loss": own_loss})
            if time.monotonic() - saved_at >= save_s or self.progress.step == self.steps:
                self.save()
                saved_at = time.monotonic()

    def save(self) -> None:
        """Save the state of the training."""
        save_state(self._path, self._parameters, self._optimizer, self.progress)

    def score(self, samples: Sequence[Sample]) -> Score:
        """How often the heads are right about texts."""
        score = Score(self.vocabulary, self.heads.shape.heads)
        self.model.eval()
        with torch.inference_mode(), self._autocast():
            for sample in samples:
                hidden, labels = self._read(sample).hidden, self._labels(sample)
                for head in range(self.heads.shape.heads):
                    score.add(head, self.heads.head(head, hidden), labels[:, head])
        return score

    def merge(self) -> Any:  # noqa: ANN401
        """Put the adapters into the model's weights; returns the plain model, trained no more."""
        self.model = self.model.merge_and_unload()
        return self.model

    def _step(self, step: int, tally: Tally, poll: Callable[[], None]) -> float:
        """One step; returns the model's own loss per place."""
        batch = self._batch(step)
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.lr * group["scale"] * rate_factor(step, self.steps)
        self._optimizer.zero_grad(set_to_none=False)
        places = sum(len(sample.places) for sample in batch)
        total = 0.0
        self.model.train()
        with torch.random.fork_rng():
            torch.manual_seed((self._seed + step) % 2**63)  # of dropout
            for sample in batch:
                poll()
                share = len(sample.places) / places
                own, of_heads = self._losses(sample, tally)
                loss = share * (own + self._heads_weight(step) * of_heads)
                loss.backward()
                tally.loss += loss.detach()
                total += share * float(own.detach())
        self._optimizer.step()
        tally.steps += 1
        return total

    def _losses(self, sample: Sample, tally: Tally) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own loss on a text, and the weighted sum of its heads'."""
        teacher = self._teacher(sample) if self._distill else None
        read, labels = self._read(sample), self._labels(sample)
        if teacher is None:
            own = token_loss(read.logits, self._next_tokens(sample))
        else:
            current = log_softmax(read.logits.float(), dim=-1)
            own = kl_div(current, teacher, log_target=True, reduction="batchmean")
        of_heads = torch.zeros((), device=self._device)
        for head in range(self.heads.shape.heads):
            targets = self.vocabulary.targets(labels[:, head])
            with self._autocast():
                logits = self.heads.head(head, read.hidden)
            of_heads = of_heads + head_weight(head) * token_loss(logits, targets)
            tally.add(head, logits.detach(), targets)
        return own, of_heads

    def _teacher(self, sample: Sample) -> torch.Tensor:
        """[R, V] log-probabilities of the model as it was."""
        self.model.eval()
        with torch.no_grad(), self.model.disable_adapter():
            teacher = log_softmax(self._read(sample).logits.float(), dim=-1)
        self.model.train()
        return teacher

    def _read(self, sample: Sample) -> _Read:
        return read_places(self.model, sample, self._device)

    def _labels(self, sample: Sample) -> torch.Tensor:
        return sample.labels(self.heads.shape.heads).to(self._device)

    def _next_tokens(self, sample: Sample) -> torch.Tensor:
        return torch.tensor([sample.ids[at + 1] for at in sample.places], device=self._device)

    def _heads_weight(self, step: int) -> float:
        """lambda_0 at a step: as it is, or rising to it along a quarter of a sine."""
        weight = self._config.joint.heads_weight
        if self._config.joint.warm_up is WarmUp.TWO_STAGE:
            return weight
        return weight * math.sin(math.pi / 2 * (step + 1) / self.steps)

    def _batch(self, step: int) -> list[Sample]:
        epoch, within = divmod(step, len(self._batches))
        generator = torch.Generator().manual_seed((self._seed + epoch) % 2**63)
        order = torch.randperm(len(self._batches), generator=generator)
        batch = self._batches[int(order[within])]
        return list(self._samples[batch.start : batch.stop])

    def _autocast(self) -> AbstractContextManager[object]:
        """As in `frozen`: bf16 products where the model has 16 bits."""
        if next(self.model.parameters()).dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)


def read_places(model: Any, sample: Sample, device: torch.device) -> _Read:  # noqa: ANN401
    """Take a text through a model; only its places reach the output head."""
    ids = torch.tensor([sample.ids], device=device)
    places = torch.tensor(sample.places, device=device)
    with _fed_to(model.get_output_embeddings()) as fed:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0]
    return _Read(fed[0][0], logits)


def perplexity(
    model: Any,  # noqa: ANN401
    samples: Sequence[Sample],
    device: torch.device,
    poll: Callable[[], None] = lambda: None,
) -> float:
    """Of the answers in these texts, by a model; each token counts the same.

    Raises:
        NumbersError: the model's loss is no number.
    """
    total, count = 0.0, 0
    model.eval()
    with torch.inference_mode():
        for sample in samples:
            poll()
            logits = read_places(model, sample, device).logits
            following = torch.tensor([sample.ids[at + 1] for at in sample.places], device=device)
            total += float(token_loss(logits, following)) * len(following)
            count += len(following)
    mean = total / max(1, count)
    if not math.isfinite(mean):
        raise NumbersError(
            f"the model's loss on held-out answers is {mean}: its numbers are NaN or infinite in "
            f"{str(model.dtype).removeprefix('torch.')}; use --dtype float32, or lower --lr"
        )
    return math.exp(min(mean, _MOST_LOSS))


@contextmanager
def _fed_to(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect what a module is given, [1, R, E] each time."""
    fed: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0]))
    try:
        yield fed
    finally:
        handle.remove()
