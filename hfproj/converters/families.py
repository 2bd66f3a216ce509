"""The families of official checkpoints: which keys are which part, what is left out, and where that was read.

In a :class:`Layout`, ``{network}`` stands for the network that is read and ``{own}`` for what its keys begin with.

Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230; facebookresearch/barlowtwins 046eec3 ``main.py``):
    ``checkpoint.pth`` is ``{"epoch", "model", "optimizer"}``. Left out: ``bn``, the BatchNorm without parameters
    behind z; it belongs to the loss, which normalises z by the statistics of the batch.

BYOL (Grill et al. 2020, arXiv 2006.07733; ports):
    yaox12/BYOL-PyTorch (edefc01) ``model/basic_modules.py``, ``byol_model.py``, ``trainer/byol_trainer.py``:
    ``{"model": {"online_network.*", "target_network.*", "predictor.*"}}``, ``encoder.4.…`` are the children of a
    ResNet in their order, the projector is spelled ``projetion``, both views run at once, so that its BatchNorm is
    joint over them. lucidrains/byol-pytorch (0095aa4) ``byol_pytorch/byol_pytorch.py``: the state dict, of any
    network, of which a ResNet is read; with ``use_momentum=False`` it has SimSiam's projector. The target network has
    no predictor. Left out: in lucidrains' the second copy ``net`` of the online network and the classifier ``fc``
    behind the layer that is read. DeepMind's own files are pickles of JAX arrays and are not read; yaox12's released
    file is of an older layout whose names its code does not show.

DINO (Caron et al. 2021, arXiv 2104.14294; facebookresearch/dino 04c0ad9 ``vision_transformer.py``, ``main_dino.py``):
    ``{"student", "teacher", "optimizer", "epoch", "args", "dino_loss"}``, keys ``module.backbone.*`` and
    ``module.head.*`` (of a ViT's teacher without ``module.``). The head is the MLP up to the bottleneck, z of width
    256, run once on all crops. Its weight-normalised last layer is the adapter's prototypes: with ẑ = z/‖z‖ the
    official logits are g_j ⟨v_j/‖v_j‖, ẑ⟩, our scores. Where all g are 1 (``norm_last_layer``) the adapter has no
    lengths. BatchNorm in the head (``use_bn_in_head``) is read where it is there. Left out: the centre of the loss (in
    ``dino_loss``), which a new training estimates again.

DINOv2, checkpoints of training (Oquab et al. 2023, arXiv 2304.07193; facebookresearch/dinov2
``dinov2/layers/dino_head.py`` 05c66df, ``models/vision_transformer.py`` 027a9ac, ``train/ssl_meta_arch.py`` 0239fd0,
``train/train.py`` 02eb93a):
    ``{"teacher": {"backbone.*", "dino_head.*", "ibot_head.*"}}``, or the whole model's state dict; the released
    backbones have no head. As DINO, with ``dino_head`` on the class token. ``ibot_head`` (of a run with
    ``ibot.separate_head``), trained on each patch token, is read instead with ``head="ibot_head"``; h of that adapter
    is the mean patch token, and its head by itself takes any of them. Blocks that are chunked for FSDP are counted
    through; register tokens take no position, so that the class token's is added to it, as timm has it; SwiGLU's
    ``w12`` and ``w3`` are timm's ``fc1`` and ``fc2``. Files of ``FSDPCheckpointer`` (``model_….rank_0.pth``) hold
    shards of one process each: use the ``teacher_checkpoint.pth`` that evaluation writes.

DirectCLR and its baselines (Jing et al. 2021, arXiv 2110.09348; facebookresearch/directclr 48399f4
``directclr/main.py``):
    ``checkpoint.pth`` is ``{"epoch", "model", "optimizer"}``, the final file ``{"backbone", "head"}`` with the
    classifier as head. z is the first d0 entries of h, unless the file has a projector (modes ``simclr`` and
    ``single``). Without one nothing tells d0: give the ``--dim`` of training as ``d0`` (its default there is 360;
    ``baseline`` is the width of h). Left out: ``online_head``, a classifier that was trained on labels beside.

MoCo v1, v2 (He et al. 2019, arXiv 1911.05722; Chen et al. 2020, arXiv 2003.04297; facebookresearch/moco 4397a04
``moco/builder.py``, ``main_moco.py``):
    ``{"state_dict": {"module.encoder_q.*", "module.encoder_k.*", "module.queue", "module.queue_ptr"}}``. A ResNet
    whose ``fc`` is the head, to 128: v1 one linear layer, v2 (``--mlp``) Linear-ReLU-Linear with biases.

MoCo v3 (Chen, Xie, He 2021, arXiv 2104.02057; facebookresearch/moco-v3 ``moco/builder.py`` 0c5d00a, ``vits.py``
1c6b717, ``main_moco.py`` 02655ae):
    ``{"state_dict": {"module.base_encoder.*", "module.momentum_encoder.*", "module.predictor.*"}}``. ResNet: ``fc`` of
    two layers; ViT: ``head`` of three; no biases, the last BatchNorm without scale and shift. The predictor has two
    layers; that of a ResNet has a last BatchNorm in files of early versions only; the momentum encoder has none. Its
    ViT-S has 12 attention heads, where others have 6: no shape shows that. Fixed sine positions are stored, and read
    like learned ones.

SimCLR v1, ports that train themselves (Chen et al. 2020, arXiv 2002.05709):
    Spijkervet/SimCLR (b844b01) ``simclr/simclr.py``, ``model.py``: the state dict itself, a projector without biases
    or norms. sthalles/SimCLR (081e55b) ``models/resnet_simclr.py`` (the line of the head is a comment there),
    ``simclr.py``: ``{"state_dict"}``, a backbone whose ``fc`` is Linear-ReLU-Linear with biases.

SimCLR v2 (Chen et al. 2020, arXiv 2006.10029; Separius/SimCLRv2-Pytorch 46ad293 ``convert.py``, which makes it of
Google's TensorFlow files; its ``resnet.py`` as copied in kaipak/SimCLRv2-PyTorch 126a5b4
``simclr/modules/resnet_v2.py``):
    ``{"resnet", "head"}``: three layers without biases and with BatchNorm over both views, the last without shift (the
    port keeps one of zeros), and a ResNet with names of its own. Networks with selective kernels or of another width
    are in no library: the head alone can be read with ``backbone=hfproj.FeatureBackbone(width)``. Left out: the linear
    classifier ``fc``. tonylins/simclr-converter (59bee34) ``convert.py`` keeps no head, so there is nothing to
    convert.

SimSiam (Chen, He 2020, arXiv 2011.10566; facebookresearch/simsiam 39ac33e ``simsiam/builder.py``, ``main_simsiam.py``):
    ``{"state_dict": {"module.encoder.*", "module.encoder.fc.*", "module.predictor.*"}}``. The last linear layer of the
    projector has a bias that the official code freezes, since the BatchNorm behind it (without scale and shift)
    cancels it. It is kept: in eval mode the running mean holds it.

SwAV, and DeepCluster-v2 of the same repository (Caron et al. 2020, arXiv 2006.09882; facebookresearch/swav 04b8f43
``src/resnet50.py``, ``main_swav.py``):
    A release is the state dict, a checkpoint of training has it below ``state_dict``. z is the output of
    ``projection_head``, before it is scaled to unit length; scores are cosines, since training scales the prototypes
    to unit length before each step (the file holds them as the last step left them, near that). Several blocks of
    prototypes (``prototypes.prototypes0``, … of DeepCluster-v2) follow one another in one. Crops of all sizes go
    through the head at once, so its BatchNorm is joint over views.

VICReg (Bardes, Ponce, LeCun 2021, arXiv 2105.04906; facebookresearch/vicreg ``main_vicreg.py`` 08c8c0c, ``resnet.py``
373b81c):
    ``{"epoch", "model", "optimizer"}``. The last layer of the expander has no bias. Its ResNet pads before and in the
    first convolution, 3 pixels together, which is torchvision's.
"""

from dataclasses import replace

from hfproj.converters.family import Family, Layout
from hfproj.converters.mlp import MLP

_LINEAR, _TWO = MLP(names=("",)), MLP(max_depth=2)
_BYOL = MLP(norm=True, names=("l1", "bn1", "", "l2"), batch_statistics="joint")
_LAST_NORM = MLP(bias=False, norm=True, last_bias=False, last_norm=True, last_affine=False, min_depth=3, max_depth=3)
_MOCO_V3 = replace(_LAST_NORM, min_depth=2, max_depth=2)
_DINO = (
    MLP(activation="gelu", init="trunc_normal"),
    MLP(norm=True, activation="gelu", init="trunc_normal", batch_statistics="joint"),
    _LINEAR,
)
_CHILDREN = ((r"^0\.", "conv1."), (r"^1\.", "bn1."), *((rf"^{i + 3}\.", f"layer{i}.") for i in range(1, 5)))
_RESNET_V2 = (
    (r"^net\.0\.0\.", "conv1."),
    (r"^net\.0\.1\.0\.", "bn1."),
    *((rf"^net\.(\d+)\.blocks\.(\d+)\.{theirs}\.", rf"layer\1.\2.{ours}.") for theirs, ours in (
        (r"net\.0", "conv1"), (r"net\.1\.0", "bn1"), (r"net\.2", "conv2"), (r"net\.3\.0", "bn2"), (r"net\.4", "conv3"),
        (r"net\.5\.0", "bn3"), (r"projection\.shortcut", "downsample.0"), (r"projection\.bn\.0", "downsample.1"),
    )),
)  # fmt: skip
_VIT_V2 = (
    (r"^blocks\.\d+\.(\d+\..*)mlp\.w12\.", r"blocks.\1mlp.fc1."),
    (r"^blocks\.\d+\.(\d+\..*)mlp\.w3\.", r"blocks.\1mlp.fc2."), (r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"),
    (r"^(blocks\.\d+\.mlp\.)w12\.", r"\1fc1."), (r"^(blocks\.\d+\.mlp\.)w3\.", r"\1fc2."),
)  # fmt: skip


def _by_64(width: int) -> int | None:
    return width // 64 if width % 64 == 0 else None


_MOCO = Layout(
    inside="state_dict", own="encoder_{network[0]}.", backbone="{own}", head="{own}fc.",
    ignored={"queue": "keys of past batches"},
)  # fmt: skip
_V3 = Layout(inside="state_dict", own="{network}_encoder.", backbone="{own}", head="{own}head.",
             structures=(_LAST_NORM,), predictor="predictor.", predictor_structures=(_MOCO_V3,))  # fmt: skip
_DIRECT = Layout(inside="model", backbone="backbone.", fixed="subvector", ignored={"online_head.": "trained on labels"})
_DINOV2 = Layout(
    inside="{network}", backbone="{own}backbone.", head="{own}{head}.mlp.", structures=_DINO,
    prototypes="{own}{head}.last_layer.", rows="weight_v", rename=_VIT_V2,
    ignored={"{own}{other_head}.": "of head={other_head!r}",
             "{own}backbone.mask_token": "of masked patches, which h has none of"},
)  # fmt: skip

FAMILIES = {family.name: family for family in (
    Family(
        "barlow_twins", "Barlow Twins (ResNet-50): three layers without biases", "facebookresearch/barlowtwins",
        (Layout(inside="model", backbone="backbone.", head="projector.",
               structures=(MLP(bias=False, norm=True, last_bias=False),), ignored={"bn.": "of the loss"}),),
        full_file="checkpoint.pth ('full checkpoint')",
    ),
    Family(
        "byol", "BYOL, PyTorch ports (ResNet): two layers, predictor", "yaox12/BYOL-PyTorch, lucidrains/byol-pytorch",
        (Layout(inside="model", own="{network}_network.", backbone="{own}encoder.", head="{own}projetion.",
               structures=(_BYOL,), predictor="predictor.predictor.", predictor_structures=(_BYOL,), rename=_CHILDREN),
        Layout(own="{network}_encoder.", backbone="{own}net.", head="{own}projector.",
               structures=(MLP(norm=True, max_depth=2), _LAST_NORM),
               predictor="online_predictor.", predictor_structures=(MLP(norm=True, max_depth=2),),
               ignored={"net.": "a second copy of the online network",
                        "{own}net.fc.": "behind the layer that is read"})),
        networks=("online", "target"),
    ),
    Family(
        "dino", "DINO (ViT, ResNet-50): MLP to the bottleneck, weight-normalised last layer as prototypes",
        "facebookresearch/dino",
        (Layout(inside="{network}", backbone="backbone.", head="head.mlp.", structures=_DINO,
               prototypes="head.last_layer.", rows="weight_v"),),
        networks=("teacher", "student"), num_heads=_by_64,
        timm_ids={
            (384, 12, 16): "vit_small_patch16_224.dino", (384, 12, 8): "vit_small_patch8_224.dino",
            (768, 12, 16): "vit_base_patch16_224.dino", (768, 12, 8): "vit_base_patch8_224.dino",
        },
        full_file="dino_…_pretrain_full_checkpoint.pth",
    ),
    Family(
        "dinov2", "DINOv2, checkpoints of training: dino_head or ibot_head, last layer as prototypes",
        "facebookresearch/dinov2",
        (_DINOV2,
         replace(_DINOV2, inside="model", own="{network}.",
                 ignored={**_DINOV2.ignored,
                          **dict.fromkeys(("dino_loss.", "ibot_patch_loss.", "koleo_loss."), "of the loss")})),
        networks=("teacher", "student"), num_heads=_by_64, options={"head": ("dino_head", "ibot_head")},
        full_file="teacher_checkpoint.pth of a training run (the released backbones have no head)",
    ),
    Family(
        "directclr", "DirectCLR (ResNet-50): the first d0 entries of h, or a projector of its baselines",
        "facebookresearch/directclr",
        (_DIRECT,
         replace(_DIRECT, fixed="", head="projector.",
                 structures=(replace(_MOCO_V3, last_affine=True), replace(_LINEAR, last_bias=False))),
         replace(_DIRECT, inside="", ignored={"head.": "trained on labels"})),
        options={"d0": 360},
    ),
    Family("moco_v1", "MoCo v1 (ResNet): one linear layer", "facebookresearch/moco",
           (replace(_MOCO, structures=(_LINEAR,)),), networks=("query", "key")),
    Family("moco_v2", "MoCo v2 (ResNet): two layers, no norm", "facebookresearch/moco",
           (replace(_MOCO, structures=(_TWO,)),), networks=("query", "key")),
    Family(
        "moco_v3", "MoCo v3 (ViT, ResNet-50): BatchNorm in every layer, predictor", "facebookresearch/moco-v3",
        (_V3,
         replace(_V3, head="{own}fc.", structures=(_MOCO_V3,),
                 predictor_structures=(replace(_MOCO_V3, last_norm=False), _MOCO_V3))),
        networks=("base", "momentum"), num_heads={384: 12, 768: 12, 1024: 16, 1280: 16}.get,
    ),
    Family(
        "simclr", "SimCLR v1, PyTorch ports (ResNet): two layers, no norm", "Spijkervet/SimCLR, sthalles/SimCLR",
        (Layout(backbone="encoder.", head="projector.", structures=(replace(_TWO, bias=False, last_bias=False),)),
        Layout(inside="state_dict", backbone="backbone.", head="backbone.fc.", structures=(_TWO,))),
    ),
    Family(
        "simclr_v2", "SimCLR v2 of Google by a PyTorch port (ResNet): three layers, BatchNorm over both views",
        "Separius/SimCLRv2-Pytorch",
        (Layout(backbone="resnet.", head="head.layers.", rename=_RESNET_V2, ignored={"resnet.fc.": "trained on labels"},
               structures=(MLP(bias=False, norm=True, last_bias=False, last_norm=True, last_shift=False,
                               batch_statistics="joint"),)),),
        full_file="the converter's file with 'resnet' and 'head'",
    ),
    Family(
        "simsiam", "SimSiam (ResNet): three layers, last BatchNorm without parameters, predictor",
        "facebookresearch/simsiam",
        (Layout(inside="state_dict", backbone="encoder.", head="encoder.fc.",
               structures=(replace(_LAST_NORM, last_bias=True),),
               predictor="predictor.", predictor_structures=(MLP(bias=False, norm=True, max_depth=2),)),),
    ),
    Family(
        "swav", "SwAV and DeepCluster-v2 (ResNet): two layers, prototypes", "facebookresearch/swav",
        (Layout(inside="state_dict", backbone="", head="projection_head.", prototypes="prototypes.",
               structures=(MLP(norm=True, max_depth=2, batch_statistics="joint"), _LINEAR)),),
    ),
    Family(
        "vicreg", "VICReg (ResNet): three layers, the last without bias", "facebookresearch/vicreg",
        (Layout(inside="model", backbone="backbone.", head="projector.",
                structures=(MLP(norm=True, last_bias=False),)),),
        full_file="resnet50_fullckpt.pth",
    ),
)}  # fmt: skip
