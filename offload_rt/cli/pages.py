"""The verbs: where each is, and what help says of it beside its own docstring."""

from importlib import import_module

import click

from offload_rt.cli.verb import Page, Verb

_ANSWERING = ("max_tokens", "system", "sampling", "temperature", "seed")
_RUNNING = ("context_tokens", "device", "device_limit_bytes", "dtype")
_DRAFTING = ("draft", "draft_tokens")

# In the order of the help: the verb, its module and the function's name there, what it does.
VERBS = {
    "run": ("offload_rt.cli.generate", "run", "Answer a prompt, or talk: what MODEL alone does."),
    "generate": ("offload_rt.cli.generate", "generate", "Answer one prompt."),
    "chat": ("offload_rt.cli.chat", "chat", "Talk with a model."),
    "serve": ("offload_rt.cli.serve", "serve", "Answer over HTTP, in the OpenAI protocol."),
    "batch": ("offload_rt.cli.batch", "batch", "Answer all prompts of a file, many in each pass."),
    "plan": ("offload_rt.cli.plan", "plan", "What would live where, and how fast it should be."),
    "simulate": ("offload_rt.cli.simulate", "simulate_verb", "The same of a machine not at hand."),
    "profile": ("offload_rt.cli.profile", "profile", "Measure this machine, for predictions."),
    "doctor": ("offload_rt.cli.doctor", "doctor", "What this machine offers, what is wrong."),
    "bench": ("offload_rt.cli.bench", "bench", "Measure answers to a set of prompts."),
    "compare": ("offload_rt.cli.compare", "compare", "Measure other runtimes side by side."),
    "pack": ("offload_rt.cli.pack", "pack_verb", "Write a model's bf16 weights in fewer bits."),
    "unpack": ("offload_rt.cli.pack", "unpack_verb", "Give the files of a packed model back."),
    "medusa": ("offload_rt.cli.medusa", "medusa", "Look at Medusa heads, calibrate their tree."),
    "train-medusa": ("offload_rt.cli.train", "train_medusa", "Train Medusa heads for a model."),
    "config": (
        "offload_rt.cli.config",
        "config",
        "Defaults of your own, where they are from.",
    ),
    "completion": ("offload_rt.cli.completion", "completion", "Complete words in your shell."),
    "help": ("offload_rt.cli.help", "help_verb", "Explain a verb."),
}

PAGES = {
    "run": Page(
        examples=(
            ('offload-run demo "Why is the sky blue?"', "An answer on stdout."),
            ("offload-run demo", "A conversation, on a terminal."),
            ("cat notes.txt | offload-run MODEL", "The prompt from stdin."),
        ),
    ),
    "generate": Page(
        examples=(
            ('offload-run generate demo "Why is the sky blue?" -n 64', "At most 64 tokens."),
            ("offload-run generate MODEL -f notes.txt --device-memory 8GiB", "Streams the rest."),
            ("offload-run generate MODEL -p Hi --draft SMALL", "A small model drafts."),
        ),
        common=(
            *("prompt", "prompt_file", *_ANSWERING, *_RUNNING, *_DRAFTING),
            *("json", "quiet"),
        ),
    ),
    "chat": Page(
        examples=(
            ("offload-run chat demo", "/help lists its commands."),
            ("offload-run chat MODEL -c 16384 --device-memory 8GiB", "A longer conversation."),
        ),
        common=(*_ANSWERING, *_RUNNING, *_DRAFTING, "stop", "threads", "verbose", "quiet"),
    ),
    "serve": Page(
        examples=(
            ("offload-run serve MODEL --device-memory 8GiB", "At http://127.0.0.1:8080/v1."),
            (
                "offload-run serve MODEL --host 0.0.0.0 --api-key-file key.txt",
                "For other machines; TLS is a proxy's business.",
            ),
        ),
        common=(
            *("host", "port", "api_key_file", "sequences", "kv_tokens", "max_tokens"),
            *("sampling", "temperature", *_RUNNING, *_DRAFTING, "quiet"),
        ),
    ),
    "batch": Page(
        examples=(
            (
                "offload-run batch MODEL --input prompts.jsonl --output answers.jsonl",
                "The same command goes on where it was cut off.",
            ),
        ),
        common=(
            *("source", "output", "sequences", "max_tokens", "sampling", "temperature", "seed"),
            *(*_RUNNING, *_DRAFTING, "quiet"),
        ),
    ),
    "plan": Page(
        examples=(
            ("offload-run plan MODEL --device-memory 8GiB", "Reads headers only."),
            ("offload-run plan MODEL --output plan.json", "Keeps the plan, for --plan."),
        ),
        common=(
            *(*_RUNNING, "host_limit_bytes", "resident_layers", "home", "kv", *_DRAFTING),
            *("plan_path", "profile", "output", "json"),
        ),
    ),
    "simulate": Page(
        examples=(
            ("offload-run simulate MODEL --profile rtx4090-pcie4x16", "Another machine."),
            ("offload-run simulate --validate", "Published times against ours."),
        ),
        common=(
            *("profile_name", "profile_set", "scenario", "validate", *_RUNNING),
            *("host_limit_bytes", "resident_layers", *_DRAFTING, "acceptance"),
            *("tokens_per_pass", "json"),
        ),
    ),
    "profile": Page(
        examples=(
            ("offload-run profile", "One to two minutes."),
            ("offload-run profile --show rtx4090-pcie4x16", "One that comes with the package."),
        ),
    ),
    "doctor": Page(examples=(("offload-run doctor MODEL", "Reads from the model's disk too."),)),
    "bench": Page(
        examples=(
            (
                "offload-run bench MODEL --prompts questions.jsonl --draft SMALL --against-none",
                "With and without drafting, in turns.",
            ),
        ),
        common=(
            *("prompts", "limit", "rounds", "against_none", "directory", "max_tokens"),
            *("temperature", "seed", *_RUNNING, *_DRAFTING, "json"),
        ),
    ),
    "compare": Page(
        examples=(
            (
                "offload-run compare MODEL --against transformers --device-memory 2GiB "
                "--prompts questions.jsonl -n 32 --output results/",
                "The same command goes on where it was cut off.",
            ),
        ),
    ),
    "pack": Page(
        examples=(
            ("offload-run pack MODEL --output PACKED", "Once; every verb takes PACKED as MODEL."),
        ),
    ),
    "unpack": Page(
        examples=(("offload-run unpack PACKED --output MODEL", "The same files, checked."),),
    ),
    "train-medusa": Page(
        examples=(
            (
                "offload-run train-medusa MODEL --output HEADS --data prompts.jsonl --self-distill",
                "Learns from the model's own answers.",
            ),
        ),
    ),
    "config": Page(
        examples=(
            ("offload-run config", "What is in force."),
            (
                "offload-run config --template > ~/.config/offload-rt/config.toml",
                "A file with all options as comments, to be edited.",
            ),
            ("OFFLOAD_RT_DEVICE_MEMORY=8GiB offload-run MODEL", "The same by a variable."),
        ),
    ),
    "completion": Page(
        examples=(
            ('eval "$(offload-run completion bash)"', "In ~/.bashrc; zsh likewise in ~/.zshrc."),
            ("offload-run completion fish | source", "In ~/.config/fish/config.fish."),
        ),
    ),
    "help": Page(examples=(("offload-run help generate", "What `generate --help` says."),)),
}


def load_verb(name: str) -> click.Command | None:
    """The command of a verb, imported now; None if there is none."""
    if name not in VERBS:
        return None
    module, function, _ = VERBS[name]
    command: click.Command = getattr(import_module(module), function)
    return (
        command if isinstance(command, click.Group) else Verb.of(command, PAGES.get(name, Page()))
    )
