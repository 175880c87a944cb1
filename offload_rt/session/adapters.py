"""Adapters of a model that answers: `--adapter`, and those that lie beside a model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from offload_rt.adapters.reading import read_adapter
from offload_rt.errors import ConfigError
from offload_rt.model.adapter import adapter_beside
from offload_rt.model.checkpoint import Checkpoint, open_checkpoint, resolve_model
from offload_rt.model.files import shown
from offload_rt.model.wire import check_wire, wired
from offload_rt.session.observer import Observer
from offload_rt.session.opening import Model, open_model
from offload_rt.session.recommended import with_recommended
from offload_rt.session.settings import NO_ADAPTER, Settings


def open_for_answers(model: str, settings: Settings) -> Checkpoint:
    """Open the model's folder; `adapted` applies the adapter once all else is checked.

    Raises:
        ConfigError: an adapter lies beside the model, and nobody said what is to become of it.
            Whether its weights are in the model's already cannot be seen. Or its weights cannot
            be rounded as --wire asks.
        CheckpointError: the files cannot be used.
    """
    folder = resolve_model(model)
    if settings.adapter is None and (found := adapter_beside(folder)) is not None:
        raise ConfigError(
            f"{shown(folder.name)} holds an adapter ({found}) beside the model: add --adapter "
            f"{folder} to apply it, or --adapter {NO_ADAPTER} to answer without it"
        )
    if settings.adapter not in (None, NO_ADAPTER):
        read_adapter(resolve_model(settings.adapter))  # what is wrong with it is told at once
    checkpoint = open_checkpoint(folder, says_adapter=False)
    if settings.adapter in (None, NO_ADAPTER):
        return wired(checkpoint, settings.runtime.wire)
    check_wire(checkpoint, settings.runtime.wire)
    return checkpoint


def open_answering(model: str, settings: Settings, observer: Observer) -> tuple[Model, Settings]:
    """Open a model that will answer, all but its adapter; and settings with the sampling it wants.

    Raises:
        OffloadError: as `open_for_answers`, `with_recommended` and `open_model`.
    """
    with observer.waiting(f"opening {model}", stays=False):
        checkpoint = open_for_answers(model, settings)
    settings = with_recommended(settings, checkpoint.folder, observer)
    return open_model(checkpoint, settings.runtime, observer, settings.draft), settings


def refuse_beside(folder: Path, why: str) -> None:
    """Refuse an adapter beside a model where transformers would apply it and we do not.

    Raises:
        ConfigError: there is one.
    """
    if (found := adapter_beside(folder)) is not None:
        raise ConfigError(
            f"{shown(folder.name)} holds an adapter ({found}) beside the model, {why}: move the "
            "adapter into a folder of its own, or merge it with peft's merge_and_unload"
        )


def adapted(model: Model, settings: Settings, observer: Observer) -> Model:
    """The model with the adapter the user names in its weights."""
    return dataclasses.replace(model, checkpoint=merged(model.checkpoint, settings, observer))


def merged(checkpoint: Checkpoint, settings: Settings, observer: Observer) -> Checkpoint:
    """The same of the files alone."""
    if settings.adapter in (None, NO_ADAPTER):
        return checkpoint
    from offload_rt.adapters.merging import with_adapter

    adapter = read_adapter(resolve_model(settings.adapter))
    folder = checkpoint.folder
    if adapter.has_tokenizer and adapter.folder.resolve() != folder.resolve():
        observer.note(
            f"the tokenizer of adapter {shown(adapter.name)} is not used, but that of "
            f"{shown(folder.name)}"
        )
    with observer.progress(f"merging {adapter.name}") as gauge:

        def show(total: int, done: Callable[[], int]) -> None:
            gauge.total, gauge.done = total, done

        made = with_adapter(checkpoint, adapter, settings.runtime.dtype, show)
    return wired(made, settings.runtime.wire)
