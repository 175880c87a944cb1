"""What is fuzzed: files that come with a model or that a user is handed, and who reads them.

A target writes the bytes it is given to a file and has it read as a verb would. The only exception
that may come of it is an `OffloadError`, which is what the command line shows as one sentence.
"""

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

PROJECT = Path(__file__).resolve().parent.parent.parent
_WORK = Path(tempfile.mkdtemp(prefix="offload-rt-fuzz-"))
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "eos_token_id": 2,
}
_MOE = _CONFIG | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 32,
}
_VISION = {"model_type": "gemma3", "text_config": _CONFIG | {"model_type": "gemma3_text"}}
_YARN = _CONFIG | {
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "torch_dtype": "torch.float16",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "auto_map": {"AutoModelForCausalLM": "code.Model"},
}


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of file.

    Attributes:
        read: reads a file with these bytes as a verb would.
        seeds: well-formed files, to begin with.
        words: pieces of text that new files are made of.
        is_json: whether files are changed as JSON values too.
    """

    read: Callable[[bytes], object]
    seeds: Callable[[], Sequence[bytes]]
    words: Sequence[str] = ()
    is_json: bool = True


def as_json(value: object) -> bytes:
    """A value as a file holds it."""
    return json.dumps(value).encode()


def _folder(name: str) -> Path:
    folder = _WORK / name
    folder.mkdir(exist_ok=True)
    return folder


def _shapes() -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = 8, 16, 64
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(2):
        parts = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (4, hidden),
            "self_attn.v_proj": (4, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return shapes


def _header(names: Sequence[str]) -> dict[str, object]:
    shapes, offset, header = _shapes(), 0, {"__metadata__": {"format": "pt"}}
    entries: dict[str, object] = dict(header)
    for name in names:
        size = 2
        for length in shapes[name]:
            size *= length
        entries[name] = {
            "dtype": "BF16",
            "shape": list(shapes[name]),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    return entries


def with_body(header: bytes, size: int | None = None) -> bytes:
    """A safetensors file of this header; its body as long as the header promises, or as given."""
    if size is None:
        try:
            entries = json.loads(header)
            ends = [e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"]
            size = min(max(ends, default=0), 2**16)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            size = 0
    return struct.pack("<Q", len(header)) + header + bytes(max(0, int(size)))


def _read_config(data: bytes) -> object:
    from offload_rt.model.config import load_model_config

    folder = _folder("config")
    (folder / "config.json").write_bytes(data)
    return load_model_config(folder)


def _read_headers(data: bytes) -> object:
    from offload_rt.model.checkpoint import open_checkpoint

    folder = _folder("headers")
    (folder / "config.json").write_bytes(as_json(_CONFIG))
    # The bytes are a header; half of the time its length and body are made to fit.
    (folder / "model.safetensors").write_bytes(data if data[:1] != b"{" else with_body(data))
    return open_checkpoint(folder)


def _read_index(data: bytes) -> object:
    from offload_rt.model.checkpoint import open_checkpoint

    folder, names = _folder("index"), list(_shapes())
    if not (folder / "config.json").exists():
        (folder / "config.json").write_bytes(as_json(_CONFIG))
        for number, part in enumerate((names[:9], names[9:]), 1):
            file = folder / f"model-0000{number}-of-00002.safetensors"
            file.write_bytes(with_body(as_json(_header(part))))
    (folder / "model.safetensors.index.json").write_bytes(data)
    return open_checkpoint(folder)


def _index_seeds() -> Sequence[bytes]:
    names = list(_shapes())
    where = {n: f"model-0000{1 if i < 9 else 2}-of-00002.safetensors" for i, n in enumerate(names)}
    return [as_json({"metadata": {"total_size": 1}, "weight_map": where})]


def _read_plan(data: bytes) -> object:
    from offload_rt.planning.plan_file import read_plan

    path = _folder("plan") / "plan.json"
    path.write_bytes(data)
    return read_plan(path)


def _plan_seeds() -> Sequence[bytes]:
    options = {"device": "cpu", "device_limit_bytes": 2**31, "host_limit_bytes": None}
    options |= {"dtype": "auto", "slots": 2, "home": "disk", "kv": "device", "draft": "ngram"}
    plan = {"schema_version": 1, "model": "m", "layers": 2, "options": options}
    return [as_json(plan | {"resident": [0, 1], "predicted": {"pass_s": 0.1}})]


def _read_profile(data: bytes) -> object:
    from offload_rt.cli.profile_table import profile_table
    from offload_rt.profiling.store import load_profile

    path = _folder("profile") / "profile.json"
    path.write_bytes(data)
    return profile_table(load_profile(path))


def _profile_seeds() -> Sequence[bytes]:
    return [path.read_bytes() for path in sorted((PROJECT / "profiles").glob("*.json"))]


def _read_template(data: bytes) -> object:
    from offload_rt.text import Message, build_prompt, load_tokenizer

    folder = _folder("template")
    if not (folder / "tokenizer.json").exists():
        (folder / "tokenizer.json").write_bytes(_tokenizer_seeds()[0])
        (folder / "tokenizer_config.json").write_bytes(_TOKENIZER_CONFIG)
    (folder / "chat_template.jinja").write_bytes(data)
    return build_prompt(load_tokenizer(folder), [Message(role="user", content="a turn")])


def _read_tokenizer(data: bytes) -> object:
    from offload_rt.text import build_prompt, load_tokenizer

    folder = _folder("tokenizer")
    (folder / "tokenizer_config.json").write_bytes(_TOKENIZER_CONFIG)
    (folder / "tokenizer.json").write_bytes(data)
    tokenizer = load_tokenizer(folder)
    ids = build_prompt(tokenizer, "The grey cat sat. \u00e9\U0001f600", raw=True)
    stream = tokenizer.stream(("cat",))
    return stream.push([*ids, 0, 70, 10**6]) + stream.finish()


_TOKENIZER_CONFIG = as_json({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>"})


def _tokenizer_seeds() -> Sequence[bytes]:
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    letters = [chr(byte if byte in keep else next(spare)) for byte in range(256)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = True
    pattern = {
        "type": "Split",
        "pattern": {"Regex": r"\p{L}+|\s"},
        "behavior": "Isolated",
        "invert": False,
    }
    end = {"id": 256, "content": "<e>", "single_word": False, "lstrip": False, "rstrip": False}
    model = {"type": "BPE", "vocab": {c: i for i, c in enumerate(letters)}, "merges": []}
    plain = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | {"normalized": False, "special": True}],
        "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [pattern | {"invert": False}, level],
        },
        "post_processor": level,
        "decoder": level,
        "model": model,
    }
    return [as_json(plain), as_json(plain | {"normalizer": None, "pre_tokenizer": level})]


# Of a line each; words of the second are put between those of the first.
_TEMPLATE_SEEDS = tuple(
    r"""
{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>
{%- for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}
{% set ns = namespace(x=messages[0]['content'] | trim) %}{{ ns.x }}{{ raise_exception('no') }}
{% macro f(x) %}{{ x * 3 }}{% endmacro %}{{ f(messages[-1].content) }}{{ bos_token }}
{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}
""".strip().splitlines()
)
_TEMPLATE_WORDS = tuple(
    r"""
{% for m in messages %}
{% endfor %}
{{ m.content }}
{{ messages[0].content }}
{{ messages }}
{% if messages %}
{% else %}
{% endif %}
{{ 'a' * 999999999 }}
{{ 10 ** 99 }}
{{ 10 ** 10 ** 9 }}
{% set x = x ~ x %}
{% set x = 'y' %}
{{ x | trim | tojson | upper }}
{#
#}
{% for i in range(99999) %}
{{ [0] * 99999999 }}
{{ strftime_now('%Y' * 999) }}
{{ raise_exception('[31m') }}
{{ '\ud800' }}
{{ ''.__class__.__mro__ }}
{% include 'x' %}
{% macro f() %}{{ f() }}{% endmacro %}
{{ f() }}
{% generation %}
{% endgeneration %}
{{ tools | length }}
{{ bos_token + eos_token }}
""".strip().splitlines()
)
_GGML = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34)}
_GGML |= {"Q4_K": (12, 256, 144), "IQ2_S": (22, 256, 82), "IQ4_NL": (20, 32, 18)}
_MANY = 2**16  # bytes of data, which a file of a fuzzer does not need more of


def _gguf_text(value: str) -> bytes:
    data = value.encode(errors="surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _gguf_value(value: object) -> bytes:
    """A setting with its kind before it, as near to a JSON value as the format has it."""
    match value:
        case bool():
            return struct.pack("<IB", 7, value)
        case int():
            return struct.pack("<IQ", 10, value % 2**64)
        case float():
            return struct.pack("<Id", 12, value)
        case str():
            return struct.pack("<I", 8) + _gguf_text(value)
        case [str(), *_]:
            each = b"".join(_gguf_text(str(one)) for one in value)
            return struct.pack("<IIQ", 9, 8, len(value)) + each
        case list():
            numbers = [one if isinstance(one, int | float) else 0.0 for one in value]
            fits = (min(max(float(one), -1e30), 1e30) for one in numbers)
            return struct.pack(f"<IIQ{len(numbers)}f", 9, 6, len(numbers), *fits)
    return struct.pack("<IB", 7, 0)


def with_gguf(text: bytes) -> bytes:
    """A GGUF file of a JSON value with `metadata` and `tensors` (name, type, sides, and so on)."""
    value = json.loads(text)
    metadata, tensors = value["metadata"], value["tensors"]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, each in metadata.items():
        head += _gguf_text(key) + _gguf_value(each)
    at = 0
    for name, kind, sides in tensors:
        code, numbers, nbytes = _GGML.get(str(kind), (kind if isinstance(kind, int) else 99, 1, 1))
        sides = [int(side) % 2**64 for side in sides]
        head += _gguf_text(str(name)) + struct.pack(f"<I{len(sides)}Q", len(sides), *sides[::-1])
        head += struct.pack("<IQ", code % 2**32, at)
        size = math.prod(sides) // numbers * nbytes
        at = min(at + size + -size % 32, 2**63)
    return head + bytes(-len(head) % 32 + min(at, _MANY))


def _read_gguf(data: bytes) -> object:
    from offload_rt.model.checkpoint import open_checkpoint
    from offload_rt.model.gguf.folder import gguf_folder

    path, cache = _folder("gguf") / "a.gguf", _folder("gguf") / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    if data[:1] == b"{":
        with suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError):
            data = with_gguf(data)
    path.write_bytes(data)
    with patch.dict(os.environ, {"OFFLOAD_RT_CACHE": str(cache)}):
        return open_checkpoint(gguf_folder(path))


def _gguf_seeds() -> Sequence[bytes]:
    byte_level = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<|im_end|>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.chat_template": "{{ messages }}",
    }
    pieces = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "a", "b", "ab"],
        "tokenizer.ggml.token_type": [2, 3, 1, 1, 1],
        "tokenizer.ggml.scores": [0.0, 0.0, -1.0, -2.0, -3.0],
        "tokenizer.ggml.bos_token_id": 1,
    }
    found = []
    for family, texts in (("llama", byte_level), ("gemma3", pieces), ("qwen3moe", pieces)):
        experts, gemma = family == "qwen3moe", family == "gemma3"
        settings = {
            "general.architecture": family,
            f"{family}.block_count": 1,
            f"{family}.context_length": 64,
            f"{family}.embedding_length": 32,
            f"{family}.feed_forward_length": 32,
            f"{family}.attention.head_count": 2,
            f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{family}.attention.sliding_window": 8,
        }
        words = ["attn_q", "attn_k", "attn_v", "attn_output"]
        shapes = {f"blk.0.{word}.weight": [32, 32] for word in words}
        norms = ["attn_norm", "ffn_norm", *(["post_attention_norm", "post_ffw_norm"] * gemma)]
        sizes = {"attn_q_norm": 16, "attn_k_norm": 16} if gemma or experts else {}
        shapes |= {f"blk.0.{n}.weight": [32] for n in norms}
        shapes |= {f"blk.0.{n}.weight": [size] for n, size in sizes.items()}
        if experts:
            settings |= {f"{family}.expert_count": 2, f"{family}.expert_used_count": 1}
            settings |= {f"{family}.expert_feed_forward_length": 32}
            shapes |= {"blk.0.ffn_gate_inp.weight": [2, 32]}
        end, inner = ("_exps", [2, 32, 32]) if experts else ("", [32, 32])
        shapes |= {f"blk.0.ffn_{word}{end}.weight": inner for word in ("gate", "up", "down")}
        shapes |= {"token_embd.weight": [8, 32], "output_norm.weight": [32]}
        kinds = ("IQ4_NL", "Q8_0", "Q4_0")
        tensors = [
            [name, kinds[number % 3] if len(sides) > 1 and "inp" not in name else "F32", sides]
            for number, (name, sides) in enumerate(shapes.items())
        ]
        found.append(as_json({"metadata": settings | texts, "tensors": tensors}))
    return [*found, *map(with_gguf, found)]


TARGETS: Mapping[str, Target] = {
    "config": Target(_read_config, lambda: [as_json(c) for c in (_CONFIG, _MOE, _VISION, _YARN)]),
    "gguf": Target(_read_gguf, _gguf_seeds),
    "headers": Target(_read_headers, lambda: [as_json(_header(list(_shapes())))]),
    "index": Target(_read_index, _index_seeds),
    "plan": Target(_read_plan, _plan_seeds),
    "profile": Target(_read_profile, _profile_seeds),
    "template": Target(
        _read_template,
        lambda: [seed.encode() for seed in _TEMPLATE_SEEDS],
        words=_TEMPLATE_WORDS,
        is_json=False,
    ),
    "tokenizer": Target(_read_tokenizer, _tokenizer_seeds),
}
