"""`offload-run help`: what --help says, for those who type it as a verb."""

import click


@click.command("help")
@click.argument("words", metavar="[VERB]...", nargs=-1)
@click.pass_context
def help_verb(context: click.Context, words: tuple[str, ...]) -> int:
    """Explain VERB, or list the verbs."""
    root = context.parent
    assert root is not None
    command, above = root.command, root
    for word in words:
        found = command.get_command(above, word) if isinstance(command, click.Group) else None
        if found is None:
            raise click.UsageError(f"there is no verb {' '.join(words)}", context)
        above = click.Context(found, info_name=word, parent=above, **found.context_settings)
        command = found
    click.echo(command.get_help(above))
    return 0
