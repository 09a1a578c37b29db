"""`ragsr gallery`: build, add, augment, remove, info, search."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragsr.cli import augment
from ragsr.errors import InputError

if TYPE_CHECKING:  # the library is imported when a command runs, so that --help is instant
    from ragsr.gallery import Gallery, Hit
    from ragsr.gallery.patches import Box

Subparsers = Any  # argparse keeps the type to itself


def add_parser(subparsers: Subparsers) -> None:
    """Register `gallery` and its commands."""
    parser = subparsers.add_parser(
        "gallery",
        help="keep a searchable set of reference photos",
        description="A gallery is a folder with a code for each of your photos, by which the photo most like another "
        "is found. The photos stay where they are and are never changed.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    build = _command(
        commands,
        "build",
        run_build,
        "make a gallery, or go on with one that was interrupted",
        "ragsr gallery build ~/Pictures/2024 ~/Pictures/house.jpg -o my-gallery",
    )
    _photos(build, "photos, and folders of photos to the bottom")
    build.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="the gallery folder")
    build.add_argument(
        "--encoder", metavar="NAME|DIR", help="turns photos into codes; a name, or a folder from ragsr train hash"
    )
    build.add_argument(
        "--features",
        action=argparse.BooleanOptionalAction,
        help="keep a float feature of each photo too, by which what the codes found is ranked again; about 0.5 KB a "
        "photo (default for a new gallery: wherever the encoder has one)",
    )
    build.add_argument(
        "--patches",
        action="store_true",
        help="keep codes of overlapping patches too, so that parts of photos are found; takes about 10 times as long",
    )
    _json(build)

    add = _command(
        commands,
        "add",
        run_add,
        "add photos; those it has already are not read again",
        "ragsr gallery add my-gallery new/",
    )
    _folder(add)
    _photos(add, "photos, and folders of photos to the bottom")
    _json(add)

    augment.add_command(commands)

    remove = _command(
        commands,
        "remove",
        run_remove,
        "take photos out of a gallery; the photo files stay",
        "ragsr gallery remove my-gallery ~/Pictures/2024/blurred.jpg",
    )
    _folder(remove)
    _photos(remove, "photos and folders to take out, on disk or gone")
    _json(remove)

    info = _command(commands, "info", run_info, "say what a gallery holds", "ragsr gallery info my-gallery")
    _folder(info)
    info.add_argument(
        "--check", action="store_true", help="read all of the gallery's files, and see that they are whole"
    )
    _json(info)

    search = _command(
        commands,
        "search",
        run_search,
        "find the photos most like another",
        "ragsr gallery search old.jpg --gallery my-gallery -k 4 --plot hits.png",
    )
    search.add_argument("image", metavar="IMAGE", type=Path, help="the photo to look for")
    search.add_argument("--gallery", metavar="DIR", type=Path, required=True, help="the gallery folder")
    search.add_argument("-k", metavar="N", type=int, default=1, help="how many to find (%(default)s)")
    search.add_argument(
        "--patches",
        action=argparse.BooleanOptionalAction,
        help="compare patches of the photos too, and say where they agree (default: if the gallery keeps patches)",
    )
    search.add_argument(
        "--tile", metavar="N", type=int, help="find photos for every region of N×N pixels of IMAGE instead"
    )
    search.add_argument(
        "--probes",
        metavar="PROBE",
        nargs="+",
        default=[],
        help="look also for the mirrored photo (flips) and for its middle, enlarged (scales)",
    )
    search.add_argument(
        "--threshold", metavar="X", type=float, help="scores below are of no use as references (default: the encoder's)"
    )
    _json(search)
    search.add_argument("--plot", metavar="PNG", type=Path, help="draw the photo and what was found")


def _command(commands: Subparsers, name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=f"example: {example}"
    )
    parser.set_defaults(run=run)
    return parser


def _photos(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("photos", metavar="PHOTOS", type=Path, nargs="+", help=text)


def _folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gallery", metavar="DIR", type=Path, help="the gallery folder")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


# ------------------------------------------------------------------ commands


def run_build(args: argparse.Namespace) -> int:
    from ragsr.gallery import Gallery
    from ragsr.image import find_images

    find_images(args.photos)  # complain before a folder is made
    if Gallery.is_at(args.output):
        gallery = Gallery.open(args.output, args.encoder)
        if args.features is False and gallery.kept.features:
            raise InputError(f"{args.output}: keeps features; build another gallery to have none")
        gallery.keep(features=bool(args.features), patches=args.patches)
    else:
        encoder = {} if args.encoder is None else {"encoder": args.encoder}
        gallery = Gallery.create(args.output, features=args.features, patches=args.patches, **encoder)
    return _add(gallery, args)


def run_add(args: argparse.Namespace) -> int:
    from ragsr.gallery import Gallery

    return _add(Gallery.open(args.gallery), args)


def run_remove(args: argparse.Namespace) -> int:
    from ragsr.gallery import Gallery

    with Gallery.open(args.gallery) as gallery:
        removed, left, folder = gallery.remove(args.photos), len(gallery), gallery.folder
    _say(f"{folder}: {removed} removed, {left} images left")
    if args.json:
        print(json.dumps({"gallery": str(folder), "removed": removed, "images": left}, indent=2))
    return 0


def run_info(args: argparse.Namespace) -> int:
    from ragsr.gallery import Gallery

    with Gallery.open(args.gallery) as gallery:
        if args.check:
            gallery.check()
        info = vars(gallery.info()) | {"checked": args.check}
    if args.json:
        print(json.dumps(info, indent=2, default=str))
        return 0
    missing = info.pop("missing")
    for name in ("features", "patches"):
        info[name] = "none kept" if info[name] is None else f"of {info[name]} images"
    info["checked"] = "all files are whole" if args.check else "no; --check reads everything"
    for name, value in info.items():
        print(f"{name.replace('_', ' '):<13} {value}")
    print(f"{'missing':<13} {len(missing)}")
    for path in missing:
        print(f"  {path}")
    return 0


def run_search(args: argparse.Namespace) -> int:
    from ragsr.gallery import Gallery
    from ragsr.image import load_image

    image = load_image(args.image)
    with Gallery.open(args.gallery) as gallery:
        if args.tile is None:
            found = [gallery.search(image, args.k, args.patches, args.probes)]
        elif args.probes or args.patches is False:
            raise InputError("--tile searches by patches and without probes; leave --probes and --no-patches out")
        else:
            found = gallery.search_regions(image, args.tile, args.k)
        encoder, bits, folder = gallery.encoder, gallery.encoder.bits, gallery.folder
    hits = [hit for part in found for hit in part]
    threshold = encoder.threshold if args.threshold is None else args.threshold
    if any(len(part) < args.k for part in found):
        fewest = min(map(len, found))
        _say(f"only {fewest} of the {args.k} are still on disk; ragsr gallery info {args.gallery} lists the missing")
    if not any(hit.score >= threshold for hit in hits):
        _say(f"no useful reference: no score reaches {threshold:g}")
    if args.json:
        told = [hit._asdict() | {"path": str(hit.path), "score": round(hit.score, 4)} for hit in hits]
        document = {"query": str(args.image.resolve()), "gallery": str(folder), "encoder": encoder.id}
        print(json.dumps({**document, "threshold": threshold, "hits": told}, indent=2))
    else:
        for hit in hits:
            print(f"{hit.path}  {_nearness(hit, bits)}{'' if hit.score >= threshold else ', of no use'}")
    if args.plot:
        _plot(args.image, hits, bits, args.plot)
    return 0


# ------------------------------------------------------------------ details


def _add(gallery: "Gallery", args: argparse.Namespace) -> int:
    with gallery:
        report = gallery.add(args.photos)
        for path, reason in report.unreadable:
            _say(f"skipped {path}: {reason}")
        for path, original in report.duplicates:
            _say(f"skipped {path}: the same file as {original}")
        folder, count = gallery.folder, len(gallery)
    _say(f"{folder}: {report}; {count} images")
    if args.json:
        print(json.dumps({"gallery": folder, **vars(report), "images": count}, indent=2, default=str))
    return 0


def _plot(query: Path, hits: "list[Hit]", bits: int, path: Path) -> None:
    from ragsr.image import load_image, save_image
    from ragsr.sheet import contact_sheet

    found = [(load_image(hit.path), f"{n}. {hit.path.name}\n{_nearness(hit, bits)}") for n, hit in enumerate(hits, 1)]
    save_image(contact_sheet([[(load_image(query), f"query\n{query.name}"), *found]]), path)


def _nearness(hit: "Hit", bits: int) -> str:
    parts = [f"distance {hit.distance} of {bits}"]
    if hit.cosine is not None:
        parts.append(f"cosine {hit.cosine:.2f}")
    parts.append(f"score {hit.score:.2f}")
    if hit.region is not None:
        parts.append(f"{_box(hit.region)} for {_box(hit.query_region)}")
    if hit.generated:
        parts.append("generated")
    return ", ".join(parts)


def _box(box: "Box | None") -> str:
    """As photo tools write it: width, height, and where the corner is."""
    left, top, right, bottom = box or (0, 0, 0, 0)
    return f"{right - left}x{bottom - top}+{left}+{top}"


def _say(message: str) -> None:
    print(message, file=sys.stderr)
