"""Zero-shot numbers against open_clip's classifier and a float64 loop; a collapsed model scores nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import in_processes, read_sample
from judging import open_one, write_npy, write_wds
from open_clip.transform import PreprocessCfg, image_transform_v2
from sklearn.metrics import average_precision_score, balanced_accuracy_score
from test_model import make_model

from clipmini.data.decode import open_image
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.errors import UserError
from clipmini.evaluation.cache import FeatureCache
from clipmini.evaluation.encoder import Encoder
from clipmini.evaluation.evaluator import Evaluator
from clipmini.evaluation.sets import ClassificationSet
from clipmini.evaluation.tasks import Finding, Protocol, measure, permutation, rank_classes
from clipmini.model import Model, encode_image

CPU = torch.device("cpu")
SEVEN = {
    "classnames": "".join(f"thing {number}\n" for number in range(7)),
    "zeroshot_classification_templates": "a photo of {c}\n{}\n",
}


def make_encoder(model: Model, batch_size: int = 4, num_workers: int = 0, cache: Path | None = None) -> Encoder:
    evaluator = Evaluator([], Protocol(), batch_size, num_workers, "fp32")
    return evaluator.encoder(model, ClipTokenizer(24), CPU, FeatureCache(cache) if cache else None)


def classify(model: Model, path: Path, **options: Any) -> Finding:
    (finding,) = measure(open_one(path), make_encoder(model, **options), Protocol())
    return finding


def values(finding: Finding) -> dict[str, float]:
    return finding.outcome.measure(np.ones(finding.outcome.count))


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_classifier_is_open_clips(batch_size: int, classification_set: Path, tiny_json: Path) -> None:
    model, dataset = make_model(str(tiny_json)), open_one(classification_set).dataset
    assert isinstance(dataset, ClassificationSet)
    ours = make_encoder(model, batch_size).classifier(dataset.prompts)
    theirs = open_clip.build_zero_shot_classifier(
        model, open_clip.SimpleTokenizer(context_length=24), dataset.class_names, ["a photo of {}", "{}"]
    )
    torch.testing.assert_close(ours, theirs.T, rtol=0, atol=1e-6)


def test_classes_may_have_different_numbers_of_sentences(tiny_json: Path) -> None:
    encoder = make_encoder(make_model(str(tiny_json)))
    prompts = (("a cat", "the cat sleeps on a chair", "cats"), ("a dog",))
    texts = encoder.texts([sentence for of_class in prompts for sentence in of_class])
    expected = torch.stack([F.normalize(texts[:3].mean(dim=0), dim=0), texts[3]])
    torch.testing.assert_close(encoder.classifier(prompts), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_numbers_equal_a_float64_loop(classification_set: Path, tiny_json: Path) -> None:
    model = make_model(str(tiny_json))
    finding = classify(model, classification_set)
    found = values(finding)

    model.double()
    preprocess = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    dataset = open_one(classification_set).dataset
    assert isinstance(dataset, ClassificationSet)
    classes = []
    for name in dataset.class_names:
        vectors = model.encode_text(tokenizer([f"a photo of {name}", name]), normalize=True)
        classes.append(F.normalize(vectors.mean(dim=0), dim=0))
    orders = []
    for number in range(21):
        image = preprocess(open_image(dataset.pictures.read(number))).double()
        vector = model.encode_image(image[None], normalize=True)[0]
        orders.append(sorted(range(7), key=lambda c: -float(vector @ classes[c])))
    labels = dataset.labels.tolist()
    assert found["acc1"] == pytest.approx(np.mean([order[0] == y for order, y in zip(orders, labels, strict=True)]))
    assert found["acc5"] == pytest.approx(np.mean([y in order[:5] for order, y in zip(orders, labels, strict=True)]))
    recall = balanced_accuracy_score(labels, [order[0] for order in orders])
    assert found["mean_per_class_recall"] == pytest.approx(recall)
    assert finding.predictions is not None and finding.predictions.tolist() == [order[0] for order in orders]
    assert finding.outcome.chance == {"acc1": 1 / 7, "acc5": 5 / 7, "mean_per_class_recall": 1 / 7}


@pytest.fixture(scope="module")
def prime_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pictures of 7 classes in one shard: no number of processes, workers or pictures at a time divides them."""
    samples = read_sample("wds_twemoji/test/0.tar", 23)
    for number, sample in enumerate(samples):
        sample["cls"] = str(number % 7).encode()
    return write_wds(tmp_path_factory.mktemp("wds_prime"), samples, **SEVEN)


def evaluate_all(model: str, directory: str, cases: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Evaluate with each batch size and number of workers."""
    found = []
    for batch_size, num_workers in cases:
        finding = classify(make_model(model), Path(directory), batch_size=batch_size, num_workers=num_workers)
        units = {name: list(column) for name, column in finding.outcome.units.items()}
        found.append({"batch": batch_size, **values(finding), **units})
    return found


@pytest.fixture(scope="module")
def alone(prime_set: Path, tiny_json: Path) -> dict[int, dict[str, Any]]:
    """What one process without workers finds, by batch size."""
    return {found["batch"]: found for found in evaluate_all(str(tiny_json), str(prime_set), [(1, 0), (7, 0), (64, 0)])}


def test_workers_change_no_bit(alone: dict, prime_set: Path, tiny_json: Path) -> None:
    cases = [(batch_size, num_workers) for batch_size in (1, 7, 64) for num_workers in (1, 4)]
    for found in evaluate_all(str(tiny_json), str(prime_set), cases):
        assert found == alone[found["batch"]]


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_change_no_bit(
    world_size: int, alone: dict, prime_set: Path, tiny_json: Path, tmp_path: Path
) -> None:
    cases = [(batch_size, num_workers) for batch_size in (1, 7, 64) for num_workers in (0, 1, 4)]
    ranks = in_processes(world_size, evaluate_all, tmp_path, str(tiny_json), str(prime_set), cases)
    assert all(len(rank) == 9 and rank == ranks[0] for rank in ranks)
    assert all(found == alone[found["batch"]] for found in ranks[0])


def test_batch_sizes_change_no_number(classification_set: Path, tiny_json: Path) -> None:
    found = [values(classify(make_model(str(tiny_json)), classification_set, batch_size=n)) for n in (1, 7, 21, 64)]
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("tower", ["text", "image"])
@pytest.mark.parametrize("value", [0.0, float("nan"), 1.0])
def test_a_collapsed_model_scores_nothing(tower: str, value: float, classification_set: Path, tiny_json: Path) -> None:
    model = make_model(str(tiny_json))
    torch.nn.init.constant_(model.text_projection if tower == "text" else model.visual.proj, value)
    if value == 1.0:  # every picture, or every sentence, is the same unit vector
        for name, parameter in model.named_parameters():
            if name.startswith("visual.") == (tower == "image") and "ln_" in name and name.endswith("weight"):
                torch.nn.init.zeros_(parameter)
            elif name.startswith("visual.") == (tower == "image") and name.endswith(("ln_post.bias", "ln_final.bias")):
                torch.nn.init.constant_(parameter, 0.3)
    found = values(classify(model, classification_set))
    if tower == "text":
        assert (found["acc1"], found["acc5"], found["mean_per_class_recall"]) == (0.0, 0.0, 0.0)
    else:  # one class is chosen for all, and each has its share of the pictures
        assert found["acc1"] <= 1 / 7 and found["mean_per_class_recall"] <= 1 / 7


def test_equal_scores_are_misses_but_of_equal_classes_the_first_wins() -> None:
    classifier = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), dim=1)
    features = F.normalize(torch.tensor([[1.0, 0.2], [1.0, 0.2], [1.0, 0.2]]), dim=1)
    labels = torch.tensor([0, 1, 2])
    different = (("a",), ("b",), ("c",), ("d",))
    ranks, _, _ = rank_classes(features, classifier, labels, different)
    assert ranks.tolist() == [1, 1, 3]
    equal = (("missile",), ("missile",), ("c",), ("d",))
    ranks, predictions, _ = rank_classes(features, classifier, labels, equal)
    assert ranks.tolist() == [0, 1, 3] and predictions.tolist() == [0, 0, 0]


def test_shuffled_falls_to_chance(tmp_path: Path, tiny_json: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=2000)
    assert (permutation(2000, Protocol()) != np.arange(2000)).all()  # nothing keeps its place
    features = F.one_hot(torch.from_numpy(labels), 4).float()
    mixed = labels[permutation(2000, Protocol(seed=3))]
    prompts = tuple((name,) for name in "abcd")
    ranks, _, _ = rank_classes(features, torch.eye(4), torch.from_numpy(labels), prompts)
    assert (ranks == 0).all()
    ranks, _, _ = rank_classes(features, torch.eye(4), torch.from_numpy(mixed), prompts)
    assert abs((ranks == 0).mean() - 0.25) < 0.03


def test_multilabel_is_scikit_learns(tmp_path: Path, tiny_json: Path) -> None:
    rng = np.random.default_rng(1)
    samples = read_sample("wds_twemoji/test/0.tar", 20)
    targets = (rng.random((20, 3)) < 0.4).astype(np.uint8)
    for sample, target in zip(samples, targets, strict=True):
        del sample["cls"]
        sample["npy"] = write_npy(target)
    files = {"classnames": "a\nb\nc", "zeroshot_classification_templates": "a {c}", "dataset_type": "multilabel"}
    root = write_wds(tmp_path / "wds_many", samples, **files)
    model = make_model(str(tiny_json))
    finding = classify(model, root)
    dataset, encoder = open_one(root).dataset, make_encoder(model)
    assert isinstance(dataset, ClassificationSet)
    scores = encoder.pictures(dataset.pictures).features.double() @ encoder.classifier(dataset.prompts).double().T
    expected = np.mean([average_precision_score(targets[:, c], scores[:, c]) for c in range(3)])
    assert values(finding)["mean_average_precision"] == pytest.approx(expected)


def test_modes_and_random_numbers_are_given_back(classification_set: Path, tiny_json: Path) -> None:
    model = make_model(str(tiny_json)).train()
    model.visual.ln_post.eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    classify(model, classification_set, num_workers=2)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


def with_broken_picture(tmp_path: Path, count: int) -> Path:
    samples = read_sample("wds_twemoji/test/0.tar", count)
    samples[1]["webp"] = b"broken"
    for sample in samples:
        sample["cls"] = b"1"
    return write_wds(tmp_path / "wds_broken", samples, **SEVEN)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_more_than_one_percent_of_unreadable_pictures_is_an_error(
    num_workers: int, tiny_json: Path, tmp_path: Path
) -> None:
    root = with_broken_picture(tmp_path, 99)
    message = "1 of 99 pictures cannot be read, more than 1%.*: s0000001: picture: not a JPEG, PNG or WebP"
    with pytest.raises(UserError, match=message):
        classify(make_model(str(tiny_json)), root, num_workers=num_workers)


def test_fewer_unreadable_pictures_are_counted_and_left_out(tiny_json: Path, tmp_path: Path) -> None:
    finding = classify(make_model(str(tiny_json)), with_broken_picture(tmp_path, 101))
    assert finding.outcome.count == 100 and len(finding.unreadable) == 1
    assert "s0000001" not in finding.outcome.units["key"]


def test_features_are_kept_until_something_changes(classification_set: Path, tiny_json: Path, tmp_path: Path) -> None:
    model, opened = make_model(str(tiny_json)), open_one(classification_set)
    first = make_encoder(model, cache=tmp_path)
    expected = values(measure(opened, first, Protocol())[0])
    assert first.sentences == 14
    second = make_encoder(model, cache=tmp_path)
    assert values(measure(opened, second, Protocol())[0]) == expected
    assert second.sentences == 0

    with torch.no_grad():
        model.text_projection[0, 0] += 1e-3
    third = make_encoder(model, cache=tmp_path)
    measure(opened, third, Protocol())
    assert third.sentences == 14
    changed = open_one(classification_set, templates=["a drawing of {}"])
    measure(changed, third, Protocol())
    assert third.sentences == 14 + 7
    assert len(list(tmp_path.glob("image-*"))) == 1 and len(list(tmp_path.glob("text-*"))) == 3


def test_another_activation_does_not_get_what_is_kept(
    classification_set: Path, tiny_json: Path, tmp_path: Path
) -> None:
    quick = tmp_path / "quick.json"
    quick.write_text(json.dumps({**json.loads(tiny_json.read_text()), "quick_gelu": True}))
    plain, other = make_model(str(tiny_json)), make_model(str(quick))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in plain.state_dict().items())
    dataset = open_one(classification_set).dataset
    assert isinstance(dataset, ClassificationSet)

    def encode(model: Model, cache: Path | None) -> torch.Tensor:
        encoder = make_encoder(model, cache=cache)
        return torch.cat([encoder.pictures(dataset.pictures).features, encoder.classifier(dataset.prompts)])

    first = encode(plain, tmp_path / "cache")
    found, expected = encode(other, tmp_path / "cache"), encode(other, None)
    assert torch.equal(found, expected) and (found != first).any(dim=1).all()


def test_pictures_are_encoded_again_when_a_file_changes(tiny_json: Path, tmp_path: Path) -> None:
    for name, sample in zip(("cat", "dog"), read_sample("wds_twemoji/test/0.tar", 2), strict=True):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.webp").write_bytes(sample["webp"])
    model, cache = make_model(str(tiny_json)), tmp_path / "cache"
    before = make_encoder(model, cache=cache).pictures(open_one(tmp_path / "set").dataset.pictures).features
    (tmp_path / "set/cat/1.webp").write_bytes((tmp_path / "set/dog/1.webp").read_bytes())
    after = make_encoder(model, cache=cache).pictures(open_one(tmp_path / "set").dataset.pictures).features
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert torch.equal(after[0], after[1])


def test_a_damaged_cache_is_made_again(classification_set: Path, tiny_json: Path, tmp_path: Path) -> None:
    model, opened = make_model(str(tiny_json)), open_one(classification_set)
    expected = values(measure(opened, make_encoder(model, cache=tmp_path), Protocol())[0])
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert values(measure(opened, make_encoder(model, cache=tmp_path), Protocol())[0]) == expected


@torch.no_grad()
def test_features_before_the_projection(tiny_json: Path, classification_set: Path) -> None:
    model, pictures = make_model(str(tiny_json)), open_one(classification_set).dataset.pictures
    encoder = make_encoder(model, batch_size=21)
    before = encoder.pictures(pictures, before_projection=True).features
    after = encoder.pictures(pictures).features
    torch.testing.assert_close(F.normalize(before @ model.visual.proj, dim=-1), after, rtol=0, atol=1e-6)


def test_a_tower_without_a_projection_is_refused() -> None:
    model = make_model("RN50", vision_cfg={"layers": [1, 1, 1, 1], "width": 8, "image_size": 32})
    with pytest.raises(
        UserError, match="ModifiedResNet has no projection at its end: probe_features=before_projection"
    ):
        encode_image(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), before_projection=True)
