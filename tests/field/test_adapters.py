"""F-26: an adapter beside a model is never left out in silence."""

import shutil

import pytest


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_model_is_told(tiny_model, offload_run, tmp_path, name):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / name).write_text("{}")
    done = offload_run("generate", folder, "-p", "the quick", "--raw", "-n", 2, "--draft", "none")
    assert f"model holds an adapter ({name}) beside the model" in done.err
