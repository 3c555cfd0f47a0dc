"""Stages of a run: positions as open_clip resizes them, pictures of the size of their stage, an exact resume."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from open_clip.model import resize_pos_embed
from runs import final_state, options, read_losses, run
from test_model import make_model, write_json
from test_module import make_pictures
from test_resume import is_same

from clipmini.blocks import OwnPatchDropout, resize_positions
from clipmini.checkpoints.disk import checkpoint_step, list_checkpoints
from clipmini.curriculum import Stage, read_curriculum, set_patch_dropout, size_limits, stage_at
from clipmini.errors import UserError
from clipmini.model import Model, encode_image

STAGES = [{"until": 0.5, "image_size": 16, "patch_dropout": None}, {"until": 1.0}]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A transformer on 8 x 8 patches."""
    return make_model(write_json(tmp_path / "m.json", vision_cfg={"image_size": 64, "patch_size": 8}))


@pytest.mark.parametrize("size", [8, 24, 56, 64, 96])
@torch.no_grad()
def test_features_are_those_of_open_clips_resized_model(size: int, model: Model, tmp_path: Path) -> None:
    other = make_model(write_json(tmp_path / "o.json", vision_cfg={"image_size": size, "patch_size": 8}))
    weights = model.state_dict()
    resize_pos_embed(weights, other)
    other.load_state_dict(weights)
    assert (size == 64) is (weights["visual.positional_embedding"].shape == model.visual.positional_embedding.shape)
    image = make_pictures(3, size, 0)
    torch.testing.assert_close(encode_image(model, image), encode_image(other, image), rtol=0, atol=1e-6)


def test_resized_positions_have_the_gradient_of_open_clips(model: Model) -> None:
    positions = model.visual.positional_embedding.detach().double().requires_grad_()
    weights = {"visual.positional_embedding": positions}
    model.visual.grid_size = (5, 5)
    resize_pos_embed(weights, model)
    found = resize_positions(positions, (8, 8), (5, 5))
    expected = weights["visual.positional_embedding"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    to = torch.randn(26, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = [torch.autograd.grad((part * to).sum(), positions)[0] for part in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_shares_become_steps(model: Model) -> None:
    stages = [
        {"until": 0.25, "image_size": 16, "patch_dropout": 0.5},
        {"until": 0.8, "image_size": 32},
        {"until": 1.0, "patch_dropout": 0.25},
    ]
    found = read_curriculum(stages, model, 100)
    assert found == (Stage(25, 16, 0.5), Stage(80, 32, 0.0), Stage(100, 64, 0.25))
    assert [stage_at(found, step) for step in (0, 24, 25, 79, 80, 99)] == [stage for stage in found for _ in range(2)]
    assert size_limits(found, 8) == ((200, 16), (640, 32), (800, 64))
    assert read_curriculum(None, model, 100) == () and stage_at((), 5) is None
    dropout = model.visual.patch_dropout
    assert isinstance(dropout, OwnPatchDropout) and dropout.prob == 0
    tokens = torch.randn(2, 17, 4)
    model.train()
    for share, count in ((0.5, 9), (0.0, 17)):
        set_patch_dropout(model, share)
        assert dropout(tokens).shape == (2, count, 4)
    assert "patch_dropout" not in model.architecture["vision_cfg"]  # what is exported leaves none out


def test_models_own_dropout_is_taken_where_a_stage_says_none(tmp_path: Path) -> None:
    model = make_model(write_json(tmp_path / "m.json"), patch_dropout=0.75)
    found = read_curriculum([{"until": 0.5, "patch_dropout": 0.0}, {"until": 1.0}], model, 10)
    assert [stage.patch_dropout for stage in found] == [0.0, 0.75]


def test_runs_equally_with_other_processes(shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    losses = {}
    for name, processes, more in (("one", 1, ()), ("two", 2, ("micro_batch=4", "data.num_workers=2"))):
        given = options(tiny_json, shards, "curriculum=[{until:0.5,image_size:16},{until:1.0}]", *more)
        (tmp_path / name).mkdir()
        result = run_forked(["train", *given], tmp_path / name, processes=processes)
        assert result.returncode == 0, result.stderr
        assert "step 0: pictures of 16 px and patch dropout 0, to step 6" in result.stdout
        assert "step 6: pictures of 32 px and patch dropout 0, to step 12" in result.stdout
        losses[name] = read_losses(tmp_path / name)
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-5)
    run(tmp_path / "none", 1, options(tiny_json, shards))
    plain = read_losses(tmp_path / "none")
    assert plain[0] != losses["one"][0] and plain[7] != losses["one"][7]


@pytest.mark.parametrize("step", [4, 6])
def test_resumed_is_uninterrupted(step: int, shards: Path, tiny_json: Path, tmp_path: Path) -> None:
    stages = "curriculum=[{until:0.5,image_size:16},{until:1.0,patch_dropout:0.5}]"
    given = options(tiny_json, shards, stages, "checkpoint.keep_last=20", "data.num_workers=1")
    run(tmp_path / "whole", 1, given)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for path in list_checkpoints(tmp_path / "parts/outputs/run/checkpoints"):
        if checkpoint_step(path) > step:
            shutil.rmtree(path)
    run(tmp_path / "parts", 1, given)
    assert is_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    result = run_forked(["train", *given[:-3], "curriculum=null"], tmp_path / "parts")
    assert result.returncode == 2 and "give back: curriculum: was [" in result.stderr


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], r"curriculum: the last stage ends at until=\[\]: must be 1.0, the end of the run"),
        ([{"until": 0.9}], "curriculum: the last stage ends at until=0.9: must be 1.0"),
        ([{"until": 0.0}, {"until": 1.0}], r"curriculum\[0\].until=0: must be above 0, where"),
        ([{"until": 0.8}, {"until": 0.8}, {"until": 1.0}], r"curriculum\[1\].until=0.8: must be above 0.8, where"),
        ([{"until": 1.5}, {"until": 1.0}], r"curriculum\[0\].until=1.5: must be above 0, where the stage before ends"),
        ([{"until": 0.001}, {"until": 1.0}], r"curriculum\[0\].until=0.001: leaves this stage none of the 100 steps"),
        ([{"until": 1.0, "image_size": 20}], r"curriculum\[0\].image_size=20: must be a multiple of 8, or null"),
        ([{"until": 1.0, "image_size": 0}], r"curriculum\[0\].image_size=0: must be a multiple of 8, or null"),
        ([{"until": 1.0, "patch_dropout": 1.0}], r"curriculum\[0\].patch_dropout=1.0: must be from 0 to below 1"),
    ],
)
def test_wrong_stages_are_told(stages: list[dict[str, Any]], message: str, model: Model) -> None:
    with pytest.raises(UserError, match=message):
        read_curriculum(stages, model, 100)


@pytest.mark.parametrize(
    ("vision", "stage", "message"),
    [
        ({"timm_model_name": "vit_tiny_patch16_224"}, {"image_size": 96}, "the image tower takes its own size"),
        ({"timm_model_name": "test_resnet", "image_size": 160}, {"patch_dropout": 0.5}, "TimmModel has none, must be"),
        ({"layers": [1, 1, 1, 1], "image_size": 64}, {"image_size": 32}, "the image tower takes its own size only"),
    ],
)
def test_towers_that_cannot_are_told(
    vision: dict[str, Any], stage: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = make_model(write_json(tmp_path / "m.json", vision_cfg={"image_size": 224, **vision}))
    with pytest.raises(UserError, match=rf"curriculum\[0\].\w+=[\d.]+: {message}"):
        read_curriculum([{"until": 1.0, **stage}], model, 100)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])  # the second resizes its positions itself
def test_towers_of_timm_take_other_sizes_where_they_can(name: str, tmp_path: Path) -> None:
    vision = {"timm_model_name": name, "image_size": 160}
    model = make_model(write_json(tmp_path / "m.json", vision_cfg=vision))
    assert read_curriculum([{"until": 1.0, "image_size": 96}], model, 10) == (Stage(10, 96, 0.0),)
    assert encode_image(model, make_pictures(2, 96, 0)).shape == (2, 32)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["curriculum=[{until:1.0,size:16}]"], "size"),
        (["curriculum=[{image_size:16}]"], "until"),
        (
            ["curriculum=[{until:1.0}]", "loss.terms={image_text:null,text_text:1.0}", "data.second_caption_key=txt"],
            "curriculum: no term of loss.terms compares pictures: set null",
        ),
    ],
)
def test_what_cannot_be_is_one_message(
    overrides: list[str], message: str, shards: Path, tiny_json: Path, tmp_path: Path
) -> None:
    result = run_forked(["train", *options(tiny_json, shards, *overrides)], tmp_path)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "outputs/run/checkpoints").exists()
