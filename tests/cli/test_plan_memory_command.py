from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asyncload.cli import main
from asyncload.options import Options

LAYER = 718_848  # the largest layer of the tiny model, in a slot


def plan(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["plan", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    return dict(json.loads(plan(capsys, *arguments, "--json")))


def test_a_model_that_streams(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, tiny_model, "--free", "64MiB", "--mode", "stream", "--context", "1024", "--slots", "3")
    assert (found["mode"], found["context"], found["kv_exact"]) == ("stream", 1024, True)
    assert found["layers"] == {"resident": [], "streamed": [0, 1, 2, 3]}
    assert found["slots"] == {"count": 3, "bytes_each": LAYER}
    sizes = found["bytes"]
    assert (sizes["slots"], sizes["kv_cache"]) == (3 * LAYER, 1024 * 4 * 2 * 64 * 2)
    assert sizes["free"] == 64 << 20
    assert sizes["available"] == sizes["free"] - sizes["margin"]
    purposes = ("weights", "slots", "scratch", "kv_cache", "workspace")
    assert sizes["total"] == sum(sizes[purpose] for purpose in purposes) <= sizes["available"]
    streamed = [tensor for tensor in found["tensors"] if tensor["placement"] == "streamed"]
    always = [tensor for tensor in found["tensors"] if tensor["placement"] == "always"]
    assert {tensor["name"].partition(".")[0] for tensor in streamed} == {"blk"}
    assert {tensor["name"] for tensor in always} == {
        "output.weight",
        "output_norm.weight",
        "rope_freqs.weight",
        "token_embd.weight",
    }
    assert found["bus"] == {
        "once": sum(tensor["bytes"]["bus"] for tensor in always),
        "sweep": sum(tensor["bytes"]["bus"] for tensor in streamed),
    }


def test_the_fastest_mode_that_fits(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_json(capsys, tiny_model, "--free", "8GiB")["mode"] == "full"
    found = plan_json(capsys, tiny_model, "--free", "8GiB", "--mode", "hybrid")
    assert found["layers"] == {"resident": [0, 2, 3], "streamed": [1]}


def test_the_cache_is_what_was_asked_for(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_token = 4 * 2 * 64
    for more, nbytes in (
        ((), 2048 * a_token * 2),
        (("--kv-type", "fp8"), 2048 * a_token),
        (("--kv-type", "q8_0"), 2048 * a_token // 32 * 34),
        (("--kv-bytes", "1KiB"), 1024),
    ):
        assert plan_json(capsys, tiny_model, "--free", "8GiB", *more)["bytes"]["kv_cache"] == nbytes


def test_decoding_and_its_scratch(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, tiny_model, "--free", "8GiB", "--device", "cuda", "--dtype", "bf16")
    options = Options().suited_to("cuda")
    blocks = -(-options.buffers * options.chunk_size // (2 << 20))  # in which CUDA allocates
    assert found["bytes"]["scratch"] == blocks * (2 << 20)
    assert {tensor["decode"] for tensor in found["tensors"]} == {"device"}
    found = plan_json(capsys, tiny_model, "--free", "8GiB", "--device", "cuda", "--dtype", "bf16", "--decode", "host")
    assert found["bytes"]["scratch"] == 0


def test_copies_for_prefill(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, tiny_model, "--free", "8GiB", "--prefill-cache", "fp16")
    assert found["bytes"]["prefill_cache"] == 4 * 2 * 320 * (320 + 64 + 64 + 320 + 3 * 768)


def test_text_says_the_same(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, tiny_model, "--free", "64MiB", "--mode", "stream", "--device", "cuda")
    lines = [line.split() for line in out.splitlines()]
    assert ["mode", "stream"] in lines
    assert ["layers", "0", "stay,", "4", "stream"] in lines
    assert ["slots", "1,437,696", "1.4", "MiB", "2", "of", "718,848"] in lines
    assert ["output_norm.weight", "F32", "float32", "none", "always", "1,280", "1,280"] in lines
    assert ["blk.0.ffn_down.weight", "Q4_K", "uint8", "none", "streamed", "138,240", "138,240"] in lines
    assert ["F32", "float32", "streamed", "8", "10,240", "10,240"] in lines


def test_what_does_not_fit_is_one_line(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny_model), "--free", "40MiB"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "51.4 MiB needed" in captured.err
    assert "36.0 MiB available of 40.0 MiB free" in captured.err
    assert "what helps: " in captured.err


def helps(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, str]:
    """What a plan that does not fit suggests, and what that comes to."""
    assert main(["plan", *map(str, arguments)]) == 1
    _, _, text = capsys.readouterr().err.rstrip("\n").partition("; what helps: ")
    assert text
    return {option: outcome.rstrip(")") for option, _, outcome in (part.partition(" (") for part in text.split("; "))}


def test_what_helps_is_said_in_options_that_the_command_has(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = ["--dtype", "f32", "--prefill-cache", "fp16", "--context", "20000", "--device", "host"]
    found = helps(capsys, tiny_model, "--free", "70MiB", "--mode", "full", *request)
    assert set(found) >= {
        *("--dtype packed", "--kv-type q4_0", "--kv-type q8_0", "no --prefill-cache", "--batch 64", "--mode auto"),
    }
    assert found["--mode auto"] != "fits"
    for option, outcome in found.items():
        name, _, value = option.removeprefix("no ").partition(" ")
        at = request.index(name) if name in request else len(request)
        changed = [*request[:at], *([name, value] if value else []), *request[at + 2 :]]
        mode = [] if name == "--mode" else ["--mode", "full"]
        code = main(["plan", str(tiny_model), "--free", "70MiB", *mode, *changed])
        captured = capsys.readouterr()
        assert (code == 0) == (outcome == "fits")
        assert outcome == "fits" or f"{outcome} needed" in captured.err
    assert "--slots 1" in helps(capsys, tiny_model, "--free", "1MiB", "--mode", "stream", "--slots", "4")


def test_a_cache_that_is_a_bound_can_be_set(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--kv-bytes, as the cache is an upper bound" in helps(capsys, small_model, "--free", "1KiB")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--context", "10"],
        ["--mode", "stream"],
        ["--kv-type", "f16"],
        ["--batch", "7"],
        ["--free", "8GiB", "--select", "0"],
        ["--free", "much"],
        ["--free", "8GiB", "--mode", "fast"],
    ],
    ids=" ".join,
)
def test_arguments_that_make_no_sense(
    small_model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(small_model), *arguments])
    assert caught.value.code == 2
    assert "asyncload plan: error: " in capsys.readouterr().err


def test_a_model_that_says_nothing_of_its_cache(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, small_model, "--free", "8GiB")
    assert not found["kv_exact"]
    assert plan_json(capsys, small_model, "--free", "8GiB", "--kv-bytes", "0")["kv_exact"]
    assert "an upper bound" in plan(capsys, small_model, "--free", "8GiB")
