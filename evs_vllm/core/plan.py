# SPDX-License-Identifier: Apache-2.0
"""`RetentionPlan`: which tokens of one clip stay, and the layout of the clip's prompt before anything was dropped.

The plan is made before the prompt is laid out and is the only thing that travels (as one int64 tensor among the
clip's multimodal fields). Placeholders, positions, embedding rows and cache identity are all read off it, so they
cannot disagree.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from evs_vllm.errors import PlanError
from evs_vllm.options import POSITIONS

FORMAT = 5
"""Version of the tensor format; a plan of another version is refused."""

_HEADER = 14
_PLAN_ENCODERS = ("full", "reuse")

_NAME = 4
"""int64 numbers of a name in `RetentionPlan.beginnings`: 32 bytes."""

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Layout:
    """A clip's part of the prompt before pruning.

    Attributes:
        token_ids: (L,) int64, the placeholder sequence, with the text that some families put between frames.
        is_embed: (L,) bool, which of them take a row of the encoder's output.
        is_visual: (R,) bool over those rows, which are tokens of the (t, row, column) grid, in grid order. The rest
            (newlines, indicators, timestamps) is never dropped.

    Raises:
        PlanError: The lengths do not fit together.
    """

    token_ids: IntArray
    is_embed: BoolArray
    is_visual: BoolArray

    def __post_init__(self) -> None:
        if self.token_ids.shape != self.is_embed.shape or self.is_embed.sum() != len(self.is_visual):
            raise PlanError(
                f"Layout of {self.token_ids.shape} ids has {self.is_embed.shape} embed flags, of which "
                f"{int(self.is_embed.sum())} are set, for {len(self.is_visual)} embedding rows."
            )

    @classmethod
    def contiguous(cls, token_id: int, num_tokens: int) -> "Layout":
        """The layout of families whose clip is one run of `num_tokens` times the same placeholder."""
        all_of_them = np.ones(num_tokens, dtype=np.bool_)
        return cls(np.full(num_tokens, token_id, dtype=np.int64), all_of_them, all_of_them)


@dataclass(frozen=True)
class RetentionPlan:
    """What stays of a clip of T temporal units of H x W tokens (P = H*W, N = T*P).

    Three index spaces. A token of the grid is a row of the encoder's output (with some families other rows stand
    between: newlines, indicators), and each row has a placeholder in the clip's part of the prompt (with some families
    text stands between). Here of 2 units of 1 x 3 tokens, of which 4 stay, with a newline row and a bracket::

        token       t0p0  t0p1  t0p2  t1p0  t1p1  t1p2                  kept           0 1 2 4
        row           0     1     2     3     4     5     6 newline     embed_index    0 1 2 4 6
        prompt   0 [  1     2     3     4     5     6     7             prompt_index   0 1 2 3 5 7

    The tower may compute more tokens than stay: `computed` is a list of tokens as `kept` is, and `kept_in_computed`
    says where in that list, that is in which row of such a tower's output, each kept token is.

    Attributes:
        grid: (T, H, W) in tokens, that is after spatial merging.
        kept: (K,) int64, sorted flat indices ``t*P + row*W + column`` of the kept tokens.
        positions: "keep" or "sequential" (see `evs_vllm.core.positions`).
        layout: The unpruned prompt of the clip, or None before the prompt is known.
        encoder: "full" if the vision tower computes every token, "reuse" if only `computed`.
        refreshed: With "reuse", (S,) int64, sorted: the dropped tokens that the tower computes all the same, because
            their place has changed much since it was last computed, or never was. None of them is kept.
        position_span: Position IDs that the clip takes up: the text after it starts that much later. 0 before the
            prompt is known.
        unchanged: Whether the clip goes on from others of its stream and shows nothing new: what stays is there only
            because a prompt needs a token of each clip, or a minimum per unit was asked for.
        beginnings: (T, 4) int64, for each unit 32 bytes that name everything on which the prompt and the embeddings up
            to its last token depend: clips that begin alike have equal names as far as they do. (0, 4) without the
            causal budget.

    Raises:
        PlanError: Indices unsorted, repeated, out of range or both kept and refreshed, or a layout or names for another
            number of tokens or units.
    """

    grid: tuple[int, int, int]
    kept: IntArray
    positions: str = "keep"
    layout: Layout | None = None
    encoder: str = "full"
    refreshed: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    position_span: int = 0
    unchanged: bool = False
    beginnings: IntArray = field(default_factory=lambda: np.empty((0, _NAME), dtype=np.int64))

    def __post_init__(self) -> None:
        if min(self.grid) < 1 or self.positions not in POSITIONS or self.encoder not in _PLAN_ENCODERS:
            raise PlanError(
                f"Bad grid {self.grid}, positions {self.positions!r} or encoder {self.encoder!r} in a plan."
            )
        # First of all checks of length: arrays below are as long as the grid says, and a plan may come from outside.
        if self.layout is not None and self.layout.is_visual.sum() != self.num_tokens:
            raise PlanError(
                f"The prompt has {int(self.layout.is_visual.sum())} video tokens for a grid of {self.num_tokens}."
            )
        if not len(self.kept) or not self._is_selection(self.kept):
            raise PlanError(f"Kept indices must be sorted, distinct and within 0..{self.num_tokens - 1}.")
        if len(self.refreshed) and (
            self.encoder == "full"
            or not self._is_selection(self.refreshed)
            or len(self.computed) < len(self.kept) + len(self.refreshed)  # one of them is kept
        ):
            raise PlanError("Refreshed indices must be sorted, distinct, dropped, and of a plan that reuses.")
        if self.beginnings.shape not in ((0, _NAME), (self.num_units, _NAME)):
            raise PlanError(f"Names of beginnings have shape {self.beginnings.shape} for {self.num_units} units.")

    def _is_selection(self, indices: IntArray) -> bool:
        inside = indices[0] >= 0 and indices[-1] < self.num_tokens
        return bool(inside and np.all(np.diff(indices) > 0))

    @property
    def num_units(self) -> int:
        return self.grid[0]

    @property
    def tokens_per_unit(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def num_tokens(self) -> int:
        """N, the number of video tokens before pruning."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def num_kept(self) -> int:
        return len(self.kept)

    @property
    def extra_positions(self) -> int:
        """How many more position IDs than tokens the clip takes up."""
        return self.position_span - self.num_kept

    @cached_property
    def counts(self) -> IntArray:
        """(T,) int64, kept tokens of each unit."""
        return np.bincount(self.kept // self.tokens_per_unit, minlength=self.num_units).astype(np.int64)

    @cached_property
    def mask(self) -> BoolArray:
        """(T, H, W) bool, True where a token stays."""
        mask = np.zeros(self.num_tokens, dtype=np.bool_)
        mask[self.kept] = True
        return mask.reshape(self.grid)

    @cached_property
    def computed(self) -> IntArray:
        """(C,) sorted flat indices of the tokens that the vision tower computes; the kept ones are among them."""
        if self.encoder == "full":
            return np.arange(self.num_tokens)
        if not len(self.refreshed):
            return self.kept
        computed = np.zeros(self.num_tokens, dtype=np.bool_)
        computed[self.kept] = computed[self.refreshed] = True
        return np.flatnonzero(computed)

    @cached_property
    def kept_in_computed(self) -> IntArray:
        """(K,) for each kept token its index in `computed`."""
        return np.searchsorted(self.computed, self.kept)

    @cached_property
    def embed_index(self) -> IntArray:
        """Rows of the encoder's full output that stay, ascending; non-visual rows always do."""
        layout = self._layout()
        row_stays = ~layout.is_visual
        row_stays[np.flatnonzero(layout.is_visual)[self.kept]] = True
        return np.flatnonzero(row_stays)

    @cached_property
    def prompt_index(self) -> IntArray:
        """Indices of the unpruned clip prompt that stay, ascending; text between frames always does."""
        layout = self._layout()
        stays = ~layout.is_embed
        stays[np.flatnonzero(layout.is_embed)[self.embed_index]] = True
        return np.flatnonzero(stays)

    @cached_property
    def visual_index(self) -> IntArray:
        """(N,) where in the unpruned clip prompt each token of the grid is."""
        layout = self._layout()
        return np.flatnonzero(layout.is_embed)[layout.is_visual]

    @cached_property
    def prompt_units(self) -> IntArray:
        """For each index of the pruned clip prompt the unit that it belongs to: that of the last token of the grid,
        kept or not, at or before it in the unpruned prompt; 0 for what stands before all of them."""
        firsts = self.visual_index[:: self.tokens_per_unit]
        return np.maximum(np.searchsorted(firsts, self.prompt_index, side="right") - 1, 0)

    def with_layout(self, layout: Layout, position_span: int) -> "RetentionPlan":
        """The plan of a clip whose prompt is known.

        Args:
            layout: The prompt before pruning.
            position_span: Position IDs that the unpruned clip takes up; kept positions run as far, sequential ones
                count what is kept.
        """
        return replace(self, layout=layout, position_span=position_span if self.positions == "keep" else self.num_kept)

    def _layout(self) -> Layout:
        if self.layout is None:
            raise PlanError("This retention plan has no prompt layout yet; call with_layout() first.")
        return self.layout

    def to_array(self) -> IntArray:
        """The plan with its layout as one (L,) int64 array; `from_array` is the inverse."""
        layout = self._layout()
        runs = [_runs(a) for a in (layout.token_ids, layout.is_embed, layout.is_visual)]
        header = [FORMAT, *self.grid, POSITIONS.index(self.positions), self.position_span, int(self.unchanged)]
        parts = [self.kept, self.refreshed, self.beginnings.ravel(), *runs]
        header += [_PLAN_ENCODERS.index(self.encoder), *(len(part) for part in parts)]
        return np.concatenate([np.array(header, dtype=np.int64), *parts])

    @staticmethod
    def names_beginnings(array: IntArray) -> bool:
        """Whether what `to_array` wrote holds `beginnings`, without reading the rest of it."""
        return len(array) >= _HEADER and array[0] == FORMAT and bool(array[_HEADER - 4])

    @classmethod
    def from_array(cls, array: IntArray, longest: int | None = None) -> "RetentionPlan":
        """Reads what `to_array` wrote.

        Args:
            array: One (L,) int64 array.
            longest: How many tokens the unpruned prompt of the clip may have. An array from outside needs it, as the
                runs of a few numbers can stand for any length.

        Raises:
            PlanError: `array` is not a plan, one of another format version, or one of a longer prompt.
        """
        if array.ndim != 1 or len(array) < _HEADER or array[0] != FORMAT:
            raise PlanError("Not a retention plan of this evs-vllm version: do all processes run the same version?")
        form, t, h, w, positions, span, unchanged, encoder, *lengths = (int(x) for x in array[:_HEADER])
        if len(array) != _HEADER + sum(lengths) or min(lengths) < 0 or {positions, unchanged, encoder} - {0, 1}:
            raise PlanError(f"A retention plan of format {form} is cut short or damaged.")
        kept, refreshed, names, *runs = np.split(array[_HEADER:], np.cumsum(lengths)[:-1])
        if len(names) % _NAME or any(len(r) % 2 or (r[1::2] < 0).any() for r in runs):
            raise PlanError(f"A retention plan of format {form} is cut short or damaged.")
        if longest is not None and any(sum(r[1::2].tolist()) > longest for r in runs):
            raise PlanError(f"A retention plan is for a prompt of more than {longest} tokens.")
        token_ids, is_embed, is_visual = (_unrun(r) for r in runs)
        layout = Layout(token_ids, is_embed.astype(np.bool_), is_visual.astype(np.bool_))
        positions_name, encoder_name = POSITIONS[positions], _PLAN_ENCODERS[encoder]
        beginnings = names.reshape(-1, _NAME)
        return cls((t, h, w), kept, positions_name, layout, encoder_name, refreshed, span, bool(unchanged), beginnings)


def _runs(values: npt.NDArray[np.generic]) -> IntArray:
    """Run-length encoding: value, length, value, length, ..."""
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    lengths = np.diff(np.concatenate([starts, [len(values)]]))
    return np.stack([values[starts].astype(np.int64), lengths.astype(np.int64)], axis=1).reshape(-1)


def _unrun(runs: IntArray) -> IntArray:
    return np.repeat(runs[0::2], runs[1::2])
