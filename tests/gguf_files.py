"""GGUF files written by hand, and what their blocks are by a formula in fp64.

The formula follows the text of the format (ggml-common.h), a number at a time; every sum is exact
there and is rounded once to fp32, which is the whole law.
"""

import json
import struct
from pathlib import Path

import numpy as np
import torch
from quantised import save_aligned
from safetensors.torch import load_file

from offload_rt.model.formats.methods import BLOCKS, Form, block_name
from offload_rt.model.gguf.types import TYPES

CODES = {kind.name: code for code, kind in TYPES.items()}
FORMS = {block_name(form): form for form in BLOCKS}
ARRAY = 9
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "qkv_proj": "attn_qkv",
    "gate_up_proj": "ffn_up",
}


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def setting(value):
    """A value of the metadata with its kind before it."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", ARRAY, 8, len(value)) + b"".join(map(text, value))
    code, form = (6, "f") if any(isinstance(each, float) for each in value) else (5, "i")
    return struct.pack("<IIQ", ARRAY, code, len(value)) + struct.pack(
        f"<{len(value)}{form}", *value
    )


def gguf_bytes(metadata, tensors, *, version=3, alignment=32):
    """A file; tensors are (name, type, shape with outputs first, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + setting(value) for key, value in metadata.items())
    data = b""
    for name, kind, shape, content in tensors:
        data += bytes(-len(data) % alignment)
        code = CODES.get(kind, kind)
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", code, len(data))
        data += content
    return head + bytes(-len(head) % alignment) + data


SCALES = {  # where they are in a block
    Form.Q4_1: (0, 2),
    Form.Q5_1: (0, 2),
    Form.Q2_K: (80, 82),
    Form.Q3_K: (108,),
    Form.Q4_K: (0, 2),
    Form.Q5_K: (0, 2),
    Form.Q6_K: (208,),
}
UNEVEN = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def random_blocks(form, outputs, inputs, generator):
    """Bytes [O, row]: any codes, and scales that are small numbers."""
    numbers, nbytes = BLOCKS[form]
    blocks = generator.integers(0, 256, (outputs, inputs // numbers, nbytes), dtype=np.uint8)
    if form is Form.BLOCK_MXFP4:
        blocks[..., 0] = generator.integers(116, 122, blocks.shape[:2])
        return blocks.reshape(outputs, -1)
    for start in SCALES.get(form, (0,)):
        size = 0.02 / (1 + 15 * form.endswith("k")) / (1 + 30 * form.startswith("iq4"))
        scales = generator.normal(0, size, blocks.shape[:2])
        halves = scales.astype(np.float16)[..., None].view(np.uint8)
        blocks[..., start : start + 2] = halves
    return blocks.reshape(outputs, -1)


def formula(form, data):  # noqa: C901
    """[O, row] bytes as [O, I] fp32, a number at a time over all blocks at once."""
    numbers, nbytes = BLOCKS[form]
    b = data.reshape(-1, nbytes).astype(np.int64)
    half = lambda at: data.reshape(-1, nbytes)[:, at : at + 2].copy().view(np.float16)[:, 0]  # noqa: E731
    half64 = lambda at: half(at).astype(np.float64)  # noqa: E731
    out = np.empty((len(b), numbers), dtype=np.float64)
    for n in range(numbers):
        if form in (Form.Q4_0, Form.Q4_1, Form.Q5_0, Form.Q5_1):
            head = 2 if form in (Form.Q4_0, Form.Q5_0) else 4
            high = head + (0 if form in (Form.Q4_0, Form.Q4_1) else 4)
            q = b[:, high + n % 16] >> 4 * (n // 16) & 15
            if high > head:
                q = q + 16 * (b[:, head + n // 8] >> n % 8 & 1)
            if head == 2:
                out[:, n] = half64(0) * (q - (8 if high == head else 16))
            else:
                out[:, n] = half64(0) * q + half64(2)
        elif form is Form.Q8_0:
            out[:, n] = half64(0) * (b[:, 2 + n] - 256 * (b[:, 2 + n] > 127))
        elif form in (Form.Q4_K, Form.Q5_K):
            sub, start = n // 32, 16 if form is Form.Q4_K else 48
            if sub < 4:
                scale, less = b[:, 4 + sub] & 63, b[:, 8 + sub] & 63
            else:
                scale = b[:, 8 + sub] & 15 | b[:, sub] >> 6 << 4
                less = b[:, 8 + sub] >> 4 | b[:, 4 + sub] >> 6 << 4
            q = b[:, start + n // 64 * 32 + n % 32] >> 4 * (sub % 2) & 15
            if form is Form.Q5_K:
                q = q + 16 * (b[:, 16 + n % 32] >> sub & 1)
            out[:, n] = half64(0) * scale * q - half64(2) * less
        elif form is Form.Q2_K:
            q = b[:, 16 + n // 128 * 32 + n % 32] >> 2 * (n % 128 // 32) & 3
            both = b[:, n // 16]
            out[:, n] = half64(80) * (both & 15) * q - half64(82) * (both >> 4)
        elif form is Form.Q3_K:
            q = b[:, 32 + n // 128 * 32 + n % 32] >> 2 * (n % 128 // 32) & 3
            q = q - 4 * (1 - (b[:, n % 32] >> n // 32 & 1))
            sub = n // 16
            scale = b[:, 96 + sub % 8] >> 4 * (sub // 8) & 15
            scale = scale + 16 * (b[:, 104 + sub % 4] >> 2 * (sub // 4) & 3) - 32
            out[:, n] = half64(108) * scale * q
        elif form is Form.IQ4_NL:
            out[:, n] = half64(0) * UNEVEN[b[:, 2 + n % 16] >> 4 * (n // 16) & 15]
        elif form is Form.IQ4_XS:
            sub = n // 32
            scale = b[:, 4 + sub // 2] >> 4 * (sub % 2) & 15
            scale = scale + 16 * ((b[:, 2] + 256 * b[:, 3]) >> 2 * sub & 3) - 32
            index = b[:, 8 + 16 * sub + n % 16] >> 4 * (n % 32 // 16) & 15
            out[:, n] = half64(0) * scale * UNEVEN[index]
        elif form is Form.BLOCK_MXFP4:
            power = np.ldexp(1.0, b[:, 0] - 127)
            out[:, n] = power * FP4[b[:, 1 + n % 16] >> 4 * (n // 16) & 15]
        else:
            part, j = n // 128, n % 128
            q = b[:, 64 * part + j % 64] >> 4 * (j // 64) & 15
            q = q + 16 * (b[:, 128 + 32 * part + j % 32] >> 2 * (j // 32) & 3) - 32
            scale = b[:, 192 + n // 16]
            out[:, n] = half64(208) * (scale - 256 * (scale > 127)) * q
    return out.astype(np.float32).reshape(len(data), -1)


def paired(rows, heads):
    """Rows [O, ...] in the order that llama.cpp has them for queries and keys."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


ARCHITECTURES = {"gemma3_text": "gemma3", "mixtral": "llama", "qwen3_moe": "qwen3moe"} | {
    "qwen2_moe": "qwen2moe"
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
MIXTURE = {"gate": "ffn_gate_inp", "shared_expert_gate": "ffn_gate_inp_shexp"}
SHARED = {each: f"{PARTS[each]}_shexp" for each in ("gate_proj", "up_proj", "down_proj")}
EXPERTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up"} | {
    "down_proj": "down",
    "w2": "down",
}


SETTINGS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def name_in_gguf(name, kind):
    if name in TOP:
        return TOP[name]
    words = name.split(".")
    if "experts" in words:
        return f"blk.{words[2]}.ffn_{EXPERTS[words[-2]]}.{words[-3]}.{words[-1]}"
    parts = PARTS | (GEMMA if kind.startswith("gemma") else MIXTURE)
    parts |= SHARED if "shared_expert" in words else {}
    return f"blk.{words[2]}.{parts[words[-2]]}.{words[-1]}"


def of_all_experts(tensors):
    """The tensors with those of each expert of a layer put into one."""
    made, found = {}, []
    for name, form, shape, data in tensors:
        words = name.split(".")
        if len(words) < 5:
            found.append((name, form, shape, data))
            continue
        key = f"{'.'.join(words[:3])}_exps.weight"
        made.setdefault(key, {})[int(words[3])] = (form, shape, data)
    for key, each in made.items():
        form, shape, _ = each[0]
        data = b"".join(each[number][2] for number in sorted(each))
        found.append((key, form, (len(each), *shape), data))
    return found


def write_gguf(source, path, types, *, tokenizer=None, more=(), plain="F32", apart=False):  # noqa: C901
    """Write a plain model as a GGUF file, and beside it the plain model of the same numbers.

    Args:
        source: the plain model's folder.
        path: of the file; the plain model goes to `plain` beside it.
        types: names of types by words of modules' names; the others are plain.
        tokenizer: metadata of one.
        more: other metadata and tensors.
        plain: type of matrices that are no blocks.
        apart: each expert's matrices are tensors of their own, as in the first files.

    Returns:
        The file and the plain model's folder.
    """
    config = json.loads((source / "config.json").read_text())
    kind, generator = config["model_type"], np.random.default_rng(1)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors, numbers = [], {}
    for name, tensor in load_file(source / "model.safetensors").items():
        part = name.split(".")[-2]
        form = next((types[word] for word in types if word in part), None)
        number = numbers[name] = tensor.float().contiguous()
        turn = heads.get(part) if kind in ("llama", "mixtral") else None
        kept = part.endswith("gate") or not name.endswith("weight")  # of routers
        if form is not None and tensor.dim() == 2 and not kept:
            data = random_blocks(FORMS[form], *tensor.shape, generator)
            numbers[name] = torch.from_numpy(formula(FORMS[form], data))
        elif tensor.dim() == 2 and plain != "F32":
            dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[plain]
            numbers[name] = number.to(dtype).float()
            form, data = plain, number.to(dtype).view(torch.int16).numpy()
        else:
            form, data = "F32", number.numpy()
            data = data + 1 if kind.startswith("gemma") and name.endswith("norm.weight") else data
        if name.endswith("norm.weight") and kind.startswith("gemma"):
            numbers[name] = torch.from_numpy(data - np.float32(1))
        data = paired(data, turn) if turn else data
        shape = tensor.shape[1:] if part == "shared_expert_gate" else tensor.shape
        tensors.append((name_in_gguf(name, kind), form, tuple(shape), data.tobytes()))
    tensors = tensors if apart else of_all_experts(tensors)
    for extra in dict(more).pop("tensors", ()):
        tensors.append(extra)
    kind = ARCHITECTURES.get(kind, kind)
    settings = {
        "general.architecture": kind,
        f"{kind}.block_count": config["num_hidden_layers"],
        f"{kind}.context_length": config["max_position_embeddings"],
        f"{kind}.embedding_length": config["hidden_size"],
        f"{kind}.feed_forward_length": config["intermediate_size"],
        f"{kind}.attention.head_count": config["num_attention_heads"],
        f"{kind}.attention.head_count_kv": config["num_key_value_heads"],
        f"{kind}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
    }
    if config.get("head_dim"):
        settings[f"{kind}.attention.key_length"] = config["head_dim"]
        settings[f"{kind}.attention.value_length"] = config["head_dim"]
    base = (config.get("rope_parameters") or {}).get("rope_theta")
    if base is not None:
        settings[f"{kind}.rope.freq_base"] = float(base)
    for key, word in SETTINGS.items():
        if config.get(word) is not None:
            settings[f"{kind}.{key}"] = config[word]
    settings |= (tokenizer or {}) | {k: v for k, v in dict(more).items() if k != "tensors"}
    path.parent.mkdir(parents=True, exist_ok=True)
    settings["general.alignment"] = 64  # as memory has it: fp32 kernels sum by alignment
    path.write_bytes(gguf_bytes(settings, tensors, alignment=64))
    folder = path.parent / "plain"
    folder.mkdir()
    for each in source.glob("*.json"):
        (folder / each.name).write_bytes(each.read_bytes())
    save_aligned(numbers, folder / "model.safetensors")
    return path, folder


def tokenizer_settings(folder: Path, pre="gpt-2"):
    """The metadata that says what a folder's byte-level tokenizer does."""
    made = json.loads((folder / "tokenizer.json").read_text())
    ids = dict(made["model"]["vocab"]) | {
        each["content"]: each["id"] for each in made["added_tokens"]
    }
    tokens = sorted(ids, key=ids.get)
    special = {each["content"] for each in made["added_tokens"]}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    merges = [m if isinstance(m, str) else " ".join(m) for m in made["model"]["merges"]]
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": ids[settings["eos_token"]],
    }
    template = settings.get("chat_template")
    if template is None and (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text()
    return found | ({} if template is None else {"tokenizer.chat_template": template})
