"""What a gallery says about itself, in its table `meta`: above all, by which encoder it was built."""

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ragsr.codes import CodeEncoder, load_encoder
from ragsr.errors import InputError

ANEW = "codes of two encoders do not compare: build another gallery with ragsr gallery build PHOTOS... -o NEW_FOLDER"


def new_meta(codes: CodeEncoder) -> dict[str, str]:
    """Of a gallery that is made now."""
    return {
        "encoder": codes.id,
        "encoder_name": codes.name,
        "encoder_version": str(codes.version),
        "encoder_source": codes.source,
        "preprocessing": codes.preprocessing,
        "bits": str(codes.bits),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "ragsr": _ragsr_version(),
    }


def same_encoder(folder: Path, meta: Mapping[str, str], asked: str | None) -> CodeEncoder:
    """The encoder that a gallery needs, if it is here, prepares pictures as it did, and is the one asked for."""
    built_by = meta.get("encoder", "unknown")
    if asked is None:
        encoder = _load(folder, built_by, meta.get("encoder_source", built_by.partition("@")[0]))
        other = f"this ragsr has {encoder.id}"
    else:
        encoder = load_encoder(asked)
        other = f"{encoder.id} was asked for"
    if encoder.id != built_by:
        raise InputError(f"{folder}: built by the encoder {built_by}, and {other}; {ANEW}")
    prepared = meta.get("preprocessing", encoder.preprocessing)  # galleries of ragsr 0.1 do not say
    if prepared != encoder.preprocessing:
        raise InputError(
            f"{folder}: its photos were prepared as {prepared!r}, and {built_by} now takes "
            f"{encoder.preprocessing!r}; {ANEW}"
        )
    return encoder


def _load(folder: Path, built_by: str, source: str) -> CodeEncoder:
    try:
        return load_encoder(source)
    except InputError as error:
        moved = f"; if it has moved: ragsr gallery build PHOTOS... -o {folder} --encoder DIR" if "/" in source else ""
        raise InputError(
            f"{folder}: built by the encoder {built_by}, and this ragsr has none: {error}{moved}"
        ) from None


def _ragsr_version() -> str:
    try:
        return version("ragsr")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
