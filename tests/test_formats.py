"""Quantised checkpoints: exact, wherever their weights are, and small on their way.

Laws: dequantised numbers are bit for bit those of a formula, which was compared with the libraries
that define the formats; the run of a quantised checkpoint is bit for bit the run of a plain one
with these numbers, resident and streamed.
"""

import json
import re
import shutil
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from check_libraries import RECORD
from engines import PROMPT, all_logits, engine_for, generate, reference_model
from quantised import CASES, digest_of, example, mixed, write_twins
from safetensors.torch import load_file, save_file

from offload_rt.adapters.merging import with_adapter
from offload_rt.config import (
    DraftConfig,
    DraftWeights,
    GenerationConfig,
    HomeKind,
    SamplingConfig,
)
from offload_rt.device.base import PAGE_BYTES
from offload_rt.engine import Run
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.kv.resident import ResidentKV
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.config import QuantisedError
from offload_rt.model.formats.checked import check_numbers
from offload_rt.model.formats.found import find_stored
from offload_rt.model.formats.methods import Method, read_method
from offload_rt.model.formats.stored import BLOCK_NUMBERS
from offload_rt.model.formats.wired import WiredLinear
from offload_rt.model.shards import find_weights, read_shards
from offload_rt.model.weight_files import WeightFiles
from offload_rt.runner.runner import Rows
from offload_rt.speculative.medusa.storage import read_output_head

# Runs of a whole model, and its family where that has something that Llama has not.
RUNS = {
    "W4 channel": "qwen2",  # biases
    "W8 g16 asymmetric": "phi3",  # fused projections
    "AWQ g32": "llama",
    "GPTQ 3 g16 act-order": "llama",
    "fp8 blocks": "llama",
    "nf4 nested": "llama",
    "int8": "qwen2",
    "mixed": "llama",
}
MIXED = {
    "q_proj": "W4 g32 asymmetric",
    "k_proj": "W8A8 channel",
    "v_proj": "MXFP4",
    "o_proj": "NVFP4",
    "gate_proj": "FP8 channel",
    "up_proj": "W3 g32",
    "down_proj": "FP8 block",
}


@pytest.fixture(scope="module")
def twins(make_tiny, tmp_path_factory):
    made = {}

    def make(case, dtype="float32"):
        if (case, dtype) not in made:
            family, numbers = RUNS.get(case, "llama"), getattr(torch, dtype)
            source = make_tiny(family, dtype=dtype, pad_token_id=0, num_hidden_layers=2)
            folder = tmp_path_factory.mktemp("twins")
            quantised = CASES[case] if case != "mixed" else mixed(MIXED)
            made[case, dtype] = write_twins(source, folder, *quantised, dtype=numbers)
        return made[case, dtype]

    return make


UP = "model.layers.1.mlp.up_proj"


def found(folder, case, shape=(64, 128), change=lambda tensors: None, **stated):
    """What is found in a folder with the tensors of one module, and its numbers by the law."""
    convert, says = CASES[case]
    parts, numbers = convert(torch.empty(shape), torch.Generator().manual_seed(3))
    tensors = {f"{UP}.{word}": tensor.contiguous() for word, tensor in parts.items()}
    change(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    method = read_method(case, says | stated)
    assert isinstance(method, Method), method
    extents, files = read_shards(folder, find_weights(folder))
    return find_stored(folder, method, extents), numbers, files


def brought(stored, files, dtype):
    """A weight, dequantised from the files."""
    linear = WiredLinear(stored, torch.nn.Linear(1, 1, False, dtype=dtype))
    for word, extent in stored.parts.items():
        setattr(linear, word, files.read(extent))
    linear.scratch = torch.full((stored.numbers * dtype.itemsize,), 255, dtype=torch.uint8)
    return linear.brought()


@pytest.mark.parametrize("case", CASES)
def test_dequantised_numbers_are_those_of_the_law(tmp_path, monkeypatch, case):
    """L1: product in fp32, then one rounding; at once or in blocks of outputs, of odd sizes too."""
    for shape, block in (((64, 128), 2**22), ((72, 192), 2**11)):
        monkeypatch.setitem(BLOCK_NUMBERS, "cpu", block)
        tensors, numbers, files = found(tmp_path, case, shape)
        (stored,) = set(tensors.by_part.values())
        reader = WeightFiles(files)
        check_numbers([stored], reader)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            made = brought(stored, reader, dtype)
            assert made.shape == shape and torch.equal(made, numbers.float().to(dtype)), dtype
        reader.close()


def test_the_law_is_that_of_the_libraries():
    """What was compared with them (`check_libraries.py`) is what is compared with here."""
    record = json.loads(RECORD.read_text())
    assert len(record) == 32
    for case, facts in record.items():
        assert digest_of(*example(case)) == facts["digest"], case


UNSTATED = {
    "W4 g32": "compressed-tensors (pack-quantized)",
    "W4 g16 act-order": "compressed-tensors (pack-quantized)",
    "AWQ g32": "AWQ",
    "GPTQ 4 g32": "GPTQ",
    "FP8 channel": "compressed-tensors (float-quantized), FP8 or ModelOpt",
    "W8A8 channel": "compressed-tensors (int-quantized)",
    "NVFP4": "compressed-tensors (nvfp4-pack-quantized)",
    "MXFP4": "compressed-tensors (mxfp4-pack-quantized)",
    "fp8 blocks": "FP8",
    "ModelOpt NVFP4": "ModelOpt (NVFP4)",
    "nf4": "bitsandbytes (4 bits)",
    "nf4 fp32": "bitsandbytes (4 bits)",
    "int8": "bitsandbytes (8 bits)",
}


def without_config(folder):
    """`quantization_config` is gone from config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", UNSTATED)
def test_weights_that_config_json_says_nothing_of_are_refused_by_method(make_tiny, tmp_path, case):
    """The method that tensors' names tell, and the size."""
    twins = write_twins(make_tiny("llama", num_hidden_layers=2), tmp_path / "t", *CASES[case])
    said = rf"weights of {re.escape(UNSTATED[case])} are, [\d.]+ \w+ here, and config.json has no "
    with pytest.raises(CheckpointError, match=said + "quantization_config that says so: take the"):
        open_checkpoint(without_config(twins.folder))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"q_weight": torch.int32, "q_scale": torch.int32}, "weights of EXL2 are"),
        ({"W_q": torch.uint8, "meta": torch.float32}, "weights of HQQ are"),
        ({"weight": torch.uint32, "scales": torch.bfloat16, "biases": torch.float32}, "of MLX are"),
        ({"numbers": torch.int32}, "in quantised weights of an unknown method"),
    ],
)
def test_weights_of_unread_methods_are_refused_by_name(make_tiny, tmp_path, words, said):
    def convert(weight, generator):
        return {word: torch.ones(8, 8).to(dtype) for word, dtype in words.items()}, weight.double()

    twins = write_twins(make_tiny("llama", num_hidden_layers=2), tmp_path / "t", convert, {})
    with pytest.raises(CheckpointError, match=f"{said}, [\\d.]+ \\w+ here: .* are read, and .*AWQ"):
        open_checkpoint(without_config(twins.folder))


class Wrong:
    """Reads tensors, one of them with a wrong bit in the last byte of each number."""

    def __init__(self, files, extent):
        self._files, self._extent = files, extent

    def read(self, extent):
        tensor = self._files.read(extent)
        if extent is self._extent:
            last = tensor.element_size() - 1
            tensor.view(-1).view(torch.uint8)[last :: last + 1] ^= 1
        return tensor


def test_one_wrong_bit_of_any_part_shows(tmp_path):
    """Negative control of the laws: every part of every form is read."""
    for case in CASES:
        tensors, numbers, files = found(tmp_path, case)
        reader = WeightFiles(files)
        (stored,) = set(tensors.by_part.values())
        for word, extent in stored.parts.items():
            if word in ("g_idx", "weight_g_idx"):
                continue  # groups of inputs: another would not be one that is there
            assert not torch.equal(
                brought(stored, Wrong(reader, extent), torch.float32), numbers
            ), (case, word)
        reader.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", RUNS)
def test_a_quantised_run_is_that_of_its_numbers_bit_for_bit(twins, case, dtype):
    """L2: wherever the weights are; of each format streamed, in host memory and resident."""
    pair = twins(case, dtype)
    with engine_for(pair.plain, resident_layers=0) as engine:
        expected, plain_bytes = all_logits(engine), engine.bytes_per_pass
    kept = {"resident_layers": 1, "home": HomeKind.HOST} if dtype == "float32" else {}
    for options in ({"resident_layers": 0, "slots": 1}, kept):
        with engine_for(pair.folder, **options) as engine:
            assert torch.equal(all_logits(engine), expected), options
            if options.get("slots"):  # as they are in the file, not as they compute
                stored = engine.checkpoint
                streamed = sum(map(stored.layer_bytes, range(stored.config.num_layers)))
                assert engine.bytes_per_pass == streamed < plain_bytes
            memory = engine.memory()
            assert memory.device_peak_bytes <= memory.device_planned_bytes
            assert memory.ledger["dequantised weight"] > 0


ENDS = {
    "GPTQ 4 g32": ("lm_head",),
    "W4 g32 asymmetric": ("lm_head", "model.embed_tokens"),
    "fp8 blocks": ("model.embed_tokens",),
}


@pytest.mark.parametrize("case", ENDS)
def test_quantised_ends_are_dequantised_when_they_are_loaded(make_tiny, tmp_path, case):
    """An embedding, a head, and one that is both; as a target and as a draft model."""
    tied = ENDS[case] == ("model.embed_tokens",)
    config = {"num_hidden_layers": 1, "tie_word_embeddings": tied, "pad_token_id": 0}
    source = make_tiny("llama", dtype="bfloat16", **config)
    options = {"dtype": torch.bfloat16, "ends": ENDS[case]}
    pair = write_twins(source, tmp_path, *CASES[case], **options)
    with engine_for(pair.plain, resident_layers=0) as engine:
        expected, alone = all_logits(engine, steps=1), generate(engine, tokens=4)
        base_bytes = engine.memory().ledger["embedding and head"]
        base_bytes += engine.placement.demand.file_base_bytes
    draft = DraftConfig(draft=f"model:{pair.folder}", draft_tokens=3, draft_weights="int8")
    with engine_for(pair.folder, resident_layers=0, draft=draft) as engine:
        assert torch.equal(all_logits(engine, steps=1), expected)
        memory = engine.memory()
        assert memory.device_peak_bytes <= memory.device_planned_bytes
        pages = 2 * PAGE_BYTES  # that runs of a file begin and end in
        bytes_here = memory.ledger["embedding and head"] + engine.placement.demand.file_base_bytes
        assert bytes_here == pytest.approx(base_bytes, abs=pages)
        assert generate(engine, tokens=4) == alone
    checkpoint = open_checkpoint(pair.folder)
    assert {each.module for each in checkpoint.stored_ends.values()} == set(ENDS[case])
    small, whole = checkpoint.others, open_checkpoint(pair.plain).others
    assert sum(extent.nbytes for extent in small) < sum(extent.nbytes for extent in whole)
    if "lm_head" in ENDS[case]:
        with pytest.raises(ConfigError, match="heads begin as the output head .*is quantised"):
            read_output_head(checkpoint)


def test_it_computes_what_transformers_does_with_the_dequantised_weights(twins):
    pair = twins("W4 g32 asymmetric")
    with engine_for(pair.folder, resident_layers=1) as engine:
        logits = engine.forward([(0, PROMPT)], reuse=True)
    with torch.inference_mode():
        expected = reference_model(pair.plain)(torch.tensor([PROMPT])).logits[:, -1]
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_one_wrong_nibble_shows(twins):
    """Negative control of the law above."""
    folder = twins("W4 g32").folder
    with engine_for(folder, resident_layers=0) as engine:
        expected = all_logits(engine)
    name = "model.layers.1.mlp.up_proj.weight_packed"
    broken = load_file(folder / "model.safetensors")
    broken[name][3, 1] ^= 1 << 4
    other = folder.parent / "broken"
    shutil.copytree(folder, other)
    save_file(broken, other / "model.safetensors")
    with engine_for(other, resident_layers=0) as engine:
        assert not torch.equal(all_logits(engine), expected)


@pytest.mark.parametrize("weights", [DraftWeights.SAME, DraftWeights.INT8, DraftWeights.INT4])
def test_a_quantised_model_drafts_and_keeps_to_its_plan(twins, weights):
    """It proposes what it would say itself, rounded or not, and is drafted for as any other."""
    folder = twins("W4 g32", "bfloat16").folder
    with engine_for(folder, resident_layers=0) as engine:
        alone = generate(engine)
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=3, draft_weights=weights)
    with engine_for(folder, draft=draft, resident_layers=1) as engine:
        run = Run.start(engine, [PROMPT], SamplingConfig(), GenerationConfig(max_tokens=16))
        run.prefill()
        while run.active:
            run.step()
        assert run.sequences[0].emitted == alone[0]
        memory, counts = engine.memory(), run.report().speculation
    assert memory.device_peak_bytes <= memory.device_planned_bytes
    if weights is DraftWeights.SAME:
        assert counts.accepted == counts.drafted > 0


def test_rounding_for_drafts_begins_with_the_dequantised_weights(twins):
    """A rounded copy of quantised weights is the rounded copy of their numbers."""
    pair = twins("W4 g32", "bfloat16")
    rounded = []
    for folder in (pair.folder, pair.plain):
        draft = DraftConfig(draft=f"model:{folder}", draft_tokens=3, draft_weights="int8")
        with engine_for(pair.plain, draft=draft) as engine:
            model = engine._draft_model
            cache = ResidentKV(engine.device, model.network.kv_shapes, torch.bfloat16, 64)
            rounded.append(model.logits([Rows.text(cache, PROMPT)]).clone())
    assert torch.equal(*rounded)


def rewritten(twins, folder, change, **stated):
    """A copy of a quantised model with other tensors, or other words in its configuration."""
    shutil.copytree(twins("W4 g32 asymmetric").folder, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    scheme = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    scheme |= stated
    (folder / "config.json").write_text(json.dumps(config))
    return folder


HUGE = torch.tensor([2**40, 2**40])
BAD = {
    "scale gone": (lambda t: t.pop(f"{UP}.weight_scale"), "up_proj.* but no weight_scale"),
    "codes gone": (lambda t: t.pop(f"{UP}.weight_packed"), "up_proj.* but no weight_packed"),
    "zeros gone": (lambda t: t.pop(f"{UP}.weight_zero_point"), "not symmetric"),
    "shape gone": (lambda t: t.pop(f"{UP}.weight_shape"), "but no weight_shape"),
    "twice": (lambda t: t.update({f"{UP}.weight": torch.zeros(128, 64)}), "not quantised and"),
    "shape of petabytes": (lambda t: t.update({f"{UP}.weight_shape": HUGE}), "1099511627776"),
    "negative shape": (
        lambda t: t.update({f"{UP}.weight_shape": torch.tensor([-128, 64])}),
        "weight_shape is .-128, 64.",
    ),
    "another shape": (
        lambda t: t.update({f"{UP}.weight_shape": torch.tensor([127, 64])}),
        "weight_packed is .128, 8., weight_shape .127, 64.",
    ),
    "no whole groups": (
        lambda t: t.update({f"{UP}.weight_scale": torch.ones(128, 3)}),
        "128 outputs and 3 groups",
    ),
    "another group": (
        lambda t: t.update({f"{UP}.weight_scale": torch.ones(128, 1)}),
        "1 groups of 64 inputs, config.json says groups of 32",
    ),
    "zeros of another shape": (
        lambda t: t.update({f"{UP}.weight_zero_point": torch.ones(16, 9, dtype=torch.int32)}),
        "weight_zero_point is I32 .16, 9., not I32 .16, 2.",
    ),
    "half of the words": (
        lambda t: t.update({f"{UP}.weight_packed": torch.ones(128, 4, dtype=torch.int32)}),
        "4 words for 64 inputs, config.json says 4 bits",
    ),
    "floats for codes": (
        lambda t: t.update({f"{UP}.weight_packed": torch.ones(128, 8)}),
        "weight_packed is F32 .128, 8., not a matrix of I32",
    ),
    "quantised norm": (
        lambda t: (
            t.update(
                {k.replace(UP, "model.norm"): v.clone() for k, v in t.items() if UP in k},
                **{"model.norm.weight": t.pop("model.norm.weight")[:0]},
            )
            or t.pop("model.norm.weight")
        ),
        "model.norm.*in no layer",
    ),
    "quantised head of other ids": (
        lambda t: (
            t.update({k.replace(UP, "lm_head"): v.clone() for k, v in t.items() if UP in k})
            or t.pop("lm_head.weight")
        ),
        "lm_head.weight', has shape .128, 64., config.json says vocab_size 300",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_contradict_each_other_are_refused(twins, tmp_path, case):
    change, says = BAD[case]
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(rewritten(twins, tmp_path / "m", change))


STATE = "weight.quant_state.bitsandbytes__nf4"


def without(*words):
    return lambda tensors: [tensors.pop(f"{UP}.{word}") for word in words]


def put(word, tensor):
    return lambda tensors: tensors.update({f"{UP}.{word}": tensor})


def state(**facts):
    """Other words in the JSON text of a weight of bitsandbytes."""

    def change(tensors):
        said = json.loads(bytes(tensors[f"{UP}.{STATE}"].tolist())) | facts
        tensors[f"{UP}.{STATE}"] = torch.tensor(list(json.dumps(said).encode())).byte()

    return change


BAD_PARTS = [
    ("FP8 channel", without("weight_scale"), "'weight' but no weight_scale"),
    ("fp8 blocks", put("weight_scale", torch.ones(2, 3)), "both weight_scale and weight_scale_inv"),
    (
        "fp8 blocks",
        put("weight_scale_inv", torch.ones(3, 2)),
        "scale_inv is F32 .3, 2. for a weigh",
    ),
    ("fp8 blocks", put("weight_scale_inv", torch.ones(2, 3).char()), "weight_scale_inv is I8"),
    (
        "fp8 blocks",
        put("weight", torch.ones(64, 128).char()),
        "weight is I8 .* not a matrix of F8_",
    ),
    (
        "fp8 blocks",
        put("weight", torch.ones(64, 128)),
        "a weight that is not quantised and weight_s",
    ),
    ("FP8 channel", put("qweight", torch.ones(64, 128).int()), "has qweight, of which weights in"),
    (
        "W8A8 channel",
        put("weight_zero_point", torch.ones(64, 1).char()),
        "says that it is symmetric",
    ),
    ("W8 group bytes asymmetric", without("weight_zero_point"), "no weight_zero_point"),
    ("W8A8 channel", put("weight", torch.ones(8192).char()), "weight is I8 .8192., not a matrix"),
    ("NVFP4", without("weight_global_scale"), "no weight_global_scale"),
    ("NVFP4", put("weight_global_scale", torch.ones(2)), "global_scale is F32 .2., not one number"),
    ("NVFP4", put("weight_scale", torch.ones(64, 8)), "weight_scale is F32 .64, 8. for a weight"),
    (
        "MXFP4",
        put("weight_scale", torch.ones(64, 8).byte()),
        "config.json says one of U8 or F8_E8M0",
    ),
    ("GPTQ 4 g32", put("weight", torch.ones(64, 128)), "a weight that is not quantised and g_idx"),
    ("GPTQ 4 g32", put("g_idx", torch.ones(64).int()), "g_idx is I32 .64., not I32 or I64 .128."),
    (
        "AWQ g32",
        put("g_idx", torch.ones(128).int()),
        "has g_idx, of which weights in AWQ g32 have no",
    ),
    ("nf4", without("weight.absmax"), "no absmax"),
    ("nf4", without(STATE), "has 0 of quant_state"),
    ("nf4", put("weight.quant_state.bitsandbytes__fp4", torch.ones(4).byte()), "has 2 of quant_st"),
    ("nf4", put(STATE, torch.tensor(list(b"nonsense")).byte()), "nf4' is not valid JSON"),
    ("nf4", put(STATE, torch.ones(2**17).byte()), "131072 bytes of U8, accepted are 65536"),
    ("nf4", state(quant_type="fp4"), "bitsandbytes__nf4 that says 'fp4'"),
    ("nf4", state(blocksize=96), "blocks of 96 of 'bfloat16'"),
    ("nf4", state(blocksize=True), "blocks of True of"),
    ("nf4", state(dtype="int8"), "blocks of 64 of 'int8'"),
    ("nf4", state(shape=[2**19, 2**19]), "4096 bytes of U8, stated is a shape of .524288, 524288."),
    ("nf4", state(shape=[2**40, 1]), "of shape a list of 2, expected are two sides"),
    ("nf4", state(shape=[64.0, 128]), "of shape a list of 2, expected are two sides"),
    ("nf4", put("weight.absmax", torch.ones(127)), "absmax is F32 .127., not F32 .128."),
    ("nf4", put("weight.quant_map", torch.ones(15)), "quant_map is F32 .15., not F32 .16."),
    ("nf4 nested", without("weight.nested_absmax"), "and has no nested_absmax"),
    ("nf4 nested", state(nested_blocksize=100), "scales in blocks of 100"),
    ("nf4 nested", state(nested_offset="much"), "and an offset of 'much'"),
    (
        "nf4 nested",
        put("weight.nested_absmax", torch.ones(2)),
        "nested_absmax is F32 .2., not F32 .1",
    ),
    ("int8", without("SCB"), "no SCB"),
    ("int8", put("SCB", torch.ones(128)), "SCB is F32 .128., not F32 .64."),
    ("int8", put("weight_format", torch.ones(1).byte()), "a weight_format other than rows"),
]


@pytest.mark.parametrize(("case", "change", "says"), BAD_PARTS)
def test_parts_that_are_missing_or_do_not_fit_are_refused(tmp_path, case, change, says):
    """Before anything is allocated: what is said of a weight's size is data."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=says) as caught:
            found(tmp_path, case, change=change)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert caught.value.exit_code == 4


INF, NAN = float("inf"), float("nan")
BAD_NUMBERS = [
    ("fp8 blocks", put("weight_scale_inv", torch.full((2, 3), INF)), "6 scales that are NaN"),
    (
        "fp8 blocks of powers",
        put("weight_scale_inv", torch.full((64, 4), 255).byte()),
        "256 scales",
    ),
    ("W8A8 channel", put("weight_scale", torch.full((64, 1), NAN)), "64 scales that are NaN"),
    ("NVFP4", put("weight_global_scale", torch.tensor([NAN])), "1 scales that are NaN"),
    (
        "NVFP4",
        put("weight_global_scale", torch.tensor([0.0])),
        "is 0, and scales are divided by it",
    ),
    ("NVFP4", put("weight_scale", torch.full((64, 8), NAN).to(torch.float8_e4m3fn)), "512 scales"),
    ("MXFP4", put("weight_scale", torch.full((64, 4), 255).byte()), "256 scales that are NaN"),
    ("nf4", put("weight.absmax", torch.full((128,), INF)), "128 scales that are NaN or infinite"),
    ("nf4 nested", put("weight.nested_quant_map", torch.full((256,), NAN)), "256 scales that"),
    ("int8", put("SCB", torch.full((64,), INF)), "64 scales that are NaN or infinite"),
]


@pytest.mark.parametrize(("case", "change", "says"), BAD_NUMBERS)
def test_scales_that_are_no_numbers_are_refused(tmp_path, case, change, says):
    tensors, _, files = found(tmp_path, case, change=change)
    reader = WeightFiles(files)
    with pytest.raises(CheckpointError, match=says):
        check_numbers(set(tensors.by_part.values()), reader)
    reader.close()


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"symmetric": True}, "symmetric"),
        ({"num_bits": 8}, "config.json says 8 bits"),
        ({"group_size": 128}, "config.json says groups of 128"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(twins, tmp_path, stated, says):
    folder = rewritten(twins, tmp_path / "m", lambda tensors: None, **stated)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"num_bits": 1}, "num_bits is 1, read are 2 to 8"),
        ({"type": "float"}, "weights are not integers, as 'pack-quantized' has them"),
        ({"strategy": "token"}, "strategy 'token' is not read"),
        ({"group_size": 0, "strategy": "group"}, "group_size is 0"),
    ],
)
def test_schemes_that_are_not_read_are_named(twins, tmp_path, stated, says):
    folder = rewritten(twins, tmp_path / "m", lambda tensors: None, **stated)
    with pytest.raises(QuantisedError, match=f"KiB here: .*{says}; .*compressed-tensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("word", "index", "value", "says"),
    [
        ("weight_scale", (3, 1), float("nan"), "holds 1 scales that are NaN"),
        ("weight_g_idx", 5, 4, "names groups 0 to 4, there are scales of 4"),
        ("weight_g_idx", 5, -1, "names groups -1 to 3"),
    ],
)
def test_numbers_are_checked_before_anything_is_computed(twins, tmp_path, word, index, value, says):
    folder = tmp_path / "m"
    shutil.copytree(twins("W4 g16 act-order").folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.{word}"][index] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=says), engine_for(folder):
        pass


def test_what_is_not_done_with_quantised_weights_is_said(twins, tmp_path, offload_run):
    folder = twins("W4 g32").folder
    with pytest.raises(ConfigError, match="--adapter is for models whose weights are not quant"):
        with_adapter(open_checkpoint(folder), SimpleNamespace(name="a"), "auto")
    talk = tmp_path / "talk.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk.write_text(json.dumps({"messages": turns}))
    words = ("--output", tmp_path / "heads", "--method", "medusa-2")
    done = offload_run("train-medusa", folder, "--data", talk, *words)
    assert done.code == 2 and "medusa-2 trains weights" in done.err


def test_a_plan_knows_three_sizes(twins, offload_run):
    """In the files and on their way, as weights compute, and the room for the one that does."""
    pair = twins("W4 channel")
    plain, quantised = (
        json.loads(offload_run("plan", folder, "--draft", "none", "--json").out)
        for folder in (pair.plain, pair.folder)
    )
    facts = quantised["quantised"]
    assert plain["quantised"] is None
    assert facts["method"] == "compressed-tensors, 4-bit"
    assert facts["weights"] * 4 == facts["computed_bytes"] > 6 * facts["file_bytes"]
    more = plain["weights_bytes"] - quantised["weights_bytes"]
    assert more == facts["computed_bytes"] - facts["file_bytes"]
    assert quantised["workspace_bytes"] - plain["workspace_bytes"] == facts["scratch_bytes"] > 0
    text = " ".join(offload_run("plan", pair.folder).out.split())
    assert "compressed-tensors, 4-bit" in text
    assert "the numbers that are stored, bit for bit" in text


@pytest.mark.parametrize(
    ("case", "stated", "says"),
    [
        ("AWQ g32", {"version": "gemv"}, "its version 'gemv' is not read"),
        ("AWQ g32", {"bits": 3}, "its bits are 3, read are 4"),
        ("GPTQ 4 g32", {"checkpoint_format": "gptq_p"}, "its checkpoint_format 'gptq_p' is"),
        ("GPTQ 4 g32", {"is_marlin_format": True}, "its checkpoint_format 'marlin' is"),
        ("GPTQ 4 g32", {"dynamic": {"-:x": {}}}, "its modules differ"),
        ("GPTQ 4 g32", {"bits": 5}, "its bits are 5"),
        ("GPTQ 4 g32", {"group_size": 0}, "its group_size is 0"),
    ],
)
def test_packings_of_words_that_are_not_read_are_named(twins, tmp_path, case, stated, says):
    shutil.copytree(twins(case).folder, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] |= stated
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantisedError, match=says):
        open_checkpoint(tmp_path / "m")


def test_what_is_not_rounded_as_the_method_has_it_is_said(twins, tmp_path, caplog):
    shutil.copytree(twins("W4 g32 asymmetric").folder, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = {"num_bits": 8, "type": "int"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    open_checkpoint(tmp_path / "m")
    assert "activations are not rounded" in caplog.text
    assert "the KV cache is not rounded" in caplog.text


def test_zero_points_that_readers_read_in_two_ways_are_refused(twins, tmp_path):
    shutil.copytree(twins("GPTQ 4 g32").folder, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors[f"{UP}.qzeros"][0, 0] |= 15
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match="convert it to gptq_v2"), engine_for(tmp_path / "m"):
        pass
