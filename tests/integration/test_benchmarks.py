"""Short forms of the benchmarks: what they compare gives equal results, and they measure what they claim."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.model.torchvision_import import import_torchvision

import_torchvision()  # before anything imports transformers

from benchmarks import gpu_first, scale  # noqa: E402
from benchmarks.building import decord_widths, plan  # noqa: E402
from benchmarks.loading import checks, index, isolated, loader, readers, remote  # noqa: E402
from benchmarks.loading.media import BenchmarkMedia, write_media  # noqa: E402
from benchmarks.loading.slow_server import SlowServer  # noqa: E402
from benchmarks.model import kernel_counts, lmms_eval, parts, random_model  # noqa: E402
from benchmarks.training import packing  # noqa: E402
from framestream.pipeline.config.manifest import load_manifest  # noqa: E402
from framestream.pipeline.config.model import LanguageModelConfig, ModelConfig, VisionTowerConfig  # noqa: E402
from framestream.pipeline.evaluation.questions import Question  # noqa: E402
from framestream.pipeline.shards.memory_index import MediaFile  # noqa: E402
from framestream.trainer.model import cost  # noqa: E402
from framestream.trainer.model.tome import ToMeConnector  # noqa: E402
from framestream.trainer.model.video_llm import build_model  # noqa: E402
from framestream.trainer.training.optim import freeze  # noqa: E402
from tests.helpers.corpora import training_corpus as corpus  # noqa: E402
from tests.helpers.emulator import build  # noqa: E402


@pytest.mark.parametrize("ways", [parts.merging, parts.connecting, parts.learning], ids=lambda ways: ways.__name__)
def test_connectors_agree(ways):
    torch.manual_seed(0)
    connector = () if ways is parts.merging else (ToMeConnector(48, 24),)
    parts.compare(ways(*connector, 4, torch.randn(3, 196, 48)))


@pytest.mark.parametrize(("clips", "images"), [(2, 1), (1, 0)])
def test_towers_agree(clips, images):
    torch.manual_seed(0)
    cfg = VisionTowerConfig(width=48, depth=3, heads=4, patch=16, table_side=8)
    pixels = torch.randn(clips, 3, 4, 128, 128), torch.randn(images, 3, 1, 128, 128)
    with torch.no_grad():
        parts.compare(parts.encoding(cfg, 128, *pixels))


def test_results_that_differ_are_refused():
    ways = {"framestream": lambda: torch.zeros(4, 2), "other": lambda: torch.eye(4)[:, :2]}
    parts.compare(ways, flips=0.5)
    with pytest.raises(SystemExit, match="other and framestream differ in 2 of 4"):
        parts.compare(ways, flips=0.4)


def test_rows_name_every_implementation(capsys):
    parts.measure_part("part", {"framestream": lambda: torch.zeros(1), "other": lambda: torch.zeros(1)}, repeats=2)
    first, second = capsys.readouterr().out.splitlines()
    assert "framestream" in first and "other" in second


def test_remote_reads_are_measured_over_every_client(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["remote", "--requests", "80"])
    remote.main()
    text = capsys.readouterr().out
    assert all(f"| {name} |" in text for name in ("http.client", "urllib3", "httpx2", "1", "32"))
    assert "kB of a request of 1 MiB" in text


def test_widths_that_decord_refuses_are_padded_rows(capsys, monkeypatch):
    """Rejected widths: decord pads rows to 64 pixels, without AVX-512 to 32, and their bytes are a multiple of it."""
    monkeypatch.setattr("sys.argv", ["decord_widths", "--up-to", "66"])
    decord_widths.main()
    assert "of 32 even widths" in capsys.readouterr().out
    for width, row in decord_widths.refused_widths(66).items():
        padded = {3 * unit * -(-width // unit) for unit in (32, 64) if width % unit}
        assert row in padded and row % width == 0


def test_planning_counts_what_was_generated(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["plan", "--files", "2", "--dialogues", "50", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        plan.main()
    assert exit_info.value.code == 0 and "100 dialogues in 2 files" in capfd.readouterr().out


def test_memory_does_not_grow_with_reads_or_the_index(tmp_path):
    """Four lengths, two orders and temporary memory of sorting take 48 bytes a dialogue, less than a Python object."""
    results = {}
    for dialogues in (20_000, 220_000):
        folder = tmp_path / str(dialogues)
        folder.mkdir()
        index.generate_index(folder, dialogues, media=500)
        results[dialogues] = index.in_process(folder, 2000)
    small, large = results.values()
    growth = [result.reading[-1].anonymous - result.idle.anonymous for result in (small, large)]
    assert growth[1] - growth[0] < 48 * 200_000
    for result in (small, large):
        assert result.reading[-1].anonymous - result.reading[2].anonymous < 2 * index.MIB
        assert result.reading[-1].peak - result.idle.now < 200 * index.MIB


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> BenchmarkMedia:
    return write_media(tmp_path_factory.mktemp("media"), count=3, frames=16, size=64)


def test_checked_and_unchecked_readers_give_the_same_frames(media):
    ways = checks.readers(media)
    found = {name: np.empty((4, media.size, media.size, 3), dtype=np.uint8) for name in ways}
    for name, reader in ways.items():
        reader.read_frames(1, media.frame_numbers(4), found[name])
    np.testing.assert_array_equal(found["checked"], found["unchecked"])
    rates, ratios = checks.compare_ways(media, 4, 1)
    assert len(ratios) == 1 and all(rate > 0 for way in rates.values() for rate in way)


def frames_of(reader: readers.Reader, count: int) -> list[bytes]:
    """Return the frames of each medium once, sorted by their bytes."""
    arrays = [array.copy() for array in reader(count)]
    return sorted({part.tobytes() for array in arrays for part in array.reshape(-1, count, *array.shape[1:])})


@pytest.mark.parametrize("count", [4, 16])
def test_readers_hand_out_the_same_frames(media, count):
    wanted = frames_of(readers.limit(media), count)
    assert len(wanted) == 3
    assert frames_of(readers.pixels(media), count) == wanted
    assert frames_of(readers.pixels(media, threads=2), count) == wanted
    assert frames_of(readers.rows(media, threads=2), count) == wanted


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("webdataset", "webdataset"),
        pytest.param("energon", "megatron.energon", marks=pytest.mark.peers),
        pytest.param("mosaic", "streaming", marks=pytest.mark.peers),
        pytest.param("litdata", "litdata", marks=pytest.mark.peers),
        pytest.param("lance", "lance", marks=pytest.mark.peers),
        pytest.param("datasets", "torchcodec", marks=pytest.mark.peers),
    ],
)
def test_peers_hand_out_the_same_frames(media, name, module):
    pytest.importorskip(module)
    fast = readers.peer(name, media, readers.by_offset)
    assert frames_of(fast, 4) == frames_of(readers.limit(media), 4)
    for own, wanted in zip(readers.peer(name, media)(4), readers.limit(media)(4), strict=True):
        assert own.shape == wanted.shape
        assert np.abs(own.astype(int) - wanted).mean() < 8  # JPEG decoders differ slightly, other frames by 40


def test_a_slow_line_is_read_in_a_process_of_its_own(media):
    with SlowServer(media.folder, 0.001, 1e8) as server:
        remote_reader = readers.pixels(media, threads=2, address=server.address)
        assert frames_of(remote_reader, 4) == frames_of(readers.limit(media), 4)
        server.sent()
        _, read = isolated.media_rate(isolated.OURS, media, 4, server.address)
        requests, sent = server.sent()
        assert requests >= read and sent > read * 4 * 100  # at least 100 bytes a frame


@pytest.mark.peers
@pytest.mark.parametrize(("name", "module"), [("lance", "lance"), ("datasets", "torchcodec")])
def test_peers_open_single_media_over_a_slow_line(media, name, module):
    pytest.importorskip(module)
    wanted = frames_of(readers.limit(media), 4)
    with SlowServer(media.folder, 0.001, 1e8) as server:
        assert frames_of(readers.peer(name, media, readers.by_offset, server.address, threads=2), 4) == wanted


def test_peers_are_opened_once_and_not_for_every_count(monkeypatch):
    turns = []
    monkeypatch.setattr(loader, "frame_rate", lambda reader, count: turns.append((reader, count)) or 1.0)
    rates = loader.speeds({"ours": "a", "peer": "b"}, (4, 8), 1, opened=["peer"])
    assert turns == [("a", 4), ("b", 4), ("a", 8), ("a", 4), ("b", 4), ("a", 8), ("b", 8)]
    assert rates == {name: {4: [1.0], 8: [1.0]} for name in ("ours", "peer")}


def test_shares_are_of_the_same_round():
    rates = {"limit": {4: [100.0, 200.0, 400.0]}, "half": {4: [50.0, 100.0, 200.0]}, "slow": {4: [1.0, 4.0, 4.0]}}
    _, _, base, half, slow = loader.shares(rates, "limit")
    assert base == "| limit | 200 frames/s |"
    assert half == "| half | 0.50 (0.50 to 0.50) |"
    assert slow == "| slow | 0.010 (0.010 to 0.020) |"


def test_layers_run_the_products_that_predictions_count():
    """A layer of Qwen2 has seven matrices, one of UMT four. The backward pass multiplies twice by each."""
    language = LanguageModelConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    forward, backward = kernel_counts.count_language_layer(language)
    assert (forward.products, backward.products) == (8, 15) and backward.kernels > forward.kernels > 8
    tower = VisionTowerConfig(width=48, depth=3, heads=4)
    block, back = kernel_counts.count_tower_block(tower)
    assert (block.products, back.products) == (5, 9)
    twice = kernel_counts.count_tower_block(dataclasses.replace(tower, width=96))[0]
    assert twice.bytes == pytest.approx(2 * block.bytes, rel=0.02), "bytes grow with the width"


@pytest.mark.parametrize("stage", [1, 2, 4])
def test_executed_flops_are_the_products_of_a_step(stage):
    """With recomputing, and with frozen parts: torch's own counter counts the same products, to 2 % for the norms."""
    base = load_manifest(scale.ROOT / "manifests" / f"stage{stage}.yaml")
    model = ModelConfig(
        vision_tower=VisionTowerConfig(width=128, depth=3, heads=2, table_side=8),
        language_model=LanguageModelConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        ),
    )
    frames = dataclasses.replace(base.frames, size=128)
    manifest = dataclasses.replace(base, model=model, frames=frames)
    built = build_model(manifest).train()
    random_model.fill_weights(built)
    freeze(built.parts(), manifest.train)
    row = random_model.make_row(128, clips=[2], text=[40])
    with FlopCounterMode(display=False) as counter:
        built(row).backward()
    products = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if str(op).split(".")[1] in ("mm", "addmm")
    )
    tokens, learned = len(row.input_ids), random_model.LEARNED
    expected, attention = scale._executed_flops(manifest, 2, 0, tokens, tokens**2, learned)
    assert products == pytest.approx(expected, rel=0.02) and attention > 0


def test_predictions_exchange_all_weights_twice_a_micro_step():
    manifest = load_manifest(scale.ROOT / "manifests" / "stage4.yaml")
    counts = cost.count_parameters(manifest)
    gathered, reduced, calls = scale.count_collectives(manifest)
    assert gathered == 2 * sum(counts.values()) and reduced == counts["vision_tower"] + counts["connector"]
    assert 60 < calls <= 110


def test_predictions_name_what_does_not_fit_and_scale(capsys):
    scale.main(["--stages", "3", "--gpus", "1", "8", "32"])
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert "too much" in table[0][8] and "too much" not in "".join(table[1])
    steps = [float(cells[5]) for cells in table[1:]]
    assert 3 < steps[0] / steps[1] <= 4.2, "four times the GPUs, and communication that hides"


def test_gpu_parts_run_small_and_survive_a_failure(capsys, monkeypatch):
    def fail(setting):
        raise MemoryError("none left")

    monkeypatch.setitem(gpu_first.PARTS, "tower", fail)
    parts = ["step", "tower", "layers", "syncs", "copies", "head"]
    assert gpu_first.main(["--small", "--parts", *parts]) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["part"] for line in found if "seconds" in line] == parts
    assert [line["failed"] for line in found if "failed" in line] == ["MemoryError: none left"]
    step = next(line for line in found if line["part"] == "step")
    assert step["wall_s"] > 0 and step["tokens"] == 188


@pytest.mark.skipif(bool(build.unavailable()), reason=build.unavailable() or "here")
def test_gpu_parts_run_on_the_stand_in_device():
    """A process of its own: the stand-in device becomes that of torch and DeepSpeed."""
    command = [sys.executable, "-m", "benchmarks.gpu_first", "--small", "--device", "emu", "--parts", "zero3", "syncs"]
    done = subprocess.run(
        command, cwd=scale.ROOT, env=corpus.environment(), capture_output=True, text=True, timeout=240
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {line["trace"] for line in found if line.get("micro_step", 0) > 1} == {"COMPLETE", None}
    assert {line["buffers_on"][0] for line in found if "buffers_on" in line} == {"emu:0"}
    assert any("waits" in line for line in found)


def test_packed_and_padded_rows_hold_the_same_dialogues_and_losses():
    groups = packing.rows_of_epoch(16, 4, seed=0)
    assert [sorted(np.concatenate(rows).tolist()) for rows in groups.values()] == [list(range(16))] * 2
    lengths, patches = np.array([200, 40, 90]), np.array([2, 0, 1]) * 4 * packing.PATCHES
    batch, small = packing.result_row(lengths, patches, seed=0), packing.build_small()
    assert batch.cu_seqlens.diff().tolist() == lengths.tolist() and len(batch.clips) == 3
    with torch.no_grad():
        packed, padded = small(batch), packing.padded(small, batch)
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)
    assert packed > 1  # the row has labels


def test_the_loss_in_chunks_is_that_of_all_logits():
    chunked, full = (packing.loss_memory(50, way, vocabulary=3000) for way in (True, False))
    assert chunked[0] == pytest.approx(full[0], rel=1e-6)


def question(key: str, answer: str, file: MediaFile, context: tuple[dict, ...] = (), **meta) -> Question:
    turns = [*context, {"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": answer}]
    return Question.from_turns(key, turns, "entry", meta, [file])


def test_questions_become_documents_with_options():
    whole, clip = MediaFile("/a.mp4"), MediaFile("/a.mp4", 1, 2)
    named = question("c", "white", whole, options=["grey", "white"])
    last, first = lmms_eval.docs_of([question("a", "red", whole), question("b", "blue", whole), named], ["c", "a"])
    asked = {"key": "a", "question": "Which?", "media": ["/a.mp4"]}
    assert first == {**asked, "options": ["red", "blue", "white"], "target": 0}
    assert (last["options"], last["target"]) == (["grey", "white"], 1)
    earlier = ({"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."})
    for bad, why in (
        (question("a", "red", clip), "whole files"),
        (question("a", "red", whole, earlier), "one turn"),
        (question("a", "red", whole, options=["blue", "green"]), "'red' is not one of its options"),
    ):
        with pytest.raises(SystemExit, match=why):
            lmms_eval.docs_of([bad], ["a"])


def test_answers_that_differ_or_count_otherwise_are_named():
    ours = {key: lmms_eval.Answer("red", True) for key in "abcd"}
    theirs = {**ours, "b": lmms_eval.Answer("blue", False), "c": lmms_eval.Answer("red", False)}
    theirs["e"] = lmms_eval.Answer("red", True)
    del theirs["d"]
    assert lmms_eval.differing(ours, theirs) == ["b", "c", "d", "e"] and not lmms_eval.differing(ours, dict(ours))
