from triton.compiler import ASTSource

from ragsr.kernels import fold, match, match_near

KINDS = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32"}


def products(kind: str) -> tuple[ASTSource, dict[str, int]]:
    integers = dict.fromkeys(("a_batch", "b_batch"), "i64") | dict.fromkeys(("rows", "columns", "C"), "i32")
    constants = {
        "PRECISION": "tf32x3" if kind == "fp32" else "ieee",
        "ROWS": match.ROWS,
        "COLUMNS": match.COLUMNS,
        "DEPTH": match.DEPTH,
    }
    return source(match.products_kernel, {"a": KINDS[kind], "b": KINDS[kind], "g": "*fp32"} | integers, constants, 8)


def matches(patch: int) -> tuple[ASTSource, dict[str, int]]:
    integers = ("queries", "candidates", "first", "total", "a_width", "b_width", "g_batch", "g_columns", "k")
    signature = dict.fromkeys(("g", "scale", "score"), "*fp32") | {"index": "*i64"} | dict.fromkeys(integers, "i32")
    constants = {"PATCH": patch, "QUERIES": match.QUERIES, "CANDIDATES": match.CANDIDATES}
    return source(match.matches_kernel, signature, constants, 8)


def near(kind: str, patch: int) -> tuple[ASTSource, dict[str, int]]:
    integers = ("reference", "references", "window", "queries", "a_width", "a_pixels", "b_width", "b_pixels", "rows")
    pointers = {
        "a": KINDS[kind],
        "b": KINDS[kind],
        "scale": "*fp32",
        "prior": "*i64",
        "score": "*fp32",
        "index": "*i64",
    }
    constants = {"PATCH": patch, "CANDIDATES": match_near.CANDIDATES, "DEPTH": match_near.DEPTH}
    return source(match_near.near_kernel, pointers | dict.fromkeys((*integers, "C", "k"), "i32"), constants, 4)


def folding(kernel, kind: str, stride: int, tables: dict[str, str], first: str) -> tuple[ASTSource, dict[str, int]]:
    integers = dict.fromkeys(("C", "h", "w", "rows", "columns"), "i32")
    constants = {"SIDE": 3, "S": stride, "CHANNELS": fold.CHANNELS, "PIXELS": fold.PIXELS}
    return source(kernel, {first: KINDS[kind]} | tables | {"out": KINDS[kind]} | integers, constants, 4)


def source(kernel, signature, constants, num_warps):
    types = signature | dict.fromkeys(constants, "constexpr")
    return ASTSource(kernel, signature=types, constexprs=constants), {"num_warps": num_warps}


INDEX = {"index": "*i64"}
SORTED = {"order": "*i64", "starts": "*i64"}

SOURCES = (
    {f"products_kernel {kind}": products(kind) for kind in KINDS}
    | {f"matches_kernel patch {patch}": matches(patch) for patch in (3, 7)}
    | {f"near_kernel {kind} patch 3": near(kind, 3) for kind in KINDS}
    | {
        f"gather_fold_kernel {kind} stride {stride}": folding(fold.gather_fold_kernel, kind, stride, INDEX, "features")
        for kind, stride in (("fp32", 1), ("bf16", 4))
    }
    | {
        f"gather_fold_backward_kernel {kind} stride {stride}": folding(
            fold.gather_fold_backward_kernel, kind, stride, SORTED, "grad"
        )
        for kind, stride in (("fp32", 1), ("bf16", 4))
    }
)
