"""Towers compute what open_clip's do, with the same gradients, without masks and with less of the last block."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from test_model import make_model, write_json
from torch import Tensor

from clipmini.blocks import MAX_COMPILED, MAX_KEPT_LENGTH, Block, KeptAttention, OwnPatchDropout, attend, compile_blocks
from clipmini.data.tokenizer import ClipTokenizer
from clipmini.model import Model, encode_image, encode_text

CAPTIONS = ["a dog", "a much longer caption about a cat on a mat", "!", "two cats"]
TOWERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "custom text": {"custom_text": True},
    "eos": {"text_cfg": {"layers": 2, "pool_type": "eos", "eos_id": 49407}},
    "mean of patches": {"vision_cfg": {"layers": 2, "pool_type": "avg"}},
    "layer scale": {"vision_cfg": {"layers": 2, "ls_init_value": 0.5}, "text_cfg": {"layers": 2, "ls_init_value": 0.5}},
    "norm of queries": {"text_cfg": {"layers": 2, "qk_norm": True}},  # a block of another class
    "no mask": {"text_cfg": {"layers": 2, "no_causal_mask": True}},
    "pooling by attention": {"vision_cfg": {"layers": 2, "attentional_pool": True, "attn_pooler_heads": 2}},
}


def make_pair(path: Path, changes: dict[str, Any]) -> tuple[Model, torch.nn.Module]:
    """Return our model and open_clip's own with the same weights, in float64."""
    towers = {"vision_cfg": {"layers": 2}, "text_cfg": {"layers": 2}}
    write_json(path, **{**towers, **{key: value for key, value in changes.items() if key != "custom_text"}})
    config = {**json.loads(path.read_text()), **({"custom_text": True} if "custom_text" in changes else {})}
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    ours, theirs = make_model(str(path)).double(), open_clip.create_model(path.stem).double()
    for block in (module for module in ours.modules() if isinstance(module, torch.nn.LayerNorm)):
        torch.nn.init.uniform_(block.weight, 0.5, 1.5)  # new ones are all alike
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(model: torch.nn.Module, features: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    weights = [torch.linspace(-1, 2, feature.numel(), dtype=torch.float64).view_as(feature) for feature in features]
    torch.stack([(feature * weight).sum() for feature, weight in zip(features, weights, strict=True)]).sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize("changes", TOWERS.values(), ids=TOWERS)
def test_features_and_gradients_are_open_clips(changes: dict, grad_checkpointing: bool, tmp_path: Path) -> None:
    ours, theirs = make_pair(tmp_path / "blocks.json", changes)
    if grad_checkpointing and changes == TOWERS["norm of queries"]:
        ours.visual.set_grad_checkpointing()  # open_clip cannot have it in these text towers
    else:
        ours.set_grad_checkpointing(grad_checkpointing)
    picture = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    text = ClipTokenizer(24)(CAPTIONS)
    found = [encode_image(ours, picture), encode_text(ours, text)]
    pixels = (picture - ours.visual.pixel_mean) / ours.visual.pixel_std
    expected = [theirs.encode_image(pixels, normalize=True), theirs.encode_text(text, normalize=True)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with torch.no_grad():  # by torch's attention
        torch.testing.assert_close(encode_text(ours, text), expected[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(encode_image(ours, picture), expected[0], rtol=0, atol=1e-12)
    ours_by_name = gradients(ours, found)
    for name, value in gradients(theirs, expected).items():
        torch.testing.assert_close(ours_by_name[name], value, rtol=0, atol=1e-10, msg=name)


def test_which_blocks_are_taken_over(tmp_path: Path) -> None:
    def kinds(changes: dict) -> tuple[bool, bool, bool]:
        ours, _ = make_pair(tmp_path / "blocks.json", changes)
        visual, text = ours.visual.transformer.resblocks, ours.transformer.resblocks
        assert isinstance(visual[0], Block) and not visual[0].is_causal and not visual[0].gives_first
        return visual[-1].gives_first, isinstance(text[0], Block), isinstance(text[0], Block) and text[0].is_causal

    assert kinds({}) == (True, True, True)
    assert kinds(TOWERS["mean of patches"]) == (False, True, True)
    assert kinds(TOWERS["pooling by attention"]) == (False, True, True)
    assert kinds(TOWERS["no mask"]) == kinds(TOWERS["norm of queries"]) == (True, False, False)


@pytest.mark.parametrize("mask", ["none", "causal", "given"])
def test_attention_and_its_gradient(mask: str) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    seen = (torch.arange(7) <= torch.tensor([2, 6, 0])[:, None])[:, None, None] if mask == "given" else None

    def ours(*inputs: Tensor) -> Tensor:
        return attend(*inputs, is_causal=mask == "causal", mask=seen)

    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=mask == "causal")
    assert ours(query, key, value).grad_fn.name() == "KeptAttentionBackward"  # type: ignore[union-attr]
    torch.testing.assert_close(ours(query, key, value), expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(ours, (query, key, value))


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_bf16_is_as_exact_as_torchs(autocast: bool) -> None:
    torch.manual_seed(0)
    inputs = [(scale * torch.randn(4, 3, 50, 64)).bfloat16() for scale in (2, 2, 1)]
    gradient = torch.randn(4, 3, 50, 64).bfloat16()

    def run(attention: Any, dtype: torch.dtype) -> list[Tensor]:
        parts = [part.to(dtype).requires_grad_() for part in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            found = attention(*parts)
        found.backward(gradient.to(dtype))
        return [found, *(part.grad for part in parts)]  # type: ignore[list-item]

    exact = run(F.scaled_dot_product_attention, torch.float64)
    ours = run(lambda *parts: KeptAttention.apply(*parts, None), torch.bfloat16)
    theirs = run(F.scaled_dot_product_attention, torch.bfloat16)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a.double() - c).norm() < 1.5 * (b.double() - c).norm()


def test_long_sequences_keep_no_probabilities() -> None:
    for length, is_kept in ((MAX_KEPT_LENGTH, True), (MAX_KEPT_LENGTH + 1, False)):
        query = torch.zeros(1, 1, length, 4, requires_grad=True)
        name = attend(query, query, query, is_causal=True).grad_fn.name()  # type: ignore[union-attr]
        assert (name == "KeptAttentionBackward") == is_kept


def test_patches_are_dropped_as_open_clip_does(tiny_json: Path) -> None:
    ours = make_model(str(tiny_json), patch_dropout=0.5).train()
    assert isinstance(ours.visual.patch_dropout, OwnPatchDropout)
    tokens = torch.randn(5, 1 + 9, 3)
    torch.manual_seed(3)
    found = ours.visual.patch_dropout(tokens)
    torch.manual_seed(3)
    expected = open_clip.transformer.PatchDropout(0.5)(tokens)
    assert torch.equal(found, expected) and found.shape == (5, 1 + 4, 3)
    assert torch.equal(ours.visual.patch_dropout.eval()(tokens), tokens)


def test_how_often_blocks_are_compiled_is_bounded_in_any_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_blocks(torch.nn.Identity())
    assert torch._dynamo.config.cache_size_limit == MAX_COMPILED
    of_torch_2_6 = SimpleNamespace(cache_size_limit=8)  # it refuses the name of newer ones, recompile_limit
    monkeypatch.setattr(torch._dynamo, "config", of_torch_2_6)
    compile_blocks(torch.nn.Identity())
    assert vars(of_torch_2_6) == {"cache_size_limit": MAX_COMPILED}
