"""Patch dropout: what a ViT sees depends on (seed, epoch, image, view) alone."""

import pytest
import timm
import torch
from peft import get_peft_model
from small import backbone, blocks, head_model, trainer, views
from torch import nn
from transformers import ConvNextConfig, ConvNextModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import hfproj
from hfproj.tuner.patch_dropout import PatchDropout
from hfproj.tuner.views import forward_views


def timm_vit():
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=1,
        num_heads=2,
        num_classes=0,
        reg_tokens=2,
    )


def dinov2():
    config = Dinov2WithRegistersConfig(
        image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_register_tokens=3
    )
    return Dinov2WithRegistersModel(config)


BACKBONES = {"transformers ViT": (backbone, 1), "Dinov2 with registers": (dinov2, 4), "timm ViT": (timm_vit, 3)}


class Tokens:
    """Records what enters the first block."""

    def __init__(self, vit):
        first = vit.get_submodule(
            "blocks"
            if hasattr(vit, "blocks")
            else next(n for n, m in vit.named_modules() if isinstance(m, nn.ModuleList) and len(m))
        )[0]
        first.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.seen = args[0].detach()


def dropped(vit, prefix, x, index, *, epoch=0, seed=0, rate=0.75, passes=1):
    """Tokens that enter the first block: one stacked pass over all views, or a pass per view."""
    tokens, dropout = Tokens(vit), PatchDropout(vit, rate=rate, prefix_tokens=prefix, seed=seed)
    dropout.attach()
    seen = []
    with dropout.using(torch.tensor(index), epoch):
        for part in x.chunk(passes):
            vit(part)
            seen.append(tokens.seen)
    dropout.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("name", BACKBONES)
def test_kept_tokens_are_a_function_of_seed_epoch_image_and_view(name):
    make, prefix = BACKBONES[name]
    vit = make().eval()
    x = torch.randn(2, 3, 3, 16, 16)  # 2 views of 3 images
    tokens = Tokens(vit)
    vit(x.flatten(0, 1))
    full = tokens.seen.unflatten(0, (2, 3))
    assert full.shape[2] == prefix + 16

    kept = dropped(vit, prefix, x.flatten(0, 1), [5, 9, 2]).unflatten(0, (2, 3))
    assert kept.shape[2] == prefix + 4
    assert torch.equal(kept[:, :, :prefix], full[:, :, :prefix])
    places = (kept[:, :, prefix:, None] == full[:, :, None, prefix:]).all(-1)  # views, images, kept, patches
    assert (places.sum(-1) == 1).all()
    assert (places.int().argmax(-1).diff(dim=-1) > 0).all()  # in their order
    places = places.any(2)
    assert not torch.equal(places[0], places[1])  # views differ

    order = [2, 0, 1]
    again = dropped(vit, prefix, x[:, order].flatten(0, 1), [2, 5, 9]).unflatten(0, (2, 3))
    assert torch.equal(again, kept[:, order])
    in_two_passes = dropped(vit, prefix, x.flatten(0, 1), [5, 9, 2], passes=2).unflatten(0, (2, 3))
    torch.testing.assert_close(in_two_passes, kept)
    alone = dropped(vit, prefix, x[:, 1], [9]).unflatten(0, (2, 1))
    torch.testing.assert_close(alone[:, 0], kept[:, 1])
    for other in ({"epoch": 1}, {"seed": 1}):
        assert not torch.equal(dropped(vit, prefix, x.flatten(0, 1), [5, 9, 2], **other).unflatten(0, (2, 3)), kept)


def test_the_mean_is_that_of_the_kept_patches():
    vit = dinov2()
    model = get_peft_model(vit, hfproj.ProjectionHeadConfig(head="identity", pooling="mean")).eval()
    x, index = torch.randn(3, 3, 16, 16), torch.tensor([5, 9, 2])
    dropout = PatchDropout(vit, rate=0.5, prefix_tokens=4)
    dropout.attach()
    with dropout.using(index, 0):
        out = model(x)
    last = out.backbone_output.last_hidden_state
    assert last.shape[1] == 4 + 8
    torch.testing.assert_close(out.representation, last[:, 4:].mean(1))


def test_off_without_gradients_outside_its_context_and_after_removal():
    vit = backbone().eval()
    x, index = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    full = vit(x).last_hidden_state
    dropout = PatchDropout(vit, rate=0.5, prefix_tokens=1)
    dropout.attach()
    assert torch.equal(vit(x).last_hidden_state, full)
    with dropout.using(index, 0):
        with torch.no_grad():
            assert torch.equal(vit(x).last_hidden_state, full)
        assert vit(x).last_hidden_state.shape[1] == 1 + 8
        dropout.remove()
        assert torch.equal(vit(x).last_hidden_state, full)


def test_the_trainer_drops_in_training_only(tmp_path):
    run = trainer(tmp_path, patch_dropout=0.5, max_steps=2, eval_strategy="steps", eval_steps=1,
                  extra={"eval_dataset": hfproj_images()})  # fmt: skip
    lengths = {True: set(), False: set()}
    blocks(run.model)[0].register_forward_pre_hook(lambda module, args: lengths[module.training].add(args[0].shape[1]))
    run.train()
    assert lengths == {True: {1 + 8}, False: {1 + 16}}
    assert not run.model.get_base_model().embeddings._forward_hooks


def hfproj_images():
    from small import images

    return images(6, seed=1)


def test_views_of_two_sizes():
    model = head_model(head_options={"hidden_dim": 12, "norm": None})
    dropout = PatchDropout(model.get_base_model(), rate=0.5, prefix_tokens=1)
    dropout.attach()
    lengths = []
    blocks(model)[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[:2]))
    x = [torch.randn(2, 3, size, size) for size in (16, 16, 8)]
    with dropout.using(torch.tensor([3, 4]), 0):
        forward_views(model, x)
    assert lengths == [(4, 1 + 8), (2, 1 + 2)]


@pytest.mark.parametrize("kind", ["timm CNN", "timm Swin", "DINOv3", "plain"])
def test_refused_where_patches_cannot_be_left_out(kind):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    made = {
        "timm CNN": lambda: timm.create_model("test_resnet", pretrained=False, num_classes=0),
        "timm Swin": lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(1, 2), embed_dim=8
        ),
        "DINOv3": lambda: DINOv3ViTModel(
            DINOv3ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        ),
        "plain": lambda: nn.Linear(2, 2),
    }[kind]()
    with pytest.raises(hfproj.UsageError, match=r"patch_dropout=0\.5 needs a vision transformer.*Set patch_dropout=0"):
        PatchDropout(made, rate=0.5, prefix_tokens=0)


def test_feature_maps_are_refused_when_they_come(tmp_path):
    config = ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], image_size=32)
    model = get_peft_model(ConvNextModel(config), hfproj.ProjectionHeadConfig(head="linear", out_dim=4))
    run = trainer(tmp_path, model, collator=views(size=32), patch_dropout=0.5)
    with pytest.raises(hfproj.UsageError, match=r"ConvNextModel embeds images as feature maps\. Set patch_dropout=0"):
        run.train()
