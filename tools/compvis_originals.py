"""Builds modules of the original code for the configurations of a diffusers folder: the half of compvis.py that needs it.

A configuration that the original code has no setting for is refused. Where only a number differs that its constructors
hold fixed (groups of norms, heads by level, the width of a text encoder's hidden layer) it is set from outside, and said.
"""
import contextlib
import importlib
import io
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

import transformers
from torch import nn

LDM, SD1, SD2 = "latent-diffusion", "stable-diffusion", "stablediffusion"
# The originals take the running resolution from a configuration, to know in which levels to attend.
RESOLUTION = 256


def fail(message):
    sys.exit(f"compvis: {message}")


def note(message):
    print(f"set   {message}")


def stand_in(name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


class Originals:
    """Imports modules `ldm.*` of one repository at a time: the repositories use the same names."""

    def __init__(self, folder):
        self.folder, self.used = Path(folder), None
        stand_in("pytorch_lightning", LightningModule=nn.Module)
        stand_in("pytorch_lightning.utilities")
        stand_in("pytorch_lightning.utilities.distributed", rank_zero_only=lambda function: function)
        stand_in("clip")
        stand_in("kornia")
        sys.path.append(str(self.checkout("taming-transformers")))

    def checkout(self, repository):
        path = self.folder / repository
        if not path.is_dir():
            fail(f"{path}: no such folder; check the repository of that name out there (see --help)")
        return path

    def use(self, repository):
        path = self.checkout(repository)
        if self.used:
            sys.path.remove(str(self.used))
        for name in [n for n in sys.modules if n == "ldm" or n.startswith("ldm.")]:
            del sys.modules[name]
        sys.path.insert(0, str(path))
        self.used = path

    def module(self, name):
        return importlib.import_module("ldm." + name)


@contextlib.contextmanager
def quiet():
    """The originals print as they build."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def clip_is(make):
    """CLIP's text encoder as `make` makes it, in place of one that is downloaded. Its tokenizer is not used."""
    with contextlib.ExitStack() as stack:
        for kind, give in ((transformers.CLIPTextModel, make), (transformers.CLIPTokenizer, lambda: None)):
            stack.enter_context(mock.patch.object(kind, "from_pretrained", lambda *_a, _give=give, **_k: _give()))
        yield


@contextlib.contextmanager
def open_clip_is(make):
    import open_clip

    with mock.patch.object(open_clip, "create_model_and_transforms", lambda arch, **_k: (make(arch), None, None)):
        yield


def fixed(config, **values):
    """What the originals have no setting for."""
    for key, value in values.items():
        if config.get(key, value) != value:
            fail(f"the original code cannot express {key} = {config[key]!r}, only {value!r}")


def multiples(widths):
    if any(width % widths[0] for width in widths):
        fail(f"the original code cannot express the widths {widths}: want multiples of the first")
    return [width // widths[0] for width in widths]


def attending(config):
    """Which levels attend, from the finest down."""
    down, up = (["Attn" in kind for kind in config[f"{side}_block_types"]] for side in ("down", "up"))
    if down != up[::-1]:
        fail(f"the original code cannot express attention on other levels up ({up}) than down ({down})")
    return down


@contextlib.contextmanager
def groups_of(config, *sites):
    """Norms with the configuration's number of groups."""
    groups = config.get("norm_num_groups", 32)
    with contextlib.ExitStack() as stack:
        if groups != 32:
            note(f"norms of {groups} groups")
            for module, name in sites:
                example = getattr(module, name)(32)

                def norm(channels, kind=type(example), eps=example.eps):
                    return kind(groups, channels, eps=eps)

                stack.enter_context(mock.patch.object(module, name, norm))
        yield


def original_unet(originals, config):
    """`UNetModel`, of latent-diffusion, or of stablediffusion where projections are linear."""
    plain = config["_class_name"] == "UNet2DModel"
    fixed(config, norm_eps=1e-5, act_fn="silu", flip_sin_to_cos=True, freq_shift=0, downsample_padding=1, dropout=0.0)
    fixed(config, mid_block_scale_factor=1, center_input_sample=False, class_embed_type=None, add_attention=True)
    resample = config.get("downsample_type", "conv")
    fixed(config, upsample_type=resample)
    widths, count, attends = config["block_out_channels"], config["layers_per_block"], attending(config)
    setting = config.get("attention_head_dim")
    if plain:  # the size of a head
        heads = [width // setting if setting else 1 for width in widths]
    else:  # their number
        heads = setting if isinstance(setting, list) else [setting] * len(widths)
    # The middle always attends.
    used = {(h, w // h) for h, w, a in zip(heads, widths, attends[:-1] + [True]) if a}
    settings, by_level = {"num_heads": 1}, False
    if len({number for number, _ in used}) == 1:
        settings = {"num_heads": min(used)[0]}
    elif len({size for _, size in used}) == 1:
        settings = {"num_head_channels": min(used)[1], "legacy": plain}
    else:
        by_level = True
        note(f"heads by level: {heads}")
    if not plain:
        depth, context = config.get("transformer_layers_per_block", 1), config["cross_attention_dim"]
        settings |= dict(use_spatial_transformer=True, transformer_depth=depth, context_dim=context)
    if config.get("use_linear_projection"):
        settings |= dict(use_linear_in_transformer=True)
    if config.get("num_class_embeds"):
        settings |= dict(num_classes=config["num_class_embeds"])
    originals.use(SD2 if config.get("use_linear_projection") else LDM)
    module, attention = originals.module("modules.diffusionmodules.openaimodel"), originals.module("modules.attention")
    with groups_of(config, (module, "normalization"), (attention, "Normalize")), quiet():
        unet = module.UNetModel(
            image_size=config["sample_size"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            model_channels=widths[0],
            channel_mult=multiples(widths),
            num_res_blocks=count,
            attention_resolutions=[2**level for level, a in enumerate(attends) if a],
            use_scale_shift_norm=config.get("resnet_time_scale_shift") == "scale_shift",
            resblock_updown=resample == "resnet",
            **settings,
        )
    if by_level:
        set_heads(unet, heads, count)
    return unet


def set_heads(unet, heads, count):
    """No tensor's shape depends on the number of heads."""
    for name, module in unet.named_modules():
        side, *rest = name.split(".")
        level = -1
        if side == "input_blocks" and rest:
            level = (int(rest[0]) - 1) // (count + 1)
        elif side == "output_blocks" and rest:
            level = -1 - int(rest[0]) // (count + 1)
        if type(module).__name__ == "CrossAttention":
            module.heads = heads[level]
            module.scale = (module.to_q.out_features // heads[level]) ** -0.5
        elif type(module).__name__ == "QKVAttentionLegacy":
            module.n_heads = heads[level]


def original_first_stage(originals, config):
    """`AutoencoderKL` or `VQModelInterface` of latent-diffusion."""
    vq = config["_class_name"] == "VQModel"
    fixed(config, act_fn="silu", use_quant_conv=True, use_post_quant_conv=True, norm_type="group", lookup_from_codebook=False)
    widths, z = config["block_out_channels"], config["latent_channels"]
    ddconfig = dict(
        double_z=not vq,
        z_channels=z,
        resolution=RESOLUTION,
        in_channels=config["in_channels"],
        out_ch=config["out_channels"],
        ch=widths[0],
        ch_mult=multiples(widths),
        num_res_blocks=config["layers_per_block"],
        attn_resolutions=[RESOLUTION >> level for level, a in enumerate(attending(config)) if a],
        attn_type="vanilla" if config.get("mid_block_add_attention", True) else "none",
    )
    settings = dict(ddconfig=ddconfig, lossconfig={"target": "torch.nn.Identity"}, embed_dim=z)
    if vq:
        settings |= dict(embed_dim=config.get("vq_embed_dim") or z, n_embed=config["num_vq_embeddings"])
    originals.use(LDM)
    module, layers = originals.module("models.autoencoder"), originals.module("modules.diffusionmodules.model")
    with groups_of(config, (layers, "Normalize")), quiet():
        return (module.VQModelInterface if vq else module.AutoencoderKL)(**settings)


def original_bert(originals, config):
    """`BERTEmbedder` of latent-diffusion, which is given tokens."""
    fixed(config, activation_function="gelu", scale_embedding=False)
    originals.use(LDM)
    width, depth, length = config["d_model"], config["encoder_layers"], config["max_position_embeddings"]
    heads, size, hidden = config["encoder_attention_heads"], config["head_dim"], config["encoder_ffn_dim"]
    vocabulary = config["vocab_size"]
    with quiet():
        made = originals.module("modules.encoders.modules").BERTEmbedder(
            width, depth, vocab_size=vocabulary, max_seq_len=length, device="cpu", use_tokenizer=False
        )
    if (heads, size, hidden) != (8, 64, 4 * width):
        note(f"bert: {heads} heads of {size}, {hidden} hidden")
        x = originals.module("modules.x_transformer")
        # The hidden width is int(width * multiple).
        layers = x.Encoder(dim=width, depth=depth, heads=heads, attn_dim_head=size, ff_mult=(hidden + 0.5) / width)
        made.transformer = x.TransformerWrapper(num_tokens=vocabulary, max_seq_len=length, attn_layers=layers)
    return made


def original_clip(originals, config):
    """`FrozenCLIPEmbedder` of stable-diffusion: transformers' own model, below its names."""
    originals.use(SD1)
    with quiet(), clip_is(lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))):
        return originals.module("modules.encoders.modules").FrozenCLIPEmbedder(device="cpu")


def original_open_clip(originals, config, part):
    """`FrozenOpenCLIPEmbedder` of stablediffusion, with as many layers as the file's tensors `part` have."""
    from open_clip import model as clip
    from open_clip.transformer import QuickGELU, Transformer

    width, heads, hidden = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    fixed(config, layer_norm_eps=1e-5)
    if config["hidden_act"] not in ("gelu", "quick_gelu"):
        fail(f"OpenCLIP cannot express hidden_act = {config['hidden_act']!r}")
    layers = 1 + max((int(key.split(".")[3]) for key in part if key.startswith("model.transformer.resblocks.")), default=-1)
    # Published files have a layer more than is used.
    layer = "penultimate" if layers == config["num_hidden_layers"] + 1 else "last"
    print(f"OpenCLIP: {layers} layers in the file, {config['num_hidden_layers']} in the folder: layer={layer!r}")
    text = clip.CLIPTextCfg(config["max_position_embeddings"], config["vocab_size"], width, heads, layers)
    vision = clip.CLIPVisionCfg(layers=1, width=64, patch_size=32, image_size=32)
    quick, projection = config["hidden_act"] == "quick_gelu", part.get("model.text_projection")
    made = clip.CLIP(width if projection is None else projection.shape[1], vision, text, quick_gelu=quick)
    if hidden != 4 * width:
        note(f"OpenCLIP: {hidden} hidden")
        act = QuickGELU if quick else nn.GELU
        made.transformer = Transformer(width, layers, heads, mlp_ratio=(hidden + 0.5) / width, act_layer=act)
    originals.use(SD2)
    with quiet(), open_clip_is(lambda _: made):
        return originals.module("modules.encoders.modules").FrozenOpenCLIPEmbedder(device="cpu", layer=layer)


def original_schedule(originals, config):
    """The buffers that `DDPM` of latent-diffusion registers."""
    kinds = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
    if config["beta_schedule"] not in kinds:
        fail(f"the original code cannot express beta_schedule = {config['beta_schedule']!r}")
    fixed(config, rescale_betas_zero_snr=False, trained_betas=None)
    originals.use(LDM)
    host = nn.Module()
    host.v_posterior, host.parameterization = 0.0, "eps"
    originals.module("models.diffusion.ddpm").DDPM.register_schedule(
        host,
        beta_schedule=kinds[config["beta_schedule"]],
        timesteps=config["num_train_timesteps"],
        linear_start=config["beta_start"],
        linear_end=config["beta_end"],
    )
    return host.state_dict()
