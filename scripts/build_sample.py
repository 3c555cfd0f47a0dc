"""Build the embedded sample `clipmini/sample/` bit for bit from pinned npm packages.

    pip install Pillow==13.0.0 webdataset && python scripts/build_sample.py --output /tmp/sample

Three drawing sets of the same concepts: Noto and Fluent become training shards, Twemoji a held-out classification set.
A concept is kept when Noto and Twemoji both draw it, it is neither a flag nor a skin-tone swatch, and its Twemoji
picture is not pixel for pixel the one of another concept (most of the families are), so that no class appears twice.
Skin-tone variants are left out: they would make people four fifths of the data.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import PIL
import webdataset
from PIL import Image, features

PACKAGES = {  # npm package: (version, sha256 of the tarball `npm pack` fetches)
    "emoji-datasource-google": ("16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "emoji-datasource-twitter": ("16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
    "@lobehub/fluent-emoji-3d": ("1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    "cldr-annotations-full": ("48.2.0", "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1"),
}
PILLOW_VERSION = "13.0.0"  # brings its own libwebp; another encoder gives other bytes
SIZE = 64  # pixels
QUALITY = 80  # WebP
SAMPLES_PER_SHARD = 500
TEMPLATES = ["{c}"]  # captions are the names themselves, without a sentence around them
MTIME = 0  # a fixed time stamp in the tars keeps their bytes equal from build to build
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Concept:
    """One meaning that several vendors draw: its Unicode code points, its English words and its pictures."""

    code_point: str  # as in "1f469-200d-1f33e", without the variation selector fe0f
    name: str
    keywords: list[str]
    group: str
    subgroup: str
    pictures: dict[str, Image.Image]  # by drawing set


def fetch(directory: Path) -> dict[str, Path]:
    """Download and unpack the pinned packages, refuse other bytes, and return where each one lies."""
    directory.mkdir(parents=True, exist_ok=True)
    unpacked = {}
    for package, (version, expected) in PACKAGES.items():
        tarball = directory / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
        if not tarball.exists():
            subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=directory, check=True)
        found = hashlib.sha256(tarball.read_bytes()).hexdigest()
        if found != expected:
            sys.exit(f"{tarball} has sha256 {found}, expected {expected}: delete it and run again")
        target = directory / tarball.stem
        if not target.exists():
            with tarfile.open(tarball) as archive:
                archive.extractall(target, filter="data")
        unpacked[package] = target / "package"
    return unpacked


def without_variation_selector(code_point: str) -> str:
    """Spell a code point sequence as vendors agree on: lower case, no leading zeros, no fe0f."""
    parts = (part.lower().lstrip("0") for part in code_point.split("-"))
    return "-".join(part for part in parts if part != "fe0f")


def on_white(path: Path) -> Image.Image:
    """Read a transparent picture, resize it to SIZE and put it on white."""
    picture = Image.open(path).convert("RGBA")
    if picture.size != (SIZE, SIZE):
        picture = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    background = Image.new("RGBA", picture.size, "white")
    background.alpha_composite(picture)
    return background.convert("RGB")


def read_words(annotations: Path) -> dict[str, tuple[str, list[str]]]:
    """Read CLDR's English short names and keywords by code point."""
    entries = json.loads(annotations.read_text(encoding="utf-8"))["annotations"]["annotations"]
    words = {}
    for characters, entry in entries.items():
        code_point = without_variation_selector("-".join(f"{ord(character):x}" for character in characters))
        name = entry["tts"][0]
        words[code_point] = (name, [keyword for keyword in entry["default"] if keyword != name])
    return words


def read_concepts(packages: dict[str, Path]) -> list[Concept]:
    """Join the packages by code point, in Unicode's order, and drop what would be a class twice."""
    words = read_words(packages["cldr-annotations-full"] / "annotations/en/annotations.json")
    fluent_directory = packages["@lobehub/fluent-emoji-3d"] / "assets"
    fluent = {without_variation_selector(path.stem): path for path in sorted(fluent_directory.glob("*.webp"))}
    google, twitter = packages["emoji-datasource-google"], packages["emoji-datasource-twitter"]
    concepts = []
    for entry in sorted(json.loads((google / "emoji.json").read_text()), key=lambda entry: entry["sort_order"]):
        drawn = entry["has_img_google"] and entry["has_img_twitter"]
        if not drawn or entry["category"] in {"Flags", "Component"}:
            continue
        code_point = without_variation_selector(entry["unified"])
        name, keywords = words.get(code_point, (entry["name"].lower(), []))  # CLDR leaves out 64 of them
        pictures = {
            "noto": on_white(google / "img/google/64" / entry["image"]),
            "twemoji": on_white(twitter / "img/twitter/64" / entry["image"]),
        }
        if code_point in fluent:
            pictures["fluent"] = on_white(fluent[code_point])
        concepts.append(Concept(code_point, name, keywords, entry["category"], entry["subcategory"], pictures))
    return drop_identical(concepts)


def drop_identical(concepts: list[Concept]) -> list[Concept]:
    """Keep one concept of each held-out picture, one that has CLDR keywords if there is one."""
    first: dict[bytes, Concept] = {}
    for concept in sorted(concepts, key=lambda concept: not concept.keywords):
        first.setdefault(concept.pictures["twemoji"].tobytes(), concept)
    kept = {concept.code_point for concept in first.values()}
    return [concept for concept in concepts if concept.code_point in kept]


def webp(picture: Image.Image) -> bytes:
    """Encode a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()


def write_shard(path: Path, samples: list[dict]) -> None:
    """Write one tar whose bytes depend on the samples alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream, webdataset.TarWriter(stream, mtime=MTIME, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)


def write_training(output: Path, concepts: list[Concept], drawing_set: str) -> None:
    """Write one drawing set as shards of picture, caption and metadata."""
    samples = []
    for concept in concepts:
        if drawing_set not in concept.pictures:
            continue
        metadata = {
            "name": concept.name,
            "keywords": concept.keywords,
            "code_point": concept.code_point,
            "group": concept.group,
            "subgroup": concept.subgroup,
        }
        caption = ", ".join([concept.name, *concept.keywords])
        samples.append(
            {
                "__key__": f"{drawing_set}_{concept.code_point}",
                "json": json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode(),
                "txt": caption.encode(),
                "webp": webp(concept.pictures[drawing_set]),
            }
        )
    for number, start in enumerate(range(0, len(samples), SAMPLES_PER_SHARD)):
        write_shard(output / f"{drawing_set}-{number:05d}.tar", samples[start : start + SAMPLES_PER_SHARD])


def write_classification(output: Path, concepts: list[Concept], drawing_set: str) -> None:
    """Write one drawing set as a zero-shot classification set in CLIP_benchmark's webdataset layout."""
    samples = [
        {"__key__": f"s{label:07d}", "cls": str(label).encode(), "webp": webp(concept.pictures[drawing_set])}
        for label, concept in enumerate(concepts)
    ]
    write_shard(output / "test/0.tar", samples)
    (output / "test/nshards.txt").write_text("1\n")
    (output / "classnames.txt").write_text("".join(f"{concept.name}\n" for concept in concepts), encoding="utf-8")
    (output / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in TEMPLATES))


def main() -> None:
    """Build the sample, and compare it with the sums of the committed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory to write; its train/ and wds_twemoji/ go")
    parser.add_argument("--packages", type=Path, default=Path("/tmp/clipmini-packages"), help="where packages are kept")
    arguments = parser.parse_args()
    if PIL.__version__ != PILLOW_VERSION or not features.check("webp"):
        sys.exit(f"needs Pillow {PILLOW_VERSION} with WebP for equal bytes, found {PIL.__version__}")
    concepts = read_concepts(fetch(arguments.packages))
    for directory in ("train", "wds_twemoji"):
        shutil.rmtree(arguments.output / directory, ignore_errors=True)
    for drawing_set in ("noto", "fluent"):
        write_training(arguments.output / "train", concepts, drawing_set)
    write_classification(arguments.output / "wds_twemoji", concepts, "twemoji")
    lines = []
    for path in sorted(arguments.output.glob("*/**/*.*")):
        lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(arguments.output)}\n")
    (arguments.output / SUMS).write_text("".join(lines))
    print(f"{len(concepts)} concepts, {len(lines)} files; `cd {arguments.output} && sha256sum --check {SUMS}`")


if __name__ == "__main__":
    main()
