"""Text at both ends of a run: prompts to token ids, token ids to text that is safe to show.

A model folder is untrusted. Its tokenizer and its chat template, which is a program, run in a small
process of their own (`process`, `worker`), within limits of time and memory; nothing of them runs
here, so this package imports neither torch nor transformers.
"""

from offload_rt.text.files import (
    DeclaredSampling,
    check_tokenizer_files,
    declared_end_ids,
    declared_sampling,
)
from offload_rt.text.process import text_process
from offload_rt.text.prompt import (
    Message,
    answer_end_token,
    build_prompt,
    end_token_ids,
    require_unicode,
    template_ids,
)
from offload_rt.text.stream import TextStream
from offload_rt.text.tokenizer import RemoteStream, Tokenizer, load_tokenizer

__all__ = [
    "DeclaredSampling",
    "Message",
    "RemoteStream",
    "TextStream",
    "Tokenizer",
    "answer_end_token",
    "build_prompt",
    "check_tokenizer_files",
    "declared_end_ids",
    "declared_sampling",
    "end_token_ids",
    "load_tokenizer",
    "require_unicode",
    "template_ids",
    "text_process",
]
