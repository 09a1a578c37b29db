from triton.compiler import ASTSource

from ragsr.kernels import cosine

LONGS = dict.fromkeys(("n", "first"), "i64")
SOURCES = {
    f"keep_best_kernel, k <= {places}": ASTSource(
        cosine.keep_best_kernel,
        signature={
            "best": "*i64",
            "scores": "*fp32",
            "out": "*i64",
            "kept": "i64",
            **LONGS,
            "k": "i64",
            **dict.fromkeys(("PLACES", "BLOCK"), "constexpr"),
        },
        constexprs={"PLACES": places, "BLOCK": cosine.BLOCK},
    )
    for places in (1, 4, cosine.LARGEST_K)
} | {
    "keys_kernel": ASTSource(
        cosine.keys_kernel,
        signature={"scores": "*fp32", "keys": "*i64", **LONGS, "BLOCK": "constexpr"},
        constexprs={"BLOCK": cosine.BLOCK},
    )
}
