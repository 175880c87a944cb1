"""Everything that is set for answering, in one record."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_rt.config import (
    DRAFTERS,
    AcceptRule,
    DraftConfig,
    GenerationConfig,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.errors import ConfigError
from offload_rt.model.locate import means_model

if TYPE_CHECKING:
    from offload_rt.nodes.crossing import Lead
    from offload_rt.planning.plan_file import PlanFile

NO_ADAPTER = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a model is run and answers.

    Attributes:
        system: system prompt, or None.
        raw: give the prompt to the model without its chat template.
        profile: speeds to plan with; None: this machine's.
        plan: what --plan says; its values are among the others.
        own_sampling: with --sampling model, what of `sampling` the user chose; else None.
        chose_sampling: whether the user chose anything about it.
        adapter: folder of an adapter to apply, `none`, or None where nothing is said.
        nodes: other machines that have joined for a share of the layers.
    """

    sampling: SamplingConfig
    generation: GenerationConfig
    runtime: RuntimeConfig
    draft: DraftConfig
    system: str | None = None
    raw: bool = False
    profile: str | None = None
    plan: "PlanFile | None" = None
    own_sampling: frozenset[str] | None = None
    chose_sampling: bool = True
    adapter: str | None = None
    nodes: "Lead | None" = None


def read_drafter(text: str) -> str:
    """Who drafts, by `DraftConfig.draft`; the folder or hub id of a model means `model:`.

    Raises:
        ValueError: it is a number.
    """
    if text.partition(":")[0] in DRAFTERS:
        return text
    if text.isdecimal():
        raise ValueError(f"{text} is no drafter: --draft-tokens {text} is how much is drafted")
    is_model = means_model(text) and (":" not in text or os.path.lexists(text))
    return f"model:{text}" if is_model else text


def without_effect(name: str, value: object) -> ConfigError:
    """What is said of an option of sampling that a greedy answer does not use."""
    flag = "--" + name.replace("_", "-")
    return ConfigError(
        f"{flag} {value} has no effect on a greedy answer: add a --temperature above 0"
    )


def check_accept(sampling: SamplingConfig, draft: DraftConfig) -> None:
    """Refuse a rule that does not go with how tokens are drawn.

    Raises:
        ConfigError: it says what to change.
    """
    if draft.accept is AcceptRule.GREEDY and not sampling.greedy:
        raise ConfigError(
            f"--accept greedy contradicts --temperature {sampling.temperature}: use --accept "
            "lossless, or --temperature 0"
        )
    if draft.accept is AcceptRule.TYPICAL and sampling.greedy:
        raise ConfigError(
            "--accept typical has no effect on a greedy answer: add a --temperature above 0"
        )
    if draft.accept is AcceptRule.TYPICAL and draft.automatic and sampling.repeats:
        raise ConfigError(
            "--accept typical has no effect on an answer with --seed where --draft auto chooses "
            "who drafts: such an answer rests on its drafts, so that nothing measured may decide "
            "about them; name who drafts, or leave --seed out"
        )
