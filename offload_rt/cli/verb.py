"""A verb as all of them are: options read strictly, help in sections, the common ones first."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import click
from click.core import ParameterSource

from offload_rt.cli.columns import hanging
from offload_rt.cli.completion import ModelName
from offload_rt.cli.habits import option_advice

_NUMBER = re.compile(r"[-+]?[0-9.].*")
_MODEL = click.Option(["-m", "--model"])
MODEL_FLAGS = frozenset(_MODEL.opts)
ORIGINS = "offload_rt.origins"  # in a context's meta: where defaults of the user's come from
_OTHER = "Options"
_TYPED = ParameterSource.COMMANDLINE
_HELP = frozenset({"--help", "--help-all"})
_SIDE_BY_SIDE = 66  # columns from which on explanations stand beside the options


@dataclass(frozen=True, slots=True)
class Page:
    """What help says of a verb beside its docstring and options.

    Attributes:
        examples: command lines, each with what it does.
        common: names of the parameters that the short help explains, in order; empty: all.
    """

    examples: tuple[tuple[str, str], ...] = ()
    common: tuple[str, ...] = ()


class Verb(click.Command):
    """A verb whose words are looked at before click takes them apart.

    `-m MODEL` is the first argument where that is MODEL. An option of another tool is answered with
    what to use here. A value may be glued to a short option (`-n32`) only if it is a number, so
    `-ngl` is never `-n gl`.
    """

    page = Page()

    @classmethod
    def of(cls, command: click.Command, page: Page) -> "Verb":
        """The same command as a verb."""
        verb = cls(
            command.name,
            callback=command.callback,
            params=command.params,
            help=command.help,
            context_settings=command.context_settings,
        )
        verb.page = page
        for param in verb.params:
            if isinstance(param, click.Argument) and param.name == "model":
                param.type = ModelName()
        if any(isinstance(p, click.Argument) and p.name == "model" for p in verb.params):
            verb.params = [*verb.params, _download_option()]
        if page.common:
            shown = click.Option(
                ["--help-all"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_show_all,
                help="Show this message with all options and exit.",
            )
            verb.params = [*verb.params, shown]
        return verb

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Check the words, bring -m to its place, and go on as click does."""
        args = self._with_model_first(ctx, args)
        if not ctx.resilient_parsing:
            words = self.sorted_words(ctx, args)[0].values()
            wrong = [said for word in words if (said := self._wrong(ctx, word))]
            if wrong:
                raise click.UsageError("; ".join(wrong), ctx)
        rest = super().parse_args(ctx, args)
        origins: dict[str, tuple[str, str]] = ctx.meta.get(ORIGINS, {})
        for param in self.params:
            if param.name in origins and ctx.get_parameter_source(param.name) is _TYPED:
                del origins[param.name]
        return rest

    def invoke(self, ctx: click.Context) -> object:
        """Fetch the models that are named, if that is asked for, and do what the verb does."""
        if ctx.params.pop("download", False):
            from offload_rt.cli.console import Console
            from offload_rt.cli.download import download
            from offload_rt.cli.options import Output

            values = ctx.params
            asked = ctx.get_parameter_source("download") is _TYPED
            console = Console(Output(quiet=bool(values.get("quiet"))))
            download(values.get("model"), values.get("draft") or "none", console, asked=asked)
        return super().invoke(ctx)

    def sorted_words(
        self, ctx: click.Context, args: Sequence[str]
    ) -> tuple[dict[int, str], list[str]]:
        """The words of a command line that are options, by place, and those that are arguments."""
        return sort_words([*self.get_params(ctx), _MODEL], args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in sections; of a verb with many only the common ones."""
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        if not self.page.common:
            _write_sections(ctx, formatter, options)
            return
        by_name = {option.name: option for option in options}
        common = [by_name[name] for name in self.page.common]
        common += [option for option in options if _HELP.intersection(option.opts)]
        rest = [option for option in options if option not in common]
        with formatter.section("Common options"):
            _write_options(ctx, formatter, common)
        if ctx.meta.get(_show_all.__name__):
            _write_sections(ctx, formatter, rest)
            return
        with formatter.section("More, explained by --help-all"):
            for title, found in _sections(rest):
                names = " ".join(option.opts[-1] for option in found)
                formatter.write(hanging(f"  {title}: {names}", 4, formatter.width) + "\n")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        if self.page.examples:
            write_examples(formatter, "Examples", self.page.examples)

    def _with_model_first(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The words with MODEL in the place of the first argument, if -m gives it."""
        arguments = [p for p in self.params if isinstance(p, click.Argument)]
        if not arguments or arguments[0].name != "model":
            return args
        words, _ = self.sorted_words(ctx, args)
        found = [(i, word) for i, word in words.items() if word.partition("=")[0] in MODEL_FLAGS]
        if not found:
            return args
        index, word = found[0]
        glued = word.partition("=")[2]
        value = glued or "".join(args[index + 1 : index + 2])
        if len(found) > 1 or (not value and not ctx.resilient_parsing):
            raise click.UsageError(f"{option_name(word)} takes one MODEL", ctx)
        rest = args[:index] + args[index + (1 if glued else 2) :]
        return [value, *rest] if value else rest

    def _wrong(self, ctx: click.Context, word: str) -> str | None:
        """What is wrong with an option of another tool, or with letters glued to a short one."""
        params = [*self.get_params(ctx), _MODEL]
        known = {n: p for p in params for n in (*p.opts, *p.secondary_opts)}
        name = word.partition("=")[0]
        if name in known:
            return None
        if (advice := option_advice(name)) is not None:
            return f"no option {name} here: {advice}"
        if word.startswith("--"):
            return None  # click refuses it, and names what is spelled alike
        option, rest = known.get(word[:2]), word[2:]
        takes_value = isinstance(option, click.Option) and not option.is_flag
        if option is None or not takes_value or _NUMBER.fullmatch(rest):
            return None
        return (
            f"no option {word}: write {word[:2]} {rest} if {rest} is the value of {option.opts[-1]}"
        )


def sort_words(
    params: Sequence[click.Parameter], args: Sequence[str]
) -> tuple[dict[int, str], list[str]]:
    """The words that are read as options, by place, and those that are no option's value either."""
    takes = {
        name: not param.is_flag
        for param in params
        if isinstance(param, click.Option)
        for name in (*param.opts, *param.secondary_opts)
    }
    options: dict[int, str] = {}
    plain: list[str] = []
    i = 0
    while i < len(args):
        word = args[i]
        if word == "--":
            return options, [*plain, *args[i + 1 :]]
        if word.startswith("-") and word != "-":
            options[i] = word
            i += 1 if takes.get(word) else 0  # its value
        else:
            plain.append(word)
        i += 1
    return options, plain


def option_name(word: str) -> str:
    """The option in a word: without `=VALUE`, or a value glued to a short option."""
    return word.partition("=")[0] if word.startswith("--") else word[:2]


def _download_option() -> click.Option:
    return click.Option(
        ["--download"],
        is_flag=True,
        help="Fetch the models named from the Hugging Face hub first, as far as the cache lacks "
        "them. After an interruption files that are whole are kept.",
    )


def _show_all(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        ctx.meta[_show_all.__name__] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def _sections(options: Sequence[click.Option]) -> list[tuple[str, list[click.Option]]]:
    """Options by section, in the order in which sections first occur."""
    from offload_rt.cli.options import option_key, section_names

    found: dict[str, list[click.Option]] = {}
    names = section_names()
    for option in options:
        found.setdefault(names.get(option_key(option), _OTHER), []).append(option)
    return list(found.items())


def _write_sections(
    ctx: click.Context, formatter: click.HelpFormatter, options: Sequence[click.Option]
) -> None:
    for title, found in _sections(options):
        with formatter.section(title):
            _write_options(ctx, formatter, found)


def _write_options(
    ctx: click.Context, formatter: click.HelpFormatter, options: Sequence[click.Option]
) -> None:
    write_pairs(formatter, [r for option in options if (r := option.get_help_record(ctx))])


def write_pairs(formatter: click.HelpFormatter, rows: Sequence[tuple[str, str]]) -> None:
    """Write names with explanations beside them, or below where the terminal is narrow."""
    formatter.write_dl(rows, col_max=30 if formatter.width >= _SIDE_BY_SIDE else 4)


def write_examples(
    formatter: click.HelpFormatter, title: str, examples: Sequence[tuple[str, str]]
) -> None:
    """Write command lines, each with what it does below."""
    with formatter.section(title):
        for line, what in examples:
            formatter.write(f"  $ {line}\n")
            with formatter.indentation():
                formatter.write_text(what)
