#!/usr/bin/env python3
"""Write the table of docs/MODELS.md: what becomes of a model of each family, found out by trying.

    python tools/model_families.py            # prints the table
    python tools/model_families.py --write    # puts it into docs/MODELS.md

Each row is a tiny configuration from the tests, of which transformers builds modules without
memory. They go through what a run does with them before it reads weights: names and shapes of the
files, the probe, what a sequence keeps, a plan in which no layer stays and keys and values are in a
file. Nothing is written by hand but the configurations.
"""

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offload_rt.model.checkpoint import Checkpoint
    from offload_rt.planning.placement import Placement

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "MODELS.md"
BEGIN, END = "<!-- table: tools/model_families.py -->", "<!-- end of the table -->"
HEAD = (
    "| family | class | layers | streamed | drafts for it | drafts for others | KV elsewhere "
    "| exact | quantised | expert by expert |\n|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What becomes of a family."""

    family: str
    model_class: str
    layers: str = ""
    streamed: str = ""
    drafters: str = ""
    draft_model: str = ""
    kv: str = ""
    exact: str = ""
    quantised: str = ""
    experts: str = ""
    refusal: str = ""

    def __str__(self) -> str:
        if self.refusal:
            return f"| {self.family} | {self.model_class} | | no: {self.refusal} | | | | | | |"
        drafting = self.drafters, self.draft_model
        kept = self.kv, self.exact, self.quantised, self.experts
        cells = (self.layers, self.streamed, *drafting, *kept)
        return f"| {self.family} | {self.model_class} | {' | '.join(cells)} |"


def configurations() -> list[tuple[str, dict[str, object]]]:
    """Families of the tests, each once, with a tiny configuration.

    Where layers are alike two of them say what four do, and one of each kind where they are not.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from expert_models import MIXTURES
    from hybrids import HYBRIDS, REFUSED, one_of_each
    from test_families import FAMILIES, IDS

    found: dict[str, dict[str, object]] = {}
    alike = {"num_hidden_layers": 2}
    for families in (FAMILIES, HYBRIDS, REFUSED, MIXTURES):
        short = alike if families in (FAMILIES, MIXTURES) else {}
        for name, (model_type, config) in families.items():
            few = {} if "layer_types" in config else short
            kinds = one_of_each(name) if families is HYBRIDS else {}
            found.setdefault(model_type, IDS | few | config | kinds)
    return sorted(found.items())


def row_of(model_type: str, config: dict[str, object]) -> Row:
    """Try one family."""
    from tiny import SHAPE
    from transformers import AutoConfig

    from offload_rt.errors import CheckpointError

    made = AutoConfig.for_model(model_type, **(SHAPE | config))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(
            json.dumps(json.loads(made.to_json_string(False)))
        )
        try:
            return _accepted(model_type, Path(folder))
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{folder}/config.json: ")
            reason = reason.removeprefix(f"{model_type} models cannot be streamed: ")
            return Row(family=model_type, model_class=_class_of(made), refusal=reason)


def _class_of(made: object) -> str:
    from transformers import AutoModelForCausalLM

    return str(AutoModelForCausalLM._model_mapping[type(made)].__name__)


def _accepted(model_type: str, folder: Path) -> Row:
    """The row of a family that streams.

    Raises:
        CheckpointError: it does not.
    """
    from offload_rt.config import DRAFTERS
    from offload_rt.costs.sizes import experts_of
    from offload_rt.device.kinds import CPU, Packing
    from offload_rt.model.exact import looks_of
    from offload_rt.model.kept import keeps_states, layers_keep
    from offload_rt.model.network import Network
    from offload_rt.model.outline import outline_checkpoint
    from offload_rt.model.probe import run_on_shapes
    from offload_rt.planning.fit import drafts_with_states

    checkpoint = outline_checkpoint(folder)
    network = Network(checkpoint, "auto", Packing.FILE)
    states, kept = keeps_states(checkpoint.config), layers_keep(checkpoint.config)
    shapes = [shape.numbers_per_token for shape in network.kv_shapes]
    assert sum(shapes) <= sum(each.kv_numbers for each in kept)
    run = partial(run_on_shapes, network._model)
    problem = looks_of(network._model, run, network._mixing).problem
    drafters = [
        name
        for name, words in DRAFTERS.items()
        if words.tokens and (not states or drafts_with_states(words))
    ]
    every = [name for name, words in DRAFTERS.items() if words.tokens]
    found = experts_of(checkpoint, "auto", CPU)
    why_whole = f"no: {found}" if isinstance(found, str) and found else ""
    experts = any(".experts." in name for name in checkpoint.tensors)
    return Row(
        family=model_type,
        model_class=type(network._model).__name__,
        layers=_layers(network),
        streamed=_placed(checkpoint, lambda found: len(found.streamed) == len(network.layouts)),
        drafters="all" if drafters == every else ", ".join(drafters),
        draft_model="no" if states else "yes",
        kv=_placed(checkpoint, lambda found: found.demand.kv is not None),
        exact=f"no: {problem}" if problem else "yes",
        quantised="all but experts" if experts and why_whole else "yes",
        experts="yes" if not isinstance(found, str) else why_whole,
    )


def _placed(checkpoint: "Checkpoint", holds: "Callable[[Placement], bool]") -> str:
    """Whether something is so where no layer stays and keys and values are in a file."""
    from offload_rt.config import KVPlace, RuntimeConfig
    from offload_rt.costs.machine import FreeMemory
    from offload_rt.device.kinds import CPU
    from offload_rt.errors import ConfigError, PlanError
    from offload_rt.planning.fit import RunLoad, place_run

    config = RuntimeConfig(device="cpu", resident_layers=0, slots=1, kv=KVPlace.DISK)
    load, free = (
        RunLoad(capacities=[64], prompt_tokens=32),
        FreeMemory(device_bytes=2**34, host_bytes=2**34),
    )
    try:
        return "yes" if holds(place_run(checkpoint, config, CPU, load=load, free=free)) else "no"
    except (ConfigError, PlanError) as error:
        return f"no: {error}"


def _layers(network: object) -> str:
    """What its layers keep, of a tiny model."""
    attend, mix = set(network.attending), {mixer.layer for mixer in network.mixers}  # type: ignore
    every = set(range(len(network.layouts)))  # type: ignore[attr-defined]
    kinds = {
        "KV": attend - mix,
        "state": mix - attend,
        "both": attend & mix,
        "neither": every - attend - mix,
    }
    return ", ".join(kind for kind, layers in kinds.items() if layers)


def table() -> str:
    """The whole table."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("offload_rt").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return "\n".join([HEAD, *(str(row_of(*each)) for each in configurations())])


def main() -> None:
    """Print the table, or write it."""
    made = table()
    if "--write" not in sys.argv[1:]:
        print(made)
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")


if __name__ == "__main__":
    main()
