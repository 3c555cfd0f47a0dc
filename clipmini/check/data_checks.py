"""A probe of the training data: what the run would read first, decoded as it would be."""

import hashlib
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from clipmini.check.findings import Findings
from clipmini.data.health import WINDOW, Fault
from clipmini.data.index import IMAGE_EXTENSIONS
from clipmini.data.loader import ImageTextData
from clipmini.data.locate import real_path
from clipmini.data.picture import Picture
from clipmini.data.tokenizer import Tokenize, count_tokens

PROBED = 1000  # samples
SECONDS = 10.0  # after which the probe ends with fewer
MOST = 0.5  # of the samples: so many bad ones in a row come that the run ends
SMALL = 0.5  # share of pictures with fewer pixels than the model takes
CUT = 0.1  # share of captions that are cut
SAME_CAPTION = 0.25  # others of a batch with the caption of a pair, on average
SAME_PICTURE = 0.05  # share of pictures that are there twice
MANY_EPOCHS = 20.0
UNEVEN = 20.0  # times that a source is seen as often as another one


@dataclass
class Probe:
    """What was found in the samples that were looked at."""

    samples: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # of each cause
    sides: list[int] = field(default_factory=list)  # the shorter one of each picture, pixels
    captions: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)  # of these, the one that a picture is to be nearest to
    negatives: list[str] = field(default_factory=list)  # one of each sample that has hard negatives
    pictures: Counter[bytes] = field(default_factory=Counter)  # by hash
    has_jpeg: bool = False


def probe_data(data: ImageTextData) -> Probe:
    """Read and decode the first samples that a run would see, as it would.

    Raises:
        UserError: what would end the run at once.
    """
    probe = Probe()
    positions = np.arange(min(PROBED, data.manifest.num_samples))
    places = data.plan.lookup(positions)
    start = time.monotonic()
    for row, position in enumerate(positions.tolist()):
        shard = data.manifest.sources[int(places.source[row])].shards[int(places.shard[row])]
        probe.samples += 1
        try:
            members = data.store.read(shard, int(places.sample[row]))
            look_at(members, probe, data.max_pixels)
            example = data.decoder.decode(members, position)
            probe.negatives += filter(None, [example.captions.pop("negative_text", "")])
            probe.captions += example.captions.values()
            probe.compared += filter(None, [example.captions.get("text")])
        except Fault as fault:
            probe.faults[fault.cause] += 1
            key = data.store.key(shard, int(places.sample[row]))
            probe.examples.setdefault(fault.cause, f"{shard.path}, {key}: {fault.detail}")
        if time.monotonic() - start > SECONDS:
            break
    data.store.close_remote()
    return probe


def look_at(members: dict[str, bytes], probe: Probe, max_pixels: int) -> None:
    """Note the size of a picture, and what tells it from others."""
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            picture = Picture(members[extension], max_pixels=max_pixels)
            probe.sides.append(min(picture.width, picture.height))
            probe.pictures[hashlib.blake2b(members[extension], digest_size=16).digest()] += 1
            probe.has_jpeg |= picture.image.format == "JPEG"


def check_probe(probe: Probe, data: ImageTextData, tokenize: Tokenize, duplicates: str, findings: Findings) -> None:
    """Judge what a probe has found."""
    check_faults(probe, data.max_bad_fraction, min(WINDOW, data.num_steps * data.batch_size), findings)
    check_pictures(probe, data, findings)
    check_captions(probe, tokenize, findings)
    check_negatives(probe, data.content.captions.hard_negatives, findings)
    check_duplicates(probe, data, duplicates, findings)


def check_faults(probe: Probe, max_bad_fraction: float, seen: int, findings: Findings) -> None:
    """Say how many samples cannot be used, and why.

    Args:
        seen: samples of the whole run, or WINDOW if those are fewer: what its limit is of.
    """
    bad = probe.faults.total()
    told = f"{probe.samples:,} samples were decoded"
    if not bad:
        findings.ok("data.samples", f"{told}, all of them good")
        return
    causes = "; ".join(f"{count} {cause}, as {probe.examples[cause]}" for cause, count in probe.faults.most_common())
    share = bad / probe.samples
    surely = share - 2 * (share * (1 - share) / probe.samples) ** 0.5  # of all samples too
    text = f"{told}, and {share:.1%} cannot be used: {causes}"
    limit = f"data.max_bad_fraction={max_bad_fraction:g}"
    if share > MOST or (surely > max_bad_fraction and surely * seen > max_bad_fraction * WINDOW):
        findings.fail("data.samples", f"{text}; {limit} would end the run")
    else:
        findings.warn(
            "data.samples", f"{text}, where {limit} allows it: `clipmini shards verify` finds all of data.train"
        )


def check_pictures(probe: Probe, data: ImageTextData, findings: Findings) -> None:
    """Compare the sizes of pictures with what the model takes."""
    if not probe.sides:
        return
    size = data.decoder.size
    small = sum(side < size for side in probe.sides) / len(probe.sides)
    median = statistics.median(probe.sides)
    text = f"shorter side of {median:.0f} px (median), {small:.0%} less than the {size} px of the model"
    if small > SMALL:
        findings.warn("data.pictures", f"{text}: they would be enlarged: set image_size, or take larger pictures")
    else:
        findings.ok("data.pictures", text)


def check_captions(probe: Probe, tokenize: Tokenize, findings: Findings) -> None:
    """Count the tokens of captions, and those that the model does not see."""
    if not probe.captions:
        return
    context = tokenize([""]).shape[1]
    lengths = count_tokens(tokenize, [*probe.captions, *probe.negatives])
    cut = sum(length > context for length in lengths) / len(lengths)
    text = f"{statistics.median(lengths):.0f} tokens (median), {cut:.0%} more than the {context} of the model"
    if cut > CUT:
        findings.warn(
            "data.captions", f"{text}: they would be cut: raise model.text_cfg.context_length or shorten them"
        )
    else:
        findings.ok("data.captions", text)


def check_negatives(probe: Probe, key: str | None, findings: Findings) -> None:
    """Count the samples that have hard negatives, if a run takes any."""
    if key is None:
        return
    text = f"{len(probe.negatives):,} of {probe.samples:,} samples have {key} in their .json"
    if probe.negatives:
        findings.ok("data.hard_negatives", text)
    else:
        findings.warn("data.hard_negatives", f"{text}, so that there are no hard negatives: see data.hard_negatives")


def check_duplicates(probe: Probe, data: ImageTextData, duplicates: str, findings: Findings) -> None:
    """Look for pictures that are there twice, and captions that would be each other's negatives."""
    doubles = sum(count - 1 for count in probe.pictures.values())
    share = doubles / max(1, len(probe.sides))
    if share > SAME_PICTURE:
        text = f"{share:.0%} of {len(probe.sides):,} pictures are there once more among these: see data.train"
        findings.warn("data.duplicates", text)
    counts = Counter(probe.compared)
    total = max(2, len(probe.compared))
    others = sum(count * (count - 1) for count in counts.values()) / (total * (total - 1)) * (data.batch_size - 1)
    text = f"{others:.2f} other pairs of a batch have the caption of a pair, on average"
    if others > SAME_CAPTION and duplicates == "ignore":
        caption, count = counts.most_common(1)[0]
        findings.warn(
            "data.equal_captions",
            f"{text}, most often {caption[:40]!r} ({count / total:.0%}), and would count as wrong: "
            "set loss.duplicates=mask or share",
        )
    elif probe.compared:
        findings.ok("data.equal_captions", text)


def check_sources(data: ImageTextData, steps: int, findings: Findings) -> None:
    """Say how often each source is seen, and look for shards that are named twice."""
    total, seen = sum(source.weight for source in data.manifest.sources), steps * data.batch_size
    epochs = {source.name: seen * source.weight / total / source.num_samples for source in data.manifest.sources}
    told = ", ".join(f"{name} {count:.2g} times" for name, count in epochs.items())
    most, least = max(epochs, key=lambda name: epochs[name]), min(epochs, key=lambda name: epochs[name])
    if epochs[most] > MANY_EPOCHS and epochs[most] > UNEVEN * epochs[least]:
        findings.warn("data.mixture", f"seen: {told}: see data.train.{most}.weight")
    else:
        findings.ok("data.mixture", f"seen: {told}")
    shards = [shard.path for source in data.manifest.sources for shard in source.shards]
    paths = Counter(map(real_path, shards))
    twice = [path for path, count in paths.items() if count > 1]
    if twice:
        findings.warn("data.shards", f"data.train names {len(twice)} shards twice, first {twice[0]}")


def check_workers(data: ImageTextData, processes: int, cores: int, findings: Findings) -> None:
    """Compare loader processes with cores."""
    wanted = data.num_workers * processes
    text = f"{wanted} loader processes and {processes} that train, on {cores} cores"
    if wanted > cores:
        findings.warn("data.num_workers", f"{text}: set data.num_workers={max(1, cores // processes - 1)} or less")
    else:
        findings.ok("data.num_workers", text)
