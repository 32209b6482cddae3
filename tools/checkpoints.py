#!/usr/bin/env python3
"""Checkpoints in diffusers' folder layout with random weights, for tests and timings (development only).

    pip install torch diffusers==0.37.1 transformers==4.57.6 safetensors
    python tools/checkpoints.py OUT                 every small one, to OUT/NAME
    python tools/checkpoints.py OUT --only NAME     that one alone; may be given several times

    sd15-tiny       Stable Diffusion 1.x: quick-GELU text encoder, 1x1 convolutions around attention, PNDM
    sd2-tiny        of 2.x: heads per level, linear projections, GELU, v-prediction, pad token "!"; three levels
    inpaint-tiny    a UNet with nine input channels: latents, mask, masked picture
    film-tiny       a UNet alone, in which the time embedding scales and shifts what the norms give
    vq4-tiny        a VQ autoencoder with factor 4, without a UNet
    kl-attn-tiny    a KL autoencoder with attention in its lower level, without a UNet
    ldm-tiny        the text-to-image model of 2022: its own text encoder, whose heads together are wider than its tokens
    uncond-ldm-tiny a UNet without a condition, with an autoencoder
    class-tiny      a UNet that is conditioned on four classes and a null class, as `ldm train` exports it
    upscale-tiny    super-resolution: a UNet that is given a smaller picture beside the latents of a VQ autoencoder
    sd15            Stable Diffusion 1.5 in full size, 4.3 GB; made only when named

The weights are made so that no mistake hides. Every tensor is drawn: there are no zero biases and no unit gains that a
forgotten addition or product would leave unpunished, and no normalised groups of a single channel, which would swallow
the biases and the time embedding before them. Queries and keys are wide, so that attention is far from a mean. The last
layers are scaled by a measured factor, so that errors are relative to outputs with a spread of about 1 (0.5 for
pictures). All draws come from a generator that the checkpoint's name seeds.

The tokenizer is that of tests/golden: a byte-level vocabulary of 1000 entries, whatever the size of the text encoder's
table; that of ldm-tiny has the letters and some words. tests/golden has sd2-tiny, inpaint-tiny, film-tiny, ldm-tiny,
class-tiny, kl-attn-tiny, uncond-ldm-tiny and upscale-tiny as made here; its sd15-tiny and vq4-tiny have the dimensions of those
here, but 32 groups (some of one channel) and weights drawn by an older script.
"""
import argparse
import json
import zlib
from pathlib import Path

import torch
from torch import nn

TOKENIZER = Path(__file__).resolve().parent.parent / "tests" / "golden" / "tokenizer"
PICTURE_CHANNELS = 3

# As in the configurations of the released checkpoints: enough for any sampler, whichever class the file names.
SCHEDULE = dict(
    num_train_timesteps=1000,
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    clip_sample=False,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
)
PNDM = ("PNDMScheduler", {})
DDIM = ("DDIMScheduler", {})
DDIM_V = ("DDIMScheduler", dict(prediction_type="v_prediction"))

TINY_TEXT = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=5, intermediate_size=37)
TINY_VAE = dict(widths=(32, 64), layers_per_block=1, norm_num_groups=16)

TINY_PICTURES = dict(
    scheduler=DDIM,
    unet=dict(
        widths=(16, 32), levels="x-", sample_size=8, layers_per_block=1, attention_head_dim=2, norm_num_groups=4
    ),
)

# Of a UNet's `levels`, one letter for each from the finest down, `x` has cross-attention and `-` has not.
RECIPES = {
    "sd15-tiny": dict(
        scheduler=PNDM,
        text=TINY_TEXT,
        unet=dict(
            widths=(32, 64),
            levels="-x",
            sample_size=32,
            layers_per_block=2,
            attention_head_dim=8,
            norm_num_groups=16,
        ),
        vae=TINY_VAE,
    ),
    "sd2-tiny": dict(
        scheduler=DDIM_V,
        pad="!",
        text=dict(
            hidden_size=48, num_attention_heads=6, num_hidden_layers=4, intermediate_size=100, hidden_act="gelu"
        ),
        unet=dict(
            widths=(32, 64, 96),
            levels="xx-",
            sample_size=16,
            layers_per_block=1,
            attention_head_dim=[2, 4, 3],
            norm_num_groups=8,
            use_linear_projection=True,
        ),
        vae=dict(widths=(32, 32, 64), layers_per_block=1, norm_num_groups=8),
    ),
    "inpaint-tiny": dict(
        pipeline="StableDiffusionInpaintPipeline",
        scheduler=PNDM,
        text=TINY_TEXT,
        unet=dict(
            widths=(32, 64),
            levels="xx",
            sample_size=16,
            in_channels=9,
            layers_per_block=1,
            attention_head_dim=4,
            norm_num_groups=16,
        ),
        vae=TINY_VAE,
    ),
    "film-tiny": dict(
        context=24,
        unet=dict(
            widths=(16, 32),
            levels="x-",
            sample_size=16,
            layers_per_block=1,
            attention_head_dim=2,
            norm_num_groups=4,
            resnet_time_scale_shift="scale_shift",
        ),
    ),
    "vq4-tiny": dict(
        vq=dict(
            widths=(32, 32, 64),
            layers_per_block=1,
            latent_channels=3,
            num_vq_embeddings=256,
            norm_num_groups=16,
        )
    ),
    "kl-attn-tiny": dict(
        kl=dict(widths=(16, 32), side=8, levels="-x", layers_per_block=1, latent_channels=4, norm_num_groups=8)
    ),
    "ldm-tiny": dict(
        bert=dict(d_model=24, encoder_layers=3, encoder_attention_heads=3, head_dim=16, encoder_ffn_dim=40),
        vae=dict(widths=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4),
        **TINY_PICTURES,
    ),
    "uncond-ldm-tiny": dict(
        scheduler=DDIM,
        without=dict(
            widths=(16, 32), levels="-x", sample_size=8, layers_per_block=1, attention_head_dim=8, norm_num_groups=4
        ),
        vae=dict(widths=(8, 16), layers_per_block=1, norm_num_groups=4),
    ),
    "class-tiny": dict(
        classes=["circle", "square", "triangle, delta", "ring"],
        embed_dim=24,
        vae=dict(widths=(8, 16), layers_per_block=1, norm_num_groups=4),
        **TINY_PICTURES,
    ),
    "upscale-tiny": dict(
        scheduler=DDIM,
        small=dict(
            widths=(8, 16),
            levels="-x",
            sample_size=16,
            in_channels=6,
            out_channels=3,
            layers_per_block=1,
            attention_head_dim=8,
            norm_num_groups=4,
        ),
        vq=dict(widths=(8, 16), layers_per_block=1, latent_channels=3, num_vq_embeddings=64, norm_num_groups=4),
    ),
    "sd15": dict(
        scheduler=PNDM,
        text=dict(
            hidden_size=768,
            num_attention_heads=12,
            num_hidden_layers=12,
            intermediate_size=3072,
            vocab_size=49408,
        ),
        unet=dict(
            widths=(320, 640, 1280, 1280), levels="xxx-", sample_size=64, layers_per_block=2, attention_head_dim=8
        ),
        vae=dict(widths=(128, 256, 512, 512), layers_per_block=2),
    ),
}
ONLY_WHEN_NAMED = {"sd15"}


def text_encoder(tokenizer, **settings):
    from transformers import CLIPTextConfig, CLIPTextModel

    defaults = dict(vocab_size=len(tokenizer), hidden_act="quick_gelu", projection_dim=settings["hidden_size"])
    specials = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(CLIPTextConfig(**{**defaults, **specials, **settings}))


def unet(context, widths, levels, **settings):
    from diffusers import UNet2DConditionModel

    prefix = ["CrossAttn" if letter == "x" else "" for letter in levels]
    return UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=[f"{p}DownBlock2D" for p in prefix],
        up_block_types=[f"{p}UpBlock2D" for p in reversed(prefix)],
        cross_attention_dim=context,
        **settings,
    )


def unet_without(widths, levels, in_channels=4, out_channels=4, **settings):
    from diffusers import UNet2DModel

    prefix = ["Attn" if letter == "x" else "" for letter in levels]
    return UNet2DModel(
        block_out_channels=widths,
        down_block_types=[f"{p}DownBlock2D" for p in prefix],
        up_block_types=[f"{p}UpBlock2D" for p in reversed(prefix)],
        in_channels=in_channels,
        out_channels=out_channels,
        **settings,
    )


def autoencoder(kind, widths, side, levels="", **settings):
    import diffusers

    prefix = ["Attn" if letter == "x" else "" for letter in levels or "-" * len(widths)]
    return getattr(diffusers, kind)(
        block_out_channels=widths,
        down_block_types=[f"{p}DownEncoderBlock2D" for p in prefix],
        up_block_types=[f"{p}UpDecoderBlock2D" for p in reversed(prefix)],
        in_channels=PICTURE_CHANNELS,
        out_channels=PICTURE_CHANNELS,
        sample_size=side << (len(widths) - 1),
        **settings,
    )


class Weights:
    """Draws the weights of models, and scales their last layers by what the models then put out."""

    NORMS = (nn.GroupNorm, nn.LayerNorm)
    WIDE = ("to_q", "to_k", "q_proj", "k_proj")

    def __init__(self, name):
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def picture(self, side):
        return torch.rand((1, PICTURE_CHANNELS, side, side), generator=self.generator) * 2 - 1

    def draw(self, path, module, name, shape):
        """One parameter: its mean, and its spread times noise."""
        mean, spread = 0.0, 0.1
        if name == "weight":
            if isinstance(module, self.NORMS):
                mean, spread = 1.0, 0.2
            elif isinstance(module, nn.Embedding):
                spread = 0.7
            else:
                gain = 1.5 if path.endswith(self.WIDE) else 1.0
                spread = gain / shape[1:].numel() ** 0.5
        return mean + spread * self.randn(*shape)

    def fill(self, model):
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.copy_(self.draw(path, module, name, parameter.shape))
        return model.eval()

    @staticmethod
    def rescale(layer, output, spread, channels=slice(None)):
        """Scales some output channels of a convolution, given what it put out, to a spread."""
        factor = spread / output[:, channels].std()
        layer.weight[channels] *= factor
        layer.bias[channels] *= factor

    def text(self, model):
        return self.fill(model)

    def unet(self, model):
        self.fill(model)
        x = self.randn(1, model.config.in_channels, 16, 16)
        width = getattr(model.config, "cross_attention_dim", None)
        context = [self.randn(1, 77, width)] if width else []
        self.rescale(model.conv_out, model(x, 500, *context).sample, 1.0)
        return model

    def decoder(self, model, latent_spread):
        z = latent_spread * self.randn(1, model.config.latent_channels, 16, 16)
        self.rescale(model.decoder.conv_out, model.decode(z).sample, 0.5)

    def kl(self, model):
        self.fill(model)
        z, latent_spread = model.config.latent_channels, 1 / model.config.scaling_factor
        moments = model.encode(self.picture(128)).latent_dist.parameters
        self.rescale(model.quant_conv, moments, latent_spread, slice(None, z))
        self.rescale(model.quant_conv, moments, 1.0, slice(z, None))
        self.decoder(model, latent_spread)
        return model

    def vq(self, model):
        """Codes as far apart as the latents are, or rounding would choose between them."""
        self.fill(model)
        codes = model.quantize.embedding.weight
        codes.copy_(self.randn(*codes.shape))
        self.rescale(model.quant_conv, model.encode(self.picture(128)).latents, 1.0)
        self.decoder(model, 1.0)
        return model


def check(name, model):
    """No parameter is constant, and all are finite."""
    for path, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all() or not parameter.std() > 0:
            raise SystemExit(f"{name}: {path} is constant or not finite")
    return model


def stable_diffusion(name, folder, recipe):
    import diffusers
    from transformers import CLIPTokenizer

    weights = Weights(name)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=recipe.get("pad", "<|endoftext|>"))
    text = weights.text(text_encoder(tokenizer, **recipe["text"]))
    net = weights.unet(unet(text.config.hidden_size, **recipe["unet"]))
    vae = weights.kl(autoencoder("AutoencoderKL", side=net.config.sample_size, latent_channels=4, **recipe["vae"]))
    scheduler, settings = recipe["scheduler"]
    pipeline = getattr(diffusers, recipe.get("pipeline", "StableDiffusionPipeline"))(
        tokenizer=tokenizer,
        text_encoder=check(name, text),
        unet=check(name, net),
        vae=check(name, vae),
        scheduler=getattr(diffusers, scheduler).from_config({**SCHEDULE, **settings}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def wordpiece(path):
    """Letters, digits and punctuation, letters inside a word, and some words and endings."""
    ascii_ = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = "an oil painting of light ##house above the storm sea blurry ##ing ##er tree 東 groß".split()
    inside = [f"##{c}" for c in ascii_ if c.isalnum()]
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ascii_, *inside, *words]) + "\n")


def pictures(name, folder, recipe, context):
    """UNet, autoencoder and scheduler of a pipeline."""
    import diffusers

    weights = Weights(name)
    net = weights.unet(unet(context, **recipe["unet"]) if context else unet_without(**recipe["without"]))
    vae = weights.kl(autoencoder("AutoencoderKL", side=net.config.sample_size, latent_channels=4, **recipe["vae"]))
    scheduler, settings = recipe["scheduler"]
    made = getattr(diffusers, scheduler).from_config({**SCHEDULE, **settings})
    return dict(unet=check(name, net), vae=check(name, vae), scheduler=made)


def text_to_image(name, folder, recipe):
    from diffusers import LDMTextToImagePipeline
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    wordpiece(folder / "vocab.txt")
    tokenizer = BertTokenizer(folder / "vocab.txt", model_max_length=512)
    (folder / "vocab.txt").unlink()
    bert = LDMBertModel(LDMBertConfig(vocab_size=len(tokenizer), **recipe["bert"]))
    bert = check(name, Weights(name + "-bert").text(bert))
    parts = pictures(name, folder, recipe, recipe["bert"]["d_model"])
    LDMTextToImagePipeline(vqvae=parts.pop("vae"), bert=bert, tokenizer=tokenizer, **parts).save_pretrained(folder)


def unconditional(name, folder, recipe):
    from diffusers import LDMPipeline

    parts = pictures(name, folder, recipe, None)
    LDMPipeline(vqvae=parts.pop("vae"), **parts).save_pretrained(folder)


def super_resolution(name, folder, recipe):
    import diffusers

    weights = Weights(name)
    net = weights.unet(unet_without(**recipe["small"]))
    vq = weights.vq(autoencoder("VQModel", side=net.config.sample_size, **recipe["vq"]))
    scheduler, settings = recipe["scheduler"]
    made = getattr(diffusers, scheduler).from_config({**SCHEDULE, **settings})
    parts = dict(vqvae=check(name, vq), unet=check(name, net), scheduler=made)
    diffusers.LDMSuperResolutionPipeline(**parts).save_pretrained(folder)


def class_to_image(name, folder, recipe):
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    rest = dict(text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None)
    parts = pictures(name, folder, recipe, recipe["embed_dim"])
    StableDiffusionPipeline(**parts, **rest, requires_safety_checker=False).save_pretrained(folder)
    rows = len(recipe["classes"]) + 1
    table, config = folder / "class_embedder", dict(n_classes=rows, embed_dim=recipe["embed_dim"], key="class_label")
    table.mkdir(exist_ok=True)
    config = {"_class_name": "ClassEmbedder", **config}
    (table / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {"embedding.weight": Weights(name + "-classes").randn(rows, recipe["embed_dim"])}
    save_file(weights, table / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / "model_index.json").read_text())
    index["class_embedder"] = ["ldm", "ClassEmbedder"]
    index["id2label"] = dict(enumerate(recipe["classes"]))
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def alone(name, folder, recipe):
    from diffusers import __version__

    if "vq" in recipe:
        part, model = "vqvae", Weights(name).vq(autoencoder("VQModel", side=16, **recipe["vq"]))
    elif "kl" in recipe:
        part, model = "vae", Weights(name).kl(autoencoder("AutoencoderKL", **recipe["kl"]))
    else:
        part, model = "unet", Weights(name).unet(unet(recipe["context"], **recipe["unet"]))
    check(name, model).save_pretrained(folder / part)
    index = {"_class_name": "LDMPipeline", "_diffusers_version": __version__, part: ["diffusers", type(model).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("out", type=Path, metavar="OUT")
    flags.add_argument("--only", action="append", choices=RECIPES, metavar="NAME", help=", ".join(RECIPES))
    a = flags.parse_args()
    for name in a.only or [n for n in RECIPES if n not in ONLY_WHEN_NAMED]:
        recipe, folder = RECIPES[name], a.out / name
        with torch.no_grad():
            kinds = dict(text=stable_diffusion, bert=text_to_image, classes=class_to_image, without=unconditional)
            kinds |= dict(small=super_resolution)
            make = next((make for key, make in kinds.items() if key in recipe), alone)
            make(name, folder, recipe)
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        print(f"{folder}: {size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
