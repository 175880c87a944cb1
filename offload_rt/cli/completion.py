"""`offload-run completion`: words completed by the shell; the script asks this program for them."""

import os

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from offload_rt.model.locate import cached_ids

VARIABLE = "_OFFLOAD_RUN_COMPLETE"
_PROGRAM = "offload-run"
_SHELLS = ("bash", "zsh", "fish")


class ModelName(click.ParamType):
    """A MODEL: completed from folders, ids in the hub's cache, and `demo`."""

    name = "model"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The models that begin so; the shell adds folders."""
        return model_items(incomplete)


def model_items(incomplete: str) -> list[CompletionItem]:
    """What completes a MODEL; folders first, as bash's script starts anew with them."""
    names = [name for name in ("demo", *cached_ids()) if name.startswith(incomplete)]
    return [CompletionItem(incomplete, type="dir"), *map(CompletionItem, names)]


def answer_shell(cli: click.Command) -> int | None:
    """Answer a shell that asks for completions; None if none does."""
    instruction = os.environ.get(VARIABLE)
    return shell_complete(cli, {}, _PROGRAM, VARIABLE, instruction) if instruction else None


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> int:
    """Print the script that completes verbs, options, their values, and MODEL.

    Have your shell run it when it starts: see the examples.
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    click.echo(kind(context.find_root().command, {}, _PROGRAM, VARIABLE).source())
    return 0
