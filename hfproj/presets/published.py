"""Each objective as it was published (with a ResNet-50 on ImageNet unless the line says otherwise), and for CIFAR.

Learning rates are those of the batch beside them (LARS and AdamW: the base rate times batch/256).

References:
    Beside each setting. For CIFAR-10 and CIFAR-100 (``…_cifar``), 1000 epochs of a ResNet-18 with a 3×3 stem and
    without max-pool: vturrisi/solo-learn (9187ea3) ``scripts/pretrain/cifar/*.yaml``, ``augmentations/*.yaml``.

Deviations:
    solo-learn's Adam couples weight decay with the gradient, AdamW here does not; its warm-up of 10 epochs is its
    default.
    LARS is timm's. Learning rates end at 0 along a cosine; the official codes of Barlow Twins, VICReg, DirectCLR, SwAV
    and Zero-CL end at a thousandth of the peak, and those of SwAV start the warm-up at 0.3. Mixed precision, which most
    of them have, is left to ``bf16=True``.
"""

from dataclasses import replace
from typing import Any

from hfproj.objectives.sigmoid import SigmoidContrastive

from hfproj.presets.settings import (  # isort: skip
    BYOL_VIEWS, BYOL_VIEWS_NOTE, CIFAR_RESNET_18, CIFAR_RESNET_50, LARS, MOCO_VIEWS, RESNET_18, RESNET_50, SGD,
    SIMCLR_LARS_100, SOLO_ASYMMETRIC_NOTE, SOLO_ASYMMETRIC_VIEWS, SOLO_LARS, SOLO_VIEWS, SOLO_WEAK_VIEWS, ZERO_CL_LARS,
    Preset, Settings, multi_crop, training,
)  # fmt: skip

_SWAV_VIEWS = {**multi_crop(6, (0.14, 1.0), (0.05, 0.14)), "blur_probability": 0.5}
_BIASES_NOTE = "Biases and norms have a learning rate of their own there (0.0048 · batch/256)."
_BERT: Settings = {"warmup_epochs": 0.0, "lr_scheduler_type": "linear", "max_grad_norm": 1.0}  # SimCSE's Trainer

_SIMCLR = Preset(
    line="SimCLR",
    source="google-research/simclr README.md, the command for ImageNet (batch 4096, 100 epochs); arXiv 2002.05709.",
    objective={"name": "nt_xent", "temperature": 0.1}, head="simclr", training=SIMCLR_LARS_100,
)  # fmt: skip
_DCL = Preset(
    line="DCL",
    source="lightly-ai/lightly (e8d317fc) benchmarks/imagenet/resnet50/dcl.py: the authors published no ImageNet code.",
    objective={"name": "dcl", "temperature": 0.1},
    head="directclr_simclr", head_options={"batch_statistics": "joint"},
    training=training(100.0, 256, 1.2, 1e-6, **LARS),  # 0.075 · √256
)  # fmt: skip
_DIRECTCLR = Preset(
    line="DirectCLR: the loss sees 360 of 2048 entries of h",
    source=f"facebookresearch/directclr directclr/main.py, mode directclr; arXiv 2110.09348. {BYOL_VIEWS_NOTE}",
    objective={"name": "info_nce", "temperature": 0.1}, head="subvector", head_options={"d0": 360 / 2048},
    views=BYOL_VIEWS, training=SIMCLR_LARS_100,
)  # fmt: skip
_ZERO_CL = Preset(
    line="Zero-CL by features, ImageNet-100, ResNet-18",
    source=f"Sherrylone/Zero-CL (c8dbadd) ImageNet-100/main.py, mode fea. {BYOL_VIEWS_NOTE} {_BIASES_NOTE}",
    objective={"name": "zero_cl", "mode": "feature", "variant": "imagenet"},
    head="zero_cl", head_options={"hidden_dim": 8192}, out_dim=8192,
    views=BYOL_VIEWS, training=training(400.0, 256, 0.3, 1e-6, **ZERO_CL_LARS),
)  # fmt: skip
_SIMCSE = Preset(
    line="SimCSE, unsupervised, BERT-base",
    source="princeton-nlp/SimCSE: README.md and run_unsup_example.sh, 10⁶ sentences of Wikipedia, length 32. The views "
    "are two passes of a sentence under dropout, so a collator of yours makes them. Evaluate h: the head is for "
    "training only. fp16 there.",
    objective={"name": "simcse", "temperature": 0.05}, head="simcse", pooling="cls",
    training=training(1.0, 64, 3e-5, 0.0, **_BERT),
)  # fmt: skip

_PUBLISHED: dict[str, Preset] = {
    "simclr": _SIMCLR,
    "simclr_v2": _SIMCLR.but(
        "SimCLR v2: a head of three layers",
        "v2: google-research/simclr and arXiv 2006.10029, whose text has LARS at 6.4 = 0.1·√4096, weight decay 1e-4, "
        "800 epochs with 5 % warm-up (not confirmed in code). Fine-tuning from the head's first layer is not done "
        "here.",
        head="simclr_v2", training=training(800.0, 4096, 6.4, 1e-4, warmup_epochs=40.0, **LARS),
    ),
    "moco_v2": Preset(
        line="MoCo v2",
        source="facebookresearch/moco README.md: --lr 0.03 --batch-size 256 --mlp --moco-t 0.2 --aug-plus --cos, 200 "
        "epochs. Keys are not shuffled: BatchNorm has the statistics of the global batch.",
        objective={"name": "moco", "temperature": 0.2, "queue_size": 65536}, head="moco",
        views=MOCO_VIEWS, training=training(200.0, 256, 0.03, 1e-4, warmup_epochs=0.0, **SGD),
    ),
    "moco_v3": Preset(
        line="MoCo v3, ViT-S or ViT-B",
        source="facebookresearch/moco-v3 CONFIG.md: -b 4096 --optimizer=adamw --lr=1.5e-4 --weight-decay=.1 "
        f"--epochs=300 --warmup-epochs=40 --moco-m-cos --moco-t=.2. {BYOL_VIEWS_NOTE} Deviation: --stop-grad-conv1 "
        "freezes the patch embedding; freeze it yourself.",
        objective={"name": "moco_v3", "temperature": 0.2, "ema_momentum": (0.99, 1.0)},
        head="moco_v3", predictor={"head": "moco_v3_predictor"},
        views=BYOL_VIEWS, training=training(300.0, 4096, 2.4e-3, 0.1, warmup_epochs=40.0),
    ),
    "byol": Preset(
        line="BYOL",
        source="arXiv 2006.07733, section 3 and appendix: LARS, 0.2·batch/256, weight decay 1.5e-6, 1000 epochs, "
        f"momentum from 0.996 (its text; not confirmed in code). {BYOL_VIEWS_NOTE} LARS' trust coefficient, 0.001, is "
        "that of similar codes.",
        objective={"name": "byol", "ema_momentum": (0.996, 1.0)}, head="byol", predictor={"head": "byol_predictor"},
        views=BYOL_VIEWS, training=training(1000.0, 4096, 3.2, 1.5e-6, **LARS),
    ),
    "simsiam": Preset(
        line="SimSiam",
        source="facebookresearch/simsiam main_simsiam.py and README.md: batch 512, 100 epochs, --fix-pred-lr, learning "
        "rate 0.05·batch/256.",
        objective={"name": "simsiam"}, head="simsiam", predictor={"head": "simsiam_predictor"}, views=MOCO_VIEWS,
        training=training(100.0, 512, 0.1, 1e-4, warmup_epochs=0.0, fixed_predictor_rate=True, **SGD),
    ),
    "barlow_twins": Preset(
        line="Barlow Twins",
        source=f"facebookresearch/barlowtwins main.py: batch 2048, 1000 epochs. {BYOL_VIEWS_NOTE} {_BIASES_NOTE}",
        objective={"name": "barlow_twins", "off_diagonal_weight": 0.0051}, head="barlow_twins",
        views=BYOL_VIEWS, training=training(1000.0, 2048, 1.6, 1e-6, **LARS),  # 0.2 · 2048/256
    ),
    "vicreg": Preset(
        line="VICReg",
        source="facebookresearch/vicreg README.md: --epochs 1000 --batch-size 2048 --base-lr 0.2; main_vicreg.py. "
        f"{BYOL_VIEWS_NOTE}",
        objective={"name": "vicreg"}, head="vicreg",
        views=BYOL_VIEWS, training=training(1000.0, 2048, 1.6, 1e-6, **LARS),
    ),
    "swav": Preset(
        line="SwAV: 2 views of 224 pixels and 6 of 96",
        source="facebookresearch/swav scripts/swav_800ep_pretrain.sh: 64 images on each of 64 GPUs, no queue, "
        "prototypes frozen for 313 steps, which is an epoch at this batch.",
        objective={"name": "swav", "freeze_prototypes_epochs": 1.0}, head="swav", prototypes=3000,
        views=_SWAV_VIEWS, training=training(800.0, 4096, 4.8, 1e-6, **LARS),
    ),
    "deepcluster_v2": Preset(
        line="DeepCluster-v2: 2 views of 224 pixels and 6 of 96",
        source="facebookresearch/swav scripts/deepclusterv2_800ep_pretrain.sh. The first epoch fills the bank here, in "
        "place of a pass before training.",
        objective={"name": "deepcluster_v2", "prototypes": [3000, 3000, 3000]}, head="swav",
        views=_SWAV_VIEWS, training=training(800.0, 4096, 4.8, 1e-6, **LARS),
    ),
    "dino": Preset(
        line="DINO, the recommended run of ViT-S: 2 views of 224 pixels and 8 of 96",
        source="facebookresearch/dino README.md, --epochs 300 --teacher_temp 0.07 --warmup_teacher_temp_epochs 30 "
        "--norm_last_layer false on 16 GPUs of 64 images; main_dino.py. Deviations: gradients are clipped by their "
        "global norm, there each parameter's own at 3; weight decay stays at 0.04, there it rises along a cosine to "
        "0.4; blur and solarization of the three kinds of views (1, 0.1, 0.5 and 0, 0.2, 0) are 0.55 and 0.1 in all; "
        "stochastic depth (0.1) is the backbone's.",
        objective={"name": "dino", "teacher_temperature": 0.07, "warmup_epochs": 30},
        head="dino", prototypes={"count": 65536, "learn_norm": True},
        views={**BYOL_VIEWS, **multi_crop(8, (0.4, 1.0), (0.05, 0.4))},
        training=training(300.0, 1024, 2e-3, 0.04, max_grad_norm=3.0),  # 5e-4 · 1024/256
    ),
    "nnclr": Preset(
        line="NNCLR",
        source="arXiv 2104.14548 from its text, not confirmed in code: queue of 98304, temperature 0.1, LARS, batch "
        "4096, 1000 epochs, weight decay 1e-6. Learning rate (0.3·batch/256) and augmentation are SimCLR's, ours.",
        objective={"name": "nnclr", "temperature": 0.1, "queue_size": 98304},
        head="nnclr", predictor={"head": "nnclr_predictor"}, training=training(1000.0, 4096, 4.8, 1e-6, **LARS),
    ),
    "w_mse": Preset(
        line="W-MSE 2, Tiny ImageNet, ResNet-18",
        source="htdt/self-supervised README.md: --dataset tiny_in --epoch 1000 --lr 2e-3 --emb 128 --w_size 256 "
        "--w_iter 4. Batch, warm-up, weight decay and augmentation from the text of arXiv 2007.06346, not confirmed in "
        "code; the learning rate drops near the end there, along a cosine here. Adam with coupled weight decay there.",
        objective={"name": "w_mse", "w_size": 256, "w_iter": 4}, head="wmse", out_dim=128,
        views={**MOCO_VIEWS, "grayscale_probability": 0.1, "blur_probability": 0.0},
        training=training(1000.0, 512, 2e-3, 1e-6, warmup_epochs=2.0),
    ),
    "zero_cl": _ZERO_CL,
    "zero_cl_instance": _ZERO_CL.but(
        "Zero-CL by images, ImageNet-100, ResNet-18", "Here mode ins.",
        objective={"name": "zero_cl", "mode": "instance", "variant": "imagenet"},
    ),
    "zero_cl_cifar": Preset(
        line="Zero-CL by features, CIFAR, ResNet-18",
        source="Sherrylone/Zero-CL (0a7a84d) cifar/main.py, README.md: --epochs 1000, with --whiten true, which is not "
        f"its default. {SOLO_ASYMMETRIC_NOTE} Biases and norms have a learning rate of their own there (0.005).",
        objective={"name": "zero_cl", "mode": "feature", "variant": "cifar"}, head="zero_cl",
        views=SOLO_ASYMMETRIC_VIEWS, training=training(1000.0, 256, 0.3, 1e-4, **ZERO_CL_LARS),
    ),
    "directclr": _DIRECTCLR,
    "directclr_group": _DIRECTCLR.but(
        "DirectCLR's mode group: 8 random groups of 256 entries of h", "Here mode group.",
        objective={"name": "grouped", "objective": "info_nce", "objective_options": {"temperature": 0.1}, "groups": 8},
        head="identity", head_options={},
    ),
    "simcse_unsupervised": _SIMCSE,
    "simcse_supervised": _SIMCSE.but(
        "SimCSE, supervised by NLI with hard negatives, BERT-base",
        "Supervised: run_sup_example.sh, 128 triples on each of 4 GPUs, 3 epochs, where the head is kept in "
        "evaluation.",
        objective={"name": "simcse", "temperature": 0.05, "hard_negatives": True},
        training=training(3.0, 512, 5e-5, 0.0, **_BERT),
    ),
    "supcon": Preset(
        line="SupCon, CIFAR-10, ResNet-50",
        source="HobbitLong/SupContrast README.md: main_supcon.py --batch_size 1024 --learning_rate 0.5 --temp 0.1 "
        "--cosine; its ImageNet settings are not published as a command. 1000 epochs and weight decay 1e-4 are its "
        "defaults.",
        objective={"name": "supcon", "temperature": 0.1, "base_temperature": 0.07}, head="supcon",
        views={**MOCO_VIEWS, "blur_probability": 0.0}, training=training(1000.0, 1024, 0.5, 1e-4, **SGD),
    ),
    "siglip": Preset(
        line="SigLIP's loss on two views of images",
        source="arXiv 2303.15343: the loss and the start values (those of mlfoundations/open_clip). It is published "
        "for images and texts: head, augmentation and optimizer for two views of an image are ours.",
        objective={"name": "sigmoid"}, head="linear", out_dim=512, scales=dict(SigmoidContrastive.scales),
        training=training(100.0, 4096, 1e-3, 1e-4),
    ),
    "lejepa": Preset(
        line="LeJEPA, ImageNette, ViT-S/8 at 128 pixels",
        source="rbalestr-lab/lejepa MINIMAL.md: +lamb=0.02 +V=4 +proj_dim=16 +lr=2e-3 +bs=256 +epochs=800, 256 slices. "
        "Deviations: h is the backbone's own, there a linear layer to 512 entries of it; the learning rate ends at 0, "
        "there at 1e-3.",
        objective={"name": "lejepa", "sigreg_weight": 0.02, "slices": 256}, head="lejepa",
        views={"num_views": 4, "blur_probability": 0.5, "solarize_probability": 0.2},
        training=training(800.0, 256, 2e-3, 0.05, warmup_epochs=1.0),
    ),
    "dcl": _DCL,
    "dclw": _DCL.but("DCLW", "dclw.py beside it.", objective={"name": "dclw", "temperature": 0.1}),
    "align_uniform": Preset(
        line="Alignment and uniformity, STL-10, a small AlexNet",
        source="ssnl/align_uniform examples/stl10/main.py; arXiv 2005.10242. Deviations: it drops the learning rate by "
        "ten at epochs 155, 170 and 185, here it falls along a cosine.",
        objective={"name": "align_uniform", "exponent": 2.0, "kernel_scale": 2.0},
        head="linear", head_options={"bias": True}, out_dim=128,
        views={"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.4, "color_jitter_probability": 1.0,
               "blur_probability": 0.0},
        training=training(200.0, 768, 0.36, 1e-4, warmup_epochs=0.0, **SGD),
    ),
}  # fmt: skip


_BERT_BASE: Settings = {"name": "google-bert/bert-base-uncased"}
_BACKBONES: dict[str, Settings | None] = {  # where it is not a ResNet-50
    "moco_v3": {"name": "timm/vit_small_patch16_224", "pretrained": False, "dynamic_img_size": True},
    "dino": {"name": "timm/vit_small_patch16_224", "pretrained": False, "dynamic_img_size": True},
    "lejepa": {"name": "timm/vit_small_patch8_224", "pretrained": False, "img_size": 128},
    "zero_cl": RESNET_18, "zero_cl_instance": RESNET_18, "w_mse": RESNET_18, "zero_cl_cifar": CIFAR_RESNET_18,
    "supcon": CIFAR_RESNET_50, "simcse_unsupervised": _BERT_BASE, "simcse_supervised": _BERT_BASE,
    "siglip": None, "align_uniform": None,
}  # fmt: skip
PUBLISHED: dict[str, Preset] = {
    name: replace(preset, backbone=_BACKBONES.get(name, RESNET_50)) for name, preset in _PUBLISHED.items()
}


def _solo(title: str, file: str, learning_rate: float, weight_decay: float, *, note: str = "",
          optimizer: Settings = SOLO_LARS, **others: Any) -> Preset:  # fmt: skip
    source = f"vturrisi/solo-learn (9187ea3), scripts/pretrain/cifar/{file}.yaml."
    if others["views"] is SOLO_ASYMMETRIC_VIEWS:
        note = f"{note} {SOLO_ASYMMETRIC_NOTE}"
    return Preset(
        line=f"{title} on CIFAR, solo-learn",
        backbone=CIFAR_RESNET_18,
        source=f"{source} {note.strip()}".strip(),
        training=training(1000.0, 256, learning_rate, weight_decay, **optimizer, **others.pop("schedule", {})),
        **others,
    )


CIFAR: dict[str, Preset] = {
    "simclr_cifar": _solo(
        "SimCLR", "simclr", 0.4, 1e-4,
        objective={"name": "nt_xent", "temperature": 0.2}, head="simclr_solo", views=SOLO_VIEWS,
    ),
    "byol_cifar": _solo(
        "BYOL", "byol", 1.0, 1e-5,
        objective={"name": "byol", "ema_momentum": (0.99, 1.0)}, head="byol", predictor={"head": "byol_predictor"},
        views=SOLO_ASYMMETRIC_VIEWS,
    ),
    "simsiam_cifar": _solo(
        "SimSiam", "simsiam", 0.5, 1e-5, optimizer=SGD, schedule={"fixed_predictor_rate": True},
        note="solo-learn sums the loss over both directions; here, as officially, it is their mean.",
        objective={"name": "simsiam"}, head="simsiam", head_options={"hidden_dim": 2048},
        predictor={"head": "simsiam_predictor"}, views=SOLO_WEAK_VIEWS,
    ),
    "barlow_twins_cifar": _solo(
        "Barlow Twins", "barlow", 0.3, 1e-4,
        objective={"name": "barlow_twins", "scale": 0.1}, head="barlow_twins",
        head_options={"hidden_dim": 2048}, out_dim=2048, views=SOLO_ASYMMETRIC_VIEWS,
    ),
    "vicreg_cifar": _solo(
        "VICReg", "vicreg", 0.3, 1e-4,
        note="The variance term is the sum over the views, as in its losses/vicreg.py.",
        objective={"name": "vicreg", "variance_reduction": "sum"}, head="vicreg", head_options={"hidden_dim": 2048},
        out_dim=2048, views={**SOLO_ASYMMETRIC_VIEWS, "scale": (0.2, 1.0)},  # its own yaml, the same in both views
    ),
    "moco_v2_plus_cifar": _solo(
        "MoCo v2+", "mocov2plus", 0.3, 1e-4, optimizer=SGD,
        objective={
            "name": "moco", "temperature": 0.2, "queue_size": 32768, "symmetric": True, "ema_momentum": (0.99, 0.999),
        },
        head="moco", head_options={"hidden_dim": 2048}, out_dim=256, views=SOLO_WEAK_VIEWS,
    ),
    "swav_cifar": _solo(
        "SwAV", "swav", 0.6, 1e-6,
        objective={
            "name": "swav", "queue_size": 3840, "queue_start_epoch": 50.0, "freeze_prototypes_epochs": 2.0,
        },
        head="swav", prototypes=3000, views=SOLO_VIEWS,
    ),
    "w_mse_cifar": _solo(
        "W-MSE", "wmse", 2e-3, 1e-6, optimizer={},
        objective={"name": "w_mse", "w_size": 128}, head="wmse", views={"scale": (0.2, 1.0), "blur_probability": 0.0},
    ),
    "supcon_cifar": _solo(
        "SupCon", "supcon", 0.4, 1e-5, optimizer=SGD,
        objective={"name": "supcon", "temperature": 0.2}, head="supcon", head_options={"hidden_dim": 2048}, out_dim=256,
        views=SOLO_VIEWS,
    ),
    "nnclr_cifar": _solo(
        "NNCLR", "nnclr", 0.4, 1e-5,
        objective={"name": "nnclr", "temperature": 0.2, "queue_size": 65536}, head="nnclr",
        predictor={"head": "nnclr_predictor"}, views=SOLO_ASYMMETRIC_VIEWS,
    ),
    "moco_v3_cifar": _solo(
        "MoCo v3", "mocov3", 0.3, 1e-6, note="Projector and predictor are those for a ResNet.",
        objective={"name": "moco_v3", "temperature": 0.2, "ema_momentum": (0.99, 1.0)}, head="moco_v3",
        head_options={"depth": 2}, predictor={"head": "moco_v3_predictor", "last_norm": None},
        views=SOLO_ASYMMETRIC_VIEWS,
    ),
    "dino_cifar": _solo(
        "DINO", "dino", 0.3, 1e-6, schedule={"ema_momentum": 0.9995, "ema_momentum_end": 1.0},
        note="Teacher temperature: 0.04 to 0.07 over 30 epochs, as in the recommended official run.",
        objective={"name": "dino"}, head="dino", prototypes=4096, views=SOLO_ASYMMETRIC_VIEWS,
    ),
}  # fmt: skip
