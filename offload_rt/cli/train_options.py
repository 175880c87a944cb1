"""The options of `train-medusa`, and the records they become."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from offload_rt.config import KVPlace, RuntimeConfig
from offload_rt.errors import ConfigError
from offload_rt.training.settings import (
    ANSWER_TOKENS,
    CorpusConfig,
    JointConfig,
    Method,
    TrainConfig,
    WarmUp,
)

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
_CORPUS, _TRAIN, _JOINT = CorpusConfig(), TrainConfig(), JointConfig()


class _Vocabulary(click.ParamType):
    """Rows of an output head, 0 for `full` or None for `shared`."""

    name = "shared|full|n"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        words = {None: None, "shared": None, "full": 0}
        if value is None or isinstance(value, str) and value in words:
            return words[value]
        try:
            return int(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither shared nor full nor a number of tokens", param, ctx)


_OPTIONS = (
    click.option(
        "--output", "folder", required=True, help="Folder for the heads; made if missing."
    ),
    click.option(
        "--data",
        required=True,
        help="File to train on, one in each line: conversations (JSON with messages, or ShareGPT's "
        "conversations), or with --self-distill prompts as `bench` takes them.",
    ),
    click.option(
        "--method",
        type=click.Choice([str(method) for method in Method]),
        default=str(_TRAIN.method),
        help="medusa-1 trains heads and leaves the model as it is; medusa-2 trains both, needs "
        "peft and memory for the whole model, and writes a new model to OUTPUT/model.",
    ),
    click.option(
        "--self-distill",
        is_flag=True,
        help="The model answers the prompts itself, and is trained on that.",
    ),
    click.option(
        "--answer-tokens",
        type=int,
        default=None,
        show_default=str(ANSWER_TOKENS),
        help="With --self-distill: tokens of an answer at most.",
    ),
    click.option(
        "--temperature",
        type=float,
        default=_CORPUS.temperature,
        help="With --self-distill: randomness of answers; those to held-out prompts are greedy.",
    ),
    click.option(
        "--sequences",
        type=int,
        default=_CORPUS.sequences,
        help="With --self-distill: prompts answered at once; weights are streamed once for all.",
    ),
    click.option(
        "--raw", is_flag=True, help="Give prompts as they are, without the chat template."
    ),
    click.option(
        "--pass-tokens",
        type=int,
        default=_CORPUS.pass_tokens,
        help="Tokens that are read in one pass; weights are streamed once for all of them.",
    ),
    click.option(
        "--holdout",
        type=float,
        default=_CORPUS.holdout,
        help="Share of the prompts that is not trained on but used to tell how good the heads are.",
    ),
    click.option("--heads", type=int, default=_CORPUS.heads, help="How many."),
    click.option("--layers", type=int, default=_TRAIN.layers, help="Blocks of each head."),
    click.option(
        "--vocabulary",
        type=_Vocabulary(),
        default=_TRAIN.vocabulary,
        help="Tokens a head can guess: N of the commonest, by an output head of its own; "
        "full is all tokens; shared uses the model's output head, for the smallest heads.",
    ),
    click.option(
        "--epochs",
        type=int,
        default=_TRAIN.epochs,
        help="Times each token is trained on.",
    ),
    click.option(
        "--lr",
        type=float,
        default=_TRAIN.lr,
        help="Highest learning rate of the heads; medusa-2 trains the model at a quarter of it.",
    ),
    click.option(
        "--batch-tokens",
        type=int,
        default=_TRAIN.batch_tokens,
        help="Tokens of a training step.",
    ),
    click.option(
        "--warm-up",
        type=click.Choice([str(kind) for kind in WarmUp]),
        default=str(_JOINT.warm_up),
        help="With medusa-2: train the heads alone first, or let their weight grow from 0.",
    ),
    click.option(
        "--lora-rank",
        type=int,
        default=_JOINT.lora_rank,
        help="With medusa-2: rank of the adapters through which the model is trained.",
    ),
    click.option(
        "--heads-weight",
        type=float,
        default=_JOINT.heads_weight,
        help="With medusa-2: what the heads' loss counts beside the model's.",
    ),
    click.option("--seed", type=int, default=_CORPUS.seed, help="Source of randomness."),
    click.option(
        "--cache",
        default=None,
        show_default="OUTPUT/cache, removed at the end",
        help="Folder that keeps answers and hidden states; other trainings on them can use it.",
    ),
)


def training_options(command: CommandT) -> CommandT:
    """All of them, for the verb."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def corpus_of(values: Mapping[str, Any]) -> CorpusConfig:
    """What a command line trains on.

    Raises:
        ConfigError: a value is out of range, or an option would have no effect.
    """
    names = {field.name for field in dataclasses.fields(CorpusConfig)}
    return CorpusConfig(**{name: value for name, value in values.items() if name in names})


def train_of(values: Mapping[str, Any]) -> TrainConfig:
    """How a command line trains.

    Raises:
        ConfigError: a value is out of range, or an option would have no effect.
    """
    joint = JointConfig(
        warm_up=WarmUp(values["warm_up"]),
        lora_rank=values["lora_rank"],
        heads_weight=values["heads_weight"],
    )
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in values.items() if name in names}
    return TrainConfig(**given | {"method": Method(values["method"]), "joint": joint})


def check_effects(corpus: CorpusConfig, config: TrainConfig, runtime: RuntimeConfig) -> None:
    """Refuse what would have no effect, and what is not installed.

    Raises:
        ConfigError: there is some.
    """
    kv_set = runtime.kv is not KVPlace.AUTO or runtime.kv_folder or runtime.kv_block_tokens
    if kv_set and not corpus.self_distill:
        raise ConfigError("--kv is for answers the model writes: add --self-distill")
    if config.method is Method.MEDUSA_2 and importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "--method medusa-2 needs peft, which is not installed: pip install 'offload-rt[train]'"
        )


def flags(record: CorpusConfig | TrainConfig | JointConfig) -> dict[str, object]:
    """The settings of a record by the names a user gave them."""
    values = {
        f"--{field.name.replace('_', '-')}": getattr(record, field.name)
        for field in dataclasses.fields(record)
        if field.name != "joint"
    }
    if "--vocabulary" in values:
        values["--vocabulary"] = {None: "shared", 0: "full"}.get(
            values["--vocabulary"], values["--vocabulary"]
        )
    return values
