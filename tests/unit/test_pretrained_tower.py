# SPDX-License-Identifier: Apache-2.0
"""The tower of bench.selection: as transformers has it, and row by row where it computes some rows only."""

import pytest
import torch
import torch.nn.functional as F

from bench.common.fetch import cache_folder
from bench.common.pretrained_tower import HEAD, MEAN, MEMBER, STD, WHEEL, PretrainedTower, random_tower, read_weights

WIDTH, DEPTH = 2 * HEAD, 2


def frames(count: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 14 * rows, 14 * columns, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture
def tower() -> PretrainedTower:
    return random_tower(DEPTH, WIDTH, seed=3)


def renamed(name: str) -> str:
    """As transformers 5 calls a weight of a released checkpoint."""
    for part, now in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        name = name.replace(f"attention.attention.{part}", f"attention.{now}")
    return name.replace("attention.output.dense", "attention.o_proj")


def test_the_full_tower_is_that_of_transformers(tower):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, image_size=70, patch_size=14, mlp_ratio=4
    )
    model = Dinov2Model(config).eval()
    model.load_state_dict({renamed(name): weight for name, weight in tower.weights.items()}, strict=False)
    some = frames(3, 4, 6)
    pixels = (some.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.inference_mode():
        wanted = model(pixel_values=pixels).last_hidden_state
        got = tower.run(tower.embed(some))
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)


def row_by_row(tower: PretrainedTower, embedded: torch.Tensor, computed: torch.Tensor, mode: str) -> torch.Tensor:
    """The same, a row at a time; every place remembers its last keys and values."""
    w, (units, places, width) = tower.weights, embedded.shape
    state = embedded.clone()
    for layer in range(DEPTH):
        prefix = f"encoder.layer.{layer}."

        def linear(name: str, row: torch.Tensor, prefix: str = prefix) -> torch.Tensor:
            return w[f"{prefix}{name}.weight"] @ row + w[f"{prefix}{name}.bias"]

        def norm(name: str, row: torch.Tensor, prefix: str = prefix) -> torch.Tensor:
            centred = row - row.mean()
            scaled = centred / (centred.square().mean() + 1e-6).sqrt()
            return scaled * w[f"{prefix}{name}.weight"] + w[f"{prefix}{name}.bias"]

        following, last = state.clone(), {}
        for t in range(units):
            if mode == "skip":
                last = {}
            for p in range(places):
                if computed[t, p]:
                    row = norm("norm1", state[t, p])
                    last[p] = [linear(f"attention.attention.{part}", row) for part in ("key", "value")]
            for p in range(places):
                if not computed[t, p]:
                    continue
                query = linear("attention.attention.query", norm("norm1", state[t, p]))
                heads = []
                for head in range(0, width, HEAD):
                    part = slice(head, head + HEAD)
                    scores = torch.stack([query[part] @ key[part] for key, _ in last.values()]) / HEAD**0.5
                    values = torch.stack([value[part] for _, value in last.values()])
                    heads.append(scores.softmax(0) @ values)
                row = state[t, p] + w[f"{prefix}layer_scale1.lambda1"] * linear(
                    "attention.output.dense", torch.cat(heads)
                )
                hidden = F.gelu(linear("mlp.fc1", norm("norm2", row)))
                following[t, p] = row + w[f"{prefix}layer_scale2.lambda1"] * linear("mlp.fc2", hidden)
        state = following
    out = F.layer_norm(state, (width,), w["layernorm.weight"], w["layernorm.bias"], eps=1e-6)
    return out * computed[..., None]


@pytest.mark.parametrize("mode", ["full", "reuse", "skip"])
@pytest.mark.parametrize("seed", [0, 1])
def test_computed_rows_are_those_of_a_row_at_a_time(tower, mode, seed):
    embedded = tower.embed(frames(4, 2, 3, seed))
    computed = torch.rand(embedded.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.4
    computed[0], computed[:, 0] = True, True
    if mode == "full":
        computed[:] = True
    got = tower.run(embedded, None if mode == "full" else computed, mode)
    torch.testing.assert_close(got, row_by_row(tower, embedded, computed, mode), atol=2e-4, rtol=1e-4)


def test_modes_differ_where_something_is_left_out(tower):
    embedded = tower.embed(frames(3, 2, 3))
    computed = torch.ones(embedded.shape[:2], dtype=torch.bool)
    full = tower.run(embedded)
    for mode in ("reuse", "skip"):
        assert torch.equal(tower.run(embedded, computed, mode), full)
    computed[1:, 3:] = False
    reuse, skip = (tower.run(embedded, computed, mode)[1:, :3] for mode in ("reuse", "skip"))
    assert len({float(each.sum()) for each in (full[1:, :3], reuse, skip)}) == 3


def test_reuse_needs_a_whole_first_frame(tower):
    embedded = tower.embed(frames(2, 2, 2))
    computed = torch.ones(2, 5, dtype=torch.bool)
    computed[0, 4] = False
    with pytest.raises(ValueError, match="frame 0"):
        tower.run(embedded, computed, "reuse")


def test_the_pretrained_tower_is_that_of_onnxruntime():
    """Of the file that a benchmark has fetched: nothing is downloaded here."""
    onnxruntime = pytest.importorskip("onnxruntime")
    path = cache_folder("material") / WHEEL.replace("==", "-") / MEMBER.rsplit("/", 1)[1]
    if not path.exists():
        pytest.skip("bench.selection has not fetched the weights")
    import onnx

    model = onnx.load(path)
    last = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    some = frames(1, 16, 16)
    pixels = (some.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    (wanted,) = session.run([last], {session.get_inputs()[0].name: pixels.numpy()})
    tower = PretrainedTower(read_weights(path))
    with torch.inference_mode():
        got = tower.run(tower.embed(some))
    torch.testing.assert_close(got, torch.from_numpy(wanted), atol=1e-3, rtol=1e-3)
