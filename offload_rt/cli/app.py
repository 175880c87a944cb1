"""The verbs as one click group, and how an error is shown and becomes an exit code."""

import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import click
from click.shell_completion import CompletionItem

from offload_rt.cli.columns import columns
from offload_rt.cli.completion import answer_shell, model_items
from offload_rt.cli.defaults import WITHOUT_DEFAULTS, defaults_of, read_config
from offload_rt.cli.faults import of_system, silence, told
from offload_rt.cli.habits import verb_advice
from offload_rt.cli.interrupts import Interrupts
from offload_rt.cli.pages import VERBS, load_verb
from offload_rt.cli.verb import MODEL_FLAGS, ORIGINS, Verb, option_name, write_examples, write_pairs
from offload_rt.errors import OffloadError
from offload_rt.model.config import QuantisedError
from offload_rt.model.locate import means_model
from offload_rt.printable import printable

_PIPE_CLOSED = 141  # what a shell shows for a process that SIGPIPE ended
_HELP = {"-h", "--help", "--help-all"}
_START = (
    ("offload-run doctor", "What this machine offers, what is wrong."),
    ("offload-run plan MODEL --device-memory 8GiB", "How fast it would be; reads headers only."),
    ('offload-run MODEL "Why is the sky blue?"', "An answer on stdout."),
    ("offload-run MODEL", "A conversation."),
)


class Verbs(click.Group):
    """The verbs, each imported when it is used; a MODEL in the place of one is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order of the help."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb of that name."""
        if cmd_name not in self.commands and (found := load_verb(cmd_name)) is not None:
            self.add_command(found, cmd_name)
        return self.commands.get(cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read options before a verb; with others than the group's own `run` is meant."""
        own = {name for param in self.get_params(ctx) for name in param.opts}
        first = next((i for i, word in enumerate(args) if word not in own), len(args))
        if first < len(args) and args[first].startswith("-"):
            args = [*args[:first], "run", *args[first:]]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb, or run a MODEL; a verb of another tool is answered with ours."""
        word = args[0]
        if word not in VERBS and means_model(word):
            word, args = "run", ["run", *args]
        if word == "run":
            word = self._way_to_run(ctx, args[1:])
        command = self.get_command(ctx, word)
        if command is not None and not ctx.resilient_parsing:
            _set_defaults(ctx, word, command, args[1:])
        if command is not None or ctx.resilient_parsing:
            return word if command else None, command, args[1:]
        if (advice := verb_advice(word)) is not None:
            ctx.fail(f"no verb {word} here: {advice}")
        alike = get_close_matches(word, VERBS)
        hint = f"did you mean {' or '.join(alike)}?" if alike else "`offload-run help` lists them"
        ctx.fail(f"{word} is no verb and no model that is here: {hint}")

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """What completes the first word: a verb, or a MODEL that has begun."""
        items = super().shell_complete(ctx, incomplete)
        return [*(model_items(incomplete) if incomplete else []), *items]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the ways to call the program."""
        formatter.write_usage(ctx.command_path, 'MODEL ["PROMPT"] [OPTIONS]')
        formatter.write(f"{'':<7}{ctx.command_path} VERB ...\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write how to start, the verbs, and the options."""
        write_examples(formatter, "Start here", _START)
        with formatter.section("Verbs"):
            write_pairs(formatter, [(name, what) for name, (_, _, what) in VERBS.items()])
        click.Command.format_options(self, ctx, formatter)

    def _way_to_run(self, ctx: click.Context, args: Sequence[str]) -> str:
        """Whether `run` answers a prompt, or talks: on a terminal, where no prompt is given."""
        run = self.get_command(ctx, "run")
        assert isinstance(run, Verb)
        options, words = run.sorted_words(ctx, args)
        names = {option_name(word) for word in options.values()}
        has_prompt = len(words) > (0 if names & MODEL_FLAGS else 1)
        if has_prompt or not sys.stdin.isatty():
            return "run"
        chat = self.get_command(ctx, "chat")
        assert chat is not None
        spoken = {name for param in chat.get_params(ctx) for name in param.opts} - _HELP
        # The rest is of a single answer, asks for help, or is wrong in both.
        return "run" if names - spoken - MODEL_FLAGS else "chat"


def _set_defaults(
    ctx: click.Context, verb: str, command: click.Command, args: Sequence[str]
) -> None:
    """Have click take the user's defaults; help shows what is built in, whatever they are."""
    if verb in WITHOUT_DEFAULTS or _HELP.intersection(args):
        return
    file = None if ctx.params.get("no_config") else read_config()
    defaults = defaults_of(verb, command, file)
    ctx.default_map = {verb: {name: default.value for name, default in defaults.items()}}
    flags = {param.name: param.opts[-1] for param in command.params}
    ctx.meta[ORIGINS] = {name: (flags[name], known.origin) for name, known in defaults.items()}


@click.command(
    cls=Verbs,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.version_option(
    package_name="offload-rt", prog_name="offload-run", message="%(prog)s %(version)s"
)
@click.option("--no-config", is_flag=True, help="Leave the file out that `config` is about.")
def cli(no_config: bool) -> None:
    """Run language models that do not fit in device memory.

    Layers that do not fit are streamed through a ring of slots; the output is that of the whole
    model. MODEL is a folder with safetensors files, a hub id in the local Hugging Face cache, or
    `demo`. Nothing is downloaded without --download.

    Exit codes: 0 done, 1 doctor found something broken or an error nobody foresaw, 2 usage or
    configuration, 3 no plan fits, 4 model files, 130 interrupted.
    """


def run_verb(arguments: Sequence[str], interrupts: Interrupts) -> int:
    """Run one command line, or complete one for a shell; returns the exit code."""
    code = answer_shell(cli)
    return _run(arguments, interrupts) if code is None else code


def _run(arguments: Sequence[str], interrupts: Interrupts) -> int:
    meta: dict[str, Any] = {}
    try:
        # Not cli.main(): it has its own idea of what becomes of a closed pipe.
        try:
            with cli.make_context(
                "offload-run", list(arguments), obj=interrupts, terminal_width=columns() - 2
            ) as context:
                meta = context.meta
                code = int(cli.invoke(context))
        except click.exceptions.Exit as leave:  # --help and --version
            code = leave.exit_code
        sys.stdout.flush()
        return code
    except click.ClickException as error:
        return _refuse(error, meta)
    except QuantisedError as error:
        return _fail(str(error) + _original(error), error.exit_code)
    except OffloadError as error:
        return _fail(str(error) + _origins(str(error), meta), error.exit_code)
    except BrokenPipeError:
        silence()
        return _PIPE_CLOSED
    except (MemoryError, OSError, RuntimeError) as error:
        if not (sentence := of_system(error)):
            raise
        silence()
        return _fail(sentence, OffloadError.exit_code)


def _original(error: QuantisedError) -> str:
    from offload_rt.cli.original import original_outlook

    return original_outlook(error.original) if error.original else ""


def _refuse(error: click.ClickException, meta: Mapping[str, Any]) -> int:
    """Say what is wrong with a command line, in one line as every error."""
    sentence = error.format_message()
    if "\n" in sentence:  # the help, of a command line without words
        with told():
            error.show()
        return error.exit_code
    context = error.ctx if isinstance(error, click.UsageError) else None
    more = f"; see `{context.command_path} --help`" if context is not None else ""
    sentence = sentence.removesuffix(".")
    return _fail(sentence + _origins(sentence, meta) + more, error.exit_code)


def _origins(sentence: str, meta: Mapping[str, Any]) -> str:
    """Where the options come from that a sentence names and nobody typed."""
    found = [
        f"; {flag} comes from {origin}"
        for flag, origin in meta.get(ORIGINS, {}).values()
        if re.search(rf"{flag}(?![\w-])", sentence)
    ]
    return "".join(found)


def _fail(sentence: str, code: int) -> int:
    with told():
        click.echo(f"offload-run: error: {printable(sentence)}", err=True)
    return code
