"""What a run says about the link: layers, KV, and what came in while a drafter worked."""

import json
import re
import time

import pytest
from engines import engine_for, generate

from offload_rt.config import DraftConfig, GenerationConfig, HomeKind, KVPlace, SamplingConfig
from offload_rt.engine import Run
from offload_rt.speculative.base import Draft
from offload_rt.speculative.ngram.drafter import NgramDrafter

LONG = [(i * i + 3 * i) % 290 for i in range(400)]
LAYERS, ROW_BYTES = 3, 2 * 2 * 16 * 4  # K and V, heads, D, fp32
STEPS = 9


def finished(engine, prompts, tokens=STEPS + 1) -> Run:
    run = Run.start(engine, prompts, SamplingConfig(), GenerationConfig(max_tokens=tokens))
    run.prefill()
    while run.active:
        run.step()
    return run


@pytest.mark.parametrize("place", [KVPlace.DISK, KVPlace.HOST])
@pytest.mark.parametrize("prompts", [[LONG], [LONG, LONG[::-1]]], ids=["one", "two"])
def test_kv_over_the_link_is_counted_once_there_and_back(make_tiny, place, prompts):
    """Committed rows go home once and come back in each pass; sequences share one stream.

    In host memory a CPU attends to them where they are: they only go there.
    """
    back = STEPS if place is KVPlace.DISK else 0
    folder = make_tiny("llama", num_hidden_layers=LAYERS)
    options = {"kv": place, "kv_block_tokens": 32, "resident_layers": 1, "slots": 1}
    with engine_for(folder, prompts=prompts, tokens=STEPS + 1, **options) as engine:
        transfer = finished(engine, prompts).report().transfer
        for stream in engine._caches[0].copies:
            stream.record().synchronize()
        kv_bytes = engine.counters().kv_bytes_copied
        sizes = engine._caches[0]._sizes
        at_home = sizes.home_rows(len(LONG))
        assert at_home == sizes.home_rows(len(LONG) + STEPS) > 300  # the answer stays recent
        layers = len(sizes.offloaded)
        once = at_home * layers * ROW_BYTES * len(prompts)
        ahead = sizes.slots * sizes.slot_bytes * len(prompts) if back else 0
        assert layers == LAYERS and ahead < once / 2
        assert (1 + back) * once <= kv_bytes <= (1 + back) * once + ahead
        assert max(1, back) * once <= transfer.kv_bytes_total <= kv_bytes
        streamed = transfer.bytes_total - transfer.kv_bytes_total
        per_pass = engine.bytes_per_pass
        assert STEPS * per_pass <= streamed <= (2 + STEPS) * per_pass
        assert engine.link_bytes() >= transfer.bytes_total


def test_kv_on_the_device_crosses_no_link(make_tiny):
    folder = make_tiny("llama", num_hidden_layers=LAYERS)
    with engine_for(folder, prompts=[LONG], resident_layers=1, kv=KVPlace.DEVICE) as engine:
        transfer = finished(engine, [LONG]).report().transfer
        assert transfer.kv_bytes_total == 0
        assert transfer.bytes_total >= STEPS * engine.bytes_per_pass


@pytest.mark.parametrize(("draft_s", "least", "most"), [(0.15, 0.5, 1.0), (0.0, 0.0, 0.4)])
def test_what_comes_in_while_the_drafter_works(make_tiny, monkeypatch, draft_s, least, most):
    """A pass of bytes takes 50 ms; a slow drafter gives the ring time to fill, a fast one none."""

    def propose(self, ids, max_depth, max_nodes=None):
        time.sleep(draft_s)
        return Draft()

    monkeypatch.setattr(NgramDrafter, "propose", propose)
    folder = make_tiny("llama", num_hidden_layers=LAYERS)
    link = {"home": HomeKind.HOST, "resident_layers": 0, "slots": LAYERS}
    with engine_for(folder, **link) as engine:
        per_pass = engine.bytes_per_pass
    draft, asked = DraftConfig(draft="ngram"), STEPS - 1  # nothing is asked for the last token
    with engine_for(folder, draft=draft, link_bytes_per_s=per_pass / 0.05, **link) as engine:
        generate(engine, tokens=1)  # the ring is full
        report = finished(engine, [LONG[:4]]).report()
        speculation = report.speculation
        assert least <= speculation.draft_link_bytes / (asked * per_pass) <= most
        assert asked * draft_s <= speculation.draft_s <= report.timings.decode_s
        share = speculation.draft_s / report.timings.decode_s
        assert speculation.draft_share == pytest.approx(share)


def test_without_a_drafter_there_is_no_share(make_tiny):
    with engine_for(make_tiny("llama", num_hidden_layers=LAYERS), resident_layers=1) as engine:
        speculation = finished(engine, [LONG[:4]]).report().speculation
        assert (speculation.draft_share, speculation.draft_link_bytes) == (None, 0)


def test_the_block_and_the_object_have_them(tiny_model, offload_run):
    prompt = ("generate", tiny_model, "--raw", "-p", "a b a b " * 30, "-n", 12)
    draft = ("--draft", f"model:{tiny_model}", "--draft-tokens", 32)
    # A link so slow that something is always on its way.
    link = ("--home", "host", "--link-bandwidth", 0.02, "--resident-layers", 0)
    placed = (*link, "--kv", "host", "--kv-block-tokens", 32)
    done = offload_run(*prompt, *draft, *placed)
    size = r"\d+(\.\d+)? [KM]?i?B"
    assert re.search(
        rf"\n  kv {{7}}{size} over the link, written and read back, {size} per p", done.err
    )
    assert re.search(rf"drafting \d+\.\d\d s \(\d+% of .*\), {size} came in meanwhile\n", done.err)
    record = json.loads(offload_run(*prompt, *draft, *placed, "--json").out)
    transfer, speculation = record["transfer"], record["speculation"]
    assert 0 < transfer["kv_bytes_total"] < transfer["bytes_total"]
    assert 0 < speculation["draft_share"] < 1 and speculation["draft_link_bytes"] > 0
    plain = offload_run(*prompt)
    assert "over the link, written" not in plain.err and "meanwhile" not in plain.err
