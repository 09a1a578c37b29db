"""What a gallery says about itself, in its table `meta`: above all, by which encoder it was built."""

from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ragsr.codes import ENCODERS, CodeEncoder, load_encoder
from ragsr.errors import InputError


def new_meta(codes: CodeEncoder) -> dict[str, str]:
    """Of a gallery that is made now."""
    return {
        "encoder": codes.id,
        "encoder_name": codes.name,
        "encoder_version": str(codes.version),
        "bits": str(codes.bits),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "ragsr": _ragsr_version(),
    }


def same_encoder(folder: Path, built_by: str, asked: str | None) -> CodeEncoder:
    """The encoder that a gallery needs, if it is here and is the one asked for."""
    anew = (
        "codes of two encoders do not compare: build another gallery with ragsr gallery build PHOTOS... -o NEW_FOLDER"
    )
    if asked is not None and load_encoder(asked).id != built_by:
        raise InputError(
            f"{folder}: built by the encoder {built_by}, and {load_encoder(asked).id} was asked for; {anew}"
        )
    name = built_by.partition("@")[0]
    encoder = load_encoder(name) if name in ENCODERS else None
    if encoder is None or encoder.id != built_by:
        here = encoder.id if encoder else ", ".join(sorted(ENCODERS))
        raise InputError(f"{folder}: built by the encoder {built_by}, and this ragsr has {here}; {anew}")
    return encoder


def _ragsr_version() -> str:
    try:
        return version("ragsr")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
