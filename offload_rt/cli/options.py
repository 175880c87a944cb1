"""The options of the verbs, in groups, and the records they become.

A default is that of the record's field; nothing is repeated here.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from offload_rt.cli.completion import model_items
from offload_rt.cli.verb import option_key
from offload_rt.config import (
    INNER_WINDOW_TOKENS,
    RECENT_SHARES,
    SINK_TOKENS,
    AcceptRule,
    DraftConfig,
    DraftShape,
    DraftWeights,
    DType,
    GenerationConfig,
    HomeKind,
    KVPlace,
    RetrievalConfig,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.errors import ConfigError
from offload_rt.model.locate import means_model
from offload_rt.session.settings import Settings, check_accept
from offload_rt.units import parse_size

if TYPE_CHECKING:
    from offload_rt.planning.plan_file import PlanFile

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
Values = Mapping[str, Any]


class _Size(click.ParamType):
    """A memory size, as bytes."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        try:
            return value if isinstance(value, int) else parse_size(str(value))
        except (ConfigError, OverflowError) as error:
            self.fail(str(error), param, ctx)


class _Auto(click.ParamType):
    """A number, or None for `auto`.

    Args:
        read: makes the number of a text.
        name: as the help shows it.
        what: the number in words.
    """

    def __init__(self, read: Callable[[str], int | float], name: str, what: str) -> None:
        self._read, self.name, self._what = read, name, what

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float | None:
        if value is None or value == "auto":
            return None
        try:
            return self._read(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither auto nor {self._what}", param, ctx)


class _Window(click.ParamType):
    """A whole number, None for `auto` or 0 for `full`."""

    name = "auto|full|n"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        if value is None or value == "auto":
            return None
        if value == "full":
            return 0
        try:
            if (window := int(str(value))) > 0:
                return window
        except ValueError:
            pass
        self.fail(f"{value!r} is neither auto nor full nor a number of tokens", param, ctx)


class _DTypeChoice(click.Choice[str]):
    """A number format, by torch's name or a short one."""

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        return str(super().convert(_SHORT_DTYPES.get(str(value), value), param, ctx))


class _Drafter(click.ParamType):
    """Who drafts; the folder or hub id of a model means `model:`."""

    name = "drafter"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        text = str(value)
        kind = text.partition(":")[0]
        if kind in _DRAFTERS:
            return text
        if text.isdecimal():
            self.fail(f"{text} is no drafter: --draft-tokens {text} is how much is drafted")
        is_model = means_model(text) and (":" not in text or os.path.lexists(text))
        return f"model:{text}" if is_model else text

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Who can draft by name, and the models that begin so."""
        names = [name for name in _DRAFTERS if name.startswith(incomplete)]
        return [*model_items(incomplete), *map(CompletionItem, names)]


class _Profile(click.ParamType):
    """A profile: its name, or a file."""

    name = "profile"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The profiles that begin so; the shell adds files."""
        from offload_rt.profiling.store import list_profiles

        names = [name for name in list_profiles() if name.startswith(incomplete)]
        return [CompletionItem(incomplete, type="file"), *map(CompletionItem, names)]


_DRAWING = ("temperature", "top_k", "top_p", "min_p")
_DRAFTERS = ("auto", "none", "ngram", "model", "medusa", "triforce")
_SHORT_DTYPES = {
    **dict.fromkeys(("bf16", "bfloat"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float"), "float32"),
}
PROFILE = _Profile()
SIZE, _AUTO = _Size(), _Auto(int, "auto|n", "a whole number")
_AUTO_SHARE = _Auto(float, "auto|share", "a number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What is printed besides the answer.

    Attributes:
        json: one JSON object instead of text.
        verbose: log to stderr.
        quiet: nothing on stderr but errors.
    """

    json: bool = False
    verbose: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.verbose and self.quiet:
            raise ConfigError("-v and -q contradict each other: give one of them")


def _default(record: type, name: str) -> Any:  # noqa: ANN401 - a field may have any type
    """The default of a field; `auto` for None."""
    value = next(field.default for field in dataclasses.fields(record) if field.name == name)
    return "auto" if value is None else value


def _group(*options: Callable[[CommandT], CommandT]) -> Callable[[CommandT], CommandT]:
    def apply(command: CommandT) -> CommandT:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


sampling_options = _group(
    click.option(
        "--sampling",
        type=click.Choice(["greedy", "model"]),
        default="greedy",
        help="What is sampled with where --temperature and others do not say: greedy, or what the "
        "model's authors recommend in generation_config.json.",
    ),
    click.option(
        "--temp",
        "--temperature",
        "temperature",
        type=float,
        default=_default(SamplingConfig, "temperature"),
        help="Randomness of the answer. 0 is greedy: the likeliest token always, exact and "
        "repeatable.",
    ),
    click.option(
        "--top-k",
        type=int,
        default=_default(SamplingConfig, "top_k"),
        help="Sample from the K likeliest tokens; 0 turns it off.",
    ),
    click.option(
        "--top-p",
        type=float,
        default=_default(SamplingConfig, "top_p"),
        help="Sample from the fewest tokens with this probability together; 1 turns it off.",
    ),
    click.option(
        "--min-p",
        type=float,
        default=_default(SamplingConfig, "min_p"),
        help="Drop tokens below this share of the likeliest one's probability; 0 turns it off.",
    ),
    click.option(
        "-s",
        "--seed",
        type=int,
        default=None,
        show_default="drawn, and reported",
        help="Source of randomness; the same seed gives the same answer on one machine. Given one, "
        "measured times decide nothing about drafting, so an answer whose seed was drawn may not "
        "come again.",
    ),
)

max_tokens_option = click.option(
    "-n",
    "--max-tokens",
    type=int,
    default=_default(GenerationConfig, "max_tokens"),
    help="Most tokens of an answer.",
)

ignore_eos_option = click.option(
    "--ignore-eos",
    is_flag=True,
    default=_default(GenerationConfig, "ignore_eos"),
    help="Go on after the model's end-of-text token, for measuring.",
)

system_option = click.option(
    "--system",
    default=None,
    show_default="none",
    help="System prompt; the model must have a chat template.",
)

raw_option = click.option(
    "--raw", is_flag=True, help="Give prompts as they are, without the chat template."
)

answer_options = _group(
    max_tokens_option,
    click.option(
        "--stop",
        multiple=True,
        show_default="none",
        help="Text that ends the answer and is not part of it; may be given several times.",
    ),
    ignore_eos_option,
    system_option,
)

placement_options = _group(
    click.option(
        "--device",
        default=_default(RuntimeConfig, "device"),
        help="auto, cpu, cuda or cuda:N.",
    ),
    click.option(
        "--device-memory",
        "device_limit_bytes",
        type=SIZE,
        default=None,
        show_default="what is free",
        help="All memory of the run on the device: 2GiB, 1500MiB, or bytes.",
    ),
    click.option(
        "--host-memory",
        "host_limit_bytes",
        type=SIZE,
        default=None,
        show_default="what is free",
        help="Host memory for streamed layers and KV, with --home host or --kv host.",
    ),
    click.option(
        "--dtype",
        type=_DTypeChoice([str(name) for name in DType]),
        default=str(_default(RuntimeConfig, "dtype")),
        help="Number format of the computation, bf16, fp16 and fp32 for short; auto is the "
        "checkpoint's own.",
    ),
    click.option(
        "--slots",
        type=_AUTO,
        default=_default(RuntimeConfig, "slots"),
        help="Device buffers that streamed layers share.",
    ),
    click.option(
        "--resident-layers",
        type=_AUTO,
        default=_default(RuntimeConfig, "resident_layers"),
        help="Layers kept on the device; auto is as many as fit, 0 streams all.",
    ),
    click.option(
        "--home",
        type=click.Choice([str(kind) for kind in HomeKind]),
        default=str(_default(RuntimeConfig, "home")),
        help="Where streamed layers live; auto is host memory on CUDA and the files on CPU.",
    ),
    click.option(
        "-c",
        "--ctx-size",
        "--context",
        "context_tokens",
        type=_AUTO,
        default=_default(RuntimeConfig, "context_tokens"),
        help="Tokens of prompt and answer to set memory aside for.",
    ),
    click.option(
        "--kv",
        type=click.Choice([str(place) for place in KVPlace if place is not KVPlace.NONE]),
        default=str(_default(RuntimeConfig, "kv")),
        help="Where keys and values of past tokens live; auto is the device if they fit there, "
        "else host memory for CUDA and a file for the CPU.",
    ),
    click.option(
        "--kv-block-tokens",
        type=_AUTO,
        default=_default(RuntimeConfig, "kv_block_tokens"),
        help="Tokens of KV that are copied to the device at once; auto makes blocks of 4 MiB.",
    ),
    click.option(
        "--kv-folder",
        type=click.Path(),
        default=None,
        show_default="$TMPDIR or /var/tmp",
        help="Where the file for --kv disk is made; it has no name and leaves nothing behind.",
    ),
)

runtime_options = _group(
    click.option(
        "--link-bandwidth",
        type=click.FloatRange(min=0, min_open=True),
        default=None,
        show_default="none",
        help="Emulate a link of this many GB/s; CPU with --home host only.",
    ),
    click.option(
        "--readers",
        type=int,
        default=_default(RuntimeConfig, "readers"),
        help="File reads kept in flight.",
    ),
    click.option(
        "-t",
        "--threads",
        type=_AUTO,
        default=_default(RuntimeConfig, "threads"),
        help="Threads of the CPU that compute.",
    ),
)

draft_options = _group(
    click.option(
        "--draft",
        type=_Drafter(),
        default="auto",
        help="Who drafts tokens that one pass then checks: auto (whichever of those without a "
        "folder should be fastest), none, ngram (what followed the same tokens before, and what "
        "the model found likely then), MODEL or model:MODEL, a small one with the same tokenizer, "
        "medusa:HEADS, heads trained on this model's hidden state, or triforce[:MODEL], this model "
        "itself over a part of a long context, with ngram or MODEL drafting for it.",
    ),
    click.option(
        "--draft-tokens",
        type=_AUTO,
        default=_default(DraftConfig, "draft_tokens"),
        help="Tokens of a draft; auto is the number that should give most tokens a second, "
        "corrected while running. With sampling and --seed auto is a fixed number: "
        f"{DraftConfig(draft='ngram').nodes} for ngram, {DraftConfig(draft='model:m').nodes} for "
        f"a model, {DraftConfig(draft='medusa:m').nodes} for heads, "
        f"{DraftConfig(draft='triforce').nodes} for triforce.",
    ),
    click.option(
        "--draft-shape",
        "shape",
        type=click.Choice([str(shape) for shape in DraftShape]),
        default=str(_default(DraftConfig, "shape")),
        help="Whether a draft model drafts one continuation or a tree of several; auto is a tree "
        "from 9 tokens on.",
    ),
    click.option(
        "--inner-gamma",
        "inner_tokens",
        type=_AUTO,
        default=_default(DraftConfig, "inner_tokens"),
        help="With triforce: tokens drafted for each of its own passes; auto is "
        f"{DraftConfig(draft='triforce').inner.nodes} for ngram, "
        f"{DraftConfig(draft='triforce:m').inner.nodes} for a model.",
    ),
    click.option(
        "--retrieval-budget",
        "budget_tokens",
        type=int,
        default=_default(RetrievalConfig, "budget_tokens"),
        help="With triforce: tokens of context its passes read.",
    ),
    click.option(
        "--retrieval-chunk",
        "chunk_tokens",
        type=int,
        default=_default(RetrievalConfig, "chunk_tokens"),
        help="With triforce: consecutive tokens that are read or left out together.",
    ),
    click.option(
        "--retrieval-recent",
        "recent_share",
        type=_AUTO_SHARE,
        default=_default(RetrievalConfig, "recent_share"),
        help="With triforce: part of the budget that is the newest tokens; 1 leaves nothing else "
        f"but the very first. auto tries {' and '.join(f'{s:g}' for s in RECENT_SHARES)} and keeps "
        "to the one of which more is accepted.",
    ),
    click.option(
        "--retrieval-rebuild",
        "rebuild_tokens",
        type=int,
        default=_default(RetrievalConfig, "rebuild_tokens"),
        help="With triforce: choose anew what is read after so many tokens.",
    ),
    click.option(
        "--retrieval-weights",
        type=click.Choice([str(kind) for kind in DraftWeights]),
        default=str(_default(RetrievalConfig, "retrieval_weights")),
        help="With triforce: draft with the model's own weights (same) or with rounded copies of "
        "them that stay on the device: faster, and nothing is streamed to draft; answers stay the "
        "same. auto takes what is predicted to be faster.",
    ),
    click.option(
        "--draft-window",
        type=_Window(),
        default=_default(DraftConfig, "draft_window"),
        help=f"Tokens a draft model sees at most: the first {SINK_TOKENS} and the newest; full is "
        f"the whole sequence, auto is full, or {INNER_WINDOW_TOKENS} below triforce.",
    ),
    click.option(
        "--draft-weights",
        type=click.Choice([str(kind) for kind in DraftWeights]),
        default=str(_default(DraftConfig, "draft_weights")),
        help="How a draft model's weights are kept: as in its files, or rounded, which is faster "
        "and smaller and changes guesses, never answers; auto is int8 for bf16 models on a CPU.",
    ),
)

accept_option = click.option(
    "--accept",
    type=click.Choice([str(rule) for rule in AcceptRule]),
    default=str(_default(DraftConfig, "accept")),
    help="When a drafted token stands: lossless keeps the model's distribution (the same tokens "
    "where the answer is greedy), greedy is for --temperature 0 only, typical changes the "
    "distribution.",
)


_PROMPTS_HELP = (
    "File with prompts: JSON lines with turns (MT-Bench) or prompt (HumanEval), or a prompt in "
    "each line."
)

_limit_option = click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=None,
    show_default="all",
    help="Take at most this many prompts, evenly spread over the file.",
)

prompt_set_options = _group(
    click.option("--prompts", type=click.Path(), required=True, help=_PROMPTS_HELP),
    _limit_option,
)
optional_prompt_set_options = _group(
    click.option(
        "--prompts", type=click.Path(), default=None, show_default="none", help=_PROMPTS_HELP
    ),
    _limit_option,
)

plan_options = _group(
    click.option(
        "--plan",
        "plan_path",
        type=click.Path(path_type=Path),
        default=None,
        show_default="made anew",
        help="Do what a plan says, from `offload-run plan --output`.",
    ),
    click.option(
        "--profile",
        type=PROFILE,
        default=None,
        show_default="this machine's",
        help="Plan with the speeds of this profile: its name, or a file.",
    ),
)

json_option = click.option(
    "--json", is_flag=True, help="Print one JSON object on stdout instead of text."
)

output_options = _group(
    click.option("-v", "--verbose", is_flag=True, help="Log to stderr."),
    click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
)

# Options of the shared groups by the section of the help they are in.
_SECTIONS = {
    "Answer": answer_options,
    "Sampling": sampling_options,
    "Memory and placement": _group(placement_options, runtime_options),
    "Drafting": _group(draft_options, accept_option),
    "Planning": plan_options,
    "Output": _group(json_option, output_options),
}


@cache
def shared_options() -> Mapping[str, click.Parameter]:
    """The options that verbs share, by all their long names without dashes."""
    command = click.Command("all")
    for group in reversed(_SECTIONS.values()):
        group(command)
    found = reversed(command.params)
    return {n.removeprefix("--"): o for o in found for n in o.opts if n.startswith("--")}


@cache
def section_names() -> Mapping[str, str]:
    """The section of each option that verbs share, by the option's key."""
    found: dict[str, str] = {}
    for title, group in _SECTIONS.items():
        command = click.Command(title)
        group(command)
        found |= {option_key(option): title for option in reversed(command.params)}
    return found


adapter_option = click.option(
    "--adapter",
    default=None,
    show_default="none, but an error where one lies beside the model",
    help="Folder or hub id of a LoRA adapter to apply, or none. peft merges it into the weights it "
    "changes, which are kept as a file: streaming and exactness are the same as without.",
)

# What every verb that answers takes.
run_options = _group(
    adapter_option,
    answer_options,
    sampling_options,
    draft_options,
    accept_option,
    placement_options,
    runtime_options,
    plan_options,
    output_options,
)


def settings_of(values: Values) -> Settings:
    """The records a parsed command line stands for.

    Raises:
        ConfigError: a value is out of range, or an option would have no effect.
    """
    values, plan = _with_plan(values)
    own_sampling = _own_sampling(values)
    sampling, draft = _sampling(values, own_sampling), draft_of(values)
    if own_sampling is None:
        check_accept(sampling, draft)
    return Settings(
        sampling=sampling,
        generation=GenerationConfig(
            max_tokens=values["max_tokens"],
            stop=tuple(values["stop"]),
            ignore_eos=values["ignore_eos"],
        ),
        runtime=runtime_of(values),
        draft=draft,
        system=values["system"],
        raw=values.get("raw", False),
        profile=values.get("profile"),
        plan=plan,
        adapter=values["adapter"],
        own_sampling=own_sampling,
        chose_sampling=any(_is_chosen(name) for name in ("sampling", *_DRAWING)),
    )


def output_of(values: Values) -> Output:
    """What is printed besides the answer.

    Raises:
        ConfigError: -v and -q are both given.
    """
    return Output(json=values.get("json", False), verbose=values["verbose"], quiet=values["quiet"])


def _with_plan(values: Values) -> "tuple[Values, PlanFile | None]":
    if values.get("plan_path") is None:
        return values, None
    from offload_rt.cli.plan_option import with_plan  # slow to import

    return with_plan(values)


def runtime_of(values: Values) -> RuntimeConfig:
    """Where the model runs; a verb that lacks an option leaves its default."""
    link_gb_per_s = values.get("link_bandwidth")
    names = {field.name for field in dataclasses.fields(RuntimeConfig)}
    given = {name: value for name, value in values.items() if name in names}
    given |= {"dtype": DType(values["dtype"]), "home": HomeKind(values["home"])}
    given |= {"kv": KVPlace(values["kv"])}
    link = None if link_gb_per_s is None else link_gb_per_s * 1e9
    return RuntimeConfig(**given, link_bytes_per_s=link)


def draft_of(values: Values) -> DraftConfig:
    """Who drafts; a verb that lacks an option leaves its default."""
    names = {field.name for field in dataclasses.fields(DraftConfig)}
    given = {name: value for name, value in values.items() if name in names}
    given |= {"shape": DraftShape(values["shape"])}
    given |= {"draft_weights": DraftWeights(values["draft_weights"])}
    chosen = {field.name: values[field.name] for field in dataclasses.fields(RetrievalConfig)}
    chosen |= {"retrieval_weights": DraftWeights(values["retrieval_weights"])}
    given |= {"retrieval": RetrievalConfig(**chosen)}
    if "accept" in values:
        given |= {"accept": AcceptRule(values["accept"])}
    return DraftConfig(**given)


def _own_sampling(values: Values) -> frozenset[str] | None:
    """With --sampling model, the options of sampling that the user set himself.

    If only the user's defaults ask for it, his other defaults are as explicit as that.
    """
    if values.get("sampling") != "model":
        return None
    is_own = _is_typed if _is_typed("sampling") else _is_chosen
    return frozenset(name for name in _DRAWING if is_own(name))


def _sampling(values: Values, own: frozenset[str] | None = None) -> SamplingConfig:
    given = {field.name: values[field.name] for field in dataclasses.fields(SamplingConfig)}
    if own is not None:
        given = {name: v for name, v in given.items() if name == "seed" or name in own}
    config = SamplingConfig(**given)
    if not config.greedy or own is not None and "temperature" not in own:
        return config
    for name in _DRAWING[1:]:
        default = _default(SamplingConfig, name)
        if given.get(name, default) != default and _is_typed(name):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} {values[name]} has no effect on a greedy answer: "
                "add a --temperature above 0"
            )
        given[name] = default  # the user's default for answers that are not greedy
    return SamplingConfig(**given)


def _is_typed(name: str) -> bool:
    """Whether an option is on the command line itself."""
    return _source(name) in (None, ParameterSource.COMMANDLINE)


def _is_chosen(name: str) -> bool:
    """Whether an option has a value of the user's, typed or by default."""
    return _source(name) is not ParameterSource.DEFAULT


def _source(name: str) -> ParameterSource | None:
    context = click.get_current_context(silent=True)
    return None if context is None else context.get_parameter_source(name)
