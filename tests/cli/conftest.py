"""A small model whose every number is known, written by the gguf package, and one with the layers of a real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from asyncload.testing import synthesize


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers: 4 tensors of 1,024 weights in Q8_0 (1,088 bytes each), one F32 of 32 weights outside of layers."""
    import gguf

    path = tmp_path_factory.mktemp("cli") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A \x1b[31mred name")
    writer.add_array("tokenizer.ggml.tokens", [f"token {number}" for number in range(100)])
    writer.add_float32("llama.infinite", float("inf"))
    rng = np.random.default_rng(1)
    for layer in (0, 1):
        for part in ("q", "k"):
            weights = rng.standard_normal((32, 32), np.float32)
            packed = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"blk.{layer}.attn_{part}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", rng.standard_normal(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers with one head of 64 for keys and values, trained for 2,048 tokens."""
    path = tmp_path_factory.mktemp("cli") / "tiny.gguf"
    synthesize(path, preset="tiny", quant="Q4_K_M")
    return path
