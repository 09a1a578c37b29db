"""The gate's kernels on tokens of half precision whose channels lie together; float32 is the gate of the blend."""

import torch
from triton.compiler import ASTSource

from ragsr.kernels import gate, moments

POINTERS = dict.fromkeys(("h", "h_ref", "own", "ref", "out"), "*bf16")
POINTERS |= dict.fromkeys(("sums", "directions", "similarity", "ends", "gate"), "*fp32")
ACC = moments.accumulator(torch.empty(0))


def source(kernel, **constants):
    constants |= {"h_c": 1} if "h_c" in kernel.arg_names else {}
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in kernel.arg_names}
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    return ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers})


BLOCK = {"ACC": ACC, "TOKENS": gate.TOKENS, "CHANNELS": gate.CHANNELS, "EPS": gate.EPS}
SOURCES = {
    "direction_kernel": source(gate.direction_kernel, **BLOCK),
    "merge_kernel": source(gate.merge_kernel, ACC=ACC, TOKENS=gate.TOKENS, MERGE=gate.MERGE, CHANNELS=gate.CHANNELS),
    "similarity_kernel": source(gate.similarity_kernel, **BLOCK),
    "stretch_kernel": source(gate.stretch_kernel, ACC=ACC, EPS=gate.EPS, FLAT=gate.FLAT, STRETCH=gate.STRETCH),
    "gated_blend_kernel": source(gate.gated_blend_kernel, ACC=ACC, LONG=False, ELEMENTS=gate.ELEMENTS),
}
