"""What is learned from a teacher, against its dense form; several processes and micro-batches against one."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import in_processes, make_head, make_objective
from contrast import assert_mean_is, make_inputs, peak_bytes
from test_module import assert_equal, gradients, gradients_under_ddp, make_batch, make_module, slice_of_a_process
from torch import Tensor, nn

from clipmini import distributed
from clipmini.distillation import feature_distance, similarity_distillation
from clipmini.errors import UserError

TERMS = {"image_text": 1.0, "image_teacher": 200.0, "text_teacher": 100.0, "image_text_teacher": 0.5}
Tensors = dict[str, Tensor]


def make_teacher(rows: int, dtype: torch.dtype = torch.float64, *, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Make the unit features of a teacher, a little alike in pairs, and its scale."""
    generator = torch.Generator().manual_seed(7)
    image, noise = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return *(F.normalize(part, dim=-1).to(dtype) for part in (image, image + noise)), torch.tensor(9.0, dtype=dtype)


def dense(image: Tensor, text: Tensor, scale: Tensor, *teacher: Tensor) -> Tensor:
    """Compute the divergences with whole matrices, as torch does."""
    student, theirs = scale * image @ text.T, teacher[2] * teacher[0] @ teacher[1].T
    of_log = functools.partial(F.kl_div, reduction="batchmean", log_target=True)
    return sum(of_log(S.log_softmax(1), Z.log_softmax(1)) for S, Z in ((student, theirs), (student.T, theirs.T))) / 2


def by_hand(image: Tensor, text: Tensor, scale: Tensor, *teacher: Tensor) -> Tensor:
    """Compute them one probability after the other."""
    student, theirs = scale * image @ text.T, teacher[2] * teacher[0] @ teacher[1].T
    total, count = image.new_zeros(()), len(image)
    for S, Z in ((student, theirs), (student.T, theirs.T)):
        for i in range(count):
            for j in range(count):
                p = Z[i, j].exp() / sum(Z[i, k].exp() for k in range(count))
                q = S[i, j].exp() / sum(S[i, k].exp() for k in range(count))
                total = total + p * (p.log() - q.log())
    return total / (2 * count)


def pair(rows: int, dtype: torch.dtype = torch.float64, **options: int) -> list[Tensor]:
    inputs = make_inputs(rows, dtype, **options)
    return [inputs[name] for name in ("image", "text", "scale")]


@pytest.mark.parametrize("block_size", [None, 1, 4, 9, 50])
@pytest.mark.parametrize("oracle", [dense, by_hand])
def test_equals_the_dense_form(oracle: object, block_size: int | None) -> None:
    assert callable(oracle)
    inputs, teacher = pair(9), make_teacher(9)
    loss, accuracy = similarity_distillation(*inputs, *teacher, block_size=block_size)
    expected = oracle(*inputs, *teacher)
    assert expected > 0.1
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    pairs = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True)
    for found, gradient in pairs:
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)
    own = inputs[0] @ inputs[1].T
    numbers = torch.arange(9)
    assert accuracy == ((own.argmax(1) == numbers).float().mean() + (own.argmax(0) == numbers).float().mean()) / 2


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    image, text, scale = make_teacher(9)
    image.requires_grad_()
    loss, _ = similarity_distillation(image, text, scale, image.detach(), text, scale, block_size=2)
    assert abs(loss.item()) < 1e-14
    assert torch.autograd.grad(loss, image)[0].abs().max() < 1e-14


def test_gradients_are_those_of_small_differences() -> None:
    teacher = make_teacher(4)
    assert torch.autograd.gradcheck(
        lambda *inputs: similarity_distillation(*inputs, *teacher, block_size=3)[0], pair(4)
    )


def test_half_precision_is_summed_in_single() -> None:
    inputs, teacher = pair(133, torch.bfloat16, width=32), make_teacher(133, torch.float32)
    wide = [part.detach().double().requires_grad_() for part in inputs]
    loss, _ = similarity_distillation(*inputs, *teacher)
    expected = dense(*wide, *(part.double() for part in teacher))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    pairs = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, wide), strict=True)
    for found, gradient in pairs:
        torch.testing.assert_close(found, gradient, rtol=1e-2, atol=1e-5, check_dtype=False)


def test_memory_is_linear_in_the_batch() -> None:
    def step(rows: int) -> int:
        inputs, teacher = pair(rows, torch.float32, width=16), make_teacher(rows, torch.float32)
        return peak_bytes(lambda: similarity_distillation(*inputs, *teacher, block_size=32)[0].backward())

    few, many = step(512), step(2048)
    assert many < 5 * few and many < 2048 * 2048 * 4 / 2  # half of one matrix of similarities


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_distance_of_features_is_the_mean_of_squares(dtype: torch.dtype) -> None:
    features, teacher = make_inputs(9, dtype)["image"], make_teacher(9, torch.float32, width=8)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = feature_distance(features, teacher)
    rows = zip(features.tolist(), teacher.tolist(), strict=True)
    expected = sum((a - b) ** 2 for mine, theirs in rows for a, b in zip(mine, theirs, strict=True)) / (9 * 8)
    assert found.item() == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-6)
    found.backward()
    difference = 2 * (features.detach().double() - teacher.double()) / (9 * 8)
    assert features.grad is not None
    torch.testing.assert_close(features.grad.double(), difference, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("temperature", "scale"),
    [(None, 9.0), (0.02, 50.0)],
)
def test_is_the_weighted_sum_of_its_terms(temperature: float | None, scale: float) -> None:
    (image, text, own_scale), (teacher_image, teacher_text, _) = pair(9), make_teacher(9)
    objective = make_objective(terms=TERMS, temperatures={"image_text_teacher": temperature})
    objective.add_teacher(8, 5, 9.0)
    objective.double()
    features = {"image": image, "text": text, "teacher_image": teacher_image, "teacher_text": teacher_text}
    features |= objective.project(features)
    found = objective(features, scale=own_scale, ids={})
    plain = make_objective()({"image": image, "text": text}, scale=own_scale, ids={})
    of_teacher = dense(image, text, own_scale, teacher_image, teacher_text, torch.tensor(scale, dtype=torch.float64))
    distances = [
        (F.normalize(layer(part), dim=-1) - theirs).square().mean()
        for part, theirs, layer in (
            (image, teacher_image, nn.Linear(8, 5).double()),
            (text, teacher_text, nn.Linear(8, 5).double()),
        )
        if layer.load_state_dict(objective.projections["image" if part is image else "text"].state_dict())
    ]
    expected = plain["loss"] + 200 * distances[0] + 100 * distances[1] + 0.5 * of_teacher
    torch.testing.assert_close(found["loss"], expected, rtol=0, atol=1e-11)
    assert found["accuracy"] == plain["accuracy"]


def test_distances_alone_have_no_accuracy() -> None:
    objective = make_objective(terms={"image_teacher": 2.0})
    objective.add_teacher(8, 8, 9.0)
    features = {"image": pair(9)[0], "teacher_image": make_teacher(9, width=8)[0]}
    found = objective(features | objective.project(features), scale=torch.tensor(1.0), ids={})
    assert found.keys() == {"loss"} and not list(objective.parameters())
    assert objective.towers == "image" and not objective.uses_scale and objective.judged is None


@pytest.mark.parametrize(
    ("names", "width", "judged"),
    [
        (["image_text"], 8, "image_text"),
        (["image_text_teacher", "text_text"], 8, "image_text"),
        (["text_text", "image_image"], 8, "text_text"),
        (["image_teacher", "text_teacher"], 8, "image_text"),  # both are in the teacher's space
        (["image_teacher", "text_teacher"], 5, None),  # and here no two of them in one
        (["text_teacher", "image_image"], 8, None),
    ],
)
def test_what_held_out_pairs_are_judged_by(names: list[str], width: int, judged: str | None) -> None:
    objective = make_objective(terms=dict.fromkeys(names, 1.0))
    objective.add_teacher(8, width, 9.0)
    assert objective.judged == judged
    if judged is None:
        with pytest.raises(UserError, match="data.val: no term of loss.terms makes captions like pictures or like"):
            objective.check_judged()


def share_of_a_process() -> tuple[Tensor, list[Tensor], Tensor]:
    """Compute this rank's loss on its slice; return the loss, the gradients of all inputs and the accuracy."""
    inputs, teacher = pair(12), make_teacher(12)
    part = 12 // distributed.world_size()
    mine = slice(distributed.rank() * part, (distributed.rank() + 1) * part)
    whole = (*(part[mine] for part in inputs[:2]), inputs[2], *(part[mine] for part in teacher[:2]), teacher[2])
    loss, accuracy = similarity_distillation(*whole, block_size=3)
    return loss.detach(), list(torch.autograd.grad(loss, inputs)), accuracy


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_equal_one(world_size: int, tmp_path: Path) -> None:
    assert_mean_is(share_of_a_process(), in_processes(world_size, share_of_a_process, tmp_path))


def make_taught_batch(rows: int) -> Tensors:
    teacher = make_teacher(rows, torch.float32)
    batch = {name: value for name, value in make_batch(rows).items() if not name.startswith("negative")}
    return {**batch, "teacher_image": teacher[0], "teacher_text": teacher[1]}


def gradients_of_a_process(path: str, micro_batch: int | None, options: dict[str, Any]) -> Tensors:
    module = make_module(path, micro_batch=micro_batch, terms=TERMS, teacher_width=5, **options)
    return gradients_under_ddp(module, slice_of_a_process(make_taught_batch(12)))


LOCKED_SIGLIP = {"loss": "siglip", "lock_image": True}


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "options"),
    [(1, 5, {}), (2, None, {}), (3, 3, {}), (2, 2, LOCKED_SIGLIP), (2, None, {"head": make_head(layers=2)})],
)
def test_steps_are_the_same(
    world_size: int, micro_batch: int | None, options: dict[str, Any], tiny_json: Path, tmp_path: Path
) -> None:
    module = make_module(str(tiny_json), terms=TERMS, teacher_width=5, **options)
    expected = gradients(module, make_taught_batch(12))
    assert expected["loss.projections.image.weight"].abs().max() > 1e-4 and "model.logit_scale" in expected
    arguments = (str(tiny_json), micro_batch, options)
    for found in in_processes(world_size, gradients_of_a_process, tmp_path, *arguments):
        assert_equal(found, expected)


@pytest.mark.parametrize("shape", [(8, 5), (9,), (9, 4)])
def test_shapes_that_do_not_fit_are_told(shape: tuple[int, ...]) -> None:
    teacher_image, _, scale = make_teacher(9)
    expected = rf"the teacher's text features have the shape \[{', '.join(map(str, shape))}\]: must be \[9, width\]"
    with pytest.raises(UserError, match=expected):
        similarity_distillation(*pair(9), teacher_image, torch.zeros(shape), scale)
