"""Three loaders that make the same batches: clipmini's, webdataset as open_clip's trainer uses it, and loose files.

webdataset's pipeline is that of open_clip (Pillow, torchvision's transforms, open_clip's tokenizer) without its shuffle
buffers; loose files are read by torch's map-style data set with the same steps.
"""

import contextlib
import functools
import io
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset
from open_clip.transform import image_transform
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from webdataset.autodecode import ImageHandler

from clipmini.data import picture
from clipmini.data.augment import Augmentation
from clipmini.data.cache import ShardCache
from clipmini.data.loader import ImageTextData
from clipmini.data.tokenizer import ClipTokenizer

BATCH = 64
PIXELS = 224  # of what comes out
SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)  # open_clip's crop
PER_SHARD = 64
STAGES = ("plan", "read", "decode", "transform", "tokenise", "collate", "rest")
CAPTION = "a photo of a dog that runs after a red ball, number {}"


class Clock:
    """CPU seconds by stage; what a stage inside another one takes is not counted twice."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.inside = 0.0

    def of(self, stage: str, function: Callable) -> Callable:
        """Return a function that does the same, and whose time is counted."""

        def timed(*arguments: Any, **options: Any) -> Any:
            before, self.inside = self.inside, 0.0
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                whole = time.process_time() - start
                self.seconds[stage] += whole - self.inside
                self.inside = before + whole

        return timed

    def each(self, stage: str, items: Iterable[Any]) -> Iterator[Any]:
        """Pass items on, and count the time that it takes to get them."""
        take = self.of(stage, functools.partial(next, iter(items), None))
        return iter(take, None)


class NoClock(Clock):
    """Leaves functions as they are."""

    def of(self, stage: str, function: Callable) -> Callable:
        return function


# Pictures


def make_noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Make noise with the spectrum of photographs, whose amplitudes fall with the frequency (Field, 1987)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    planes = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency, (height, width))
    colors = np.tensordot([[1, 0.25, 0.05], [1, 0, -0.05], [1, -0.25, 0]], planes, 1)  # most is common to the three
    return Image.fromarray((128 + 50 * colors / colors.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def cut_out(rng: np.random.Generator, photograph: Image.Image, width: int, height: int) -> Image.Image:
    """Take a part of a photograph, always another one."""
    unit = rng.uniform(0.7, 1.0) * min(photograph.width / 4, photograph.height / 3)
    left, top = rng.uniform(0, photograph.width - 4 * unit), rng.uniform(0, photograph.height - 3 * unit)
    box = (left, top, left + 4 * unit, top + 3 * unit)
    return photograph.resize((width, height), Image.Resampling.LANCZOS, box)


def make_jpegs(folder: str | None, size: int) -> Iterator[bytes]:
    """Yield JPEGs of quality 90 and 4:3, with so many pixels in the short side: photographs of a folder, or noise."""
    rng = np.random.default_rng(0)
    suffixes = (".jpg", ".jpeg", ".png")
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix in suffixes] if folder else [None]
    for path in itertools.cycle(paths):
        width, height = size * 4 // 3, size
        image = cut_out(rng, Image.open(path).convert("RGB"), width, height) if path else make_noise(rng, width, height)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


@dataclass(frozen=True)
class Pairs:
    """The same pairs in shards and in loose files."""

    shards: list[str]
    files: list[tuple[Path, str]]
    bytes: float  # of a picture, on average


def write_pairs(root: Path, folder: str | None, size: int, count: int, caption: str = CAPTION) -> Pairs:
    """Write shards, and files."""
    (root / "files").mkdir(parents=True)
    jpegs = make_jpegs(folder, size)
    shards: list[str] = []
    files: list[tuple[Path, str]] = []
    for first in range(0, count, PER_SHARD):
        shards.append(str(root / f"{first:06d}.tar"))
        with open(shards[-1], "wb") as stream, webdataset.TarWriter(stream, encoder=False) as writer:
            for number in range(first, first + PER_SHARD):
                data, text = next(jpegs), caption.format(number)
                writer.write({"__key__": f"{number:06d}", "jpg": data, "txt": text.encode()})
                files.append((root / f"files/{number:06d}.jpg", text))
                files[-1][0].write_bytes(data)
    return Pairs(shards, files, sum(path.stat().st_size for path, _ in files) / len(files))


# Three ways to make batches without end


def load_ours(pairs: Pairs, clock: Clock, num_workers: int) -> Iterator[Any]:
    """Make clipmini's batches; pictures leave it as uint8, to be normalised on the device."""
    nothing = {"rotation": 0.0, "translation": 0.0, "zoom": (1.0, 1.0), "shear": 0.0, "fill": 0, "flip": 0.0}
    colors = {"color_jitter": None, "color_jitter_probability": 0.0, "grayscale_probability": 0.0}
    blur = {"blur": (0.0, 0.0), "blur_probability": 0.0}
    data = ImageTextData(
        val=None,
        train=pairs.shards,
        caption_key="txt",
        second_caption_key=None,
        hard_negatives=None,
        augmentation=Augmentation(scale=SCALE, ratio=RATIO, **nothing, **colors, **blur),  # type: ignore[arg-type]
        view_augmentation=None,
        extra_views=None,
        draft="auto",
        shuffle_streams=64,
        shuffle_block=10_000,
        max_member_bytes=10**8,
        max_pixels=10**8,
        max_bad_fraction=0.0,
        num_workers=num_workers,
        start_method=None,
        prefetch_factor=2,
        timeout=300.0,
        cache=make_cache(Path(pairs.shards[0]).parent),
        allow_pipe=False,
        ledger=False,
        batch_size=BATCH,
        seed=0,
        num_cores=1,
        terms=("image_text",),
        all_views=False,
        cached_features=False,
    )
    tokenize = clock.of("tokenise", ClipTokenizer(77))
    data.prepare(tokenize=tokenize, padding=None, size=PIXELS, num_steps=2**40)
    loader = data.loader(0, 1)
    plan, store, decoder = loader.dataset.plan, loader.dataset.store, loader.dataset.decoder
    for part, name, stage in (
        (plan, "batch", "plan"),
        (plan, "lookup", "plan"),
        (store, "read", "read"),
        (decoder, "decode", "transform"),
        (decoder, "collate", "collate"),
    ):
        if not isinstance(clock, NoClock):
            object.__setattr__(part, name, clock.of(stage, getattr(part, name)))  # the decoder is frozen
    return iter(loader)


def make_cache(root: Path) -> ShardCache:
    """Make the cache that shards on this disk do not use."""
    options = {"max_bytes": None, "fetch_timeout": 60, "stall_timeout": 60, "storage_options": None}
    return ShardCache(directory=str(root / "cache"), **options)  # type: ignore[arg-type]


def make_steps(clock: Clock) -> dict[str, Callable]:
    """Return what the other two do to a sample, as open_clip makes it."""
    tokenizer = open_clip.SimpleTokenizer()
    return {
        "transform": clock.of("transform", image_transform(PIXELS, is_train=True)),
        "tokenise": clock.of("tokenise", lambda text: tokenizer(text)[0]),
    }


def load_webdataset(pairs: Pairs, clock: Clock, num_workers: int) -> Iterator[Any]:
    """Make batches as open_clip's trainer does."""
    steps = make_steps(clock)
    pipeline = webdataset.DataPipeline(
        webdataset.ResampledShards(pairs.shards),
        webdataset.tarfile_to_samples(),
        lambda samples: clock.each("read", samples),
        webdataset.decode(clock.of("decode", ImageHandler("pilrgb"))),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=steps["transform"], text=steps["tokenise"]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(
            BATCH, partial=False, collation_fn=clock.of("collate", webdataset.filters.default_collation_fn)
        ),
    )
    return iter(webdataset.WebLoader(pipeline, batch_size=None, num_workers=num_workers))


class LooseFiles(Dataset):
    """Pictures in files of their own, without end."""

    def __init__(self, files: Sequence[tuple[Path, str]], clock: Clock) -> None:
        self.files = files
        self.steps = make_steps(clock)
        self.read = clock.of("read", Path.read_bytes)
        self.decode = clock.of("decode", lambda data: Image.open(io.BytesIO(data)).convert("RGB"))

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, caption = self.files[index % len(self.files)]
        return self.steps["transform"](self.decode(self.read(path))), self.steps["tokenise"](caption)


def load_files(pairs: Pairs, clock: Clock, num_workers: int) -> Iterator[Any]:
    """Make batches of loose files."""
    collate = clock.of("collate", torch.utils.data.default_collate)
    return iter(DataLoader(LooseFiles(pairs.files, clock), BATCH, num_workers=num_workers, collate_fn=collate))


LOADERS = {
    "clipmini": load_ours,
    "clipmini with Pillow alone": load_ours,
    "webdataset": load_webdataset,
    "loose files": load_files,
}


@contextlib.contextmanager
def start(name: str, pairs: Pairs, clock: Clock, num_workers: int) -> Iterator[Iterator[Any]]:
    """Start a loader, and let it come to speed."""
    simplejpeg, decode = picture.simplejpeg, picture.Picture.decode
    if name == "clipmini with Pillow alone":
        picture.simplejpeg = None
    picture.Picture.decode = clock.of("decode", decode)  # type: ignore[method-assign]
    try:
        batches = LOADERS[name](pairs, clock, num_workers)
        for _ in range(1 + 3 * num_workers):
            next(batches)
        yield batches
    finally:
        picture.simplejpeg, picture.Picture.decode = simplejpeg, decode  # type: ignore[method-assign]
