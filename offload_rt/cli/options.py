"""The options of the verbs, in groups, and the records they become.

A default is that of the record's field; nothing is repeated here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from offload_rt.cli.completion import model_items
from offload_rt.config import (
    DRAFTERS,
    MOST_SEQUENCES,
    STATED_DRAFT_HELP,
    DraftConfig,
    GenerationConfig,
    RetrievalConfig,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.errors import ConfigError
from offload_rt.options import Form, Settable, record_of, settables
from offload_rt.session.settings import (
    Settings,
    check_accept,
    read_drafter,
    without_effect,
)

if TYPE_CHECKING:
    from offload_rt.planning.plan_file import PlanFile

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
Values = Mapping[str, Any]


class _Value(click.ParamType):
    """What a field reads."""

    def __init__(self, field: Settable) -> None:
        self._field, self.name = field, str(field.form)

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:  # noqa: ANN401 - a value of the field's type
        try:
            return self._field.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Choice(click.Choice[str]):
    """What a field reads, one of a few words."""

    def __init__(self, field: Settable) -> None:
        super().__init__(field.choices)
        self._field = field

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        try:
            return str(self._field.read(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Drafter(click.ParamType):
    """Who drafts; the folder or hub id of a model means `model:`."""

    name = "drafter"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        try:
            return read_drafter(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Who can draft by name, and the models that begin so."""
        names = [name for name in DRAFTERS if name.startswith(incomplete)]
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
PROFILE = _Profile()


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


_FIELDS = {
    field.name: field
    for record in (SamplingConfig, GenerationConfig, RuntimeConfig, DraftConfig, RetrievalConfig)
    for field in settables(record)
}
SIZE = _Value(_FIELDS["host_limit_bytes"])
_PLAIN: Mapping[Form, Any] = {
    Form.INTEGER: int,
    Form.NUMBER: float,
    Form.TEXT: str,
    Form.TEXTS: str,
    Form.PATH: click.Path(),
}


def _option(
    name: str, default: str | None = None, help: str | None = None
) -> Callable[[CommandT], CommandT]:
    """The option of a record's field; default and help are the field's unless others are given."""
    field = _FIELDS[name]
    said, form, value = field.option, field.form, field.default if default is None else default
    names = [*said.also, said.flag, name]
    if form is Form.SWITCH:
        return click.option(*names, is_flag=True, default=value, help=said.help)
    kind: Any = _PLAIN.get(form) or (_Choice(field) if form is Form.CHOICE else _Value(field))
    if form is Form.DRAFTER:
        kind = _Drafter()
    if value is None and not said.unset:
        value = "auto"
    return click.option(
        *names,
        type=kind,
        default=str(value) if form is Form.CHOICE else value,
        multiple=form is Form.TEXTS,
        show_default=said.unset or True,
        help=said.help if help is None else help,
    )


def _group(*options: Callable[[CommandT], CommandT]) -> Callable[[CommandT], CommandT]:
    def apply(command: CommandT) -> CommandT:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


drawing_options = _group(
    click.option(
        "--sampling",
        type=click.Choice(["greedy", "model"]),
        default="greedy",
        help="What is sampled with where --temperature and others do not say: greedy, or what the "
        "model's authors recommend in generation_config.json.",
    ),
    *map(_option, ("temperature", "top_k", "top_p", "min_p")),
)

sampling_options = _group(drawing_options, _option("seed"))

max_tokens_option = _option("max_tokens")
ignore_eos_option = _option("ignore_eos")

system_option = click.option(
    "--system",
    default=None,
    show_default="none",
    help="System prompt; the model must have a chat template.",
)

raw_option = click.option(
    "--raw", is_flag=True, help="Give prompts as they are, without the chat template."
)

answer_options = _group(max_tokens_option, _option("stop"), ignore_eos_option, system_option)

placement_options = _group(
    *map(
        _option,
        (
            "device",
            "device_limit_bytes",
            "host_limit_bytes",
            "dtype",
            "slots",
            "resident_layers",
            "expert_slots",
            "look_ahead",
            "expert_misses",
            "home",
            "context_tokens",
            "kv",
            "kv_block_tokens",
            "kv_folder",
            "exact",
            "link_bytes_per_s",
        ),
    )
)

runtime_options = _group(*map(_option, ("readers", "threads")))

_drafting = _group(
    *map(
        _option,
        (
            "draft_tokens",
            "shape",
            "inner_tokens",
            "budget_tokens",
            "chunk_tokens",
            "recent_share",
            "rebuild_tokens",
            "retrieval_weights",
            "draft_window",
            "draft_weights",
        ),
    ),
)
draft_options = _group(_option("draft", default="auto"), _drafting)
stated_draft_options = _group(_option("draft", help=STATED_DRAFT_HELP), _drafting)

accept_option = _option("accept")

wire_option = _option("wire")


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

together_option = click.option(
    "--sequences",
    type=click.IntRange(1, MOST_SEQUENCES),
    default=1,
    show_default=True,
    help="Answers in the making at once, each with --context.",
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
    "Memory and placement": _group(placement_options, wire_option, runtime_options),
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
def option_key(option: click.Parameter) -> str:
    """What the user's file calls an option: its long name without dashes."""
    return option.opts[-1].lstrip("-")


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

nodes_option = click.option(
    "--nodes",
    type=click.Path(path_type=Path),
    default=None,
    show_default="this machine alone",
    help="Several machines have the layers in turn: TOML file with a [[node]] for each, the first "
    "first. torchrun starts the same command on all; the network has to be trusted.",
)

# What every verb that answers takes.
run_options = _group(
    adapter_option,
    answer_options,
    sampling_options,
    draft_options,
    accept_option,
    placement_options,
    wire_option,
    runtime_options,
    plan_options,
    output_options,
)


def settings_of(values: Values) -> Settings:
    """The records of a parsed command line.

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
    return record_of(RuntimeConfig, values)


def draft_of(values: Values) -> DraftConfig:
    """Who drafts; a verb that lacks an option leaves its default."""
    return record_of(DraftConfig, {**values, "retrieval": values})


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
        default = _FIELDS[name].default
        if given.get(name, default) != default and _is_typed(name):
            raise without_effect(name, values[name])
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
