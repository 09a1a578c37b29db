from triton.compiler import ASTSource

from ragsr.kernels import fold, match, match_boxes, match_near

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


BOX = ("first_tile", "here", "tiles", "across", "capacity", "a_height", "a_width", "b_width", "b_pixels")


def box_products(kind: str, patch: int) -> tuple[ASTSource, dict[str, int]]:
    pointers = {"a": KINDS[kind], "b": KINDS[kind], "boxes": "*i32", "g": "*fp32"}
    constants = {
        "PATCH": patch,
        "PRECISION": "tf32x3" if kind == "fp32" else "ieee",
        "SIDE": match_boxes.SIDE,
        "COLUMNS": match_near.COLUMNS,
        "CHANNELS": match_near.CHANNELS,
    }
    return source(match_near.box_products_kernel, pointers | dict.fromkeys((*BOX, "C"), "i32"), constants, 8)


def near(kind: str, patch: int) -> tuple[ASTSource, dict[str, int]]:
    integers = ("reference", "references", "window", *BOX, "rows", "C", "k")
    pointers = {
        "a": KINDS[kind],
        "b": KINDS[kind],
        "g": "*fp32",
        "boxes": "*i32",
        "scale": "*fp32",
        "prior": "*i64",
        "score": "*fp32",
        "index": "*i64",
    }
    constants = {
        "PATCH": patch,
        "SIDE": match_boxes.SIDE,
        "STEP": match_boxes.SIDE - patch + 1,
        "CANDIDATES": match_near.CANDIDATES,
        "DEPTH": match_near.DEPTH,
    }
    return source(match_near.near_kernel, pointers | dict.fromkeys(integers, "i32"), constants, 4)


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
    | {f"box_products_kernel {kind} patch 3": box_products(kind, 3) for kind in KINDS}
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
