"""Compare our model for lm-evaluation-harness with its own `hf` model, on tasks made here, in fp32.

    python tools/compare_lm_eval.py MODEL --device-memory 600MiB

40 questions of four choices, 4 texts read in windows of 512 tokens, 6 continuations. Nothing is
downloaded. Needs the extra `eval`.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

FACTS = """
The capital of France is|Paris|London|Madrid|Rome
The opposite of hot is|cold|warm|dry|tall
Two plus two equals|four|five|three|nine
The sun rises in the|east|west|north|south
Bees make|honey|milk|bread|wine
Water freezes into|ice|steam|sand|gold
A baby dog is called a|puppy|kitten|calf|chick
The color of grass is|green|blue|red|purple
We hear with our|ears|eyes|hands|feet
A week has seven|days|months|hours|years
Fish live in|water|trees|fire|clouds
The largest planet is|Jupiter|Mars|Venus|Earth
Shakespeare wrote|Hamlet|Ulysses|Faust|Emma
Snow is|white|black|green|orange
The heart pumps|blood|air|oil|sand
Birds can|fly|read|drive|sing opera
A triangle has three|sides|wheels|legs|eyes
The moon orbits the|Earth|Sun|Mars|sea
Bread is made from|flour|stone|glass|paper
Lemons taste|sour|sweet|salty|bland
"""
TEXTS = (
    "The quick brown fox jumps over the lazy dog. " * 3,
    "In the beginning there was nothing, and then there was light. " * 60,
    "Photosynthesis is the process by which plants turn light into sugar.",
    "def add(a, b):\n    return a + b\n" * 10,
)
TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "local_until": {
        "output_type": "generate_until",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
WINDOW = 512


def write_tasks(folder: Path) -> None:
    """Write the tasks and their data."""
    draw = random.Random(0)
    facts = [line.split("|") for line in FACTS.strip().splitlines()]
    choices = []
    for query, answer, *others in facts:
        for shape in ("{}", "Question: complete the sentence. {}"):
            listed = draw.sample([answer, *others], k=4)
            choices.append(
                {"query": shape.format(query), "choices": listed, "gold": listed.index(answer)}
            )
    rows: dict[str, list[dict[str, Any]]] = {
        "local_choice": choices,
        "local_rolling": [{"page": text} for text in TEXTS],
        "local_until": [{"query": query, "answer": answer} for query, answer, *_ in facts[:6]],
    }
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows[name])))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        whole = {"task": name, "test_split": "test"} | source | task
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML


def logprobs(samples: list[dict[str, Any]]) -> list[float]:
    """The log-likelihoods of a task's samples."""
    found = [response[0] for sample in samples for response in sample["resps"]]
    return [one[0] if isinstance(one, list | tuple) else one for one in found]


def main() -> None:
    """Run both and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--device-memory", default="600MiB")
    parser.add_argument("--resident-layers", default="0")
    given = parser.parse_args()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from offload_rt.integrations.lm_eval import OffloadLM

    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        tasks = TaskManager(include_path=folder)
        ours = OffloadLM(
            given.model,
            dtype="float32",
            device="cpu",
            device_memory=given.device_memory,
            resident_layers=given.resident_layers,
            context=WINDOW,
        )
        models = {"ours": ours}
        models["hf"] = HFLM(given.model, dtype="float32", device="cpu", max_length=WINDOW)
        found = {
            name: lm_eval.simple_evaluate(
                model=model, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0
            )
            for name, model in models.items()
        }
    print(ours.session.plan)
    for name in TASKS:
        for who, results in found.items():
            told = {k: v for k, v in results["results"][name].items() if k.endswith(",none")}
            print(name, who, {k.removesuffix(",none"): v for k, v in told.items()})
        one, other = (found[who]["samples"][name] for who in models)
        if name == "local_until":
            same = sum(a["resps"] == b["resps"] for a, b in zip(one, other, strict=True))
            print(f"{name}: {same} of {len(one)} continuations are the same")
        else:
            pairs = list(zip(logprobs(one), logprobs(other), strict=True))
            worst = max(abs(a - b) for a, b in pairs)
            print(f"{name}: {len(pairs)} log-likelihoods, at most {worst:.1e} apart")


if __name__ == "__main__":
    main()
