# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for one GPU target with no GPU present; prints one JSON line per variant.

Run by test_compile.py in a process of its own, because a process that interprets Triton cannot compile it:
``python compile_kernels.py cuda 90`` or ``python compile_kernels.py hip gfx942``.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

FLOATS = ("fp32", "fp16", "bf16")
SIZES = {"u8": 1, "fp16": 2, "bf16": 2, "fp32": 4, "i16": 2, "i32": 4, "i64": 8}


def variants() -> Iterator[tuple[str, Any, list[str], dict[str, Any], set[str], int]]:
    """Yields (label, kernel, argument types, constants, arguments divisible by 16, warps), as the launchers do."""
    score = import_module("evs_kernels.temporal_score._triton_kernels")
    cosine = import_module("evs_kernels.cosine_score._triton_kernels")
    select = import_module("evs_kernels.select_topk._triton_kernels")
    pool = import_module("evs_kernels.pool_tokens._triton_kernels")
    frames = import_module("evs_kernels.pool_frames._triton_kernels")
    resize = import_module("evs_kernels.resize_patches._triton_kernels")
    place = import_module("evs_kernels.place_blocks._triton_kernels")
    anchored = import_module("evs_kernels.select_anchored._triton_kernels")
    hold = import_module("evs_kernels.select_hold._triton_kernels")
    for wide in (True, False):
        depth, tag = ({"depth"}, "wide") if wide else (set(), "odd")
        for t in ("u8", *FLOATS):
            s, size = ("i32" if t == "u8" else "fp32"), score.slice_width(16 if wide else 17, SIZES[t])
            args = [f"*{t}", f"*{s}", "i32", "i32", "i32"]
            constants = {"KIND": (score.BYTES if t == "u8" else score.FLOATS).value, "SLICE": size}
            yield f"score-{t}-{tag}", score.slice_kernel, args, constants, depth, 1
            if t != "u8":
                args = [f"*{t}", "*fp32", "*fp32", "i32", "i32", "i32"]
                yield f"cosine-{t}-{tag}", cosine.slice_kernel, args, {"SLICE": size}, depth, 1
    # Words of four bytes; how many groups of them a token has may be anything.
    words = {"WORDS": score.WORDS} | ({"INSTRUCTION": score.INSTRUCTION} if sys.argv[1] == "cuda" else {})
    for name, kind in words.items():
        constants = {"KIND": kind.value, "SLICE": score.SLICE_BYTES // 4}
        yield f"score-{name}-wide", score.slice_kernel, ["*i32", "*i32", "i32", "i32", "i32"], constants, set(), 1
    # Triton turns an argument that is 1 into a constant.
    args, one = ["*u8", "*i32", "i32", "i32"], {"depth": 1}
    yield "score-u8-one", score.slice_kernel, args, {**one, "KIND": score.BYTES.value, "SLICE": 256}, set(), 1
    args = ["*bf16", "*fp32", "*fp32", "i32", "i32"]
    yield "cosine-bf16-one", cosine.slice_kernel, args, {**one, "SLICE": 128}, set(), 1
    for width in (32, 256, 50, 250):
        (places, block), tag = anchored.block_of(width), "odd" if width % 16 else "even"
        for forced, reserve, write in ((False, False, False), (True, True, False), (True, False, True)):
            args = ["*u8", "*i32", "*u8" if forced else "*i32", "*i32", "*i32", "i32", "i32", "i32"]
            constants = {"FORCED": forced, "PER_UNIT_COUNTS": reserve, "WRITE": write}
            constants |= {"PLACES": places, "WIDTH": block}
            aligned = {"width"} if tag == "even" else set()
            yield (
                f"anchored-{forced:d}{reserve:d}{write:d}-{width}-{tag}",
                anchored.walk_kernel,
                args,
                constants,
                aligned,
                1,
            )
    for width in (32, 50):
        constants = {"PLACES": hold.PLACES, "SLICE": hold.slice_of(width)}
        aligned = {"width"} if width % 16 == 0 else set()
        args = ["*u8", "*i32", "*i32", "i32", "i32", "i32"]
        yield f"hold-sum-{width}", hold.sum_kernel, args, constants, aligned, 1
        for write in (True, False):
            args = ["*u8", "*i32", "*i32", "*i32", "*u8" if write else "*i32", "i32", "i32", "i32"]
            yield f"hold-{write:d}-{width}", hold.price_kernel, args, constants | {"WRITE": write}, aligned, 1
    args = ["*i32", "*i32", "i32", "i32", "i32"]
    yield "anchored-step", anchored.step_kernel, args, {"BLOCK": anchored.BLOCK}, set(), 4
    for size in (1, 28, 64, 448):
        rows, width, warps = pool.block_of(size)
        args, constants = ["*u8", "*u8", *["i32"] * 5], {"ROWS": rows, "WIDTH": width}
        yield f"pool-{size}", pool.pool_kernel, args, constants, set(), warps
    for channels, wide in ((1, False), (3, False), (3, True)):
        args, constants = ["*u8", "*u8", "*i64", "*i64", *["i32"] * 8], {"CELLS": frames.CELLS, "WIDE": wide}
        constants["CHANNELS"] = triton.next_power_of_2(channels)
        yield f"frames-{channels}-{wide:d}", frames.pool_kernel, args, constants, set(), 2
    for size in (14, 28, 32, 64):
        args, constants = ["*u8", "*u8", "*i64", *["*i32"] * 4, *["i32"] * 11], {"ROWS": resize.ROWS}
        constants["WIDTH"] = triton.next_power_of_2(size)
        yield f"resize-across-{size}", resize.across_kernel, args, constants, set(), 4
    args = ["*u8", "*u8", "*i64", *["*i32"] * 3, *["i32"] * 10]
    yield "resize-down", resize.down_kernel, args, {"BLOCK": resize.BLOCK}, set(), 4
    for level in ("u8", *FLOATS):
        args = ["*u8", f"*{level}", f"*{level}", *["i32"] * 6]
        yield f"place-{level}", place.place_kernel, args, {"BLOCK": place.BLOCK}, set(), 4
    args = ["*fp32", "*fp32", "*fp32", "i32", "i32", "i32"]
    yield "cosine-finish", cosine.finish_kernel, args, {"BLOCK": score.BLOCK}, set(), 4
    for s in ("i32", "fp32"):
        floating = s == "fp32"
        yield f"sum-{s}", score.sum_kernel, [f"*{s}", f"*{s}", "i32", "i32"], {"BLOCK": score.BLOCK}, set(), 4
        for store, reserve in ((True, True), (True, False), (False, True)):
            args = [f"*{s}", f"*{s}", "*u8" if reserve else f"*{s}", "i32", "i32", "i32", "i32"]
            constants = {"FLOAT": floating, "STORE": store, "RESERVE": reserve, "BLOCK": select.UNIT_BLOCK}
            yield f"unit-{s}-{store:d}{reserve:d}", select.unit_kernel, args, constants, set(), 4
        for reserve in (True, False):
            clip = [f"*{s}", "*u8" if reserve else f"*{s}"]
            flags = {"FLOAT": floating, "RESERVE": reserve}
            for search in (select.GIVEN, select.OWN_SEARCH, select.DIGITS):
                args = [*clip, "*i32", "*i32", "*i64", "*i32", *["i32"] * 5]
                constants = {**flags, "SEARCH": search.value}
                write_block = select.LARGE_WRITE_BLOCK if search is select.DIGITS else select.WRITE_BLOCK
                constants |= {"BLOCK": select.SEARCH_BLOCK, "WRITE_BLOCK": write_block}
                yield f"select-{s}-{reserve:d}{search.value}", select.select_kernel, args, constants, set(), 16
            for step in (0, 3):
                constants = {**flags, "STEP": step, "BLOCK": select.DIGIT_BLOCK}
                args = [*clip, "*i32", *["i32"] * 3]
                yield f"digit-{s}-{reserve:d}{step}", select.digit_kernel, args, constants, set(), 8
            args, constants = [*clip, "*i32", "*i32", *["i32"] * 3], {**flags, "BLOCK": select.UNIT_BLOCK}
            yield f"tally-{s}-{reserve:d}", select.tally_kernel, args, constants, set(), 8


def compile_one(target: GPUTarget, kernel: Any, args: list[str], constants: dict, aligned: set[str], warps: int) -> Any:
    """Returns Triton's compiled kernel."""
    names = [n for n in kernel.arg_names if n not in constants]
    signature = dict(zip(names, args, strict=True)) | dict.fromkeys(constants, "constexpr")
    signature = {n: signature[n] for n in kernel.arg_names}
    anywhere = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if (signature[n].startswith("*") and n not in anywhere) or n in aligned
    }
    source = ASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=target, options={"num_warps": warps})


def resources(target: GPUTarget, asm: dict[str, Any]) -> dict[str, int]:
    """Register spills as the assembler reports them, and the widths of global loads (NVIDIA)."""
    if target.backend == "hip":
        text = asm["amdgcn"]
        loads = re.findall(r"(?:global|buffer|flat)_load_dwordx(\d)", text)
        return {
            "spills": sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)),
            "reports": len(re.findall(r"\.vgpr_spill_count:", text)),
            "widest_load_bits": 32
            * max([int(n) for n in re.findall(r"(?:global|buffer|flat)_load_dwordx(\d)", text)], default=1),
        }
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx, tempfile.NamedTemporaryFile() as out:
        ptx.write(asm["ptx"])
        ptx.flush()
        # The architecture comes from the PTX itself: Triton may have chosen a suffixed one (sm_90a).
        arch = re.search(r"^\.target\s+(\w+)", asm["ptx"], re.M).group(1)
        command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={arch}", ptx.name, "-o", out.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\b", asm["ptx"])
    machine_code = disassembled(asm["cubin"])
    return {
        "instructions": len(machine_code),
        "packed_differences": sum("VABSDIFF4" in line for line in machine_code),
        "spills": sum(int(a) + int(b) for a, b in spills),
        "reports": len(spills),
        "widest_load_bits": max([int(v or 1) * int(b) for v, b in loads], default=0),
    }


def disassembled(cubin: bytes) -> list[str]:
    """The machine instructions of a compiled kernel (NVIDIA), by the disassembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*;)", text, re.M)


def main() -> None:
    """Compiles all variants for the target named on the command line."""
    backend, arch = sys.argv[1:3]
    target = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
    for label, kernel, args, constants, aligned, warps in variants():
        compiled = compile_one(target, kernel, args, constants, aligned, warps)
        row = {"label": label, "shared_bytes": compiled.metadata.shared} | resources(target, compiled.asm)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
