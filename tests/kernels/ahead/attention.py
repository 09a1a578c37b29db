"""Separate attention at the head dim of SD2 and SDXL (64) and at the widest of SD1.5 (160), and what goes with it."""

import torch
from triton.compiler import ASTSource

from ragsr.kernels import attention_kernel, attention_table, composite, moments

HALF = ("q", "k", "v", "k_ref", "v_ref", "out", "own", "other", "x")
FLOAT = ("gate", "parked", "own_moments", "out_moments", "moments", "style", "gain", "centre", "target", "partial")
FLAGS = ("touched", "used")
# strides of 1
UNIT = ("q_d", "k_d", "v_d", "k_ref_d", "v_ref_d", "out_d", "gate_n", "own_c", "other_c", "out_c", "x_c")


def source(kernel, **constants):
    """Pointers aligned to 16 bytes and dense rows, as networks have them; `x` is float32 where tiles are merged."""
    constants |= {name: 1 for name in UNIT if name in kernel.arg_names}
    kinds = dict.fromkeys(HALF, "*bf16") | dict.fromkeys(FLOAT, "*fp32") | dict.fromkeys(FLAGS, "*i32")
    kinds |= {"scale": "fp32"} | ({"x": "*fp32"} if kernel is moments.affine_kernel else {})
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    return ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers})


def separate(head_dim):
    def of(architecture):
        blocks = attention_table.blocks_for(divmod(architecture, 10), head_dim)
        first, second = attention_table.parts_of(head_dim)
        constants = {"D": head_dim, "D1": first, "D2": second, "BM": blocks.queries, "BN": blocks.keys, "ALIGN": 8}
        constants |= {"BLEND": True, "CONCAT": False, "MOMENTS": True, "PARK": blocks.park, "PRECISION": "ieee"}
        constants |= {"ends": None} | ({} if blocks.park else {"parked": None})
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        return source(attention_kernel.separate_attention_kernel, **constants), options

    return of


TILES = {"ACC": moments.accumulator(torch.empty(0)), "ROWS": moments.ROWS, "CHANNELS": moments.CHANNELS}
SIZES = {"X_SIZE": 128, "STYLE_SIZE": 128, "TILES": moments.TILES, "EPS": moments.EPS_VARIANCE, "FOLD": False}
SOURCES = {
    "separate_attention_kernel, head dim 64": separate(64),
    "separate_attention_kernel, head dim 160": separate(160),
    "moments_kernel": source(moments.moments_kernel, **TILES),
    "affine_kernel": source(moments.affine_kernel, **SIZES, ACC=TILES["ACC"], CHANNELS=moments.CHANNELS),
    "align_kernel": source(moments.align_kernel, **TILES),
    "blend_kernel": source(composite.blend_kernel, **TILES, FIRST=True, LAST=True, MOMENTS=True),
}
