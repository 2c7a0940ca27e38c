# SPDX-License-Identifier: Apache-2.0
"""Synthetic clips with questions: a coloured square visits cells of a noisy textured background, one after the other.

Between visits, before the first and after the last, it is out of sight: "last" is not to be read off the last frame.
Five tasks, one question a clip (several in one sequence would give each other's answers away). The time that the task
"when" asks for is drawn at random, so that no sampling of frames can be lucky with it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evs_vllm.errors import ConfigError
from evs_vllm.train.codec import through_h264, to_mp4

COLOURS = {
    "red": (230, 30, 30),
    "green": (30, 190, 40),
    "blue": (40, 60, 235),
    "yellow": (235, 220, 30),
    "white": (250, 250, 250),
    "black": (8, 8, 8),
}
GREY = 128
TASKS = ("where", "last", "count", "first", "when")
CONDITIONS = ("still", "noise", "light", "pan", "cuts")
SCENES = {
    "light": ("How light was it after {} tenths of the clip?", ("bright", "dim", "dark")),
    "pan": ("Where did the camera look after {} tenths of the clip?", ("left", "middle", "right")),
    "cuts": ("Which scene was there after {} tenths of the clip?", ("1", "2", "3")),
}
"""What the task "scene" asks in conditions that change the scene, and the answers: by thirds of the range in which the
light or the camera's direction changes, or one for each of the scenes that are cut between."""
TIMED = ("when", "scene")
"""Tasks that ask for a time."""
BLOCK = 7
"""Side in pixels of the even blocks that a background is made of."""


@dataclass(frozen=True)
class SceneSettings:
    """What clips look like.

    Attributes:
        units: Temporal units, a second each; a unit is two frames that show the same but for the noise.
        strides: The clip is sampled every so many seconds instead, drawn for each clip: as long, with fewer units.
        rows, columns: Cells.
        cell: Side of a cell in pixels; 28 makes a cell one token of Qwen2-VL and Qwen2.5-VL.
        square: Side of the square, at most `cell`; what it leaves of the background tells cells apart.
        noise: Each pixel of each frame is off by up to this many grey levels, at most 127; not in condition "still".
        most_places: The square visits 1 to this many cells, never one twice and each time in another colour.
        lost: Each cell of each unit is grey, as after errors of transmission, with a probability that is drawn for
            the clip from 0 to this; never where a visit begins. For training: otherwise a model may tell where the
            square is by the background that is missing there, for which it needs the whole unit.
        tasks: The tasks that are asked, out of `TASKS` and "scene" (`SCENES`), which is asked in conditions that change
            the scene only.
        texture: Seed of the background that all clips share, as before one camera; None gives each clip its own, and
            then only position IDs tell cells apart.
        frame: Width in pixels of a frame that each cell has in a hue of its own, fixed in the picture, as of a window
            that the camera looks through. It tells cells apart where the background moves or changes.
        tint: By up to how many grey levels the backgrounds of "pan" and "cuts" lean to a hue, which is another one in
            each part of the panorama and in each scene. It makes a small model learn sooner to tell them apart.
        conditions: What happens beside the square, drawn for each clip. Cells are places in the picture, whatever moves
            behind them. "still": nothing, not even noise; "noise": noise alone; the others with noise: "light": over
            the clip the light falls to a part of itself, or rises from it; "pan": the camera turns to one side and
            back, so that the background moves under the cells; "cuts": the background is another one every 3 to 8
            seconds, out of three.
        light: The part of the light that is left at the darker end, above 0.
        pan: How far the background moves in a second, in pixels: from a third of this to this, drawn for each clip.
        h264: If given, frames are what a server decodes of them as H.264, at a constant rate factor drawn from this
            range (`evs_vllm.train.codec`).
    """

    units: int = 32
    strides: tuple[int, ...] = (1,)
    rows: int = 2
    columns: int = 3
    cell: int = 28
    square: int = 14
    noise: int = 6
    most_places: int = 4
    lost: float = 0.0
    tasks: tuple[str, ...] = TASKS
    texture: int | None = 0
    frame: int = 0
    tint: int = 0
    conditions: tuple[str, ...] = ("noise",)
    light: float = 0.2
    pan: float = 6.0
    h264: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "strides", tuple(self.strides))
        object.__setattr__(self, "conditions", tuple(self.conditions))
        if self.h264 is not None:
            object.__setattr__(self, "h264", tuple(self.h264))
            if len(self.h264) != 2 or not 0 <= self.h264[0] <= self.h264[1] <= 51:
                raise ConfigError(f"h264 got {list(self.h264)}; a range of rate factors within 0 to 51 is needed.")
        if min(self.units, self.rows, self.columns, self.cell, self.square, self.most_places) < 1:
            raise ConfigError("A synthetic clip needs at least one unit, cell, place and pixel.")
        if not self.strides or not all(stride >= 1 and self.units % stride == 0 for stride in self.strides):
            raise ConfigError(
                f"strides got {list(self.strides)}; one or more divisors of units={self.units} are needed."
            )
        if not 0 <= self.lost < 1:
            raise ConfigError(f"lost got {self.lost}; a share from 0 up to but not including 1 is needed.")
        if not 0 <= self.frame <= (self.cell - self.square) // 2 and self.square <= self.cell:
            raise ConfigError(f"frame got {self.frame}; it has to leave room for the square in the cell.")
        if self.square > self.cell or not 0 <= self.noise <= 127 or self.rows * self.columns < 2:
            raise ConfigError("A synthetic clip needs square <= cell, noise from 0 to 127 and at least two cells.")
        if not self.tasks or not set(self.tasks) <= {*TASKS, "scene"}:
            raise ConfigError(f"tasks got {list(self.tasks)}; known: {', '.join(TASKS)}, scene.")
        if not self.conditions or not set(self.conditions) <= set(CONDITIONS):
            raise ConfigError(f"conditions got {list(self.conditions)}; known: {', '.join(CONDITIONS)}.")
        if set(self.tasks) == {"scene"} and not set(self.conditions) <= set(SCENES):
            raise ConfigError(f"The task scene needs a condition that changes the scene: {', '.join(SCENES)}.")
        if not 0 <= self.tint <= 60:
            raise ConfigError(f"tint got {self.tint}; grey levels from 0 to 60 are needed.")
        if not 0 < self.light <= 1 or self.pan <= 0:
            raise ConfigError(f"light got {self.light} and pan {self.pan}; 0 < light <= 1 and pan > 0 are needed.")


class Visit(NamedTuple):
    """The square is in cell `cell` (from 0, row by row) in the units from `begin` up to but not including `end`."""

    cell: int
    colour: str
    begin: int
    end: int


@dataclass(frozen=True)
class Example:
    """One clip with its question.

    Attributes:
        frames: (2 * units, rows * cell, columns * cell, 3) uint8.
        fps: Frames per second, 2 at a stride of 1.
        condition: One of `CONDITIONS`.
        task: One of `TASKS`, or "scene".
        question, answer: English; the answer is one word or digit.
        visits: Where the square was and when, in order.
        scene: What the task "scene" would have as its answer at each unit; empty in other conditions than `SCENES`.
        asked: The unit that is asked for by "when" and "scene", the last one that began before that time.
    """

    frames: np.ndarray
    fps: float
    condition: str
    task: str
    question: str
    answer: str
    visits: tuple[Visit, ...]
    scene: tuple[str, ...]
    asked: int | None


def make_example(settings: SceneSettings, seed: int | Sequence[int]) -> Example:
    """Draws a clip and a question; the same seed gives the same."""
    rng = np.random.default_rng(seed)
    s = settings
    cells = s.rows * s.columns
    stride = int(rng.choice(s.strides)) if len(s.strides) > 1 else s.strides[0]
    units = s.units // stride
    places = int(rng.integers(1, min(s.most_places, (units + 1) // 2, cells, len(COLOURS)) + 1))
    begins, ends = np.sort(rng.choice(units + 1, 2 * places, replace=False)).reshape(-1, 2).T
    begins[0] = min(begins[0], max(0, 9 * units // 10 - 1))  # the latest time that is asked for comes after it
    where = rng.permutation(cells)[:places].tolist()
    which = [str(colour) for colour in rng.permutation(list(COLOURS))[:places]]
    visits = tuple(Visit(*visit) for visit in zip(where, which, begins.tolist(), ends.tolist(), strict=True))

    condition = str(rng.choice(s.conditions)) if len(s.conditions) > 1 else s.conditions[0]
    painter = rng if s.texture is None else np.random.default_rng(s.texture)
    progress = _progress(condition, s, stride * np.arange(units), rng)
    frames = _backgrounds(condition, s, progress, painter).astype(np.int16).repeat(2, axis=0)
    if s.frame:
        frames[:, _framed(s)] = _hues(s)[_framed(s)]
    margin = (s.cell - s.square) // 2
    for visit in visits:
        y, x = (visit.cell // s.columns) * s.cell + margin, (visit.cell % s.columns) * s.cell + margin
        frames[2 * visit.begin : 2 * visit.end, y : y + s.square, x : x + s.square] = COLOURS[visit.colour]
    if condition == "light":
        frames = _lit(frames, s.light ** progress.repeat(2))
    if s.lost:
        lost = rng.random((units, cells)) < rng.uniform(0, s.lost)
        lost[begins, where] = False
        shape = (units, 2, s.rows, s.cell, s.columns, s.cell, 3)
        frames.reshape(shape)[...] = np.where(
            lost.reshape(units, 1, s.rows, 1, s.columns, 1, 1), GREY, frames.reshape(shape)
        )
    if s.noise and condition != "still":
        frames = frames + rng.integers(-s.noise, s.noise + 1, frames.shape, dtype=np.int8)

    words = SCENES[condition][1] if condition in SCENES else ()
    scene = tuple(words[min(int(len(words) * share), len(words) - 1)] for share in progress.tolist()) if words else ()
    task = str(rng.choice([task for task in s.tasks if scene or task != "scene"]))
    tenths = int(rng.integers(10 * visits[0].begin // units + 1, 10))
    if task == "scene":
        # Nothing is asked for that lies too close between two answers to be told.
        parts = len(words) * progress[[_unit_before(each, units) for each in range(1, 10)]]
        clear = 1 + np.flatnonzero((parts % 1 > 0.15) & (parts % 1 < 0.85))
        tenths = int(rng.choice(clear)) if len(clear) else tenths
    asked = _unit_before(tenths, units)
    if task == "scene":
        question, answer = SCENES[condition][0].format(tenths), scene[asked]
    else:
        question, answer = {
            "where": ("In which cell was the square last?", str(visits[-1].cell + 1)),
            "last": ("Which colour was the square last?", visits[-1].colour),
            "count": ("At how many places was the square?", str(places)),
            "first": ("Which colour was the square first?", visits[0].colour),
            "when": (
                f"Which colour was the square last after {tenths} tenths of the clip?",
                [visit for visit in visits if visit.begin <= asked][-1].colour,
            ),
        }[task]
    frames = np.clip(frames, 0, 255).astype(np.uint8)
    if s.h264:
        frames = through_h264(frames, crf=int(rng.integers(s.h264[0], s.h264[1] + 1)))
    return Example(
        frames, 2 / stride, condition, task, question, answer, visits, scene, asked if task in TIMED else None
    )


def _unit_before(tenths: int, units: int) -> int:
    """The last unit that begins before so many tenths of the clip."""
    return -(-tenths * units // 10) - 1


def _progress(condition: str, s: SceneSettings, seconds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How far a scene is in its range at each of the `seconds` (T,): from 0 to 1."""
    if condition == "light":
        share = seconds / max(1, s.units - 1)
        return share if rng.integers(2) else 1 - share
    if condition == "pan":
        # In widths of the picture: to and fro over as much again as is seen at a time, beginning anywhere in that.
        speed = rng.uniform(s.pan / 3, s.pan) / (s.columns * s.cell)
        return np.abs((rng.uniform(0, 2) + speed * seconds) % 2 - 1)
    if condition == "cuts":
        steps = np.cumsum(rng.integers(1, 3, s.units + 1))  # each time to one of the two others
        cuts = np.cumsum(rng.integers(3, 9, s.units))
        return (steps[np.searchsorted(cuts, seconds, side="right")] % 3 + 0.5) / 3
    return np.zeros(len(seconds))


def _backgrounds(condition: str, s: SceneSettings, progress: np.ndarray, painter: np.random.Generator) -> np.ndarray:
    """What is behind the square, (T, rows * cell, columns * cell, 3)."""
    height, width = s.rows * s.cell, s.columns * s.cell

    def paint(width: int) -> np.ndarray:
        blocks = painter.integers(60, 190, (height // BLOCK + 1, width // BLOCK + 1, 3))
        return blocks.repeat(BLOCK, 0).repeat(BLOCK, 1)[:height, :width]

    if condition == "pan":
        panorama = paint(2 * width)
        panorama = panorama + _hue(np.arange(2 * width) / (2 * width), s.tint)
        return np.stack([panorama[:, start : start + width] for start in (width * progress).round().astype(int)])
    if condition == "cuts":
        scenes = np.stack([paint(width) for _ in range(3)]) + _hue(np.array([1, 3, 5]) / 6, s.tint)[:, None, None]
        return scenes[(3 * progress).astype(int)]
    return paint(width)[None].repeat(len(progress), axis=0)


def _framed(s: SceneSettings) -> np.ndarray:
    """Which pixels belong to the frames of cells, (rows * cell, columns * cell)."""
    near = np.minimum(np.arange(s.cell), np.arange(s.cell)[::-1]) < s.frame
    return np.tile(near[:, None] | near, (s.rows, s.columns))


def _hues(s: SceneSettings) -> np.ndarray:
    """The hue of each pixel's cell, evenly spread over the circle and no brighter than a background."""
    hues = (125 + _hue(np.arange(s.rows * s.columns) / (s.rows * s.columns), 60)).reshape(s.rows, s.columns, 3)
    return hues.repeat(s.cell, 0).repeat(s.cell, 1)


def _hue(turns: np.ndarray, strength: int) -> np.ndarray:
    """Deviations from grey, (n, 3) int16, for hues at `turns` (n,) of the circle."""
    return (strength * np.cos(2 * np.pi * (turns[:, None] + np.arange(3) / 3))).round().astype(np.int16)


def _lit(frames: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Frames (F, H, W, 3) in `light` (F,), a part of the full one: less of it means bluer, too."""
    gains = light[:, None] ** np.array([1.15, 1.0, 0.85])
    # Codes are about the 2.2nd root of the light.
    return (frames * gains[:, None, None] ** (1 / 2.2)).round().astype(np.int16)


def write_dataset(
    folder: str | Path, count: int, settings: SceneSettings | None = None, seed: int = 0, container: str = "npy"
) -> Path:
    """Writes `count` clips and the JSONL file that names them.

    Args:
        folder: Made if missing.
        count: Number of clips.
        settings: What they look like.
        seed: Seed of all of them; other seeds give other clips.
        container: "npy" (frames as they are) or "mp4" (H.264).

    Returns:
        The path of ``data.jsonl``.

    Raises:
        ConfigError: Unknown container.
    """
    if container not in ("npy", "mp4"):
        raise ConfigError(f"container got {container!r}; known: npy, mp4.")
    folder, settings = Path(folder), settings or SceneSettings()
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        example = make_example(settings, [seed, number])
        name = f"{number:06d}.{container}"
        if container == "npy":
            np.save(folder / name, example.frames)
        else:
            (folder / name).write_bytes(to_mp4(example.frames, example.fps))
        turns = [
            {"from": "human", "value": f"<video>\n{example.question}"},
            {"from": "gpt", "value": example.answer},
        ]
        lines.append(json.dumps({"video": name, "fps": example.fps, "task": example.task, "conversations": turns}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
