from triton.compiler import ASTSource

from ragsr.kernels import hamming

SOURCES = {
    "hamming_keys_kernel": ASTSource(
        hamming.hamming_keys_kernel,
        signature={
            **dict.fromkeys(("queries", "codes"), "*i32"),
            "keys": "*i64",
            **dict.fromkeys(("n", "total", "first"), "i64"),
        }
        | dict.fromkeys(("WORDS", "BLOCK"), "constexpr"),
        constexprs={"WORDS": 2, "BLOCK": hamming.BLOCK},
    )
}
